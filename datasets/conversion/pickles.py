"""Pickles of plain data and arrays, such as CIFAR and the downsampled ImageNet, read without running anything in them.

Dicts, lists, numbers, texts and bytes are made as they are. Of everything that a pickle can call by name, four names of
numpy and one of codecs are answered, by inert classes of this module; any other name ends the reading.
"""

from __future__ import annotations

import io
import pickle
from typing import IO, Any

import numpy as np

from guided_diffusion.runtime.errors import UserError, printable, reason

_Plain = pickle._Unpickler  # the one in Python: what the one in C allocates is up to the file


class _Type:
    """Stands in for numpy.dtype: the name of a type."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name.decode("latin-1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        self.name = f"{order}{self.name}" if order in ("<", ">") else self.name

    def numbers(self) -> np.dtype[Any]:
        """:raises ValueError: if it is no type of numbers."""
        kind = np.dtype(self.name) if isinstance(self.name, str) else None
        if kind is None or kind.kind not in "biuf":
            raise UserError(f"an array of type {printable(str(self.name))}, where numbers are read")
        return kind


class _Array:
    """Stands in for numpy.ndarray: the bytes of one, not read yet."""

    def __init__(self, *_: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def array(self) -> np.ndarray[Any, Any]:
        """:raises ValueError: if shape, type and bytes do not belong together."""
        try:
            _, shape, kind, fortran, content = self._state
            content = content.encode("latin-1") if isinstance(content, str) else content
            flat = np.frombuffer(content, kind.numbers())
            return flat.reshape(shape, order="F" if fortran else "C")
        except (TypeError, AttributeError, UnicodeError) as error:
            raise UserError(f"an array that is none ({reason(error)})") from error


class _Buffer(_Array):
    """Stands in for the array of a pickle of protocol 5."""

    def __init__(self, content: Any = b"", kind: Any = None, shape: Any = (), order: Any = "C") -> None:
        self._state = (1, shape, kind, order == "F", content)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands in for codecs.encode, by which Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("a text in a code that is not read")
    return text.encode("latin-1")


_CORES = ("numpy.core", "numpy._core")
_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{(f"{core}.multiarray", "_reconstruct"): _Array for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _Buffer for core in _CORES},
}


class _Unpickler(_Plain):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name, the only way to one."""
        if (module, name) not in _NAMES:
            called = printable(f"{module}.{name}")
            raise pickle.UnpicklingError(f"it calls {called}, which data has no need of")
        return _NAMES[module, name]


def load(file: IO[bytes] | bytes) -> dict[str, Any]:
    """The dict in a pickle, with texts as keys and read-only arrays of numbers.

    :raises ValueError: if it is damaged, holds anything but data, or is no dict.
    """
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        value = _Unpickler(source, encoding="bytes").load()
        if not isinstance(value, dict):
            raise UserError("it holds no dict")
        return {_text(key): item.array() if isinstance(item, _Array) else item for key, item in value.items()}
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"it is no pickle of arrays ({reason(error)})") from error


def _text(key: Any) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)
