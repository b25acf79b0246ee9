"""Choices of network, process and loss, trained at 16x16: ``python trainings.py TRAIN HELD_OUT RUNS SEEDS`` (hours).

Tables 1 to 3 of Dhariwal & Nichol (2021) and tables 1 and 2 of Nichol & Dhariwal (2021) at the scale of this machine:
a row of `ROWS` differs from the first one by its flags alone, sees the same pictures in the same order, and is measured
as emoji32 is, its samples and the held-out pictures enlarged to the 32 pixels that the judge knows. Scores are kept in
trainings.json, so that a run that was stopped goes on where it was; then the table of docs/paper.md is made anew.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from measure import HERE, SIZE, Pixels, pictures, scores
from paper import EACH, MISSING, PAGE, known, pages
from PIL import Image

from guided_diffusion import load
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.evaluation.features import Extractor
from guided_diffusion.runtime.files import write_json

RESULTS = Path(__file__).parent / "trainings.json"
SMALL, MEASURED = 16, 48  # pixels of a side; held-out pictures whose bits are measured
BASE: dict[str, Any] = {
    "image_size": SMALL,
    "class_cond": True,
    "num_classes": 9,
    "num_channels": 32,
    "norm_groups": 8,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "batch_size": 32,
    "lr": 1e-3,
    "warmup_steps": 50,
    "lr_anneal_steps": 500,
    "ema_rate": "0.99",
    "random_flip": False,
    "cache_images": True,
    "num_workers": 0,
    "save_interval": 500,
    "keep_last": 1,
    "log_interval": 50,
    "resume_checkpoint": "auto",
}
ROWS: dict[str, dict[str, Any]] = {
    "eps, learned variances, cosine": {},
    "fixed variances": {"learn_sigma": False},
    "variational bound alone": {"use_kl": True},
    "linear schedule": {"noise_schedule": "linear"},
    "predicts v": {"predict_v": True},
    "predicts x_0": {"predict_xstart": True},
    "no adaptive normalization": {"use_scale_shift_norm": False},
    "blocks that resample": {"resblock_updown": True},
    "no attention": {"attention_resolutions": ""},
    "attention at 16 and 8": {"attention_resolutions": "16,8"},
    "one head of 64 channels": {"num_head_channels": 64},
    "four heads of 16 channels": {"num_head_channels": 16},
    "two blocks a level": {"num_res_blocks": 2},
    "48 channels": {"num_channels": 48},
    "32 groups": {"norm_groups": 32},
}
COLUMNS = {
    "parameters": ("million parameters", "{:.2f}"),
    "speed": ("pictures/s", "{:.0f}"),
    "fd": ("FD, dpm++2m, 20 steps", "{:.1f}"),
    "fd few": ("FD, ddpm, 25 steps", "{:.1f}"),
    "accuracy": ("accuracy", "{:.0%}"),
    "bits": ("bits/dim", "{:.2f}"),
}


def train(data: str, folder: Path, options: dict[str, Any]) -> None:
    """Train a model in a process of its own, on from where it was."""
    command = [sys.executable, str(Path(__file__).parents[1] / "scripts" / "image_train.py")]
    flags = {**BASE, **options, "data_dir": data, "log_dir": folder}
    subprocess.run([*command, *(f"--{name}={value}" for name, value in flags.items())], check=True)


def enlarged(images: Pixels) -> Pixels:
    """Pictures uint8 [N, H, W, 3] at the judge's size."""
    sized = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in sized])


def results(folder: Path, judge: Extractor, held_out: str, seed: int) -> dict[str, float]:
    """The numbers of a row, by the keys of `COLUMNS`."""
    model = load(str(folder))
    images, labels = pictures(held_out, SMALL)
    wanted = {"classes": model.classes, "num_samples": EACH * len(model.classes), "batch_size": 144, "seed": seed}
    found: dict[str, float] = {}
    for key, sampling in {"fd": ("dpm++2m", 20), "fd few": ("ddpm", 25)}.items():
        samples = model.sample(**wanted, sampler=sampling[0], steps=sampling[1])
        measured = scores(judge, enlarged(images), enlarged(samples.images), samples.labels)
        found[key] = measured["fd"]
        found.setdefault("accuracy", measured["accuracy"])
    some = np.random.default_rng(0).permutation(len(images))[:MEASURED]
    found["bits"] = float(model.bits_per_dim(images[some], labels[some].tolist(), batch_size=MEASURED).mean())
    found["parameters"] = sum(each.numel() for each in model.network.parameters()) / 1e6
    speeds = np.genfromtxt(folder / "progress.csv", delimiter=",", names=True)["images_per_second"]
    return {**found, "speed": float(np.nanmedian(speeds))}


def measure(data: str, held_out: str, runs: Path, seeds: int) -> None:
    """Train and measure what trainings.json does not have yet: all rows once before the second seed."""
    found = known(RESULTS)
    judge = extractor_named(f"classifier:{HERE / 'judge'}")
    for key, row, seed in ((f"{row}|{seed}", row, seed) for seed in range(seeds) for row in ROWS):
        if key not in found:
            folder = runs / key.replace(" ", "-").replace("|", "-")
            train(data, folder, {**ROWS[row], "seed": seed})
            found[key] = results(folder, judge, held_out, seed)
            print(key, found[key], flush=True)
            write_json(str(RESULTS), found)


def write_page() -> None:
    """The table of docs/paper.md: the mean over the seeds, and how many there are."""
    found = known(RESULTS)
    lines = []
    for row in ROWS:
        runs = [values for key, values in found.items() if key.rpartition("|")[0] == row]
        cells = [form.format(np.mean([run[key] for run in runs])) for key, (_, form) in COLUMNS.items() if runs]
        lines += [[row, *cells, len(runs)]] if runs else []
    table = pages.table(["what", *(title for title, _ in COLUMNS.values()), "seeds"], lines)
    pages.write(PAGE, "trainings", table if lines else MISSING)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit("usage: python trainings.py TRAIN HELD_OUT RUNS SEEDS")
    measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    write_page()
