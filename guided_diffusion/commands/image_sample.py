"""Sample from a diffusion model and save the images in an npz."""

from __future__ import annotations

from guided_diffusion import cli
from guided_diffusion.commands._entry import entry
from guided_diffusion.config import DiffusionConfig, SampleConfig, UNetConfig


def sample(flags: cli.Flags) -> None:
    """Sample as the flags say.

    :raises ValueError: naming the flag that is wrong.
    """
    from guided_diffusion.commands import _common as common
    from guided_diffusion.script_util import build_diffusion

    sampler = common.sampler_of(flags)
    common.start(flags)
    model = common.restore_unet(flags)
    flags = model.flags
    config, options = flags.part(UNetConfig), flags.part(SampleConfig)
    if options.classes and not config.class_cond:
        raise ValueError(f"--classes {options.classes} has no effect on an unconditional model: leave it out")
    labels = common.labels_of(flags, model.classes, config.num_classes) if config.class_cond else {}
    shape = common.image_shape(config.image_channels, config.image_size, config.dims)
    job = common.job_of(flags, sampler, shape, model.identity, **labels)
    common.sample_and_say(flags, build_diffusion(flags.part(DiffusionConfig)), model.network, job)


main = entry("image_sample", sample)
