"""Training that is killed (SIGKILL, at any moment) and run again ends with the bits of training that was not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, TINY, Killer, Strike, Tally, command, table, training_differences
from ranks import Nursery

from guided_diffusion.commands import image_train

STEPS = 16
FLAGS: dict[str, Any] = {
    **TINY,
    "batch_size": 4,
    "max_steps": STEPS,
    "save_interval": 2,
    "ema_rate": "0.5,0.9",
    "lr": 1e-3,
    "schedule_sampler": "loss-second-moment",
    "random_crop": True,
    "dropout": 0.1,
    "class_cond": True,
    "num_classes": 9,
    "class_dropout": 0.2,
}
BEGUN = "parameters in "


class Runs:
    """The same training over and over: once unbroken, then with kills.

    :param launchers: of those that are killed.
    :param flags: in place of FLAGS.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        nursery: Nursery,
        *,
        ranks: int = 1,
        launchers: tuple[str, ...] = ("",),
        **flags: Any,
    ) -> None:
        self.folder, self.nursery, self.ranks, self.launchers, self.count = folder, nursery, ranks, launchers, 0
        self.flags = {**FLAGS, **flags}
        self.whole = folder / "whole"
        self.killer = Killer(seed, BEGUN, span=1.0)
        self.end(self.whole)

    def argv(self, folder: Path, **more: Any) -> list[str]:
        launcher = self.killer.chance.choice(self.launchers)
        return command("image_train", ranks=self.ranks, launcher=launcher, log_dir=folder, **{**self.flags, **more})

    def end(self, folder: Path, **more: Any) -> None:
        """A run to its end: its numbers are the same in processes that need not load everything first."""
        words = [f"--{name}={value}" for name, value in {**self.flags, "log_dir": folder, **more}.items()]
        if self.ranks == 1:
            image_train.main(words)
            return
        done = self.nursery.run([ROOT / "scripts" / "image_train.py", *words], ranks=self.ranks)
        assert done.returncode == 0, done.stderr
        assert BEGUN in done.stdout

    def broken(self, kills: int) -> tuple[list[Strike], list[str]]:
        """Kill a run so often, unless it ends before, and let it end: the kills, and how it differs then."""
        self.count += 1

        def start(folder: Path) -> tuple[list[str], int]:
            return self.argv(folder, resume_checkpoint="auto"), self.ranks

        folder, strikes = self.killer.strikes(kills, self.folder / f"broken{self.count}", start)
        self.end(folder, resume_checkpoint="auto")
        return strikes, training_differences(self.whole, folder, STEPS)


def test_one_process(tmp_path: Path, ranks: Nursery) -> None:
    _, lost = Runs(tmp_path, 1, ranks).broken(kills=1)
    assert lost == []


@pytest.mark.slow
def test_two_ranks(tmp_path: Path, ranks: Nursery) -> None:
    _, lost = Runs(tmp_path, 2, ranks, ranks=2, launchers=("mpiexec",)).broken(kills=1)
    assert lost == []


@pytest.mark.slow
def test_forty_kills(tmp_path: Path, ranks: Nursery, capsys: pytest.CaptureFixture[str]) -> None:
    """Every 2 or 3 steps a checkpoint; whole jobs and single ranks are killed."""
    both = ("mpiexec", "torchrun")
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("fp32, 1 process", 10, {}),
        (
            "bf16, 1 process, 2 workers",
            6,
            {"precision": "bf16", "num_workers": 2, "save_interval": 3},
        ),
        (
            "fp16, 1 process, 2 kept, saved at once",
            6,
            {"precision": "fp16", "microbatch": 2, "keep_last": 2, "async_save": False},
        ),
        ("fp32, 2 ranks by mpiexec or torchrun in turn", 10, {"ranks": 2, "launchers": both}),
        ("fp16, 2 ranks by mpiexec", 4, {"ranks": 2, "launchers": both[:1], "precision": "fp16", "num_workers": 1}),
        (
            "fp32, 2 ranks by torchrun, 1 kept, saved at once",
            4,
            {"ranks": 2, "launchers": both[1:], "keep_last": 1, "async_save": False},
        ),
    ]
    lines, lost = [], []
    for number, (name, kills, options) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        runs = Runs(tmp_path / str(number), time.time_ns(), ranks, **options)
        tally = Tally(f"SIGKILL, training, {name}")
        lines.append(tally)
        while tally.struck < kills:
            strikes, differing = runs.broken(min(3, kills - tally.struck))
            tally.add(strikes, differing)
            lost += [f"{name}, run {runs.count}: {place}" for place in differing]
        with capsys.disabled():
            print(f"\n{table([tally])}", flush=True)
    with capsys.disabled():
        print(f"\n{table(lines)}", flush=True)
    assert lost == []
    assert sum(tally.struck for tally in lines) >= 40
