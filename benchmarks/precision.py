"""Whether bf16 changes samples for the worse: the same seeds in fp32 and in bf16, compared with the real images.

    python benchmarks/precision.py --model_path RUN --classifier_path JUDGE [--data_dir ZIP] [--json PATH] [--write]

RUN is a folder of image_train, JUDGE one of classifier_train, best with --noised False and apart from RUN: its features
are what the Frechet distance (FD) is of, and it says how often it sees the class that was asked for. Four minutes with
the network of `make demo` on two quiet cores of a Xeon with AMX; --ddpm 250 adds half an hour.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch as th

from benching import Bench
from guided_diffusion.commands import flags, sampling
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.evaluation.evaluator import evaluate, prepare
from guided_diffusion.evaluation.images import open_images
from ours import silent

ROOT = Path(__file__).parent.parent


def own_flags(parser: argparse.ArgumentParser) -> None:
    """What is sampled and what it is compared with."""
    parser.add_argument("--model_path", required=True, help="run of image_train, or one of its checkpoints")
    parser.add_argument("--classifier_path", required=True, help="run of classifier_train: features, and judge")
    parser.add_argument("--data_dir", default=str(ROOT / "datasets" / "emoji64.zip"), help="real images (the demo's)")
    parser.add_argument("--num_samples", type=int, default=450, help="for each seed and precision (450)")
    parser.add_argument("--batch_size", type=int, default=50, help="of sampling (50)")
    parser.add_argument("--seeds", default="0,1,2", help="three or more, for their spread (0,1,2)")
    parser.add_argument("--sampler", default="unipc", help="of image_sample (unipc)")
    parser.add_argument("--steps", type=int, default=20, help="of it, on its own grid (20)")
    parser.add_argument("--ddpm", type=int, default=0, help="measure so many steps of ddpm in fp32 too; 0: do not")


def near(command: str, given: argparse.Namespace) -> str:
    """A command with the paths of what lies in this repository as they are from its root, where it is run."""
    paths = (path for path in (given.model_path, given.classifier_path, given.data_dir) if os.path.exists(path))
    short = {path: os.path.relpath(os.path.realpath(path), os.path.realpath(ROOT)) for path in paths}
    words = (word.rpartition("=") for word in command.split(" "))
    inside = {path: name for path, name in short.items() if name.split(os.sep)[0] != os.pardir}
    return " ".join(flag + sign + inside.get(value, value) for flag, sign, value in words)


@dataclass(frozen=True)
class Way:
    """How samples are made."""

    precision: str
    sampler: str
    steps: int

    def __str__(self) -> str:
        return f"{self.precision}, {self.sampler}, {self.steps} steps"


@dataclass(frozen=True)
class Judge:
    """A classifier, and the features of the real images."""

    extractor: Any
    real: Any

    @classmethod
    def of(cls, classifier: str, data_dir: str, side: int, device: th.device) -> Judge:
        """The classifier of a run, and images made as large as the samples."""
        extractor = extractor_named(f"classifier:{classifier}")
        with silent():
            images = open_images(data_dir, None if data_dir.endswith(".npz") else side)
            real = prepare(images, extractor, needs=("pool_statistics",), cache=False)
        return cls(extractor, real)

    def __call__(self, path: str) -> dict[str, float]:
        """FD of samples, and in which share of them the classifier sees their label, where they have labels."""
        with silent():
            (distance,) = evaluate(self.real, path, self.extractor, metrics=("fid",), cache=False).results.values()
        with np.load(path) as file:
            images, labels = file["arr_0"], file.get("arr_1")
        if labels is None:
            return {"FD": distance}
        parts = range(0, len(images), 64)
        guesses = np.concatenate([self.extractor(images[start : start + 64]).probs.argmax(axis=1) for start in parts])
        return {"FD": distance, "right": float((guesses == labels).mean())}


def sample(given: argparse.Namespace, way: Way, seed: int, folder: str, device: th.device) -> str:
    """Path of the npz that the command makes."""
    grid = ["--steps", way.steps] if way.sampler != "ddpm" else ["--timestep_respacing", way.steps]
    words = ["--model_path", given.model_path, "--sampler", way.sampler, *grid, "--precision", way.precision]
    words += ["--num_samples", given.num_samples, "--batch_size", given.batch_size, "--seed", seed]
    words += ["--log_dir", folder, "--device", device]
    with only_logging():
        return sampling.sample(flags.parse("image_sample", list(map(str, words))))


@contextmanager
def only_logging() -> Iterator[None]:
    """What the command says goes to its file."""
    before = os.environ.get("OPENAI_LOG_FORMAT")
    os.environ["OPENAI_LOG_FORMAT"] = "log"
    try:
        yield
    finally:
        os.environ.pop("OPENAI_LOG_FORMAT")
        if before is not None:
            os.environ["OPENAI_LOG_FORMAT"] = before


def measure(bench: Bench, ways: Sequence[Way], seeds: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """What each way makes of each seed, and how far its pixels are from those of the first way, in grey levels."""
    found: dict[str, list[dict[str, float]]] = {str(way): [] for way in ways}
    judge = None
    for seed in seeds:
        first = None
        for way in ways:
            with TemporaryDirectory() as folder:
                began = time.perf_counter()
                path = sample(bench.given, way, seed, folder, bench.device)
                seconds = time.perf_counter() - began
                with np.load(path) as file:
                    images = file["arr_0"].astype(np.float64)
                first = images if first is None else first
                args = (bench.given.classifier_path, bench.given.data_dir, images.shape[1], bench.device)
                judge = judge or Judge.of(*args)
                away = float(np.abs(images - first).mean())
                found[str(way)].append({**judge(path), "seconds": seconds, "away": away})
            bench.say(f"seed {seed}, {way}: {found[str(way)][-1]}")
    return found


def rows_of(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    """A row for each way: FD of every seed, their mean and deviation, and what else there is."""
    rows = []
    for way, runs in found.items():
        distances = [run["FD"] for run in runs]
        seen = [run["right"] for run in runs if "right" in run]
        spread = statistics.stdev(distances) if len(distances) > 1 else float("nan")
        row = [way, *(f"{value:.3f}" for value in distances), f"{statistics.mean(distances):.3f}", f"{spread:.3f}"]
        others = [statistics.mean(run[key] for run in runs) for key in ("away", "seconds")]
        rows.append([*row, f"{statistics.mean(seen):.1%}" if seen else "-", *(f"{value:.3g}" for value in others)])
    return rows


def verdict(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """How far bf16 is from fp32, beside how far seeds are from each other."""
    full, half = ([run["FD"] for run in runs] for runs in list(found.values())[:2])
    shift = statistics.mean(half) - statistics.mean(full)
    if len(full) < 2:
        return f"bf16 moves FD by {shift:+.3f}; one seed says nothing of chance."
    spread = statistics.stdev(full)
    return f"bf16 moves the mean FD by {shift:+.3f}; the seeds of fp32 differ from each other by {spread:.3f}."


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, compare, say."""
    bench = Bench.begin(__doc__, "precision", argv, flags=own_flags)
    bench.command = near(bench.command, bench.given)
    given, seeds = bench.given, [int(word) for word in bench.given.seeds.split(",")]
    if bench.quick:
        given.num_samples, given.batch_size, given.steps = 8, 8, 2
    ways = [Way(precision, given.sampler, given.steps) for precision in ("fp32", "bf16")]
    ways += [Way("fp32", "ddpm", given.ddpm)] if given.ddpm else []
    found = measure(bench, ways, seeds)
    columns = ["way", *(f"FD, seed {seed}" for seed in seeds), "mean", "deviation", "right", "levels away", "s"]
    bench.add(f"{given.num_samples} samples for each seed", columns, rows_of(found), runs=found)
    bench.note(verdict(found))
    bench.finish()


if __name__ == "__main__":
    main()
