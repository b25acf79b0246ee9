"""Bits per dimension of images under a diffusion model: the variational bound, or the likelihood of its flow."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..config import DiffusionConfig, FlowConfig, RunConfig, UNetConfig
from ..runtime.errors import refuse
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

    refuse((not flags.part(LikelihoodConfig).data_dir, "--data_dir is missing: give a folder or a zip of images"))
    common.start(flags)
    carry_out(survey_of(common.restore(flags)))


def survey_of(model: Restored) -> Survey:
    """The images of the flags and how they are measured."""
    from .. import logger
    from ..evaluation.likelihood import Survey

    path, no_bits = model.path, "of which bits per dimension are not measured: give another model"
    refuse(
        (model.encoder is not None, f"{path} attends to captions, {no_bits}"),
        (model.first_stage is not None, f"{path} works on the latents of an autoencoder, {no_bits}"),
        ("large_size" in model.flags.saved, f"{path} is an upsampler, {no_bits}"),
    )
    options, config = model.flags.part(LikelihoodConfig), model.flags.part(MeasureConfig)
    dataset = _images(model)
    available, count = len(dataset), min(options.num_samples, len(dataset))
    choice = "evenly over them" if config.spread else "the first by name"
    if options.num_samples != available:
        logger.log(f"measuring {count} of {available} images, each once{f', {choice}' if count < available else ''}")
    indices = [number * available // count for number in range(count)] if config.spread else range(count)
    kind = {"likelihood": config.likelihood, "clip_denoised": options.clip_denoised}
    flow = asdict(model.flags.part(FlowConfig)) if config.likelihood == "flow" else {}
    return Survey(
        measure=_measure(model),
        dataset=dataset,
        indices=indices,
        names=[dataset.local_images[index].removeprefix(options.data_dir).lstrip("/") for index in indices],
        batch_size=options.batch_size,
        out_dir=logger.get_dir(),
        seed=model.flags.part(RunConfig).seed,
        request={**model.identity, **asdict(model.flags.part(DiffusionConfig)), **kind, **flow},
        request_defaults=model.flags.defaults,
        save_terms=config.save_terms,
    )


def _measure(model: Restored) -> Measure:
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


def _images(model: Restored) -> ImageDataset:
    """The images of --data_dir as they are: neither mirrored nor cropped at random."""
    from ..image_datasets import load_data
    from ..training import checkpoints
    from . import conditioning

    config, data = model.flags.part(UNetConfig), model.flags.part(LikelihoodConfig)
    options: dict[str, Any] = {"batch_size": 1, "random_flip": False, "rank": 0, "world_size": 1}
    options |= {"class_from": data.class_from, "label_column": data.label_column}
    options |= {
        name: getattr(config, name) for name in ("image_size", "image_channels", "class_cond", "vector_columns")
    }
    if config.class_cond:
        options |= {"num_classes": config.num_classes, "classes": checkpoints.classes_beside(model.path) or None}
    options |= {"pairing": conditioning.pairing_of(model.flags), "data_range": parse_range(data.data_range)}
    return load_data(data_dir=data.data_dir, **options).dataset


main = entry("image_nll", measure)
