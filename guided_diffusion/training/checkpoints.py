"""Checkpoints: the files of one step of a run, or a single file of weights, found by any of their names.

A run folder holds config.json, classes.json and, for every saved step, modelNNNNNN.pt and ema_RATE_NNNNNN.pt (fp32
weights after N updates), optNNNNNN.pt (optimizer), stateNNNNNN.pt (everything else) and, written last, the manifest
setNNNNNN.json; runs with adapters also a folder loraNNNNNN. Older runs wrote no manifests: of checkpoints before the
first one, the files that must be there decide, of those after it, the manifest.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch as th

from .. import dist_util
from ..networks.architecture import architecture
from ..runtime import files, paths
from ..runtime.errors import UserError
from ..runtime.paths import exists, is_remote, isdir, join, names_in
from . import manifest
from .weights import checked, load as load, neighbours, pick, save as save

CONFIG, CLASSES = "config.json", "classes.json"
UNET, UPSAMPLER, CLASSIFIER = "diffusion model", "upsampler", "classifier"
_NAME = re.compile(
    r"(?:(?:(?P<kind>model|opt|state)_?|ema_(?P<rate>[\d.e-]+)_)(?P<step>\d+)\.(?:pt|pth|safetensors)"
    r"|lora(?P<adapted>\d{6,})(?:\.pt)?)$"
)


@dataclass
class Checkpoint:
    """The files of one step, '' where there is none; `step` is None where no name tells it.

    Its weights and what lies beside them are read when they are first asked for, and once.

    :param emas: rate, as it is written in the name -> path.
    :param path: the file whose weights are used; '' for the best.
    """

    step: int | None
    model: str = ""
    opt: str = ""
    state: str = ""
    lora: str = ""
    emas: dict[str, str] = field(default_factory=dict)
    manifest: str = ""
    path: str = ""

    @property
    def files(self) -> list[str]:
        """Every file of the set, those first without which it is never taken for complete."""
        every = (self.manifest, self.model, self.state, self.opt, self.lora, *self.emas.values())
        return [path for path in every if path]

    @property
    def best(self) -> str:
        """The slowest moving average, else the model; '' where there is neither."""
        return self.emas[max(self.emas, key=float)] if self.emas else self.model

    @property
    def settled(self) -> str:
        """As `best`, but averages that are longer than the run count only if they were warmed up (--ema_warmup)."""
        warmed_up = config_beside(self.best).get("ema_warmup")
        old = {rate: path for rate, path in self.emas.items() if warmed_up or not is_young(rate, self.step or 0)}
        return Checkpoint(self.step, self.model, emas=old).best or self.best

    @cached_property
    def flags(self) -> dict[str, Any]:
        """The flags of the run that made it, {} where no config.json lies beside it."""
        return config_beside(self.path)

    @cached_property
    def classes(self) -> Sequence[str]:
        """Names of its classes by id, [] where they are unknown."""
        from ..image_datasets import load_classes

        names = classes_beside(self.path)
        return load_classes(names) if names else []

    @cached_property
    def picked(self) -> tuple[dict[str, th.Tensor], str]:
        """Its weights, and a sentence that says which of those in the file they are, '' where it holds no others."""
        return pick(self.path, self.best)

    @property
    def weights(self) -> dict[str, th.Tensor]:
        """The state dict in its file."""
        return self.picked[0]

    def fitting(
        self, network: th.nn.Module | Mapping[str, th.Tensor], flags: Mapping[str, Any]
    ) -> dict[str, th.Tensor]:
        """Its weights, as a network takes them; it may be on the meta device, or its state dict alone.

        :param flags: that it was built from, of which the sizes name attention resolutions in messages.
        :raises ValueError: if the file is no weights, or fits other flags, which the message then names.
        """
        return checked(self.picked, network, self.path, flags)

    @property
    def kind(self) -> str:
        """UNET, UPSAMPLER or CLASSIFIER; '' for other networks."""
        read = architecture(self.weights)
        if not read:
            return ""
        if not any(name.startswith("output_blocks.") for name in self.weights):
            return CLASSIFIER
        inputs = self.weights["input_blocks.0.0.weight"].shape[1]
        upsampler = "large_size" in self.flags if self.flags else inputs == 2 * read["image_channels"]
        return UPSAMPLER if upsampler else UNET


CheckpointSet = Checkpoint  # its older name


def is_young(rate: str | float, updates: int) -> bool:
    """Whether an average, about 1 / (1 - rate) updates long, is longer than a run of so many updates."""
    return updates * (1 - float(rate)) < 1 - 1e-9  # 1 - 0.99 is a little more than a hundredth


# ---- names


def step_of(path: str) -> int | None:
    """The number of updates that a file name tells, or None."""
    name = os.path.basename(path)
    match = _NAME.search(name)
    number = match["step"] or match["adapted"] if match else (manifest.NAME.match(name) or {"step": None})["step"]
    return None if number is None else int(number)


def sets_in(folder: str) -> dict[int, Checkpoint]:
    """step -> the checkpoint of a folder, steps ascending; a manifest alone is none."""
    sets: dict[int, Checkpoint] = {}
    folder = paths.resolve(folder)
    names = names_in(folder)
    for match in filter(None, map(_NAME.match, names)):
        step, path = int(match["step"] or match["adapted"]), join(folder, match.string)
        entry = sets.setdefault(step, Checkpoint(step))
        if match["rate"]:
            entry.emas[match["rate"]] = path
        else:
            setattr(entry, match["kind"] or "lora", path)
    for step, entry in sets.items():
        if manifest.name_of(step) in names:
            entry.manifest = join(folder, manifest.name_of(step))
    return dict(sorted(sets.items()))


def _beside(path: str) -> Checkpoint:
    """The checkpoint that a file belongs to."""
    step = step_of(path)
    return Checkpoint(None) if step is None else sets_in(os.path.dirname(path) or ".").get(step, Checkpoint(step))


def _check_exists(path: str, what: str) -> None:
    if not path or not exists(path):
        hint = neighbours(path) or ": give the path of a checkpoint, or the folder of a run"
        raise FileNotFoundError(f"{what} {path!r} does not exist{hint}")


# ---- to sample from


def open_checkpoint(path: str, what: str = "the checkpoint") -> Checkpoint:
    """The checkpoint of a file, or of a run folder that with the newest moving average, else with the newest model.

    Checkpoints with files of other sizes than their manifests name come last.

    :param what: the path is, in messages.
    :raises FileNotFoundError, ValueError: if there is none.
    """
    path = paths.resolve(path)
    if not isdir(path):
        _check_exists(path, what)
        return replace(_beside(path), path=path)
    sets = sorted(sets_in(path).values(), key=lambda e: (not _damaged(e), bool(e.emas), bool(e.model), e.step or 0))
    if not sets or not sets[-1].best:
        raise UserError(
            f"{what} {path} holds no ema_RATE_NNNNNN.pt or modelNNNNNN.pt: give a checkpoint or a run's folder"
        )
    return replace(sets[-1], path=sets[-1].settled)


def resolve_model(path: str, what: str = "the checkpoint") -> str:
    """The file of `open_checkpoint`."""
    return open_checkpoint(path, what).path


def load_weights(network: th.nn.Module, path: str, flags: Mapping[str, Any] | None = None) -> None:
    """Load a checkpoint into a network that was built from `flags`.

    :raises FileNotFoundError, ValueError: if there is none, or it does not fit.
    """
    network.load_state_dict(open_checkpoint(path).fitting(network, flags or {}))


def _damaged(entry: Checkpoint, *, checksums: bool = False) -> str:
    return manifest.fault(entry.manifest, checksums=checksums, missing_is_fine=True) if entry.manifest else ""


def config_beside(path: str) -> dict[str, Any]:
    """The flags that the run of a checkpoint (or run folder) was made with; {} where no config.json lies there.

    :raises ValueError: if the file is damaged.
    """
    file_path = _in_folder_of(path, CONFIG)
    if not exists(file_path):
        return {}
    try:
        return {**files.parse_json(files.read_file(file_path))["flags"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = files.reason(error)
        raise UserError(
            f"{file_path} is no config of a run ({reason}): repair it, or move it away and give the flags"
        ) from error


def classes_beside(path: str) -> str:
    """The path of the classes.json beside a checkpoint or in a run folder; '' if there is none."""
    file_path = _in_folder_of(path, CLASSES)
    return file_path if exists(file_path) else ""


def _in_folder_of(path: str, name: str) -> str:
    path = paths.resolve(path)
    return join(path if isdir(path) else os.path.dirname(path) or ".", name)


# ---- to go on from


def fault(entry: Checkpoint, sets: Mapping[int, Checkpoint], *, checksums: bool = False) -> str:
    """Why a checkpoint of a folder is not complete; '' if it is.

    :param sets: all of the folder.
    :param checksums: read all that a manifest names; else only sizes are compared.
    """
    if entry.manifest:
        return manifest.fault(entry.manifest, checksums=checksums)
    if any(other.manifest and other.step < entry.step for other in sets.values() if other.step and entry.step):
        return "it was not finished: it has no manifest"
    last = "state" if any(other.state for other in sets.values()) else "opt"
    absent = [name for name in ("model", last) if not getattr(entry, name)]
    return f"it has no {absent[0]} file" if absent else _cut(entry.files)


def _cut(file_paths: Sequence[str]) -> str:
    """Which local zip files, as torch writes them, lack their end."""
    for path in file_paths:
        with open(os.devnull if is_remote(path) or isdir(path) else path, "rb") as file:
            if file.read(2) == b"PK" and not zipfile.is_zipfile(file):
                return f"{os.path.basename(path)} is cut short"
    return ""


def newest(folder: str, *, checksums: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a folder, else the newest weights where nothing but weights lies.

    :return: it, and a sentence for each newer one that is not complete.
    """
    sets = sets_in(folder)
    faults: list[str] = []
    for step, entry in reversed(sets.items()):
        reason = fault(entry, sets, checksums=checksums)
        if not reason:
            return entry, faults
        faults.append(f"the checkpoint of step {step} is passed over: {reason}")
    weights = [entry for entry in sets.values() if entry.model and not _cut([entry.model])]
    if not weights or any(entry.state or entry.manifest for entry in sets.values()):
        return None, faults
    return weights[-1], []


