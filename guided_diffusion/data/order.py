"""Which images a rank takes: one endless sequence of epochs, cut into global batches, and those into ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]  # (epoch, index)


class Schedule(Iterable[list[Key]]):
    """Which images one rank takes: the keys of its batches from the position `taken` on, as seen when iteration begins.

    It knows nothing of the stream it serves. In a cycle of references the loader's workers would outlive the stream.
    """

    def __init__(self, count: int, seed: int, *, batch_size: int, rank: int, world_size: int, shuffle: bool) -> None:
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self.batch_size = batch_size
        self.stride = batch_size * world_size
        self.offset = batch_size * rank
        self.taken = 0  # images, by all ranks together
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.keys, itertools.count(self.taken, self.stride))

    def keys(self, taken: int) -> list[Key]:
        """What the rank takes when all of them have taken so many images."""
        first, known = taken + self.offset, self._orders
        places = [divmod(place, self.count) for place in range(first, first + self.batch_size)]
        self._orders = {epoch: self._order(epoch) if epoch not in known else known[epoch] for epoch, _ in places}
        return [(epoch, int(self._orders[epoch][place])) for epoch, place in places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.count)
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)
