"""Previews of a training: grids of samples, always from the same noise, and what they are compared with."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
import torch.nn.functional as F

from .. import dist_util, logger
from ..config import RunConfig, SuperResConfig, UNetConfig
from ..image_datasets import ImageStream
from ..runtime.errors import refuse
from ..runtime.options import parse_size
from ..runtime.pictures import DRAWN_CHANNELS, Pixels, planes, save_grid, to_uint8
from ..sample_util import preview
from ..training.settings import Hook
from . import conditioning, latent_space, prompts
from .common import image_shape

if TYPE_CHECKING:
    from .training import Training

PREVIEWED = 16  # images in a preview grid
COMPARED = 64  # images of the data whose colours are compared with it

Draw = Callable[[Any, int], None]  # (model, step)


def hooks(run: Training, previewer: Callable[[Training], Draw]) -> list[Hook]:
    """A preview every --sample_interval steps, none where that is 0."""
    interval = run.flags.values["sample_interval"]
    return [Hook(interval, previewer(run))] if interval else []


def first_images(stream: ImageStream, count: int) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """Images from all over the data set and their conditioning, without moving the stream."""
    size = len(stream.dataset)
    indices = [index * size // count for index in range(count)]
    items = [stream.dataset[0, index] for index in indices]
    beside = {name: th.from_numpy(np.stack([cond[name] for _, cond in items])) for name in items[0][1]}
    return th.from_numpy(np.stack([image for image, _ in items])), beside | prompts.first_captions(stream, indices)


def file(name: str) -> str:
    """The path of a file in the folder of all previews."""
    return os.path.join(logger.get_dir(), "previews", name)


def _draw(run: Training, network: Any, shape: tuple[int, ...], labels: list[int], step: int) -> Any:
    seed = run.flags.part(RunConfig).seed
    decoded = latent_space.decoded(run.first_stage, shape[1:])
    return preview(run.process, network, shape, labels=labels, seed=seed, path=file(f"{step:06d}.png"), **decoded)


def of_samples(run: Training) -> Draw:
    """The function that draws a grid of samples, the classes in turn."""
    config, kind = run.flags.part(UNetConfig), conditioning.kind_of(run.flags)
    undrawable = config.dims != 2 or config.image_channels not in DRAWN_CHANNELS
    refuse((undrawable, "--sample_interval draws images of 1, 3 or 4 channels in 2 dimensions only: leave it out"))
    shape = (PREVIEWED, *image_shape(config.image_channels, config.image_size))
    labels = list(range(min(PREVIEWED, len(run.stream.classes)))) if config.class_cond else []
    images, _ = first_images(run.stream, min(COMPARED, len(run.stream.dataset)))
    beside: dict[str, th.Tensor] = {}
    source = run.stream if kind is not None or run.validation is None else run.validation
    if kind is not None or source.captions is not None or config.vector_dim:
        paired, cond = first_images(source, PREVIEWED)
        labels = cond["y"].tolist() if labels else []
        beside = {name: value.to(dist_util.dev()) for name, value in cond.items() if name != "y"}
        pairs: dict[str, Pixels | None] = {"images.png": to_uint8(paired)}
        if kind is not None:
            pairs["cond_images.png"] = conditioning.drawn(kind, cond["cond_image"])
        for name, pixels in pairs.items():
            if pixels is not None and dist_util.rank() == 0:
                save_grid(file(name), pixels, math.isqrt(PREVIEWED))

    def draw(model: Any, step: int) -> None:
        samples = _draw(run, partial(model, **beside) if beside else model, shape, labels, step)
        compare_colours(step, samples, images)

    return draw


def of_enlarged(run: Training) -> Draw:
    """The function that enlarges the same images of the data set every time."""
    images, cond = first_images(run.stream, PREVIEWED)
    small_size = parse_size(run.flags.part(SuperResConfig).small_size)
    classes = cond.pop("y").tolist() if "y" in cond else []
    cond["low_res"] = F.interpolate(images, small_size, mode="area")
    beside = {name: value.to(dist_util.dev()) for name, value in cond.items()}

    def draw(model: Any, step: int) -> None:
        _draw(run, partial(model, **beside), tuple(images.shape), classes, step)

    return draw


def compare_colours(step: int, samples: Any, images: th.Tensor) -> None:
    """Log mean and deviation of each channel of a preview and of the data: a tint shows here first.

    :param samples: uint8 [N, H, W, C]; `images` are [N, C, H, W] in [-1, 1].
    """
    texts = []
    for name, batch in (("samples", planes(samples)), ("data", images)):
        channels = batch.transpose(0, 1).flatten(1)
        texts.append(f"{name} {' '.join(f'{float(each.mean()):+.2f}/{float(each.std()):.2f}' for each in channels)}")
    logger.log(f"preview at step {step}, mean/deviation of the channels: {', '.join(texts)}")
