"""Starting from a trained network: which of its weights fit, how the others can grow, and what is not trained.

Shapes: the first convolution's weight is [W, g * C, ...] for g images of C channels (an upsampler sees two), the last
one's [g * C, W, ...] (with a learned variance it predicts two), a table of classes [K, ...], with one row more where
there is a null class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch as th
import torch.nn as nn

from ..networks.architecture import CLASSIFIER_NAMES, architecture
from ..nn import traits_of
from ..runtime.errors import UserError, listed, nearest, refuse
from ..runtime.options import Size
from .checkpoints import CLASSIFIER, UNET, UPSAMPLER, Checkpoint, open_checkpoint
from .weights import difference, shapes

POSSIBLE = {(UNET, UNET), (UNET, UPSAMPLER), (UNET, CLASSIFIER), (UPSAMPLER, UPSAMPLER), (CLASSIFIER, CLASSIFIER)}
SIZE_FLAGS = {UNET: "image_size", UPSAMPLER: "large_size", CLASSIFIER: "image_size"}
_INPUT, _LABELS, _OUTPUTS = "input_blocks.0.0.weight", "label_emb.weight", ("out.2.weight", "out.2.bias")
_SILENT_AT_FIRST = "low_res_embed."  # its last layer starts at zero
_DEPENDING_ON_SIZE = ("channel_mult", "attention_resolutions")
_SHOWN = 6


def open_source(path: str) -> Checkpoint:
    """The checkpoint at a path, or the newest moving average of a run's folder."""
    source = open_checkpoint(path, "--init_from")
    kinds = "U-Net, upsampler or classifier: give the checkpoint of one"
    refuse((not source.kind, f"--init_from {source.path} is no {kinds}"))
    return source


def flags_for(source: Checkpoint, kind: str, size: Size | None, default: Size) -> dict[str, Any]:
    """The flags of a network of some kind that takes what it can of a checkpoint.

    The levels and their attention, which depend on the size of the images, are read off the checkpoint's weights.

    :param size: of the new network's images; None for those of the checkpoint, as far as they are known and have the
        same part in both kinds, else `default`.
    """
    other = (source.kind, kind) not in POSSIBLE
    refuse((other, f"--init_from {source.path} is of kind {source.kind}, from which no {kind} can start"))
    name = SIZE_FLAGS[source.kind]
    known = source.flags.get(name, architecture(source.weights).get(name)) if name == SIZE_FLAGS[kind] else None
    size = next(side for side in (size, known, default) if side is not None)
    read = architecture(source.weights, source.size_of_inputs(size, {}))
    flags = {**read, **source.flags}
    if source.kind != kind or size != known:
        names = [CLASSIFIER_NAMES[n] if source.kind == CLASSIFIER else n for n in _DEPENDING_ON_SIZE]
        flags |= {name: read[name] for name in names if name in read}
    if kind == CLASSIFIER != source.kind:
        flags = {CLASSIFIER_NAMES.get(n, n): value for n, value in flags.items()}
    return flags


