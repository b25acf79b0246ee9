"""How many images a second are read, cropped and handed to training, against the originals' way.

    python benchmarks/loader.py [--quick] [--only photographs,emoji] [--rounds 3] [--json PATH] [--write]
    python benchmarks/loader.py --only shards [...]

Two minutes on two quiet cores, and one for shards; --threads is of no matter here: each process that reads pictures
takes one.

The originals' way: Pillow decodes all of a picture, halves it and scales it, numpy makes float32 of it, and one worker
process hands over batches of those. Ours makes the same pixels, bit for bit, but where --fast_decode is named. The
pictures are made here: noise with the spectrum of photographs, 500x375, about as large as those of ImageNet.

Shards lie here, or on a server, which shares this machine and waits 20 ms before each answer.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from PIL import Image

from benching import Bench, Turns, times
from guided_diffusion.image_datasets import load_data
from guided_diffusion.runtime.pictures import to_unit
from plain import PlainImages, plain_batches
from served import served

EMOJI = Path(__file__).parent.parent / "datasets" / "emoji64.zip"
PLAIN = "originals' way"
PARTS = ("photographs", "emoji")
CACHED = "--cache_images"
LONGER = 10  # times as many batches from what is kept in memory, which are gone in no time
TARS, LATENCY = 4, 0.02  # seconds
AHEAD = 4  # batches beyond those that are measured: the first, and what a worker makes in advance


@dataclass(frozen=True)
class Sizes:
    """How much is measured: photographs, images of a batch, and batches."""

    photographs: int
    batch: int
    batches: int


FULL, QUICK = Sizes(256, 32, 16), Sizes(16, 8, 2)


def photograph(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """[H, W, 3] whose amplitudes fall off with the frequency, as those of photographs do, under fine grain."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequencies[0, 0] = 1

    def plane(power: float) -> NDArray[np.float64]:
        waves = rng.normal(size=frequencies.shape) + 1j * rng.normal(size=frequencies.shape)
        values = np.fft.irfft2(waves / frequencies**power, (height, width))
        return np.asarray((values - values.mean()) / values.std())

    light = plane(1.1)
    colours = [45 * light + 20 * plane(1.5) + 4 * rng.normal(size=light.shape) for _ in range(3)]
    return np.clip(np.stack(colours, -1) + rng.uniform(90, 160, 3), 0, 255).astype(np.uint8)


def write_photographs(folder: Path, count: int) -> Path:
    """JPEGs, one in four of them upright; returns a zip of them, which lies beside their folder."""
    for index in range(count):
        height, width = (500, 375) if index % 4 == 3 else (375, 500)
        picture = Image.fromarray(photograph(np.random.default_rng(index), height, width))
        picture.save(folder / f"{index % 10}_{index:05}.jpg", quality=92)
    packed = folder.with_suffix(".zip")
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return packed


def write_tars(folder: Path, packed: Path) -> str:
    """What is in a zip in a folder, and in tars beside that; returns their pattern."""
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(folder)
    for number in range(TARS):
        with tarfile.open(f"{folder}-{number}.tar", "w") as tar:
            for path in sorted(folder.iterdir())[number::TARS]:
                tar.add(path, path.name)
    return f"{folder.name}-{{0..{TARS - 1}}}.tar"


Opened = tuple[Iterator[Any], Callable[[], object]]  # batches, and what ends the processes that make them


