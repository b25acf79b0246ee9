"""The keys and values of an LMDB, in the order of the keys, as LSUN comes in one.

A reader of format 1 in Python: the library maps the file to memory and trusts what it says, so that a file that was
cut ends the process. Here every page and every length is looked up within the file.

A file is an array of pages. Two meta pages at its start name the root of a tree, the newer of them counts. A page has
a header of 16 bytes (number, padding, kind, end of the list of nodes, start of free space), then the places of its
nodes, by 2 bytes each. A node has 8 bytes (length or page, flags, length of the key), then key and value.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from guided_diffusion.runtime.files import MAX_BYTES, check_regular

MAGIC, FORMAT = 0xBEEFC0DE, 1
HEADER = 16  # bytes of the header of a page
BRANCH, LEAF, OVERFLOW = 1, 2, 4  # kinds of page
BIG, NESTED = 1, 6  # flags of a node: its value lies on pages of its own; it is a tree itself
DEEPEST = 64
NOWHERE = 2**64 - 1  # the root of an empty tree


@dataclass(frozen=True)
class _Meta:
    page_size: int
    entries: int
    root: int
    last_page: int
    transaction: int


class Lmdb:
    """An open database.

    :param path: of its file, or of the folder of its data.mdb.
    :raises ValueError, OSError: if it is none, of another format, or was cut.
    """

    def __init__(self, path: str) -> None:
        name = os.path.join(path, "data.mdb") if os.path.isdir(path) else path
        check_regular(name)
        self._file: BinaryIO = open(name, "rb")  # noqa: SIM115  it is closed by close()
        try:
            self._meta = self._newest()
        except ValueError:
            self._file.close()
            raise

    def __len__(self) -> int:
        return self._meta.entries

    def close(self) -> None:
        """Close its file."""
        self._file.close()

    def _newest(self) -> _Meta:
        first = self._read_meta(0)
        try:
            second = self._read_meta(first.page_size)
        except ValueError:
            second = first
        meta = max(first, second, key=lambda meta: meta.transaction)
        size = os.fstat(self._file.fileno()).st_size
        if size < (meta.last_page + 1) * meta.page_size:
            raise ValueError(f"it was cut: it has {size} bytes of {(meta.last_page + 1) * meta.page_size}")
        return meta

    def _read_meta(self, start: int) -> _Meta:
        content = self._bytes(start + HEADER, 136)
        magic, version = struct.unpack_from("<II", content)
        if magic != MAGIC:
            raise ValueError("it is no LMDB (or one of a machine of another byte order)")
        if version != FORMAT:
            raise ValueError(f"it is an LMDB of format {version}, where format {FORMAT} is read")
        (page_size,) = struct.unpack_from("<I", content, 24)
        entries, root, last_page, transaction = struct.unpack_from("<4Q", content, 104)
        if page_size not in [2**power for power in range(8, 17)]:
            raise ValueError(f"it is damaged: its pages have {page_size} bytes")
        return _Meta(page_size, entries, root, last_page, transaction)

    def _bytes(self, start: int, count: int) -> bytes:
        self._file.seek(start)
        content = self._file.read(count)
        if len(content) < count:
            raise ValueError(f"it is damaged or was cut: it ends before byte {start + count}")
        return content

    def _page(self, number: int) -> bytes:
        if not 0 <= number <= self._meta.last_page:
            raise ValueError(f"it is damaged: it names page {number} of {self._meta.last_page + 1}")
        return self._bytes(number * self._meta.page_size, self._meta.page_size)

    def places(self) -> Iterator[tuple[bytes, Place]]:
        """Every key with the place of its value.

        :raises ValueError: where the tree is damaged, after what could be read.
        """
        if self._meta.root != NOWHERE:
            yield from self._walk(self._meta.root, 0, set())

    def _walk(self, number: int, depth: int, seen: set[int]) -> Iterator[tuple[bytes, Place]]:
        page = self._page(number)
        kind, end = struct.unpack_from("<HH", page, 10)
        if number in seen or depth > DEEPEST or not HEADER <= end <= len(page):
            raise ValueError(f"it is damaged: page {number} is no part of a tree")
        seen.add(number)
        offsets = struct.unpack_from(f"<{(end - HEADER) // 2}H", page, HEADER)
        for offset in offsets:
            low, high, flags, size = self._node(page, offset, number)
            if kind & LEAF:
                key = page[offset + 8 : offset + 8 + size]
                start = offset + 8 + size
                yield key, Place(low | high << 16, flags, number * len(page) + start, len(page) - start)
            elif kind & BRANCH:
                yield from self._walk(low | high << 16 | flags << 32, depth + 1, seen)
            else:
                raise ValueError(f"it is damaged: page {number} is of kind {kind}")

    def _node(self, page: bytes, offset: int, number: int) -> tuple[int, int, int, int]:
        if offset + 8 > len(page):
            raise ValueError(f"it is damaged: a node lies outside page {number}")
        low, high, flags, size = struct.unpack_from("<4H", page, offset)
        return low, high, flags, size

    def value(self, place: Place) -> bytes:
        """The value at a place.

        :raises ValueError: if there is none, or it is too large.
        """
        if place.flags & NESTED or place.size > MAX_BYTES:
            raise ValueError("it is no single value" if place.flags & NESTED else "too many bytes")
        if not place.flags & BIG:
            if place.size > place.room:
                raise ValueError("it is longer than its page")
            return self._bytes(place.start, place.size)
        (number,) = struct.unpack("<Q", self._bytes(place.start, 8))
        (kind,) = struct.unpack_from("<H", self._page(number), 10)
        if not kind & OVERFLOW:
            raise ValueError(f"it is on page {number}, which is of kind {kind}")
        return self._bytes(number * self._meta.page_size + HEADER, place.size)


@dataclass(frozen=True)
class Place:
    """Where a value lies, as its node says."""

    size: int
    flags: int
    start: int
    room: int
