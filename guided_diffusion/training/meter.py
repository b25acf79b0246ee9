"""The losses and the speed of the steps between two lines of the log, and the progress bar.

Shapes: N images of all ranks, n of one rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

from .. import dist_util, logger

LEGEND = {
    "loss": "what is minimised",
    "mse": "the squared error of the prediction",
    "vb": "the variational bound in bits per dimension",
    "acc@1": "the share of labels that the first guess is",
}
QUARTERS = "; NAME_q0 .. NAME_q3 are the same over the quarters of t, from the least noisy to the noisiest"


class Meter:
    """Collects losses on their device and times on the host, so that a step waits for neither.

    :param global_batch: images per step, of all ranks.
    :param done: steps before the first one; `total` steps at the end, 0 if there is no end.
    :param progress: show a bar on stderr, on rank 0.
    """

    def __init__(self, global_batch: int, *, done: int = 0, total: int = 0, progress: bool = False) -> None:
        self.global_batch = global_batch
        shown = progress and dist_util.rank() == 0
        self._bar = logger.progress_bar(shown=shown, total=total or None, initial=done, unit="step", dynamic_ncols=True)
        self._losses: list[dict[str, th.Tensor]] = []
        self._explained = False
        self._restart()

    def _restart(self) -> None:
        self._start, self._waited, self._steps, self._stalled = time.perf_counter(), 0.0, 0, 0.0

    def __enter__(self) -> Meter:
        self._restart()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self, *, saving: bool = False) -> Iterator[None]:
        """Leave the time inside out of the measured speed, and count it as standing still for a checkpoint."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start
        self._stalled += saving * (time.perf_counter() - start)

    def add_losses(self, t: th.Tensor, losses: Mapping[str, th.Tensor]) -> None:
        """Keep the losses [n] of this rank's images at steps t [n]."""
        self._losses.append({"t": t, **{name: value.detach() for name, value in losses.items()}})

    def drop_losses(self) -> None:
        """Forget the losses that were added last."""
        self._losses = self._losses[:-1]

    def step_done(self) -> None:
        self._steps += 1
        speed = self._per_second(self._steps * self.global_batch)
        self._bar.set_postfix_str(f"{speed:.3g} images/s, {100 * self.data_wait:.0f}% waiting for data", refresh=False)
        self._bar.update()

    def _per_second(self, amount: float) -> float:
        return amount / max(time.perf_counter() - self._start, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of the time since the last line of the log in which this rank waited for data."""
        return self._per_second(self._waited)

    def dump(self, log_losses: Callable[[th.Tensor, dict[str, th.Tensor]], object], prefix: str = "") -> None:
        """Write a line of the log, if there is a step that none holds; every rank calls it.

        :param log_losses: of (t, losses), as `log_loss_dict`; `prefix` goes before their names.
        """
        if self._losses:  # not where a subclass of the loop computes and logs them in its own way
            rows, self._losses = self._losses, []
            t, losses = gather_losses(join(rows))
            log_losses(t, {prefix + name: value for name, value in losses.items()})
            self._explain(losses, prefix)
        if self._steps:
            self.log_speed()
            logger.dumpkvs()

    def _explain(self, names: Iterable[str], prefix: str) -> None:
        """Say once what the columns of losses are."""
        known = ", ".join(f"{prefix}{name} is {LEGEND[name]}" for name in names if name in LEGEND)
        if known and not self._explained:
            quartered = any("_q" in name for name in logger.getkvs())
            logger.log(f"columns of the log: {known}{QUARTERS if quartered else ''}")
        self._explained = True

    def log_speed(self) -> None:
        """Log images_per_second, data_wait (of the rank that waited longest) and save_stall; every rank calls it."""
        logger.logkv("images_per_second", self._per_second(self._steps * self.global_batch))
        logger.logkv("data_wait", max(dist_util.gather_objects(self.data_wait)))
        if self._stalled:
            logger.logkv("save_stall", self._stalled)
        self._restart()


def join(rows: Sequence[Mapping[str, th.Tensor]]) -> dict[str, th.Tensor]:
    """The entries of all rows, one after the other."""
    return {name: th.cat([row[name] for row in rows]) for name in rows[0]}


def gather_losses(local: Mapping[str, th.Tensor]) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """The entry "t" and the others, of all ranks one after the other; every rank must call it."""
    table = th.stack([value.float() for value in local.values()], dim=1)
    columns = dict(zip(local, th.cat(dist_util.gather(table)).unbind(1), strict=True))
    return columns.pop("t").long(), columns


def log_loss_dict(diffusion: Any, ts: th.Tensor, losses: Mapping[str, th.Tensor]) -> None:
    """Log the mean of each loss [N], and its mean over each quarter of the timesteps as NAME_q0 .. NAME_q3."""
    columns = th.stack([ts.float(), *(value.detach().float() for value in losses.values())]).cpu()
    quarters = (columns[0].long() * 4 // diffusion.num_timesteps).tolist()
    for name, values in zip(losses, columns[1:].tolist(), strict=True):
        logger.logkv_mean(name, float(np.mean(values)))
        for quarter, value in sorted(zip(quarters, values, strict=True)) if diffusion.num_timesteps > 1 else ():
            logger.logkv_mean(f"{name}_q{quarter}", value)
