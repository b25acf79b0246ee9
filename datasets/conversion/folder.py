"""Folders and zips of images as the source of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from guided_diffusion.data.sources import Listing, find_images, read_bytes
from guided_diffusion.runtime import files

from .images import Content, Item, Source, bad


def folder_name(path: str) -> str:
    """The last name in a path."""
    return os.path.basename(os.path.abspath(path))


def class_folders(listing: Listing) -> list[str]:
    """The class of every image: the folder it lies in, or the whole where there is none."""
    own = folder_name(listing.root)
    return [os.path.basename(os.path.dirname(name)) or own for name in listing.images]


def numbered(names: Sequence[str]) -> list[str]:
    """Classes whose names are numbers with as many digits each, so that their order as texts is the numbers'."""
    width = max(map(len, names), default=0)
    return [name.zfill(width) for name in names] if all(name.isdecimal() for name in names) else list(names)


def folder_source(listing: Listing, labels: Iterable[str], *, folders_are_classes: bool = False) -> Source:
    """The images of a listing.

    :param labels: the class of each.
    :param folders_are_classes: True reports folders in which there is no image.
    """
    print(listing.summary())
    faults = list(listing.refused) + (_empty_folders(listing) if folders_are_classes else [])
    return Source(_items(listing, labels, faults), len(listing.images) + len(faults))


def _items(listing: Listing, labels: Iterable[str], faults: Sequence[tuple[str, str]]) -> Iterator[Item]:
    for name, fault in faults:
        yield bad(name, fault, folder_name(name) if fault == EMPTY else "")
    for name, label in zip(listing.images, labels, strict=True):
        yield Item(name, label, lambda name=name: _load(listing.path(name)))  # type: ignore[misc]


EMPTY = "a class with no images"


def _empty_folders(listing: Listing) -> list[tuple[str, str]]:
    if not os.path.isdir(listing.root):
        return []
    filled = {name.split("/")[0] for name in listing.images}
    with os.scandir(listing.root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [(name, EMPTY) for name in names if name not in filled]


def _load(path: str) -> Content:
    content = read_bytes(path)
    if not path.lower().endswith(".npy"):
        return content
    array = files.read_array(content)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"an array of {array.dtype} of shape {array.shape}, where uint8 of [H, W] or [H, W, 3] is read"
        )
    return array


def listing_of(path: str) -> Listing:
    """Everything in a folder or zip.

    :raises ValueError: if it holds no image.
    """
    listing = find_images(path)
    if not listing.images:
        raise ValueError(f"{path} holds no image: {listing.skipped()}; give the folder that does")
    return listing
