"""Train an upsampler on images and their small versions."""

from __future__ import annotations

from .entry import entry
from .flags import Flags


def train(flags: Flags) -> None:
    """Train as the flags say."""
    from . import previews, training

    run = training.begin(flags)
    run.run(hooks=previews.hooks(run, previews.of_enlarged))


main = entry("super_res_train", train)
