"""Files of a run: whole or absent, found by any of their names, and read together with the flags that made them.

A run folder holds config.json, classes.json and, for every saved step, a set: modelNNNNNN.pt and ema_RATE_NNNNNN.pt
(fp32 weights after N updates), optNNNNNN.pt (optimizer) and stateNNNNNN.pt (everything else), which is written last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import blobfile as bf
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.architecture import architecture
from guided_diffusion.npz import replacing

CONFIG, CLASSES = "config.json", "classes.json"
_NAME = re.compile(r"(?:(?P<kind>model|opt|state)_?|ema_(?P<rate>[\d.e-]+)_)(?P<step>\d+)\.(?:pt|pth|safetensors)$")
_SHOWN = 3


# ---- files


def is_remote(path: str) -> bool:
    """Whether a path is a URL, such as gs://bucket/run."""
    return "://" in path


def exists(path: str) -> bool:
    """Whether a local or remote file or folder is there."""
    return bool(bf.exists(path))


def names_in(folder: str) -> list[str]:
    """Names of what a local or remote folder holds; [] if it is not there."""
    return sorted(name.rstrip("/") for name in bf.listdir(folder)) if bf.isdir(folder) else []


def _write(path: str, write: Any) -> None:
    """Let `write(file)` fill a file that takes the name `path` only when it is complete."""
    if is_remote(path):  # object stores show a file when it is closed
        with bf.BlobFile(path, "wb") as file:
            write(file)
        return
    with replacing(path) as file:
        write(file)


def save(path: str, obj: Any) -> None:
    """Write tensors and plain values; whoever looks at `path` sees the old file or the whole new one."""
    _write(path, lambda file: th.save(obj, file))


def save_json(path: str, value: Any) -> None:
    """Write a JSON file as `save` writes tensors."""
    _write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def load(path: str, map_location: Any = "cpu") -> Any:
    """What a .pt or .safetensors file holds, provided that it is tensors and plain values.

    :raises FileNotFoundError, ValueError: if the file is missing, incomplete, or holds anything else.
    """
    if not exists(path):
        raise FileNotFoundError(f"{path} does not exist{_neighbours(path)}")
    try:
        if path.endswith(".safetensors"):
            return _load_safetensors(path, map_location)
        return dist_util.load_state_dict(path, map_location=map_location)
    except (MemoryError, th.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # an unpickler raises whatever the first bytes of some other file lead it to
        damaged = "it is incomplete, or holds more than tensors and plain values; copy or download it again"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else damaged
        raise ValueError(f"{path} ({bf.stat(path).size} bytes) cannot be read as a checkpoint: {reason}") from error


def _load_safetensors(path: str, map_location: Any) -> dict[str, th.Tensor]:
    import safetensors.torch

    with bf.BlobFile(path, "rb") as file:
        state = safetensors.torch.load(file.read())
    return {name: value.to(map_location) for name, value in state.items()}


def _neighbours(path: str) -> str:
    """What a message about a missing file adds: the checkpoints beside it."""
    found = [name for name in names_in(os.path.dirname(path) or ".") if _NAME.search(name)]
    weights = [name for name in found if not name.startswith(("opt", "state"))]
    return f"; beside it lie {', '.join(weights[-_SHOWN:])}" if weights else ""


# ---- sets of files


@dataclass
class CheckpointSet:
    """The files of one step, '' where there is none; `step` is None where no name tells it.

    :param emas: rate, as it is written in the name -> path.
    """

    step: int | None
    model: str = ""
    opt: str = ""
    state: str = ""
    emas: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """Every file of the set, the one that makes it complete first."""
        return [path for path in (self.state, self.opt, self.model, *self.emas.values()) if path]

    @property
    def weights(self) -> str:
        """The best file to sample from: the slowest moving average, else the model."""
        return self.emas[max(self.emas, key=float)] if self.emas else self.model


def step_of(path: str) -> int | None:
    """The number of updates that a file name tells, or None."""
    match = _NAME.search(os.path.basename(path))
    return int(match["step"]) if match else None


def sets_in(folder: str) -> dict[int, CheckpointSet]:
    """step -> the set of files of a folder, steps ascending."""
    sets: dict[int, CheckpointSet] = {}
    for name in names_in(folder):
        match = _NAME.match(name)
        if match:
            entry = sets.setdefault(int(match["step"]), CheckpointSet(int(match["step"])))
            path = bf.join(folder, name)
            if match["rate"]:
                entry.emas[match["rate"]] = path
            else:
                setattr(entry, match["kind"], path)
    return dict(sorted(sets.items()))


def latest(folder: str) -> CheckpointSet | None:
    """The newest complete set of a folder: state and model, or optimizer and model where no run wrote states."""
    sets = sets_in(folder).values()
    last = "state" if any(entry.state for entry in sets) else "opt"
    complete = [entry for entry in sets if entry.model and getattr(entry, last)]
    return max(complete or [entry for entry in sets if entry.model], key=lambda e: e.step or 0, default=None)


def find_set(path: str) -> CheckpointSet:
    """The set that a file belongs to, or the newest complete one of a folder.

    :raises FileNotFoundError, ValueError: if there is no such file, or no weights to it.
    """
    if bf.isdir(path):
        entry = latest(path)
        if entry is None:
            raise ValueError(f"{path} holds no modelNNNNNN.pt to go on from: give the folder or a checkpoint of a run")
        return entry
    if not exists(path):
        raise FileNotFoundError(f"{path} does not exist{_neighbours(path)}")
    step = step_of(path)
    if step is None:
        return CheckpointSet(None, model=path)
    entry = sets_in(os.path.dirname(path) or ".").get(step, CheckpointSet(step))
    match = _NAME.search(os.path.basename(path))
    assert match is not None
    entry.model = path if match["kind"] == "model" else entry.model or (path if match["rate"] else "")
    if not entry.model:
        raise ValueError(f"{path} has no model{step:06d}.pt beside it: there are no weights to go on from")
    return entry


def resolve_model(path: str) -> str:
    """The file to sample from: the path itself, or of a run folder the newest moving average, else the newest model.

    :raises FileNotFoundError, ValueError: if there is none.
    """
    if not bf.isdir(path):
        if not path or not exists(path):
            hint = _neighbours(path) or ": give the path of a checkpoint, or the folder of a run"
            raise FileNotFoundError(f"the checkpoint {path!r} does not exist{hint}")
        return path
    found = sorted(sets_in(path).values(), key=lambda e: (bool(e.emas), bool(e.model), e.step or 0))
    if not found or not found[-1].weights:
        raise ValueError(f"{path} holds no ema_RATE_NNNNNN.pt or modelNNNNNN.pt: give a checkpoint or a run's folder")
    return found[-1].weights


def config_beside(path: str) -> dict[str, Any]:
    """The flags that the run of a checkpoint (or run folder) was made with; {} where no config.json lies there.

    :raises ValueError: if the file is damaged.
    """
    file_path = _beside(path, CONFIG)
    if not exists(file_path):
        return {}
    try:
        with bf.BlobFile(file_path, "r") as file:
            flags = json.load(file)["flags"]
        return dict(flags)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file_path} is no config of a run: repair it, or move it away and give the flags") from error


