"""LSUN: a folder with an LMDB of one class, or a folder of such folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from conversion.command import converter
from conversion.config import LsunConfig
from conversion.folder import folder_name
from conversion.images import Item, Source, bad
from conversion.lmdb import Lmdb, Place
from guided_diffusion.runtime.files import printable, reason


def read(config: LsunConfig) -> Source:
    """The images of each database in the order of their keys, classes in the order of their folders."""
    paths = _databases(config.source)
    if config.prefix and len(paths) > 1:
        raise ValueError(f"--prefix {config.prefix} would make one class of {len(paths)} databases: give one of them")
    return Source(item for path in paths for item in _items(path, config.prefix or _class_of(path)))


def _databases(source: str) -> list[str]:
    if os.path.isfile(source) or os.path.isfile(os.path.join(source, "data.mdb")):
        return [source]
    inner = sorted(os.path.join(source, name) for name in os.listdir(source))
    found = [path for path in inner if os.path.isfile(os.path.join(path, "data.mdb"))]
    if not found:
        raise ValueError(f"{source} holds no data.mdb, nor does a folder in it: unpack LSUN's zip and give its folder")
    return found


def _class_of(path: str) -> str:
    """bedroom of bedroom_train_lmdb."""
    name = folder_name(os.path.dirname(os.path.abspath(path)) if os.path.isfile(path) else path)
    return re.sub(r"(_(train|val|test))?(_lmdb)?$", "", name)


def _items(path: str, label: str) -> Iterator[Item]:
    name = folder_name(path)
    try:
        database = Lmdb(path)
    except (ValueError, OSError) as error:
        yield bad(name, reason(error), label)
        return
    try:
        for key, place in database.places():
            yield _item(database, f"{name}/{printable(key.decode('latin-1'))}", label, place)
    except ValueError as error:
        yield bad(name, reason(error), label)
    finally:
        database.close()
    if not len(database):
        yield bad(name, "a class with no images", label)


def _item(database: Lmdb, key: str, label: str, place: Place) -> Item:
    return Item(key, label, lambda: database.value(place))


main = converter("lsun", read)

if __name__ == "__main__":
    main()
