"""The content of image files: pictures, whole or at a part of their size, maps of classes and masks.

A content is the bytes of a file, or an array [H, W] or [H, W, C] of numbers. Pillow's own errors come out as they are.

A mask is read by one rule from whatever numbers a file holds. Of two numbers the greater one is white. More than two
are shades between black and white, and white begins in the middle. A single one is black if it is 0, else white. Of a
picture of one colour, its transparency is the mask.

Shapes: H W space, C channels.
"""

from __future__ import annotations

import contextlib
import io
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from ..runtime import files
from ..runtime.errors import UserError, as_user_error, refuse
from .crops import MAX_PIXELS, Picture, size_of

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP")  # in files of whatever name: not EPS, which is a program
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
Content = bytes | NDArray[Any]
Range = tuple[float, float]  # the numbers that black and white are
SIDEWAYS = (5, 6, 7, 8)  # values of EXIF's orientation that swap height and width
REDUCTIONS = (8, 4, 2)  # pixels in a row of which libjpeg can make one


class Decoded(NamedTuple):
    """A picture, and the (height, width) that it has in its file, upright."""

    picture: Picture
    size: tuple[int, int]


def decode(
    content: Content,
    extension: str,
    channels: int,
    at_least: tuple[int, int] | None = None,
    data_range: Range | None = None,
) -> Decoded:
    """A picture of `channels` channels, as `sources.read_image` describes it.

    :param at_least: (height, width): a JPEG is decoded at a half, a quarter or an eighth of its size where that covers
        it. Pixels then differ a little from those of halving the whole picture.
    """
    array, size = array_in(content, extension), None
    if array is not None:
        picture = _decode_array(array, channels, data_range)
    else:
        image = opened(io.BytesIO(bytes(content)))
        if at_least and isinstance(image, JpegImageFile):
            size = _upright_size(image)
            image = _reduced(image, size, at_least)
        picture = _decode_image(image, channels, data_range)
    return Decoded(picture, size or size_of(picture))


def size_in(file: IO[bytes], extension: str) -> tuple[int, int]:
    """(height, width) of a picture, upright, of which the header alone is read."""
    if extension != ".npy":
        return _upright_size(opened(file))
    shape = files.read_header(file).shape
    return shape[0], shape[1]


def decode_ids(content: Content, extension: str) -> NDArray[np.float32]:
    """A map of classes, as `sources.read_ids` describes it."""
    array = array_in(content, extension)
    if array is None:
        image = upright(content)
        if image.format == "JPEG" or image.mode not in ("1", "L", "P", "I", "I;16", "I;16L", "I;16B"):
            raise UserError(f"a {image.format} of mode {image.mode}, where maps of classes are PNG, grey or palette")
        array = np.asarray(image)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "biu" or np.abs(array.astype(np.int64)).max(initial=0) >= 2**24:
        raise UserError(f"numbers {array.shape} of {array.dtype}, where maps of classes are [H, W] of small integers")
    check_pixels(array.shape[1], array.shape[0])
    return array[..., None].astype(np.float32)


def array_in(content: Content, extension: str) -> NDArray[Any] | None:
    """The array of an .npy, or one that is read already; None for a picture."""
    if isinstance(content, bytes):
        return files.read_array(content) if extension == ".npy" else None
    return content


def upright(content: Content) -> Image.Image:
    """The picture in the bytes of a file, turned by its EXIF tag; its `format` is that of the file."""
    return _turned(opened(io.BytesIO(bytes(content))))


def _turned(image: Image.Image) -> Image.Image:
    image.load()
    with contextlib.suppress(Exception):  # a damaged EXIF block takes nothing from the picture itself
        ImageOps.exif_transpose(image, in_place=True)
    return image


def opened(file: IO[bytes]) -> Image.Image:
    """A picture of which the header is read."""
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # Pillow's own limit came first
    with as_user_error(f"it has too many pixels, more than {MAX_PIXELS} are not read", *bombs):
        image = Image.open(file, formats=FORMATS)
    check_pixels(image.width, image.height)
    return image


def check_pixels(width: int, height: int) -> None:
    """Refuse pictures that are empty or too large."""
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"it has {width} x {height} pixels, where 1 to {MAX_PIXELS} are read")


def _reduced(image: JpegImageFile, size: tuple[int, int], at_least: tuple[int, int]) -> Image.Image:
    """A JPEG, decoded at the smallest part of its size that still covers what is needed."""
    part = next((n for n in REDUCTIONS if size[0] >= n * at_least[0] and size[1] >= n * at_least[1]), 1)
    smaller, box = (image.width // part, image.height // part), (0, 0, image.width / part, image.height / part)
    if part == 1 or image.draft(None, smaller) is None:
        return image
    # the decoder rounds sizes up, halving rounds them down and stretches what is odd: so does this, to the same places
    return image.resize(smaller, Image.Resampling.BICUBIC, box)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = False
    if "exif" in image.info or not isinstance(image, PngImageFile):  # else Pillow looks for one behind the pixels
        with contextlib.suppress(Exception):
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    return (image.width, image.height) if turned else (image.height, image.width)


def _decode_array(array: NDArray[Any], channels: int, data_range: Range | None) -> Picture:
    array = array[..., None] if array.ndim == 2 else array
    refuse((array.ndim != 3, f"an array of shape {array.shape}, where [H, W] or [H, W, C] is read"))
    check_pixels(array.shape[1], array.shape[0])
    if array.dtype == np.uint8 and channels in MODES and array.shape[-1] in MODES:
        image = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))
        return _in_range(_convert(image, channels), data_range)
    return _with_channels(_planes(array, data_range), channels)


