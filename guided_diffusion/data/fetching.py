"""Shards that are copied to this machine before their turn comes, by a process of its own.

Readers take a copy where there is one, and else ask for parts of the shard where it lies: batches do not depend on it.

Shapes: N images, S shards.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime import files
from ..runtime.atomic import PART, replacing
from ..runtime.errors import reason
from .orders import Order

Plan = list[tuple[str, str, int]]  # path of a shard, of its copy, and bytes of it, in the order in which they are used

PIECE = 2**22
STALE = 3600  # seconds after which a copy that is not whole is nobody's


class Fetcher:
    """Has the shards copied that come next, as many as fit.

    :param shards: [N] the shard of each image, -1 for those that lie on this machine.
    :param places: (path, path of its copy, bytes) of each shard.
    :param limit: bytes of all copies.
    """

    def __init__(self, shards: NDArray[np.int64], places: Sequence[tuple[str, str, int]], order: Order, limit: float):
        self._shards, self._places, self._limit = shards, places, limit
        self._uses = lru_cache(2)(lambda epoch: _uses(shards[order(epoch)[1]]))
        self._plan: Plan = []
        self._process: subprocess.Popen[bytes] | None = None

    def plan(self, taken: int) -> Plan:
        """The shards that come next when so many images of all epochs are taken."""
        epoch, place = divmod(taken, len(self._shards))
        now = [shard for shard, last in self._uses(epoch) if last >= place]
        numbers = list(dict.fromkeys([*now, *(shard for shard, _ in self._uses(epoch + 1))]))
        sizes = np.cumsum([self._places[number][2] for number in numbers])
        return [self._places[number] for number, size in zip(numbers, sizes, strict=True) if size <= self._limit]

    def at(self, taken: int) -> None:
        """Tell the process where the training stands."""
        plan = self.plan(taken)
        if plan == self._plan:
            return
        self._plan = plan
        if self._process is None:
            code = f"import sys; sys.path.insert(0, sys.argv[1]); from {__name__} import work; work(float(sys.argv[2]))"
            place = str(Path(__file__).parents[__name__.count(".")])
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, place, str(self._limit)], stdin=subprocess.PIPE, bufsize=0
            )
            self._end = weakref.finalize(self, _end, self._process)
        try:
            assert self._process.stdin is not None, "it is a pipe"
            self._process.stdin.write(json.dumps(plan).encode() + b"\n")
        except OSError:  # it was ended, and what it would copy is read where it lies
            self._limit = -1

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()
        self._process, self._plan = None, []


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None, "it is a pipe"
    process.stdin.close()
    process.kill()
    process.wait()


def _uses(shards: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(shard, place of its last image) of those in a sequence that are not -1, in the order of their first images."""
    numbers, firsts = np.unique(shards, return_index=True)
    lasts = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
    return [(int(numbers[i]), int(lasts[i])) for i in np.argsort(firsts) if numbers[i] >= 0]


def work(limit: float) -> None:
    """Copy shards by the newest of the plans on stdin, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plans: queue.Queue[Plan] = queue.Queue()
    threading.Thread(target=_read_plans, args=(plans,), daemon=True).start()
    plan, given_up = plans.get(), set[str]()
    while True:
        missing = [place for place in plan if not os.path.exists(place[1]) and place[0] not in given_up]
        if missing and not fetch(missing[0], {copy for _, copy, _ in plan}, limit):
            given_up.add(missing[0][0])
        while not plans.empty() or not missing:
            plan, missing = plans.get(), [("", "", 0)]


def _read_plans(plans: queue.Queue[Plan]) -> None:
    for line in sys.stdin.buffer:
        plans.put(json.loads(line))
    os._exit(0)


def fetch(place: tuple[str, str, int], needed: set[str], limit: float) -> bool:
    """Copy a shard; False, with a line about it, if that cannot be.

    :param needed: copies that stay; others go, the oldest first, where all would have more bytes than `limit`.
    """
    path, copy, size = place
    try:
        _make_room(os.path.dirname(copy), needed, limit - size)
        with files.open_file(path) as source, replacing(copy) as target:
            while piece := source.read(PIECE):
                target.write(piece)
            if target.tell() != size:
                raise OSError(f"it has {target.tell()} bytes, and had {size}")
    except (OSError, ValueError) as error:
        print(f"{path} is not kept on this machine, and read where it lies: {reason(error)}", file=sys.stderr)
        return False
    return True


def _make_room(folder: str, needed: set[str], limit: float) -> None:
    copies = [(entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder)]
    stale = [path for date, _, path in copies if PART in path and time.time() - date > STALE]
    copies = sorted(copy for copy in copies if copy[2].endswith(".tar"))
    surplus = sum(size for _, size, _ in copies) - limit
    for _, size, path in copies:
        if surplus > 0 and path not in needed:
            stale.append(path)
            surplus -= size
    for path in stale:
        os.remove(path)
