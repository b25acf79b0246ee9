"""Ending a long loop after the step in progress, the same step on every rank: on a signal, or on an error of a rank."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

import torch as th

from .. import dist_util, logger
from ..runtime.errors import refuse

R = TypeVar("R")

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ECHO = 1.0  # seconds in which a launcher passes on what the terminal has sent already: no second request
ASK_EVERY = 2.0  # seconds between two questions to all ranks, at most one step more


class Interruption:
    """Inside the block the first signal is only noted, so that a loop can save and stop; a later one acts at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}
        self._noted = 0.0
        self._asked, self._asked_at, self._next = 0, time.monotonic(), 0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._noted = signum, time.monotonic()
        elif time.monotonic() - self._noted > ECHO:
            self.__exit__()
            signal.raise_signal(signum)

    def requested(self, step: int) -> bool:
        """Whether to stop now, after `step`; with several ranks every one calls it after every step, and all agree.

        Asking costs a collective: they do so every ASK_EVERY seconds, counted in steps of the slowest of them.
        """
        if dist_util.world_size() == 1:
            return self.signum > 0
        if step < self._next:
            return False
        pace = (time.monotonic() - self._asked_at) / max(1, step - self._asked)
        answer = th.tensor([[float(self.signum), pace]], device=dist_util.dev())
        signum, pace = th.cat(dist_util.gather(answer)).max(dim=0).values.tolist()
        self.signum = int(signum)
        self._asked, self._asked_at = step, time.monotonic()
        self._next = step + max(1, int(ASK_EVERY / max(pace, 1e-3)))
        return self.signum > 0

    def end(self) -> None:
        """End the process with the code that the signal stands for, once everything is saved."""
        if self.signum:
            logger.log(f"stopped by {signal.Signals(self.signum).name}; everything is saved")
            raise SystemExit(128 + self.signum)


class Failures:
    """Errors that end a loop after a step and with everything saved, not at once.

    A rank with an error keeps entering the collectives of the others until all of them know of it.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.sentences: list[str] = []  # one for each rank that has failed, the same on all ranks

    @property
    def known(self) -> bool:
        """Whether all ranks know of an error."""
        return bool(self.sentences) or (self.error is not None and dist_util.world_size() == 1)

    def keep(self, work: Callable[..., R], *args: Any, together: bool = False) -> R | None:
        """The result of `work`; None where it raises an error, the first of which is kept.

        :param together: ranks wait for each other in it: an error that may be one rank's alone is raised.
        """
        try:
            return work(*args)
        except Exception as error:
            if together and dist_util.world_size() > 1 and not isinstance(error, ValueError):
                raise
            self.add(error)
            return None

    def add(self, error: Exception) -> None:
        """Keep an error, if it is the first one, and log it."""
        self.error = self.error or error
        with suppress(OSError):  # perhaps of the log itself
            logger.error(f"{_sentence(error)}; the run ends here")

    def tell(self) -> bool:
        """Whether any rank has kept an error; every rank calls it, and all know of it from then on."""
        texts = dist_util.gather_objects(_sentence(self.error) if self.error else "")
        self.sentences = [f"rank {rank} has failed ({text})" for rank, text in enumerate(texts) if text]
        return bool(self.sentences)

    def end(self) -> None:
        """Raise this rank's error, or one that names the ranks that failed."""
        if self.error is not None:
            raise self.error
        refuse((self.sentences, f"{'; '.join(self.sentences)}, and all ranks end"))


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
