"""Training from files to weights: images a second, the share of time that waits for data, and the most memory.

    python benchmarks/training.py [--only emoji32,64x64] [--json PATH] [--write]

Five minutes on two quiet cores of a Xeon with AMX. Every measurement is a process of its own, and the ways take turns;
the first steps of each are not measured. The plain way reads files with one worker, as the originals do.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch as th

from benching import Bench, megabytes, synchronize, times
from cases import ADM256, EMOJI32, IMAGES64, TINY, Case, plain
from guided_diffusion.image_datasets import load_data
from ours import Enough, Training, Watched, silent
from plain import PlainImages, PlainTraining, plain_batches

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "datasets" / "emoji64.zip"
WORKERS = 2  # of ours, as the commands have it


@dataclass(frozen=True)
class Plan:
    """A case, and how much of it: steps to get going and steps that are measured, and in how many processes."""

    case: Case
    warm_up: int
    steps: int
    rounds: int | None = None


PLANS = {
    "emoji32": Plan(EMOJI32, 5, 20),
    "64x64": Plan(IMAGES64, 1, 2, rounds=1),
    "256x256": Plan(ADM256, 3, 10, rounds=1),
    "tiny": Plan(TINY, 1, 2),
}


def measure(plan: str, way: str, pictures: str, device: str, threads: int) -> dict[str, float]:
    """What a way takes to train: seconds and seconds of waiting per step, and bytes.

    :param way: plain or ours, a precision, and further words.
    """
    th.set_num_threads(threads)
    on, chosen = th.device(device), PLANS[plan]
    before = most_memory(on)
    kind, precision, *more = way.split()
    batches = Watched(
        _plain_data(chosen.case, pictures) if kind == "plain" else _our_data(chosen.case),
        chosen.warm_up + chosen.steps,
        lambda: (synchronize(on), time.perf_counter())[1],
    )
    if kind == "plain":
        _train_plainly(chosen.case, batches, precision, on, recompute=bool(more))
    else:
        _train(chosen.case, batches, precision, on)
    seconds, waited = batches.seconds(chosen.warm_up)
    return {"seconds": seconds / chosen.steps, "waited": waited / chosen.steps, "bytes": most_memory(on) - before}


def most_memory(device: th.device) -> int:
    """The most bytes that this process has had on a device."""
    if device.type == "cuda":
        return th.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the process that started this one has
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _train(case: Case, batches: Watched, precision: str, device: th.device) -> None:
    """Our loop, as the command runs it, until there is enough."""
    training = Training(
        case.make_unet().to(device),
        case.make_process(),
        batch_size=case.batch,
        precision=precision,
        data=batches,
        log_interval=10,
    )
    with silent():
        try:
            training.loop.run_loop()
        except Enough:
            return


def _train_plainly(case: Case, batches: Watched, precision: str, device: th.device, *, recompute: bool) -> None:
    """The plain steps, until there is enough."""
    network = plain(case.make_unet(), precision).to(device)
    network.recompute_attention = recompute
    step = PlainTraining(network, case.make_process())
    try:
        for images, cond in batches:
            step(images.to(device), {name: value.to(device) for name, value in cond.items()})
    except Enough:
        return


def _our_data(case: Case) -> Any:
    with silent():
        return load_data(
            data_dir=str(PICTURES),
            batch_size=case.batch,
            image_size=case.size,
            class_cond=True,
            num_workers=WORKERS,
            as_bytes=True,
        )


def _plain_data(case: Case, pictures: str) -> Iterator[Any]:
    paths = sorted(map(str, Path(pictures).glob("*.png")))
    names = [os.path.basename(path).split("_")[0] for path in paths]
    classes = {name: index for index, name in enumerate(sorted(set(names)))}
    return plain_batches(PlainImages(paths, [classes[name] for name in names], case.size), case.batch)


def in_a_process(*arguments: Any) -> dict[str, float]:
    """What `measure` finds in a new process.

    :raises subprocess.CalledProcessError: if it fails; what it said is on stderr.
    """
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    code = "import json, sys, training; print(json.dumps(training.measure(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(found.stdout.splitlines()[-1]))


def compare(bench: Bench, name: str, pictures: str) -> None:
    """The table of a case."""
    case, rounds = PLANS[name].case, PLANS[name].rounds or bench.rounds
    ways = [f"plain {precision}" for precision in bench.plain_precisions]
    ways += [f"{bench.base} recomputed", *(f"ours {precision}" for precision in bench.precisions)]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    threads = th.get_num_threads()
    for number in range(rounds):
        for way in ways:
            if number and way.endswith("recomputed"):  # there for its memory, which once is enough for
                continue
            found[way].append(in_a_process(name, way, pictures, str(bench.device), threads))
            bench.say(f"{way} {found[way][-1]}")
    middle = {way: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for way, runs in found.items()}
    base, rows = middle[bench.base], []
    for way, one in middle.items():
        speed = [f"{case.batch / one['seconds']:.3g}", times(base["seconds"] / one["seconds"])]
        waiting = f"{one['waited'] / one['seconds']:.0%}"
        room = [megabytes(one["bytes"]), times(base["bytes"] / max(1, one["bytes"]))]
        rows.append([way.replace("recomputed", "(attention recomputed)"), *speed, waiting, *room])
    columns = ["way", "images/s", "speed-up", "waits for data", "memory, MB", "plain's over it"]
    bench.add(f"{case.name}, batch {case.batch}", columns, rows, runs=found)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case that is asked for."""
    cases = [name for name in PLANS if name != "tiny"]
    bench = Bench.begin(__doc__, "training", argv, parts=cases, default=cases[:2])
    with TemporaryDirectory() as pictures:
        with zipfile.ZipFile(PICTURES) as archive:
            archive.extractall(pictures, archive.namelist()[:64] if bench.quick else None)
        for name in ["tiny"] if bench.quick else [name for name in cases if bench.wants(name)]:
            compare(bench, name, pictures)
    bench.finish()


if __name__ == "__main__":
    main()
