"""Files that hold many images: zips, and arrays of images (.npy, .npz), whose images are named 000000.npy and so on.

Members are read by their place in the file: zipfile moves one position for all, so that threads wait for each other
and a forked process needs a handle of its own.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..runtime import files
from ..runtime.errors import UserError
from ..runtime.npz import Npz

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; bytes of the name and of the extra field
PATCH_OR_ENCRYPTED = 0x61  # flags
GREY_OR_COLOURS = (1, 3, 4)  # channels of an array of three axes that is one picture


class Archive:
    """An open zip."""

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
        content = None if member is None or self._handle < 0 else self._content(member)
        if content is None:  # zipfile reads the rest, and says what is wrong
            if self._process != os.getpid():
                self._process, self._zip = os.getpid(), files.open_archive(self._path)
            content = files.read_member(self._zip, name if member is None else member.filename)
        return content

    def start_of(self, name: str) -> int:
        """The place of the bytes of a member that is stored as it is; -1 for any other."""
        member = self._members[name]
        return self._start(member) if member.compress_type == zipfile.ZIP_STORED and self._handle >= 0 else -1

    def _start(self, member: zipfile.ZipInfo) -> int:
        header = os.pread(self._handle, LOCAL_HEADER.size, member.header_offset)
        if member.flag_bits & PATCH_OR_ENCRYPTED or len(header) < LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            return -1
        _, name, extra = LOCAL_HEADER.unpack(header)
        return int(member.header_offset + LOCAL_HEADER.size + name + extra)

    def _content(self, member: zipfile.ZipInfo) -> bytes | None:
        """The content of a stored or deflated member whose length and checksum are right."""
        if files.member_fault(member) or member.compress_size > files.MAX_BYTES:
            return None
        try:
            start = self._start(member)
            packed = os.pread(self._handle, member.compress_size, start) if start >= 0 else b""
            content = _unpacked(packed, member)
        except (OSError, zlib.error):
            return None
        return content if len(content) == member.file_size and zlib.crc32(content) == member.CRC else None


def _name(member: zipfile.ZipInfo) -> str:
    """The name of a member: some programs on Windows write backslashes between folders."""
    return member.filename.replace("\\", "/")


def _unpacked(packed: bytes, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type == zipfile.ZIP_STORED:
        return packed
    if member.compress_type != zipfile.ZIP_DEFLATED:
        return b""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, member.file_size + 1)


# ---- arrays of images


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
        if not self.shape:
            raise UserError(f"an array of shape {header.shape}, where [N, H, W] or [N, H, W, C] is read")
        if start >= 0 and not files.is_remote(path):
            size, needed = os.path.getsize(path), start + math.prod(header.shape) * header.dtype.itemsize
            if size < needed:
                raise UserError(f"it ends after {size} of {needed} bytes")
            order: Literal["F", "C"] = "F" if header.fortran else "C"
            self._images = np.memmap(path, header.dtype, "r", start, header.shape, order).reshape(self.shape)

    def _header(self) -> tuple[files.Header, int]:
        """The header, and the place of the first number in the file; -1 where it is to be held in memory."""
        start = 0
        if self._path.lower().endswith(".npz"):
            with Npz(self._path) as archive:
                self._name = archive.name_of_images()
                header, self.labels = archive.header(self._name), archive.labels()
            small = math.prod(header.shape) * header.dtype.itemsize <= files.LARGE_MEMBER
            # the checksum of a small one is worth more than the memory
            start = -1 if small else Archive(self._path).start_of(f"{self._name}.npy")
            if start < 0:
                return header, start
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
        if not number.isdecimal() or int(number) >= self.shape[0]:
            raise UserError("it is not in the array")
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