@dataclass
class Report:
    """The origin of every parameter.

    :param taken: those that are the checkpoint's.
    :param changed: name -> how it was made, for those that are not.
    :param unused: the checkpoint's parameters that the network does not have.
    """

    path: str
    mismatch: str
    total: int
    taken: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the log."""
        lines = [f"init_from {self.path}: {len(self.taken)} of {self.total} parameters taken as they are"]
        for reason in dict.fromkeys(self.changed.values()):
            names = [name for name, text in self.changed.items() if text == reason]
            lines.append(f"  {listed(names, _SHOWN)}: {reason}")
        return lines + [f"  of the checkpoint, not used: {listed(self.unused, _SHOWN)}"] * bool(self.unused)


@th.no_grad()
def initialise(
    model: nn.Module,
    source: Checkpoint,
    *,
    mismatch: str = "error",
    classes: Sequence[str] = (),
    size: Size | None = None,
) -> Report:
    """Give a network the weights of a checkpoint, where they fit.

    :param mismatch: what becomes of the others: "error"; "reinit", they stay as they are; "inflate", they are grown
        from the checkpoint's so that the network computes what it did.
    :param classes: names of the network's classes by id, [] where they are unknown.
    :param size: of the images, for messages.
    """
    state = model.state_dict()
    fitting = _Fitting(model, source, classes)
    unused = [name for name in source.weights if name not in state or fitting.old(name) is None]
    report, result = Report(source.path, mismatch, len(state), unused=unused), {}
    for name, fresh in state.items():
        old = fitting.old(name)
        if old is not None and old.shape == fresh.shape and not (name in fitting.tables and fitting.renamed):
            result[name] = old
            report.taken.append(name)
        elif mismatch == "inflate":
            result[name], report.changed[name] = fitting.grown(name, fresh, old)
        else:
            result[name], report.changed[name] = fresh, f"starts anew, {_why(old, fresh)}"
    if mismatch == "error" and (report.changed or report.unused):
        raise UserError(
            f"{source.path} does not fit the network: {fitting.difference(size)}; give --init_mismatch inflate "
            "to let what differs grow from it, or reinit to start that anew"
        )
    model.load_state_dict(result)
    return report


def _why(old: th.Tensor | None, fresh: th.Tensor) -> str:
    if old is None:
        return "as the checkpoint has none"
    same = old.shape == fresh.shape
    return "as the classes are others" if same else f"as it was {list(old.shape)} and is {list(fresh.shape)}"


class _Fitting:
    """How the ends of a network are made from those of another one."""

    def __init__(self, model: nn.Module, source: Checkpoint, classes: Sequence[str]) -> None:
        self.source, self.classes, self.state = source, classes, model.state_dict()
        self.channels = [architecture(weights).get("image_channels", 0) for weights in (source.weights, self.state)]
        self.null = bool(source.flags.get("null_class")), traits_of(model).null_label is not None
        self.by_name = bool(classes and source.classes)
        differs = self.by_name and list(classes) != list(source.classes)
        self.renamed = differs or bool(source.flags and self.null[0] != self.null[1])
        self.outputs = _OUTPUTS if any(name.startswith("output_blocks.") for name in self.state) else ()
        head = [name for name in self.state if name.startswith("out.")][-2:]
        self.tables = set(head) if source.kind == CLASSIFIER else {_LABELS}

    def old(self, name: str) -> th.Tensor | None:
        """The checkpoint's parameter; None of another kind of head, even where names and shapes agree."""
        other_head = not self.outputs and self.source.kind != CLASSIFIER and name.startswith("out.")
        return None if other_head else self.source.weights.get(name)

    def difference(self, size: Size | None) -> str:
        if shapes(self.source.weights) == shapes(self.state):
            null = "with" if self.null[0] else "without"
            before, now = listed(self.source.classes, _SHOWN), listed(self.classes, _SHOWN)
            return f"its classes are {before}, {null} a null class, and those of the data {now}"
        return difference(self.source.weights, self.state, size)

    def grown(self, name: str, fresh: th.Tensor, old: th.Tensor | None) -> tuple[th.Tensor, str]:
        """A parameter made from the checkpoint's, and how."""
        if name.startswith(_SILENT_AT_FIRST):
            return fresh, "starts anew, and has no effect at first"
        if old is None and name == _LABELS:
            return th.zeros_like(fresh), "starts at 0, as the checkpoint knows no classes"
        if old is not None and name in self.tables and old.shape[1:] == fresh.shape[1:]:
            return self._rows(fresh, old)
        if old is not None and name in (_INPUT, *self.outputs):
            axis = 1 if name == _INPUT else 0
            grown = _grown(old, fresh, axis, self.channels)
            if grown is not None:
                ends = "inputs" if axis else "outputs"
                return grown, f"{fresh.shape[axis]} {ends} from {old.shape[axis]}, the others start at 0"
        raise UserError(
            f"{self.source.path} cannot be inflated: {name} does not fit, {_why(old, fresh)}; give "
            "--init_mismatch reinit, or the flags of the checkpoint"
        )

    def _rows(self, fresh: th.Tensor, old: th.Tensor) -> tuple[th.Tensor, str]:
        """A table with the checkpoint's rows of the same classes; others have the mean of its rows."""
        had_null, has_null = self.null
        named, count = len(old) - had_null, len(fresh) - has_null
        row_of = {name: row for row, name in enumerate(self.source.classes[:named])}
        keys = [*self.classes, *[""] * count][:count] if self.by_name else []
        rows = [row_of.get(key) for key in keys] or [label if label < named else None for label in range(count)]
        rows += [named if had_null else None] * has_null
        mean = old[:named].mean(dim=0)
        table = th.stack([mean if row is None else old[row] for row in rows])
        how = "by name" if self.by_name else "by id, as one side has no classes.json"
        taken = sum(row is not None for row in rows)
        return table, f"{taken} of {len(fresh)} rows taken {how}, the others are the mean of the checkpoint's"


def _grown(old: th.Tensor, fresh: th.Tensor, axis: int, channels: Sequence[int]) -> th.Tensor | None:
    """A tensor of the shape of `fresh` with `old` in it and zeros elsewhere; None where it has no place.

    :param channels: of an image, in the old and the new tensor, of which that axis holds one or several.
    """
    before, now = channels
    if not 0 < before <= now or old.shape[axis] % before or fresh.shape[axis] % now:
        return None
    parts, pieces = old.unflatten(axis, (-1, before)), th.zeros_like(fresh).unflatten(axis, (-1, now))
    if axis and parts.shape[axis] > pieces.shape[axis]:
        return None  # an image that it would no longer see
    kept = min(parts.shape[axis], pieces.shape[axis])
    target, parts = pieces.narrow(axis, 0, kept).narrow(axis + 1, 0, before), parts.narrow(axis, 0, kept)
    if target.shape != parts.shape:
        return None
    target.copy_(parts)
    grown: th.Tensor = pieces.flatten(axis, axis + 1)
    return grown


def matching(model: nn.Module, text: str, flag: str) -> list[str]:
    """The parameters that patterns such as "input_blocks.*,time_embed.*" name, matched as file names are.

    :param flag: that they were given by, for messages.
    """
    names = [name for name, _ in model.named_parameters()]
    patterns = [word.strip() for word in text.split(",") if word.strip()]
    for pattern in patterns or ([text] if text else []):
        if not any(fnmatchcase(name, pattern) for name in names):
            modules = [f"{name}.*" for name, _ in model.named_modules() if name]
            modules.sort(key=lambda name: name.count("."))
            hint = nearest(pattern, [*modules, *names]) or ": there are " + ", ".join(modules[:_SHOWN])
            raise UserError(f"--{flag} {pattern} matches no parameter{hint}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def freeze(model: nn.Module, text: str) -> list[str]:
    """Take parameters out of the training, by patterns; returns their names."""
    names = matching(model, text, "freeze")
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names
