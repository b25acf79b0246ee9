"""Images that lie in rows of numbers, plane behind plane, as in CIFAR and the downsampled ImageNet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guided_diffusion.runtime.errors import UserError, printable, reason

from .images import EMPTY_CLASS, Item, bad, of_pixels


def check_rows(rows: NDArray[Any], labels: Sequence[Any]) -> int:
    """The side of the square images [N, 3 * side * side] in three planes of uint8.

    :raises ValueError: if they are none, or labels are missing.
    """
    if rows.dtype != np.uint8:
        raise UserError(f"its images are numbers of type {rows.dtype}, where uint8 is read")
    side = math.isqrt(rows.shape[1] // 3) if rows.ndim == 2 else 0
    if not side or rows.shape[1] != 3 * side * side:
        raise UserError(f"its images have the shape {rows.shape}, where [N, 3 * side * side] is read")
    if len(rows) != len(labels):
        raise UserError(f"it has {len(rows)} images and {len(labels)} labels")
    return side


def row_items(
    file: str, rows: NDArray[Any], labels: Sequence[Any], names: Sequence[str], *, first: int = 0, start: int = 0
) -> Iterator[Item]:
    """An item per row of `check_rows`.

    :param labels: [N] numbers of classes.
    :param names: of the classes; [] calls them by their numbers.
    :param first: the number of the first class.
    :param start: the number of the first row in its file.
    """
    side = check_rows(rows, labels)
    images = rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    for number, (image, label) in enumerate(zip(images, labels, strict=True), start):
        key = f"{file}/{number}"
        try:
            yield of_pixels(key, class_of(label, names, first), np.ascontiguousarray(image))
        except ValueError as error:
            yield bad(key, reason(error))


def class_of(value: Any, names: Sequence[str], first: int = 0) -> str:
    """The name of a class given by number, or the number itself with four digits where there are no names.

    :param first: the number of the first class.
    :raises ValueError: if there is no such class.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"the label {printable(repr(value))} is no number")
    if value < first or (names and value >= first + len(names)):
        raise UserError(f"the label {value} is none of {first} to {first + len(names) - 1}")
    return names[int(value) - first] if names else f"{int(value):04d}"


def with_empty_classes(items: Iterator[Item], names: Sequence[str], where: str) -> Iterator[Item]:
    """The same items, and behind them what tells of classes without any."""
    seen = set[str]()
    for item in items:
        seen.add(item.label)
        yield item
    for name in names:
        if name not in seen:
            yield bad(f"class {printable(name)} of {where}", EMPTY_CLASS, name)
