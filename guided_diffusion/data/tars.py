"""Tars that may be anybody's: their members one after the other, or each from its place, by an index.

An index is made once, by reading through the tar, and kept in the cache folder for as long as the tar has the same size
and date (on a server: the same version); or it lies beside the tar, as NAME.tar.index. It holds the texts of the small
members too, labels and captions, so that these are not read one by one.

Nothing of a tar is written to the disk under a name of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from ..runtime import files
from ..runtime.atomic import explained, lock, replacing
from ..runtime.errors import WHY, UserError, as_user_error, reason, refuse
from ..runtime.files import MAX_BYTES, path_fault
from ..runtime.npz import Npz, write_arrays

BLOCK = tarfile.BLOCKSIZE
BESIDE = ".index"  # behind the name of a tar, its index
TEXTS, LONGEST_TEXT = (".cls", ".txt", ".json"), 2**16  # what an index holds the content of, and bytes of it at most


@dataclass(frozen=True)
class Member:
    """A member that is no folder.

    :param fault: why it is not read; '' if it may be.
    :param open: opens its content as a file.
    :param place: of its content in the tar, `size` the number of its bytes.
    """

    name: str
    fault: str
    open: Callable[[], IO[bytes]]
    place: int
    size: int

    def read(self) -> bytes:
        """Its content.

        :raises ValueError: if there is a fault, or the tar ends before it does.
        """
        refuse((self.fault, self.fault))
        with as_user_error(WHY, tarfile.TarError, EOFError, OSError), self.open() as file:
            return file.read()


class Truncated(UserError):
    """A tar that ends early or is damaged, behind members that are sound."""


class Changed(UserError):
    """A tar that is no longer the one of its index: no image in it may be taken, nor another in its place."""


def members(file: IO[bytes], *, largest: int = MAX_BYTES, packed: bool = True) -> Iterator[Member]:
    """The members of an open tar, packed or not, in their order.

    :param largest: bytes of a member that is read as a whole.
    :param packed: False takes no packed tar, in which members have no places.
    :raises ValueError: if it is no tar.
    :raises Truncated: where it ends too early, after what could be read.
    """
    seen = set[str]()
    with as_user_error(f"it is no tar ({WHY})", tarfile.TarError, EOFError, OSError):
        archive = tarfile.open(fileobj=file, mode="r" if packed else "r:")  # noqa: SIM115  the caller closes the file
    try:
        for info in archive:  # which keeps all that it has found, a million in ImageNet
            if not info.isdir():
                fault = _fault(info, largest) or ("a duplicate of an earlier name" if info.name in seen else "")
                seen.add(info.name)
                yield Member(info.name, fault, partial(_extracted, archive, info), info.offset_data, info.size)
            archive.members.clear()  # type: ignore[attr-defined]
        _check_end(archive)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise Truncated(f"it ends early or is damaged ({reason(error)})") from error


def _extracted(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(info)
    assert file is not None, "only regular files are read"
    return file


def _fault(info: tarfile.TarInfo, largest: int) -> str:
    """Why a member is not read, as far as its header tells."""
    fault = path_fault(info.name, "tar")
    if not fault and (info.issym() or info.islnk()):
        fault = "a link"
    if not fault and (not info.isreg() or info.issparse()):
        fault = "no regular file"
    return fault or ("too many bytes" if info.size > largest else "")


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse a tar without the empty block that closes it: `tarfile` takes any place for its end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"there is no end of a tar at byte {archive.offset}")


class Tar:
    """A tar whose members are read from their places, on the disk, in a bucket or on a web server.

    It holds no open file; its index is mapped from the disk, which the processes of a machine share.

    :raises UserError: if it is no tar, ends early, or its index cannot be kept.
    """

    def __init__(self, path: str) -> None:
        status = files.stat(path)
        self.path, self.size, self._date = path, int(status.size), float(status.mtime)
        self.remote = files.is_remote(path)
        key = f"{path if self.remote else os.path.abspath(path)} {self.size} {status.version or self._date}"
        self._kept = os.path.join(files.cache_folder(), "shards", hashlib.sha256(key.encode()).hexdigest()[:32])
        self.copy = f"{self._kept}.tar" if self.remote else path
        self._index = self._open() or self._made()

    def _open(self) -> Mapping[str, NDArray[Any]] | None:
        """The index that is kept, mapped."""
        if os.path.exists(f"{self._kept}{BESIDE}"):
            with suppress(OSError, ValueError, LookupError):  # it is made again
                return _mapped(f"{self._kept}{BESIDE}", self.size)
        return None

    def _made(self) -> Mapping[str, NDArray[Any]]:
        """The index, made or fetched by the first process of this machine that wants it, for which others wait."""
        with explained(self._kept):
            os.makedirs(os.path.dirname(self._kept), exist_ok=True)
            file = open(f"{self._kept}.lock", "w")  # noqa: SIM115  closed below
        with file:
            lock(file)
            if kept := self._open() or self._fetch():
                return kept
            with files.open_file(self.path) as tar:
                write_index(f"{self._kept}{BESIDE}", tar, self.size)
            return _mapped(f"{self._kept}{BESIDE}", self.size)

    def _fetch(self) -> Mapping[str, NDArray[Any]] | None:
        """The index beside the tar, if it is of a tar of that size."""
        if not files.exists(self.path + BESIDE):
            return None
        content = files.read_file(self.path + BESIDE)
        with replacing(f"{self._kept}{BESIDE}") as file:
            file.write(content)
        return self._open()

    def members(self) -> Iterator[tuple[str, bool, str]]:
        """(name, False, why it is not read or '') of every member, by name; of one name twice the first is read."""
        names = self._index["names"].tobytes().decode(errors="replace")
        for name in names.split("\n") if len(self._index["ends"]) else ():
            yield name, False, path_fault(name, "tar")  # again: an index may be anybody's
        yield from ((name, False, fault) for name, fault in json.loads(self._index["faults"].tobytes()))

    def read(self, name: str) -> bytes:
        """The content of a member."""
        number = bisect_left(range(len(self._index["ends"])), name.encode(), key=self._name)
        refuse((number == len(self._index["ends"]) or self._name(number) != name.encode(), "it is not in the tar"))
        place, size = int(self._index["places"][number]), int(self._index["sizes"][number])
        if place < 0:
            return self._index["texts"][-place - 1 : -place - 1 + size].tobytes()
        content = self._part(place - BLOCK, size + BLOCK)
        self._check(cut=len(content) < size + BLOCK, other=not _heads(content[:BLOCK], name, size))
        return content[BLOCK:]

    def _check(self, *, cut: bool, other: bool) -> None:
        if cut:
            raise Changed(f"{self.path} was cut since its index was made, when it had {self.size} bytes: copy it again")
        if other:
            raise Changed(f"{self.path} has changed since its index was made: start again")

    def _name(self, number: int) -> bytes:
        ends, names = self._index["ends"], self._index["names"]
        return names[int(ends[number - 1]) + 1 if number else 0 : int(ends[number])].tobytes()

    def _part(self, start: int, size: int) -> bytes:
        """Bytes of the copy on this machine, where there is one."""
        try:
            with open(self.copy, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if not self.remote:
                    other = (status.st_size, status.st_mtime) != (self.size, self._date)
                    self._check(cut=status.st_size < self.size, other=other)
                file.seek(start)
                return file.read(size)
        except FileNotFoundError as error:
            if not self.remote:
                raise Changed(f"{self.path} is gone since its index was made: put it back") from error
        return files.read_part(self.path, start, size)

    def identity(self) -> str:
        """Another text where the content is another, as far as size and date or version tell."""
        return os.path.basename(self._kept)

    def close(self) -> None:
        """Nothing is open."""


def _heads(block: bytes, name: str, size: int) -> bool:
    """Whether a block is the header of a member, as its name and size tell."""
    found = block[:100].partition(b"\0")[0].removeprefix(b"./")
    other = name.isascii() and len(name) < 100 and found != name.encode()  # a long one stands before it
    try:
        return int(block[124:136].strip(b" \0"), 8) == size and not other
    except ValueError:
        return False


def write_index(path: str, file: IO[bytes], size: int) -> None:
    """Write the index of an open tar.

    :param size: bytes of the tar.
    :raises UserError: if it is no tar, or ends early.
    """
    rows, faults, texts = list[tuple[bytes, int, int]](), list[tuple[str, str]](), io.BytesIO()
    for member in members(file, packed=False):
        name = member.name.removeprefix("./")
        fault = member.fault or ("a name of two lines" if "\n" in name else "")
        if fault:
            faults.append((name, fault))
        elif member.size <= LONGEST_TEXT and os.path.splitext(name)[1] in TEXTS:
            rows.append((name.encode(), -texts.tell() - 1, member.size))
            texts.write(member.read())
        else:
            rows.append((name.encode(), member.place, member.size))
    rows.sort()
    names = [name for name, _, _ in rows]
    arrays: dict[str, NDArray[Any]] = {
        "names": np.frombuffer(b"\n".join(names), np.uint8),
        "ends": np.cumsum([len(name) + 1 for name in names], dtype=np.int64) - 1,
        "places": np.array([place for _, place, _ in rows], np.int64),
        "sizes": np.array([length for _, _, length in rows], np.int64),
        "texts": np.frombuffer(texts.getvalue(), np.uint8),
        "faults": np.frombuffer(json.dumps(faults).encode(), np.uint8),
        "tar": np.array([size], np.int64),
    }
    write_arrays(path, arrays)


KINDS = {"names": "u1", "ends": "i8", "places": "i8", "sizes": "i8", "texts": "u1", "faults": "u1", "tar": "i8"}


def _mapped(path: str, size: int) -> dict[str, NDArray[Any]]:
    """The arrays of an index, which stay on the disk.

    :raises UserError: if they are not those of a tar of this size.
    """
    arrays = dict[str, NDArray[Any]]()
    with Npz(path) as archive, files.open_file(path) as file:
        whole = th.from_file(path, size=os.path.getsize(path), dtype=th.uint8).numpy()  # np.memmap keeps a handle open
        for name, kind in KINDS.items():
            file.seek(archive.place(name))
            header = files.read_header(file)
            start, count = file.tell(), header.shape[0]
            part = whole[start : start + count * np.dtype(kind).itemsize]
            refuse((header.dtype != np.dtype(kind) or len(header.shape) != 1, "it is no index of a tar"))
            arrays[name] = part.view(kind)
    ends, places, sizes, texts = (arrays[name] for name in ("ends", "places", "sizes", "texts"))
    last = np.where(places < 0, sizes - places - 1 - len(texts), sizes + places - size)
    sound = len(ends) == len(places) == len(sizes) and int(arrays["tar"][0]) == size
    sound = sound and bool((np.diff(ends) >= 0).all()) and (not len(ends) or int(ends[-1]) == len(arrays["names"]))
    sound = sound and bool((last <= 0).all() and (sizes >= 0).all() and (sizes <= MAX_BYTES).all())
    refuse((not sound, "it is the index of another tar"))
    return arrays
