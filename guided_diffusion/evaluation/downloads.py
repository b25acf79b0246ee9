"""Files that are fetched from the network once, and kept in the cache.

A file has its name only when it is whole and its checksum is right. Until then it is FILE.part-ID beside it, by
the address that it comes from: a later run goes on with what an interrupted one has left there, and of several
processes that want the same file one fetches it and the others wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

from .. import __version__, logger
from ..runtime import files, paths
from ..runtime.files import PART, explained

try:
    import fcntl
except ImportError:  # Windows: there, two processes must not fetch the same file at once
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 30.0  # seconds without an answer, or without a byte of it
ATTEMPTS = 5  # in which a connection may break off, per address
PAUSE = 1.0  # seconds before the next of them
LARGEST = 2**34  # bytes of a file: more are never written
PIECE = 2**18


@dataclass(frozen=True)
class Source:
    """A file that others publish.

    :param urls: addresses of the same bytes, in the order in which they are tried.
    :param file: its name in the cache.
    :param sha256: as many of its hex digits as are known, from the first; '' for none, and then a file that was
        interrupted is fetched from its beginning, as nothing would tell whether its parts belong together.
    :param size: in bytes; 0 where it is not known.
    :param scheme: of the addresses and of all that they lead to.
    """

    urls: tuple[str, ...]
    file: str
    sha256: str = ""
    size: int = 0
    scheme: str = "https"


SOURCES: dict[str, Source] = {
    "inception": Source(  # the published evaluator's graph as converted by pytorch-fid
        urls=(
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        ),
        file="weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
    ),
}


class _Failed(Exception):
    """Why one address did not give the file: the next one is asked."""


class _BrokenOff(_Failed):
    """An answer that ended too soon: the same address may give the rest."""


def kept_at(source: Source) -> str:
    """Where a file is, or will be, in the cache."""
    return os.path.join(paths.cache_folder(), source.file)


def fetch(source: Source, path: str = "", *, say: Callable[[str], object] = print) -> str:
    """Have a file, fetching it where it is not there already.

    :param path: a file, or a folder for it; '' for the cache.
    :return: its path.
    :raises ValueError: if another file has its place.
    :raises OSError: if no address gives it, or it cannot be written.
    """
    path = paths.local(path) or kept_at(source)
    path = os.path.join(path, source.file) if os.path.isdir(path) else path
    if os.path.exists(path):
        return _already_there(source, path, say)
    with explained(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    faults = []
    for url in source.urls:
        try:
            _fetch_from(url, source, path, say)
            return path
        except _Failed as fault:
            faults.append(f"{url}: {fault}")
    raise OSError(
        f"{source.file} could not be fetched ({'; '.join(faults)}): try again later, or fetch {source.urls[0]} on "
        f"another machine and put it at {path}"
    )


def _already_there(source: Source, path: str, say: Callable[[str], object]) -> str:
    files.check_regular(path)
    with open(path, "rb") as file:
        found = _digest(file)
    if not found.startswith(source.sha256):
        raise ValueError(
            f"{path} is there, but is not {source.file}: its sha256 is {found}, not {source.sha256}; move it away or "
            "name another file with --out"
        )
    say(f"{path} is there already, sha256 {found}{_compared(source)}")
    return path


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _compared(source: Source) -> str:
    return ", as it should be" if source.sha256 else " (there is none to compare it with)"


# ---- one address


def _fetch_from(url: str, source: Source, path: str, say: Callable[[str], object]) -> None:
    """Fetch, or wait for the process that does.

    :raises _Failed: if the address does not give the file.
    """
    part = f"{path}{PART}{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    with explained(path), _held(part, say) as file:
        if os.path.exists(path):  # the process that was waited for has fetched it
            os.remove(part)
            return
        try:
            digest = _receive(url, source, file, say)
        except _Failed:
            if not file.seek(0, os.SEEK_END):
                os.remove(part)
            raise
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, path)
    say(f"{path}: {os.path.getsize(path)} bytes, sha256 {digest}{_compared(source)}")


@contextlib.contextmanager
def _held(part: str, say: Callable[[str], object]) -> Iterator[BinaryIO]:
    """The file of that name, opened to be read and written, by this process alone."""
    while True:
        with open(part, "a+b") as file:
            _lock(file, part, say)
            if os.path.exists(part) and os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                yield file
                return


def _lock(file: BinaryIO, part: str, say: Callable[[str], object]) -> None:
    """Wait until no other process holds the file; one that ends, however it does, lets go of it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another process is fetching {part.partition(PART)[0]}: waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)