def latest(folder: str) -> Checkpoint | None:
    """The newest complete checkpoint of a folder, by names and sizes."""
    return newest(folder)[0]


def find_set(path: str, *, checksums: bool = False) -> Checkpoint:
    """The checkpoint that a file belongs to, or the newest complete one of a folder, to go on from.

    :param checksums: read the files, and refuse altered ones.
    :raises FileNotFoundError, ValueError: if there is no such file, no weights to it, or it is not what was written.
    """
    path = paths.resolve(path)
    if isdir(path):
        complete, faults = newest(path, checksums=checksums)
        if complete is None:
            fault = f"no complete checkpoint, {', '.join(faults)}" if faults else "no modelNNNNNN.pt to go on from"
            raise UserError(f"{path} holds {fault}; give the folder or a checkpoint of a run")
        return complete
    _check_exists(path, "the checkpoint")
    entry, match = _beside(path), _NAME.search(os.path.basename(path))
    reason = _damaged(entry, checksums=checksums)
    if reason:
        raise UserError(f"{path} belongs to a damaged checkpoint, {reason}: copy it again, or give the run's folder")
    if entry.step is None or (match and match["kind"] == "model") or (match and match["rate"] and not entry.model):
        entry.model = path
    if not entry.model:
        raise UserError(f"{path} has no model{entry.step:06d}.pt beside it: there are no weights to go on from")
    return entry


