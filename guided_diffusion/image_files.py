"""Pictures where they lie: finding files in folders, zips and buckets, and decoding them.

A path may lead into a zip: ``pets.zip/cat/1.png`` is the member ``cat/1.png`` of ``pets.zip``. Members are decoded in
memory, and their names never become names on the disk. What cannot be taken is passed over and listed when files are
found, and an `UnreadableImage` when they are read.

Shapes: H W space, C channels.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import blobfile as bf
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from guided_diffusion import untrusted
from guided_diffusion.crops import MAX_PIXELS, Picture
from guided_diffusion.untrusted import is_remote, printable, quoted, reason

T = TypeVar("T")

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP")  # in files of whatever name: not EPS, which is a program
LABEL_FILES = {"json": "dataset.json", "csv": "labels.csv"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_OPEN_ARCHIVES = 32


class UnreadableImage(ValueError):
    """A file with an image's name that is none, or not the kind asked for."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"cannot read image {quoted(self.path)}: {self.reason}; repair or remove it"


# ---- finding and reading


def _is_file(path: str) -> bool:
    return bf.exists(path) and not bf.isdir(path) if is_remote(path) else os.path.isfile(path)


_archives: dict[tuple[int, str], zipfile.ZipFile] = {}


def _archive(path: str) -> zipfile.ZipFile:
    """The open zip of this process: a handle inherited through fork would share its file position with the parent."""
    key = os.getpid(), path
    if key not in _archives:
        while len(_archives) >= MAX_OPEN_ARCHIVES:
            del _archives[next(iter(_archives))]
        try:
            _archives[key] = untrusted.open_archive(path)
        except ValueError as error:
            raise ValueError(f"{path!r} is not a readable zip ({error}); make it again, or give a folder") from error
    return _archives[key]


def split_archive(path: str) -> tuple[str, str] | None:
    """(zip, member) of a path that leads into a zip, with member "" for the zip itself; None for any other path."""
    for end in (found.end() for found in re.finditer(r"\.zip(?=/|$)", path, re.IGNORECASE)):
        if (os.getpid(), path[:end]) in _archives or _is_file(path[:end]):
            return path[:end], path[end + 1 :]
    return None


def read_bytes(path: str) -> bytes:
    """The content of a file on the disk, in a bucket or in a zip.

    :raises ValueError: if it is too large, no regular file, or a member of a zip that cannot be unpacked.
    """
    inside = split_archive(path)
    return untrusted.read_member(_archive(inside[0]), inside[1]) if inside else untrusted.read_file(path)


@dataclass
class _Found:
    """Names of files, and (name, reason) of what was passed over."""

    names: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def take(self, name: str, fault: str) -> None:
        """A file, unless there is something wrong with it."""
        if fault:
            self.refused.append((name, fault))
        else:
            self.names.append(name)


def _members(archive: str, folder: str = "") -> _Found:
    """The files of a zip below one of its folders, by names relative to that folder; label files are not examined."""
    _archives.pop((os.getpid(), archive), None)  # the file may have been rewritten since it was opened
    start, found = folder.rstrip("/") + "/" if folder else "", _Found()
    opened = _archive(archive)
    for member in opened.infolist():
        name = member.filename
        if name.startswith(start) and not name.endswith("/"):
            twice = "" if opened.NameToInfo[name] is member else "of the same name as a later one"
            found.take(name[len(start) :], twice or (untrusted.member_fault(member) if _is_image(name) else ""))
    return found


Entry = tuple[str, str]  # name, and what it is: "folder", "link", "file", or why it is not taken


def _entries(folder: str) -> Iterable[Entry]:
    """Everything in a folder, by name."""
    if is_remote(folder):
        return sorted((entry.name.rstrip("/"), "folder" if entry.is_dir else "file") for entry in bf.scandir(folder))
    with os.scandir(folder) as entries:
        return sorted((entry.name, _kind(entry)) for entry in entries)


def _kind(entry: os.DirEntry[str]) -> str:
    fault = untrusted.name_fault(entry.name)
    try:
        if fault or entry.is_file():
            return fault or "file"
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
    except OSError as error:  # a link to itself
        return f"cannot be read ({reason(error)})"
    return "no regular file"


def _identity(folder: str) -> Any:
    if is_remote(folder):
        return folder
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _files_below(root: str) -> _Found:
    """The files of a folder and the folders in it, each of which is read once.

    Links to folders are followed after all else and in the order of their names, so that neither a circle of them nor
    many ways to one place lead to a file twice.
    """
    found, seen = _Found(), set[Any]()
    folders, links = [""], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            identity = _identity(f"{root}/{folder}")
            entries = () if identity in seen else _entries(f"{root}/{folder}")
        except OSError as error:
            found.refused.append((folder, f"a folder that cannot be read ({reason(error)})"))
            continue
        if identity in seen:
            found.refused.append((folder, "a link to a folder that is read already"))
        seen.add(identity)
        for name, kind in entries:
            if kind in ("folder", "link"):
                (folders if kind == "folder" else links).append(f"{folder}{name}/")
            else:
                found.take(folder + name, "" if kind == "file" else kind)
        links.sort()
    return found


def _is_hidden(name: str) -> bool:
    """True for what a system leaves beside pictures: ``._1.png``, ``.thumbnails/``, ``__MACOSX/``."""
    return any(re.match(r"\.[^.]|__MACOSX$", part) for part in name.split("/"))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return _extension(name) in IMAGE_EXTENSIONS and not _is_hidden(name)


