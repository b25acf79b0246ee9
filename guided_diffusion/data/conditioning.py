"""Conditioning images: pictures, masks or maps of classes that a network sees beside the noisy image.

They enter the first convolution as further channels: pictures in [-1, 1], masks as 0 and 1, a map of K classes as K
channels of which one is 1 in each place. Zeros stand for "no conditioning image".

Shapes: N batch, C channels of images, K of conditioning images, H W space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from ..config import seen_channels
from ..runtime.errors import UserError
from ..runtime.npz import fingerprint
from ..runtime.options import Size
from .crops import Draws, Picture, center_crop_arr, channels_first, size_of
from .decoding import Range
from .sources import (
    ImageSource,
    Selection,
    UnreadableImage,
    by_name,
    find_images,
    images_at,
    naming,
    read_ids,
    read_image,
    read_mask,
)

NO_CLASS = 255  # in a map: none of the classes, zeros in all channels

Array = NDArray[np.float32]


@dataclass(frozen=True)
class CondKind:
    """How the numbers of conditioning images are read.

    :param name: image, mask, or classes.
    :param channels: K.
    :param data_range: of images, as `read_image` takes it.
    """

    name: str
    channels: int
    data_range: Range | None = None

    @property
    def nearest(self) -> bool:
        """Whether their numbers must not be mixed when they are scaled."""
        return self.name != "image"

    def read(self, path: str) -> Picture:
        """The picture in a file."""
        if self.name == "mask":
            return read_mask(path)
        if self.name == "image":
            return read_image(path, self.channels, self.data_range)
        ids, last = read_ids(path), self.channels - 1
        wrong = ids[(ids < 0) | ((ids > last) & (ids != NO_CLASS))]
        if wrong.size:
            allowed = f"cond_channels allows 0 .. {last}, and {NO_CLASS} for none"
            raise UnreadableImage(path, f"class {int(wrong[0])} in a map: {allowed}")
        return ids

    def encode(self, array: NDArray[Any]) -> Array:
        """A crop as the network sees it, [K, H, W]."""
        if self.name == "classes":
            ids = array.reshape(array.shape[:2]).astype(np.int64)
            planes: Array = (np.arange(self.channels)[:, None, None] == ids).astype(np.float32)
            return planes
        planes = channels_first(array)
        return (planes > 0).astype(np.float32) if self.name == "mask" else planes

    def load(self, path: str, size: Size) -> Array:
        """The middle of a file, scaled and cropped as in training, as the network sees it."""
        with naming(path):
            return self.encode(center_crop_arr(self.read(path), size, nearest=self.nearest))


def cond_kind(
    cond_type: str, cond_channels: int, image_channels: int, data_range: Range | None = None
) -> CondKind | None:
    """The kind that flags describe, None without conditioning images."""
    channels = seen_channels(cond_type, cond_channels, image_channels)
    return CondKind(cond_type, channels, data_range) if channels else None


@dataclass(frozen=True)
class Partners:
    """The conditioning images of a data set.

    :param paths: one for each image.
    :param dropout: probability of zeros in their place.
    """

    kind: CondKind
    paths: Sequence[str]
    dropout: float = 0.0

    def item(
        self, index: int, size: tuple[int, int], place: Callable[..., NDArray[Any]], draws: Draws
    ) -> dict[str, Array]:
        """cond_image [K, H, W] of one image.

        :param size: (height, width) of the image in its file.
        :param place: (picture, nearest=) crops and mirrors a picture as the image was.
        :param draws: of this image, behind those of its crop and its mirroring.
        """
        path = self.paths[index]
        picture = self.kind.read(path)
        if size_of(picture) != size:
            sizes = ["x".join(map(str, sides)) for sides in (size_of(picture), size)]
            raise UnreadableImage(path, f"it is {sizes[0]} and its image {sizes[1]} (height x width)")
        array = self.kind.encode(place(picture, nearest=self.kind.nearest))
        return {"cond_image": np.zeros_like(array) if self.dropout and draws.random() < self.dropout else array}


@dataclass(frozen=True)
class Pairing:
    """Where the conditioning images of a data set lie.

    :param folder: folder or zip; a file belongs to the image of the same name but for the extension.
    :param skip_unpaired: leave out images and conditioning images without a partner; else they are an error.
    :param dropout: of the `Partners`.
    """

    folder: str
    kind: CondKind
    skip_unpaired: bool = False
    dropout: float = 0.0

    def match(self, images: ImageSource, say: Callable[[str], object]) -> tuple[ImageSource, Partners]:
        """The images that have a conditioning image, and these.

        :param say: takes lines for the user.
        """
        conds = find_images(self.folder, self.kind.channels)
        pairs, unpaired = by_name(images, conds, "conditioning image")
        if not pairs or (unpaired and not self.skip_unpaired):
            remedy = "set skip_unpaired to True" if pairs else "names must agree but for the extension"
            raise UserError(f"{unpaired}: add or remove some; {remedy}")
        paths = [conds.path(cond) for _, cond in pairs]
        say(f"{conds.root}: found {len(conds)} conditioning images, {conds.skipped()}")
        if unpaired:
            say(f"  left out: {unpaired}")
        return replace(images, images=[image for image, _ in pairs]), Partners(self.kind, paths, self.dropout)


@dataclass(frozen=True)
class CondImages:
    """Conditioning images to sample for: the first is that of the first sample.

    :param labels: class ids, None where they have none.
    """

    kind: CondKind
    size: Size
    source: ImageSource
    labels: list[int] | None = None

    @property
    def names(self) -> list[str]:
        """The files that they come from, [] where they come from an array."""
        return [] if self.source.array else list(self.source.images)

    def load(self, index: int) -> Array:
        """One of them as the network sees it, [K, H, W]."""
        return self.kind.load(self.source.path(self.source.images[index]), self.size)

    def conditioning(self, indices: Sequence[int]) -> dict[str, th.Tensor]:
        """cond_image [n, K, H, W] of some samples."""
        return {"cond_image": th.from_numpy(np.stack([self.load(index) for index in indices]))}

    def request(self) -> dict[str, str]:
        """Their fingerprint in a sampling request; each is read once."""
        digest = hashlib.sha256("\n".join(self.names).encode())
        for index in range(len(self.source)):
            digest.update(fingerprint({"": self.load(index)}).encode())
        return {"cond_images": digest.hexdigest()[:16]}


def open_cond_images(path: str, kind: CondKind, size: Size, selection: Selection) -> CondImages:
    """The conditioning images at a path, scaled and cropped to a size as in training."""
    return CondImages(kind, size, *selection.of(images_at(path, "cond_images", kind.channels)))
