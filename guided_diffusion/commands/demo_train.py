"""From nothing to a picture in minutes: train two small networks, sample with and without guidance, judge, draw."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from ..runtime.errors import UserError
from .entry import entry
from .flags import parse
from .sections import DemoTrainConfig

IMAGES = "--image_size 32 --num_classes 9 --noise_schedule cosine --diffusion_steps 1000 --random_flip False --lr 1e-3"
TRAINING = "--resume_checkpoint auto --save_interval 1000 --log_interval 50 --num_workers 0 --keep_last 1"
DIFFUSION = (
    "--class_cond True --predict_xstart True --num_channels 32 --num_res_blocks 1 --channel_mult 1,2,4 "
    "--attention_resolutions= --num_head_channels 64 --precision auto --warmup_steps 100 "
    "--ema_rate 0.98 --lr_anneal_steps 600 --sample_interval 300"
)
CLASSIFIER = (
    "--classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1,2,4 --classifier_attention_resolutions 8 "
    "--classifier_precision auto --weight_decay 0.05 --anneal_lr True --iterations"
)
SAMPLING = (
    "--sampler dpm++2m --steps 20 --num_samples 144 --precision auto --classifier_precision auto "
    "--classes 0,1,2,3,4,5,6,7,8"
)
# title, name of the folder, command, flags
NETWORKS = (
    ("1. Training a diffusion model on 32x32 emoji", "diffusion", "image_train", DIFFUSION),
    ("2. Training a classifier to guide it", "classifier", "classifier_train", f"{CLASSIFIER} 250"),
    ("3. Training a judge", "judge", "classifier_train", f"{CLASSIFIER} 200 --noised False"),
)
BATCH = {"image_train": 32, "classifier_train": 64, "classifier_sample": 36}  # of all processes; in sampling, of each
SCALES = (0.0, 3.0, 10.0)
CLASSES, SHOWN = 9, 6  # rows, and columns per scale


def show(config: DemoTrainConfig) -> None:
    """Train what is not trained yet, sample what is not sampled yet, and print how good it is."""
    from ..runtime import files

    if not files.exists(config.data_dir):
        bundled = "the pictures come with a checkout of the repository, not with the package: run this in one, or "
        remedy = bundled if config.data_dir == DemoTrainConfig().data_dir else ""
        raise UserError(f"--data_dir {config.data_dir} does not exist: {remedy}give images in up to 9 classes")
    print(f"Everything goes to {os.path.abspath(config.log_dir)}; a second run goes on where the first one ended.")
    began, where, seed = time.time(), config.log_dir, f"--seed={config.seed}"
    for title, name, command, flags in NETWORKS:
        words = [f"--data_dir={config.data_dir}", f"--log_dir={where}/{name}", seed]
        launch(title, command, *words, *f"{IMAGES} {TRAINING} {flags}".split())
    for scale in SCALES:
        words = [f"--model_path={where}/diffusion", f"--classifier_path={where}/classifier", seed]
        words += [f"--log_dir={where}/samples_scale_{scale:g}", f"--classifier_scale={scale}", *SAMPLING.split()]
        launch(f"4. Sampling 144 images at guidance scale {scale:g}", "classifier_sample", *words)
    judge_and_draw(config)
    print(f"All of it took {(time.time() - began) / 60:.1f} minutes.")


def launch(title: str, command: str, *flags: str) -> None:
    """Run a command on as many processes as there are cores (at most 8), with one thread each.

    On a CPU that is faster than one process of many threads, which wait for each other in every layer.
    """
    import torch as th

    print(f"{title} ...", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    began = time.time()
    ranks = 1 if th.cuda.is_available() else 1 << min(3, cores.bit_length() - 1)  # a divisor of the batches
    batch = f"--batch_size={BATCH[command] // (ranks if 'train' in command else 1)}"
    start = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", __package__.rpartition(".")[0]]
    # tables go to files, not to the screen
    environment = {**os.environ, "OPENAI_LOG_FORMAT": "log,csv", "OPENAI_LOG_FORMAT_MPI": "log", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *start, command, batch, *flags], env=environment, check=False)
    if done.returncode:
        raise SystemExit(2)  # the command has told why
    print(f"    {time.time() - began:.0f} s", flush=True)


def judge_and_draw(config: DemoTrainConfig) -> None:
    """Print how often the judge sees the class that was asked for, and draw the rows."""
    import numpy as np

    from .. import logger
    from ..runtime.pictures import planes, save_grid
    from . import common

    logger.configure(dir=config.log_dir, format_strs=[])
    words = [f"--classifier_path={config.log_dir}/judge"]
    judge = common.restore(parse("classifier_sample", words), "classifier_path")
    columns, titles = [], []
    print("\nHow often the separately trained classifier of clean images sees the class that was asked for:")
    for scale in SCALES:
        with np.load(f"{config.log_dir}/samples_scale_{scale:g}/samples_144x32x32x3.npz") as file:
            images, labels = file["arr_0"], file["arr_1"]
        titles.append(f"guided, scale {scale:g}" if scale else "unguided")
        print(f"    {titles[-1]:24s} {accuracy(judge.network, planes(images), labels):6.1%}")
        columns.append(np.stack([images[labels == label][:SHOWN] for label in range(CLASSES)]))
    picture, grid = f"{config.log_dir}/demo.png", np.concatenate(columns, axis=1)
    save_grid(picture, grid.reshape(-1, *grid.shape[2:]), grid.shape[1], judge.classes, titles=titles)
    print(f"\nThe picture, a row per class: {os.path.abspath(picture)}")


def accuracy(classifier: Any, images: Any, labels: Any) -> float:
    """The share of images [N, C, H, W] in [-1, 1] that a classifier on this process's device gives their label."""
    import torch as th

    from .. import dist_util

    images = images.to(dist_util.dev())
    with th.no_grad():
        guesses = classifier(images, th.zeros(len(images), device=images.device)).argmax(dim=1)
    return float((guesses.cpu() == th.from_numpy(labels)).float().mean())


main = entry("demo_train", lambda flags: show(flags.part(DemoTrainConfig)))
