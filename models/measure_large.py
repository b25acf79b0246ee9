"""Measures emoji128: ``python measure_large.py HELD_OUT`` (pictures of 128x128) writes its results.json and pictures.

Held-out pictures are made small, enlarged again, and compared with what they were: PSNR, SSIM, and the Frechet distance
(FD) of the judge's features of crops of 32x32 pixels, beside those of interpolation. Samples of emoji32-text are
enlarged too, and drawn.
"""

import sys

import numpy as np
import torch as th
import torch.nn.functional as F
from measure import HERE, SEED, SIZE, Forms, Pixels, pictures, write_results
from measure_text import PROMPTS, SHOWN, samples_of

from guided_diffusion import load
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.evaluation.metrics import frechet_distance, statistics
from guided_diffusion.runtime.pictures import planes, save_grid, to_uint8
from guided_diffusion.training.similarity import psnr, ssim

OWN, LARGE, COUNT, DRAWN = HERE.parent / "emoji128", 128, 64, 9
STEPS = (2, 5, 10)
FORMS: Forms = {
    "PSNR, dB": ("psnr", "{:.1f}"),
    "SSIM": ("ssim", "{:.3f}"),
    "FD of crops": ("fd of crops", "{:.2f}"),
}


def crops(images: Pixels) -> Pixels:
    """The sixteen parts of each, as [M, SIZE, SIZE, 3]."""
    starts = range(0, LARGE, SIZE)
    return np.concatenate([images[:, y : y + SIZE, x : x + SIZE] for y in starts for x in starts])


def measure(held_out: str) -> None:
    """Write results.json, enlarged.png and texts.png."""
    real = pictures(held_out, LARGE)[0]
    chosen = real[np.random.default_rng(SEED).permutation(len(real))[:COUNT]]
    small = to_uint8(F.interpolate(planes(chosen), SIZE, mode="area"))
    model, judge = load(str(OWN)), extractor_named(f"classifier:{HERE / 'judge'}")
    enlarged = {"cubic interpolation": to_uint8(F.interpolate(planes(small), LARGE, mode="bicubic"))}
    for steps in STEPS:
        options = {"sampler": "dpm++2m", "steps": steps, "seed": SEED, "batch_size": 24}
        enlarged[f"{steps} steps"] = model.upsample(small, **options).images
    results, unseen = dict[str, dict[str, float]](), statistics(judge(crops(real)).pool)
    for title, images in enlarged.items():
        pair = planes(images), planes(chosen)
        values = {name: float(th.mean(each(*pair))) for name, each in (("psnr", psnr), ("ssim", ssim))}
        made = statistics(judge(crops(images)).pool)
        distance = frechet_distance(unseen.mean, unseen.cov, made.mean, made.cov)
        results[title] = {**values, "fd of crops": distance}
        print(title, results[title], flush=True)
    write_results(OWN, {"seed": SEED, "n": COUNT, "sampler": "dpm++2m"}, results, FORMS)
    rows = [small.repeat(LARGE // SIZE, 1).repeat(LARGE // SIZE, 2), *enlarged.values(), chosen]
    save_grid(str(OWN / "enlarged.png"), np.concatenate([row[:DRAWN] for row in rows]), DRAWN)
    texts = samples_of(load("emoji32-text"), [line for line in PROMPTS.splitlines() if line], SHOWN)
    model.upsample(texts, seed=SEED, sampler="dpm++2m", steps=10, batch_size=24).save(OWN / "texts.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python measure_large.py HELD_OUT")
    measure(sys.argv[1])
