"""Zips that many images are read from: a member is taken by its place in the file, whoever else reads.

zipfile moves one position through the file, which is why it takes a lock for every read, and why a process must not
share its handle with another. Here a read has a position of its own: threads do not wait for each other, and processes
that were forked go on with the handle and the directory of the zip that their parent has read.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator

from . import untrusted

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
        self._process, self._zip = os.getpid(), untrusted.open_archive(self._path)
        file = None if untrusted.is_remote(self._path) or not hasattr(os, "pread") else self._zip.fp
        self._file = file.fileno() if file else -1
        self._size = os.fstat(self._file).st_size if file else 0

    def close(self) -> None:
        """Nothing is read from it any more; the system may give the number of its handle to another file."""
        self._zip.close()
        self._file, self._size = -1, 0

    def members(self) -> Iterator[tuple[zipfile.ZipInfo, bool]]:
        """All entries, and whether a later one has the same name."""
        for member in self._zip.infolist():
            yield member, self._zip.NameToInfo[member.filename] is not member

    def read(self, name: str) -> bytes:
        """All of a member.

        :raises ValueError: if it is not there, damaged, encrypted or a bomb.
        """
        member = self._zip.NameToInfo.get(name)
        try:
            content = self._content(member) if member is not None else None
        except OSError:  # zipfile tries it again, and says what is wrong
            content = None
        return self._read_otherwise(name) if content is None else content

    def _read_otherwise(self, name: str) -> bytes:
        """By zipfile, whose handle a process shares with no other, and which says what is wrong."""
        if self._process != os.getpid():
            self._open()
        return untrusted.read_member(self._zip, name)

    def _content(self, member: zipfile.ZipInfo) -> bytes | None:
        """What a member unpacks to; None unless it is stored or deflated and all is as its entry says."""
        start = self._start(member)
        packed_size = member.compress_size
        if start is None or packed_size > untrusted.MAX_BYTES or start + packed_size > self._end(member):
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
        if not 0 <= member.header_offset < self._size or member.flag_bits & NOT_PLAIN or untrusted.member_fault(member):
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
