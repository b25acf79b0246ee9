"""Weights in files, a run's own and other programs': reading them safely, and how they differ from a network's."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypedDict, cast

import torch as th

from ..networks.architecture import Weights, architecture, networks_in
from ..runtime import files
from ..runtime.errors import UserError, listed, printable, refuse
from .sharded_files import read

SHOWN = 3
_MAX_FOREIGN = 1000  # names of classes in a file
_WEIGHTS = re.compile(r"(model|ema).*\.(pt|pth|safetensors)")
_AVERAGE = re.compile(r"(?<![a-zA-Z])ema(?![a-zA-Z])", re.IGNORECASE)  # in a place such as model_ema.module

State = Mapping[str, th.Tensor]


class Entry(TypedDict):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class Hashed:
    """Passes what is written on to a file and sums it up, before the disk can alter it."""

    def __init__(self, file: Any) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write bytes, or any buffer of them."""
        self._file.write(data)
        self._digest.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def flush(self) -> None:
        """Nothing is held back here."""

    @property
    def entry(self) -> Entry:
        """Of all that was written so far."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def save(path: str, obj: Any, texts: Mapping[str, str] | None = None) -> Entry:
    """Write tensors and plain values, as the ending says (.pt, .safetensors, .json); returns size and checksum.

    :param texts: for the header of a safetensors file.
    :raises OSError: naming path and reason, if that is impossible; readers never see a half of it.
    """
    with files.writing(path) as file:
        hashed = Hashed(file)
        if path.endswith(".json"):
            hashed.write(files.json_bytes(obj))
        elif path.endswith(".safetensors"):
            import safetensors.torch

            hashed.write(safetensors.torch.save(obj, dict(texts) if texts else None))
        else:
            th.save(obj, cast(IO[bytes], hashed))
    return hashed.entry


class Inert:
    """Stands in for an object of a class that is not loaded, and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    __setstate__ = __setitem__ = __init__


def _foreign_names(path: str) -> list[str]:
    """The classes and functions that a local zip of torch.save names, and `load` does not load."""
    try:
        if files.is_remote(path) or not zipfile.is_zipfile(path):
            return []
        return sorted(th.serialization.get_unsafe_globals_in_checkpoint(path))[:_MAX_FOREIGN]
    except Exception:  # as in `load`
        return []


