"""What a command takes to start: its help, beside Python alone and beside importing torch.

    python benchmarks/startup.py [--json PATH] [--write]

Half a minute. Every measurement is a process of its own, and the ways take turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benching import Bench, milliseconds

ROOT = Path(__file__).parent.parent
COMMANDS = ("image_sample", "image_train", "evaluator")


def process(*words: str) -> Callable[[], object]:
    """A function that runs Python with these words, and sees that it succeeds."""
    environment, command = {**os.environ, "PYTHONPATH": str(ROOT)}, [sys.executable, *words]
    return lambda: subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all of it."""
    bench = Bench.begin(__doc__, "startup", argv)
    commands = COMMANDS[:1] if bench.quick else COMMANDS
    ways = {"python -c pass": process("-c", "pass"), "python -c 'import torch'": process("-c", "import torch")}
    ways |= {f"python scripts/{name}.py --help": process(f"scripts/{name}.py", "--help") for name in commands}
    turns = bench.turns(ways, rounds=5 * bench.rounds)
    torch = turns.names[1]
    rows = [
        [f"`{name}`", milliseconds(turns.seconds(name)), f"{turns.seconds(name) / turns.seconds(torch):.2f}"]
        for name in turns.names
    ]
    bench.add("Start-up", ["process", "ms", "of importing torch"], rows, seconds=turns.rounds)
    bench.finish()


if __name__ == "__main__":
    main()
