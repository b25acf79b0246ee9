"""Images from npz files to folders and back, and from several npz files to one; nothing is held as a whole.

Shapes: N images, H W space, C channels; arrays are [N, H, W, C] or [N, H, W] of uint8, labels [N].
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import logger
from .checkpoint import save_json
from .config import Size, size_flag
from .crops import TooThin, as_bytes, center_crop_arr
from .decoding import Range
from .image_files import Listing, UnreadableImage, find_images, read_bytes, read_image
from .image_labels import ClassRow, Labels, load_classes, read_labels, save_classes
from .npz import PART, STATISTICS, Npz, Rows, explained, write_arrays
from .pictures import DRAWN_CHANNELS, Pixels, save_png
from .untrusted import Header, parse_json, printable, quoted, reason

CHUNK = 2**24  # bytes of images in memory at a time
ORDER = "names.json"  # in a folder from an npz: its images in their order, and their shape
CLASSES = "classes.json"
MAX_LABEL = 2**16  # without names of the classes


# ---- what there is


def refuse_existing(path: str) -> None:
    """:raises ValueError: if there is something at a path that is to be made."""
    if not path or os.path.lexists(path):
        raise ValueError(f"{path!r} exists already: remove it, or give another name")


@dataclass(frozen=True)
class Images:
    """The images of an npz.

    :param name: of their array.
    """

    path: str
    name: str
    header: Header
    labels: Header | None

    @property
    def count(self) -> int:
        """N."""
        return self.header.shape[0]

    def pixels(self, most: int = 0) -> Iterator[Pixels]:
        """All images [n, H, W, C] or [n, H, W], or the first `most`, a few at a time."""
        return self._rows(self.name, self.header, most or self.count)

    def ids(self) -> Iterator[NDArray[np.int64]]:
        """The labels, some at a time."""
        assert self.labels is not None
        return (chunk.astype(np.int64) for chunk in self._rows("arr_1", self.labels, self.count))

    def _rows(self, name: str, header: Header, most: int) -> Iterator[NDArray[Any]]:
        row = max(1, math.prod(header.shape[1:]) * header.dtype.itemsize)
        with Npz(self.path) as archive:
            for chunk in archive.chunks(name, min(most, max(1, CHUNK // row))):
                yield chunk[:most]
                most -= len(chunk)
                if most <= 0:
                    return


def open_npz(path: str) -> Images:
    """The images of an npz, whose headers alone are read.

    :raises ValueError: if it holds none, none that are bytes, or labels that are not theirs.
    """
    with Npz(path) as archive:
        headers = dict(headers_of(archive))
        known = {name: header for name, header in headers.items() if isinstance(header, Header)}
    name = _image_array(path, known)
    images, labels = known[name], known.get("arr_1") if name == "arr_0" else None
    if images.dtype != np.uint8:
        raise ValueError(
            f"{path}: {name} is of {images.dtype}, not of uint8: save ((x + 1) * 127.5).clip(0, 255).astype(uint8) of "
            "images in [-1, 1] instead"
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{path}: arr_1 {labels.shape} of {labels.dtype} is no label for each of {images.shape[0]} images"
        )
    return Images(path, name, images, labels)


def _image_array(path: str, headers: dict[str, Header]) -> str:
    names = [name for name, header in headers.items() if len(header.shape) in (3, 4) and name not in STATISTICS]
    found = ["arr_0"] if "arr_0" in names else names
    if len(found) != 1 or 0 in headers[found[0]].shape:
        held = ", ".join(f"{printable(name)} {header.shape}" for name, header in list(headers.items())[:8])
        raise ValueError(f"{path} holds no array of images that is clear ({held or 'nothing'}): save them as arr_0")
    return found[0]


def headers_of(archive: Npz) -> Iterator[tuple[str, Header | str]]:
    """What is said of every array, or why nothing is."""
    for name in archive.names():
        try:
            yield name, archive.header(name)
        except ValueError as error:
            yield name, reason(error)


# ---- to files


def to_png(path: str, out: str, classes: str = "") -> str:
    """Write CLASS_NUMBER.png of every image in a new folder; returns a line about it.

    Beside them, names.json keeps their order, and classes.json the ids of their classes: `from_images` makes the same
    arrays of them again.

    :param classes: path of a classes.json; '' calls classes by their numbers.
    """
    source = open_npz(path)
    refuse_existing(out)
    channels = source.header.shape[3] if len(source.header.shape) == 4 else 1
    if channels not in DRAWN_CHANNELS:
        raise ValueError(f"{path}: images of {channels} channels are no PNG: 1, 3 and 4 can be")
    ids = np.concatenate(list(source.ids())) if source.labels is not None else None
    if ids is None and classes:
        raise ValueError(f"{path} has no labels (arr_1), so that {classes} says nothing: leave it out")
    names, rows = file_names(source.count, ids, load_classes(classes) if classes else [])
    with _new_folder(out) as part:
        _draw(source, [os.path.join(part, name) for name in names])
        order = {"file": os.path.basename(path), "shape": list(source.header.shape[1:]), "names": names}
        save_json(os.path.join(part, ORDER), order)
        if rows:
            save_classes(os.path.join(part, CLASSES), _Table(rows))
    return f"{out}: {source.count} images" + f" of {len(rows)} classes" * bool(rows)


@dataclass(frozen=True)
class _Table:
    """A table of classes, as `save_classes` takes it."""

    rows: list[ClassRow]
    class_from: str = "filename"

    def class_table(self) -> list[ClassRow]:
        return self.rows


def file_names(count: int, ids: NDArray[np.int64] | None, classes: Sequence[str]) -> tuple[list[str], list[ClassRow]]:
    """Names that `load_data` reads the classes from, and the table of these.

    :param classes: names by id; [] calls them by their numbers.
    :raises ValueError: if a class has no name, or one that no file can begin with.
    """
    digits = max(6, len(str(count - 1)))
    if ids is None:
        return [f"{index:0{digits}d}.png" for index in range(count)], []
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (high >= len(classes) if classes else high > MAX_LABEL):
        wrong = low if low < 0 else high
        raise ValueError(f"label {wrong} has no name among {len(classes)} classes: give a classes.json that names it")
    width = len(str(high))
    known = list(classes) or [f"{number:0{width}d}" for number in range(high + 1)]
    wrong_names = [name for name in known if not name or name[0] == "." or set(name) & set('_/\\:*?"<>|\0')]
    if wrong_names:
        raise ValueError(
            f"the class {quoted(wrong_names[0])} is no beginning of a file name: change it in classes.json"
        )
    counts = Counter(ids.tolist())
    rows = [(number, name, counts[number]) for number, name in enumerate(known)]
    return [f"{known[label]}_{index:0{digits}d}.png" for index, label in enumerate(ids.tolist())], rows


def _draw(source: Images, paths: Sequence[str]) -> None:
    images = (image for chunk in source.pixels() for image in chunk)
    with logger.progress_bar(total=len(paths), desc="writing", unit="image") as bar:
        for path, image in zip(paths, images, strict=True):
            with explained(path):
                save_png(path, image[..., None] if image.ndim == 2 else image)
            bar.update()


@contextlib.contextmanager
def _new_folder(out: str) -> Iterator[str]:
    """A folder to fill that gets its name once the block is through, and is removed if it fails."""
    part = f"{out.rstrip('/')}{PART}{os.getpid()}"
    try:
        with explained(out):
            os.makedirs(part)
        yield part
        with explained(out):
            os.rename(part, out.rstrip("/"))
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- from files


@dataclass(frozen=True)
class Wanted:
    """How files are read.

    :param size: scale and crop to it as in training; 0: as they are.
    :param channels: 0: what to-png wrote down, else 3.
    :param class_from: '' is auto where that finds labels, and else none.
    :param classes: path of a classes.json; '' takes the one in the folder.
    :param label_column: of a table that has several.
    :param data_range: as `read_image` takes it.
    """

    size: Size = 0
    channels: int = 0
    class_from: str = ""
    classes: str = ""
    label_column: str = ""
    data_range: Range | None = None


def from_images(path: str, out: str, wanted: Wanted | None = None) -> list[str]:
    """Write the images of a folder or zip as an npz; returns lines about it."""
    wanted = wanted or Wanted()
    _refuse_other_name(out)
    listing, shape = _in_order(find_images(path))
    if not listing.images:
        raise ValueError(f"{path} holds no images, {listing.skipped()}: give a folder or a zip that does")
    labels, notes = _labels(listing, wanted)
    channels = wanted.channels or (([*shape, 1][2] if shape else 0) or 3)
    if channels not in DRAWN_CHANNELS:
        raise ValueError(f"images of {channels} channels are not read: 1, 3 and 4 are")
    first = _read(listing, 0, wanted, channels)
    if channels == 1 and len(shape) == 2 and not wanted.channels:
        first = first[..., 0]
    count = len(listing.images)
    images: Rows = (count, *first.shape), np.uint8, _stream(listing, wanted, first.shape, channels)
    rows: list[Rows] = [images]
    if labels is not None:
        rows.append(((count,), np.int64, [np.asarray(labels.ids, np.int64)]))
    write_arrays(out, {f"arr_{number}": row for number, row in enumerate(rows)})
    if labels is not None:
        table = f"{os.path.splitext(out)[0]}.{CLASSES}"
        save_classes(table, labels)
        notes.append(f"{table}: {len(labels.classes)} classes")
    return [listing.summary(), *notes, f"{out}: {count} images {'x'.join(map(str, first.shape))}"]


def _refuse_other_name(out: str) -> None:
    refuse_existing(out)
    if not out.endswith(".npz"):
        raise ValueError(f"{out!r} is no name of an npz: give one that ends in .npz")


def _in_order(listing: Listing) -> tuple[Listing, tuple[int, ...]]:
    """The files in the order of the npz that they come from, and the shape of its images; () for any other folder."""
    if ORDER not in listing.others:
        return listing, ()
    try:
        said = parse_json(read_bytes(listing.path(ORDER)))
        names, shape = (said.get(key) if isinstance(said, dict) else None for key in ("names", "shape"))
        if not isinstance(names, list) or not isinstance(shape, list) or not all(type(side) is int for side in shape):
            raise ValueError("it names no files and no shape")
        if len(names) != len(listing.images) or set(map(str, names)) != set(listing.images):
            raise ValueError(f"it names {len(names)} files, and others than the {len(listing.images)} that are there")
    except (OSError, ValueError) as error:
        where = listing.path(ORDER)
        raise ValueError(f"{where} does not tell the order of the images ({reason(error)}): remove it") from error
    return Listing(listing.root, names, listing.others, listing.refused), tuple(shape)


def _labels(listing: Listing, wanted: Wanted) -> tuple[Labels | None, list[str]]:
    """The labels, None where there are none and none are asked for; and lines about them."""
    known = wanted.classes
    if not known and CLASSES in listing.others:
        known = listing.path(CLASSES) if not listing.root.lower().endswith(".zip") else ""
    try:
        labels = read_labels(listing, wanted.class_from or "auto", known or None, label_column=wanted.label_column)
    except ValueError as error:
        if wanted.class_from or known or wanted.label_column:
            raise
        return None, [f"no labels: {error}"]
    return labels, labels.notes


def _read(listing: Listing, index: int, wanted: Wanted, channels: int) -> Pixels:
    path = listing.path(listing.images[index])
    picture = read_image(path, channels, wanted.data_range)
    try:
        array = np.asarray(picture) if not wanted.size else center_crop_arr(picture, size_flag(wanted.size))
    except TooThin as error:
        raise UnreadableImage(path, str(error)) from error
    return as_bytes(array)


def _stream(listing: Listing, wanted: Wanted, shape: tuple[int, ...], channels: int) -> Iterator[Pixels]:
    with logger.progress_bar(total=len(listing.images), desc="reading", unit="image") as bar:
        for index, name in enumerate(listing.images):
            image = _read(listing, index, wanted, channels)
            if image.shape[:2] != shape[:2]:
                first, own = ("x".join(map(str, sides[:2])) for sides in (shape, image.shape))
                raise ValueError(
                    f"{quoted(name)} is {own} and {quoted(listing.images[0])} {first} (height x width): give "
                    "--image_size, to which all are scaled and cropped"
                )
            yield image.reshape(1, *shape)
            bar.update()


# ---- several


def merge(paths: Sequence[str], out: str) -> list[str]:
    """Write the images of several npz files, and their labels, one after the other; returns lines about it.

    :raises ValueError: if the images differ in shape, or some have labels and some have not.
    """
    _refuse_other_name(out)
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} file is nothing to merge: give two or more, and then the name of the new one")
    parts = [open_npz(path) for path in paths]
    first = parts[0]
    for part in parts[1:]:
        if part.header.shape[1:] != first.header.shape[1:]:
            raise ValueError(
                f"{part.path} holds images {part.header.shape[1:]} and {first.path} {first.header.shape[1:]}: merge "
                "what has one shape"
            )
        if (part.labels is None) != (first.labels is None):
            with_labels, without = (part, first) if first.labels is None else (first, part)
            raise ValueError(f"{with_labels.path} has labels and {without.path} has none: merge those with, or without")
    count = sum(part.count for part in parts)
    rows: dict[str, Rows] = {
        "arr_0": ((count, *first.header.shape[1:]), np.uint8, (chunk for part in parts for chunk in part.pixels()))
    }
    if first.labels is not None:
        rows["arr_1"] = (count,), np.int64, (chunk for part in parts for chunk in part.ids())
    write_arrays(out, rows)
    notes = [f"left out, as they are of {path} alone: {names}" for path in paths if (names := _other_arrays(path))]
    return [*notes, f"{out}: {count} images of {len(parts)} files"]


def _other_arrays(path: str) -> str:
    source = open_npz(path)
    with Npz(path) as archive:
        return ", ".join(printable(name) for name in archive.names() if name not in (source.name, "arr_1"))
