"""An npz of images to a folder of PNG files, and a folder or zip of images to an npz; neither is held as a whole.

Shapes: N images, H W space, C channels; arrays are [N, H, W, C] or [N, H, W] of uint8, labels [N].
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .. import logger
from ..data.labels import Labels, load_classes, read_labels, save_classes
from ..data.sources import Listing, find_images, read_bytes
from ..runtime.errors import UserError
from ..runtime.files import PART, explained, parse_json, quoted, reason, write_json
from ..runtime.npz import Npz, write_npz
from ..runtime.options import parse_range
from ..runtime.pictures import DRAWN_CHANNELS, Pixels, save_png
from .sections import FromImagesConfig, ToPngConfig

ORDER, CLASSES = "names.json", "classes.json"  # in a folder from an npz: its images in their order, and their classes
MAX_LABEL = 2**16  # without names of the classes


def refuse_existing(path: str) -> None:
    """Refuse to write over a file or folder."""
    if not path or os.path.lexists(path):
        raise UserError(f"{path!r} exists already: remove it, or give another name")


# ---- to files


def to_png(given: ToPngConfig) -> str:
    """Write CLASS_NUMBER.png of every image in a new folder; returns a line about it."""
    from ..evaluation.images import ArrayImages, open_images

    path, out, classes = given.file, given.out, given.classes
    images = open_images(path)
    if not isinstance(images, ArrayImages) or images.dtype != np.uint8 or not images.count:
        raise UserError(
            f"{path} holds no images of uint8, but of {images.dtype}: save images in [-1, 1] as "
            "((x + 1) * 127.5).clip(0, 255).astype(uint8)"
        )
    refuse_existing(out)
    with Npz(images.parts[0]) as archive:
        if images.labels is None and images.name == "arr_0" and "arr_1" in archive:
            raise UserError(f"{path}: arr_1 is no label for each of {images.count} images")
    if images.labels is None and classes:
        raise UserError(f"{path} has no labels (arr_1), so that {classes} says nothing: leave it out")
    names, labels = file_names(images.count, images.labels, load_classes(classes) if classes else [])
    part, out = f"{out.rstrip('/')}{PART}{os.getpid()}", out.rstrip("/")
    bar = logger.progress_bar(total=len(names), desc="writing", unit="image")
    try:
        with explained(out), bar:
            os.makedirs(part)
            for name, image in zip(names, (image for chunk in images.stored() for image in chunk), strict=True):
                save_png(os.path.join(part, name), image[..., None] if image.ndim == 2 else image)
                bar.update()
            order = {"file": os.path.basename(path), "shape": list(images.stored_shape), "names": names}
            write_json(os.path.join(part, ORDER), order)
            if labels is not None:
                save_classes(os.path.join(part, CLASSES), labels)
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{out}: {images.count} images" + (f" of {len(labels.classes)} classes" if labels else "")


def file_names(count: int, ids: NDArray[np.int64] | None, classes: Sequence[str]) -> tuple[list[str], Labels | None]:
    """Names that training reads the classes from, and the table of these.

    :param classes: names by id; [] calls them by their numbers.
    :raises UserError: if a class has no name, or one that no file can begin with.
    """
    digits = max(6, len(str(count - 1)))
    if ids is None:
        return [f"{index:0{digits}d}.png" for index in range(count)], None
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (high >= len(classes) if classes else high > MAX_LABEL):
        wrong = low if low < 0 else high
        raise UserError(f"label {wrong} has no name among {len(classes)} classes: give a classes.json that names it")
    names = list(classes) or [f"{number:0{len(str(high))}d}" for number in range(high + 1)]
    for name in names:
        if not name or name[0] == "." or set(name) & set('_/\\:*?"<>|\0'):
            raise UserError(f"the class {quoted(name)} is no beginning of a file name: change it in classes.json")
    files = [f"{names[label]}_{index:0{digits}d}.png" for index, label in enumerate(ids.tolist())]
    return files, Labels(ids.tolist(), names, "filename", [])


# ---- from files


def from_images(given: FromImagesConfig) -> list[str]:
    """Write the images of a folder or zip, and their labels, as an npz; returns lines about it."""
    out = given.out
    refuse_existing(out)
    if not out.endswith(".npz"):
        raise UserError(f"{out!r} is no name of an npz: give one that ends in .npz")
    listing, shape = _in_order(find_images(given.source))
    if not listing.images:
        raise UserError(f"{given.source} holds no images, {listing.skipped()}: give a folder or a zip that does")
    labels, notes = _labels(listing, given)
    channels = given.image_channels or ([*shape, 1][2] if shape else 3)
    if channels not in DRAWN_CHANNELS:
        raise UserError(f"images must have 1, 3 or 4 channels, got {channels}")
    sides = next(_pixels(listing, channels, given)).shape[:2]
    flat = len(shape) == 2 and not given.image_channels
    count, shape = len(listing.images), sides if flat else (*sides, channels)
    images = (image.reshape(1, *shape) for image in _pixels(listing, channels, given))
    ids = [] if labels is None else [((count,), np.int64, [np.asarray(labels.ids, np.int64)])]
    write_npz(out, ((count, *shape), np.uint8, images), *ids)
    if labels is not None:
        table = f"{os.path.splitext(out)[0]}.{CLASSES}"
        save_classes(table, labels)
        notes.append(f"{table}: {len(labels.classes)} classes")
    return [listing.summary(), *notes, f"{out}: {count} images {'x'.join(map(str, shape))}"]


def _in_order(listing: Listing) -> tuple[Listing, tuple[int, ...]]:
    """The files in the order of the npz that they come from, and the shape of its images; () for any other folder."""
    if ORDER not in listing.others:
        return listing, ()
    try:
        order = parse_json(read_bytes(listing.path(ORDER)))
        names, shape = list(order["names"]), tuple(map(int, order["shape"]))
        if len(names) != len(listing.images) or set(names) != set(listing.images):
            raise UserError(f"it names {len(names)} files, and others than the {len(listing.images)} that are there")
    except (OSError, ValueError, TypeError, KeyError) as error:
        fault = f"{listing.path(ORDER)} does not tell the order of the images ({reason(error)}): remove it"
        raise UserError(fault) from error
    return Listing(listing.root, names, listing.others, listing.refused), shape


def _labels(listing: Listing, given: FromImagesConfig) -> tuple[Labels | None, list[str]]:
    """The labels, None where there are none and none are asked for; and lines about them."""
    classes = given.classes
    if not classes and CLASSES in listing.others and not listing.root.lower().endswith(".zip"):
        classes = listing.path(CLASSES)
    try:
        labels = read_labels(listing, given.class_from or "auto", classes or None, label_column=given.label_column)
    except ValueError as error:
        if given.class_from or given.label_column or classes:
            raise
        return None, [f"no labels: {error}"]
    return labels, labels.notes


def _pixels(listing: Listing, channels: int, given: FromImagesConfig) -> Iterator[Pixels]:
    """Each image, [H, W] or [H, W, C], all of one size."""
    from ..evaluation.images import read_pixels

    span = parse_range(given.data_range)
    first: tuple[int, ...] = ()
    with logger.progress_bar(total=len(listing.images), desc="reading", unit="image") as bar:
        for name in listing.images:
            image = read_pixels(listing.path(name), channels, given.image_size or None, span)
            first = first or image.shape[:2]
            if image.shape[:2] != first:
                before, here = ("x".join(map(str, sides)) for sides in (first, image.shape[:2]))
                raise UserError(
                    f"{quoted(name)} is {here} and {quoted(listing.images[0])} {before} (height x width): give "
                    "--image_size, to which all are scaled and cropped"
                )
            yield image
            bar.update()
