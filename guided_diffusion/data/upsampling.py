"""What training and using upsamplers share: small versions of images, noise on them, and where others come from.

Shapes: N images, C channels, h w the space of the small images, H W that of the large ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray

from ..runtime import paths
from ..runtime.files import parse_json, path_fault, printable, quoted, read_file, reason
from ..runtime.jobs import REQUEST
from ..runtime.npz import fingerprint
from ..runtime.pictures import planes
from ..runtime.seeds import image_generator
from .crops import as_bytes
from .decoding import Range
from .sources import Listing, images_at, read_image, read_size

NAMES = "names.json"  # beside an npz: which file each of its images comes from

# Added to the seed, so that noise on small images is that of nothing else.
TRAINING_NOISE, SAMPLING_NOISE = 3 << 64, 4 << 64

Pixels = NDArray[np.uint8]
Label = Callable[[Listing], Sequence[int]]


# ---- noise on small images (Ho et al. 2022, Cascaded diffusion models, sec. 4)


def noised(low_res: th.Tensor, levels: th.Tensor, noise: th.Tensor) -> th.Tensor:
    """Small images [N, C, h, w] with noise of levels [N]: sqrt(1 - level^2) low_res + level noise."""
    levels = levels.view(-1, *[1] * (low_res.ndim - 1))
    return (1 - levels**2).sqrt() * low_res + levels * noise


@dataclass(frozen=True)
class SmallVersions:
    """Makes the small versions that an upsampler learns to enlarge.

    :param size: (h, w).
    :param cond_aug: the greatest level of noise on them, below which each image draws its own; 0: no noise.
    """

    size: tuple[int, int]
    cond_aug: float = 0.0
    seed: int = 0

    def __call__(self, images: th.Tensor, places: Sequence[int]) -> dict[str, th.Tensor]:
        """low_res [N, C, h, w] of images [N, C, H, W] by area, and low_res_level [N] where there is noise.

        :param places: where the images stand in the sequence of all that training takes, by which noise is drawn.
        """
        low_res = F.interpolate(images, self.size, mode="area")
        if not self.cond_aug:
            return {"low_res": low_res}
        generators = [image_generator(self.seed + TRAINING_NOISE, place) for place in places]
        levels = self.cond_aug * th.stack([th.rand((), generator=generator) for generator in generators])
        noise = th.stack([th.randn(low_res.shape[1:], generator=generator) for generator in generators])
        return {"low_res": noised(low_res, levels, noise), "low_res_level": levels}


# ---- images to enlarge


@dataclass(frozen=True)
class BaseImages:
    """Images to enlarge.

    :param pixels: [N, h, w, C].
    :param labels: class ids, None where they have none.
    :param names: the files that they come from, [] where they come from none.
    :param left_out: how many more there are.
    """

    pixels: Pixels
    labels: list[int] | None = None
    names: list[str] = field(default_factory=list)
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    def request(self) -> dict[str, str]:
        """What stands for them in a sampling request."""
        arrays = {"arr_0": self.pixels, **({} if self.labels is None else {"arr_1": np.asarray(self.labels)})}
        text = np.frombuffer("\n".join(self.names).encode(), np.uint8)
        named = {"names": fingerprint({"names": text})} if self.names else {}
        return {"base_samples": fingerprint(arrays), **named}

    def conditioning(self, indices: Sequence[int], *, level: float = 0.0, seed: int = 0) -> dict[str, th.Tensor]:
        """low_res [n, C, h, w] in [-1, 1] of some of them, with noise of a level, by seed and index alone."""
        low_res = planes(self.pixels[list(indices)])
        if not level:
            return {"low_res": low_res}
        generators = [image_generator(seed + SAMPLING_NOISE, index) for index in indices]
        noise = th.stack([th.randn(low_res.shape[1:], generator=generator) for generator in generators])
        levels = th.full((len(low_res),), level)
        return {"low_res": noised(low_res, levels, noise), "low_res_level": levels}


@dataclass(frozen=True)
class Wanted:
    """Which images to read.

    :param shape: (h, w, C) of each.
    :param count: how many, or fewer where there are fewer.
    :param all: fewer than `count` are an error.
    :param label: listing of a folder -> the class of each image; None leaves them without.
    :param data_range: as `read_image` takes it.
    """

    shape: tuple[int, int, int]
    count: int
    all: bool = False
    label: Label | None = None
    data_range: Range | None = None

    def of(self, there: int, path: str) -> int:
        """How many to take.

        :raises ValueError: if there are not as many as there must be.
        """
        if self.all and self.count > there:
            raise ValueError(f"--num_samples {self.count} is more than the {there} images of {path}")
        return min(there, self.count)


def read_base(path: str, wanted: Wanted) -> BaseImages:
    """The first images of an npz, of a run that sampled, of a folder, zip or npy, or a single one.

    :raises ValueError: if there are fewer than asked for, or they do not fit.
    """
    try:
        where = paths.resolve(path)
        listing = images_at(_samples_in(where) or where, "--base_samples", wanted.shape[2])
        return _read(listing, wanted)
    except ValueError as error:
        told = str(error)
        raise error if told.startswith("--") else ValueError(f"--base_samples: {told}") from error


def _samples_in(folder: str) -> str:
    """The npz of a folder that sampling left, '' for any other."""
    names = paths.names_in(folder)
    found = [name for name in names if re.fullmatch(r"samples_.*\.npz", name)]
    return paths.join(folder, found[0]) if len(found) == 1 and REQUEST in names else ""


def _names_beside(path: str, count: int) -> list[str]:
    """The files that the images of an npz come from, as an upsampler that made it wrote them down."""
    where = paths.join(os.path.dirname(path) or ".", NAMES)
    if not paths.exists(where):
        return []
    try:
        said = parse_json(read_file(where))
        if not isinstance(said, dict) or said.get("file") != os.path.basename(path):
            return []
        names = said.get("names")
        if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
            raise ValueError(f"it does not name {count} files")
        faults = [f"{printable(name)}: {fault}" for name in names if (fault := path_fault(name, "folder"))]
        if faults:
            raise ValueError(faults[0])
        return names
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be used ({reason(error)}): repair or remove it") from error


def _read(listing: Listing, wanted: Wanted) -> BaseImages:
    """Nothing but the images that are wanted, and of an array none before its shape fits."""
    there = len(listing.images)
    names = listing.images[: wanted.of(there, listing.root)]
    labels = listing.ids if wanted.label is None or listing.array else wanted.label(listing)
    first = read_size(listing.path(names[0])) if listing.array else wanted.shape[:2]
    pictures = list[Pixels]()
    if first == wanted.shape[:2]:
        pictures = [
            as_bytes(np.asarray(read_image(listing.path(name), wanted.shape[2], wanted.data_range))) for name in names
        ]
    sizes = [pixels.shape[:2] for pixels in pictures] or [first] * len(names)
    others = [(name, size) for name, size in zip(names, sizes, strict=True) if size != wanted.shape[:2]]
    if others:
        name, (height, width) = others[0]
        raise ValueError(
            f"--base_samples {listing.root}: {len(others)} of {len(names)} images are not of small_size "
            f"{wanted.shape[0]}x{wanted.shape[1]}, the first is {quoted(name)} with {height}x{width}: scale them, or "
            "leave them out"
        )
    files = _names_beside(listing.root, there)[: len(names)] if listing.array else list(names)
    return BaseImages(
        np.stack(pictures), None if labels is None else list(labels)[: len(names)], files, there - len(names)
    )


# ---- the files that they become


def picture_names(names: Sequence[str]) -> list[str]:
    """The PNG file of each of these image files: its extension replaced, or kept where that names two alike."""
    short = [re.sub(r"\.[^./]+$", "", name) + ".png" for name in names]
    alike = len({name.casefold() for name in short}) < len(short)
    return [f"{name}.png" for name in names] if alike else short