def load(path: str, map_location: Any = "cpu", *, inert: bool = False) -> Any:
    """The tensors and plain values of a .pt or .safetensors file.

    :param inert: objects of any other class are replaced by objects of a class of its name that does nothing.
    """
    path = files.resolve(path)
    if not files.exists(path):
        raise FileNotFoundError(f"{path} does not exist{neighbours(path)}")
    if files.isdir(path):
        return read(path, "opt".__ne__)
    try:
        if not files.is_remote(path):
            files.check_unpacked(path)
        if path.endswith(".safetensors"):
            return _load_safetensors(path, map_location)
        names = [name.rpartition(".") for name in _foreign_names(path)] if inert else []
        stand_ins: list[Any] = [type(name, (Inert,), {"__module__": module}) for module, _, name in names]
        with th.serialization.safe_globals(stand_ins):
            file: Any = io.BytesIO(files.open_file(path).read()) if files.is_remote(path) else path
            state = th.load(file, map_location=map_location, weights_only=True)
        _check_filled(state)
        return state
    except (MemoryError, th.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # an unpickler raises whatever the first bytes of some other file lead it to
        size = files.stat(path).size
        raise UserError(f"{path} ({size} bytes) cannot be read as a checkpoint: {_reason(path, error)}") from error


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if not files.is_remote(path) and (kind := files.kind_of_file(path)):
        return f"it is {kind}"
    if foreign := _foreign_names(path):
        return f"it holds more than tensors and plain values: {listed(map(printable, foreign))}"
    return f"it is damaged, cut short, or no file of weights{neighbours(path)}"


def neighbours(path: str) -> str:
    """What a message adds about a file that is missing or of another kind: the weights beside it."""
    names = [name for name in files.names_in(os.path.dirname(path) or ".") if _WEIGHTS.fullmatch(name)]
    return f"; beside it lie {', '.join(names[-SHOWN:])}" if names else ""


def _check_filled(value: Any) -> None:
    """Refuse tensors of more numbers than the file has for them: shapes that cost nothing until they are used."""
    if isinstance(value, th.Tensor):
        hollow = value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        refuse((hollow, f"a tensor of shape {tuple(value.shape)} without its numbers"))
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            _check_filled(part)


def _load_safetensors(path: str, map_location: Any) -> dict[str, th.Tensor]:
    import safetensors.torch

    with files.open_file(path) as file:
        state = safetensors.torch.load(file.read())
    return {name: value.to(map_location) for name, value in state.items()}


def pick(path: str, beside: str, read: Callable[[Any, str], Weights | None]) -> Weights:
    """The weights in a file, whatever else another program saved with them, and a sentence that says which.

    Of several networks of this package an average (EMA) is taken, else the first. The sentence is '' where nothing but
    weights is there, and so are the flags, but of files of latent-diffusion.

    :param beside: weights to name in a message, '' where there are none.
    :param read: content and path of another program's file -> what it holds, None for files of other kinds.
    """
    content = load(path, inert=True)
    picked = read(content, path) or _picked(content, path, beside)
    bad = [name for name, value in picked.state.items() if not value.isfinite().all()]
    where = f"in {len(bad)} of its {len(picked.state)} tensors ({''.join(bad[:1])} is the first)"
    diverged = "training has diverged, take an earlier checkpoint"
    refuse((bad, f"{path} holds numbers that are not finite, {where}: {diverged}"))
    return picked


def _picked(content: Any, path: str, beside: str) -> Weights:
    networks = dict(networks_in(content)) or {"": _plain_weights(content, path, beside)}
    place = max(networks, key=lambda place: len(_AVERAGE.findall(place)))
    others = [name or "its top level" for name in networks if name != place]
    left = f", not those at {', '.join(others)}" if others else ""
    sentence = f"of {path} the weights at {place or 'its top level'} are taken{left}" if place or others else ""
    return Weights(networks[place], {}, sentence)


def _plain_weights(content: Any, path: str, beside: str) -> dict[str, th.Tensor]:
    values = list(content.values()) if isinstance(content, dict) else [content]
    optimizer = isinstance(content, dict) and {"state", "param_groups"} <= set(content)
    if isinstance(content, dict) and not optimizer and all(isinstance(value, th.Tensor) for value in values):
        wrapped = all(name.startswith("module.") for name in content)  # saved from inside a data-parallel wrapper
        return {name.removeprefix("module."): value for name, value in content.items()} if wrapped else content
    held = f"one object ({printable(f'{type(content).__module__}.{type(content).__qualname__}')})"
    if isinstance(content, dict):
        held = listed([f"{key!r:.50}" for key in content], 12)
    remedy = f"use {beside} beside it" if beside else "use a file ema_RATE_NNNNNN.pt or modelNNNNNN.pt"
    if any(isinstance(value, Inert) for value in values):
        remedy = "save the state_dict() of its network, and use that"
    held = "optimizer state" if optimizer else f"no weights of a network of this package, but {held}"
    raise UserError(f"{path} holds {held}: {remedy}")


def shapes(state: State) -> dict[str, th.Size]:
    """Name -> shape."""
    return {name: value.shape for name, value in state.items()}


def difference(theirs: State, ours: State, size: Any) -> str:
    """The flags, else the tensors, in which a checkpoint and a network differ.

    :param size: of the network's images.
    """
    read, built = architecture(theirs, size), architecture(ours, size)
    flags = []
    for name in built:
        if name in read and read[name] != built[name]:
            null = name == "num_classes" and "class_cond" in built and abs(read[name] - built[name]) == 1
            hint = " (counting the row that --class_dropout adds)" if null else ""
            has, given = (str(values[name]) or "''" for values in (read, built))
            flags.append(f"the checkpoint has {name} {has}, you gave {given}{hint}")
    if set(read) - set(built) and not set(built) & set(read) - {"image_channels", "dims", "num_classes", "image_size"}:
        flags = ["the checkpoint is of another kind of network"]
    return "; ".join(flags or tensor_differences(theirs, ours))


def tensor_differences(theirs: State, ours: State) -> Iterator[str]:
    """Names and shapes in which a state dict, perhaps a stranger's, differs from ours; nothing where it fits."""
    common = [name for name in ours if name in theirs and theirs[name].shape != ours[name].shape]
    differences = {
        "missing": [name for name in ours if name not in theirs],
        "unknown": [name for name in theirs if name not in ours],
        "of another shape": [
            f"{name} {list(theirs[name].shape)} instead of {list(ours[name].shape)}" for name in common
        ],
    }
    yield from (f"{what}: {listed(map(printable, names))}" for what, names in differences.items() if names)
