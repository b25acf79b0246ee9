"""CIFAR-10 and CIFAR-100: the tar.gz of the Python version, or the folder that it unpacks to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from conversion import pickles
from conversion.command import converter
from conversion.config import CifarConfig
from conversion.images import Item, Source, bad
from conversion.planes import row_items, with_empty_classes
from guided_diffusion.data.tars import members
from guided_diffusion.runtime import files as untrusted
from guided_diffusion.runtime.errors import UserError, reason

TEN = [f"data_batch_{number}" for number in range(1, 6)]
# meta file -> batches of each split
LAYOUTS = {
    "batches.meta": {"train": TEN, "test": ["test_batch"]},
    "meta": {"train": ["train"], "test": ["test"]},
}
KEYS = {"batches.meta": ("label_names", "labels"), "meta": ("fine_label_names", "fine_labels")}
COARSE = ("coarse_label_names", "coarse_labels")

Files = dict[str, Callable[[], bytes]]  # name -> its content


def read(config: CifarConfig) -> Source:
    """The images of one split in the order of the batches."""
    files = _files(config.source)
    meta = next((name for name in LAYOUTS if name in files), "")
    if not meta:
        raise UserError(
            f"{config.source} has neither {' nor '.join(LAYOUTS)}: give the tar.gz of the Python version, or its folder"
        )
    if config.coarse and meta != "meta":
        raise UserError("--coarse True is for CIFAR-100, and this is CIFAR-10: leave it out")
    names_key, key = COARSE if config.coarse else KEYS[meta]
    names = _names(files[meta], names_key, f"{meta} in {config.source}")
    batches = LAYOUTS[meta][config.split]
    items = (item for batch in batches for item in _batch(batch, files.get(batch), key, names))
    return Source(with_empty_classes(items, names, config.source))


def _files(source: str) -> Files:
    known = {name for meta, splits in LAYOUTS.items() for name in (meta, *splits["train"], *splits["test"])}
    if os.path.isdir(source):
        return {name: _reader(os.path.join(source, name)) for name in sorted(known & set(os.listdir(source)))}
    files: Files = {}
    with untrusted.open_file(source) as file:
        try:
            for member in members(file):
                name = os.path.basename(member.name)
                if name in known and not member.fault:
                    files.setdefault(name, _kept(member.read()))
        except ValueError as error:
            if not LAYOUTS.keys() & files.keys():
                raise UserError(f"{source}: {error}") from error
    return files


def _reader(path: str) -> Callable[[], bytes]:
    return lambda: untrusted.read_file(path)


def _kept(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def _names(content: Callable[[], bytes], key: str, where: str) -> list[str]:
    try:
        names = pickles.load(content())[key]
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} has no {key} ({reason(error)}): fetch it again") from error


def _batch(name: str, content: Callable[[], bytes] | None, key: str, names: list[str]) -> Iterator[Item]:
    try:
        if content is None:
            raise UserError("it is missing, or the archive ends before it")
        batch = pickles.load(content())
        if "data" not in batch or not isinstance(batch.get(key), list):
            raise UserError(f"it has no data and {key}")
        yield from row_items(name, np.asarray(batch["data"]), batch[key], names)
    except (ValueError, OSError) as error:
        yield bad(name, reason(error))


main = converter("cifar", read)

if __name__ == "__main__":
    main()
