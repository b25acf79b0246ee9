"""Sample from the bundled models in a minute: without and with guidance, from texts, enlarged, a film, numbers, a page.

With --train, small networks are trained first, for some minutes, and sampled in the same ways.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UserError
from .entry import entry
from .flags import Flags
from .tool_sections import DemoConfig

if TYPE_CHECKING:
    from ..runtime.pictures import Pixels
    from .pipeline import Model

MODEL, SHOWN = "emoji32", 4  # columns for each setting
SAMPLING: dict[str, Any] = {"sampler": "dpm++2m", "steps": 20}
SETTINGS: dict[str, dict[str, Any]] = {
    "unguided": {},
    "classifier, scale 1": {"classifier_scale": 1.0},
    "classifier, scale 3": {"classifier_scale": 3.0},
    "classifier-free, scale 2": {"cfg_scale": 2.0},
}
FILM_STEPS = 2  # from one frame to the next
ENLARGED, ENLARGING = "classifier, scale 3", {"sampler": "dpm++2m", "steps": 2}  # one of each class
TEXT_MODEL, TEXT_SCALE, EACH = "emoji32-text", 3.0, 2
KNOWN = ["grinning face", "blue heart", "france flag", "red apple", "dog face", "police officer"]
UNSEEN = ["orange heart", "large green circle", "nicaragua flag", "blue apple", "angry apple", "green dog face"]
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; image-rendering: pixelated }
td, th { padding: .2rem 1rem .2rem 0; text-align: right } td:first-child, th:first-child { text-align: left }"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>guided-diffusion: {model}</title>
<style>
{style}
</style>
<h1>{model}: {count} samples in {seconds:.0f} seconds</h1>
<p>{sampler}, {steps} steps, seed {seed}. A row is a class; a column has the same noise in all parts.</p>
<img src="demo.png" alt="samples of each class, without guidance and with it">
<table><tr><th>samples<th>accuracy<th>FD<th>seconds</tr>
{rows}</table>
<p>Accuracy: how often a classifier of clean pictures, which guides none, sees the class that was asked for. FD: Frechet
distance of its features to those of {real} pictures, which is larger the fewer samples there are.</p>
{parts}<h2>From noise to pictures</h2>
<img src="film.png" alt="the predicted pictures after every second step">
</html>
"""
TEXTS = """<h2>From texts</h2>
<img src="texts.png" alt="samples for texts">
<p>{model}, classifier-free guidance of scale {scale:g}: the first samples of seed {seed}. No picture that it was
trained on has one of the last {unseen} captions.</p>
"""
ENLARGEMENT = """<h2>Enlarged</h2>
<img src="enlarged.png" alt="small samples, and the same four times as large">
<p>The first sample of each class ({setting}), and what {steps} steps of an upsampler make of it.</p>
"""
PICTURES = Path(__file__).parents[2] / "datasets" / "emoji64.zip"
IMAGES = "--image_size 32 --num_classes 9 --noise_schedule cosine --diffusion_steps 1000 --random_flip False --lr 1e-3"
TRAINING = "--resume_checkpoint auto --save_interval 1000 --log_interval 50 --num_workers 0 --keep_last 1"
DIFFUSION = (
    "--class_cond True --class_dropout 0.15 --predict_v True --loss_weight min_snr --num_channels 32 "
    "--num_res_blocks 1 --channel_mult 1,2,4 --attention_resolutions= --num_head_channels 64 --precision auto "
    "--warmup_steps 100 --ema_rate 0.98 --lr_anneal_steps 600 --sample_interval 300"
)
CLASSIFIER = (
    "--classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1,2,4 --classifier_attention_resolutions 8 "
    "--classifier_precision auto --weight_decay 0.05 --anneal_lr True --iterations"
)
# title, name of the folder, command, flags
NETWORKS = (
    ("1. Training a diffusion model on 32x32 emoji", "diffusion", "image_train", DIFFUSION),
    ("2. Training a classifier to guide it", "classifier", "classifier_train", f"{CLASSIFIER} 250"),
)
BATCH = {"image_train": 32, "classifier_train": 64}  # of all processes


def show(flags: Flags) -> None:
    """Sample from the bundled model, or from one trained now; print how good the samples are, and write a page."""
    from .. import load

    config = flags.part(DemoConfig)
    if config.train:
        train(config)
        model = load(f"{config.log_dir}/diffusion", classifier=f"{config.log_dir}/classifier")
        return present(model, config.log_dir, config.seed, "this training", "training")
    return present(load(MODEL), config.log_dir, config.seed, MODEL)


def train(config: DemoConfig) -> None:
    """Train what is not trained yet: a diffusion model and a classifier."""
    if not PICTURES.exists():
        remedy = "the pictures come with a checkout of the repository, not with the package: run this in one"
        raise UserError(f"{PICTURES} does not exist: {remedy}")
    print(f"Everything goes to {os.path.abspath(config.log_dir)}; a second run goes on where the first one ended.")
    for title, name, command, flags in NETWORKS:
        words = [f"--data_dir={PICTURES}", f"--log_dir={config.log_dir}/{name}", f"--seed={config.seed}"]
        launch(title, command, *words, *f"{IMAGES} {TRAINING} {flags}".split())


