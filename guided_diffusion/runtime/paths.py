"""Paths that a user names: local ones, file:// URLs, and buckets (gs://, az://), looked at by one set of functions.

blobfile speaks to the buckets. It is imported when the first of them is named, and never sees a local path: it takes
each with a colon in it for a URL.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.parse
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, BinaryIO, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
AnyPath = str | os.PathLike[str]

# requests to a bucket in vain before it is given up, and the seconds that each may take
ATTEMPTS, CONNECT_TIMEOUT, READ_TIMEOUT = 9, 5, 30

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")  # one letter alone is a drive of Windows
_BUCKET = re.compile(r"(gs|az)://|https://[^/]+\.blob\.core\.windows\.net/")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_REMEDIES = {
    "s3": "copy it first (pip install awscli; aws s3 cp --recursive {path} FOLDER), or mount the bucket, e.g. with "
    "mountpoint-s3",
    "hf": "fetch it first (pip install huggingface_hub; hf download REPOSITORY --local-dir FOLDER)",
    "https": "fetch it first (curl -LO {path}; weights of the evaluation: guided-diffusion download)",
    "ftp": "fetch it first (curl -O {path})",
}
_REMEDIES["http"] = _REMEDIES["https"]


def resolve(path: AnyPath) -> str:
    """The path as the rest of the package takes it: a local one, or the URL of a bucket.

    :raises ValueError: for a URL that is not read, and for a path of Windows elsewhere, saying what to do.
    """
    text = os.fspath(path)
    if os.path.lexists(text):
        return text
    if text.startswith("~"):
        return os.path.expanduser(text)
    url = _URL.match(text)
    if url is None:
        return _not_of_windows(text)
    scheme, slashes, rest = url[1].lower(), url[2], text[url.end() :]
    if scheme == "file":
        return _local_of(text, rest if len(slashes) == 2 else f"/{rest}")
    if len(slashes) < 2 and scheme not in ("gs", "az", *_REMEDIES):
        return text
    whole = f"{scheme}://{rest}"  # pathlib makes one slash of two
    if _BUCKET.match(whole):
        return whole
    remedy = _REMEDIES.get(scheme, "give a local path, file:///PATH, or a bucket of gs:// or az://").format(path=whole)
    raise ValueError(f"{text!r} cannot be read from where it lies: {remedy}")


def _not_of_windows(text: str) -> str:
    if os.name == "nt" or not _WINDOWS.match(text):
        return text
    drive = f"/mnt/{text[0].lower()}/{text[3:]}".replace("\\", "/") if text[1] == ":" else "/mnt/..."
    raise ValueError(
        f"{text!r} is a path of Windows, and this is {sys.platform}: under WSL write {drive}, else copy it to this "
        "machine"
    )


def _local_of(url: str, path: str) -> str:
    """The path of a file:// URL, behind its two slashes."""
    host, slash, rest = path.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"{url!r} names a host, not a path: write file:///PATH, with three slashes")
    return urllib.parse.unquote(f"/{rest}")


def local(path: AnyPath) -> str:
    """The same for what must lie on this machine, such as all that is written.

    :raises ValueError: for a bucket too.
    """
    text = resolve(path)
    if is_remote(text):
        raise ValueError(f"{text!r} is in a bucket, where a local path is needed: give one, and copy to or from there")
    return text


def is_remote(path: str) -> bool:
    """Whether a resolved path leads to a bucket, such as gs://bucket/run."""
    return _BUCKET.match(path) is not None


def sentence(error: BaseException) -> str:
    """What an error says; of one that the system raised, about which file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r} cannot be used ({error.strerror}): look at its path and its permissions"
    return str(error)


def cache_folder() -> str:
    """The folder of downloads and compiled code: $GUIDED_DIFFUSION_CACHE, else ~/.cache/guided-diffusion."""
    return local(os.environ.get("GUIDED_DIFFUSION_CACHE") or os.path.join("~", ".cache", "guided-diffusion"))


def join(folder: AnyPath, *names: str) -> str:
    """The path of something in a folder."""
    text = os.fspath(folder)
    return "/".join([text.rstrip("/"), *names]) if is_remote(text) else os.path.join(text, *names)


# ---- what lies there


@cache
def _blobfile() -> Any:
    import blobfile

    blobfile.configure(
        retry_limit=ATTEMPTS - 1,
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        log_callback=lambda line: print(f"blobfile: {line:.150}", file=sys.stderr),
    )
    return blobfile


def _reaching(function: Callable[P, T]) -> Callable[P, T]:
    """The same function of a path, whose errors from a bucket are one sentence."""

    @wraps(function)
    def reach(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("blobfile", "urllib3", "azure", "google"):
                raise
            said = re.sub(r"^message=|, request=.*", "", str(error).partition("\n")[0])
            raise OSError(
                f"{args[0]} cannot be reached ({said:.200}; at most {ATTEMPTS} attempts of {CONNECT_TIMEOUT} s to "
                f"connect and {READ_TIMEOUT} s for an answer): look at the name, the network and the credentials, or "
                "copy it to this machine"
            ) from error

    return reach


@_reaching
def exists(path: AnyPath) -> bool:
    """Whether there is a file or folder."""
    where = resolve(path)
    return bool(_blobfile().exists(where)) if is_remote(where) else os.path.exists(where)


@_reaching
def isdir(path: AnyPath) -> bool:
    """Whether there is a folder."""
    where = resolve(path)
    return bool(_blobfile().isdir(where)) if is_remote(where) else os.path.isdir(where)


@_reaching
def names_in(folder: AnyPath) -> list[str]:
    """Names of what a folder holds, in their order; [] if it is not there."""
    where = resolve(folder)
    if not is_remote(where):
        return sorted(os.listdir(where)) if os.path.isdir(where) else []
    there = _blobfile().listdir(where) if _blobfile().isdir(where) else ()
    return sorted(name.rstrip("/") for name in there)


@_reaching
def folders_and_files(bucket: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of all in a folder of a bucket, by name."""
    return sorted((entry.name.rstrip("/"), bool(entry.is_dir)) for entry in _blobfile().scandir(bucket))


class Stat(NamedTuple):
    """What tells that a file was written again."""

    size: int
    mtime: float
    version: str | None


@_reaching
def stat(path: str) -> Stat:
    """Bytes and time of a file."""
    if is_remote(path):
        there = _blobfile().stat(path)
        return Stat(there.size, there.mtime, there.version)
    status = os.stat(path)
    return Stat(status.st_size, status.st_mtime, None)


@_reaching
def open_blob(path: str) -> BinaryIO:
    """A file in a bucket to read from, piece by piece and from any place."""
    file: BinaryIO = _blobfile().BlobFile(path, "rb", streaming=True)
    return file


@_reaching
def new_blob(path: str) -> BinaryIO:
    """A file in a bucket to write, which is seen when it is closed, and never after an error."""
    file: BinaryIO = _blobfile().BlobFile(path, "wb", partial_writes_on_exc=False)
    return file


@_reaching
def remove(path: str) -> None:
    """Remove a file."""
    _blobfile().remove(path) if is_remote(path) else os.remove(path)
