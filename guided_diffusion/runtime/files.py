"""Paths that a user names, in buckets (gs://, s3://, az://) too, and their files, read within limits and written whole.

A foreign file may be damaged, or made to do harm. Its fault is a UserError of one sentence; the callers name the file.
Nothing is unpickled, and no more is held in memory than the limits below, whatever a header claims.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import stat as modes
import struct
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import IO, Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np

from .atomic import explained, replacing
from .errors import WHY, UserError, as_user_error, nearest, printable, reason, refuse
from .remote import S3, ask, in_parts, is_web, open_parts, part, web_stat

T = TypeVar("T")
AnyPath = str | os.PathLike[str]

MAX_BYTES = 2**29  # of a file, or of a member of a zip, that is read as a whole
MAX_ARRAY = 2**31  # of an array that is held as a whole
LARGE_MEMBER = 2**26  # a member that unpacks to more than this ...
MAX_RATIO = 200  # ... and to more than so many times its packed size is a bomb
MAX_NAME = 1000  # characters
MAX_HEADER = 2**24  # bytes of that of a safetensors file
PIECE = 2**18  # bytes of a file of unknown size that are read at once

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")  # one letter alone is a drive of Windows
_FILE = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.IGNORECASE | re.DOTALL)
_BUCKET = re.compile(r"(gs|s3|az)://|https://[^/]+\.blob\.core\.windows\.net/")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_SCHEMES = ("gs", "s3", "az", "hf", "file", "https", "http", "ftp")  # with one slash too, as pathlib makes one of two
_FOREIGN = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)")


def resolve(path: AnyPath) -> str:
    """The path as the rest of the package takes it: a local one, or the URL of a bucket."""
    text = os.fspath(path)
    if os.path.lexists(text):
        return text
    if text.startswith("~"):
        return os.path.expanduser(text)
    if _WINDOWS.match(text) and os.name != "nt":
        drive = f"/mnt/{text[0].lower()}/{text[3:]}".replace("\\", "/") if text[1] == ":" else "/mnt/..."
        raise UserError(f"{text!r} is a path of Windows: under WSL write {drive}, else copy it to this machine")
    if local_file := _FILE.fullmatch(text):
        return urllib.parse.unquote(local_file[1])
    url = _URL.match(text)
    if url is None or (len(url[2]) < 2 and url[1].lower() not in _SCHEMES):
        return text
    whole = f"{url[1].lower()}://{text[url.end() :]}"
    if not is_remote(whole):
        raise UserError(
            f"{text!r} cannot be read where it lies: give a local path, file:///PATH with three slashes, a bucket of "
            "gs://, s3:// or az://, or tars on a web server; fetch others first (curl -LO URL, hf download NAME)"
        )
    if whole.startswith(S3) and importlib.util.find_spec("boto3") is None:
        raise UserError(f'{text!r} needs boto3: run `pip install "guided-diffusion[s3]"`')
    return whole


def local(path: AnyPath) -> str:
    """`resolve` for a path that must lie on this machine, such as all that is written."""
    text = resolve(path)
    if is_remote(text):
        raise UserError(
            f"{text!r} is on another machine, where a local path is needed: give one, and copy to or from there"
        )
    return text


def is_remote(path: str) -> bool:
    """Whether a resolved path leads to a bucket, such as gs://bucket/run, or to a tar on a web server."""
    return _BUCKET.match(path) is not None or is_web(path)


def cache_folder() -> str:
    """The folder of downloads and compiled code: $GUIDED_DIFFUSION_CACHE, else ~/.cache/guided-diffusion."""
    return local(os.environ.get("GUIDED_DIFFUSION_CACHE") or os.path.join("~", ".cache", "guided-diffusion"))


def join(folder: AnyPath, *names: str) -> str:
    """The path of something in a folder."""
    text = os.fspath(folder)
    return "/".join([text.rstrip("/"), *names]) if is_remote(text) else os.path.join(text, *names)


def exists(path: AnyPath) -> bool:
    """Whether there is a file or folder."""
    where = resolve(path)
    if is_web(where):
        try:
            return web_stat(where) is not None
        except FileNotFoundError:
            return False
    return ask(where, lambda blobs: bool(blobs.exists(where))) if is_remote(where) else os.path.exists(where)


def isdir(path: AnyPath) -> bool:
    """Whether there is a folder."""
    where = resolve(path)
    if is_web(where):
        return False
    return ask(where, lambda blobs: bool(blobs.isdir(where))) if is_remote(where) else os.path.isdir(where)


