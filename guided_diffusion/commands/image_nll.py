"""Bits per dimension of images under a diffusion model: the variational bound, or the likelihood of its flow."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..config import DiffusionConfig, FlowConfig, RunConfig, UNetConfig
from ..runtime.errors import UserError
from ..runtime.options import parse_range
from .entry import entry
from .flags import Flags
from .sections import LikelihoodConfig, MeasureConfig

if TYPE_CHECKING:
    from ..evaluation.likelihood import Measure, Survey
    from ..image_datasets import ImageDataset
    from .common import Restored


def measure(flags: Flags) -> None:
    """Measure every image once, whatever the number of ranks."""
    from ..evaluation.likelihood import carry_out
    from . import common

    if not flags.part(LikelihoodConfig).data_dir:
        raise UserError("--data_dir is missing: give a folder or a zip of images")
    common.start(flags)
    model = common.restore_unet(flags)
    carry_out(survey_of(model))


def survey_of(model: Restored) -> Survey:
    """The images of the flags and how they are measured."""
    from .. import logger
    from ..evaluation.likelihood import Survey

    options, config = model.flags.part(LikelihoodConfig), model.flags.part(MeasureConfig)
    dataset = images_of(model)
    available, count = len(dataset), min(options.num_samples, len(dataset))
    if options.num_samples > available:
        logger.log(f"{available} images are there, not {options.num_samples}: each is measured once")
    elif count < available:
        logger.log(
            f"measuring {count} of {available} images, {'evenly over them' if config.spread else 'the first by name'}"
        )
    indices = [number * available // count for number in range(count)] if config.spread else range(count)
    names = [dataset.local_images[index].removeprefix(options.data_dir).lstrip("/") for index in indices]
    return Survey(
        measure=measure_of(model),
        dataset=dataset,
        indices=indices,
        names=names,
        batch_size=options.batch_size,
        out_dir=logger.get_dir(),
        seed=model.flags.part(RunConfig).seed,
        request={**model.identity, **asdict(model.flags.part(DiffusionConfig)), **_settings(model.flags)},
        request_defaults=model.flags.defaults,
        save_terms=config.save_terms,
    )


def _settings(flags: Flags) -> dict[str, Any]:
    """The flags that have an effect on the likelihoods."""
    kind = flags.part(MeasureConfig).likelihood
    flow = asdict(flags.part(FlowConfig)) if kind == "flow" else {}
    return {"likelihood": kind, "clip_denoised": flags.part(LikelihoodConfig).clip_denoised, **flow}


def measure_of(model: Restored) -> Measure:
    """The kind of likelihood that the flags ask for."""
    from .. import logger
    from ..evaluation.likelihood import probability_flow, variational_bound

    network, clip = model.network, model.flags.part(LikelihoodConfig).clip_denoised
    steps = f"{model.process.num_timesteps} of {model.flags.part(DiffusionConfig).diffusion_steps} steps"
    if model.flags.part(MeasureConfig).likelihood == "vlb":
        logger.log(f"measuring the variational bound over {steps}")
        return variational_bound(model.process, network, clip_denoised=clip)
    options = model.flags.part(FlowConfig)
    logger.log(f"measuring the likelihood of the probability flow between the ends of {steps}: {options}")
    return probability_flow(model.process, network, clip_denoised=clip, options=options)


def images_of(model: Restored) -> ImageDataset:
    """The images of --data_dir as they are: neither mirrored nor cropped at random."""
    from ..image_datasets import load_data
    from ..training import checkpoints
    from . import conditioning

    config, options = model.flags.part(UNetConfig), model.flags.part(LikelihoodConfig)
    labels: dict[str, Any] = {"class_from": options.class_from, "label_column": options.label_column}
    if config.class_cond:
        labels |= {"num_classes": config.num_classes, "classes": checkpoints.classes_beside(model.path) or None}
    return load_data(
        data_dir=options.data_dir,
        batch_size=1,
        image_size=config.image_size,
        class_cond=config.class_cond,
        random_flip=False,
        image_channels=config.image_channels,
        pairing=conditioning.pairing_of(model.flags),
        data_range=parse_range(options.data_range),
        rank=0,
        world_size=1,
        **labels,
    ).dataset


main = entry("image_nll", measure)
