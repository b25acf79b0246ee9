"""Images to start sampling from, and masks that say what to keep of them.

Shapes: B batch, C channels, H W space. A size is 64, "64x128" or (64, 128): height before width.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence

import blobfile as bf
import numpy as np
import torch as th
from numpy.typing import NDArray

from .config import Size
from .crops import size_of
from .image_datasets import ImageDataset
from .image_files import IMAGE_EXTENSIONS, find_images, read_image, split_archive
from .npz import fingerprint


def images_at(path: str, name: str) -> list[str]:
    """The paths of the images at `path`: an image, which may lie in a zip, or all those of a folder or a zip.

    :param name: of the argument that `path` comes from, for the error.
    :raises ValueError: if there are none.
    """
    inside = split_archive(path)
    if not inside and not (path and bf.exists(path)):
        raise ValueError(f"{name} {path!r} does not exist: give an image, or a folder or zip of images")
    alone = inside[1].lower().endswith(IMAGE_EXTENSIONS) if inside else not bf.isdir(path)
    if alone:
        return [path]
    listing = find_images(path)
    if not listing.images:
        raise ValueError(f"{name} {path!r} holds no images, {listing.skipped()}: give some, or an image itself")
    return [listing.path(image) for image in listing.images]


class InitImages:
    """Images and their masks, both taken in turn: sample i starts from image i % n, and keeps what mask i % m says.

    They are scaled and cropped as in training, the masks like the images.

    :param images: path of an image, or of a folder or zip of images.
    :param size: of the samples.
    :param channels: C of the samples.
    :param masks: path of a mask, or of a folder or zip of masks: white is kept, black is not; '' for none.
    :param swap: black is kept, white is not.
    :raises ValueError: if there is nothing at a path.
    """

    def __init__(self, images: str, size: Size, channels: int, *, masks: str = "", swap: bool = False) -> None:
        self.channels, self.swap = channels, swap
        self.images = self._dataset(images_at(images, "init_image"), size, channels)
        self.masks = self._dataset(images_at(masks, "mask"), size, 1) if masks else None

    @staticmethod
    def _dataset(paths: Sequence[str], size: Size, channels: int) -> ImageDataset:
        return ImageDataset(size, paths, random_flip=False, image_channels=channels)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, indices: Sequence[int]) -> dict[str, th.Tensor]:
        """init_image [B, C, H, W] in [-1, 1] of the samples with these indices, and mask [B, 1, H, W] if there are any.

        Bytes come back as they were from `pictures.to_uint8`.
        """
        rows = {"init_image": self._stack(self.images, indices)}
        if self.masks is not None:
            rows["mask"] = ((self._stack(self.masks, indices) > 0) != self.swap).float()
        return rows

    @staticmethod
    def _stack(dataset: ImageDataset, indices: Sequence[int]) -> th.Tensor:
        return th.from_numpy(np.stack([_reversible(dataset[index % len(dataset)][0]) for index in indices]))

    def check(self, count: int) -> str:
        """Read what the first `count` samples start from; returns 16 hex digits that stand for it.

        :raises ValueError: if an image cannot be read, or a mask has another size than its image.
        """
        turns = range(min(count, math.lcm(len(self.images), len(self.masks) if self.masks is not None else 1)))
        digest = hashlib.sha256()
        for index in turns:
            self._check_size(index)
            digest.update(fingerprint(self.rows([index])).encode())
        return digest.hexdigest()[:16]

    def _check_size(self, index: int) -> None:
        if self.masks is None:
            return
        image = self.images.local_images[index % len(self.images)]
        mask = self.masks.local_images[index % len(self.masks)]
        theirs, own = _size_of(image, self.channels), _size_of(mask, 1)
        if theirs != own:
            names = os.path.basename(image), os.path.basename(mask)
            sizes = ["x".join(map(str, size)) for size in (theirs, own)]
            raise ValueError(
                f"the mask {names[1]} is {sizes[1]} and its image {names[0]} {sizes[0]} (height x width): "
                "give a mask of the image's own size"
            )


def _size_of(path: str, channels: int) -> tuple[int, int]:
    """Height and width of an image before it is cropped."""
    return size_of(read_image(path, channels))


def _reversible(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """[C, H, W] in [-1, 1], raised by one unit in the last place where truncation would not give the byte back."""
    levels = (image + np.float32(1)) * np.float32(127.5)
    lost = np.trunc(levels) < np.round(levels)
    return np.where(lost, np.nextafter(image, np.float32(2)), image)
