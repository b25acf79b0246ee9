"""What the scores cost, beside the plain formulas for them, and the network that makes features, in fp32 and bf16.

    python benchmarks/evaluation.py [--quick] [--only frechet,manifolds,extractor] [--json PATH] [--write]

A few minutes. Every measurement is made in a process of its own, on one thread: its time is that of the processor,
which others on the same machine change little, and its memory is the most that the process had, features and libraries
with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pages
from guided_diffusion.evaluation.metrics import Statistics, frechet_distance, precision_recall, statistics

ROOT = Path(__file__).parent.parent
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: features of an image, images of each set, and what the network is given."""

    features: int
    images: int
    batch: int
    batches: int


FULL = Sizes(features=2048, images=10_000, batch=16, batches=3)
QUICK = Sizes(features=256, images=1000, batch=2, batches=1)


def plain_frechet(first: Statistics, second: Statistics) -> float:
    """By a square root of the product of the covariances."""
    import scipy.linalg

    root = scipy.linalg.sqrtm(first.cov @ second.cov)
    shift = first.mean - second.mean
    return float(shift @ shift + np.trace(first.cov) + np.trace(second.cov) - 2 * np.trace(root).real)


def plain_distances(x: Array, y: Array) -> Array:
    """All squared distances at once, in the type of x and y but for the sums."""
    norms, others = (np.square(z).sum(axis=1, dtype=np.float32).astype(z.dtype) for z in (x, y))
    products = (x.astype(np.float32) @ y.astype(np.float32).T).astype(x.dtype)
    return np.maximum(norms[:, None] - 2 * products + others, 0)


def plain_precision_recall(reference: Array, samples: Array, dtype: str, k: int = 3) -> tuple[float, float]:
    """From whole matrices of distances."""
    real, made = reference.astype(dtype), samples.astype(dtype)
    radii, theirs = (np.partition(plain_distances(x, x), k, axis=1)[:, k] for x in (real, made))
    distances = plain_distances(real, made)
    inside, covered = (distances <= radii[:, None]).any(axis=0), (distances <= theirs).any(axis=1)
    return float(inside.mean()), float(covered.mean())


def _features(name: int, images: int, features: int) -> Array:
    """Not negative, as those of a network that ends with ReLU, with a spectrum that falls off."""
    rng = np.random.default_rng(name)
    made = rng.standard_normal((images, features), dtype=np.float32)
    made *= np.float32(0.999) ** np.arange(features, dtype=np.float32) + np.float32(0.1 * name)
    return np.maximum(made, 0, out=made)


def _frechet(plain: bool, features: int) -> float:
    first, second = (statistics(_features(name, 2 * features, features)) for name in (0, 1))
    start()
    if plain:
        return plain_frechet(first, second)
    return frechet_distance(first.mean, first.cov, second.mean, second.cov)


def _manifolds(plain: bool, images: int, features: int, dtype: str) -> list[float]:
    reference, samples = (_features(name, images, features) for name in (0, 1))
    start()
    if plain:
        return list(plain_precision_recall(reference, samples, dtype))
    return list(precision_recall(reference, samples, 3, dtype))


def _extract(batch: int, batches: int, precision: str) -> list[list[float]]:
    """Pooled features of as many images, by the network with random weights."""
    import torch as th

    from guided_diffusion.evaluation.inception import InceptionNetwork

    th.set_num_threads(1)
    network = InceptionNetwork(dtype={"fp32": th.float32, "bf16": th.bfloat16}[precision])
    randomize(network)
    coarse = th.rand(batch * (batches + 1), 3, 8, 8, generator=th.Generator().manual_seed(1)) * 255
    images = th.nn.functional.interpolate(coarse, size=64, mode="bilinear").round()
    first, *rest = images.split(batch)
    network(first)  # what is set up once is not measured
    start()
    return th.cat([network(part).pool for part in rest]).double().tolist()


def randomize(network: Any) -> None:
    """Weights under which activations keep their size from layer to layer, the same in every process."""
    import torch as th

    generator = th.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.fill_(1)


MEASURED: dict[str, Callable[..., Any]] = {"frechet": _frechet, "manifolds": _manifolds, "extract": _extract}
_started = 0.0


def start() -> None:
    """What comes before this, in a measurement, is not measured."""
    global _started
    _started = time.process_time()


def peak() -> int:
    """The most bytes of memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the process that started this one has
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _child(name: str, arguments: Sequence[Any]) -> None:
    """Measure one thing, and print what was found as JSON."""
    result = MEASURED[name](*arguments)
    seconds = time.process_time() - _started
    print(json.dumps({"result": result, "seconds": seconds, "bytes": peak()}))


def measured(name: str, *arguments: Any) -> dict[str, Any]:
    """What a new process finds: result, seconds, bytes.

    :raises subprocess.CalledProcessError: if it fails; what it said is on stderr.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--child", name, json.dumps(arguments)]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(found.stdout))


Row = dict[str, Any]


