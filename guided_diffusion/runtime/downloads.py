"""Files that others publish: fetched to the cache, gone on with after an interruption, and checked."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from . import files
from .atomic import explained, lock, replacing
from .errors import UserError, as_user_error, reason, refuse

TIMEOUT = 30.0  # seconds without a byte from a server
ATTEMPTS = 20  # connections to one address, as long as each brings some bytes
PIECE = 2**18
MOST_PACKED = 4  # times its size, to which a zip of weights unpacks
PART = ".part"  # of a file that is not whole yet


@dataclass(frozen=True)
class Source:
    """A file that others publish.

    :param urls: addresses of the same bytes, in the order in which they are tried.
    :param file: its name in the cache.
    :param sha256: or its first digits; '' where none is published.
    :param size: in bytes; 0 where it is not known.
    :param least: bytes that the whole file has at least.
    :param member: of a zip at the address, which is the file; '' where it lies there itself.
    """

    urls: tuple[str, ...]
    file: str
    sha256: str = ""
    size: int = 0
    least: int = 0
    member: str = ""

    @property
    def cached(self) -> str:
        """Its path in the cache."""
        return os.path.join(files.cache_folder(), self.file)

    def at(self, mirror: str) -> Source:
        """The same file, on a mirror: the address of a folder with files of these names."""
        if not mirror:
            return self
        if not mirror.lower().startswith(("https://", "http://", "file://")):
            raise UserError(f"--mirror {mirror!r} is no address: write https://HOST/FOLDER")
        name = self.urls[0].rpartition("/")[2] if self.member else self.file
        return replace(self, urls=(f"{mirror.rstrip('/')}/{name}",))

    def fault_of(self, path: str, md5: str = "") -> str:
        """Why a file is not this one; '' if it is, as far as is known of it.

        :param md5: that its server says, in base64.
        """
        size = os.path.getsize(path)
        if kind := files.kind_of_file(path):
            return f"it is {kind}"
        if self.size and size != self.size:
            return f"it has {size} bytes in place of {self.size}"
        if size < self.least:
            return f"it has {size} bytes, and its weights alone take {self.least}"
        for name, digest in (("sha256", self.sha256), ("md5", base64.b64decode(md5).hex() if md5 else "")):
            with open(path, "rb") as file:
                if digest and not hashlib.file_digest(file, name).hexdigest().startswith(digest):
                    return f"its {name} is another one"
        return ""


def fetch(source: Source, path: str = "") -> str:
    """The path of a file, which is fetched unless it is there already; an interrupted transfer is gone on with.

    :param path: a file, or a folder for it; '' for the cache.
    :raises OSError: if no address gives it.
    """
    path = files.local(path) or source.cached
    path = os.path.join(path, source.file) if os.path.isdir(path) else path
    checked = "sha256 as published" if source.sha256 else "no sha256 of it is published"
    if os.path.exists(path):
        if fault := source.fault_of(path):
            raise UserError(f"{path} exists, but is not {source.file}, {fault}: move it away, or name another by --out")
        print(f"{path} is there already, {checked}")
        return path
    with explained(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    failures = []
    with _alone(f"{path}{PART}") as part:
        for url in source.urls:
            fault = _fetched(url, part, source)
            fault = fault or _put(part, path, source.member)
            if not fault:
                print(f"{path}: {os.path.getsize(path)} bytes, {checked}")
                return path
            failures.append(f"{url}: {fault}")
    size = f" ({source.size or f'at least {source.least}'} bytes)" if source.size or source.least else ""
    whole = f"its {source.member}" if source.member else "it"
    begun = ", which goes on from there" if os.path.exists(part) else ""
    raise OSError(
        f"{source.file} could not be fetched ({'; '.join(failures)}): try again later{begun}, or fetch "
        f"{source.urls[0]}{size} on another machine and put {whole} at {path}"
    )


def _put(part: str, path: str, member: str) -> str:
    """Give a whole file its name, or unpack it; returns why that was not possible, '' if it was."""
    if not member:
        os.replace(part, path)
        return ""
    try:
        with files.open_archive(part) as archive, archive.open(member) as inner:
            if (size := archive.getinfo(member).file_size) > MOST_PACKED * os.path.getsize(part):
                raise UserError(f"{member} unpacks to {size} bytes")
            with replacing(path) as file:
                shutil.copyfileobj(inner, file, PIECE)
    except (zipfile.BadZipFile, KeyError, UserError) as error:
        os.truncate(part, 0)
        return f"it is no zip with {member} ({reason(error)})"
    os.remove(part)
    return ""


@contextlib.contextmanager
def _alone(part: str) -> Iterator[str]:
    """The path of a half of a file that no other process writes meanwhile; an empty one does not stay."""
    with explained(part), open(part, "ab") as file:
        with as_user_error(f"another process fetches {part.removesuffix(PART)}: wait for it", OSError):
            lock(file, wait=False)
        try:
            yield part
        finally:
            if os.path.exists(part) and not os.path.getsize(part):
                os.remove(part)


def _fetched(url: str, part: str, source: Source) -> str:
    """Bring the whole of a file; returns why that was not possible, '' if it was. Another file is emptied."""
    try:
        fault = source.fault_of(part, _transfer(url, part, source))
    except (OSError, http.client.HTTPException, UserError) as error:
        return _sentence(error)
    if fault:
        os.truncate(part, 0)
    return fault


def _transfer(url: str, part: str, source: Source) -> str:
    """Bring what is missing of a file; returns the md5 that its server says, '' where it says none."""
    for _ in range(ATTEMPTS):
        before = os.path.getsize(part)
        try:
            return _once(url, part, source)
        except (OSError, http.client.HTTPException) as error:
            if os.path.getsize(part) <= before or isinstance(error, urllib.error.HTTPError):
                raise
    raise OSError(f"it broke off {ATTEMPTS} times")


def _once(url: str, part: str, source: Source) -> str:
    """One connection."""
    start = os.path.getsize(part)
    headers = {"User-Agent": "guided-diffusion"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        answer: Any = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # there is nothing from there on: it is whole, or another file
            raise
        error.close()
        if start in (source.size, int((error.headers.get("Content-Range") or "*/-1").rpartition("/")[2])):
            return error.headers.get("Content-MD5") or ""
        os.truncate(part, 0)
        return _once(url, part, source)
    with answer:
        refuse((answer.headers.get_content_type() == "text/html", "it answers a web page"))
        start = start if answer.status == 206 else 0  # else it begins anew
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else 0
        refuse((total and source.size and total != source.size, f"it has {total} bytes in place of {source.size}"))
        _write(answer, part, start, total or source.size)
        return answer.headers.get("Content-MD5") or ""


def _write(answer: Any, part: str, start: int, total: int) -> None:
    """Write the rest of a file from its place on, with a bar."""
    bar = tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=os.path.basename(part)[: -len(PART)])
    with open(part, "r+b") as file, bar:
        file.truncate(start)
        file.seek(start)
        while piece := answer.read(PIECE):
            with explained(part):
                file.write(piece)
            bar.update(len(piece))
        size = file.tell()
    if total and size < total:
        raise http.client.IncompleteRead(b"", total - size)


def _sentence(error: BaseException) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return f"it broke off, {error.expected} bytes before the end"
    cause = error.reason if type(error) is urllib.error.URLError else error
    return reason(cause) if isinstance(cause, BaseException) else str(cause)
