"""Files on other machines: in buckets, by blobfile, and tars on web servers, of which parts are asked for.

Whatever goes wrong is an OSError of one sentence.
"""

from __future__ import annotations

import email.utils
import io
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeVar, cast

T = TypeVar("T")

# failed requests before a bucket or server is given up, and the seconds that each may take
ATTEMPTS, CONNECT_TIMEOUT, READ_TIMEOUT = 9, 5, 30
AHEAD = 2**23  # bytes that are asked for at once where a file is read from its beginning

_WEB = re.compile(r"https?://[^/]+/.*\.tar(\.index)?(/.*)?", re.IGNORECASE | re.DOTALL)


def is_web(path: str) -> bool:
    """Whether a path leads to a tar on a web server, or into one."""
    return _WEB.fullmatch(path) is not None


def ask(path: str, question: Callable[[Any], T]) -> T:
    """The answer of blobfile about a path; an OSError of one sentence where the bucket cannot be reached."""
    try:
        return question(_blobfile())
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("blobfile", "urllib3", "azure", "google"):
            raise
        raise _unreachable(path, error) from error


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


def _unreachable(path: str, error: Exception) -> OSError:
    cause = re.sub(r"^message=|, request=.*", "", str(error).partition("\n")[0])
    return OSError(
        f"{path} cannot be reached ({cause:.200}; at most {ATTEMPTS} attempts of {CONNECT_TIMEOUT} s to connect "
        f"and {READ_TIMEOUT} s for an answer): look at the name, the network and the credentials"
    )


# ---- web servers


@cache
def _connections(process: int) -> Any:
    """The open connections of a process: those that fork must not share them."""
    import urllib3

    again = urllib3.Retry(ATTEMPTS - 1, backoff_factor=0.1, backoff_max=5, status_forcelist=(429, 500, 502, 503, 504))
    limits = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
    return urllib3.PoolManager(maxsize=32, retries=again, timeout=limits)


def web_part(url: str, start: int, size: int) -> tuple[bytes, Any]:
    """Bytes of a file on a web server, fewer at its end, and the headers of the answer.

    :raises FileNotFoundError: if it is not there.
    :raises OSError: if the server gives no parts of files.
    """
    import urllib3

    try:
        headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        answer = _connections(os.getpid()).request("GET", url, headers=headers, preload_content=False)
        content = answer.read() if answer.status == 206 else b""
        answer.release_conn() if answer.status == 206 else answer.close()
    except urllib3.exceptions.HTTPError as error:
        raise _unreachable(url, error) from error
    if answer.status in (404, 410):
        raise FileNotFoundError(f"{url} is not there: the server answers {answer.status}")
    if answer.status not in (200, 206, 416):
        raise OSError(f"{url} cannot be read: the server answers {answer.status} {answer.reason or ''}".rstrip())
    if answer.status == 200:
        raise OSError(
            f"{url} is on a server that gives no parts of files (HTTP ranges): take another one, or copy the shards to "
            "this machine (curl -LO URL)"
        )
    return content, answer.headers


def web_stat(url: str) -> Any:
    """The `size`, `mtime` and `version` of a file on a web server."""
    _, headers = web_part(url, 0, 1)
    date = email.utils.parsedate_to_datetime(headers["Last-Modified"]).timestamp() if "Last-Modified" in headers else 0
    size = headers.get("Content-Range", "").rpartition("/")[2]
    if not size.isdecimal():
        raise OSError(f"{url} is on a server that does not say how large it is: copy the shards to this machine")
    return SimpleNamespace(size=int(size), mtime=date, version=headers.get("ETag"))


class _WebFile(io.RawIOBase):
    """A file on a web server, of which parts are asked for as they are read."""

    def __init__(self, url: str) -> None:
        self._url, self._place, self._size = url, 0, web_stat(url).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._size - self._place)
        content = web_part(self._url, self._place, size)[0] if size > 0 else b""
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def open_web(url: str) -> BinaryIO:
    """A file on a web server to read from, from any place."""
    return cast(BinaryIO, io.BufferedReader(_WebFile(url), AHEAD))
