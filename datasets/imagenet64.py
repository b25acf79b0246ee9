"""Downsampled ImageNet (64x64, and 32x32, 16x16, 8x8): npz files or pickles with `data` and `labels`.

Classes are the numbers 0001 to 1000 of the files, or the names that --synsets gives them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from conversion import pickles
from conversion.command import converter
from conversion.config import Imagenet64Config
from conversion.images import Item, Source, bad
from conversion.planes import base, class_of, first_words, row_items, side_of
from guided_diffusion.runtime.files import check_regular, reason

ROWS = 256  # read at a time from an npz
BATCH = re.compile(r"(train|val)_data(_batch_\d+)?(\.npz|\.pickle)?$")


def read(config: Imagenet64Config) -> Source:
    """The images of each batch in its order, batches by number."""
    names = first_words(config.synsets) if config.synsets else []
    return Source(item for path in _batches(config.source) for item in _batch(path, names))


def _batches(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    found = [name for name in os.listdir(source) if BATCH.match(name)]
    if not found:
        raise ValueError(f"{source} holds no train_data_batch_N or val_data, as npz or pickle: unpack the zips there")
    kinds = {(name.split("_")[0], os.path.splitext(name)[1]) for name in found}
    if len(kinds) > 1:
        raise ValueError(
            f"{source} holds {len(kinds)} kinds of batches ({', '.join(sorted(found)[:5])}): give one file"
        )
    return [os.path.join(source, name) for name in sorted(found, key=lambda name: (len(name), name))]


def _batch(path: str, names: list[str]) -> Iterator[Item]:
    try:
        yield from _npz(path, names) if path.endswith(".npz") else _pickle(path, names)
    except (ValueError, OSError) as error:
        yield bad(base(path), reason(ValueError(str(error).removeprefix(f"{path} "))))


def _npz(path: str, names: list[str]) -> Iterator[Item]:
    from guided_diffusion.runtime.npz import Npz

    with Npz(path) as archive:
        count, header = archive.header("labels").shape[0], archive.header("data")
        if archive.header("labels").dtype.kind not in "iu":
            raise ValueError("its labels are no integers")
        side_of(np.empty((0, *header.shape[1:]), header.dtype))
        if header.shape[0] != count:
            raise ValueError(f"it has {header.shape[0]} images and {count} labels")
        labels = np.concatenate([[], *archive.chunks("labels", 2**16)]).astype(int)
        for start, rows in zip(range(0, count, ROWS), archive.chunks("data", ROWS), strict=True):
            yield from _rows(base(path), rows, labels[start : start + ROWS].tolist(), names, start)


def _pickle(path: str, names: list[str]) -> Iterator[Item]:
    check_regular(path)
    with open(path, "rb") as file:
        batch = pickles.load(file)
    if "data" not in batch or "labels" not in batch:
        raise ValueError("it has no data and labels")
    rows, labels = np.asarray(batch["data"]), list(batch["labels"])
    side_of(rows)
    if len(rows) != len(labels):
        raise ValueError(f"it has {len(rows)} images and {len(labels)} labels")
    yield from _rows(base(path), rows, labels, names, 0)


def _rows(file: str, rows: Any, labels: list[Any], names: list[str], start: int) -> Iterator[Item]:
    for number, (row, label) in enumerate(zip(rows, labels, strict=True), start):
        try:
            yield from row_items(file, row[None], [class_of(label, names, first=1)], number)
        except ValueError as error:
            yield bad(f"{file}/{number}", reason(error))


main = converter("imagenet64", read)

if __name__ == "__main__":
    main()