def classes_beside(path: str) -> str:
    """The path of the classes.json beside a checkpoint or in a run folder; '' if there is none."""
    file_path = _beside(path, CLASSES)
    return file_path if exists(file_path) else ""


def _beside(path: str, name: str) -> str:
    return str(bf.join(path if bf.isdir(path) else os.path.dirname(path) or ".", name))


def keep_last(folder: str, count: int) -> None:
    """Remove all sets of a folder but the newest `count`; 0 keeps all."""
    sets = list(sets_in(folder).values())
    for entry in sets[:-count] if count else []:
        for path in entry.paths:
            bf.remove(path)


# ---- weights into networks


def load_weights(model: th.nn.Module, path: str, flags: Mapping[str, Any] | None = None) -> None:
    """Load a checkpoint into a network that was built from `flags`.

    :param flags: only the sizes are read, for naming attention resolutions in messages.
    :raises ValueError: if the file is no weights, or fits other flags, which the message then names.
    """
    state = load(path)
    _check_weights(state, path)
    if all(name.startswith("module.") for name in state):  # saved from inside a data-parallel wrapper
        state = {name.removeprefix("module."): value for name, value in state.items()}
    own = model.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        size = next((flags[key] for key in ("large_size", "image_size") if flags and key in flags), None)
        raise ValueError(f"{path} does not fit the flags: {_difference(state, own, size)}")
    model.load_state_dict(state)


def _check_weights(state: Any, path: str) -> None:
    optimizer = isinstance(state, dict) and {"state", "param_groups"} <= set(state)
    if isinstance(state, dict) and not optimizer and all(isinstance(value, th.Tensor) for value in state.values()):
        return
    step = step_of(path)
    beside = sets_in(os.path.dirname(path) or ".").get(-1 if step is None else step, CheckpointSet(step)).weights
    what = "optimizer state" if optimizer else "no weights of a network"
    remedy = f"use {beside} beside it" if beside else "use a file ema_RATE_NNNNNN.pt or modelNNNNNN.pt"
    raise ValueError(f"{path} holds {what}: {remedy}")


def _difference(theirs: Mapping[str, th.Tensor], ours: Mapping[str, th.Tensor], size: Any) -> str:
    """The flags, else the tensors, in which a checkpoint and a network differ."""
    there, here = architecture(theirs, size), architecture(ours, size)
    flags = [
        f"the checkpoint has {name} {_shown(there[name])}, you gave {_shown(here[name])}{_about(name, there, here)}"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if set(there) - set(here) and not set(here) & set(there) - {"image_channels", "dims", "num_classes", "image_size"}:
        flags = ["the checkpoint is of another kind of network"]
    return "; ".join(flags or _tensor_differences(theirs, ours))


def _about(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What a message adds where the numbers of classes differ as if one of them counted a null class."""
    counted = name == "num_classes" and "class_cond" in here and abs(there[name] - here[name]) == 1
    return " (counting the row that --null_class True adds)" if counted else ""


def _shown(value: Any) -> str:
    return str(value) or "''"


def _tensor_differences(theirs: Mapping[str, th.Tensor], ours: Mapping[str, th.Tensor]) -> Iterator[str]:
    missing = [name for name in ours if name not in theirs]
    unknown = [name for name in theirs if name not in ours]
    other = [
        f"{name} {list(theirs[name].shape)} instead of {list(ours[name].shape)}"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape
    ]
    for names, what in ((missing, "missing"), (unknown, "unknown"), (other, "of another shape")):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{what}: {', '.join(names[:_SHOWN])}{more}"