def launch(title: str, command: str, *flags: str) -> None:
    """Run a command on as many processes as there are cores (at most 8), with one thread each.

    On a CPU that is faster than one process of many threads, which wait for each other in every layer.
    """
    import torch as th

    print(f"{title} ...", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    began = time.time()
    ranks = 1 if th.cuda.is_available() else 1 << min(3, cores.bit_length() - 1)  # a divisor of the batches
    start = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", __package__.rpartition(".")[0]]
    # tables go to files, not to the screen
    environment = {**os.environ, "OPENAI_LOG_FORMAT": "log,csv", "OPENAI_LOG_FORMAT_MPI": "log", "OMP_NUM_THREADS": "1"}
    words = [command, f"--batch_size={BATCH[command] // ranks}", *flags]
    done = subprocess.run([sys.executable, "-m", *start, *words], env=environment, check=False)
    if done.returncode:
        raise SystemExit(2)  # the command has told why
    print(f"    {time.time() - began:.0f} s", flush=True)


def present(model: Model, folder: str, seed: int, name: str, compared: str = "held-out") -> None:
    """Sample a model of emoji32's classes under every setting; write pictures, results.json and index.html.

    :param compared: what the pictures that emoji32 has not seen are to this model.
    """
    import numpy as np

    from .. import logger
    from ..evaluation.images import open_images, read_statistics
    from ..evaluation.metrics import frechet_distance, statistics
    from ..runtime.files import write_json
    from ..runtime.pictures import Film, save_grid
    from . import evaluation, presets

    logger.configure(dir=folder, format_strs=[])

    where, film = presets.BUNDLED / MODEL, Film(FILM_STEPS)
    judge = evaluation.extractor_named(f"classifier:{where}/judge")
    real = read_statistics(open_images(where / "held-out.npz"))[0]["pool"]
    classes, results, columns = model.classes, dict[str, Any](), []
    print(f"{'samples of ' + name:28} accuracy     FD  seconds")
    for title, options in SETTINGS.items():
        began, count = time.perf_counter(), len(classes) * SHOWN
        options = {**SAMPLING, **options} | ({} if results else {"callback": film.collect})
        samples = model.sample(classes=classes, num_samples=count, batch_size=count, seed=seed, **options)
        seconds, features = time.perf_counter() - began, judge(samples.images)
        assert features.probs is not None
        made, guesses = statistics(features.pool), features.probs.argmax(axis=1)
        distance = frechet_distance(real.mean, real.cov, made.mean, made.cov)
        accuracy = float(np.mean(guesses == samples.labels))
        results[title] = {"accuracy": accuracy, "fd": distance, "seconds": round(seconds, 1)}
        print("{:28} {accuracy:8.1%} {fd:6.2f} {seconds:8.1f}".format(title, **results[title]), flush=True)
        columns.append(np.stack([samples.images[samples.labels == label] for label in range(len(classes))]))
    grid = np.concatenate(columns, axis=1)
    save_grid(f"{folder}/demo.png", grid.reshape(-1, *grid.shape[2:]), grid.shape[1], classes, titles=[*SETTINGS])
    film.save(f"{folder}/film.png", f"{folder}/film.gif")
    write_json(f"{folder}/results.json", {"seed": seed, **SAMPLING, "samples": results})
    facts = {"model": name, "seed": seed, "count": len(grid) * grid.shape[1], "style": STYLE, "real": compared}
    small = columns[[*SETTINGS].index(ENLARGED)][:, 0]
    parts = draw_texts(folder, seed) + draw_enlarged(model, folder, seed, small) if name == MODEL else ""
    write_page(f"{folder}/index.html", results, parts=parts, **SAMPLING, **facts)
    print(f"\nLook at {os.path.abspath(folder)}/index.html, or at the pictures there.")


def draw_texts(folder: str, seed: int) -> str:
    """The part of the page about texts.png, which is drawn; '' without the text encoder, with a line that says so."""
    from .. import load

    began, count = time.perf_counter(), EACH * len(KNOWN + UNSEEN)
    options: dict[str, Any] = {**SAMPLING, "cfg_scale": TEXT_SCALE, "num_samples": count, "batch_size": count}
    try:
        samples = load(TEXT_MODEL).sample(prompt=KNOWN + UNSEEN, seed=seed, **options)
    except UserError as error:
        print(f"no samples of {TEXT_MODEL}: {error}")
        return ""
    samples.save(f"{folder}/texts.png")
    print(f"{count} samples of {TEXT_MODEL} for texts {time.perf_counter() - began:16.1f}", flush=True)
    return TEXTS.format(model=TEXT_MODEL, scale=TEXT_SCALE, seed=seed, unseen=len(UNSEEN))


def draw_enlarged(model: Model, folder: str, seed: int, small: Pixels) -> str:
    """The part of the page about enlarged.png, which is drawn: pictures [N, H, W, C], and below them large ones."""
    import numpy as np

    from ..runtime.pictures import save_grid

    began = time.perf_counter()
    large = model.upsample(small, seed=seed, batch_size=len(small), **ENLARGING).images
    factor = large.shape[1] // small.shape[1]
    pairs = np.concatenate([small.repeat(factor, axis=1).repeat(factor, axis=2), large])
    save_grid(f"{folder}/enlarged.png", pairs, len(small))
    print(f"{len(small)} samples enlarged to {large.shape[1]} pixels {time.perf_counter() - began:20.1f}", flush=True)
    return ENLARGEMENT.format(setting=ENLARGED, **ENLARGING)


def write_page(path: str, results: dict[str, Any], **facts: Any) -> None:
    """The page about the pictures beside it."""
    row = "<tr><td>{}<td>{accuracy:.1%}<td>{fd:.2f}<td>{seconds:.1f}</tr>\n"
    rows = "".join(row.format(title, **values) for title, values in results.items())
    seconds = sum(values["seconds"] for values in results.values())
    with open(path, "w", encoding="utf-8") as file:
        file.write(PAGE.format(rows=rows, seconds=seconds, **facts))


main = entry("demo", show)
