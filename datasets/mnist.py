"""MNIST and Fashion-MNIST: the folder of their four idx files, packed by gzip or not. Classes are the digits."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from conversion.command import converter
from conversion.config import MnistConfig
from conversion.images import Item, Source, bad, of_pixels
from conversion.planes import class_of, with_empty_classes
from guided_diffusion.runtime import files
from guided_diffusion.runtime.errors import UserError, reason
from guided_diffusion.runtime.files import MAX_BYTES

STARTS = {"train": "train", "test": "t10k"}
CLOTHES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
UBYTE = 8  # idx's code of the type


def read(config: MnistConfig) -> Source:
    """The images of one split in their order."""
    names = [f"{digit}-{word}" if config.fashion else str(digit) for digit, word in enumerate(CLOTHES)]
    start = STARTS[config.split]
    images = _idx(_find(config.source, f"{start}-images", "idx3-ubyte"), 3)
    labels = _idx(_find(config.source, f"{start}-labels", "idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise UserError(f"{config.source} has {len(images)} images and {len(labels)} labels: fetch it again")
    return Source(with_empty_classes(_items(images, labels, names, start), names, config.source), len(images))


def _items(images: NDArray[Any], labels: NDArray[Any], names: list[str], start: str) -> Iterator[Item]:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        try:
            yield of_pixels(f"{start}/{number}", class_of(label, names), image)
        except ValueError as error:
            yield bad(f"{start}/{number}", reason(error))


def _find(folder: str, stem: str, kind: str) -> str:
    names = [f"{stem}{dot}{kind}{end}" for dot in "-." for end in (".gz", "")]
    paths = [os.path.join(folder, name) for name in names]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise UserError(f"{folder} has no {names[0]}, packed or not: fetch it into that folder")
    return path


def _idx(path: str, dims: int) -> NDArray[np.uint8]:
    """The array of an idx file: two zeros, type, number of sides, the sides, then the numbers."""
    try:
        files.check_regular(path)
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            return _read_idx(file, dims)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be used, {reason(error)}: fetch it again") from error


def _read_idx(file: IO[bytes] | gzip.GzipFile, dims: int) -> NDArray[np.uint8]:
    head = file.read(4 + 4 * dims)
    if head[:4] != bytes([0, 0, UBYTE, dims]) or len(head) < 4 + 4 * dims:
        raise UserError(f"it is no idx file of bytes in {dims} dimensions")
    shape = struct.unpack(f">{dims}I", head[4:])
    if math.prod(shape) > MAX_BYTES:
        raise UserError(f"its array of shape {shape} is too large")
    return files.read_rows(cast(IO[bytes], file), shape, np.dtype(np.uint8))


main = converter("mnist", read)

if __name__ == "__main__":
    main()
