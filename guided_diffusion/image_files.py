"""Pictures where they lie: finding files in folders, zips and buckets, and reading them.

A path may lead into a zip: ``pets.zip/cat/1.png`` is the member ``cat/1.png`` of ``pets.zip``. Members are decoded in
memory, and their names never become names on the disk. What cannot be taken is passed over and listed when files are
found, and an `UnreadableImage` when they are read.

Shapes: H W space, C channels.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import blobfile as bf
import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from . import untrusted
from .archives import Archive
from .crops import Picture
from .decoding import Whole, decode_ids, decode_whole, size_in
from .untrusted import is_remote, printable, quoted, reason

T = TypeVar("T")

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy")
LABEL_FILES = {"json": "dataset.json", "csv": "labels.csv"}
MAX_OPEN_ARCHIVES = 512  # one for each class, often: to open a zip again is to read all of its directory again
EMPTY = "it is empty"


class UnreadableImage(ValueError):
    """A file with an image's name that is none, or not the kind asked for."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"cannot read image {quoted(self.path)}: {self.reason}; repair or remove it"


# ---- files


def _is_file(path: str) -> bool:
    return bf.exists(path) and not bf.isdir(path) if is_remote(path) else os.path.isfile(path)


_archives: dict[str, Archive] = {}


def _most_open() -> int:
    """Zips that may be open at once, which leave half of the handles of a process to all else."""
    try:
        import resource
    except ImportError:  # a system that sets no such limit
        return MAX_OPEN_ARCHIVES
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_ARCHIVES if limit == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_ARCHIVES, limit // 2))


def _archive(path: str) -> Archive:
    """The open zip, of which processes that are forked inherit the handle and the directory."""
    if path not in _archives:
        while len(_archives) >= _most_open():
            _archives.pop(next(iter(_archives))).close()
        try:
            _archives[path] = Archive(path)
        except ValueError as error:
            raise ValueError(f"{path!r} is not a readable zip ({error}); make it again, or give a folder") from error
    return _archives[path]


def split_archive(path: str) -> tuple[str, str] | None:
    """(zip, member) of a path that leads into a zip, with member "" for the zip itself; None for any other path."""
    for end in (found.end() for found in re.finditer(r"\.zip(?=/|$)", path, re.IGNORECASE)):
        if path[:end] in _archives or _is_file(path[:end]):
            return path[:end], path[end + 1 :]
    return None


def read_bytes(path: str) -> bytes:
    """The content of a file on the disk, in a bucket or in a zip.

    :raises ValueError: if it is too large, no regular file, or a member of a zip that cannot be unpacked.
    """
    inside = split_archive(path)
    return _archive(inside[0]).read(inside[1]) if inside else untrusted.read_file(path)


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
    known = _archives.pop(archive, None)
    if known is not None:  # the file may have been rewritten since it was opened
        known.close()
    start, found = folder.rstrip("/") + "/" if folder else "", _Found()
    for member, again in _archive(archive).members():
        name = member.filename
        if name.startswith(start) and not name.endswith("/"):
            twice = "of the same name as a later one" if again else ""
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


# ---- reading pictures


def read_image(path: str, channels: int) -> Picture:
    """A picture of `channels` channels: alpha laid on white (kept with 4 channels), turned upright by its EXIF tag.

    8 bits stay 8 bits. 16 bit greys cover 0 .. 65535. An .npy is [H, W] or [H, W, C]: uint8, uint16 and bool cover
    their whole range, floats lie in [-1, 1].

    :raises UnreadableImage: naming the file and what is wrong with it.
    """
    return read_whole(path, channels).picture


def read_whole(path: str, channels: int, at_least: tuple[int, int] | None = None) -> Whole:
    """What `read_image` gives, and its size; with `at_least`, JPEGs perhaps at a part of it: see `decoding`."""
    return _read(path, lambda content, extension: decode_whole(content, extension, channels, at_least))


def read_size(path: str) -> tuple[int, int]:
    """The (height, width) of a picture, from its header, which is all that is read of a file on the disk.

    :raises UnreadableImage: as `read_image` does, but for what is wrong behind the header.
    """
    if is_remote(path) or split_archive(path):
        return _read(path, lambda content, extension: size_in(io.BytesIO(content), extension))
    with _naming(path), untrusted.open_file(path) as file:
        if not untrusted.local_size(file):
            raise ValueError(EMPTY)
        return size_in(file, _extension(path))


def read_ids(path: str) -> NDArray[np.float32]:
    """A map of classes, whole numbers [H, W, 1]: grey values or places in a palette, or an .npy [H, W] of integers.

    :raises UnreadableImage: naming the file and what is wrong with it.
    """
    return _read(path, decode_ids)


def _read(path: str, decoder: Callable[[bytes, str], T]) -> T:
    with _naming(path):
        content = read_bytes(path)
        if not content:
            raise ValueError(EMPTY)
        return decoder(content, _extension(path))


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """What goes wrong is an `UnreadableImage`."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "its content is no image") from error
    except Exception as error:  # Pillow does not say what it raises on a damaged file
        raise UnreadableImage(path, reason(error)) from error
