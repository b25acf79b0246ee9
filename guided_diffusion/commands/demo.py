"""From nothing to a picture in minutes: train three networks, sample with and without guidance, judge, draw."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..runtime.errors import UserError
from .entry import entry
from .flags import parse
from .sections import DemoConfig

IMAGES = "--image_size 32 --num_classes 9 --noise_schedule cosine --diffusion_steps 1000 --random_flip False".split()
TRAINING = "--resume_checkpoint auto --save_interval 1000 --log_interval 50 --num_workers 0 --keep_last 1".split()
DIFFUSION = (
    "--class_cond True --predict_xstart True --num_channels 32 --num_res_blocks 1 --channel_mult 1,2,4 "
    "--attention_resolutions= --num_head_channels 64 --precision auto --lr 1e-3 --warmup_steps 100 "
    "--ema_rate 0.99 --lr_anneal_steps 1200 --sample_interval 600"
).split()
CLASSIFIER = (
    "--classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1,2,4 --classifier_attention_resolutions 8 "
    "--classifier_precision auto --lr 1e-3 --weight_decay 0.05 --anneal_lr True"
).split()
SAMPLING = "--timestep_respacing 50 --num_samples 144 --precision auto --classifier_precision auto".split()
BATCH = {"image_train": 32, "classifier_train": 64, "classifier_sample": 36}  # of all processes; in sampling, of each
SCALES = (0.0, 3.0, 10.0)
CLASSES, SHOWN = 9, 6  # rows, and columns per scale


def show(config: DemoConfig) -> None:
    """Train what is not trained yet, sample what is not sampled yet, and say what comes out.

    :raises ValueError: if the images are not there.
    """
    from ..runtime import paths

    if not paths.exists(config.data_dir):
        bundled = "the pictures come with a checkout of the repository, not with the package: run this in one, or "
        where = bundled if config.data_dir == DemoConfig().data_dir else ""
        raise UserError(f"--data_dir {config.data_dir} does not exist: {where}give images in up to 9 classes")
    began = time.time()
    print(f"Everything goes to {os.path.abspath(config.log_dir)}; a second run goes on where the first one ended.")
    train(config)
    samples = [sample(config, scale) for scale in SCALES]
    judge_and_draw(config, samples)
    print(f"All of it took {(time.time() - began) / 60:.1f} minutes.")


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    print(f"{text} ...", flush=True)
    began = time.time()
    yield
    print(f"    {time.time() - began:.0f} s", flush=True)


def launch(command: str, *flags: str) -> None:
    """Run a command on as many processes as there are cores (at most 8), with one thread each.

    On a CPU that is faster than one process of many threads, which wait for each other in every layer.

    :raises SystemExit: with the command's code, if it fails.
    """
    import torch as th

    ranks = 1 if th.cuda.is_available() else process_count()
    package = __package__.rpartition(".")[0]
    start = ["-c", f"from {__name__} import torchrun; torchrun()", "--standalone", f"--nproc_per_node={ranks}"]
    # tables go to files, not to the screen
    environment = {**os.environ, "OPENAI_LOG_FORMAT": "log,csv", "OPENAI_LOG_FORMAT_MPI": "log", "OMP_NUM_THREADS": "1"}
    batch = [f"--batch_size={BATCH[command] // (ranks if 'train' in command else 1)}"]
    done = subprocess.run(
        [sys.executable, *start, "-m", package, command, *batch, *flags], env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)


def torchrun() -> None:
    """What the command torchrun does, without its traceback around what the processes say when they fail."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        raise SystemExit(error.get_first_failure()[1].exitcode) from None


def process_count() -> int:
    """The largest power of two of processes that have a core each, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 << min(3, cores.bit_length() - 1)


def train(config: DemoConfig) -> None:
    """The diffusion model, the classifier that guides it, and one that judges without having guided."""

    def run(command: str, name: str, *flags: str) -> None:
        where = ["--data_dir", config.data_dir, "--log_dir", f"{config.log_dir}/{name}", "--seed", str(config.seed)]
        launch(command, *where, *IMAGES, *TRAINING, *flags)

    with stage("1. Training a class-conditional diffusion model on 32x32 emoji (about 5 minutes)"):
        run("image_train", "diffusion", *DIFFUSION)
    with stage("2. Training a classifier of noisy images, to guide with (about a minute)"):
        run("classifier_train", "classifier", *CLASSIFIER, "--iterations", "350")
    with stage("3. Training a classifier of clean images, to judge with (about a minute)"):
        run("classifier_train", "judge", *CLASSIFIER, "--iterations", "300", "--noised", "False")


def sample(config: DemoConfig, scale: float) -> tuple[float, str]:
    """Images of every class in turn at a scale of guidance: (scale, path of the npz)."""
    folder, classes = f"{config.log_dir}/samples_scale_{scale:g}", ",".join(map(str, range(CLASSES)))
    words = [f"--model_path={config.log_dir}/diffusion", f"--classifier_path={config.log_dir}/classifier"]
    words += [f"--log_dir={folder}", f"--classifier_scale={scale}", f"--seed={config.seed}", f"--classes={classes}"]
    with stage(f"4. Sampling 144 images with {f'guidance of scale {scale:g}' if scale else 'no guidance'}"):
        launch("classifier_sample", *words, *SAMPLING)
    return scale, f"{folder}/samples_144x32x32x3.npz"


def judge_and_draw(config: DemoConfig, samples: Sequence[tuple[float, str]]) -> None:
    """Print how often the judge sees the class that was asked for and how far its features are, and draw the rows."""
    import numpy as np

    from .. import dist_util, logger
    from ..evaluation.evaluator import evaluate, prepare
    from ..evaluation.features import make_extractor
    from ..evaluation.images import open_images
    from ..image_datasets import load_data
    from ..runtime.pictures import planes, save_grid
    from . import common

    logger.configure(dir=config.log_dir, format_strs=[])
    judge = common.restore_classifier(parse("classifier_sample", [f"--classifier_path={config.log_dir}/judge"]))
    extractor = make_extractor(f"classifier:{config.log_dir}/judge", device=dist_util.dev())
    real = prepare(open_images(config.data_dir, 32), extractor, needs=("pool_statistics",), cache=False)
    columns, titles = [], []
    print("\nHow often the separately trained classifier of clean images sees the class that was asked for, and the")
    print("Frechet distance (FD) of its features from those of all real images:")
    for scale, path in samples:
        with np.load(path) as file:
            images, labels = file["arr_0"], file["arr_1"]
        name = f"guided, scale {scale:g}" if scale else "unguided"
        (distance,) = evaluate(real, path, extractor, metrics=("fid",), cache=False).results.values()
        print(f"    {name:24s} {accuracy(judge.network, planes(images), labels):6.1%}   FD {distance:5.2f}")
        columns.append(np.stack([images[labels == label][:SHOWN] for label in range(CLASSES)]))
        titles.append(name)
    images, cond = next(
        load_data(data_dir=config.data_dir, batch_size=512, image_size=32, class_cond=True, random_flip=False)
    )
    print(f"    {'real images, for scale':24s} {accuracy(judge.network, images, cond['y'].numpy()):6.1%}")
    picture = f"{config.log_dir}/demo.png"
    grid = np.concatenate(columns, axis=1)
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


main = entry("demo", lambda flags: show(flags.part(DemoConfig)))
