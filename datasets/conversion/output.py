"""The folder, zip or tars that a data set is converted to: built beside its place, and named once it is whole.

While it is built, OUT.part is the folder or zip and OUT.part.jsonl the journal. Its first line is the request, each
other line tells what became of one item of the source: {"key", "class", "name", "bytes", "sha256"} for an image, and
"offset" in a zip or tar, "shard" which tar; {"key", "class", "fault"} for what was left out. A line is written after
its image. So whenever a run is killed, what the journal tells is there, and anything else can be thrown away.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from guided_diffusion.data.tars import BESIDE, write_index
from guided_diffusion.runtime.atomic import explained
from guided_diffusion.runtime.errors import UserError

DATE = (2026, 1, 1, 0, 0, 0)  # of everything in a zip

SHARD = 2**28  # bytes of a tar, about

Entry = dict[str, Any]  # a line of the journal
Beside = Sequence[tuple[str, bytes]]  # (extension, content) of what a tar holds beside an image


def part_of(out: str) -> str:
    """Where an output is built."""
    return f"{out}.part"


def open_sink(out: str) -> Sink:
    """What takes the files of an output of this name, and those of a run that was killed."""
    kinds: dict[str, type[Sink]] = {".zip": Zip, ".tars": Tars}
    return kinds.get(os.path.splitext(out)[1].lower(), Folder)(part_of(out))


class Folder:
    """A folder of files."""

    def __init__(self, part: str) -> None:
        os.makedirs(part, exist_ok=True)
        self._part, self._kept = part, set[str]()

    def add(self, name: str, content: bytes, beside: Beside = ()) -> Entry:
        """Write a file; returns its entry in the journal."""
        path = os.path.join(self._part, name)
        with explained(path), open(path, "wb") as file:
            file.write(content)
        return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def adopt(self, entry: Entry) -> bool:
        """Whether the file of an entry is there as it was written; if so, it is kept."""
        try:
            whole = bool(digest_of(os.path.join(self._part, entry["name"])) == entry["sha256"])
        except OSError:
            return False
        self._kept |= {entry["name"]} if whole else set()
        return whole

    def trim(self) -> None:
        """Remove what was not adopted."""
        for name in os.listdir(self._part):
            if name not in self._kept:
                os.remove(os.path.join(self._part, name))

    def seal(self) -> list[tuple[str, str]]:
        """Have everything on the disk; returns (checksum, name) of the files, where these are not what was added."""
        if hasattr(os, "sync"):
            os.sync()
        return []

    def close(self) -> None:
        """Nothing is open."""


class Zip:
    """A zip without compression, since images are packed already; the same files give the same bytes."""

    def __init__(self, part: str) -> None:
        with explained(part):
            self._file = open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115  close() closes it
        self._part, self._end, self._adopted = part, 0, list[zipfile.ZipInfo]()
        self._zip: zipfile.ZipFile | None = None

    def add(self, name: str, content: bytes, beside: Beside = ()) -> Entry:
        """Append a member; returns its entry in the journal."""
        assert self._zip is not None, "trim() comes first"
        info = _member(name)
        with explained(self._part):
            self._zip.writestr(info, content)
            self._file.flush()
        digest = hashlib.sha256(content).hexdigest()
        return {"name": name, "bytes": len(content), "sha256": digest, "offset": info.header_offset}

    def adopt(self, entry: Entry) -> bool:
        """Whether the next member is that of an entry, as it was written; if so, it is kept."""
        info = _member(entry["name"])
        size, info.header_offset = entry["bytes"], entry["offset"]
        info.file_size = info.compress_size = size
        self._file.seek(self._end)
        member = self._file.read(len(info.FileHeader()) + size)
        content = member[-size:] if size else b""
        info.CRC = zlib.crc32(content)
        if info.header_offset != self._end or member != info.FileHeader() + content:
            return False
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return False
        self._end += len(member)
        self._adopted.append(info)
        return True

    def trim(self) -> None:
        """Cut the file behind the last member that was adopted, and go on from there."""
        self._file.truncate(self._end)
        self._file.seek(self._end)
        self._zip = zipfile.ZipFile(self._file, "w")
        self._zip.filelist.extend(self._adopted)
        self._zip.NameToInfo.update((info.filename, info) for info in self._adopted)

    def seal(self) -> list[tuple[str, str]]:
        """Write the directory, with which it becomes a zip."""
        assert self._zip is not None
        with explained(self._part):
            self._zip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        return [(digest_of(self._part), "")]

    def close(self) -> None:
        """Close the file without a directory, so that it is not taken for a zip."""
        if self._zip is not None:
            self._zip.fp = None
        self._file.close()


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, DATE)
    info.create_system, info.external_attr, info.CRC = 3, 0o644 << 16, 0
    return info


class Tars:
    """A folder of tars with their indexes; an image and what lies beside it are in one tar."""

    def __init__(self, part: str) -> None:
        os.makedirs(part, exist_ok=True)
        self._part, self._number, self._end = part, 0, 0
        self._file: IO[bytes] | None = None

    def _path(self, number: int) -> str:
        return os.path.join(self._part, f"{number:06d}.tar")

    def add(self, name: str, content: bytes, beside: Beside = ()) -> Entry:
        """Append an image and its texts, or write another file beside the tars; returns its entry in the journal."""
        if not name.endswith((".png", ".jpg")):
            return Folder(self._part).add(name, content)
        stem = os.path.splitext(name)[0]
        files = [(name, content), *((f"{stem}{extension}", text) for extension, text in beside)]
        block = b"".join(_tar_member(*file) for file in files)
        if self._end and self._end + len(block) > SHARD:
            self._finish()
            self._number, self._end = self._number + 1, 0
        with explained(self._path(self._number)):
            self._file = self._file or open(self._path(self._number), "ab")  # noqa: SIM115  close() closes it
            self._file.write(block)
            self._file.flush()
        entry = {"name": name, "bytes": len(block), "sha256": hashlib.sha256(block).hexdigest()}
        entry |= {"shard": self._number, "offset": self._end}
        self._end += len(block)
        return entry

    def _finish(self) -> None:
        if self._file is not None:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.close()
            self._file = None

    def adopt(self, entry: Entry) -> bool:
        """Whether the block of an entry is there as it was written; if so, it is kept."""
        try:
            with open(self._path(entry["shard"]), "rb") as file:
                file.seek(entry["offset"])
                whole = bool(hashlib.sha256(file.read(entry["bytes"])).hexdigest() == entry["sha256"])
        except OSError:
            return False
        if whole:
            self._number, self._end = entry["shard"], entry["offset"] + entry["bytes"]
        return whole

    def trim(self) -> None:
        """Cut the last tar behind what was adopted, and remove what comes after."""
        for name in os.listdir(self._part):
            if name > os.path.basename(self._path(self._number)) or not self._end:
                os.remove(os.path.join(self._part, name))
        if self._end:
            os.truncate(self._path(self._number), self._end)

    def seal(self) -> list[tuple[str, str]]:
        """End the last tar, and write the indexes."""
        with explained(self._part):
            self._finish()
        for number in range(self._number + 1):
            path = self._path(number)
            with open(path, "rb") as file:
                write_index(path + BESIDE, file, os.path.getsize(path))
        return [(digest_of(os.path.join(self._part, name)), name) for name in sorted(os.listdir(self._part))]

    def close(self) -> None:
        """Close the last tar without its end."""
        if self._file is not None:
            self._file.close()


def _tar_member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), 1767225600  # DATE
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


Sink = Folder | Zip | Tars


def digest_of(path: str) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Journal:
    """What became of each item so far, for the run that goes on from there.

    :param request: what the output depends on.
    :raises ValueError: if it is that of a run with another request, or of one that is still at work.
    """

    def __init__(self, out: str, request: Mapping[str, Any]) -> None:
        self.path = f"{part_of(out)}.jsonl"
        with explained(self.path):
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  close() closes it
        try:
            _lock(self._file, out)
            self._check_request(out, dict(request))
        except BaseException:
            self._file.close()
            raise

    def _check_request(self, out: str, request: Mapping[str, Any]) -> None:
        first = next(self._lines(), None)
        before = None if first is None else first[1].get("request") or {}
        if before is None:
            self._file.truncate(0)
            self._append({"request": request})
        elif before != request:
            changes = ", ".join(
                f"{name} {before.get(name)!r}, now {request.get(name)!r}"
                for name in {**before, **request}
                if before.get(name) != request.get(name)
            )
            raise UserError(
                f"{part_of(out)} was begun by another command ({changes}): give that one again to go on, or remove "
                f"{part_of(out)} and {self.path}"
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
            try:
                done = place == 0 or (skip_bad if "fault" in entry else sink.adopt(entry))
            except (KeyError, TypeError, AttributeError):  # no line of ours
                done = False
            if not done:
                break
            kept, end = place, position
        self._file.truncate(end)
        sink.trim()
        return kept

    def add(self, entry: Entry) -> None:
        """Write the line of an item."""
        self._append(entry)

    def _append(self, entry: Entry) -> None:
        with explained(self.path):
            line = memoryview(json.dumps(entry).encode() + b"\n")
            while line:
                line = line[self._file.write(line) :]

    def remove(self) -> None:
        """Close and remove the journal of an output that is whole."""
        self.close()
        os.remove(self.path)

    def close(self) -> None:
        """Let another run have it."""
        self._file.close()


def _lock(file: io.FileIO, out: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another run is writing {out}: wait for its end, or choose another name") from error
