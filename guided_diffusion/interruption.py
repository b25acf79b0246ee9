"""Ending a long loop on SIGINT, SIGTERM or SIGUSR1 after the step in progress, the same step on every rank."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

import torch as th

from . import dist_util, logger

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ECHO = 1.0  # seconds in which a launcher passes on what the terminal has sent already: no second request
ASK_EVERY = 2.0  # seconds between two questions to all ranks, at most one step more


class Interruption:
    """Inside the block the first signal is only noted, so that a loop can save and stop; a later one acts at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, object] = {}
        self._noted = 0.0
        self._asked, self._asked_at, self._next = 0, time.monotonic(), 0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._noted = signum, time.monotonic()
        elif time.monotonic() - self._noted > ECHO:
            self._restore()
            signal.raise_signal(signum)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def requested(self, step: int) -> bool:
        """Whether to stop now, after `step`; with several ranks every one calls it after every step, and all agree.

        They ask each other every ASK_EVERY seconds, and decide from what all of them then say after how many steps
        they will do so again: asking costs a collective.
        """
        if dist_util.world_size() == 1:
            return self.signum > 0
        if step < self._next:
            return False
        pace = (time.monotonic() - self._asked_at) / max(1, step - self._asked)
        said = th.tensor([[float(self.signum), pace]], device=dist_util.dev())
        signum, pace = th.cat(dist_util.gather(said)).max(dim=0).values.tolist()
        self.signum = int(signum)
        self._asked, self._asked_at = step, time.monotonic()
        self._next = step + max(1, int(ASK_EVERY / max(pace, 1e-3)))
        return self.signum > 0

    def end(self) -> None:
        """End the process with the code that the signal stands for, once everything is saved."""
        if self.signum:
            logger.log(f"stopped by {signal.Signals(self.signum).name}; everything is saved")
            raise SystemExit(128 + self.signum)
