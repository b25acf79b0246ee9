"""Train a diffusion model on images."""

from __future__ import annotations

from .entry import entry
from .flags import Flags


def train(flags: Flags) -> None:
    """Train as the flags say."""
    from ..train_util import Hook
    from . import evaluation, previews, training

    run = training.begin(flags)
    hooks, interval = previews.hooks(run, previews.of_samples), run.flags.values["eval_interval"]
    if interval:
        hooks.append(
            Hook(interval, evaluation.evaluation_of(run.flags, run.stream, run.first_stage), on_all_ranks=True)
        )
    run.run(hooks=hooks)


main = entry("image_train", train)
