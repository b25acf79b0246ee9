"""Training steps of our own loop, for comparison with the plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch as th

from guided_diffusion import logger
from guided_diffusion.train_util import TrainLoop


class Training:
    """Steps of `TrainLoop`, without its log and its files.

    :param options: further ones of the loop.
    """

    def __init__(self, model: Any, diffusion: Any, *, batch_size: int, precision: str, **options: Any) -> None:
        quiet = {"log_interval": 10**9, "save_interval": 0, "resume_checkpoint": ""}
        chosen = {"data": iter(()), "microbatch": -1, "lr": 1e-4, "ema_rate": "0.9999", **quiet, **options}
        with silent():
            self.loop = TrainLoop(
                model=model, diffusion=diffusion, batch_size=batch_size, precision=precision, **chosen
            )

    def __call__(self, images: th.Tensor, cond: Mapping[str, th.Tensor]) -> None:
        """One step, what is saved and said after it left out."""
        with silent():
            self.loop.run_step(images, cond)
        self.loop.step += 1


@contextmanager
def silent() -> Iterator[None]:
    """The log goes nowhere."""
    with TemporaryDirectory() as folder, logger.scoped_configure(dir=folder, format_strs=[]):
        yield


class Enough(Exception):
    """Raised by `Watched` in place of another batch."""


class Watched:
    """Batches, and when each of them was asked for and given.

    :param batches: an iterator; its other attributes stay within reach.
    :param count: how many to give.
    :param now: the clock, which waits for the device.
    """

    def __init__(self, batches: Any, count: int, now: Callable[[], float]) -> None:
        self._batches, self._count, self._now = batches, count, now
        self.asked: list[float] = []
        self.given: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __iter__(self) -> Watched:
        return self

    def __next__(self) -> Any:
        self.asked.append(self._now())
        if len(self.given) == self._count:
            raise Enough
        batch = next(self._batches)
        self.given.append(self._now())
        return batch

    def seconds(self, first: int) -> tuple[float, float]:
        """(seconds of all steps from the one number `first` on, those of them in which data were waited for)."""
        waits = zip(self.asked[first:], self.given[first:], strict=False)
        return self.asked[-1] - self.asked[first], sum(given - asked for asked, given in waits)
