"""Training, resuming and sampling over and over in one process, whose memory, files, threads and children stay level.

    python tests/faults/soak.py --minutes 30

prints a line per minute, and ends with code 1 if anything grew.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from harness import TINY  # noqa: E402

from guided_diffusion.commands import image_sample, image_train  # noqa: E402 - after the path and the threads

WARM_UP = 5  # rounds in which caches fill
SLACK = {"megabytes": 12.0, "files": 2, "threads": 2, "children": 0}  # of what may be more at the end


class Measured(NamedTuple):
    """What a process holds after a round."""

    megabytes: float
    files: int
    threads: int
    children: int


def measure() -> Measured:
    """This process's resident memory, open files, threads, and processes it started."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return Measured(megabytes, len(os.listdir("/proc/self/fd")), threading.active_count(), len(children))


def work(number: int) -> None:
    """One round in a folder that is removed afterwards; every other one decodes in a process and saves in a thread."""
    apart: dict[str, Any] = {"num_workers": number % 2, "async_save": number % 2 == 1}
    train = {**TINY, "batch_size": 4, "save_interval": 2, "ema_rate": "0.5", "keep_last": 2, **apart}
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        run, samples = f"{folder}/run", f"{folder}/samples"
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            for steps in (4, 8):
                call(image_train.main, **train, log_dir=run, resume_checkpoint="auto", max_steps=steps)
            call(image_sample.main, model_path=run, log_dir=samples, num_samples=10, batch_size=4, steps=4)
        assert len(list(Path(samples).glob("*.npz"))) == 1


def call(main: Any, **flags: Any) -> None:
    """A command as its script calls it."""
    main([f"--{name}={value}" for name, value in flags.items()])


def soak(seconds: float) -> list[Measured]:
    """What is held after each round of so many seconds."""
    end, said, found = time.monotonic() + seconds, time.monotonic(), []
    while time.monotonic() < end or len(found) < 3 * WARM_UP:
        work(len(found))
        found.append(measure())
        if time.monotonic() - said > 60 or len(found) == WARM_UP:
            said = time.monotonic()
            print(f"round {len(found):5}: {told(found[-1])}", flush=True)
    return found


def told(held: Measured) -> str:
    """A line."""
    return f"{held.megabytes:7.1f} MB, {held.files} open files, {held.threads} threads, {held.children} children"


def grown(found: list[Measured]) -> list[str]:
    """What is more in the last third of the rounds than in the first after the warm-up, at the highest."""
    third = (len(found) - WARM_UP) // 3
    first, last = found[WARM_UP : WARM_UP + third], found[-third:]
    highest = {name: [max(getattr(held, name) for held in part) for part in (first, last)] for name in SLACK}
    return [f"{name} {a:.1f} -> {b:.1f}" for name, (a, b) in highest.items() if b > a + SLACK[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    found = soak(60 * parser.parse_args().minutes)
    more = grown(found)
    print(f"round {len(found):5}: {told(found[-1])}; " + (f"GROWN: {', '.join(more)}" if more else "level"))
    raise SystemExit(bool(more))


if __name__ == "__main__":
    main()