def names_in(folder: AnyPath) -> list[str]:
    """Names of the files and folders in a folder, in their order; [] if it is not there."""
    if not isdir(folder):
        return []
    where = resolve(folder)
    names = ask(where, lambda blobs: list(blobs.listdir(where))) if is_remote(where) else os.listdir(where)
    return sorted(name.rstrip("/") for name in names)


def refuse_missing(path: str, name: str, remedy: str) -> None:
    """Refuse a path at which there is nothing; of a local one with the name in its folder that is most like it."""
    if not exists(path):
        names = [] if is_remote(path) else names_in(os.path.dirname(path) or ".")
        near = nearest(os.path.basename(path), filter(str.isprintable, names))
        raise UserError(f"{name} does not exist{near}: {remedy}")


def folders_and_files(bucket: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of all in a folder of a bucket, by name."""
    entries = ask(bucket, lambda blobs: list(blobs.scandir(bucket)))
    return sorted((entry.name.rstrip("/"), bool(entry.is_dir)) for entry in entries)


def stat(path: str) -> Any:
    """An object with the `size` of a file, its `mtime`, and its `version` where a bucket gives one."""
    if is_remote(path):
        return web_stat(path) if is_web(path) else ask(path, lambda blobs: blobs.stat(path))
    status = os.stat(path)
    return SimpleNamespace(size=status.st_size, mtime=status.st_mtime, version=None)


def open_blob(path: str) -> BinaryIO:
    """A file in a bucket to read from, piece by piece and from any place."""
    if in_parts(path):
        return open_parts(path)
    return ask(path, lambda blobs: cast(BinaryIO, blobs.BlobFile(path, "rb", streaming=True)))


def read_part(path: str, start: int, size: int) -> bytes:
    """Bytes from a place of a file; fewer where it ends before."""
    if in_parts(path):
        return part(path, start, size)[0]
    with open_blob(path) if is_remote(path) else open(path, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(size)


def remove(path: str) -> None:
    """Remove a file."""
    ask(path, lambda blobs: blobs.remove(path)) if is_remote(path) else os.remove(path)


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
    refuse((not modes.S_ISREG(mode), "it is a folder" if modes.S_ISDIR(mode) else "it is no regular file"))


def read_file(path: AnyPath) -> bytes:
    """All of a file of at most `MAX_BYTES`."""
    with open_file(path) as file:
        size = MAX_BYTES + 1 if is_remote(resolve(path)) else local_size(file)
        content = b"".join(_pieces(file, size)) if size > MAX_BYTES else file.read(size)
    _check_size(len(content))
    return content


def lines_of(path: str, name: str, what: str) -> list[str]:
    """The lines of a file of texts, without the blank ones and spaces around words.

    :param name: of the path, and `what` each line holds, in messages.
    """
    refuse_missing(path, name, f"give a file with a {what} on each line")
    with as_user_error(f"{name} cannot be read as text ({WHY})", OSError, ValueError):
        lines = read_file(path).decode("utf-8-sig").splitlines()
    lines = [" ".join(line.split()) for line in lines if line.strip()]
    refuse((not lines, f"{name} holds no {what}: write one on each line"))
    return lines


def local_size(file: BinaryIO) -> int:
    """Bytes of a file on the disk, at most `MAX_BYTES`."""
    size = os.fstat(file.fileno()).st_size
    _check_size(size)
    return size


def _check_size(size: int) -> None:
    refuse((size > MAX_BYTES, f"it is larger than {MAX_BYTES} bytes, the limit"))


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


def open_archive(path: str) -> zipfile.ZipFile:
    """A zip to read from."""
    with as_user_error(WHY):  # zipfile does not say what a damaged directory leads it to
        where = resolve(path)
        if is_remote(where):
            return zipfile.ZipFile(open_blob(where))
        check_regular(where)
        return zipfile.ZipFile(where)


def check_unpacked(path: str) -> None:
    """Refuse a zip whose members claim more bytes than the file has: torch writes them as they are, never packed."""
    check_regular(path)
    if zipfile.is_zipfile(path):
        with open_archive(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        refuse((claimed > os.path.getsize(path), f"its members unpack to {claimed} bytes"))


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
        "a link": modes.S_ISLNK(member.external_attr >> 16),
        "neither stored nor deflated": member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
        "unpacks to too many bytes": bomb or max(member.file_size, member.compress_size) > MAX_BYTES,
    }
    return path_fault(name or member.filename, "zip") or next((fault for fault in faults if faults[fault]), "")


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """All of a member of a zip, and no more than its entry claims."""
    with as_user_error(WHY), archive.open(member) as file:  # zipfile does not say what a damaged member leads it to
        return file.read(member.file_size + 1)


def member_at(handle: int, member: zipfile.ZipInfo) -> bytes:
    """The same by the handle of a file on the disk, whose position is neither used nor changed; twice as fast."""
    with as_user_error(WHY, OSError, struct.error, zlib.error):
        content = os.pread(handle, member.compress_size, member_place(handle, member))
        if member.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.file_size + 1)
    whole = len(content) == member.file_size and zlib.crc32(content) == member.CRC
    refuse((not whole, "it is damaged: its checksum is another"))
    return content


def member_place(handle: int, member: zipfile.ZipInfo) -> int:
    """Where the content of a member begins: behind a name and a field, whose lengths stand before them."""
    name, extra = struct.unpack("<HH", os.pread(handle, 4, member.header_offset + 26))
    return int(member.header_offset + 30 + name + extra)


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(reason(error).partition(";")[0]) from error


def load_classes(path: str) -> list[str]:
    """The class names by id in a classes.json."""
    return read_classes(path)[0]


def read_classes(path: str) -> tuple[list[str], str]:
    """The class names by id in a classes.json, or in the header of weights, and the rule that they came from."""
    try:
        table = parse_json(safetensors_header(path).get("classes.json") or read_file(path))
        names, rule = table["classes"], table.get("class_from", "auto")
        refuse(
            (
                not isinstance(names, list) or len({str(name) for name in names}) < len(names),
                "its classes are no list of different names",
            ),
            (not all(isinstance(name, str) for name in [*names, rule]), "its classes and class_from are no texts"),
        )
        return names, rule
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{path!r} is no table of classes ({detail}); give a classes.json of a training") from error


def safetensors_header(path: str) -> dict[str, Any]:
    """The texts in the header of a safetensors file, by name; {} of any other file."""
    if not path.endswith(".safetensors") or not exists(path):
        return {}
    with open_file(path) as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, MAX_HEADER))
    with contextlib.suppress(ValueError, AttributeError):  # a damaged file: reading the weights tells of it
        return dict(parse_json(text).get("__metadata__", {}))
    return {}


class Header(NamedTuple):
    """Shape and type of the numbers in an npy, and whether they lie in the order of Fortran."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


def read_header(file: IO[bytes], kinds: str = "biufc") -> Header:
    """The header of an npy with numbers of these `kinds` of numpy's types, leaving the file at the first of them."""
    with as_user_error(f"it is no npy ({WHY})"):  # a header is Python source, whose parser may raise anything
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        start = file.tell()
        try:
            shape, fortran, dtype = read(file)
        except SystemError:  # of CPython 3.11, now and then, where other threads parse Python at the same time
            file.seek(start)
            shape, fortran, dtype = read(file)
    sound = dtype.kind in kinds and all(type(side) is int and side >= 0 for side in shape)
    refuse((not sound, f"an array of type {printable(f'{dtype} {shape}')}, where numbers are read"))
    return Header(shape, dtype, fortran and len(shape) > 1)


def read_array(content: bytes) -> np.ndarray[Any, Any]:
    """The array of an npy, which cannot be written to."""
    file = io.BytesIO(content)
    return read_numbers(file, read_header(file))


def read_numbers(file: IO[bytes], header: Header) -> np.ndarray[Any, Any]:
    """The array of a header that was read."""
    size = math.prod(header.shape) * header.dtype.itemsize
    held = f"more than the {MAX_ARRAY} that are held: np.save it in C order"
    refuse((size > MAX_ARRAY, f"an array of {size} bytes, {held}"))
    array = read_rows(file, header.shape, header.dtype)
    return array.reshape(-1).reshape(header.shape, order="F") if header.fortran else array


def read_rows(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The next numbers of an npy; for those that the file has not got no memory is taken."""
    size = math.prod(shape) * dtype.itemsize
    with as_user_error(WHY):  # of a damaged member of a zip
        content = b"".join(_pieces(file, size))
    refuse((len(content) < size, f"it ends after {len(content)} of {size} bytes"))
    return np.frombuffer(content, dtype).reshape(shape)


def _pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next bytes of a file, at most `size`."""
    while size > 0 and (piece := file.read(min(size, PIECE))):
        size -= len(piece)
        yield piece


@contextlib.contextmanager
def writing(path: str) -> Iterator[BinaryIO]:
    """A local or remote file to write, seen under its name only once it is whole; its errors are as in `replacing`."""
    if is_remote(path):  # object stores show a file when it is closed, and nothing of it after an error
        with explained(path), ask(path, lambda blobs: blobs.BlobFile(path, "wb", partial_writes_on_exc=False)) as file:
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
