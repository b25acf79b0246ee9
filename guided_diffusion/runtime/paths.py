"""Paths that a user names: local ones, file:// URLs, and buckets (gs://, az://).

blobfile speaks to the buckets. It is imported when the first of them is named, and never sees a local path: it takes
each with a colon in it for a URL.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.parse
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeVar, cast

from .errors import UserError

T = TypeVar("T")
AnyPath = str | os.PathLike[str]

# failed requests before a bucket is given up, and the seconds that each may take
ATTEMPTS, CONNECT_TIMEOUT, READ_TIMEOUT = 9, 5, 30

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")  # one letter alone is a drive of Windows
_FILE = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.IGNORECASE | re.DOTALL)
_BUCKET = re.compile(r"(gs|az)://|https://[^/]+\.blob\.core\.windows\.net/")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_REMEDIES = {
    "s3": "copy it first (pip install awscli; aws s3 cp --recursive {path} FOLDER), or mount the bucket",
    "hf": "fetch it first (pip install huggingface_hub; hf download REPOSITORY --local-dir FOLDER)",
    "file": "write file:///PATH, with three slashes",
    **dict.fromkeys(("https", "http", "ftp"), "fetch it first (curl -LO {path})"),
}


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
    if url is None:
        return text
    scheme, whole = url[1].lower(), f"{url[1].lower()}://{text[url.end() :]}"  # pathlib makes one slash of two
    if len(url[2]) < 2 and scheme not in ("gs", "az", *_REMEDIES):
        return text
    if _BUCKET.match(whole):
        return whole
    remedy = _REMEDIES.get(scheme, "give a local path, file:///PATH, or a bucket of gs:// or az://").format(path=whole)
    raise UserError(f"{text!r} cannot be read where it lies: {remedy}")


def local(path: AnyPath) -> str:
    """`resolve` for a path that must lie on this machine, such as all that is written."""
    text = resolve(path)
    if is_remote(text):
        raise UserError(f"{text!r} is in a bucket, where a local path is needed: give one, and copy to or from there")
    return text


def is_remote(path: str) -> bool:
    """Whether a resolved path leads to a bucket, such as gs://bucket/run."""
    return _BUCKET.match(path) is not None


def cache_folder() -> str:
    """The folder of downloads and compiled code: $GUIDED_DIFFUSION_CACHE, else ~/.cache/guided-diffusion."""
    return local(os.environ.get("GUIDED_DIFFUSION_CACHE") or os.path.join("~", ".cache", "guided-diffusion"))


def join(folder: AnyPath, *names: str) -> str:
    """The path of something in a folder."""
    text = os.fspath(folder)
    return "/".join([text.rstrip("/"), *names]) if is_remote(text) else os.path.join(text, *names)


# ---- files and folders


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


def _ask(path: str, question: Callable[[Any], T]) -> T:
    """The answer of blobfile about a path; an OSError of one sentence where the bucket cannot be reached."""
    try:
        return question(_blobfile())
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("blobfile", "urllib3", "azure", "google"):
            raise
        cause = re.sub(r"^message=|, request=.*", "", str(error).partition("\n")[0])
        raise OSError(
            f"{path} cannot be reached ({cause:.200}; at most {ATTEMPTS} attempts of {CONNECT_TIMEOUT} s to connect "
            f"and {READ_TIMEOUT} s for an answer): look at the name, the network and the credentials"
        ) from error


def exists(path: AnyPath) -> bool:
    """Whether there is a file or folder."""
    where = resolve(path)
    return _ask(where, lambda blobs: bool(blobs.exists(where))) if is_remote(where) else os.path.exists(where)


def isdir(path: AnyPath) -> bool:
    """Whether there is a folder."""
    where = resolve(path)
    return _ask(where, lambda blobs: bool(blobs.isdir(where))) if is_remote(where) else os.path.isdir(where)


def names_in(folder: AnyPath) -> list[str]:
    """Names of the files and folders in a folder, in their order; [] if it is not there."""
    if not isdir(folder):
        return []
    where = resolve(folder)
    names = _ask(where, lambda blobs: list(blobs.listdir(where))) if is_remote(where) else os.listdir(where)
    return sorted(name.rstrip("/") for name in names)


def folders_and_files(bucket: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of all in a folder of a bucket, by name."""
    entries = _ask(bucket, lambda blobs: list(blobs.scandir(bucket)))
    return sorted((entry.name.rstrip("/"), bool(entry.is_dir)) for entry in entries)


def stat(path: str) -> Any:
    """An object with the `size` of a file, its `mtime`, and its `version` where a bucket gives one."""
    if is_remote(path):
        return _ask(path, lambda blobs: blobs.stat(path))
    status = os.stat(path)
    return SimpleNamespace(size=status.st_size, mtime=status.st_mtime, version=None)


def open_blob(path: str) -> BinaryIO:
    """A file in a bucket to read from, piece by piece and from any place."""
    return _ask(path, lambda blobs: cast(BinaryIO, blobs.BlobFile(path, "rb", streaming=True)))


def new_blob(path: str) -> BinaryIO:
    """A file in a bucket to write, which is seen when it is closed, and never after an error."""
    return _ask(path, lambda blobs: cast(BinaryIO, blobs.BlobFile(path, "wb", partial_writes_on_exc=False)))


def remove(path: str) -> None:
    """Remove a file."""
    _ask(path, lambda blobs: blobs.remove(path)) if is_remote(path) else os.remove(path)