def plain(folder: Path, size: int, sizes: Sizes) -> Opened:
    """Endless batches of the originals' way.

    It starts its worker anew for every epoch. Real data sets have long ones, so none ends while it is measured: all
    pictures are named as often as that takes.
    """
    batch, paths = sizes.batch, sorted(str(path) for path in folder.rglob("*.*") if path.suffix in (".jpg", ".png"))
    paths *= -(-(sizes.batches + AHEAD) * batch // len(paths))
    batches = plain_batches(PlainImages(paths, [0] * len(paths), size), batch)
    return batches, batches.close


def ours(path: Path | str, size: int, batch: int, **options: Any) -> Opened:
    """Endless batches as the commands that train take them, as floats."""
    stream = load_data(
        data_dir=str(path), batch_size=batch, image_size=size, as_bytes=True, log=lambda _: None, **options
    )
    if options.get("cache_images"):  # what counts is what comes after the first epoch
        for _ in range(len(stream.dataset) // batch + 1):
            next(stream)
    return ((to_unit(images), cond) for images, cond in stream), stream.close


def seconds(open_batches: Callable[[], Opened], count: int) -> float:
    """For so many batches, once the processes run."""
    batches, close = open_batches()
    next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    taken = time.perf_counter() - began
    close()
    return taken


def compare(bench: Bench, title: str, ways: dict[str, Callable[[], Opened]], sizes: Sizes) -> None:
    """A table of ways, taken in turns, by the seconds of a batch; the first is what the others are compared with."""
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(bench.rounds):
        for name, way in ways.items():
            count = sizes.batches * (LONGER if CACHED in name else 1)
            rounds[name].append(seconds(way, count) / count)
        bench.say("  ".join(f"{name} {values[-1]:.4g} s" for name, values in rounds.items()))
    turns = Turns(rounds)
    rows = [
        [name, f"{sizes.batch / turns.seconds(name):,.0f}", times(turns.ratio(turns.names[0], name))]
        for name in turns.names
    ]
    bench.add(title, ["way", "images/s", "speed-up"], rows, seconds=rounds)


def levels_away(folder: Path, size: int, batch: int) -> float:
    """How far the pixels of --fast_decode are from the exact ones: mean of a batch, in levels of 255."""
    pictures = []
    for fast in (True, False):
        batches, close = ours(folder, size, batch, fast_decode=fast, deterministic=True, random_flip=False)
        pictures.append(next(batches)[0])
        close()
    return float((pictures[0] - pictures[1]).abs().mean() * 127.5)


def kilobytes(folder: Path) -> float:
    """The size of its files on the average."""
    return float(np.mean([path.stat().st_size for path in folder.iterdir()]) / 1000)


def photographs(bench: Bench, sizes: Sizes, folder: Path) -> None:
    """JPEGs to 64x64."""
    packed = write_photographs(folder, sizes.photographs)
    read = partial(ours, folder, 64, sizes.batch)
    ways: dict[str, Callable[[], Opened]] = {
        PLAIN: partial(plain, folder, 64, sizes),
        "exact, 1 worker": partial(read, num_workers=1),
        "exact, 2 workers": partial(read, num_workers=2),
        "exact, 2 workers, zip": partial(ours, packed, 64, sizes.batch, num_workers=2),
        "--fast_decode, 1 worker": partial(read, num_workers=1, fast_decode=True),
        "--fast_decode, 2 workers": partial(read, num_workers=2, fast_decode=True),
        f"{CACHED}, 2 workers": partial(read, num_workers=2, cache_images=True),
    }
    compare(
        bench, f"JPEGs of 500x375, {kilobytes(folder):.0f} kB each, to 64x64, batches of {sizes.batch}", ways, sizes
    )
    away = levels_away(folder, 64, sizes.batch)
    bench.note(f"--fast_decode moves the pixels of these photographs by {away:.2g} of 255 levels on the average.")


def emoji(bench: Bench, sizes: Sizes, folder: Path) -> None:
    """The bundled pictures to 32x32."""
    with zipfile.ZipFile(EMOJI) as archive:
        archive.extractall(folder)
    read = partial(ours, EMOJI, 32, sizes.batch)
    longer = sizes if bench.quick else Sizes(0, sizes.batch, 8 * sizes.batches)
    ways: dict[str, Callable[[], Opened]] = {
        PLAIN: partial(plain, folder, 32, longer),
        "exact, 1 worker, zip": partial(read, num_workers=1),
        "exact, 2 workers, zip": partial(read, num_workers=2),
        f"{CACHED}, 2 workers, zip": partial(read, num_workers=2, cache_images=True),
    }
    compare(bench, f"Emoji, PNGs of 64x64, to 32x32, batches of {sizes.batch}", ways, longer)


def shards(bench: Bench, sizes: Sizes, folder: Path) -> None:
    """Both kinds of pictures in a folder, a zip, and tars, here or on a web server; with copies once they are made."""
    os.environ["GUIDED_DIFFUSION_CACHE"] = str(folder / "cache")
    for kind, size, batches in (("JPEGs", 64, sizes.batches), ("PNGs", 32, 4 * sizes.batches)):
        pictures = folder / kind
        pictures.mkdir()
        packed = write_photographs(pictures, sizes.photographs) if kind == "JPEGs" else EMOJI
        tars = write_tars(pictures, packed)
        read = partial(ours, size=size, batch=sizes.batch, num_workers=2)
        with served(folder, latency=LATENCY) as (address, _), served(folder, latency=LATENCY) as (other, _):
            ways: dict[str, Callable[[], Opened]] = {
                "folder": partial(read, pictures),
                "zip": partial(read, packed),
                "tars": partial(read, folder / tars),
                "tars, server": partial(read, f"{address}/{tars}", shard_cache_gb=0),
                "tars, server, copied": partial(read, f"{other}/{tars}"),
            }
            title = f"{kind} of {kilobytes(pictures):.0f} kB to {size}x{size}, batches of {sizes.batch}, 2 workers"
            compare(bench, title, ways, Sizes(0, sizes.batch, batches))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    bench = Bench.begin(__doc__, "loader", argv, parts=(*PARTS, "shards"), default=PARTS)
    th.set_num_threads(1)
    sizes = QUICK if bench.quick else FULL
    with tempfile.TemporaryDirectory() as root:
        for name, measure in (("photographs", photographs), ("emoji", emoji), ("shards", shards)):
            if bench.wants(name):
                os.mkdir(os.path.join(root, name))
                measure(bench, sizes, Path(root, name))
    if bench.wants("shards"):
        bench.key = "shards"  # its section in the page
    bench.finish()


if __name__ == "__main__":
    main()
