"""Train a diffusion model on images."""

from __future__ import annotations

from typing import Any

from guided_diffusion import cli
from guided_diffusion.commands._entry import entry
from guided_diffusion.config import DiffusionConfig, RunConfig, UNetConfig, resolve_precision

PREVIEWED = 16  # images in a preview grid
COMPARED = 64  # images of the data whose colours are compared with it


def train(flags: cli.Flags) -> None:
    """Train as the flags say.

    :raises ValueError: naming the flag that is wrong.
    """
    from guided_diffusion import dist_util
    from guided_diffusion.commands import _training as training
    from guided_diffusion.script_util import build_diffusion, build_unet

    flags = training.start(flags)
    config, schedule = flags.part(UNetConfig), flags.part(DiffusionConfig)
    precision = resolve_precision(config.precision, config.use_fp16)
    model, diffusion = build_unet(config, schedule.learn_sigma).to(dist_util.dev()), build_diffusion(schedule)
    streams = training.open_streams(flags, image_size=config.image_size, class_cond=config.class_cond)
    training.train_diffusion(flags, model, diffusion, streams, precision=precision, previewer=previewer)


def previewer(flags: cli.Flags, diffusion: Any, stream: Any) -> Any:
    """The function (model, step) that draws a grid of samples, the classes in turn, with the same seed every time.

    :raises ValueError: if such images cannot be drawn.
    """
    from guided_diffusion.commands._common import image_shape
    from guided_diffusion.commands._training import compare_colours, first_images, preview_path
    from guided_diffusion.pictures import DRAWN_CHANNELS
    from guided_diffusion.sample_util import preview

    config = flags.part(UNetConfig)
    if config.dims != 2 or config.image_channels not in DRAWN_CHANNELS:
        raise ValueError("--sample_interval draws images of 1, 3 or 4 channels in 2 dimensions only: leave it out")
    shape = (PREVIEWED, *image_shape(config.image_channels, config.image_size, config.dims))
    labels = list(range(min(PREVIEWED, len(stream.classes)))) if config.class_cond else []
    seed, (images, _) = flags.part(RunConfig).seed, first_images(stream, min(COMPARED, len(stream.dataset)))

    def draw(model: Any, step: int) -> None:
        samples = preview(diffusion, model, shape, labels=labels, seed=seed, path=preview_path(step))
        compare_colours(step, samples, images)

    return draw


main = entry("image_train", train)
