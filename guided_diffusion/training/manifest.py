"""The manifest of a checkpoint, which is written last and names every file with its size and checksum.

A manifest setNNNNNN.json reads {"format": 1, "step": N, "files": {NAME: {"bytes": SIZE, "sha256": HEX}}}.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any, TypedDict

from ..runtime import files as untrusted, paths
from ..runtime.errors import UserError

FORMAT = 1
NAME = re.compile(r"set(?P<step>\d+)\.json$")
PIECE = 2**20  # bytes read at a time


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


def name_of(step: int) -> str:
    """The name of the manifest of a step."""
    return f"set{step:06d}.json"


def content(step: int, files: Mapping[str, Entry]) -> dict[str, Any]:
    """The manifest of a step.

    :param files: name in the run's folder -> what was written.
    """
    return {"format": FORMAT, "step": step, "files": dict(files)}


def read(path: str) -> dict[str, Entry]:
    """The files that a manifest names.

    :raises ValueError, OSError: if it is damaged, of another step than its name says, or cannot be read.
    """
    raw = untrusted.read_file(path)
    try:
        value = untrusted.parse_json(raw)
        files: dict[str, Entry] = value["files"]
        whole = all(
            type(entry["bytes"]) is int
            and isinstance(entry["sha256"], str)
            and not untrusted.path_fault(name, "folder")
            for name, entry in files.items()
        )
        whole &= name_of(value["step"]) == os.path.basename(path) and value["format"] == FORMAT
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole or not any(name.startswith("model") for name in files):
        raise UserError(f"its manifest is damaged, or not one of format {FORMAT} for this step")
    return files


def fault(path: str, *, checksums: bool, missing_is_fine: bool = False) -> str:
    """The first way in which the files beside a manifest are not those it names; '' if there is none.

    :param checksums: read the files; else only their sizes are compared.
    """
    folder = os.path.dirname(path) or "."
    try:
        for name, entry in read(path).items():
            reason = _fault_of(paths.join(folder, name), entry, checksums, missing_is_fine)
            if reason:
                return f"{name} {reason}"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)
    return ""


def _fault_of(path: str, entry: Entry, checksums: bool, missing_is_fine: bool) -> str:
    if not paths.exists(path):
        return "" if missing_is_fine else "is missing"
    stat = paths.stat(path)
    if stat.size != entry["bytes"]:
        return f"has {stat.size} bytes instead of {entry['bytes']}"
    if checksums and _digest_of(path, stat.size, stat.mtime, stat.version) != entry["sha256"]:
        return "was altered: its checksum is another one"
    return ""


@functools.lru_cache(maxsize=64)
def _digest_of(path: str, size: int, mtime: float, version: str | None) -> str:
    """SHA-256 of a file; read again only after it has changed."""
    digest = hashlib.sha256()
    with untrusted.open_file(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
