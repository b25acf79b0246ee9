"""The manifest of a checkpoint, setNNNNNN.json, which is written last and tells a whole checkpoint from a cut one.

It is {"format": 1, "step": N, "files": {NAME: {"bytes": SIZE, "sha256": HEX}}}, with '' for HEX in shardsNNNNNN.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ..runtime import files
from ..runtime.errors import UserError

if TYPE_CHECKING:
    from .weights import Entry

MANIFEST_FORMAT = 1


def write_manifest(folder: str, step: int, entries: Mapping[str, Entry]) -> str:
    """Write the manifest of a step, and return its path.

    :param entries: name in the folder -> what was written.
    """
    path = files.join(folder, f"set{step:06d}.json")
    files.write_json(path, {"format": MANIFEST_FORMAT, "step": step, "files": dict(entries)})
    return path


def _entries(path: str) -> dict[str, Entry]:
    """The files that a manifest names; {} where it is damaged, or of another step than its name says."""
    content = files.read_file(path)
    try:
        value = files.parse_json(content)
        entries: dict[str, Entry] = value["files"]
        whole = all(type(entry["bytes"]) is int and type(entry["sha256"]) is str for entry in entries.values())
        whole &= not any(files.path_fault(name, "folder") for name in entries)
        whole &= f"set{value['step']:06d}.json" == os.path.basename(path) and value["format"] == MANIFEST_FORMAT
        whole &= any(name.startswith(("model", "shards")) for name in entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    return entries if whole else {}


def manifest_fault(path: str, *, checksums: bool, missing_is_fine: bool = False) -> str:
    """The first way in which the files beside a manifest are not those it names; '' if there is none.

    :param checksums: read the files; else only their sizes are compared.
    """
    folder = os.path.dirname(path) or "."
    try:
        entries = _entries(path)
        for name, entry in entries.items():
            reason = _fault_of(files.join(folder, name), entry, checksums, missing_is_fine)
            if reason:
                return f"{name} {reason}"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except UserError as error:
        return str(error)
    return "" if entries else f"its manifest is damaged, or not one of format {MANIFEST_FORMAT} for this step"


def _fault_of(path: str, entry: Entry, checksums: bool, missing_is_fine: bool) -> str:
    if not files.exists(path):
        return "" if missing_is_fine else "is missing"
    stat = files.stat(path)
    if stat.size != entry["bytes"]:
        return f"has {stat.size} bytes instead of {entry['bytes']}"
    if checksums and entry["sha256"] and _digest_of(path, stat.size, stat.mtime, stat.version) != entry["sha256"]:
        return "was altered: its checksum is another one"
    return ""


@functools.lru_cache(maxsize=64)  # whoever changes a file changes one of these
def _digest_of(path: str, size: int, mtime: float, version: str | None) -> str:
    with files.open_file(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
