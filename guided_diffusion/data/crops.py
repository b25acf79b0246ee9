"""Crops of pictures: the middle of one, or a window anywhere in it.

Shapes: H W space, C channels. A size is 64, "64x128" or (64, 128): height before width.
"""

from __future__ import annotations

import math
import random
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..runtime.errors import UserError
from ..runtime.options import Size, parse_size

Picture = Image.Image | NDArray[np.float32]  # 8 bit as PIL has it; anything finer as planes [H, W, C] in [-1, 1]

HALF = 127.5  # levels of a byte from the middle to either end; `runtime.pictures` has it too, and imports torch
MIN_CROP_FRAC, MAX_CROP_FRAC = 0.8, 1.0  # of random crops: a window's least and greatest share of the covered side
MAX_PIXELS = 2**28 // 3  # of a picture as it lies there and as it is scaled: 89 megapixels, 256 MiB of RGB


class Draws(Protocol):
    """The draws of crops and flips: the module `random`, or a `random.Random`."""

    def random(self) -> float: ...

    def randrange(self, start: int, stop: int | None = None) -> int: ...

    def getstate(self) -> Any: ...


def replay(draws: Draws) -> random.Random:
    """A generator that will draw what `draws` draws next."""
    twin = random.Random(0)
    twin.setstate(draws.getstate())
    return twin


def size_of(picture: Picture) -> tuple[int, int]:
    """(height, width)."""
    return picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)


def channels_first(array: NDArray[Any]) -> NDArray[np.float32]:
    """A crop as [C, H, W] in [-1, 1]."""
    array = array[..., None] if array.ndim == 2 else array
    # bicubic interpolation overshoots: PIL has clipped bytes already, but not float planes
    unit = array.astype(np.float32) / np.float32(HALF) - 1 if array.dtype == np.uint8 else np.clip(array, -1, 1)
    return np.ascontiguousarray(unit.transpose(2, 0, 1), dtype=np.float32)


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """A crop, or the planes of a picture, as bytes [H, W, C]."""
    array = array[..., None] if array.ndim == 2 else array
    return array if array.dtype == np.uint8 else np.rint((array + 1) * HALF).clip(0, 255).astype(np.uint8)


def center_crop_arr(pil_image: Picture, image_size: Size, *, nearest: bool = False) -> NDArray[Any]:
    """The middle [H, W] or [H, W, C] of a picture that was scaled until it just covers the size.

    :param pil_image: a PIL image, or planes [H, W, C] of float32.
    :param nearest: take every pixel unchanged from the nearest place, for numbers such as classes.
    """
    height, width = parse_size(image_size)
    array = _cover(pil_image, height, width, nearest=nearest)
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]


def fitted_arr(picture: Picture, image_size: Size, *, pad: bool, nearest: bool = False) -> NDArray[Any]:
    """All of a picture [H, W] or [H, W, C]: with `pad` between black stripes of equal width, else out of proportion.

    :param nearest: as for `center_crop_arr`; there 0 is what black is.
    """
    if isinstance(picture, np.ndarray):
        planes = [Image.fromarray(plane) for plane in np.moveaxis(picture, -1, 0)]
        lowest = 0.0 if nearest else -1.0
        return np.stack([_fitted(plane, parse_size(image_size), pad, nearest, lowest) for plane in planes], -1)
    return _fitted(picture, parse_size(image_size), pad, nearest, 0)


def _fitted(picture: Image.Image, size: tuple[int, int], pad: bool, nearest: bool, black: float) -> NDArray[Any]:
    scale = min(size[0] / picture.height, size[1] / picture.width)
    height, width = (max(1, round(side * scale)) for side in size_of(picture)) if pad else size
    whole, picture = picture, _halved(picture, height, width)
    way = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    array = np.asarray((whole if nearest else picture).resize((width, height), way))
    room = [(size[0] - height) // 2, size[0] - height - (size[0] - height) // 2]
    beside = [(size[1] - width) // 2, size[1] - width - (size[1] - width) // 2]
    return np.pad(array, [room, beside, (0, 0)][: array.ndim], constant_values=black)


def random_crop_arr(
    pil_image: Picture,
    image_size: Size,
    min_crop_frac: float = MIN_CROP_FRAC,
    max_crop_frac: float = MAX_CROP_FRAC,
    *,
    rng: Draws | None = None,
    nearest: bool = False,
) -> NDArray[Any]:
    """A window anywhere in a picture that was scaled to cover a little more than the size.

    :param min_crop_frac: the window's least share of the covered side; `max_crop_frac` its greatest, at most 1.
    :param rng: None draws from the module `random`: the scale, the top, the left.
    :param nearest: as for `center_crop_arr`.
    """
    if not 0 < min_crop_frac <= max_crop_frac <= 1:
        raise UserError(f"got {min_crop_frac} and {max_crop_frac}: choose 0 < min_crop_frac <= max_crop_frac <= 1")
    draws: Draws = random if rng is None else rng
    height, width = parse_size(image_size)
    short = min(height, width)
    side = draws.randrange(math.ceil(short / max_crop_frac), math.ceil(short / min_crop_frac) + 1)
    array = _cover(pil_image, *_scaled((height, width), side, short), nearest=nearest)
    top = draws.randrange(array.shape[0] - height + 1)
    left = draws.randrange(array.shape[1] - width + 1)
    return array[top : top + height, left : left + width]


def _scaled(size: tuple[int, int], side: int, short: int) -> tuple[int, int]:
    """A size whose short side is to be `side` instead."""
    return -(-size[0] * side // short), -(-size[1] * side // short)


def largest_cover(image_size: Size, *, random_crop: bool) -> tuple[int, int]:
    """The largest (height, width) that a picture is scaled to cover before it is cropped."""
    size = parse_size(image_size)
    return _scaled(size, math.ceil(min(size) / MIN_CROP_FRAC), min(size)) if random_crop else size


def shrunk(picture: Image.Image, image_size: Size, *, random_crop: bool) -> Image.Image:
    """A smaller picture, crops of which to a size are those of the picture, bit for bit.

    :param random_crop: random crops with the default fractions; else those of the middle.
    """
    if random_crop:
        return _halved(picture, *largest_cover(image_size, random_crop=True))
    return Image.fromarray(center_crop_arr(picture, image_size))


def shrunk_size(size: tuple[int, int], image_size: Size, *, random_crop: bool) -> tuple[int, int]:
    """(height, width) of the `shrunk` picture."""
    height, width = largest_cover(image_size, random_crop=random_crop)
    while random_crop and size[0] >= 2 * height and size[1] >= 2 * width:
        size = size[0] // 2, size[1] // 2
    return size if random_crop else (height, width)


def _halved(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Halve both sides for as long as neither becomes shorter than this."""
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return picture


def _cover(picture: Picture, height: int, width: int, *, nearest: bool = False) -> NDArray[Any]:
    """Scale a picture, keeping its proportions, until one side fits exactly and the other is no shorter than asked."""
    if isinstance(picture, np.ndarray):
        planes = map(Image.fromarray, np.moveaxis(picture, -1, 0))
        return np.stack([_cover(plane, height, width, nearest=nearest) for plane in planes], -1)
    whole, picture = picture, _halved(picture, height, width)
    scale = max(width / picture.width, height / picture.height)
    size = round(picture.width * scale), round(picture.height * scale)
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"it is so long and thin that scaled to {size[0]} x {size[1]} it has too many pixels")
    # step by step, the nearest pixels would drift to one corner
    scaled = whole.resize(size, Image.Resampling.NEAREST) if nearest else picture.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(scaled)
