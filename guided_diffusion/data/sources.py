"""Pictures where they lie: finding files in folders, zips and buckets, and reading them.

A path may lead into a zip: ``pets.zip/cat/1.png`` is the member ``cat/1.png`` of ``pets.zip``; into an array of images
too: ``train.npy/000007.npy`` is the eighth of them. Members are decoded in memory, and their names never become names
on the disk. What cannot be taken is passed over and listed when files are
found, and an `UnreadableImage` when they are read.

Shapes: H W space, C channels.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from ..runtime import files, paths
from ..runtime.files import printable, quoted, reason
from ..runtime.paths import is_remote
from .archives import Archive, Numbered, Stack, is_stack
from .crops import Picture
from .decoding import Range, Whole, decode_ids, decode_whole, size_in
from .masks import Mask, decode_mask

T = TypeVar("T")

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy")
LABEL_FILES = {"json": ("dataset.json", "metadata.jsonl"), "csv": ("labels.csv", "labels.tsv", "metadata.csv")}
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
    return paths.exists(path) and not paths.isdir(path)


_archives: dict[str, Archive | Stack] = {}


def _most_open() -> int:
    """Zips that may be open at once, which leave half of the handles of a process to all else."""
    try:
        import resource
    except ImportError:  # a system that sets no such limit
        return MAX_OPEN_ARCHIVES
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_ARCHIVES if limit == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_ARCHIVES, limit // 2))


def _archive(path: str, channels: int = 0) -> Archive | Stack:
    """The open zip, of which processes that are forked inherit the handle and the directory, or the array."""
    if path not in _archives:
        while len(_archives) >= _most_open():
            _archives.pop(next(iter(_archives))).close()
        kind, what = (Archive, "zip") if path.lower().endswith(".zip") else (Stack, "array of images")
        try:
            _archives[path] = Archive(path) if kind is Archive else Stack(path, channels)
        except (OSError, ValueError) as error:
            if path in str(error):
                raise
            raise ValueError(f"{path!r} is not a readable {what} ({error}); make it again, or give a folder") from error
    return _archives[path]


def split_archive(path: str) -> tuple[str, str] | None:
    """(zip, member) of a path that leads into a zip or an array, with member "" for the zip itself; else None."""
    for end in (found.end() for found in re.finditer(r"\.zip(?=/|$)|\.np[yz](?=/)", path, re.IGNORECASE)):
        if path[:end] in _archives or _is_file(path[:end]):
            return path[:end], path[end + 1 :]
    return None


def read_bytes(path: str) -> bytes:
    """The content of a file on the disk, in a bucket or in a zip.

    :raises ValueError: if it is too large, no regular file, or a member of a zip that cannot be unpacked.
    """
    inside = split_archive(path)
    return _archive(inside[0]).read(inside[1]) if inside else files.read_file(path)


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


def _reopened(path: str, channels: int = 0) -> Archive | Stack:
    """A zip or array that may have been rewritten since it was opened."""
    known = _archives.pop(path, None)
    if known is not None:
        known.close()
    return _archive(path, channels)


def _members(path: str, folder: str = "") -> _Found:
    """The files of a zip below one of its folders, by names relative to that folder; label files are not examined."""
    start, found = folder.rstrip("/") + "/" if folder else "", _Found()
    archive = _reopened(path)
    for name, again, fault in archive.members() if isinstance(archive, Archive) else ():
        if name.startswith(start) and not name.endswith("/"):
            twice = "of the same name as a later one" if again else ""
            found.take(name[len(start) :], twice or (fault if _is_image(name) else ""))
    return found


Entry = tuple[str, str]  # name, and what it is: "folder", "link", "file", or why it is not taken


def _entries(folder: str) -> Iterable[Entry]:
    """Everything in a folder, by name."""
    if is_remote(folder):
        return [(name, "folder" if is_dir else "file") for name, is_dir in paths.folders_and_files(folder)]
    with os.scandir(folder) as entries:
        return sorted((entry.name, _kind(entry)) for entry in entries)


def _kind(entry: os.DirEntry[str]) -> str:
    fault = files.name_fault(entry.name)
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
    :param array: `root` is an array of images, whose numbers are their names.
    :param ids: [N] class ids that lie beside an array.
    """

    root: str
    images: Sequence[str]
    others: list[str]
    refused: list[tuple[str, str]] = field(default_factory=list)
    array: bool = False
    ids: list[int] | None = None

    def path(self, name: str) -> str:
        """The path that `read_bytes` takes."""
        return f"{self.root.rstrip('/')}/{name}"

    def skipped(self) -> str:
        """How many files are no images, by extension, or are not taken, by reason."""
        kinds = Counter(
            "hidden" if _is_hidden(name) else printable(_extension(name)) or "no extension"
            for name in self.others
            if os.path.basename(name) not in [*LABEL_FILES["csv"], *LABEL_FILES["json"]]
        ) + Counter(fault for _, fault in self.refused)
        detail = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
        return f"skipped {kinds.total()}" + (f" ({detail})" if detail else "")

    def summary(self, shown: int = 5) -> str:
        """The lines that tell a user what was found, and what was not taken."""
        lines = [f"{self.root}: found {len(self.images)} images, {self.skipped()}"]
        lines += [f"  skipped {quoted(name)}: {fault}" for name, fault in self.refused[:shown]]
        more = len(self.refused) - shown
        return "\n".join([*lines, *[f"  and {more} more that are not taken"] * (more > 0)])


