"""Upsamplers' small images: made of large ones in training, read for sampling, and noise on both.

Shapes: N images, C channels, h w the space of the small images, H W that of the large ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray

from ..runtime import files
from ..runtime.errors import DAMAGE, WHY, UserError, as_user_error, quoted, refuse
from ..runtime.files import parse_json, path_fault, read_file
from ..runtime.jobs import REQUEST
from ..runtime.npz import PROMPTS, Npz, fingerprint
from ..runtime.options import Size, parse_size
from ..runtime.pictures import planes
from ..runtime.seeds import image_generator
from .decoding import Range
from .sources import Selection, images_at, read_pixels, read_size

NAMES = "names.json"  # beside an npz: which file each of its images comes from

# Added to the seed, so that noise on small images is that of nothing else.
TRAINING_NOISE, SAMPLING_NOISE = 3 << 64, 4 << 64

Pixels = NDArray[np.uint8]


def _noised(low_res: th.Tensor, levels: th.Tensor, generators: Sequence[th.Generator]) -> dict[str, th.Tensor]:
    """Small images [N, C, h, w] with noise of levels [N]: sqrt(1 - level^2) low_res + level noise; and the levels."""
    noise = th.stack([th.randn(low_res.shape[1:], generator=generator) for generator in generators])
    scale = levels.view(-1, 1, 1, 1)
    return {"low_res": (1 - scale**2).sqrt() * low_res + scale * noise, "low_res_level": levels}


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

        :param places: of the images in the sequence of all that training takes, by which noise is drawn.
        """
        low_res = F.interpolate(images, self.size, mode="area")
        if not self.cond_aug:
            return {"low_res": low_res}
        generators = [image_generator(self.seed + TRAINING_NOISE, place) for place in places]
        levels = self.cond_aug * th.stack([th.rand((), generator=generator) for generator in generators])
        return _noised(low_res, levels, generators)


def check_sizes(large_size: Size, small_size: Size) -> tuple[int, int]:
    """(height, width) of the small images of an upsampler, which are no larger than its large ones."""
    (height, width), small = parse_size(large_size), parse_size(small_size)
    larger = small[0] > height or small[1] > width
    refuse((larger, f"small_size {small_size} exceeds large_size {large_size}; give a small_size within it"))
    return small


@dataclass(frozen=True)
class BaseImages:
    """Images to enlarge.

    :param pixels: [N, h, w, C].
    :param labels: class ids, None where they have none.
    :param names: the files that they come from, [] where they come from none.
    :param left_out: how many more there are.
    :param prompts: the texts that they were made for, [] where they were made for none.
    """

    pixels: Pixels
    labels: list[int] | None = None
    names: list[str] = field(default_factory=list)
    left_out: int = 0
    prompts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pixels)

    def request(self) -> dict[str, str]:
        """Their fingerprints in a sampling request."""
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
        return _noised(low_res, th.full((len(low_res),), level), generators)


def read_base(
    path: str, shape: tuple[int, int, int], selection: Selection, data_range: Range | None = None
) -> BaseImages:
    """The first images of an npz, of a run that sampled, of a folder, zip or npy, or a single one.

    :param shape: (h, w, C) of each; h and w 0 take the size of the first.
    :param data_range: as `read_image` takes it.
    """
    try:
        where = files.resolve(path)
        source = images_at(_samples_in(where) or where, "--base_samples", shape[2])
        chosen, labels = selection.of(source)
        sizes = {name: read_size(where) for name, where in zip(chosen.images, chosen.paths, strict=True)}
        size = shape[:2] if shape[0] else next(iter(sizes.values()))
        odd = [f"{quoted(name)} with {other[0]}x{other[1]}" for name, other in sizes.items() if other != size]
        of_size = f"of {'small_size ' * bool(shape[0])}{size[0]}x{size[1]}"
        fault = f"{len(odd)} of {len(chosen)} images are not {of_size}, the first is {''.join(odd[:1])}"
        refuse((odd, f"{fault}: scale them, or leave them out"))
        pixels = [read_pixels(where, shape[2], data_range=data_range) for where in chosen.paths]
        names = _names_beside(source.root, len(source)) if source.array else list(source.images)
        prompts = _prompts_in(source.root, len(source)) if source.array else []
        left_out = len(source) - len(chosen)
        return BaseImages(np.stack(pixels), labels, names[: len(chosen)], left_out, prompts[: len(chosen)])
    except ValueError as error:
        raise error if str(error).startswith("--") else UserError(f"--base_samples: {error}") from error


def _samples_in(folder: str) -> str:
    """The npz of a folder that sampling left, '' for any other."""
    names = files.names_in(folder)
    samples = [name for name in names if re.fullmatch(r"samples_.*\.npz", name)]
    return files.join(folder, samples[0]) if len(samples) == 1 and REQUEST in names else ""


def _prompts_in(path: str, count: int) -> list[str]:
    """The prompts in an npz of samples."""
    if not path.endswith(".npz"):
        return []
    with Npz(path) as archive:
        prompts = archive.texts(PROMPTS) if PROMPTS in archive else []
    other = len(prompts) not in (0, count)
    refuse((other, f"{path} holds {len(prompts)} {PROMPTS} for {count} images: give one for each, or none"))
    return prompts


def _names_beside(path: str, count: int) -> list[str]:
    """The files that the images of an npz come from, as the upsampler that made it wrote them down."""
    where = files.join(os.path.dirname(path) or ".", NAMES)
    if not files.exists(where):
        return []
    with as_user_error(f"{where} cannot be used ({WHY}): repair or remove it", *DAMAGE):
        record = parse_json(read_file(where))
        if record["file"] != os.path.basename(path):
            return []
        names: list[str] = record["names"]
        named = isinstance(names, list) and len(names) == count
        named = named and not any(path_fault(name, "folder") for name in names)
        refuse((not named, f"it does not name {count} files within the folder"))
        return names


def picture_names(names: Sequence[str]) -> list[str]:
    """The PNG file of each of these image files: its extension replaced, or kept where that names two alike."""
    short = [re.sub(r"\.[^./]+$", "", name) + ".png" for name in names]
    alike = len({name.casefold() for name in short}) < len(short)
    return [f"{name}.png" for name in names] if alike else short
