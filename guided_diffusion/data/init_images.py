"""Images to start sampling from, and masks that say what to keep of them.

Shapes: B batch, C channels, H W space. A size is 64, "64x128" or (64, 128): height before width.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np
import torch as th
from numpy.typing import NDArray

from ..runtime.errors import printable, refuse
from ..runtime.npz import fingerprint
from ..runtime.options import Size
from ..runtime.pictures import levels
from .conditioning import CondKind
from .decoding import Range
from .sources import by_name, images_at, read_size

DESCRIBED = 5  # masks of which it is said what they keep


class InitImages:
    """Images and their masks, taken in turn: sample i starts from image i % n, and keeps what its mask says.

    They are scaled and cropped as in training, the masks like the images. One mask is that of all images, and one image
    takes several masks in turn; several of both belong together by name, but for the extension.

    :param images: path of an image, or of a folder, zip or array of images.
    :param size: of the samples.
    :param channels: C of the samples.
    :param masks: path of a mask, or of a folder, zip or array of masks: white is kept, black is not (`decode_mask`
        says what is white); '' for none.
    :param swap: black is kept, white is not.
    :param data_range: of the images, as `sources.read_image` takes it.
    """

    def __init__(
        self,
        images: str,
        size: Size,
        channels: int,
        *,
        masks: str = "",
        swap: bool = False,
        data_range: Range | None = None,
    ) -> None:
        self.channels, self.size, self.swap = channels, size, swap
        self._kind, self._mask_kind = CondKind("image", channels, data_range), CondKind("mask", 1)
        source = images_at(images, "init_image", channels)
        partners = images_at(masks, "mask") if masks else None
        self.images, self.masks = source.paths, partners.paths if partners else []
        if partners and min(len(source), len(partners)) > 1:
            pairs, unpaired = by_name(source, partners, "mask")
            refuse((unpaired, f"{unpaired}: several images and masks belong together by name: add or remove some"))
            self.masks = [partners.path(mask) for _, mask in pairs]

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, indices: Sequence[int]) -> dict[str, th.Tensor]:
        """init_image [B, C, H, W] in [-1, 1] of the samples with these indices, and mask [B, 1, H, W] if there are any.

        `pictures.to_uint8` gives the bytes of the files back.
        """
        images = [_reversible(self._kind.load(self.images[index % len(self)], self.size)) for index in indices]
        rows = {"init_image": th.from_numpy(np.stack(images))}
        if self.masks:
            rows["mask"] = th.from_numpy(np.stack([self._mask(index) for index in indices]))
        return rows

    def _mask(self, index: int) -> NDArray[np.float32]:
        white = self._mask_kind.load(self.masks[index % len(self.masks)], self.size)
        return 1 - white if self.swap else white

    def check(self, count: int) -> str:
        """Read what the first `count` samples start from; returns 16 hex digits that stand for it."""
        digest = hashlib.sha256()
        for index in range(min(count, math.lcm(len(self), len(self.masks) or 1))):
            if self.masks:
                image, mask = self.images[index % len(self)], self.masks[index % len(self.masks)]
                sizes = ["x".join(map(str, read_size(path))) for path in (image, mask)]
                names = [os.path.basename(path) for path in (image, mask)]
                both = f"the mask {names[1]} is {sizes[1]} and its image {names[0]} {sizes[0]} (height x width)"
                refuse((sizes[0] != sizes[1], f"{both}: give a mask of the image's own size"))
            digest.update(fingerprint(self.rows([index])).encode())
        return digest.hexdigest()[:16]

    def describe_masks(self, count: int) -> list[str]:
        """What of an image the masks of the first samples keep, for the first few."""
        lines = []
        for index, path in enumerate(self.masks[: min(count, DESCRIBED)]):
            share = float(self._mask(index).mean())
            kept = {0.0: "nothing is kept, all is painted", 1.0: "all is kept, nothing is painted"}
            name = printable(os.path.basename(path))
            lines.append(f"mask {name}: {kept.get(share, f'{100 * share:.3g} % is kept')}")
        return lines


def _reversible(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """[C, H, W] in [-1, 1], raised by one unit in the last place where truncation would not give the byte back."""
    lost = np.trunc(levels(image)) < np.round(levels(image))
    return np.where(lost, np.nextafter(image, np.float32(2)), image)
