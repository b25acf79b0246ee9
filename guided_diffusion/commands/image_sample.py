"""Sample from a diffusion model and save the images in an npz."""

from __future__ import annotations

from ..config import UNetConfig
from .entry import entry
from .flags import Flags
from .sections import SampleConfig


def sample(flags: Flags) -> str:
    """Sample as the flags say; returns the path of the npz.

    :raises ValueError: naming the flag that is wrong.
    """
    from . import common, conditioning, editing, guidance

    sampler = common.sampler_of(flags)
    flags = common.on_its_grid(flags, sampler)
    guidance.check(flags)
    editing.check(flags, sampler)
    conditioning.check_sampling(flags)
    common.start(flags)
    model = common.restore_unet(flags)
    flags = model.flags
    config, options = flags.part(UNetConfig), flags.part(SampleConfig)
    if options.classes and not config.class_cond:
        raise ValueError(f"--classes {options.classes} has no effect on an unconditional model: leave it out")
    labels = common.labels_of(flags, model.classes, config.num_classes) if config.class_cond else {}
    given = conditioning.condition(model, labels, model.classes)
    guided, edit = guidance.guided(model), editing.plan(model, labels, options.num_samples)
    shape = common.image_shape(config.image_channels, config.image_size, config.dims)
    request = {**model.identity, **guided.request, **edit.request, **given.request}
    job = common.job_of(flags, sampler, shape, request, start=edit.start, **given.job)
    loop = {**guided.options, **edit.options}
    return common.sample_and_say(flags, model.process, guided.network, job, calls=edit.calls, **loop)


main = entry("image_sample", sample)
