"""The one reader of images: finds them in folders, zips, tars, buckets and arrays, and reads them.

A path may lead into a zip or tar, ``pets.zip/cat/1.png``, or into an array of images, ``train.npy/000007.npy``. What is
in them is decoded in memory, and its names never become names on the disk. What cannot be taken is listed when images
are found, and raises `UnreadableImage` when it is read.

Shapes: H W space, C channels.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..runtime import files
from ..runtime.errors import UserError, listed, printable, quoted, reason, refuse
from ..runtime.files import is_remote
from ..runtime.options import Size
from .archives import Archive, Stack, archives_of, is_stack, read_each
from .crops import Picture, as_bytes, center_crop_arr
from .decoding import Content, Decoded, Range, decode, decode_ids, decode_mask, size_in
from .tars import BESIDE, TEXTS, Changed, Tar

T = TypeVar("T")
Entry = tuple[str, str]  # name of a file, and why it is not taken; '' if it is

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy")
LABEL_FILES = {"json": ("dataset.json", "metadata.jsonl"), "csv": ("labels.csv", "labels.tsv", "metadata.csv")}
MAX_OPEN_ARCHIVES = 200  # one for each class, often; a process may have 256 files open on some systems
EMPTY = "it is empty"


class UnreadableImage(UserError):
    """A file with an image's name that cannot be read as one."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"cannot read image {quoted(self.path)}: {self.reason}; repair or remove it"


@dataclass(frozen=True)
class ImageSource:
    """The images in a folder, zip, tar, bucket or array, by names relative to `root` in the order of their parts.

    :param root: '' where names are whole paths, of shards that have no folder in common.
    :param others: files that are no images, such as tables of labels.
    :param refused: (name, reason) of what is never read.
    :param array: `root` is an array of images.
    :param ids: [N] class ids that lie beside an array.
    """

    root: str
    images: Sequence[str]
    others: list[str] = field(default_factory=list)
    refused: list[Entry] = field(default_factory=list)
    array: bool = False
    ids: list[int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def path(self, name: str) -> str:
        """The path by which a file is read."""
        return f"{self.root.rstrip('/')}/{name}" if self.root else name

    @cached_property
    def known(self) -> frozenset[str]:
        """The names of the files that are no images."""
        return frozenset(self.others)

    @property
    def paths(self) -> list[str]:
        """The paths of all images."""
        return [self.path(name) for name in self.images]

    def hold(self) -> None:
        """Read an array into memory whose images cannot be read in any order from where they lie."""
        stack = _archive(self.root) if self.array else None
        if isinstance(stack, Stack):
            stack.hold()

    def skipped(self) -> str:
        """How many files are no images, by extension, or are not taken, by reason."""
        tables = {table for tables in LABEL_FILES.values() for table in tables}
        others = [name for name in self.others if os.path.basename(name) not in tables]
        others = [name for name in others if ".tar" not in name or _extension(name) not in (*TEXTS, BESIDE)]
        kinds = ["hidden" if _is_hidden(name) else printable(_extension(name)) or "no extension" for name in others]
        counts = Counter([*kinds, *(fault for _, fault in self.refused)])
        detail = ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.items()))
        return f"skipped {counts.total()}" + (f" ({detail})" if detail else "")

    def summary(self, shown: int = 5) -> str:
        """The lines for the user: how many images there are, and what was not taken."""
        lines = [f"{self.root}: found {len(self.images)} images, {self.skipped()}"]
        lines += [f"  skipped {quoted(name)}: {fault}" for name, fault in self.refused[:shown]]
        more = len(self.refused) - shown
        return "\n".join([*lines, *[f"  and {more} more that are not taken"] * (more > 0)])