def _receive(url: str, source: Source, file: BinaryIO, say: Callable[[str], object]) -> str:
    """Fill the file with what an address gives, going on with what it holds.

    :return: the sha256 of all of it.
    """
    for attempt in range(ATTEMPTS):
        kept = file.seek(0, os.SEEK_END) if source.sha256 else file.truncate(0)
        if attempt:
            say(f"{url} broke off after {kept} bytes: asking for the rest")
            time.sleep(PAUSE)
        try:
            if not kept or kept != source.size:
                _ask(url, source, file, kept)
        except _BrokenOff:
            if attempt + 1 == ATTEMPTS:
                raise
            continue
        digest = _digest(file)
        if digest.startswith(source.sha256):
            return digest
        file.truncate(0)
        if not kept:
            break
    raise _Failed(f"what it gives is another file, with sha256 {digest}, not {source.sha256}")


def _ask(url: str, source: Source, file: BinaryIO, kept: int) -> None:
    """One request, for what comes after the first `kept` bytes of a file; all of it is asked for where that fails."""
    with _answer(url, source, kept) as answer:
        start, total = _extent(answer, kept)
        if start is not None:
            if source.size and total not in (None, source.size):
                raise _Failed(f"it has {total} bytes there, not {source.size}")
            file.truncate(start)
            _write(answer, file, start, total, source)
            return
    file.truncate(0)
    _ask(url, source, file, 0)


def _extent(answer: Any, kept: int) -> tuple[int | None, int | None]:
    """The first byte that an answer gives, None if it is not of use, and how many the file has, where it is told."""
    if answer.status == http.client.OK:  # also from servers that know no ranges
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    ranged = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status == http.client.PARTIAL_CONTENT and ranged and int(ranged[1]) == kept:
        return kept, int(ranged[2])
    if kept:
        return None, None
    raise _Failed(f"it answers {answer.status}, which is no file")


def _write(answer: Any, file: BinaryIO, start: int, total: int | None, source: Source) -> None:
    done, most = start, min(total or LARGEST, LARGEST)
    options: Mapping[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "desc": source.file}
    with logger.progress_bar(total=total, initial=start, **options) as bar:
        while piece := _read(answer, done, total):
            done += len(piece)
            if done > most:
                file.truncate(0)
                raise _Failed(f"it does not end after {most} bytes")
            file.write(piece)
            bar.update(len(piece))
    if total is not None and done < total:
        file.flush()
        raise _BrokenOff(f"it broke off after {done} of {total} bytes, which are kept")


def _read(answer: Any, done: int, total: int | None) -> bytes:
    try:
        return bytes(answer.read(PIECE))
    except (OSError, http.client.HTTPException) as error:
        told = f" of {total}" if total else ""
        raise _BrokenOff(f"it broke off after {done}{told} bytes, which are kept ({_reason(error)})") from error


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows no address to another scheme, such as from https to http."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        target = urllib.parse.urlsplit(args[-1])
        if target.scheme != req.type:
            raise urllib.error.URLError(f"it leads to {target.scheme}://{target.netloc}, which is not {req.type}")
        return super().redirect_request(req, *args)


@contextlib.contextmanager
def _answer(url: str, source: Source, start: int) -> Iterator[Any]:
    """The answer to a request for all from byte `start` on."""
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme != source.scheme:
        raise _Failed(f"its scheme is {scheme!r}, not {source.scheme}")
    headers = {"User-Agent": f"guided-diffusion/{__version__}", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    opener = urllib.request.build_opener(_SameScheme)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            error.close()
            raise _Failed(f"it answers {error.code} {files.printable(str(error.reason))}") from error
        answer = error
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(_reason(error)) from error
    with answer:
        yield answer


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    return files.reason(inner if isinstance(inner, BaseException) else error)
