"""Ending a long loop on SIGINT or SIGTERM after the step in progress, the same step on every rank."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch as th

from guided_diffusion import dist_util, logger

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside the block the first signal is only noted, so that a loop can save and stop; a second one acts at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def requested(self, *, together: bool) -> bool:
        """Whether to stop now.

        :param together: with several ranks, ask them all (each must ask at the same step); else only a lone rank stops.
        """
        if dist_util.world_size() == 1:
            return self.signum > 0
        if not together:
            return False
        self.signum = int(th.cat(dist_util.gather(th.tensor([self.signum], device=dist_util.dev()))).max())
        return self.signum > 0

    def end(self) -> None:
        """End the process with the code that the signal stands for, once everything is saved."""
        if self.signum:
            logger.log(f"stopped by {signal.Signals(self.signum).name}; everything is saved")
            raise SystemExit(128 + self.signum)