def find_images(data_dir: files.AnyPath, channels: int = 0) -> ImageSource:
    """All images below a folder, a zip, a tar or a folder in one, of many of these, or of an array (.npy, .npz).

    Zips and tars in a folder are entered only where it holds no picture itself: beside pictures they are copies.

    :param channels: of the images of an .npy, where they are not 1, 3 or 4.
    """
    root = files.resolve(data_dir)
    root = root if len(root) < 2 else root.rstrip("/")
    inside = split_archive(root)
    if many := archives_of(root):
        root = shared_folder(many)
        entries = _inner(root, [name[len(root) :].lstrip("/") if root else name for name in many])
    elif inside:
        _archive(inside[0], anew=True)
        entries = _members(*inside)
    elif root and files.isdir(root):
        entries = _with_members(root, _files_below(root))
    elif _extension(root) in (".npy", ".npz") and _is_file(root):
        stack = _archive(root, channels, anew=True)
        assert isinstance(stack, Stack)
        return ImageSource(root, [f"{index:06d}.npy" for index in range(stack.shape[0])], array=True, ids=stack.labels)
    else:
        kinds = "a folder, a zip, a tar or an array (.npy, .npz) of images"
        files.refuse_missing(root, f"data_dir {quoted(root)}", f"give {kinds}")
        refuse((_is_image(root), f"data_dir {quoted(root)} is a single picture: give its folder"))
        raise UserError(f"data_dir {quoted(root)} is none of the kinds that are read: give {kinds}")
    refuse((fault := dict(entries).get(""), f"data_dir {quoted(root)} is {fault}; give one that can be read"))
    names = sorted((name for name, fault in entries if not fault), key=lambda name: name.split("/"))
    others = [name for name in names if not _is_image(name)]
    return ImageSource(root, [*filter(_is_image, names)], others, sorted(entry for entry in entries if entry[1]))


def paths_in(text: files.AnyPath) -> list[str]:
    """The paths in a list with commas, or the one path that is there with commas in its name."""
    text = os.fspath(text)
    return [text] if os.path.lexists(text) else [path for path in text.split(",") if path] or [text]


def images_at(path: files.AnyPath, name: str, channels: int = 0) -> ImageSource:
    """A single image, which may lie in a zip, or all images of a folder, a zip or an array.

    :param name: of the argument that `path` comes from, for the error.
    :param channels: as for `find_images`.
    """
    where = files.resolve(path)
    inside = split_archive(where)
    if not inside:
        files.refuse_missing(
            where, f"{name} {where!r}", "give an image, or a folder, zip or array (npy, npz) of images"
        )
    alone = inside[1].lower().endswith(IMAGE_EXTENSIONS) if inside else not files.isdir(where)
    if alone and (inside or not is_stack(where, channels)):
        return ImageSource(os.path.dirname(where) or ".", [os.path.basename(where)])
    source = find_images(where, channels)
    if not source.images:
        raise UserError(f"{name} {where!r} holds no images, {source.skipped()}: give some, or an image itself")
    return source


@dataclass(frozen=True)
class Selection:
    """The images of a source to sample for: the first ones.

    :param count: how many, or fewer where there are fewer.
    :param all: fewer are an error.
    :param label: source -> class ids of its images; None leaves them without, but for those beside an array.
    """

    count: int
    all: bool = False
    label: Callable[[ImageSource], Sequence[int]] | None = None

    def of(self, source: ImageSource) -> tuple[ImageSource, list[int] | None]:
        """These images, and their class ids if there are any."""
        few = self.all and self.count > len(source)
        refuse((few, f"--num_samples {self.count} is more than the {len(source)} images of {source.root}"))
        ids = source.ids if self.label is None or source.array else self.label(source)
        return replace(source, images=source.images[: self.count]), None if ids is None else list(ids)[: self.count]


def by_name(images: ImageSource, partners: ImageSource, kind: str) -> tuple[list[tuple[str, str]], str]:
    """The pairs of images and partners whose names agree but for the extension, and a sentence about all others.

    :param kind: of the partners, for the sentence.
    """
    image_of, partner_of = _by_stem(images), _by_stem(partners)
    alone = [quoted(name) for stem, name in image_of.items() if stem not in partner_of]
    extra = [quoted(name) for stem, name in partner_of.items() if stem not in image_of]
    unpaired = [
        (alone, f"{len(alone)} of {len(image_of)} images have no {kind} in {partners.root}"),
        (extra, f"{len(extra)} of {len(partner_of)} {kind}s have no image"),
    ]
    faults = [f"{text} ({listed(names, 5)})" for names, text in unpaired if names]
    return [(name, partner_of[stem]) for stem, name in image_of.items() if stem in partner_of], "; ".join(faults)