def find_images(data_dir: paths.AnyPath, channels: int = 0) -> Listing:
    """Everything below a folder, a zip or a folder in a zip, or the images of an array (.npy, .npz).

    Zips in a folder are entered only where the folder holds no picture itself: beside pictures they are copies of them.

    :param channels: of the images of an .npy, where they are others than 1, 3 or 4.
    :raises ValueError: if there is no such folder, zip or array, or it cannot be read.
    """
    root = paths.resolve(data_dir)
    root = root if len(root) < 2 else root.rstrip("/")
    inside = split_archive(root)
    if inside:
        found = _members(*inside)
    elif root and paths.isdir(root):
        found = _files_below(root)
        _enter_archives(root, found)
    elif _extension(root) in (".npy", ".npz") and _is_file(root):
        stack = _reopened(root, channels)
        assert isinstance(stack, Stack)
        return Listing(root, Numbered(stack.shape[0]), [], array=True, ids=stack.labels)
    else:
        raise ValueError(
            f"data_dir {quoted(root)} is neither a folder nor a zip, nor an array (.npy, .npz); give the path of one "
            "that holds images"
        )
    for name, fault in found.refused:
        if not name:
            raise ValueError(f"data_dir {quoted(root)} is {fault}; give one that can be read")
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


def hold(listing: Listing) -> None:
    """Read an array whose images are wanted in any order as a whole, where they cannot be read from their places."""
    stack = _archive(listing.root) if listing.array else None
    if isinstance(stack, Stack):
        stack.hold()


def images_at(path: paths.AnyPath, name: str, channels: int = 0) -> Listing:
    """An image, which may lie in a zip, or all those of a folder, a zip or an array.

    :param name: of the argument that `path` comes from, for the error.
    :param channels: as for `find_images`.
    :raises ValueError: if there are none.
    """
    where = paths.resolve(path)
    inside = split_archive(where)
    if not inside and not (where and paths.exists(where)):
        raise ValueError(
            f"{name} {where!r} does not exist: give an image, or a folder, zip or array (npy, npz) of images"
        )
    alone = inside[1].lower().endswith(IMAGE_EXTENSIONS) if inside else not paths.isdir(where)
    if alone and (inside or not is_stack(where, channels)):
        return Listing(os.path.dirname(where) or ".", [os.path.basename(where)], [])
    listing = find_images(where, channels)
    if not listing.images:
        raise ValueError(f"{name} {where!r} holds no images, {listing.skipped()}: give some, or an image itself")
    return listing


# ---- reading pictures


def read_image(path: str, channels: int, data_range: Range | None = None) -> Picture:
    """A picture of `channels` channels: alpha laid on white (kept with 4 channels), turned upright by its EXIF tag.

    8 bits stay 8 bits. 16 bit greys cover 0 .. 65535. An .npy is [H, W] or [H, W, C]: uint8, uint16 and bool cover
    their whole range, floats lie in [-1, 1].

    :param data_range: the numbers that black and white are, in place of those: see `decoding.parse_range`.
    :raises UnreadableImage: naming the file and what is wrong with it.
    """
    return read_whole(path, channels, data_range=data_range).picture


def read_whole(
    path: str, channels: int, at_least: tuple[int, int] | None = None, *, data_range: Range | None = None
) -> Whole:
    """What `read_image` gives, and its size; with `at_least`, JPEGs perhaps at a part of it: see `decoding`."""
    return _read(path, lambda content, extension: decode_whole(content, extension, channels, at_least, data_range))


def read_size(path: str) -> tuple[int, int]:
    """The (height, width) of a picture, from its header, which is all that is read of a file on the disk.

    :raises UnreadableImage: as `read_image` does, but for what is wrong behind the header.
    """
    if is_remote(path) or split_archive(path):
        return _read(path, lambda content, extension: size_in(io.BytesIO(content), extension))
    with _naming(path), files.open_file(path) as file:
        if not files.local_size(file):
            raise ValueError(EMPTY)
        return size_in(file, _extension(path))


def read_ids(path: str) -> NDArray[np.float32]:
    """A map of classes, whole numbers [H, W, 1]: grey values or places in a palette, or an .npy [H, W] of integers.

    :raises UnreadableImage: naming the file and what is wrong with it.
    """
    return _read(path, decode_ids)


def read_mask(path: str) -> Mask:
    """A mask, as `masks` describes it.

    :raises UnreadableImage: naming the file and what is wrong with it.
    """
    return _read(path, decode_mask)


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
