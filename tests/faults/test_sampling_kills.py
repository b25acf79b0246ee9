"""Sampling that is killed (SIGKILL, at any moment) and run again, on any number of ranks, leaves the same bytes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    ROOT,
    TINY,
    Killer,
    Running,
    Strike,
    Tally,
    command,
    contents,
    reached,
    sampling_differences,
    succeed,
    table,
    the_sentence,
    unfinished,
)
from ranks import Nursery

from guided_diffusion.commands import image_sample, image_train
from guided_diffusion.runtime.npz import read_npz

BEGUN = "evaluations of the network per batch"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to sample from."""
    folder = tmp_path_factory.mktemp("model")
    flags = {**TINY, "batch_size": 4, "max_steps": 1, "ema_rate": 0.5, "class_cond": True, "num_classes": 9}
    image_train.main([f"--{name}={value}" for name, value in flags.items()] + [f"--log_dir={folder}"])
    return folder


class Runs:
    """The same request over and over: once unbroken by one process, then with kills, on ranks that change.

    :param starts: (launcher, ranks) of which every start takes one.
    """

    def __init__(self, model: Path, folder: Path, seed: int, starts: list[tuple[str, int]], **flags: Any) -> None:
        self.folder, self.starts, self.count = folder, starts, 0
        self.flags = {"model_path": model, "num_samples": 61, "batch_size": 4, "steps": 8, "seed": 5, **flags}
        self.whole, self.killer = folder / "whole", Killer(seed, BEGUN, span=1.0)
        image_sample.main([f"--{name}={value}" for name, value in {**self.flags, "log_dir": self.whole}.items()])

    def start(self, folder: Path) -> tuple[list[str], int]:
        """A command line, and its number of ranks."""
        launcher, ranks = self.killer.chance.choice(self.starts)
        return command("image_sample", ranks=ranks, launcher=launcher, log_dir=folder, **self.flags), ranks

    def broken(self, kills: int) -> tuple[list[Strike], list[str]]:
        """Kill a run so often, unless it ends before, and let it end: the kills, and the files that differ then."""
        self.count += 1
        folder, strikes = self.killer.strikes(kills, self.folder / f"broken{self.count}", self.start)
        succeed(self.start(folder)[0], folder.with_name(f"{folder.name}-last.txt"))
        return strikes, sampling_differences(self.whole, folder)


def test_one_process_and_two_ranks_in_turn(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed on one process, refused with another request, killed on two ranks, ended on one."""
    runs = Runs(model, tmp_path, 1, [("", 1)], save_images=True)
    folder, flags = tmp_path / "broken", {**runs.flags, "log_dir": tmp_path / "broken"}
    for number, argv in enumerate(
        [command("image_sample", **flags), command("image_sample", ranks=2, launcher="mpiexec", **flags)]
    ):
        with Running(argv, tmp_path / f"{number}.txt"):
            there = len(shards(folder))
            assert reached(lambda there=there: len(shards(folder)) > there + 2)
        assert there + 2 < len(shards(folder)) < 16

    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        image_sample.main([f"--{name}={value}" for name, value in {**flags, "seed": 6}.items()])
    assert caught.value.code == 2
    said = the_sentence(capsys.readouterr().err)
    assert f"{folder} holds the samples of another request (seed was 5 and is 6)" in said
    assert contents(folder) == before

    torn = folder / "shards" / sorted(shards(folder))[1]
    torn.write_bytes(torn.read_bytes()[:-100])  # a disk that lost its end
    (folder / "shards" / "000002.npz.part-1").write_bytes(b"half")
    (folder / f"{next(runs.whole.glob('*.npz')).name}.part-1").write_bytes(b"half")
    image_sample.main([f"--{name}={value}" for name, value in flags.items()])
    assert sampling_differences(runs.whole, folder) == []
    assert len(contents(folder)) == 64


def shards(folder: Path) -> set[str]:
    """Names of the batches that are whole."""
    return {path.name for path in folder.glob("shards/*.npz")}


# run in a process of its own, whose memory nothing else has used: folder -> bytes by which the peak grows
GROWTH = """
import resource, sys
sys.path.append(sys.argv[2])
from oracle import make_process
from guided_diffusion import logger
from guided_diffusion.sample_util import Job, generate
from guided_diffusion.sampling.samplers import make_sampler

def sample(name, images):
    job = Job(sampler=make_sampler("ddim"), shape=(2, 512, 512), num_samples=images, batch_size=2, out_dir=name)
    generate(make_process(100, "1"), lambda x, timesteps: x * 0 + 0.5, job, device="cpu", clip_denoised=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder = sys.argv[1]
logger.configure(folder, format_strs=[])
few = sample(f"{folder}/few", 10)
print(1024 * (sample(f"{folder}/many", 200) - few))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, ranks: Nursery) -> None:
    script = tmp_path / "growth.py"
    script.write_text(GROWTH)
    done = ranks.run([script, tmp_path, ROOT / "tests"], ranks=1)
    assert done.returncode == 0, done.stderr
    # the 190 more are 100 MB, and as floats four times that; what the allocator keeps varies by some 25
    assert int(done.stdout.split()[-1]) < 40e6
    few, many = (next(read_npz(str(path), "arr_0", 10)) for path in sorted(tmp_path.glob("*/*.npz")))
    np.testing.assert_array_equal(few, many)


@pytest.mark.slow
def test_forty_kills(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[str, int, list[tuple[str, int]], dict[str, Any]]] = [
        ("1 process", 10, [("", 1)], {}),
        ("2 ranks by mpiexec or torchrun", 10, [("mpiexec", 2), ("torchrun", 2)], {"save_images": True}),
        (
            "1, 2 or 3 ranks in turn",
            20,
            [("", 1), ("mpiexec", 2), ("mpiexec", 3), ("torchrun", 2)],
            {"sampler": "euler_ancestral", "num_samples": 70},
        ),
    ]
    lines, lost = [], []
    for number, (name, kills, starts, flags) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        runs = Runs(model, tmp_path / str(number), time.time_ns(), starts, **flags)
        tally = Tally(f"SIGKILL, sampling, {name}")
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
    assert not unfinished(tmp_path)
    assert sum(tally.struck for tally in lines) >= 40