def _by_stem(source: ImageSource) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in source.images:
        other = names.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise UserError(f"{quoted(other)} and {quoted(name)} in {source.root} differ in the extension alone")
    return names


def _with_members(root: str, entries: list[Entry]) -> list[Entry]:
    """The files of a folder; where it holds no picture, what is in its zips and tars in place of these."""
    names = [name for name, fault in entries if not fault]
    packed = {name for name in names if _extension(name) in (".zip", ".tar") and not _is_hidden(name)}
    if any(map(_is_image, names)):
        return entries
    return [entry for entry in entries if entry[0] not in packed] + _inner(root, sorted(packed))


def _inner(root: str, names: Sequence[str]) -> list[Entry]:
    """What is in the zips and tars of these names."""
    paths = [f"{root}/{name}" if root else name for name in names]
    read_each(partial(_archive, anew=True), paths, remote=True)
    pairs = zip(names, paths, strict=True)
    return [(f"{name}/{inner}", fault) for name, path in pairs for inner, fault in _members(path)]


def _members(path: str, folder: str = "") -> list[Entry]:
    """The files of a zip below one of its folders, by names relative to it; files that are no images have no faults."""
    start, entries = folder.rstrip("/") + "/" if folder else "", list[Entry]()
    archive = _archive(path)
    for name, again, fault in () if isinstance(archive, Stack) else archive.members():
        if name.startswith(start) and not name.endswith("/"):
            twice = "of the same name as a later one" if again else ""
            entries.append((name[len(start) :], twice or (fault if _is_image(name) else "")))
    return entries


def _files_below(root: str) -> list[Entry]:
    """The files of a folder and the folders in it, each of which is read once.

    Links to folders are followed after all else and in the order of their names, so that neither a circle of them nor
    many ways to one place lead to a file twice.
    """
    entries, seen = list[Entry](), set[tuple[int, int]]()
    folders, links = [""], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            inner = _entries(f"{root}/{folder}", seen)
        except OSError as error:
            inner = [("", f"a folder that cannot be read ({reason(error)})")]
        for name, kind in inner:
            if kind in ("folder", "link"):
                (folders if kind == "folder" else links).append(f"{folder}{name}/")
            else:
                entries.append((folder + name, "" if kind == "file" else kind))
        links.sort()
    return entries


def _entries(folder: str, seen: set[tuple[int, int]]) -> list[Entry]:
    """(name, kind) of everything in a folder; the kind is "folder", "link", "file", or why it is not taken."""
    if is_remote(folder):
        return [(name, "folder" if is_dir else "file") for name, is_dir in files.folders_and_files(folder)]
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return [("", "a link to a folder that is read already")]
    seen.add((status.st_dev, status.st_ino))
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


def shared_folder(names: Sequence[str]) -> str:
    """The folder, "" for none, that all of these lie in, directly or deeper."""
    pairs = zip(*(name.split("/")[:-1] for name in (min(names), max(names))), strict=False)
    return "/".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _is_file(path: str) -> bool:
    return files.exists(path) and not files.isdir(path)


def _is_hidden(name: str) -> bool:
    """True for what a system leaves beside pictures: ``._1.png``, ``.thumbnails/``, ``__MACOSX/``."""
    return any(re.match(r"\.[^.]|__MACOSX$", part) for part in name.split("/"))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return _extension(name) in IMAGE_EXTENSIONS and not _is_hidden(name)


_archives: dict[str, Archive | Stack] = {}
_tars: dict[str, Tar] = {}  # which hold no handle, so that there may be any number


def split_archive(path: str) -> tuple[str, str] | None:
    """(zip, tar or array, member) of a path that leads into one, with member "" for a zip itself; else None."""
    for end in (match.end() for match in re.finditer(r"\.(zip|tar)(?=/|$)|\.np[yz](?=/)", path, re.IGNORECASE)):
        if path[:end] in _tars or path[:end] in _archives or _is_file(path[:end]):
            return path[:end], path[end + 1 :]
    return None


def tar_of(path: str) -> Tar | None:
    """The tar that a path leads into."""
    inside = split_archive(path)
    return _tars.get(inside[0]) if inside else None


