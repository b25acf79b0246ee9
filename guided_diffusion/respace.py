"""Sampling with fewer steps than training: which steps to take, and the process made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from typing import Any

import numpy as np

from guided_diffusion.gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The steps of a process of `num_timesteps` to keep.

    :param section_counts: "ddimN", N steps at an integer stride from 0 (Song et al. 2021); or how many steps to take
        from each of equally long sections, as numbers or "10,15,20", the first one nearest to the image.
    :raises ValueError: if there is no such stride, or a section is shorter than its count.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _even_stride(num_timesteps, section_counts.removeprefix("ddim"))
        section_counts = [_count(text, section_counts) for text in section_counts.split(",")]
    length, longer = divmod(num_timesteps, len(section_counts))
    steps: set[int] = set()
    start = 0
    for index, count in enumerate(section_counts):
        size = length + (index < longer)
        if not 1 <= count <= size:
            raise ValueError(f"timestep_respacing cannot take {count} steps from a section of {size}: use 1 to {size}")
        steps |= {start + offset for offset in _offsets(size, count)}
        start += size
    return steps


def _count(text: str, whole: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"timestep_respacing {whole!r} is not a grid: write '250', '10,15,20' or 'ddim25'")
    return int(text)


def _even_stride(num_timesteps: int, text: str) -> set[int]:
    count = _count(text, f"ddim{text}")
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"timestep_respacing ddim{text} does not fit {num_timesteps} steps: use 1 to {num_timesteps}")
    possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps + 1)}
    near = sorted(sorted(possible, key=lambda number: abs(number - count))[:2])
    raise ValueError(
        f"no integer stride takes exactly {count} of {num_timesteps} steps: "
        f"use ddim{' or ddim'.join(map(str, near))}, or '{count}'"
    )


def _offsets(size: int, count: int) -> list[int]:
    """`count` offsets from 0 to size - 1, evenly spaced and rounded.

    The stride is added up, not multiplied, so that rounding at halves falls as it always has.
    """
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    return [round(offset) for offset in accumulate(repeat(stride, count - 1), initial=0.0)]


class SpacedDiffusion(GaussianDiffusion):
    """A process that takes some of the steps of a longer one: new betas with the same alpha_bar at the steps kept.

    :param use_timesteps: the steps to keep, of the process described by `kwargs`.
    :param kwargs: as for `GaussianDiffusion`.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        alphas_cumprod = np.cumprod(1 - np.asarray(kwargs["betas"], dtype=np.float64))
        kept = sorted(self.use_timesteps)
        if not kept or not 0 <= kept[0] <= kept[-1] < len(alphas_cumprod):
            raise ValueError(f"use_timesteps must lie in 0 .. {len(alphas_cumprod) - 1}, and are {kept}")
        levels = np.append(1.0, alphas_cumprod[kept])
        betas = 1 - levels[1:] / levels[:-1]
        super().__init__(**{**kwargs, "betas": betas}, timestep_map=kept, original_num_steps=len(alphas_cumprod))
