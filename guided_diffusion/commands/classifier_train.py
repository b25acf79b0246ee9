"""Train a classifier of noisy images, e.g. to guide a diffusion model."""

from __future__ import annotations

from ..config import ClassifierTrainConfig
from .entry import entry
from .flags import Flags

INITIAL_LOG_LOSS_SCALE = 16.0  # gradients of a cross-entropy are larger than those of a mean square


def train(flags: Flags) -> None:
    """Train as the flags say."""
    from ..train_util import ClassifierTrainLoop
    from . import training

    run = training.begin(flags)
    loop = run.flags.part(ClassifierTrainConfig)
    steps = {"max_steps": loop.iterations, "lr_anneal_steps": loop.iterations if loop.anneal_lr else 0}
    options = {"noised": loop.noised, "val_interval": loop.eval_interval}
    run.run(ClassifierTrainLoop, initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE, **steps, **options)


main = entry("classifier_train", train)
