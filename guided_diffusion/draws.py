"""What a step draws, for all images of all ranks at once, by key: neither ranks nor microbatches change it.

Shapes: N images of a step on all ranks together, n of them on one rank or in one microbatch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.seeds import image_generator

# Added to the seed, so that training, validation and sampling never draw the same numbers.
TRAINING, VALIDATION = 1 << 64, 2 << 64


class Draw(NamedTuple):
    """The random part of a step: t [n], importance weights [n], noise of the images' shape [n, ...]."""

    t: th.Tensor
    weights: th.Tensor
    noise: th.Tensor

    def cut(self, part: slice) -> Draw:
        """The part for some of the images."""
        return Draw(*(value[part] for value in self))


def _own(draw: Draw, count: int) -> Draw:
    first = dist_util.rank() * count
    return draw.cut(slice(first, first + count))


def _noise(batch: th.Tensor, count: int, seed: int, index: int, device: th.device) -> th.Tensor:
    return th.randn(count, *batch.shape[1:], generator=image_generator(seed, index, device), device=device)


def draw_for_training(batch: th.Tensor, sampler: ScheduleSampler, seed: int, index: int, device: th.device) -> Draw:
    """This rank's part of step `index`; every rank has as many images in its batch."""
    count, seed = len(batch) * dist_util.world_size(), seed + TRAINING
    t, weights = sampler.sample(count, device, rng=np.random.default_rng([seed, index]))
    return _own(Draw(t, weights, _noise(batch, count, seed, index, device)), len(batch))


def draw_for_validation(batch: th.Tensor, num_timesteps: int, seed: int, index: int, device: th.device) -> Draw:
    """This rank's part of validation batch `index`: steps spread evenly, so that a few images see every noise level."""
    count, seed = len(batch) * dist_util.world_size(), seed + VALIDATION
    steps = (np.random.default_rng([seed, index]).permutation(count) + 0.5) * num_timesteps / count
    t = th.from_numpy(steps).long().to(device)
    weights = th.ones(count, device=device)
    return _own(Draw(t, weights, _noise(batch, count, seed, index, device)), len(batch))
