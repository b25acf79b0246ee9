"""Files of a run: whole or absent, found by any of their names, and read together with the flags that made them.

A run folder holds config.json, classes.json and, for every saved step, a set: modelNNNNNN.pt and ema_RATE_NNNNNN.pt
(fp32 weights after N updates), optNNNNNN.pt (optimizer), stateNNNNNN.pt (everything else) and, written last, the
manifest setNNNNNN.json; runs with adapters also write these, loraNNNNNN.pt. Older runs wrote no manifests: of sets
before the first one, the files that must be there decide, of sets after it, the manifest.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

import torch as th

from .. import dist_util
from ..runtime import files, paths
from ..runtime.paths import exists, is_remote, isdir, join, names_in
from . import manifest
from .manifest import Entry, Hashed

CONFIG, CLASSES = "config.json", "classes.json"
_NAME = re.compile(
    r"(?:(?P<kind>model|opt|state|lora)_?|ema_(?P<rate>[\d.e-]+)_)(?P<step>\d+)\.(?:pt|pth|safetensors)$"
)
_SHOWN = 3
_REMEDY = ": give the path of a checkpoint, or the folder of a run"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before they were zips
_MAX_FOREIGN = 1000  # names of classes in a file


# ---- files


def _write(path: str, write: Callable[[Hashed], object]) -> Entry:
    """Let `write(file)` fill a file that takes the name `path` only when it is complete."""
    with files.writing(path) as file:
        hashed = Hashed(file)
        write(hashed)
    return hashed.entry


def save(path: str, obj: Any) -> Entry:
    """Write tensors and plain values; whoever looks at `path` sees the old file or the whole new one.

    :return: its size and checksum.
    :raises OSError: naming path and reason, if that is impossible.
    """
    return _write(path, lambda file: th.save(obj, cast(IO[bytes], file)))


class Inert:
    """Stands in for an object of a class that is not loaded, and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass


def _stand_ins(path: str) -> list[Any]:
    """A class like `Inert` for each that a file names."""
    names = (name.rpartition(".") for name in _foreign_names(path))
    return [type(name, (Inert,), {"__module__": module}) for module, _, name in names]


def _foreign_names(path: str) -> list[str]:
    """The classes and functions that a local file written by torch.save names, and `load` does not load."""
    if is_remote(path):
        return []
    try:
        zipped = zipfile.is_zipfile(path)
        names = th.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else _names_in_legacy(path)
        return sorted(names)[:_MAX_FOREIGN]
    except Exception:  # as in `load`
        return []


def _names_in_legacy(path: str) -> set[str]:
    """The same of a file as torch wrote it before 1.6: four pickles, then the numbers of tensors."""
    with open(path, "rb") as file:
        found = [arg for _ in range(4) for code, arg, _ in pickletools.genops(file) if code.name == "GLOBAL"]
    return {
        name.replace(" ", ".") for name in map(str, found) if not name.startswith(("torch ", "torch.", "collections "))
    }


