"""What a step draws, for all images of all ranks at once, by key: neither ranks nor microbatches change it.

Shapes: N images of a step on all ranks together, n of them on one rank or in one microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import numpy as np
import torch as th

from . import dist_util
from .resample import ScheduleSampler
from .seeds import image_generator, to_device

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


def _own(count: int) -> slice:
    """Where this rank's `count` images are among those of all ranks."""
    first = dist_util.rank() * count
    return slice(first, first + count)


def _noise(batch: th.Tensor, count: int, seed: int, index: int, device: th.device) -> th.Tensor:
    return th.randn(count, *batch.shape[1:], generator=image_generator(seed, index, device), device=device)


def draw_for_training(batch: th.Tensor, sampler: ScheduleSampler, seed: int, index: int, device: th.device) -> Draw:
    """This rank's part of step `index`; every rank has as many images in its batch."""
    count, seed = len(batch) * dist_util.world_size(), seed + TRAINING
    keyed = {"rng": np.random.default_rng([seed, index])}
    t, weights = sampler.sample(count, device, **(keyed if "rng" in signature(sampler.sample).parameters else {}))
    return Draw(t, weights, _noise(batch, count, seed, index, device)).cut(_own(len(batch)))


def draw_for_validation(batch: th.Tensor, num_timesteps: int, seed: int, index: int, device: th.device) -> Draw:
    """This rank's part of validation batch `index`: steps spread evenly, so that a few images see every noise level."""
    count, seed = len(batch) * dist_util.world_size(), seed + VALIDATION
    steps = (np.random.default_rng([seed, index]).permutation(count) + 0.5) * num_timesteps / count
    t = to_device(th.from_numpy(steps).long(), device)
    weights = th.ones(count, device=device)
    return Draw(t, weights, _noise(batch, count, seed, index, device)).cut(_own(len(batch)))


@dataclass(frozen=True)
class LabelDropout:
    """Turns labels into "no class" in training, so that one network learns both scores (Ho and Salimans 2022, alg. 1).

    :param rate: the probability for each label.
    :param null_label: of the network, None where it has none.
    :raises ValueError: if the rate is no probability, or the network has no such label.
    """

    rate: float
    null_label: int | None

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"class_dropout {self.rate} is no probability: give 0 for none, or a number up to 1")
        if self.rate and self.null_label is None:
            raise ValueError(
                f"class_dropout {self.rate} needs a network that knows 'no class': build it with null_class True"
            )

    def __call__(self, cond: Mapping[str, th.Tensor], seed: int, index: int) -> Mapping[str, th.Tensor]:
        """The model keywords of step `index` with labels "y" [n] of this rank dropped; rate 0 draws nothing."""
        if not self.rate or self.null_label is None:
            return cond
        if "y" not in cond:
            raise ValueError(f"class_dropout {self.rate} drops labels and the data have none: give them under 'y'")
        labels = cond["y"]
        # spawned, unlike the key of t: another stream
        rng = np.random.default_rng(np.random.SeedSequence(seed + TRAINING, spawn_key=(2, index)))
        dropped = rng.random(len(labels) * dist_util.world_size())[_own(len(labels))] < self.rate
        return {**cond, "y": labels.masked_fill(to_device(th.from_numpy(dropped), labels.device), self.null_label)}
