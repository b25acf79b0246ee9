"""Untrusted tars, read from where they lie: nothing of them is written to the disk.

Members are found one after the other, and their content is read when it is asked for, from the one open file.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO

from guided_diffusion.runtime import files
from guided_diffusion.runtime.errors import UserError, reason
from guided_diffusion.runtime.files import MAX_BYTES, path_fault

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """A member that is no folder.

    :param fault: why it is not read; '' if it may be.
    :param open: opens its content as a file.
    """

    name: str
    fault: str
    open: Callable[[], IO[bytes]]

    def read(self) -> bytes:
        """Its content.

        :raises ValueError: if there is a fault, or the tar ends before it does.
        """
        if self.fault:
            raise UserError(self.fault)
        try:
            with self.open() as file:
                return file.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(reason(error)) from error


class Truncated(UserError):
    """A tar that ends early or is damaged, behind members that are sound."""


def members(file: IO[bytes], *, largest: int = MAX_BYTES) -> Iterator[Member]:
    """The members of an open tar, packed or not, in their order.

    :param largest: bytes of a member that is read as a whole.
    :raises ValueError: if it is no tar.
    :raises Truncated: where it ends too early, after what could be read.
    """
    seen = set[str]()
    try:
        archive = tarfile.open(fileobj=file)  # noqa: SIM115  the caller closes the file
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"it is no tar ({reason(error)})") from error
    try:
        for info in archive:  # which keeps all that it has found, a million in ImageNet
            if not info.isdir():
                fault = _fault(info, largest) or ("a duplicate of an earlier name" if info.name in seen else "")
                seen.add(info.name)
                yield Member(info.name, fault, partial(_extracted, archive, info))
            archive.members.clear()  # type: ignore[attr-defined]
        _check_end(archive)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise Truncated(f"it ends early or is damaged ({reason(error)})") from error


def _extracted(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(info)
    assert file is not None, "only regular files are read"
    return file


def _fault(info: tarfile.TarInfo, largest: int) -> str:
    """Why a member is not read, as far as its header tells."""
    fault = path_fault(info.name, "tar")
    if not fault and (info.issym() or info.islnk()):
        fault = "a link"
    if not fault and (not info.isreg() or info.issparse()):
        fault = "no regular file"
    return fault or ("too many bytes" if info.size > largest else "")


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse a tar without the empty block that closes it: `tarfile` takes any place for its end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"there is no end of a tar at byte {archive.offset}")


def open_tar(path: str) -> IO[bytes]:
    """A local tar to hand to `members`.

    :raises OSError, ValueError: if it is no regular file.
    """
    files.check_regular(path)
    return open(path, "rb")
