"""Files that hold many images: zips, and arrays of images (.npy, .npz), whose images are named 000000.npy and so on.

Many archives in one source are named by a pattern, ``train-{000..146}.tar``, or on the lines of a text file.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..runtime import files
from ..runtime.errors import UserError, listed, quoted, refuse
from ..runtime.npz import Npz

K = TypeVar("K")
T = TypeVar("T")

AT_ONCE = 16  # requests to buckets and servers
MOST_ARCHIVES = 10**6  # of a pattern
GREY_OR_COLOURS = (1, 3, 4)  # channels of an array of three axes that is one picture


class Archive:
    """An open zip, from which threads and forked processes read at once: each member by its place in the file."""

    def __init__(self, path: str) -> None:
        self._path, self._process = path, os.getpid()
        self._zip = files.open_archive(path)
        self._members = {_name(member): member for member in self._zip.infolist()}
        by_place = self._zip.fp is not None and not files.is_remote(path) and hasattr(os, "pread")
        self._handle = self._zip.fp.fileno() if by_place else -1  # type: ignore[union-attr]

    def close(self) -> None:
        """Close the file, whose handle the system may give to another one."""
        self._zip.close()
        self._handle = -1

    def members(self) -> Iterator[tuple[str, bool, str]]:
        """(name, whether a later entry has the same name, why it is not read or '') of every entry."""
        for member in self._zip.infolist():
            name = _name(member)
            yield name, self._members[name] is not member, files.member_fault(member, name)

    def read(self, name: str) -> bytes:
        """The content of a member."""
        member = self._members.get(name)
        fault = "it is not in the zip" if member is None else files.member_fault(member)
        if member is None or fault:
            raise UserError(fault)
        if self._handle >= 0:
            return files.member_at(self._handle, member)
        if self._process != os.getpid():  # processes that share an open file share its position
            self._process, self._zip = os.getpid(), files.open_archive(self._path)
        return files.read_member(self._zip, member)


def _name(member: zipfile.ZipInfo) -> str:
    """The name of a member: some programs on Windows write backslashes between folders."""
    return member.filename.replace("\\", "/")


class Stack:
    """The images of an array [N, H, W] or [N, H, W, C], in an .npy, or in an .npz with labels in arr_1.

    A single picture [H, W] or [H, W, C] is a stack of one. Images that lie on the disk as they are, are read one by one
    when they are asked for; those of a packed or small npz, or of a bucket, are held in memory from the first on.

    :param channels: C, where it is not 1, 3 or 4.
    """

    def __init__(self, path: str, channels: int = 0) -> None:
        self._path, self._name = path, ""
        self.labels: list[int] | None = None
        self._images: NDArray[Any] | None = None
        header, start = self._header()
        self.shape = stacked_shape(header.shape, channels)
        refuse((not self.shape, f"an array of shape {header.shape}, where [N, H, W] or [N, H, W, C] is read"))
        if start >= 0 and not files.is_remote(path):
            order: Literal["F", "C"] = "F" if header.fortran else "C"
            self._images = np.memmap(path, header.dtype, "r", start, header.shape, order).reshape(self.shape)

    def _header(self) -> tuple[files.Header, int]:
        """The header, and the place of the first number in the file; -1 where it is to be held in memory."""
        start = 0
        if self._path.lower().endswith(".npz"):
            with Npz(self._path) as archive:
                self._name = archive.name_of_images()
                header, self.labels, start = archive.header(self._name), archive.labels(), archive.place(self._name)
            if start < 0 or math.prod(header.shape) * header.dtype.itemsize <= files.LARGE_MEMBER:
                return header, -1  # the checksum of a small one is worth more than the memory
        with files.open_file(self._path) as file:
            if start:
                file.seek(start)
            return files.read_header(file), file.tell()

    def hold(self) -> NDArray[Any]:
        """The images [N, ...], which forked processes share once they are held."""
        if self._images is None:
            if self._name:
                with Npz(self._path) as archive:
                    images = archive.whole(self._name)
            else:
                images = files.read_array(files.read_file(self._path))
            self._images = images.reshape(self.shape)
        return self._images

    def read(self, name: str) -> NDArray[Any]:
        """An image by its name."""
        number = name.removesuffix(".npy")
        refuse((not number.isdecimal() or int(number) >= self.shape[0], "it is not in the array"))
        return np.asarray(self.hold()[int(number)])

    def close(self) -> None:
        """Let go of the images."""
        self._images = None


def stacked_shape(shape: tuple[int, ...], channels: int = 0) -> tuple[int, ...]:
    """The shape [N, ...] of the images in an array of a shape; () where it holds none."""
    single = len(shape) == 2 or (len(shape) == 3 and shape[-1] in (*GREY_OR_COLOURS, channels))
    whole = (1, *shape) if single else shape
    return whole if len(whole) in (3, 4) and 0 not in whole else ()


def is_stack(path: str, channels: int = 0) -> bool:
    """Whether a path is that of an .npz, or of an .npy of more than one picture."""
    if not path.lower().endswith(".npy"):
        return path.lower().endswith(".npz")
    try:
        with files.open_file(path) as file:
            shape = files.read_header(file).shape
    except (OSError, ValueError):  # reading the file says what is wrong with it
        return False
    return len(shape) > 2 and stacked_shape(shape, channels) in ((), shape)


def read_each(read: Callable[[K], T], keys: Iterable[K], *, remote: bool) -> list[T]:
    """What is read for each key, several at once where each is a request to a bucket or server."""
    with ThreadPoolExecutor(AT_ONCE) if remote else contextlib.nullcontext() as pool:
        return list(pool.map(read, keys) if pool else map(read, keys))


_COUNT = re.compile(r"\{(\d+)\.\.(\d+)\}")


def archives_of(path: str) -> list[str]:
    """The tars and zips that a pattern or a text file of paths names, in their order; [] of any other path.

    :raises UserError: if it names one twice, or something else.
    """
    of_file = path.lower().endswith(".txt") and not files.is_remote(path) and os.path.isfile(path)
    if not of_file and (not _COUNT.search(path) or os.path.lexists(path)):
        return []
    lines = [path]
    if of_file:
        text = files.read_file(path).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    folder = os.path.dirname(path) if of_file else ""
    resolved = [files.resolve(line) for line in lines]
    places = [where if files.is_remote(where) else os.path.join(folder, where) for where in resolved]
    names = [name for place in places for name in expanded(place)]
    odd = next((name for name in names if not name.lower().endswith((".tar", ".zip"))), "")
    fault = f"{quoted(odd)} is neither a tar nor a zip" if odd else f"{quoted(path)} names nothing"
    refuse((odd or not names, f"{fault}: name shards such as train-{{000..146}}.tar, or one on each line"))
    twice = [name for name, count in Counter(names).items() if count > 1]
    refuse((twice, f"{listed(map(quoted, twice), 1)} is named twice: leave it out once"))
    return names


def expanded(pattern: str) -> list[str]:
    """The names of a pattern: its numbers have as many digits as its first one."""
    match = _COUNT.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    falling = not 0 <= last - first < MOST_ARCHIVES
    refuse((falling, f"{quoted(pattern)} counts from {first} to {last}: write the smaller number first"))
    numbers = [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    rest = expanded(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{number}{end}" for number in numbers for end in rest]
