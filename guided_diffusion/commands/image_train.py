"""Train a diffusion model on images."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from ..config import DiffusionConfig, RunConfig, UNetConfig, resolve_precision
from .entry import entry
from .flags import Flags

PREVIEWED = 16  # images in a preview grid
COMPARED = 64  # images of the data whose colours are compared with it


def train(flags: Flags) -> None:
    """Train as the flags say.

    :raises ValueError: naming the flag that is wrong.
    """
    from .. import dist_util
    from ..script_util import build_diffusion, build_unet
    from . import (
        conditioning,
        finetuning,
        performance,
        training,
    )

    flags = training.start(flags)
    config, schedule = flags.part(UNetConfig), flags.part(DiffusionConfig)
    precision = resolve_precision(config.precision, config.use_fp16)
    model, diffusion = build_unet(config, schedule.learn_sigma).to(dist_util.dev()), build_diffusion(schedule)
    beside = conditioning.stream_options(flags)
    streams = training.open_streams(flags, image_size=config.image_size, class_cond=config.class_cond, **beside)
    finetuning.prepare(flags, model, streams.train.classes)
    performance.prepare(flags, model)
    hooks = evaluations(flags, streams.train)
    training.train_diffusion(flags, model, diffusion, streams, precision=precision, previewer=previewer, hooks=hooks)


def evaluations(flags: Flags, stream: Any) -> list[Any]:
    """The hook that measures samples, where the flags ask for it.

    :raises ValueError: if it could not do that later.
    """
    interval = flags.values["eval_interval"]
    if not interval:
        return []
    from ..train_util import Hook
    from .evaluation import evaluation_of

    return [Hook(interval, evaluation_of(flags, stream), on_all_ranks=True)]


def previewer(flags: Flags, diffusion: Any, stream: Any) -> Any:
    """The function (model, step) that draws a grid of samples, the classes in turn, with the same seed every time.

    :raises ValueError: if such images cannot be drawn.
    """
    from ..runtime.pictures import DRAWN_CHANNELS
    from ..sample_util import preview
    from .common import image_shape
    from .training import compare_colours, first_images, preview_path

    config = flags.part(UNetConfig)
    if config.dims != 2 or config.image_channels not in DRAWN_CHANNELS:
        raise ValueError("--sample_interval draws images of 1, 3 or 4 channels in 2 dimensions only: leave it out")
    shape = (PREVIEWED, *image_shape(config.image_channels, config.image_size, config.dims))
    labels = list(range(min(PREVIEWED, len(stream.classes)))) if config.class_cond else []
    seed, (images, _) = flags.part(RunConfig).seed, first_images(stream, min(COMPARED, len(stream.dataset)))
    labels, beside = condition_previews(flags, stream, labels)

    def draw(model: Any, step: int) -> None:
        network = partial(model, **beside) if beside else model
        samples = preview(diffusion, network, shape, labels=labels, seed=seed, path=preview_path(step))
        compare_colours(step, samples, images)

    return draw


def condition_previews(flags: Flags, stream: Any, labels: list[int]) -> tuple[list[int], dict[str, Any]]:
    """The labels of previews, and what else the network sees: the conditioning images of some images, with their own.

    These are drawn in previews/cond_images.png, and the images that they belong to in previews/images.png.
    """
    from .. import dist_util
    from ..runtime.pictures import save_grid, to_uint8
    from . import conditioning
    from .training import first_images, previews_folder

    kind = conditioning.kind_of(flags)
    if kind is None:
        return labels, {}
    images, beside = first_images(stream, PREVIEWED)
    pictures = {"images.png": to_uint8(images), "cond_images.png": conditioning.drawn(kind, beside["cond_image"])}
    for name, pixels in pictures.items() if dist_util.rank() == 0 else ():
        if pixels is not None:
            save_grid(f"{previews_folder()}/{name}", pixels, math.isqrt(PREVIEWED))
    own = beside["y"].tolist() if labels else []
    return own, {"cond_image": beside["cond_image"].to(dist_util.dev())}


main = entry("image_train", train)
