"""Starting from a trained network: which of its weights fit, how the others can grow, and what is not trained.

Shapes: the first convolution's weight is [W, g * C, ...] for g images of C channels (an upsampler sees two), the last
one's [g * C, W, ...] (with a learned variance it predicts two), a table of classes [K, ...], with one row more where
there is a null class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch as th
import torch.nn as nn

from ..image_datasets import load_classes
from ..networks.architecture import CLASSIFIER_NAMES, architecture
from ..runtime.options import Size, nearest
from ..sampling.prediction import traits_of
from . import checkpoints, weights as weight_files

UNET, UPSAMPLER, CLASSIFIER = "diffusion model", "upsampler", "classifier"
POSSIBLE = {(UNET, UNET), (UNET, UPSAMPLER), (UNET, CLASSIFIER), (UPSAMPLER, UPSAMPLER), (CLASSIFIER, CLASSIFIER)}
_ARTICLES = {UNET: "a", UPSAMPLER: "an", CLASSIFIER: "a"}
SIZE_FLAGS = {UNET: "image_size", UPSAMPLER: "large_size", CLASSIFIER: "image_size"}
_INPUT, _LABELS = "input_blocks.0.0.weight", "label_emb.weight"
_OUTPUTS = ("out.2.weight", "out.2.bias")
_SILENT_AT_FIRST = "low_res_embed."  # its last layer starts at zero
_DEPENDING_ON_SIZE = ("channel_mult", "attention_resolutions")
_SHOWN = 6

Weights = Mapping[str, th.Tensor]


# ---- the checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint to start from.

    :param flags: of the run that made it, {} where no config.json lies beside it.
    :param classes: names by id, [] where they are unknown.
    :param choice: which weights of the file these are, '' where it holds no more.
    """

    path: str
    weights: Weights
    flags: Mapping[str, Any]
    classes: Sequence[str]
    choice: str = ""

    @property
    def kind(self) -> str:
        """UNET, UPSAMPLER or CLASSIFIER."""
        if not any(name.startswith("output_blocks.") for name in self.weights):
            return CLASSIFIER
        inputs, channels = self.weights[_INPUT].shape[1], architecture(self.weights)["image_channels"]
        upsampler = "large_size" in self.flags if self.flags else inputs == 2 * channels
        return UPSAMPLER if upsampler else UNET


def open_source(path: str) -> Source:
    """The checkpoint at a path, or the newest moving average of a run's folder.

    :raises FileNotFoundError, ValueError: if there is none, or it is of no network of this package.
    """
    path = checkpoints.resolve_model(path, "--init_from")
    weights, choice = weight_files.weights_of(path)
    if not architecture(weights):
        raise ValueError(f"--init_from {path} is no U-Net, upsampler or classifier: give the checkpoint of one")
    names = checkpoints.classes_beside(path)
    return Source(path, weights, checkpoints.config_beside(path), load_classes(names) if names else [], choice)


def flags_for(source: Source, kind: str, size: Size | None, usual: Size) -> dict[str, Any]:
    """The flags of a network of some kind that takes what it can of a checkpoint.

    What depends on the size of the images (the levels and where they attend) is that of the checkpoint's own.

    :param size: of the new network's images; None for those of the checkpoints, as far as they are known and have the
        same part in both kinds, else `usual`.
    :raises ValueError: if nothing of it could be taken.
    """
    if (source.kind, kind) not in POSSIBLE:
        raise ValueError(
            f"--init_from {source.path} is of {_ARTICLES[source.kind]} {source.kind}, from which no {kind} can start"
        )
    name = SIZE_FLAGS[source.kind]
    own_size = source.flags.get(name, architecture(source.weights).get(name)) if name == SIZE_FLAGS[kind] else None
    size = next(side for side in (size, own_size, usual) if side is not None)
    read = architecture(source.weights, size)
    flags = {**read, **source.flags}
    if source.kind != kind or size != own_size:
        renamed = CLASSIFIER_NAMES if source.kind == CLASSIFIER else {}
        flags |= {renamed.get(n, n): read[renamed.get(n, n)] for n in _DEPENDING_ON_SIZE if renamed.get(n, n) in read}
    if kind == CLASSIFIER != source.kind:
        flags = {CLASSIFIER_NAMES.get(n, n): value for n, value in flags.items()}
    return flags


