"""The manifest of a checkpoint, which is written last and names every file with its size and checksum.

A manifest setNNNNNN.json reads {"format": 1, "step": N, "files": {NAME: {"bytes": SIZE, "sha256": HEX}}}.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from typing import Any, TypedDict, cast

from ..runtime import files, paths
from ..runtime.errors import UserError

FORMAT = 1


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


def write(folder: str, step: int, entries: Mapping[str, Entry]) -> str:
    """Write the manifest of a step, and return its path.

    :param entries: name in the folder -> what was written.
    """
    path = paths.join(folder, f"set{step:06d}.json")
    files.write_json(path, {"format": FORMAT, "step": step, "files": dict(entries)})
    return path


def _read(path: str) -> dict[str, Entry]:
    """The files that a manifest names; {} where it is damaged, or of another step than its name says."""
    content = files.read_file(path)
    try:
        value = files.parse_json(content)
        entries: dict[str, Entry] = value["files"]
        whole = all(type(entry["bytes"]) is int and type(entry["sha256"]) is str for entry in entries.values())
        whole &= not any(files.path_fault(name, "folder") for name in entries)
        whole &= f"set{value['step']:06d}.json" == os.path.basename(path) and value["format"] == FORMAT
        whole &= any(name.startswith("model") for name in entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    return entries if whole else {}


def fault(path: str, *, checksums: bool, missing_is_fine: bool = False) -> str:
    """The first way in which the files beside a manifest are not those it names; '' if there is none.

    :param checksums: read the files; else only their sizes are compared.
    """
    folder = os.path.dirname(path) or "."
    try:
        entries = _read(path)
        for name, entry in entries.items():
            reason = _fault_of(paths.join(folder, name), entry, checksums, missing_is_fine)
            if reason:
                return f"{name} {reason}"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except UserError as error:
        return str(error)
    return "" if entries else f"its manifest is damaged, or not one of format {FORMAT} for this step"


def _fault_of(path: str, entry: Entry, checksums: bool, missing_is_fine: bool) -> str:
    if not paths.exists(path):
        return "" if missing_is_fine else "is missing"
    stat = paths.stat(path)
    if stat.size != entry["bytes"]:
        return f"has {stat.size} bytes instead of {entry['bytes']}"
    if checksums and _digest_of(path, stat.size, stat.mtime, stat.version) != entry["sha256"]:
        return "was altered: its checksum is another one"
    return ""


@functools.lru_cache(maxsize=64)  # whoever changes a file changes one of these
def _digest_of(path: str, size: int, mtime: float, version: str | None) -> str:
    with files.open_file(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