def load(path: str, map_location: Any = "cpu", *, inert: bool = False) -> Any:
    """What a .pt or .safetensors file holds, provided that it is tensors and plain values.

    :param inert: objects of any other class are replaced by objects of a class of its name that does nothing.
    :raises FileNotFoundError, ValueError: if the file is missing, incomplete, or holds anything else.
    """
    path = paths.resolve(path)
    if not exists(path):
        raise FileNotFoundError(f"{path} does not exist{_neighbours(path)}")
    try:
        if not is_remote(path):
            files.check_unpacked(path)
        if path.endswith(".safetensors"):
            return _load_safetensors(path, map_location)
        with th.serialization.safe_globals(_stand_ins(path) if inert else []):
            state = dist_util.load_state_dict(path, map_location=map_location)
        _check_filled(state)
        return state
    except (MemoryError, th.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # an unpickler raises whatever the first bytes of some other file lead it to
        told = f"{path} ({paths.stat(path).size} bytes) cannot be read as a checkpoint"
        raise ValueError(f"{told}: {_reason(path, error)}") from error


def _reason(path: str, error: Exception) -> str:
    """Why a file could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    kind = "" if is_remote(path) else files.kind_of_file(path)
    if kind:
        return f"it is {kind}"
    foreign = _foreign_names(path)
    if foreign:
        return f"it holds more than tensors and plain values: {', '.join(map(files.printable, foreign[:_SHOWN]))}"
    with paths.open_blob(path) if is_remote(path) else open(path, "rb") as file:
        head = file.read(len(_LEGACY))
    if path.endswith(".safetensors") or head.startswith(b"PK") or head == _LEGACY:
        return "it is damaged or cut short, copy or download it again"
    return f"it is of another kind, and no file of weights{_neighbours(path)}"


def _check_filled(value: Any) -> None:
    """Refuse tensors of more numbers than the file has for them: shapes that cost nothing until they are used."""
    if isinstance(value, th.Tensor):
        if value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(value.shape)} without its numbers")
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            _check_filled(part)


def _load_safetensors(path: str, map_location: Any) -> dict[str, th.Tensor]:
    import safetensors.torch

    with files.open_file(path) as file:
        state = safetensors.torch.load(file.read())
    return {name: value.to(map_location) for name, value in state.items()}


def _neighbours(path: str) -> str:
    """What a message about a missing file adds: the checkpoints beside it."""
    found = [name for name in names_in(os.path.dirname(path) or ".") if _NAME.search(name)]
    weights = [name for name in found if not name.startswith(("opt", "state", "lora"))]
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
    lora: str = ""
    emas: dict[str, str] = field(default_factory=dict)
    manifest: str = ""

    @property
    def paths(self) -> list[str]:
        """Every file of the set, those first without which it is never taken for complete."""
        return [
            path for path in (self.manifest, self.model, self.state, self.opt, self.lora, *self.emas.values()) if path
        ]

    @property
    def weights(self) -> str:
        """The best file to sample from: the slowest moving average, else the model."""
        return self.emas[max(self.emas, key=float)] if self.emas else self.model

    def settled(self, *, warmed_up: bool) -> str:
        """As `weights`, but for averages that are longer than the run: these still resemble its first weights.

        :param warmed_up: averages are never longer than the run.
        """
        old = {rate: path for rate, path in self.emas.items() if warmed_up or not is_young(rate, self.step or 0)}
        return CheckpointSet(self.step, self.model, emas=old).weights or self.weights


def is_young(rate: str | float, updates: int) -> bool:
    """Whether an average, about 1 / (1 - rate) updates long, is longer than a run of so many updates."""
    return updates * (1 - float(rate)) < 1 - 1e-9  # 1 - 0.99 is a little more than a hundredth


def step_of(path: str) -> int | None:
    """The number of updates that a file name tells, or None."""
    name = os.path.basename(path)
    match = _NAME.search(name) or manifest.NAME.match(name)
    return int(match["step"]) if match else None


def weights_beside(path: str) -> str:
    """The best weights of the step that a file name tells, '' where there are none."""
    step = step_of(path)
    sets = {} if step is None else sets_in(os.path.dirname(path) or ".")
    return sets[step].weights if step in sets else ""


def sets_in(folder: str) -> dict[int, CheckpointSet]:
    """step -> the set of files of a folder, steps ascending; a manifest alone is none."""
    sets: dict[int, CheckpointSet] = {}
    folder = paths.resolve(folder)
    names = names_in(folder)
    for name in names:
        match = _NAME.match(name)
        if match:
            entry = sets.setdefault(int(match["step"]), CheckpointSet(int(match["step"])))
            path = join(folder, name)
            if match["rate"]:
                entry.emas[match["rate"]] = path
            else:
                setattr(entry, match["kind"], path)
    for step, entry in sets.items():
        if manifest.name_of(step) in names:
            entry.manifest = join(folder, manifest.name_of(step))
    return dict(sorted(sets.items()))


def fault(entry: CheckpointSet, sets: Mapping[int, CheckpointSet], *, checksums: bool = False) -> str:
    """Why a set of a folder is not complete; '' if it is.

    :param sets: all of the folder.
    :param checksums: read all that a manifest names; else only sizes are compared.
    """
    if entry.manifest:
        return manifest.fault(entry.manifest, checksums=checksums)
    if any(other.manifest and other.step < entry.step for other in sets.values() if other.step and entry.step):
        return "it was not finished: it has no manifest"
    last = "state" if any(other.state for other in sets.values()) else "opt"
    absent = [name for name in ("model", last) if not getattr(entry, name)]
    return f"it has no {absent[0]} file" if absent else _cut(entry.paths)


def _cut(paths: Sequence[str]) -> str:
    """Which local zip files, as torch writes them, lack their end."""
    for path in paths:
        with open(os.devnull if is_remote(path) else path, "rb") as file:
            if file.read(2) == b"PK" and not zipfile.is_zipfile(file):
                return f"{os.path.basename(path)} is cut short"
    return ""


def newest(folder: str, *, checksums: bool = False) -> tuple[CheckpointSet | None, list[str]]:
    """The newest complete set of a folder, else the newest weights where nothing but weights lies; and what is newer.

    :return: the set, and a sentence for each newer one that is not complete.
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


def latest(folder: str) -> CheckpointSet | None:
    """The newest complete set of a folder, by names and sizes."""
    return newest(folder)[0]


def find_set(path: str, *, checksums: bool = False) -> CheckpointSet:
    """The set that a file belongs to, or the newest complete one of a folder.

    :param checksums: read the files, and refuse altered ones.
    :raises FileNotFoundError, ValueError: if there is no such file, no weights to it, or it is not what was written.
    """
    path = paths.resolve(path)
    if isdir(path):
        entry, faults = newest(path, checksums=checksums)
        if entry is None:
            found = f"no complete checkpoint, {', '.join(faults)}" if faults else "no modelNNNNNN.pt to go on from"
            raise ValueError(f"{path} holds {found}; give the folder or a checkpoint of a run")
        return entry
    if not exists(path):
        raise FileNotFoundError(f"the checkpoint {path!r} does not exist{_neighbours(path) or _REMEDY}")
    step = step_of(path)
    if step is None:
        return CheckpointSet(None, model=path)
    entry = sets_in(os.path.dirname(path) or ".").get(step, CheckpointSet(step))
    reason = manifest.fault(entry.manifest, checksums=checksums, missing_is_fine=True) if entry.manifest else ""
    if reason:
        raise ValueError(f"{path} belongs to a damaged checkpoint, {reason}: copy it again, or give the run's folder")
    return _with_weights(entry, path, step)


def _with_weights(entry: CheckpointSet, path: str, step: int) -> CheckpointSet:
    """A set with a model: the path that was given where it is one, else the one beside it, else an average."""
    match = _NAME.search(os.path.basename(path))
    if match and match["kind"] == "model":
        entry.model = path
    entry.model = entry.model or (path if match and match["rate"] else "")
    if not entry.model:
        raise ValueError(f"{path} has no model{step:06d}.pt beside it: there are no weights to go on from")
    return entry


def resolve_model(path: str, what: str = "the checkpoint") -> str:
    """The file to sample from: the path itself, or of a run folder the newest moving average, else the newest model.

    An average that is longer than the run counts only if it was warmed up (--ema_warmup). Sets with files of other
    sizes than their manifests name come last.

    :param what: the path is, in messages.
    :raises FileNotFoundError, ValueError: if there is none.
    """
    path = paths.resolve(path)
    if not isdir(path):
        if not path or not exists(path):
            hint = _neighbours(path) or _REMEDY
            raise FileNotFoundError(f"{what} {path!r} does not exist{hint}")
        return path
    found = sorted(sets_in(path).values(), key=lambda e: (not _damaged(e), bool(e.emas), bool(e.model), e.step or 0))
    if not found or not found[-1].weights:
        raise ValueError(
            f"{what} {path} holds no ema_RATE_NNNNNN.pt or modelNNNNNN.pt: give a checkpoint or a run's folder"
        )
    return found[-1].settled(warmed_up=bool(config_beside(path).get("ema_warmup")))


def _damaged(entry: CheckpointSet) -> bool:
    return bool(entry.manifest and manifest.fault(entry.manifest, checksums=False, missing_is_fine=True))


def config_beside(path: str) -> dict[str, Any]:
    """The flags that the run of a checkpoint (or run folder) was made with; {} where no config.json lies there.

    :raises ValueError: if the file is damaged.
    """
    file_path = _beside(path, CONFIG)
    if not exists(file_path):
        return {}
    try:
        flags = files.parse_json(files.read_file(file_path))["flags"]
        if not isinstance(flags, dict):
            raise TypeError("flags are names and values")
        return flags
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = files.reason(error)
        raise ValueError(
            f"{file_path} is no config of a run ({reason}): repair it, or move it away and give the flags"
        ) from error


def classes_beside(path: str) -> str:
    """The path of the classes.json beside a checkpoint or in a run folder; '' if there is none."""
    file_path = _beside(path, CLASSES)
    return file_path if exists(file_path) else ""


def _beside(path: str, name: str) -> str:
    path = paths.resolve(path)
    return join(path if isdir(path) else os.path.dirname(path) or ".", name)


def keep_last(folder: str, count: int) -> None:
    """Remove all complete sets of a folder but the newest `count`, and what is not complete before them; 0 keeps all.

    :raises OSError: naming a file that cannot be removed.
    """
    sets = sets_in(folder)
    complete = [step for step, entry in sets.items() if not fault(entry, sets)] if count else []
    for step, entry in sets.items():
        if complete and step < complete[-1] and step not in complete[-count:]:
            remove(entry)


def remove(entry: CheckpointSet) -> None:
    """Remove the files of a set, in an order that never leaves a part that passes for complete."""
    for path in entry.paths:
        paths.remove(path)


def sweep(folder: str) -> None:
    """Remove what processes that were killed while writing have left of their temporary files."""
    names = [] if is_remote(folder) else names_in(folder)
    for name in names:
        kept, part, _ = name.partition(".part-")
        if part and (_NAME.match(kept) or manifest.NAME.match(kept) or kept in (CONFIG, CLASSES)):
            paths.remove(join(folder, name))
