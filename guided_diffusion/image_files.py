"""Pictures where they lie: finding files in folders, zips and buckets, decoding them, and cropping to size.

A path may lead into a zip: ``pets.zip/cat/1.png`` is the member ``cat/1.png`` of ``pets.zip``. Members are decoded in
memory, and their names never become names on the disk.

Shapes: H W space, C channels. A size is 64, "64x128" or (64, 128): height before width.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import blobfile as bf
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from guided_diffusion.config import Size, parse_size

Picture = Image.Image | NDArray[np.float32]  # 8 bit as PIL has it; anything finer as planes [H, W, C] in [-1, 1]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy")
LABEL_FILES = {"json": "dataset.json", "csv": "labels.csv"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_OPEN_ARCHIVES = 32


class UnreadableImage(ValueError):
    """A file with an image's name that is none, or not the kind asked for."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read image {path!r}: {reason}; repair or remove it")
        self.path, self.reason = path, reason


# ---- finding and reading


def _is_remote(path: str) -> bool:
    return "://" in path


def _is_file(path: str) -> bool:
    return bf.exists(path) and not bf.isdir(path) if _is_remote(path) else os.path.isfile(path)


def _open(path: str) -> BinaryIO:
    # streaming: a zip in a bucket is read piece by piece instead of being copied to the disk first
    return bf.BlobFile(path, "rb", streaming=True) if _is_remote(path) else open(path, "rb")


_archives: dict[tuple[int, str], zipfile.ZipFile] = {}


def _archive(path: str) -> zipfile.ZipFile:
    """The open zip of this process: a handle inherited through fork would share its file position with the parent."""
    key = os.getpid(), path
    if key not in _archives:
        while len(_archives) >= MAX_OPEN_ARCHIVES:
            del _archives[next(iter(_archives))]
        try:
            _archives[key] = zipfile.ZipFile(path if not _is_remote(path) else _open(path))
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path!r} is not a readable zip ({error}); make it again, or give a folder") from error
    return _archives[key]


def split_archive(path: str) -> tuple[str, str] | None:
    """(zip, member) of a path that leads into a zip, with member "" for the zip itself; None for any other path."""
    for end in (found.end() for found in re.finditer(r"\.zip(?=/|$)", path, re.IGNORECASE)):
        if (os.getpid(), path[:end]) in _archives or _is_file(path[:end]):
            return path[:end], path[end + 1 :]
    return None


def read_bytes(path: str) -> bytes:
    """The content of a file on the disk, in a bucket or in a zip."""
    inside = split_archive(path)
    if inside:
        return _archive(inside[0]).read(inside[1])
    with _open(path) as file:
        return file.read()


def _members(archive: str, folder: str = "") -> Iterator[str]:
    """Names of the files of a zip below one of its folders, relative to that folder."""
    _archives.pop((os.getpid(), archive), None)  # the file may have been rewritten since it was opened
    start = folder.rstrip("/") + "/" if folder else ""
    for name in dict.fromkeys(_archive(archive).namelist()):
        if name.startswith(start) and not name.endswith("/"):
            yield name[len(start) :]


def _entries(folder: str) -> Iterable[tuple[str, bool]]:
    """(name, whether it is a folder) of everything in a folder."""
    if _is_remote(folder):
        return [(entry.name.rstrip("/"), entry.is_dir) for entry in bf.scandir(folder)]
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir()) for entry in entries]


def _files_below(root: str, folder: str = "") -> Iterator[str]:
    for name, is_folder in _entries(f"{root}/{folder}"):
        if is_folder:
            yield from _files_below(root, f"{folder}{name}/")
        else:
            yield folder + name


def _is_hidden(name: str) -> bool:
    """True for what a system leaves beside pictures: ``._1.png``, ``.thumbnails/``, ``__MACOSX/``."""
    return any(re.match(r"\.[^.]|__MACOSX$", part) for part in name.split("/"))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return _extension(name) in IMAGE_EXTENSIONS and not _is_hidden(name)


@dataclass(frozen=True)
class Listing:
    """What a folder or a zip holds: names relative to `root`, "/" between folders, in the order of their parts."""

    root: str
    images: list[str]
    others: list[str]

    def path(self, name: str) -> str:
        """The path that `read_bytes` takes."""
        return f"{self.root.rstrip('/')}/{name}"

    def skipped(self) -> str:
        """How many files are no images, by extension."""
        kinds = Counter(
            "hidden" if _is_hidden(name) else _extension(name) or "no extension"
            for name in self.others
            if os.path.basename(name) not in LABEL_FILES.values()
        )
        detail = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
        return f"skipped {kinds.total()}" + (f" ({detail})" if detail else "")

    def summary(self) -> str:
        """The line that tells a user what was found."""
        return f"{self.root}: found {len(self.images)} images, {self.skipped()}"


def find_images(data_dir: str) -> Listing:
    """Everything below a folder, a zip or a folder in a zip.

    Zips in a folder are entered only where the folder holds no picture itself: beside pictures they are copies of them.

    :raises ValueError: if there is no such folder or zip.
    """
    root = data_dir if len(data_dir) < 2 else data_dir.rstrip("/")
    inside = split_archive(root)
    if inside:
        names = list(_members(*inside))
    elif root and (bf.isdir(root) if _is_remote(root) else os.path.isdir(root)):
        names = _with_archives(root, list(_files_below(root)))
    else:
        raise ValueError(f"data_dir {data_dir!r} is neither a folder nor a zip; give the path of one that holds images")
    names.sort(key=lambda name: name.split("/"))
    images = [name for name in names if _is_image(name)]
    return Listing(root, images, [name for name in names if not _is_image(name)])


