"""Files: foreign ones read within limits (bytes, zip members, JSON, array headers), and new ones written whole.

A foreign file may be damaged, or made to do harm. Its fault is a UserError of one sentence; the callers name the file.
Nothing is unpickled, and no more is held in memory than the limits below, whatever a header claims.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from . import paths
from .errors import UserError, explained as explained
from .paths import AnyPath, is_remote, open_blob, resolve

MAX_BYTES = 2**29  # of a file, or of a member of a zip, that is read as a whole
MAX_ARRAY = 2**31  # of an array that is held as a whole
LARGE_MEMBER = 2**26  # a member that unpacks to more than this ...
MAX_RATIO = 200  # ... and to more than so many times its packed size is a bomb
MAX_NAME = 1000  # characters
PIECE_OF_MEMBER = 4096  # packed bytes that are unpacked at once: bzip2 makes at most some 90 MB of so many
PIECE = 2**18  # bytes of a file of unknown size that are read at once
SHOWN = 200  # characters of a name in a message

_FOREIGN = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)")


def quoted(text: str) -> str:
    """A name between quotation marks: control characters and undecodable bytes escaped, a long name cut."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def printable(text: str) -> str:
    """The same without quotation marks where nothing needs to be escaped."""
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return text if text.isprintable() else repr(text)


def reason(error: BaseException) -> str:
    """One printable line of an error that another program raised."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    return printable(text) or type(error).__name__


# ---- files


def open_file(path: AnyPath) -> BinaryIO:
    """A file that a user names, to read from; a zip in a bucket is then read piece by piece."""
    where = resolve(path)
    if is_remote(where):
        return open_blob(where)
    check_regular(where)
    return open(where, "rb")


def check_regular(path: str) -> None:
    """Refuse a local path that is no file with an end: to read a pipe or a device may wait for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise UserError("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")


def read_file(path: AnyPath) -> bytes:
    """All of a file of at most `MAX_BYTES`."""
    with open_file(path) as file:
        size = MAX_BYTES + 1 if is_remote(resolve(path)) else local_size(file)
        content = b"".join(_pieces(file, size)) if size > MAX_BYTES else file.read(size)
    _check_size(len(content))
    return content


def local_size(file: BinaryIO) -> int:
    """Bytes of a file on the disk, at most `MAX_BYTES`."""
    size = os.fstat(file.fileno()).st_size
    _check_size(size)
    return size


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise UserError(f"it is larger than {MAX_BYTES} bytes, the limit")


def kind_of_file(path: str) -> str:
    """The kind of what lies at a local path, if that shows that it is no weights; '' where it may be."""
    if os.path.exists(path) and not os.path.isfile(path):
        return "a folder" if os.path.isdir(path) else "no regular file"
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    kinds = {
        "an empty file": not head,
        "a TensorFlow graph": path.endswith(".pb"),
        "a web page": head.startswith(b"<"),
        "the pointer that Git LFS leaves in place of a file": head.startswith(b"version https://git-lfs"),
    }
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with open_archive(path) as archive:
            names = archive.namelist()
        kinds["an npz, which is images or their statistics"] = all(name.endswith(".npy") for name in names)
        kinds["a TorchScript archive"] = any(name.endswith("/constants.pkl") for name in names)
    return next((kind for kind, is_so in kinds.items() if is_so), "")


# ---- zips


def open_archive(path: str) -> zipfile.ZipFile:
    """A zip to read from."""
    try:
        where = resolve(path)
        if is_remote(where):
            return zipfile.ZipFile(open_blob(where))
        check_regular(where)
        return zipfile.ZipFile(where)
    except Exception as error:  # zipfile does not say what a damaged directory leads it to
        raise UserError(reason(error)) from error


