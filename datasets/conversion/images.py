"""The images of a data set, and what is done to each on its way to an output file; without torch, as workers load it.

Shapes: H W space, C channels.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from guided_diffusion.data.crops import MAX_PIXELS, center_crop_arr
from guided_diffusion.data.decoding import FORMATS, decode
from guided_diffusion.runtime.errors import UserError, reason
from guided_diffusion.runtime.options import Size, parse_size

Content = bytes | NDArray[np.uint8]  # a file of any format that is read, or [H, W] or [H, W, 3]

EMPTY_CLASS = "a class with no images"
EXTENSIONS = {"png": ".png", "jpeg": ".jpg"}
GREY = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Item:
    """One image of a source.

    :param key: its name there.
    :param label: its class, as the source names it; '' for what is no image, such as an archive that ends early.
    :param load: its content; raises ValueError or OSError where there is something wrong with it.
    :param name: stands in its file name behind the class, in place of its number.
    :param beside: (extension, content) of what goes into a tar with it.
    """

    key: str
    label: str
    load: Callable[[], Content]
    name: str = ""
    beside: Sequence[tuple[str, bytes]] = ()


def _nothing_else(_: Collection[str]) -> list[tuple[str, bytes]]:
    return []


@dataclass(frozen=True)
class Source:
    """The images of a data set, in an order that is always the same.

    :param total: how many there are, if that is known.
    :param extras: names of the images that were written -> (name, content) of what else goes to the output.
    """

    items: Iterable[Item]
    total: int | None = None
    extras: Callable[[Collection[str]], list[tuple[str, bytes]]] = _nothing_else


def bad(key: str, fault: str, label: str = "") -> Item:
    """Something in a source that cannot be used, and why."""

    def load() -> Content:
        raise UserError(fault)

    return Item(key, label, load)


def of_pixels(key: str, label: str, pixels: NDArray[np.uint8]) -> Item:
    """An image [H, W] or [H, W, 3] that is decoded already."""
    return Item(key, label, lambda: pixels)


@dataclass(frozen=True)
class Recipe:
    """What is done to every image; as the flags of those names say."""

    size: Size = 0
    crop: str = "center"
    format: str = ""
    quality: int = 95


class Encoded(NamedTuple):
    """An output file: the end of its name, and its bytes."""

    extension: str
    content: bytes


def encode(content: Content, recipe: Recipe) -> Encoded | str:
    """The output file of an image, or what is wrong with it."""
    try:
        return _encoded(content, recipe)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "its content is no image"
    except Exception as error:  # Pillow does not say what it raises on a damaged file
        return reason(error)


def _encoded(content: Content, recipe: Recipe) -> Encoded:
    if not isinstance(content, bytes):
        return _write(Image.fromarray(content), recipe)
    if not content:
        raise UserError("it is empty")
    with Image.open(io.BytesIO(content), formats=FORMATS) as header:
        kind, mode = (header.format or "").lower(), header.mode
    # all of it is decoded, also where its bytes are kept: it may be cut
    picture = decode(content, "", 1 if mode in GREY else 3).picture
    if kind in EXTENSIONS and recipe.format in ("", kind) and not recipe.size:
        return Encoded(EXTENSIONS[kind], content)
    if not isinstance(picture, Image.Image):
        raise UserError(f"it has finer levels than 8 bits (mode {mode}), which only a PNG left as it is can keep")
    return _write(picture, recipe)


def _write(picture: Image.Image, recipe: Recipe) -> Encoded:
    if recipe.size:
        picture = Image.fromarray((_box_crop if recipe.crop == "box" else center_crop_arr)(picture, recipe.size))
    file, kind = io.BytesIO(), recipe.format or "png"
    options: dict[str, Any] = {"quality": recipe.quality, "subsampling": 0} if kind == "jpeg" else {}
    picture.save(file, kind, **options)
    return Encoded(EXTENSIONS[kind], file.getvalue())


def _box_crop(picture: Image.Image, size: Size) -> NDArray[Any]:
    """The middle of a picture whose every pixel is the mean of those it covers, scaled until it covers the size."""
    height, width = parse_size(size)
    scale = max(height / picture.height, width / picture.width)
    wide, high = round(picture.width * scale), round(picture.height * scale)
    if wide * high > MAX_PIXELS:
        raise UserError(f"it is so long and thin that scaled to {wide} x {high} it has more than {MAX_PIXELS} pixels")
    array = np.asarray(picture.resize((wide, high), Image.Resampling.BOX))
    top, left = (high - height) // 2, (wide - width) // 2
    return array[top : top + height, left : left + width]


def end_with_parent() -> None:
    """Have this worker process end when the one that started it was killed, and could not end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
