"""Downsampled ImageNet (64x64, and 32x32, 16x16, 8x8): npz files or pickles with `data` and `labels`.

Classes are the numbers 0001 to 1000 of the files, or the names that --synsets gives them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np

from conversion import pickles
from conversion.command import converter
from conversion.config import Imagenet64Config
from conversion.images import Item, Source, bad
from conversion.planes import row_items
from guided_diffusion.runtime.errors import UserError, reason
from guided_diffusion.runtime.files import check_regular, read_file

ROWS = 256  # read at a time from an npz
BATCH = re.compile(r"(train|val)_data(_batch_\d+)?(\.npz|\.pickle)?$")


def read(config: Imagenet64Config) -> Source:
    """The images of each batch in its order, batches by number."""
    text = read_file(config.synsets).decode(errors="replace") if config.synsets else ""
    names = [line.split()[0] for line in text.splitlines() if line.strip()]
    return Source(item for path in _batches(config.source) for item in _batch(path, names))


def _batches(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    batches = [name for name in os.listdir(source) if BATCH.match(name)]
    if not batches:
        raise UserError(f"{source} holds no train_data_batch_N or val_data, as npz or pickle: unpack the zips there")
    kinds = {(name.split("_")[0], os.path.splitext(name)[1]) for name in batches}
    if len(kinds) > 1:
        raise UserError(
            f"{source} holds {len(kinds)} kinds of batches ({', '.join(sorted(batches)[:5])}): give one file"
        )
    return [os.path.join(source, name) for name in sorted(batches, key=lambda name: (len(name), name))]


def _batch(path: str, names: list[str]) -> Iterator[Item]:
    try:
        yield from _npz(path, names) if path.endswith(".npz") else _pickle(path, names)
    except (ValueError, OSError) as error:
        yield bad(os.path.basename(path), reason(ValueError(str(error).removeprefix(f"{path} "))))


def _npz(path: str, names: list[str]) -> Iterator[Item]:
    from guided_diffusion.runtime.npz import Npz

    with Npz(path) as archive:
        count, header = archive.header("labels").shape[0], archive.header("data")
        if archive.header("labels").dtype.kind not in "iu":
            raise UserError("its labels are no integers")
        if header.shape[0] != count:
            raise UserError(f"it has {header.shape[0]} images and {count} labels")
        labels = np.concatenate([[], *archive.chunks("labels", 2**16)]).astype(int)
        for start, rows in zip(range(0, count, ROWS), archive.chunks("data", ROWS), strict=True):
            some = labels[start : start + ROWS].tolist()
            yield from row_items(os.path.basename(path), rows, some, names, first=1, start=start)


def _pickle(path: str, names: list[str]) -> Iterator[Item]:
    check_regular(path)
    with open(path, "rb") as file:
        batch = pickles.load(file)
    if "data" not in batch or "labels" not in batch:
        raise UserError("it has no data and labels")
    yield from row_items(os.path.basename(path), np.asarray(batch["data"]), list(batch["labels"]), names, first=1)


main = converter("imagenet64", read)

if __name__ == "__main__":
    main()
