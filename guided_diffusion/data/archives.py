"""Files that many images are read from: zips, and arrays of images (.npy, .npz), whose images have the names of files.

A member of a zip is taken by its place in the file, whoever else reads. zipfile moves one position through the file,
which is why it takes a lock for every read, and why a process must not share its handle with another. Here a read has a
position of its own: threads do not wait for each other, and processes that were forked go on with the handle and the
directory of the zip that their parent has read.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..runtime import files, paths
from ..runtime.npz import Npz, read_npz

LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, and the lengths of the name and the rest
UTF8_NAME = 0x800
NOT_PLAIN = 0x61  # flags: encrypted in one way or another, or a patch


class Archive:
    """A zip that is open to be read.

    :raises ValueError: if it is none.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        self._process, self._zip = os.getpid(), files.open_archive(self._path)
        self._members = {_name(member): member for member in self._zip.infolist()}
        file = None if paths.is_remote(self._path) or not hasattr(os, "pread") else self._zip.fp
        self._file = file.fileno() if file else -1
        self._size = os.fstat(self._file).st_size if file else 0

    def close(self) -> None:
        """Nothing is read from it any more; the system may give the number of its handle to another file."""
        self._zip.close()
        self._file, self._size = -1, 0

    def members(self) -> Iterator[tuple[str, bool, str]]:
        """The name of every entry, whether a later one has it too, and why it is not read; '' if it may be."""
        for member in self._zip.infolist():
            name = _name(member)
            yield name, self._members[name] is not member, files.member_fault(member, name)

    def read(self, name: str) -> bytes:
        """All of a member.

        :raises ValueError: if it is not there, damaged, encrypted or a bomb.
        """
        member = self._members.get(name)
        try:
            content = self._content(member) if member is not None else None
        except OSError:  # zipfile tries it again, and says what is wrong
            content = None
        return self._read_otherwise(name) if content is None else content

    def stored_at(self, name: str) -> int | None:
        """Where the bytes of a member begin, if they lie there as they are."""
        member = self._members.get(name)
        if member is None or member.compress_type != zipfile.ZIP_STORED or self._file < 0:
            return None
        start = self._start(member)
        return start if start is not None and start + member.file_size <= self._end(member) else None

    def _read_otherwise(self, name: str) -> bytes:
        """By zipfile, whose handle a process shares with no other, and which says what is wrong."""
        if self._process != os.getpid():
            self._open()
        return files.read_member(self._zip, self._members[name].filename if name in self._members else name)

    def _content(self, member: zipfile.ZipInfo) -> bytes | None:
        """What a member unpacks to; None unless it is stored or deflated and all is as its entry says."""
        start = self._start(member)
        packed_size = member.compress_size
        if start is None or packed_size > files.MAX_BYTES or start + packed_size > self._end(member):
            return None
        content = _unpacked(os.pread(self._file, packed_size, start), member)
        whole = content is not None and len(content) == member.file_size and zlib.crc32(content) == member.CRC
        return content if whole else None

    def _end(self, member: zipfile.ZipInfo) -> int:
        """Where its bytes end at the latest; where zipfile tells, that is where the next member begins."""
        end: int | None = getattr(member, "_end_offset", None)
        return self._size if end is None else min(end, self._size)

    def _start(self, member: zipfile.ZipInfo) -> int | None:
        """Where its bytes begin, behind a header of its own that must agree with its entry."""
        if not 0 <= member.header_offset < self._size or member.flag_bits & NOT_PLAIN or files.member_fault(member):
            return None
        name = member.orig_filename.encode("utf-8" if member.flag_bits & UTF8_NAME else "cp437")
        header = os.pread(self._file, LOCAL_HEADER.size + len(name), member.header_offset)
        if len(header) < LOCAL_HEADER.size:
            return None
        signature, flags, method, length, extra = LOCAL_HEADER.unpack_from(header)
        there = signature, flags & (UTF8_NAME | NOT_PLAIN), method, header[LOCAL_HEADER.size :]
        if there != (b"PK\3\4", member.flag_bits & UTF8_NAME, member.compress_type, name) or length != len(name):
            return None
        return int(member.header_offset + LOCAL_HEADER.size + length + extra)


def _name(member: zipfile.ZipInfo) -> str:
    """What a member is called: some programs on Windows write its folders with their own separator."""
    return member.filename.replace("\\", "/")


def _unpacked(packed: bytes, member: zipfile.ZipInfo) -> bytes | None:
    """At most one byte more than the entry claims."""
    if member.compress_type == zipfile.ZIP_STORED:
        return packed
    if member.compress_type != zipfile.ZIP_DEFLATED:
        return None
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(packed, member.file_size + 1)
    except zlib.error:
        return None
    return content if stream.eof else None


# ---- arrays of images

GREY_OR_COLOURS = (1, 3, 4)  # numbers of channels, where an array of three axes is one picture
NAME = "{:06d}.npy"  # of an image