def _with_archives(root: str, names: list[str]) -> list[str]:
    if any(map(_is_image, names)):
        return names
    zips = [name for name in names if _extension(name) == ".zip" and not _is_hidden(name)]
    members = [f"{name}/{member}" for name in zips for member in _members(f"{root}/{name}")]
    return members + [name for name in names if name not in set(zips)]


# ---- decoding


def read_image(path: str, channels: int) -> Picture:
    """A picture of `channels` channels: alpha laid on white (kept with 4 channels), turned upright by its EXIF tag.

    8 bits stay 8 bits. 16 bit greys cover 0 .. 65535. An .npy is [H, W] or [H, W, C]: uint8, uint16 and bool cover
    their whole range, floats lie in [-1, 1].

    :raises UnreadableImage: naming the file and what is wrong with it.
    """
    try:
        data = io.BytesIO(read_bytes(path))
        if _extension(path) == ".npy":
            return _decode_array(np.lib.format.read_array(data, allow_pickle=False), channels)
        return _decode_picture(Image.open(data), channels)
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "its content is no image") from error
    except Exception as error:  # Pillow and zipfile do not say what they raise on a damaged file
        raise UnreadableImage(path, str(error).partition("\n")[0] or type(error).__name__) from error


def find_unreadable(paths: Iterable[str], channels: int) -> list[UnreadableImage]:
    """What is wrong with those of the files that `read_image` refuses."""
    found = []
    for path in paths:
        try:
            read_image(path, channels)
        except UnreadableImage as error:
            found.append(error)
    return found


def _decode_array(array: NDArray[Any], channels: int) -> Picture:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape}, where [H, W] or [H, W, C] is read")
    if array.dtype == np.uint8 and channels in MODES and array.shape[-1] in MODES:
        return _convert(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), channels)
    return _with_channels(_planes(array), channels)


def _decode_picture(image: Image.Image, channels: int) -> Picture:
    image.load()
    with contextlib.suppress(SyntaxError):  # a damaged EXIF block takes nothing from the picture itself
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return _convert(image, channels)
    array = np.asarray(image)[..., None]
    if image.mode == "I" and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)  # how Pillow hands out some 16 bit greys
    return _with_channels(_planes(array), channels)


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


def _planes(array: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers of any declared range -> [-1, 1]."""
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and np.abs(array).max(initial=0) <= 1):
            raise ValueError("floats outside [-1, 1], the range that floats must have")
        return array.astype(np.float32)
    top = {"b1": 1, "u1": 255, "u2": 65535}.get(array.dtype.str[1:])
    if top is None:
        raise ValueError(f"numbers of type {array.dtype}, where uint8, uint16, bool or floats in [-1, 1] are read")
    return array.astype(np.float32) / np.float32(top / 2) - 1


def _with_channels(planes: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    if planes.shape[-1] == 1 and channels in (3, 4):
        planes = np.repeat(planes, 3, -1)
    if planes.shape[-1] == 3 and channels == 4:
        planes = np.concatenate([planes, np.ones_like(planes[..., :1])], -1)
    if planes.shape[-1] != channels:
        raise ValueError(f"{planes.shape[-1]} channels, where image_channels is {channels}")
    return planes


# ---- crops


class Draws(Protocol):
    """What crops and flips need of `random` or of a `random.Random`."""

    def random(self) -> float: ...

    def randrange(self, start: int, stop: int | None = None) -> int: ...


def center_crop_arr(pil_image: Picture, image_size: Size) -> NDArray[Any]:
    """The middle of a picture that was scaled until it just covers the size.

    :param pil_image: a PIL image, or planes [H, W, C] of float32.
    :return: [H, W] or [H, W, C], as numpy sees the picture's mode.
    """
    height, width = parse_size(image_size)
    array = _cover(pil_image, height, width)
    return _window(array, (array.shape[0] - height) // 2, (array.shape[1] - width) // 2, height, width)


def random_crop_arr(
    pil_image: Picture,
    image_size: Size,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    *,
    rng: Draws | None = None,
) -> NDArray[Any]:
    """A window anywhere in a picture that was scaled to cover a little more than the size.

    :param min_crop_frac: the window's least share of the covered side; `max_crop_frac` its greatest, at most 1.
    :param rng: None draws from the module `random`: the scale, the top, the left.
    """
    if not 0 < min_crop_frac <= max_crop_frac <= 1:
        raise ValueError(
            f"crop fractions from {min_crop_frac} to {max_crop_frac} are no part of the picture; "
            "choose 0 < min_crop_frac <= max_crop_frac <= 1"
        )
    draws: Draws = random if rng is None else rng
    height, width = parse_size(image_size)
    short = min(height, width)
    side = draws.randrange(math.ceil(short / max_crop_frac), math.ceil(short / min_crop_frac) + 1)
    array = _cover(pil_image, -(-height * side // short), -(-width * side // short))
    top = draws.randrange(array.shape[0] - height + 1)
    left = draws.randrange(array.shape[1] - width + 1)
    return _window(array, top, left, height, width)


def _window(array: NDArray[Any], top: int, left: int, height: int, width: int) -> NDArray[Any]:
    return array[top : top + height, left : left + width]


def _cover(picture: Picture, height: int, width: int) -> NDArray[Any]:
    """Scale a picture, keeping its proportions, until one side fits exactly and the other is no shorter than asked."""
    if isinstance(picture, np.ndarray):
        return np.stack([_cover(Image.fromarray(plane), height, width) for plane in np.moveaxis(picture, -1, 0)], -1)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    size = round(picture.width * scale), round(picture.height * scale)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
