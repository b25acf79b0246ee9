"""The folder or zip that a data set is converted to: built beside its place, and given its name once it is whole.

While it is built, OUT.part is the folder or zip and OUT.part.jsonl the journal. Its first line is the request, each
other line tells what became of one item of the source: {"key", "class", "name", "bytes", "sha256"} for an image, and
"offset" and "crc" too in a zip; {"key", "class", "fault"} for what was left out. A line is written after the image. So
whenever a run is killed, what the journal tells is there, and anything else can be thrown away.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from guided_diffusion.runtime import files

DATE = (2026, 1, 1, 0, 0, 0)  # of everything in a zip

Entry = dict[str, Any]  # a line of the journal


def part_of(out: str) -> str:
    """Where an output is built."""
    return f"{out}.part"


def digest_of(path: str) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Sink(Protocol):
    """Takes files, and takes over those of a run that was killed."""

    def add(self, name: str, content: bytes) -> Entry:
        """Write a file; what it returns goes to the journal."""

    def adopt(self, entry: Entry) -> bool:
        """Whether the file of an entry is there as it was written; if so, it is kept."""

    def trim(self) -> None:
        """Throw away what was not adopted."""

    def seal(self) -> str:
        """Have everything on the disk; the checksum of the whole, '' for a folder."""

    def close(self) -> None:
        """Let go of what is open."""


def open_sink(out: str) -> Sink:
    """The sink for an output of this name."""
    return (ZipSink if out.lower().endswith(".zip") else FolderSink)(part_of(out))


def _described(name: str, content: bytes) -> Entry:
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class FolderSink:
    """A folder of files."""

    def __init__(self, part: str) -> None:
        os.makedirs(part, exist_ok=True)
        self._part, self._kept = part, set[str]()

    def _path(self, name: str) -> str:
        return os.path.join(self._part, name)

    def add(self, name: str, content: bytes) -> Entry:
        """Write a file."""
        with files.explained(self._path(name)), open(self._path(name), "wb") as file:
            file.write(content)
        return _described(name, content)

    def adopt(self, entry: Entry) -> bool:
        """Whether the file has the checksum that it was written with."""
        try:
            there = bool(digest_of(self._path(entry["name"])) == entry["sha256"])
        except OSError:
            return False
        self._kept |= {entry["name"]} if there else set()
        return there

    def trim(self) -> None:
        """Remove all other files."""
        for name in os.listdir(self._part):
            if name not in self._kept:
                os.remove(self._path(name))
        self._kept.clear()

    def seal(self) -> str:
        """Have the files on the disk."""
        if hasattr(os, "sync"):
            os.sync()
        return ""

    def close(self) -> None:
        """Nothing is open."""


class ZipSink:
    """A zip without compression, since images are packed already; the same files give the same bytes."""

    def __init__(self, part: str) -> None:
        with files.explained(part), open(part, "ab"):
            pass  # it is there now, with what it held before
        self._part, self._file = part, open(part, "r+b")  # noqa: SIM115  it is closed by close()
        self._end, self._adopted = 0, list[zipfile.ZipInfo]()
        self._zip: zipfile.ZipFile | None = None

    def add(self, name: str, content: bytes) -> Entry:
        """Append a member."""
        assert self._zip is not None, "trim() comes first"
        info = _member(name)
        with files.explained(self._part):
            self._zip.writestr(info, content)
            self._file.flush()
        return {**_described(name, content), "offset": info.header_offset, "crc": info.CRC}

    def adopt(self, entry: Entry) -> bool:
        """Whether the next member is the one of the entry, its header included."""
        info = _member(entry["name"])
        info.header_offset, info.CRC = entry["offset"], entry["crc"]
        info.file_size = info.compress_size = entry["bytes"]
        header = info.FileHeader()
        self._file.seek(self._end)
        found = self._file.read(len(header) + info.file_size)
        content = found[len(header) :]
        if info.header_offset != self._end or found[: len(header)] != header or zlib.crc32(content) != info.CRC:
            return False
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return False
        self._end += len(found)
        self._adopted.append(info)
        return True

    def trim(self) -> None:
        """Cut the file behind the last member, and go on from there."""
        self._file.truncate(self._end)
        self._file.seek(self._end)
        self._zip = zipfile.ZipFile(self._file, "w")
        self._zip.filelist.extend(self._adopted)
        self._zip.NameToInfo.update((info.filename, info) for info in self._adopted)

    def seal(self) -> str:
        """Write the directory: only now it is a zip."""
        assert self._zip is not None
        with files.explained(self._part):
            self._zip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        return digest_of(self._part)

    def close(self) -> None:
        """Close the file without a directory: it is no zip, and cannot be taken for one."""
        if self._zip is not None:
            self._zip.fp = None
        self._file.close()


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, DATE)
    info.create_system, info.external_attr = 3, 0o644 << 16
    return info


# ---- the journal


class Journal:
    """What became of each item so far, for the run that goes on from there.

    :param request: what the output depends on.
    :raises ValueError: if it is another run's: one with another request, or one that is still at work.
    """

    def __init__(self, out: str, request: Mapping[str, Any]) -> None:
        self.path = f"{part_of(out)}.jsonl"
        self._out, self._request = out, dict(request)
        with files.explained(self.path):
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  it is closed by close()
        try:
            _lock(self._file, out)
            self._check_request()
        except BaseException:
            self._file.close()
            raise

    def _check_request(self) -> None:
        first = next(self._lines(), None)
        if first is None:
            self._file.truncate(0)
            self._append({"request": self._request})
        elif first[1].get("request") != self._request:
            before = first[1].get("request") or {}
            other = [name for name in {**before, **self._request} if before.get(name) != self._request.get(name)]
            detail = ", ".join(f"{name} {before.get(name)!r}, now {self._request.get(name)!r}" for name in other)
            raise ValueError(
                f"{part_of(self._out)} was begun by another command ({detail}): give that one again to go on, or "
                f"remove {part_of(self._out)} and {self.path}"
            )

    def _lines(self) -> Iterator[tuple[int, Entry]]:
        """(end in the file, entry) of the lines that are whole."""
        end = 0
        with open(self.path, "rb") as file:
            for line in file:
                end += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:
                    return
                if not line.endswith(b"\n") or not isinstance(entry, dict):
                    return
                yield end, entry

    def entries(self) -> Iterator[Entry]:
        """What became of the items, from the first on."""
        lines = self._lines()
        next(lines, None)
        return (entry for _, entry in lines)

    def resume(self, sink: Sink, *, skip_bad: bool) -> int:
        """How many items are done with; whatever comes behind them is thrown away.

        :param skip_bad: False tries again what was left out before.
        """
        kept = end = 0
        for place, (position, entry) in enumerate(self._lines()):
            fits = place == 0 or (skip_bad if "fault" in entry else _adopted(sink, entry))
            if not fits:
                break
            kept, end = place, position
        self._file.truncate(end)
        sink.trim()
        return kept

    def add(self, entry: Entry) -> None:
        """Write a line."""
        self._append(entry)

    def _append(self, entry: Entry) -> None:
        with files.explained(self.path):
            line = memoryview(json.dumps(entry).encode() + b"\n")
            while line:
                line = line[self._file.write(line) :]

    def remove(self) -> None:
        """Close the journal of an output that is whole."""
        self.close()
        os.remove(self.path)

    def close(self) -> None:
        """Let another run have it."""
        self._file.close()


def _adopted(sink: Sink, entry: Entry) -> bool:
    try:
        return sink.adopt(entry)
    except (KeyError, TypeError, AttributeError):  # no line of ours
        return False


def _lock(file: io.FileIO, out: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another run is writing {out}: wait for its end, or choose another name") from error
