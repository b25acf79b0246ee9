"""Masks: the pixels of a picture that are meant, read by one rule from whatever numbers a file holds.

Of two numbers the greater one is white. More than two are shades between black and white, and white begins in the
middle. A single one is black if it is 0, else white. Of a picture of one colour, its transparency is the mask.

Shapes: H W space.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..runtime.errors import UserError
from .decoding import Content, array_in, check_pixels, upright

TOPS = (1, 255, 65535)  # white, of shades in files of numbers


class Mask(NamedTuple):
    """A mask, and how it was read.

    :param picture: 8 bit grey: above 127 is white.
    :param values: "2 values, 0 and 1"; `black` and `white` say which of them are.
    """

    picture: Image.Image
    values: str
    black: str
    white: str


def decode_mask(content: Content, extension: str) -> Mask:
    """The mask in a file; an error where it is not clear what is black and what is white."""
    array = array_in(content, extension)
    return _mask(_plane(_numbers_of(upright(content)) if array is None else array))


def _numbers_of(image: Image.Image) -> NDArray[Any]:
    """[H, W] of a picture: its transparency where that varies, else its brightness."""
    if image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"))
        alpha = pixels[..., 3]
        visible = pixels[alpha > 0]
        if alpha.min() < alpha.max():
            if (visible[:, :3].min(axis=0) < visible[:, :3].max(axis=0)).any():
                raise UserError("its colours and its transparency both vary: save one of the two as a grey picture")
            return alpha
    if image.mode == "P":
        colours = {tuple(image.getpalette("RGB")[3 * index :][:3]) for index, n in enumerate(image.histogram()) if n}  # type: ignore[index]
        grey = all(len(set(colour)) == 1 for colour in colours)
        if not grey and (len(colours) > 2 or len(np.unique(np.asarray(image.convert("L")))) < len(colours)):
            raise UserError(f"a palette of colours, {len(colours)} of them in use: a mask has two, one brighter")
    exact = image.mode in ("I", "F") or image.mode.startswith("I;16")
    return np.asarray(image if exact else image.convert("L"))


def _plane(array: NDArray[Any]) -> NDArray[Any]:
    """[H, W] of an array that may have one more axis."""
    if array.ndim == 3 and array.shape[0] == 1 and array.shape[-1] not in (1, 3):
        array = array[0]
    if array.ndim == 3 and array.shape[-1] in (1, 3) and (array == array[..., :1]).all():
        array = array[..., 0]
    if array.ndim != 2:
        raise UserError(f"numbers of shape {array.shape}, where masks are [H, W]")
    check_pixels(array.shape[1], array.shape[0])
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError("some of its numbers are not finite")
    return array


def _mask(plane: NDArray[Any]) -> Mask:
    values = np.unique(plane)
    low, high = (value.item() for value in values[[0, -1]])
    if len(values) == 1:
        return Mask(_picture(plane != 0), f"one value, {high:g}", "0", "what is not 0")
    if len(values) == 2:
        return Mask(_picture(plane == values[1]), f"2 values, {low:g} and {high:g}", f"{low:g}", f"{high:g}")
    top = {"u1": 255, "u2": 65535}.get(plane.dtype.str[1:]) or next((top for top in TOPS if high <= top), TOPS[-1])
    bottom = -top if low < 0 else 0
    middle = (bottom + top) / 2
    if not bottom <= low <= middle < high <= top:
        raise UserError(
            f"{len(values)} values from {low:g} to {high:g}, all on one side of {middle:g}, the middle of "
            f"{bottom:g} .. {top:g}: a mask has two values, or shades from black to white"
        )
    picture = Image.fromarray(plane) if plane.dtype == np.uint8 else _picture(plane > middle)
    return Mask(picture, f"{len(values)} values from {low:g} to {high:g}", f"up to {middle:g}", f"above {middle:g}")


def _picture(white: NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(white.astype(np.uint8) * np.uint8(255))
