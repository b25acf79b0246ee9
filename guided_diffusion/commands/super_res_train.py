"""Train an upsampler on images and their small versions."""

from __future__ import annotations

from typing import Any

from ..config import DiffusionConfig, RunConfig, SuperResConfig, resolve_precision
from .entry import entry
from .flags import Flags

PREVIEWED = 16  # images in a preview grid


def train(flags: Flags) -> None:
    """Train as the flags say.

    :raises ValueError: naming the flag that is wrong.
    """
    from .. import dist_util
    from ..image_datasets import load_superres_data
    from ..script_util import build_diffusion, build_upsampler
    from . import finetuning, performance, training

    flags = training.start(flags)
    config, schedule = flags.part(SuperResConfig), flags.part(DiffusionConfig)
    precision = resolve_precision(config.precision, config.use_fp16)
    model, diffusion = build_upsampler(config, schedule.learn_sigma).to(dist_util.dev()), build_diffusion(schedule)
    sizes: dict[str, Any] = {
        "large_size": config.large_size,
        "small_size": config.small_size,
        "cond_aug": config.cond_aug,
    }
    streams = training.open_streams(flags, load_superres_data, class_cond=config.class_cond, **sizes)
    finetuning.prepare(flags, model, streams.train.classes)
    performance.prepare(flags, model)
    training.train_diffusion(flags, model, diffusion, streams, precision=precision, previewer=previewer)


def previewer(flags: Flags, diffusion: Any, stream: Any) -> Any:
    """The function (model, step) that enlarges the same images of the data set every time."""
    import torch.nn.functional as F

    from .. import dist_util
    from ..runtime.options import parse_size
    from ..sample_util import preview
    from .training import first_images, preview_path

    images, labels = first_images(stream, PREVIEWED)
    small_size = parse_size(flags.part(SuperResConfig).small_size)
    low_res = F.interpolate(images, small_size, mode="area").to(dist_util.dev())
    classes = labels["y"].tolist() if labels else []

    def draw(model: Any, step: int) -> None:
        def enlarge(x: Any, timesteps: Any, **keywords: Any) -> Any:
            return model(x, timesteps, low_res=low_res, **keywords)

        seed = flags.part(RunConfig).seed
        preview(diffusion, enlarge, images.shape, labels=classes, seed=seed, path=preview_path(step))

    return draw


main = entry("super_res_train", train)