class Numbered(Sequence[str]):
    """The names of the images of an array, as of .npy files, none of which is held."""

    def __init__(self, count: int) -> None:
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        numbers = self._numbers[index]
        return NAME.format(numbers) if isinstance(numbers, int) else [NAME.format(number) for number in numbers]


class Stack:
    """The images of an array [N, H, W] or [N, H, W, C]: of an .npy, or of an .npz (arr_0, labels in arr_1).

    One picture, [H, W] or [H, W, C], is a stack of one. Rows are read where they lie. What is packed, or small in an
    npz, is read in its order, and held as a whole once it is asked for in another one; so is an array of Fortran.

    :param channels: C where it is another number than 1, 3 or 4.
    :raises ValueError: if there is no such array, or it is not whole.
    """

    def __init__(self, path: str, channels: int = 0) -> None:
        self._path, self._start, self._name = path, 0, ""
        self._whole: NDArray[Any] | None = None
        self._rows: Iterator[NDArray[Any]] = iter(())
        self._next = self._process = -1
        self.labels: list[int] | None = None
        if path.lower().endswith(".npz"):
            self._open_npz()
        else:
            self._open_npy()
        self.shape = stacked_shape(self.header.shape, channels)
        if not self.shape:
            raise ValueError(f"an array of shape {self.header.shape}, where [N, H, W] or [N, H, W, C] is read")

    def _open_npy(self) -> None:
        with files.open_file(self._path) as file:
            self.header, self._start = files.read_header(file), file.tell()
            size = file.seek(0, os.SEEK_END)
        wanted = self._start + math.prod(self.header.shape) * self.header.dtype.itemsize
        if size < wanted:
            raise ValueError(f"it ends after {size} of {wanted} bytes")

    def _open_npz(self) -> None:
        with Npz(self._path) as archive:
            name = archive.name_of_images()
            self.header, self.labels = archive.header(name), archive.labels()
        large = math.prod(self.header.shape) * self.header.dtype.itemsize > files.LARGE_MEMBER
        start = Archive(self._path).stored_at(f"{name}.npy") if large and not self.header.fortran else None
        if start is None:
            self._name = name
            return
        with files.open_file(self._path) as file:
            file.seek(start)
            files.read_header(file)
            self._start = file.tell()

    def hold(self) -> None:
        """Read what cannot be read in any order, so that processes that are forked share it."""
        if self._whole is None and self._name:
            with Npz(self._path) as archive:
                self._whole = archive.whole(self._name).reshape(self.shape)
        elif self._whole is None and self.header.fortran:
            self._whole = files.read_array(files.read_file(self._path)).reshape(self.shape)

    def read(self, name: str) -> bytes:
        """An image as an .npy.

        :raises ValueError: if it is not there.
        """
        stem = name.removesuffix(".npy")
        if not stem.isdecimal() or int(stem) >= self.shape[0]:
            raise ValueError("it is not in the array")
        file = io.BytesIO()
        np.lib.format.write_array(file, np.ascontiguousarray(self._row(int(stem))), allow_pickle=False)
        return file.getvalue()

    def _row(self, index: int) -> NDArray[Any]:
        if self._name and self._whole is None and len(self.shape) == len(self.header.shape):
            row = self._row_in_turn(index)
            if row is not None:
                return row
        self.hold()
        if self._whole is not None:
            held: NDArray[Any] = self._whole[index]
            return held
        shape, dtype = self.shape[1:], self.header.dtype
        with files.open_file(self._path) as file:
            file.seek(self._start + index * math.prod(shape) * dtype.itemsize)
            return files.read_rows(file, shape, dtype)

    def _row_in_turn(self, index: int) -> NDArray[Any] | None:
        """The first image, or the one behind that which was read last; None for others."""
        if index and (index, os.getpid()) != (self._next, self._process):
            return None
        if not index:
            self._rows = read_npz(self._path, self._name, 1)
        self._next, self._process = index + 1, os.getpid()
        row: NDArray[Any] = next(self._rows)[0]
        return row

    def close(self) -> None:
        """Let go of what is held."""
        self._whole, self._rows = None, iter(())


def stacked_shape(shape: tuple[int, ...], channels: int = 0) -> tuple[int, ...]:
    """[N, ...] of images of an array of a shape; () where it holds none."""
    one = len(shape) == 2 or (len(shape) == 3 and shape[-1] in (*GREY_OR_COLOURS, channels))
    whole = (1, *shape) if one else shape
    return whole if len(whole) in (3, 4) and 0 not in whole else ()


def is_stack(path: str, channels: int = 0) -> bool:
    """Whether a path is that of an .npz, or of an .npy of more than one picture."""
    if not path.lower().endswith(".npy"):
        return path.lower().endswith(".npz")
    try:
        with files.open_file(path) as file:
            shape = files.read_header(file).shape
    except (OSError, ValueError):  # who reads it says what is wrong
        return False
    return len(shape) > 2 and stacked_shape(shape, channels) in ((), shape)
