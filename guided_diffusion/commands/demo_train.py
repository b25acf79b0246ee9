"""From nothing to a picture in minutes: train two small networks, then sample from them as the demonstration does."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from ..runtime.errors import UserError
from . import demo, presets
from .entry import entry
from .sections import DemoTrainConfig

PICTURES = presets.BUNDLED.parent / "datasets" / "emoji64.zip"
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


def show(config: DemoTrainConfig) -> None:
    """Train what is not trained yet, sample, and print how good the samples are."""
    from .. import load

    if not PICTURES.exists():
        remedy = "the pictures come with a checkout of the repository, not with the package: run this in one"
        raise UserError(f"{PICTURES} does not exist: {remedy}")
    print(f"Everything goes to {os.path.abspath(config.log_dir)}; a second run goes on where the first one ended.")
    began, where = time.time(), config.log_dir
    for title, name, command, flags in NETWORKS:
        words = [f"--data_dir={PICTURES}", f"--log_dir={where}/{name}", f"--seed={config.seed}"]
        launch(title, command, *words, *f"{IMAGES} {TRAINING} {flags}".split())
    print("3. Sampling, judged by the bundled classifier of clean images")
    model = load(f"{where}/diffusion", classifier=f"{where}/classifier")
    demo.present(model, where, config.seed, "this training")
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
    start = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", __package__.rpartition(".")[0]]
    # tables go to files, not to the screen
    environment = {**os.environ, "OPENAI_LOG_FORMAT": "log,csv", "OPENAI_LOG_FORMAT_MPI": "log", "OMP_NUM_THREADS": "1"}
    words = [command, f"--batch_size={BATCH[command] // ranks}", *flags]
    done = subprocess.run([sys.executable, "-m", *start, *words], env=environment, check=False)
    if done.returncode:
        raise SystemExit(2)  # the command has told why
    print(f"    {time.time() - began:.0f} s", flush=True)


main = entry("demo_train", lambda flags: show(flags.part(DemoTrainConfig)))