def check_unpacked(path: str) -> None:
    """Refuse a zip whose members claim more bytes than the file has: torch writes them as they are, never packed."""
    check_regular(path)
    if zipfile.is_zipfile(path):
        with open_archive(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        if claimed > os.path.getsize(path):
            raise UserError(f"its members unpack to {claimed} bytes")


def name_fault(name: str) -> str:
    """Why a file of this name is not taken; '' if it may be."""
    if len(name) > MAX_NAME:
        return f"a name of more than {MAX_NAME} characters"
    return "a name that is no text" if re.search("[\ud800-\udfff]", name) else ""


def path_fault(name: str, archive: str) -> str:
    """Why a member of this name of an archive, such as a "zip", is not taken; '' if it may be."""
    return name_fault(name) or (f"a path that leads out of the {archive}" if _FOREIGN.match(name) else "")


def member_fault(member: zipfile.ZipInfo, name: str = "") -> str:
    """Why a member of a zip is not read, as far as its entry tells; '' if it may be.

    :param name: in place of the entry's own.
    """
    ratio = member.file_size / max(member.compress_size, 1)
    bomb = member.file_size > LARGE_MEMBER and ratio > MAX_RATIO
    faults = {
        "encrypted": member.flag_bits & 1,
        "a link": stat.S_ISLNK(member.external_attr >> 16),
        "unpacks to too many bytes": bomb or member.file_size > MAX_BYTES,
    }
    return path_fault(name or member.filename, "zip") or next((fault for fault in faults if faults[fault]), "")


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """All of a member of a zip, no matter what size its entry claims."""
    member = archive.NameToInfo.get(name)
    fault = "it is not in the zip" if member is None else member_fault(member)
    if member is None or fault:
        raise UserError(fault)
    try:
        with archive.open(member) as file:
            return b"".join(iter(lambda: file.read(PIECE_OF_MEMBER), b""))
    except Exception as error:  # nor does it say what a damaged member leads it to
        raise UserError(reason(error)) from error


def parse_json(content: bytes) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(reason(error).partition(";")[0]) from error


# ---- arrays


class Header(NamedTuple):
    """Shape and type of the numbers in an npy, and whether they lie in the order of Fortran."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


def read_header(file: IO[bytes]) -> Header:
    """The header of an npy, leaving the file at its first number."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # a header is Python source, and numpy's parser raises what Python's does
        raise UserError(f"it is no npy ({reason(error)})") from error
    if dtype.kind not in "biufc" or not all(type(side) is int and side >= 0 for side in shape):
        raise UserError(f"an array of type {printable(f'{dtype} {shape}')}, where numbers are read")
    return Header(shape, dtype, fortran and len(shape) > 1)


def read_array(content: bytes) -> np.ndarray[Any, Any]:
    """The array of an npy, which cannot be written to."""
    file = io.BytesIO(content)
    return read_numbers(file, read_header(file))


def read_numbers(file: IO[bytes], header: Header) -> np.ndarray[Any, Any]:
    """The array of a header that was read."""
    size = math.prod(header.shape) * header.dtype.itemsize
    if size > MAX_ARRAY:
        raise UserError(f"an array of {size} bytes, more than the {MAX_ARRAY} that are held: np.save it in C order")
    array = read_rows(file, header.shape, header.dtype)
    return array.reshape(-1).reshape(header.shape, order="F") if header.fortran else array


def read_rows(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The next numbers of an npy; for those that the file has not got no memory is taken."""
    size = math.prod(shape) * dtype.itemsize
    try:
        content = b"".join(_pieces(file, size))
    except Exception as error:  # of a damaged member of a zip
        raise UserError(reason(error)) from error
    if len(content) < size:
        raise UserError(f"it ends after {len(content)} of {size} bytes")
    return np.frombuffer(content, dtype).reshape(shape)


def _pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next bytes of a file, at most `size`."""
    while size > 0 and (piece := file.read(min(size, PIECE))):
        size -= len(piece)
        yield piece


# ---- writing

PART = ".part-"  # in the names of files that are not whole yet, before the number of the process that writes them


class _Raw(io.FileIO):
    """Keeps the first error of writing and then swallows the rest, as torch's writer in C++ cannot pass errors on."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write some bytes, or pretend to."""
        try:
            return memoryview(data).nbytes if self.error else super().write(data)
        except OSError as error:
            self.error = error
            return memoryview(data).nbytes

    def settle(self) -> None:
        """Have everything on the disk, or raise what went wrong."""
        if self.error is not None:
            raise self.error
        os.fsync(self.fileno())


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole and on the disk.

    :raises OSError: naming path and reason, if the disk is full or nothing may be written there; `path` is as it was.
    """
    part, folder = f"{path}{PART}{os.getpid()}", os.path.dirname(path) or "."
    try:
        with explained(path):
            os.makedirs(folder, exist_ok=True)
            raw = _Raw(part, "wb")
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            with explained(path):
                raw.settle()
        with explained(path):
            os.replace(part, path)
        with contextlib.suppress(OSError):  # have the new name on the disk too, where the file system can do that
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


@contextlib.contextmanager
def writing(path: str) -> Iterator[BinaryIO]:
    """A local or remote file to write, seen under its name only once it is whole; its errors are as in `replacing`."""
    if is_remote(path):  # object stores show a file when it is closed, and nothing of it after an error
        with explained(path), paths.new_blob(path) as file:
            yield file
    else:
        with replacing(path) as file:
            yield file


def write_json(path: str, value: Any) -> None:
    """Write a value as JSON; readers of `path` see the old file or the whole new one."""
    with writing(path) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The text of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()