# ---- its weights


@dataclass
class Report:
    """What became of every parameter.

    :param taken: those that are the checkpoint's.
    :param changed: name -> what was done, for those that are not.
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
        said = [f"init_from {self.path}: {len(self.taken)} of {self.total} parameters taken as they are"]
        for reason in dict.fromkeys(self.changed.values()):
            said.append(f"  {_listed([name for name, text in self.changed.items() if text == reason])}: {reason}")
        if self.unused:
            said.append(f"  of the checkpoints, not used: {_listed(self.unused)}")
        return said


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@th.no_grad()
def initialise(
    model: nn.Module, source: Source, *, mismatch: str = "error", classes: Sequence[str] = (), size: Size | None = None
) -> Report:
    """Give a network the weights of a checkpoints, where they fit.

    :param mismatch: what becomes of the others: "error"; "reinit", they stay as they are; "inflate", they are grown
        from the checkpoint's so that the network computes what it did.
    :param classes: names of the network's classes by id, [] where they are unknown.
    :param size: of the images, for messages.
    :raises ValueError: if parameters do not fit, and `mismatch` does not say what to do or cannot be done.
    """
    own = model.state_dict()
    fitting = _Fitting(model, source, classes)
    unused = [name for name in source.weights if name not in own or fitting.old(name) is None]
    report, result = Report(source.path, mismatch, len(own), unused=unused), {}
    for name, fresh in own.items():
        old = fitting.old(name)
        if old is not None and old.shape == fresh.shape and not (name in fitting.tables and fitting.renamed):
            result[name] = old
            report.taken.append(name)
        elif mismatch == "inflate":
            result[name], report.changed[name] = fitting.grown(name, fresh, old)
        else:
            result[name], report.changed[name] = fresh, f"starts anew, {_why(old, fresh)}"
    if mismatch == "error" and (report.changed or report.unused):
        raise ValueError(
            f"{source.path} does not fit the network: {fitting.difference(own, size)}; give --init_mismatch inflate to "
            "let what differs grow from it, or reinit to start that anew"
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

    def __init__(self, model: nn.Module, source: Source, classes: Sequence[str]) -> None:
        self.source, self.classes = source, classes
        there, here = architecture(source.weights), architecture(model.state_dict())
        self.channels = there.get("image_channels", 0), here.get("image_channels", 0)
        self.null = bool(source.flags.get("null_class")), traits_of(model).null_label is not None
        named = bool(classes and source.classes) and list(classes) != list(source.classes)
        self.renamed = named or bool(source.flags and self.null[0] != self.null[1])
        head = [name for name in model.state_dict() if name.startswith("out.")][-2:]
        self.tables = {_LABELS} if source.kind != CLASSIFIER else set(head)
        self.outputs = _OUTPUTS if any(name.startswith("output_blocks.") for name in model.state_dict()) else ()

    def old(self, name: str) -> th.Tensor | None:
        """The checkpoint's parameter; None of another kind of head, even where names and shapes agree."""
        other_head = not self.outputs and self.source.kind != CLASSIFIER and name.startswith("out.")
        return None if other_head else self.source.weights.get(name)

    def difference(self, own: Weights, size: Size | None) -> str:
        """A sentence about what does not fit."""
        shapes = {name: value.shape for name, value in self.source.weights.items()}
        if shapes == {name: value.shape for name, value in own.items()}:
            null = "with" if self.null[0] else "without"
            there, here = _listed(self.source.classes), _listed(self.classes)
            return f"its classes are {there}, {null} a null class, and those of the data {here}"
        return weight_files.difference(self.source.weights, own, size)

    def grown(self, name: str, fresh: th.Tensor, old: th.Tensor | None) -> tuple[th.Tensor, str]:
        """A parameter made from the checkpoint's, and what was done.

        :raises ValueError: if that cannot be.
        """
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
                what = f"{'inputs' if axis else 'outputs'}"
                return grown, f"{fresh.shape[axis]} {what} from {old.shape[axis]}, the others start at 0"
        raise ValueError(
            f"{self.source.path} cannot be inflated: {name} does not fit, {_why(old, fresh)}; give "
            "--init_mismatch reinit, or the flags of the checkpoint"
        )

    def _rows(self, fresh: th.Tensor, old: th.Tensor) -> tuple[th.Tensor, str]:
        """A table with the checkpoint's rows of the same classes; others have the mean of its rows."""
        had_null, has_null = self.null
        named, count = len(old) - had_null, len(fresh) - has_null
        mean = old[:named].mean(dim=0)
        rows = [self._row(label, named) for label in range(count)] + [named if had_null else None] * has_null
        table = th.stack([mean if row is None else old[row] for row in rows])
        by = "by name" if self.classes and self.source.classes else "by id, as one side has no classes.json"
        taken = sum(row is not None for row in rows)
        return table, f"{taken} of {len(fresh)} rows taken {by}, the others are the mean of the checkpoint's"

    def _row(self, label: int, named: int) -> int | None:
        """The row of the checkpoint that is a label's."""
        if not (self.classes and self.source.classes):
            return label if label < named else None
        rows = {name: row for row, name in enumerate(self.source.classes) if row < named}
        return rows.get(self.classes[label]) if label < len(self.classes) else None