def _beside(what: str, ours: Row, plain: Row) -> Row:
    return {
        "what": what,
        "seconds": ours["seconds"],
        "plain_seconds": plain["seconds"],
        "bytes": ours["bytes"],
        "plain_bytes": plain["bytes"],
        "result": ours["result"],
        "plain_result": plain["result"],
    }


def measure_frechet(features: int) -> Row:
    """The distance of two Gaussians, beside the matrix square root; and how far apart the two are."""
    ours, plain = (measured("frechet", way, features) for way in (False, True))
    row = _beside(f"Frechet distance, {features} features", ours, plain)
    return row | {"difference": abs(ours["result"] / plain["result"] - 1)}


def measure_manifolds(images: int, features: int, dtype: str) -> Row:
    """Precision and recall, beside whole matrices of distances; and whether the two are equal."""
    ours, plain = (measured("manifolds", way, images, features, dtype) for way in (False, True))
    row = _beside(f"precision and recall, {images} x {images} x {features}, {dtype}", ours, plain)
    return row | {"difference": float(np.abs(np.subtract(ours["result"], plain["result"])).max())}


def measure_extractor(batch: int, batches: int) -> Row:
    """Images per second of the network in fp32 and in bf16, and how far that moves its features.

    `change`: root mean square of the difference, as a share of the features'; `change_of_spread`: as a share of
    their deviations over the images.
    """
    full, half = (measured("extract", batch, batches, precision) for precision in ("fp32", "bf16"))
    x, y = np.asarray(full["result"]), np.asarray(half["result"])
    off = np.square(y - x).mean() ** 0.5
    return {
        "what": f"Inception, batches of {batch}",
        "fp32_per_second": len(x) / full["seconds"],
        "bf16_per_second": len(x) / half["seconds"],
        "change": float(off / np.square(x).mean() ** 0.5),
        "change_of_spread": float(off / np.square(x - x.mean(axis=0)).mean() ** 0.5),
    }


SECTIONS: Mapping[str, Callable[[Sizes], list[Row]]] = {
    "frechet": lambda sizes: [measure_frechet(sizes.features)],
    "manifolds": lambda sizes: [measure_manifolds(sizes.images, sizes.features, d) for d in ("float32", "float16")],
    "extractor": lambda sizes: [measure_extractor(sizes.batch, sizes.batches)],
}


def line(row: Row) -> str:
    """One row in words."""
    if "change" in row:
        return (
            f"{row['what']}: {row['fp32_per_second']:.2f} images/s in fp32, {row['bf16_per_second']:.2f} in bf16, "
            f"which moves features by {row['change']:.2%}, and by {row['change_of_spread']:.2%} of their spread"
        )
    longer, more = row["plain_seconds"] / row["seconds"], row["plain_bytes"] / row["bytes"]
    return (
        f"{row['what']}: {row['seconds']:.2f} s and {row['bytes'] / 1e6:.0f} MB, plain formula "
        f"{row['plain_seconds']:.2f} s and {row['plain_bytes'] / 1e6:.0f} MB: {longer:.2f} times as long, "
        f"{more:.2f} times as much memory; difference {row['difference']:.1e}"
    )


def block(rows: Sequence[Row]) -> str:
    """All rows for docs/benchmarks.md: a table of what stands beside a plain formula, and sentences."""
    from benching import cpu_model, megabytes, times

    columns = ["what", "ours, s", "plain, s", "time", "ours, MB", "plain, MB", "memory", "difference"]
    lines = []
    for row in rows:
        if "change" in row:
            continue
        ours, theirs = row["seconds"], row["plain_seconds"]
        room, more = row["bytes"], row["plain_bytes"]
        spent = [f"{ours:.2f}", f"{theirs:.2f}", times(theirs / ours)]
        lines.append(
            [row["what"], *spent, megabytes(room), megabytes(more), times(more / room), f"{row['difference']:.0e}"]
        )
    sentences = [f"{line(row)}." for row in rows if "change" in row]
    about = f"{cpu_model()}, one thread, processor time; numpy {np.__version__}."
    tables = [pages.table(columns, lines)] if lines else []
    return "\n\n".join(["    python benchmarks/evaluation.py", about, *tables, *sentences])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was found where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--json", default="", help="file to write")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.quick and given.write:
        parser.error("--write contradicts --quick, which measures nothing: give one of the two")
    if given.write and set(given.only.split(",")) != set(SECTIONS):
        parser.error("--write contradicts --only, as the section of the page has all parts: give one of the two")
    if given.child:
        return _child(given.child[0], json.loads(given.child[1]))
    rows = []
    for name in given.only.split(","):
        for row in SECTIONS[name](QUICK if given.quick else FULL):
            print(line(row), flush=True)
            rows.append(row)
    if given.json:
        Path(given.json).write_text(json.dumps({"numpy": np.__version__, "rows": rows}, indent=2) + "\n")
    if given.write:
        pages.write(pages.SPEED, "evaluation", block(rows))
    return None


if __name__ == "__main__":
    main()
