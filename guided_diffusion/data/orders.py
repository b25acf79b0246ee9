"""The order of the images of every epoch, by (seed, epoch) alone: of all, within windows of shards, or by weights.

An order is a function of the epoch: the pass and the index of each of its N images. Pass p of an image is the p-th time
that it is shown, by which it is augmented; without weights that is the epoch.

Shapes: N images, S shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UserError

Numbers = NDArray[np.int64]
Order = Callable[[int], tuple[Numbers, Numbers]]  # epoch -> (passes [N], indices [N])

WINDOW = 16  # shards that are shuffled together


def plain(count: int, seed: int | None, epoch: int) -> tuple[Numbers, Numbers]:
    """A permutation of all; with `seed` None, 0 .. N-1."""
    indices = np.arange(count) if seed is None else np.random.default_rng([seed, epoch]).permutation(count)
    return np.full(count, epoch), indices


def windowed(shards: Numbers, window: int, seed: int, epoch: int) -> tuple[Numbers, Numbers]:
    """The shards in a permutation, cut into windows of so many, each with its images in a permutation.

    :param shards: [N] the shard of each image, 0 .. S-1.
    """
    draws = np.random.default_rng([seed, epoch])
    turn = draws.permutation(int(shards.max()) + 1)  # of each shard
    indices = np.lexsort((draws.permutation(len(shards)), turn[shards] // window))
    return np.full(len(shards), epoch), indices


def weighted(groups: Sequence[Numbers], weights: Sequence[float], seed: int, epoch: int) -> tuple[Numbers, Numbers]:
    """Of each group its share of the epoch, in passes through it: all of its images come up equally often.

    :param groups: indices of the images of each.
    """
    counts, places = shares(groups, weights), np.random.default_rng([seed, epoch])
    passes, indices = list[Numbers](), list[Numbers]()
    for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
        turns, within = np.divmod(np.arange(epoch * count, (epoch + 1) * count), len(group))
        permuted = {turn: np.random.default_rng([seed, number, turn]).permutation(group) for turn in np.unique(turns)}
        passes.append(turns)
        indices.append(np.concatenate([permuted[turn][within[turns == turn]] for turn in np.unique(turns)]))
    mixed = places.permutation(sum(counts))
    return np.concatenate(passes)[mixed], np.concatenate(indices)[mixed]


def shares(groups: Sequence[Numbers], weights: Sequence[float]) -> list[int]:
    """How many images of an epoch come from each group: N in all, in proportion to the weights.

    :raises UserError: if nothing is left of a group.
    """
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * sum(map(len, groups)))
    counts = np.diff(ends, prepend=0).astype(int).tolist()
    if 0 in counts:
        small = counts.index(0)
        raise UserError(
            f"a weight of {weights[small]:g} in {sum(weights):g} leaves nothing of {len(groups[small])} images in an "
            f"epoch of {sum(map(len, groups))}: raise it, or leave them out"
        )
    return list(counts)


def order_of(
    count: int,
    seed: int | None,
    *,
    shards: Numbers | None = None,
    window: int = WINDOW,
    labels: Sequence[int] = (),
    parts: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> Order:
    """The order of N images.

    :param seed: None for that of their names.
    :param shards: [N] the shard of each image, to shuffle within windows of these.
    :param labels: [N] class ids, to show all classes equally often.
    :param parts: the number of images of each data set, to show them by their `weights`.
    """
    if seed is None or not (weights or len(labels)):
        return (
            partial(plain, count, seed) if seed is None or shards is None else partial(windowed, shards, window, seed)
        )
    ends = np.cumsum(parts)
    groups = [np.flatnonzero(np.asarray(labels) == label) for label in np.unique(labels)]
    if weights:
        groups = [np.arange(end - size, end) for size, end in zip(parts, ends, strict=True)]
    shares(groups, weights or [1] * len(groups))
    return partial(weighted, groups, weights or [1] * len(groups), seed)
