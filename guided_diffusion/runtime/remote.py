"""Files on other machines: in buckets, by blobfile or boto3 (S3), and tars on web servers.

Of files in S3 and on web servers parts are asked for as they are read.

Whatever goes wrong is an OSError of one sentence.
"""

from __future__ import annotations

import contextlib
import email.utils
import io
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeVar, cast

T = TypeVar("T")

# failed requests before a bucket or server is given up, and the seconds that each may take
ATTEMPTS, CONNECT_TIMEOUT, READ_TIMEOUT = 9, 5, 30
AHEAD = 2**23  # bytes that are asked for at once where a file is read from its beginning
LEAST = 2**17  # the same at any other place; twice as many each time while it is read on from there
POOL = 32  # open connections of a process

S3 = "s3://"

_WEB = re.compile(r"https?://[^/]+/.*\.tar(\.index)?(/.*)?", re.IGNORECASE | re.DOTALL)


def is_web(path: str) -> bool:
    """Whether a path leads to a tar on a web server, or into one."""
    return _WEB.fullmatch(path) is not None


def ask(path: str, question: Callable[[Any], T]) -> T:
    """The answer of blobfile, or of what stands for it with S3, about a path.

    :raises OSError: of one sentence, where the bucket cannot be reached or used.
    """
    try:
        return question(_s3() if path.startswith(S3) else _blobfile())
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in ("blobfile", "urllib3", "azure", "google", "botocore", "boto3"):
            raise
        answered = library == "botocore" and isinstance(getattr(error, "response", None), dict)
        raise (_refused if answered else _unreachable)(path, error) from error


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
    text = str(error).removeprefix("Parameter validation failed:\n")
    cause = re.sub(r"^message=|, request=.*", "", text.partition("\n")[0])
    return OSError(
        f"{path} cannot be reached ({cause:.200}; at most {ATTEMPTS} attempts of {CONNECT_TIMEOUT} s to connect "
        f"and {READ_TIMEOUT} s for an answer): look at the name, the network and the credentials"
    )


@cache
def _connections(process: int) -> Any:
    """The open connections of a process: those that fork must not share them."""
    import urllib3

    again = urllib3.Retry(ATTEMPTS - 1, backoff_factor=0.1, backoff_max=5, status_forcelist=(429, 500, 502, 503, 504))
    limits = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
    return urllib3.PoolManager(maxsize=POOL, retries=again, timeout=limits)


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
    size = _whole_size(headers)
    if size is None:
        raise OSError(f"{url} is on a server that does not say how large it is: copy the shards to this machine")
    return SimpleNamespace(size=size, mtime=date, version=headers.get("ETag"))


def _whole_size(headers: Any) -> int | None:
    """Bytes of the file that an answer gives a part of, where it says so."""
    size = headers.get("content-range", "").rpartition("/")[2]
    return int(size) if size.isdecimal() else None


_clients: dict[int, _S3] = {}
_making: dict[int, threading.Lock] = {}


def _s3() -> _S3:
    """The buckets of S3, for this process: those that fork must share neither connections nor locks."""
    process = os.getpid()
    with _making.setdefault(process, threading.Lock()):  # threads wait for one client, of which each takes 0.2 s
        if process not in _clients:
            _clients[process] = _connected()
        return _clients[process]


def _connected() -> _S3:
    import boto3
    import botocore
    from botocore.config import Config

    session = boto3.Session()
    public = session.get_credentials() is None
    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        max_pool_connections=POOL,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        signature_version=botocore.UNSIGNED if public else None,
        request_checksum_calculation="when_required",  # stores of other makers know no others
        response_checksum_validation="when_required",
    )
    try:
        return _S3(session.client("s3", config=config), public)
    except ValueError as error:
        raise OSError(f"S3 cannot be asked ({error}): set AWS_ENDPOINT_URL to http://HOST:PORT, or unset it") from error