def _archive(path: str, channels: int = 0, *, anew: bool = False) -> Archive | Stack | Tar:
    """The archive, whose handle and directory forked processes inherit; `anew`: it may have been rewritten."""
    kind = _extension(path)
    opened: dict[str, Any] = _tars if kind == ".tar" else _archives
    if anew and path in opened:
        opened.pop(path).close()
    if path not in opened:
        if len(_archives) >= MAX_OPEN_ARCHIVES and opened is _archives:
            _archives.pop(next(iter(_archives))).close()
        try:
            opened[path] = Archive(path) if kind == ".zip" else Tar(path) if kind == ".tar" else Stack(path, channels)
        except (OSError, ValueError) as error:
            if path in str(error):
                raise
            what = {".zip": "zip", ".tar": "tar"}.get(kind, "array of images")
            raise UserError(f"{path!r} is not a readable {what} ({error}); make it again, or give a folder") from error
    archive: Archive | Stack | Tar = opened[path]
    return archive


def read_content(path: str) -> Content:
    """The bytes of a file on the disk, in a bucket or in a zip, or an image of an array."""
    inside = split_archive(path)
    return _archive(inside[0]).read(inside[1]) if inside else files.read_file(path)


def read_bytes(path: str) -> bytes:
    """The bytes of a file on the disk, in a bucket or in a zip."""
    return bytes(read_content(path))


def read_image(path: str, channels: int, data_range: Range | None = None) -> Picture:
    """A picture of `channels` channels: alpha laid on white (kept with 4 channels), turned upright by its EXIF tag.

    8 bits stay 8 bits. 16 bit greys cover 0 .. 65535. An .npy is [H, W] or [H, W, C]: uint8, uint16 and bool cover
    their whole range, floats lie in [-1, 1].

    :param data_range: the numbers that black and white are instead; 8 bits keep 0, 255 unless it lies within that.
    """
    return read_decoded(path, channels, data_range=data_range).picture


def read_decoded(
    path: str, channels: int, at_least: tuple[int, int] | None = None, *, data_range: Range | None = None
) -> Decoded:
    """The picture of `read_image` and its size; with `at_least`, a JPEG perhaps at a part of it, as `decode` says."""
    return read_by(path, lambda content, extension: decode(content, extension, channels, at_least, data_range))


def read_pixels(
    path: str, channels: int = 3, size: Size | None = None, data_range: Range | None = None
) -> NDArray[np.uint8]:
    """A picture as uint8 [H, W, C], with a size scaled and cropped to it as in training."""
    with naming(path):
        picture = read_image(path, channels, data_range)
        return as_bytes(np.asarray(picture) if size is None else center_crop_arr(picture, size))


def read_size(path: str) -> tuple[int, int]:
    """The (height, width) of a picture, from its header, which is all that is read of a file on the disk."""
    if is_remote(path) or split_archive(path):
        return read_by(path, size_of_content)
    with naming(path), files.open_file(path) as file:
        refuse((not files.local_size(file), EMPTY))
        return size_in(file, _extension(path))


def size_of_content(content: Content, extension: str) -> tuple[int, int]:
    """The (height, width) of a picture whose content is read."""
    return size_in(io.BytesIO(content), extension) if isinstance(content, bytes) else content.shape[:2]


def read_ids(path: str) -> NDArray[np.float32]:
    """A map of classes, whole numbers [H, W, 1]: grey values or places in a palette, or an .npy [H, W] of integers."""
    return read_by(path, decode_ids)


def read_mask(path: str) -> Image.Image:
    """A mask, 8 bit grey, as `decode_mask` reads it."""
    return read_by(path, decode_mask)


def read_by(path: str, decoder: Callable[[Content, str], T]) -> T:
    """What a decoder makes of (content, extension) of an image file."""
    with naming(path):
        content = read_content(path)
        refuse((len(content) == 0, EMPTY))
        return decoder(content, _extension(path))


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn any error inside the block into an `UnreadableImage`, but for that of a whole tar."""
    try:
        yield
    except (UnreadableImage, Changed):
        raise
    except Exception as error:  # Pillow does not say what it raises on a damaged file
        no_image = isinstance(error, UnidentifiedImageError)
        raise UnreadableImage(path, "its content is no image" if no_image else reason(error)) from error
