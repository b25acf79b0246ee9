"""What the bytes of image files hold: pictures, whole or decoded at a part of their size, and maps of classes.

Whatever Pillow raises on a damaged file comes out as it is.

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
from .crops import MAX_PIXELS, Picture, size_of

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP")  # in files of whatever name: not EPS, which is a program
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
Range = tuple[float, float]  # the numbers that black and white are
SIDEWAYS = (5, 6, 7, 8)  # values of EXIF's orientation that swap height and width
PARTS = (8, 4, 2)  # pixels in a row of which libjpeg can make one
_TOO_MANY = f"it has too many pixels, more than {MAX_PIXELS} are not read"


class Whole(NamedTuple):
    """A picture, and the (height, width) that it has in its file, upright."""

    picture: Picture
    size: tuple[int, int]


def decode(content: bytes, extension: str, channels: int) -> Picture:
    """A picture, as `image_files.read_image` describes it."""
    return decode_whole(content, extension, channels).picture


def decode_whole(
    content: bytes,
    extension: str,
    channels: int,
    at_least: tuple[int, int] | None = None,
    data_range: Range | None = None,
) -> Whole:
    """A picture and its size.

    :param at_least: a (height, width) that is enough: a JPEG is then decoded at a half, a quarter or an eighth of its
        size where that covers it. Its pixels differ a little from those that halving it afterwards makes.
    """
    if extension == ".npy":
        picture = _decode_array(files.read_array(content), channels, data_range)
        return Whole(picture, size_of(picture))
    image = opened(io.BytesIO(content))
    if at_least and isinstance(image, JpegImageFile):
        size = _upright_size(image)
        return Whole(_decode_picture(_reduced(image, _parts(size, at_least)), channels, data_range), size)
    picture = _decode_picture(loaded(image), channels, data_range)
    return Whole(picture, size_of(picture))


def size_in(file: IO[bytes], extension: str) -> tuple[int, int]:
    """(height, width) of a picture, upright, without its pixels, of which no more than the header is read."""
    if extension != ".npy":
        return _upright_size(opened(file))
    shape = files.read_header(file).shape
    return shape[0], shape[1]


def decode_ids(content: bytes, extension: str) -> NDArray[np.float32]:
    """A map of classes, as `image_files.read_ids` describes it."""
    if extension == ".npy":
        array = files.read_array(content)
    else:
        image = loaded(opened(io.BytesIO(content)))
        if image.format == "JPEG" or image.mode not in ("1", "L", "P", "I", "I;16", "I;16L", "I;16B"):
            raise ValueError(f"a {image.format} of mode {image.mode}, where maps of classes are PNG, grey or palette")
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        array = np.asarray(image)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "biu" or np.abs(array.astype(np.int64)).max(initial=0) >= 2**24:
        raise ValueError(f"numbers {array.shape} of {array.dtype}, where maps of classes are [H, W] of small integers")
    check_pixels(array.shape[1], array.shape[0])
    return array[..., None].astype(np.float32)


def opened(file: IO[bytes]) -> Image.Image:
    """A picture of which the header is read."""
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limit came first
        raise ValueError(_TOO_MANY) from error
    check_pixels(image.width, image.height)
    return image


def loaded(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_TOO_MANY) from error
    return image


def _parts(size: tuple[int, int], at_least: tuple[int, int]) -> int:
    """Of how many pixels in a row one may be made: what is left covers all that is needed."""
    return next((n for n in PARTS if size[0] >= n * at_least[0] and size[1] >= n * at_least[1]), 1)


def _reduced(image: JpegImageFile, parts: int) -> Image.Image:
    """A JPEG of which the decoder makes one pixel of so many in a row."""
    size, box = (image.width // parts, image.height // parts), (0, 0, image.width / parts, image.height / parts)
    if parts == 1 or image.draft(None, size) is None:
        return loaded(image)
    # The decoder rounds sizes up, the last pixels being parts of some, and halving stretches what is odd over the lower
    # size: as this does, so that crops of either are of the same places.
    return loaded(image).resize(size, Image.Resampling.BICUBIC, box)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) once a picture is turned by its EXIF tag."""
    turned = False
    if "exif" in image.info or not isinstance(image, PngImageFile):  # else Pillow looks for one behind the pixels
        with contextlib.suppress(Exception):
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    return (image.width, image.height) if turned else (image.height, image.width)