def choose(path: str, *, auto: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, the same on all ranks: rank 0 chooses it, and reads its files for their checksums.

    :param path: any file of it, or a run's folder; '' for none.
    :param auto: none is no mistake.
    :return: the checkpoint, and a line for each newer one that is not complete.
    :raises FileNotFoundError, ValueError: if there is no such checkpoint, or it is not what was written.
    """
    chosen: tuple[Checkpoint | None, list[str]] = None, []
    if dist_util.rank() == 0 and path:
        chosen = newest(path, checksums=True) if isdir(path) else (None, [])
        if not auto:
            chosen = find_set(path, checksums=True), chosen[1]
    return dist_util.broadcast_object(chosen)


# ---- to remove


def keep_last(folder: str, count: int) -> None:
    """Remove all complete checkpoints but the newest `count`, and what is not complete before them; 0 keeps all.

    :raises OSError: naming a file that cannot be removed.
    """
    sets = sets_in(folder)
    complete = [step for step, entry in sets.items() if not fault(entry, sets)] if count else []
    for step, entry in sets.items():
        if complete and step < complete[-1] and step not in complete[-count:]:
            remove(entry)


def remove(entry: Checkpoint) -> None:
    """Remove the files of a checkpoint, in an order that never leaves a part that passes for complete."""
    for path in entry.files:
        if path != entry.lora or path.endswith(".pt"):
            paths.remove(path)
            continue
        for name in names_in(path):
            if name.startswith("adapter_"):
                paths.remove(join(path, name))
        if not is_remote(path):
            with suppress(OSError):  # files of others may lie there
                os.rmdir(path)


def sweep(folder: str) -> None:
    """Remove what processes that were killed while writing have left of their temporary files."""
    for name in [] if is_remote(folder) else names_in(folder):
        target, part, _ = name.partition(".part-")
        if part and (_NAME.match(target) or manifest.NAME.match(target) or target in (CONFIG, CLASSES)):
            paths.remove(join(folder, name))