class _S3:
    """Buckets of S3, by those functions of blobfile that are used; each may be called by several threads.

    :param public: there are no credentials, so that only what is public is read.
    """

    def __init__(self, client: Any, public: bool) -> None:
        self._client, self.public = client, public

    def _head(self, path: str) -> Any:
        """What is said about an object; None if there is none."""
        where = _place(path)
        try:
            return self._client.head_object(**where) if where["Key"] else None
        except self._client.exceptions.ClientError as error:
            if _status(error) != 404:
                raise
            return None

    def exists(self, path: str) -> bool:
        return self._head(path) is not None or self.isdir(path)

    def isdir(self, path: str) -> bool:
        bucket, prefix = _folder(path)
        return "Contents" in self._client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1) or not prefix

    def scandir(self, path: str) -> Iterator[Any]:
        bucket, prefix = _folder(path)
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            keys = [(folder["Prefix"], True) for folder in page.get("CommonPrefixes", ())]
            keys += [(file["Key"], False) for file in page.get("Contents", ()) if file["Key"] != prefix]
            yield from (SimpleNamespace(name=key.removeprefix(prefix), is_dir=is_dir) for key, is_dir in keys)

    def listdir(self, path: str) -> Iterator[str]:
        return (entry.name for entry in self.scandir(path))

    def stat(self, path: str) -> Any:
        head = self._head(path)
        if head is None:
            there = "is a folder" if self.isdir(path) else "is not there"  # or there is no such bucket
            raise FileNotFoundError(f"{path} {there}")
        date = head["LastModified"].timestamp()
        return SimpleNamespace(size=head["ContentLength"], mtime=date, version=head["ETag"])

    def part(self, path: str, start: int, size: int, attempts: int = ATTEMPTS) -> tuple[bytes, Any]:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        try:
            answer = self._client.get_object(**_place(path), Range=f"bytes={start}-{start + size - 1}")
        except self._client.exceptions.ClientError as error:
            if _status(error) != 416:
                raise
            return b"", error.response["ResponseMetadata"]["HTTPHeaders"]
        try:
            return answer["Body"].read(), answer["ResponseMetadata"]["HTTPHeaders"]
        except (HTTPClientError, IncompleteReadError):  # boto3 asks again before the content begins, and not after
            if attempts == 1:
                raise
        return self.part(path, start, size, attempts - 1)

    @contextlib.contextmanager
    def BlobFile(self, path: str, mode: str, **_: Any) -> Iterator[BinaryIO]:
        """A file to write, which is sent where the block ends without an error."""
        with tempfile.TemporaryFile() as file:
            yield cast(BinaryIO, file)
            file.seek(0)
            ask(path, lambda _: self._client.upload_fileobj(file, *_place(path).values()))

    def remove(self, path: str) -> None:
        self._client.delete_object(**_place(path))


def _place(path: str) -> dict[str, str]:
    bucket, _, key = path.removeprefix(S3).partition("/")
    return {"Bucket": bucket, "Key": key}


def _folder(path: str) -> tuple[str, str]:
    """(bucket, what the keys of all in a folder begin with)."""
    bucket, key = _place(path).values()
    return bucket, f"{key.rstrip('/')}/" if key else ""


def _status(error: Any) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _refused(path: str, error: Any) -> OSError:
    """What an answer of S3 means, and what helps."""
    code, answer = str(error.response["Error"].get("Code", "")), error.response["ResponseMetadata"]
    if code in ("NoSuchBucket", "NoSuchKey"):
        missing = f": there is no bucket {_place(path)['Bucket']!r}" if code == "NoSuchBucket" else ""
        return FileNotFoundError(f"{path} is not there{missing}")
    if _status(error) == 301 or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        region = answer.get("HTTPHeaders", {}).get("x-amz-bucket-region", "REGION")
        return OSError(f"{path} is in another region: set AWS_DEFAULT_REGION={region}")
    if _status(error) not in (401, 403) and "Token" not in code:
        return _unreachable(path, error)
    if _s3().public:
        return PermissionError(
            f"{path} is not public, and there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or run aws configure"
        )
    return PermissionError(
        f"{path} is refused to these credentials ({code}): take others (AWS_PROFILE), or have them allowed "
        "s3:ListBucket and s3:GetObject (s3:PutObject and s3:DeleteObject to write)"
    )


def in_parts(path: str) -> bool:
    """Whether parts of a file are asked for: on a web server, or in S3."""
    return is_web(path) or path.startswith(S3)


def part(path: str, start: int, size: int) -> tuple[bytes, Any]:
    """Bytes of such a file, fewer at its end, and the headers of the answer; errors as in `web_part`."""
    return web_part(path, start, size) if is_web(path) else ask(path, lambda s3: s3.part(path, start, size))


class _Parts(io.RawIOBase):
    """A file of which parts are asked for as they are read, the larger the longer it is read on."""

    def __init__(self, path: str) -> None:
        self._path, self._place, self._ahead = path, 0, AHEAD
        self._size: int | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            self._size = _whole_size(part(self._path, 0, 1)[1])
        place = offset + (0, self._place, self._size or 0)[whence]
        if not 0 <= place - self._place < AHEAD:
            self._ahead = LEAST
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        left = AHEAD if self._size is None else self._size - self._place
        size = min(len(buffer), self._ahead, left)
        if size <= 0:
            return 0
        content, headers = part(self._path, self._place, size)
        buffer[: len(content)] = content
        self._place += len(content)
        self._size, self._ahead = _whole_size(headers), min(2 * self._ahead, AHEAD)
        return len(content)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(AHEAD) or b"", b""))


def open_parts(path: str) -> BinaryIO:
    """Such a file to read from, from any place."""
    return cast(BinaryIO, io.BufferedReader(_Parts(path), AHEAD))