def _grown(old: th.Tensor, fresh: th.Tensor, axis: int, channels: tuple[int, int]) -> th.Tensor | None:
    """A tensor of the shape of `fresh` with `old` in it and zeros elsewhere; None where it has no place.

    :param channels: of an image, in the old and the new tensor, of which that axis holds one or several.
    """
    there, here = channels
    if not there or not here or there > here or old.shape[axis] % there or fresh.shape[axis] % here:
        return None
    parts, pieces = old.unflatten(axis, (-1, there)), th.zeros_like(fresh).unflatten(axis, (-1, here))
    if axis and parts.shape[axis] > pieces.shape[axis]:
        return None  # an image that it would no longer see
    kept = min(parts.shape[axis], pieces.shape[axis])
    target = pieces.narrow(axis, 0, kept).narrow(axis + 1, 0, there)
    parts = parts.narrow(axis, 0, kept)
    if target.shape != parts.shape:
        return None
    target.copy_(parts)
    grown: th.Tensor = pieces.flatten(axis, axis + 1)
    return grown


# ---- what is trained


def patterns_of(text: str) -> list[str]:
    """The patterns of "input_blocks.*,time_embed.*"; [] of ''."""
    return [word.strip() for word in text.split(",") if word.strip()]


def matching(model: nn.Module, text: str, flag: str) -> list[str]:
    """The parameters that patterns name, as file names are matched: * is any text, ? a character, [01] one of these.

    :param flag: that they were given by, for messages.
    :raises ValueError: for a pattern that matches nothing, naming the nearest.
    """
    names = [name for name, _ in model.named_parameters()]
    if text and not patterns_of(text):
        raise ValueError(
            f"--{flag} {text!r} names no parameter: write patterns such as input_blocks.*, or leave it out"
        )
    for pattern in patterns_of(text):
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = nearest(pattern, _branches(names)) or f": there are {_listed(_branches(names)[:_SHOWN])}"
            raise ValueError(f"--{flag} {pattern} matches no parameter{hint}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns_of(text))]


def _branches(names: Iterable[str]) -> list[str]:
    """Patterns of all modules, those of the largest first, then the names themselves."""
    names = list(names)
    parts = [name.split(".") for name in names]
    depth = max(map(len, parts), default=1)
    modules = [".".join([*words[:length], "*"]) for length in range(1, depth) for words in parts if len(words) > length]
    return list(dict.fromkeys([*modules, *names]))


def freeze(model: nn.Module, text: str) -> list[str]:
    """Take parameters out of the training, by patterns; returns their names.

    :raises ValueError: if a pattern matches nothing, or all parameters are matched.
    """
    names = matching(model, text, "freeze")
    if len(names) == len(list(model.parameters())):
        raise ValueError(f"--freeze {text} leaves nothing to train: name fewer parameters")
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names