@dataclass(frozen=True)
class Listing:
    """What a folder or a zip holds: names relative to `root`, "/" between folders, in the order of their parts.

    :param refused: (name, reason) of what is never read: see `image_files`.
    """

    root: str
    images: list[str]
    others: list[str]
    refused: list[tuple[str, str]] = field(default_factory=list)

    def path(self, name: str) -> str:
        """The path that `read_bytes` takes."""
        return f"{self.root.rstrip('/')}/{name}"

    def skipped(self) -> str:
        """How many files are no images, by extension, or are not taken, by reason."""
        kinds = Counter(
            "hidden" if _is_hidden(name) else printable(_extension(name)) or "no extension"
            for name in self.others
            if os.path.basename(name) not in LABEL_FILES.values()
        ) + Counter(fault for _, fault in self.refused)
        detail = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
        return f"skipped {kinds.total()}" + (f" ({detail})" if detail else "")

    def summary(self, shown: int = 5) -> str:
        """The lines that tell a user what was found, and what was not taken."""
        lines = [f"{self.root}: found {len(self.images)} images, {self.skipped()}"]
        lines += [f"  skipped {quoted(name)}: {fault}" for name, fault in self.refused[:shown]]
        more = len(self.refused) - shown
        return "\n".join([*lines, *[f"  and {more} more that are not taken"] * (more > 0)])


def find_images(data_dir: str) -> Listing:
    """Everything below a folder, a zip or a folder in a zip.

    Zips in a folder are entered only where the folder holds no picture itself: beside pictures they are copies of them.

    :raises ValueError: if there is no such folder or zip, or it cannot be read.
    """
    root = data_dir if len(data_dir) < 2 else data_dir.rstrip("/")
    inside = split_archive(root)
    if inside:
        found = _members(*inside)
    elif root and (bf.isdir(root) if is_remote(root) else os.path.isdir(root)):
        found = _files_below(root)
        _enter_archives(root, found)
    else:
        raise ValueError(
            f"data_dir {quoted(data_dir)} is neither a folder nor a zip; give the path of one that holds images"
        )
    for name, fault in found.refused:
        if not name:
            raise ValueError(f"data_dir {quoted(data_dir)} is {fault}; give one that can be read")
    names = sorted(found.names, key=lambda name: name.split("/"))
    images = [name for name in names if _is_image(name)]
    return Listing(root, images, [name for name in names if not _is_image(name)], sorted(found.refused))


def _enter_archives(root: str, found: _Found) -> None:
    """Replace the zips of a folder without pictures by what is in them."""
    if any(map(_is_image, found.names)):
        return
    zips = [name for name in found.names if _extension(name) == ".zip" and not _is_hidden(name)]
    for archive in zips:
        inner = _members(f"{root}/{archive}")
        found.names += [f"{archive}/{name}" for name in inner.names]
        found.refused += [(f"{archive}/{name}", fault) for name, fault in inner.refused]
    entered = set(zips)
    found.names = [name for name in found.names if name not in entered]


# ---- decoding


def read_image(path: str, channels: int) -> Picture:
    """A picture of `channels` channels: alpha laid on white (kept with 4 channels), turned upright by its EXIF tag.

    8 bits stay 8 bits. 16 bit greys cover 0 .. 65535. An .npy is [H, W] or [H, W, C]: uint8, uint16 and bool cover
    their whole range, floats lie in [-1, 1].

    :raises UnreadableImage: naming the file and what is wrong with it.
    """
    return _read(path, lambda content, extension: decode(content, extension, channels))


def read_ids(path: str) -> NDArray[np.float32]:
    """A map of classes, whole numbers [H, W, 1]: grey values or places in a palette, or an .npy [H, W] of integers.

    :raises UnreadableImage: naming the file and what is wrong with it.
    """
    return _read(path, _decode_ids)


def _read(path: str, decoder: Callable[[bytes, str], T]) -> T:
    try:
        content = read_bytes(path)
        if not content:
            raise ValueError("it is empty")
        return decoder(content, _extension(path))
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "its content is no image") from error
    except Exception as error:  # Pillow does not say what it raises on a damaged file
        raise UnreadableImage(path, reason(error)) from error


def decode(content: bytes, extension: str, channels: int) -> Picture:
    """What `read_image` makes of the content of a file; whatever Pillow raises on a damaged one comes out as it is."""
    if extension == ".npy":
        return _decode_array(untrusted.read_array(content), channels)
    return _decode_picture(_open(content), channels)


def _decode_ids(content: bytes, extension: str) -> NDArray[np.float32]:
    if extension == ".npy":
        array = untrusted.read_array(content)
    else:
        image = _open(content)
        if image.format == "JPEG" or image.mode not in ("1", "L", "P", "I", "I;16", "I;16L", "I;16B"):
            raise ValueError(f"a {image.format} of mode {image.mode}, where maps of classes are PNG, grey or palette")
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        array = np.asarray(image)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "biu" or np.abs(array.astype(np.int64)).max(initial=0) >= 2**24:
        raise ValueError(f"numbers {array.shape} of {array.dtype}, where maps of classes are [H, W] of small integers")
    _check_pixels(array.shape[1], array.shape[0])
    return array[..., None].astype(np.float32)


def _open(content: bytes) -> Image.Image:
    """A picture, loaded."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_pixels(image.width, image.height)
        image.load()
        return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limit came first
        raise ValueError(f"it has too many pixels, more than {MAX_PIXELS} are not read") from error


def _check_pixels(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, where 1 to {MAX_PIXELS} are read")


def _decode_array(array: NDArray[Any], channels: int) -> Picture:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape}, where [H, W] or [H, W, C] is read")
    _check_pixels(array.shape[1], array.shape[0])
    if array.dtype == np.uint8 and channels in MODES and array.shape[-1] in MODES:
        return _convert(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), channels)
    return _with_channels(_planes(array), channels)


def _decode_picture(image: Image.Image, channels: int) -> Picture:
    with contextlib.suppress(Exception):  # a damaged EXIF block takes nothing from the picture itself
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