def check_pixels(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, where 1 to {MAX_PIXELS} are read")


def _decode_array(array: NDArray[Any], channels: int, data_range: Range | None) -> Picture:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        more = ": give the path of an array of many by itself, not the folder that it lies in" * (array.ndim == 4)
        raise ValueError(f"an array of shape {array.shape}, where [H, W] or [H, W, C] is read{more}")
    check_pixels(array.shape[1], array.shape[0])
    if array.dtype == np.uint8 and channels in MODES and array.shape[-1] in MODES:
        image = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))
        return _in_range(_convert(image, channels), data_range)
    return _with_channels(_planes(array, data_range), channels)


def _in_range(image: Image.Image, data_range: Range | None) -> Picture:
    """A picture of bytes, as planes where black and white are others of them than 0 and 255."""
    if data_range is None or data_range == (0, 255) or not _of_bytes(data_range):
        return image
    array = np.asarray(image)
    return _planes(array[..., None] if array.ndim == 2 else array, data_range)


def _of_bytes(data_range: Range) -> bool:
    """Whether a range may be that of bytes: else it is that of finer numbers, and bytes have their own."""
    return data_range[0] >= 0 and data_range[1] <= 255


def _decode_picture(image: Image.Image, channels: int, data_range: Range | None) -> Picture:
    with contextlib.suppress(Exception):  # a damaged EXIF block takes nothing from the picture itself
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return _in_range(_convert(image, channels), data_range)
    array = np.asarray(image)[..., None]
    if image.mode == "I" and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)  # how Pillow hands out some 16 bit greys
    return _with_channels(_planes(array, data_range), channels)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if channels not in MODES:
        raise ValueError(f"a picture of mode {image.mode}, where image_channels {channels} is read from .npy alone")
    mode = MODES[channels]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif mode == "RGBA":
        image = image.convert("RGB")  # Pillow knows no way from CMYK to RGBA but this
    return image if image.mode == mode else image.convert(mode)


def _planes(array: NDArray[Any], data_range: Range | None) -> NDArray[np.float32]:
    """Numbers of any declared range -> [-1, 1]; what lies outside is clipped to it."""
    finite = array.dtype.kind != "f" or bool(np.isfinite(array).all())
    if data_range is not None and not finite:
        raise ValueError("numbers that are not finite")
    if data_range is not None and array.dtype.kind in "iuf" and (array.dtype != np.uint8 or _of_bytes(data_range)):
        black, white = data_range
        planes = (array.astype(np.float64) - black) * (2 / (white - black)) - 1
        return np.clip(planes, -1, 1).astype(np.float32)
    if array.dtype.kind == "f":
        if not finite or np.abs(array).max(initial=0) > 1:
            raise ValueError(
                "floats outside [-1, 1], the range that floats must have: --data_range LOW,HIGH names another"
            )
        return array.astype(np.float32)
    top = {"b1": 1, "u1": 255, "u2": 65535}.get(array.dtype.str[1:])
    if top is None:
        raise ValueError(
            f"numbers of type {array.dtype}, where uint8, uint16, bool or floats in [-1, 1] are read; --data_range "
            "LOW,HIGH says what others are"
        )
    return array.astype(np.float32) / np.float32(top / 2) - 1


def _with_channels(planes: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    if planes.shape[-1] == 1 and channels in (3, 4):
        planes = np.repeat(planes, 3, -1)
    if planes.shape[-1] == 3 and channels == 4:
        planes = np.concatenate([planes, np.ones_like(planes[..., :1])], -1)
    if planes.shape[-1] != channels:
        raise ValueError(f"{planes.shape[-1]} channels, where image_channels is {channels} (an array is [H, W, C])")
    return planes