def _decode_image(image: Image.Image, channels: int, data_range: Range | None) -> Picture:
    image = _turned(image)
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return _in_range(_convert(image, channels), data_range)
    array = np.asarray(image)[..., None]
    if image.mode == "I" and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)  # how Pillow hands out some 16 bit greys
    return _with_channels(_planes(array, data_range), channels)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if channels not in MODES:
        raise UserError(f"a picture of mode {image.mode}, where image_channels {channels} is read from .npy alone")
    mode = MODES[channels]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif mode == "RGBA":
        image = image.convert("RGB")  # Pillow knows no way from CMYK to RGBA but this
    return image if image.mode == mode else image.convert(mode)


def _in_range(image: Image.Image, data_range: Range | None) -> Picture:
    """A picture of bytes, as planes where other bytes than 0 and 255 are black and white."""
    if data_range is None or data_range == (0, 255) or not _of_bytes(data_range):
        return image
    return _planes(np.atleast_3d(np.asarray(image)), data_range)


def _of_bytes(data_range: Range) -> bool:
    """Whether a range may be that of bytes; one of finer numbers leaves bytes as they are."""
    return data_range[0] >= 0 and data_range[1] <= 255


def _planes(array: NDArray[Any], data_range: Range | None) -> NDArray[np.float32]:
    """Numbers of the declared range, or of their type's, in [-1, 1]; those outside a declared range are clipped."""
    finite = array.dtype.kind != "f" or bool(np.isfinite(array).all())
    refuse((data_range is not None and not finite, "numbers that are not finite"))
    if data_range is not None and array.dtype.kind in "iuf" and (array.dtype != np.uint8 or _of_bytes(data_range)):
        black, white = data_range
        planes = (array.astype(np.float64) - black) * (2 / (white - black)) - 1
        return np.clip(planes, -1, 1).astype(np.float32)
    if array.dtype.kind == "f":
        if not finite or np.abs(array).max(initial=0) > 1:
            raise UserError("floats outside [-1, 1], their range: --data_range LOW,HIGH names another")
        return array.astype(np.float32)
    top = {"b1": 1, "u1": 255, "u2": 65535}.get(array.dtype.str[1:])
    if top is None:
        raise UserError(f"numbers of type {array.dtype}: --data_range LOW,HIGH names their range")
    return array.astype(np.float32) / np.float32(top / 2) - 1


def _with_channels(planes: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    if planes.shape[-1] == 1 and channels in (3, 4):
        planes = np.repeat(planes, 3, -1)
    if planes.shape[-1] == 3 and channels == 4:
        planes = np.concatenate([planes, np.ones_like(planes[..., :1])], -1)
    if planes.shape[-1] != channels:
        raise UserError(f"{planes.shape[-1]} channels, where image_channels is {channels} (an array is [H, W, C])")
    return planes


TOPS = (1, 255, 65535)  # white, of shades in files of numbers


def decode_mask(content: Content, extension: str) -> Image.Image:
    """The mask in a file, 8 bit grey, above 127 white; an error where it is not clear what is black and what white."""
    array = array_in(content, extension)
    plane = _plane(_numbers_of(upright(content)) if array is None else array)
    values = np.unique(plane)
    low, high = (value.item() for value in values[[0, -1]])
    if len(values) < 3:
        return _picture(plane == high if len(values) == 2 else plane != 0)
    top = {"u1": 255, "u2": 65535}.get(plane.dtype.str[1:]) or next((top for top in TOPS if high <= top), TOPS[-1])
    bottom = -top if low < 0 else 0
    middle = (bottom + top) / 2
    place = f"all on one side of {middle:g}, the middle of {bottom:g} .. {top:g}"
    fault = f"{len(values)} values from {low:g} to {high:g}, {place}"
    unclear = not bottom <= low <= middle < high <= top
    refuse((unclear, f"{fault}: a mask has two values, or shades from black to white"))
    return Image.fromarray(plane) if plane.dtype == np.uint8 else _picture(plane > middle)


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
    refuse(
        (array.ndim != 2, f"numbers of shape {array.shape}, where masks are [H, W]"),
        (array.dtype.kind == "f" and not np.isfinite(array).all(), "some of its numbers are not finite"),
    )
    check_pixels(array.shape[1], array.shape[0])
    return array


def _picture(white: NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(white.astype(np.uint8) * np.uint8(255))
