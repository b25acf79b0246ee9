"""Folders and zips of images as the source of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from guided_diffusion.data.sources import ImageSource, find_images, read_content
from guided_diffusion.runtime import files
from guided_diffusion.runtime.errors import UserError

from .images import EMPTY_CLASS, Content, Item, Source, bad


def listing_of(path: str) -> ImageSource:
    """The images in a folder or zip.

    :raises ValueError: if it holds no image.
    """
    listing = find_images(path)
    if not listing.images:
        raise UserError(f"{path} holds no image: {listing.skipped()}; give the folder that does")
    return listing


def folder_name(path: str) -> str:
    """The last name in a path."""
    return os.path.basename(os.path.abspath(path))


def class_folders(listing: ImageSource) -> list[str]:
    """The class of every image: the folder it lies in, or the whole where there is none."""
    return [os.path.basename(os.path.dirname(name)) or folder_name(listing.root) for name in listing.images]


def numbered(names: Sequence[str]) -> list[str]:
    """Classes whose names are numbers with as many digits each, so that their order as texts is the numbers'."""
    width = max(map(len, names), default=0)
    return [name.zfill(width) for name in names] if all(name.isdecimal() for name in names) else list(names)


def folder_source(
    listing: ImageSource,
    labels: Iterable[str],
    *,
    folders_are_classes: bool = False,
    beside: Sequence[Sequence[tuple[str, bytes]]] = (),
) -> Source:
    """A source of images that are found already.

    :param labels: the class of each.
    :param folders_are_classes: report folders in which there is no image.
    :param beside: (extension, content) of what goes into a tar with each.
    """
    print(listing.summary())
    faults = [bad(name, fault) for name, fault in listing.refused]
    if folders_are_classes:
        faults += [bad(name, EMPTY_CLASS, name) for name in _empty_folders(listing)]
    return Source(_items(listing, labels, faults, beside or [()] * len(listing)), len(listing) + len(faults))


def _items(
    listing: ImageSource, labels: Iterable[str], faults: Sequence[Item], beside: Sequence[Sequence[tuple[str, bytes]]]
) -> Iterator[Item]:
    yield from faults
    for name, label, texts in zip(listing.images, labels, beside, strict=True):
        yield Item(name, label, partial(_load, listing.path(name)), beside=texts)


def _empty_folders(listing: ImageSource) -> list[str]:
    if not os.path.isdir(listing.root):
        return []
    filled = {name.split("/")[0] for name in listing.images}
    with os.scandir(listing.root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [name for name in names if name not in filled]


def _load(path: str) -> Content:
    content = read_content(path)
    if isinstance(content, bytes) and not path.lower().endswith(".npy"):
        return content
    array = files.read_array(content) if isinstance(content, bytes) else content
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise UserError(f"an array of {array.dtype} of shape {array.shape}, where uint8 of [H, W] or [H, W, 3] is read")
    return array
