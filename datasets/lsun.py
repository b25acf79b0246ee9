"""LSUN: a folder with an LMDB of one class, or a folder of such folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from conversion.command import converter
from conversion.config import LsunConfig
from conversion.folder import folder_name
from conversion.images import EMPTY_CLASS, Item, Source, bad
from guided_diffusion.runtime.errors import UserError, printable, reason
from guided_diffusion.runtime.files import MAX_BYTES


def read(config: LsunConfig) -> Source:
    """The images of each database in the order of their keys, classes in the order of their folders."""
    paths = _databases(config.source)
    if config.prefix and len(paths) > 1:
        raise UserError(f"--prefix {config.prefix} would make one class of {len(paths)} databases: give one of them")
    return Source(item for path in paths for item in _items(path, config.prefix or _class_of(path)))


def _databases(source: str) -> list[str]:
    if os.path.isfile(source) or os.path.isfile(os.path.join(source, "data.mdb")):
        return [source]
    inner = sorted(os.path.join(source, name) for name in os.listdir(source))
    databases = [path for path in inner if os.path.isfile(os.path.join(path, "data.mdb"))]
    if not databases:
        raise UserError(f"{source} holds no data.mdb, nor does a folder in it: unpack LSUN's zip and give its folder")
    return databases


def _class_of(path: str) -> str:
    """bedroom of bedroom_train_lmdb."""
    name = folder_name(os.path.dirname(os.path.abspath(path)) if os.path.isfile(path) else path)
    return re.sub(r"(_(train|val|test))?(_lmdb)?$", "", name)


def _items(path: str, label: str) -> Iterator[Item]:
    lmdb, name = _library(), folder_name(path)
    empty = True
    try:
        with (
            lmdb.open(path, subdir=os.path.isdir(path), readonly=True, lock=False, create=False) as database,
            database.begin(buffers=True) as transaction,
        ):
            _check_whole(path, database)
            for key, value in transaction.cursor():
                empty = False
                yield Item(f"{name}/{printable(bytes(key).decode('latin-1'))}", label, partial(_content, value))
    except (lmdb.Error, OSError, ValueError) as error:
        yield bad(name, reason(error).removeprefix(f"{path}: "), label)
        return
    if empty:
        yield bad(name, EMPTY_CLASS, label)


def _library() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UserError('LSUN\'s databases need lmdb: pip install "guided-diffusion[datasets]"') from error
    return lmdb


def _check_whole(path: str, database: Any) -> None:
    """Refuse a file that was cut: the library maps it to memory, and to read behind its end would end the process."""
    size = os.path.getsize(os.path.join(path, "data.mdb") if os.path.isdir(path) else path)
    needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    if size < needed:
        raise UserError(f"it was cut: it has {size} bytes of {needed}")


def _content(value: memoryview) -> bytes:
    if len(value) > MAX_BYTES:
        raise UserError("too many bytes")
    return bytes(value)


main = converter("lsun", read)

if __name__ == "__main__":
    main()
