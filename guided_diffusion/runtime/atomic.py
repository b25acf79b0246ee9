"""New files that take the place of old ones when they are whole, and sentences about a disk that refuses."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

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


def lock(file: IO[Any], *, wait: bool = True) -> None:
    """Keep an open file from other processes that lock it, until it is closed; on Windows nothing is kept.

    :raises OSError: if another process has it, and `wait` is False.
    """
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn an error of the system inside the block into a sentence about the file that was to be written."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # a sentence already
            raise
        refusal = OSError(f"{path} cannot be written ({error.strerror}): make room there, or choose another folder")
        refusal.errno = error.errno
        raise refusal from error
