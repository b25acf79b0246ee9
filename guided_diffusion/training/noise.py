"""The random numbers of a training step, by key, so that neither the number of ranks nor microbatches change them.

A rank draws the noise of its own images alone, by (seed, number of the image), and the few numbers that there are per
image (t, weights, dropped labels) for all ranks, by (seed, step).

Shapes: N images of a step on all ranks together, n of them on one rank or in one microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th

from .. import dist_util
from ..runtime.errors import refuse
from ..runtime.seeds import image_seed, to_device

if TYPE_CHECKING:
    from ..resample import ScheduleSampler

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


def _of_rank(count: int) -> slice:
    """The place of this rank's `count` images among those of all ranks."""
    first = dist_util.rank() * count
    return slice(first, first + count)


def _noise(batch: th.Tensor, index: int, seed: int, device: th.device) -> th.Tensor:
    """Noise for this rank's images of batch `index`, each by the seed and its number alone."""
    first = (index * dist_util.world_size() + dist_util.rank()) * len(batch)
    noise, generator = th.empty(batch.shape, device=device), th.Generator(device)
    for number, image in enumerate(noise, first):
        image.normal_(generator=generator.manual_seed(image_seed(seed, number)))
    return noise


def draw_for_training(batch: th.Tensor, sampler: ScheduleSampler, seed: int, index: int, device: th.device) -> Draw:
    """This rank's part of step `index`; every rank has as many images in its batch."""
    count, part, seed = len(batch) * dist_util.world_size(), _of_rank(len(batch)), seed + TRAINING
    keyed = {"rng": np.random.default_rng([seed, index])}
    t, weights = sampler.sample(count, device, **(keyed if "rng" in signature(sampler.sample).parameters else {}))
    return Draw(t[part], weights[part], _noise(batch, index, seed, device))


def draw_for_validation(
    batch: th.Tensor, num_timesteps: int, seed: int, index: int, device: th.device, counted: int | None = None
) -> Draw:
    """This rank's part of validation batch `index`: steps spread evenly, so that a few images see every noise level.

    :param counted: over how many of the images of all ranks, from the first on; None: over all of them.
    """
    count, seed = len(batch) * dist_util.world_size(), seed + VALIDATION
    spread = counted or count
    steps = (np.random.default_rng([seed, index]).permutation(spread) + 0.5) * num_timesteps / spread
    t = to_device(th.from_numpy(np.resize(steps, count)[_of_rank(len(batch))]).long(), device)
    return Draw(t, th.ones(len(batch), device=device), _noise(batch, index, seed, device))


@dataclass(frozen=True)
class LabelDropout:
    """Turns labels into "no class" in training, so that one network learns both scores (Ho and Salimans 2022, alg. 1).

    :param rate: the probability for each label.
    :param null_label: of the network, None where it has none.
    :param null_vector: the network knows nan for "no vector"; a dropped image loses label and vector alike.
    """

    rate: float
    null_label: int | None
    null_vector: bool = False

    def __post_init__(self) -> None:
        flag, unknown = f"class_dropout {self.rate}", self.null_label is None and not self.null_vector
        refuse(
            (not 0 <= self.rate <= 1, f"{flag} is no probability: give 0 for none, or a number up to 1"),
            (self.rate and unknown, f"{flag} needs a network that knows 'no class', by its null_label"),
        )

    def __call__(self, cond: Mapping[str, th.Tensor], seed: int, index: int) -> Mapping[str, th.Tensor]:
        """The model keywords of step `index` with "y" and "vector" of this rank dropped; rate 0 draws nothing."""
        nulls = {"y": self.null_label, "vector": math.nan if self.null_vector else None}
        used = {name: value for name, value in nulls.items() if value is not None and self.rate}
        if not used:
            return cond
        missing = sorted(used.keys() - cond.keys())
        remedy = f"give them under {' and '.join(map(repr, missing))}"
        refuse((missing, f"class_dropout {self.rate} drops labels and the data have none: {remedy}"))
        labels = cond[next(iter(used))]
        # spawned, unlike the key of t: another stream
        rng = np.random.default_rng(np.random.SeedSequence(seed + TRAINING, spawn_key=(2, index)))
        dropped = rng.random(len(labels) * dist_util.world_size())[_of_rank(len(labels))] < self.rate
        mask = to_device(th.from_numpy(dropped), labels.device)
        masks = {name: mask.view(-1, *[1] * (cond[name].ndim - 1)) for name in used}
        return {**cond, **{name: cond[name].masked_fill(masks[name], null) for name, null in used.items()}}
