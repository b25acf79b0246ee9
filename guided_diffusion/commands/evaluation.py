"""Parts that the evaluating commands share: ranks and log, the network of the features, samples during the training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch as th

from .. import dist_util, logger
from ..config import ClassifierConfig, DiffusionConfig, RunConfig, TrainEvaluationConfig, UNetConfig
from ..runtime.errors import UserError, refuse
from ..runtime.jobs import Job
from ..runtime.seeds import seeded
from ..sampling.samplers import make_sampler
from ..sampling.steps import Sampler
from ..script_util import build_diffusion
from ..training.checkpoints import step_of
from . import latent_space, prompts, vectors
from .common import image_shape, log_to_screen, restore
from .flags import Flags
from .sections import ExtractorConfig
from .tool_sections import PlaceConfig

if TYPE_CHECKING:
    from ..evaluation.features import Extractor
    from ..evaluation.training import Evaluation
    from ..image_datasets import ImageStream
    from ..networks.first_stage import FirstStage


def start(flags: Flags) -> None:
    """Join the other ranks; rank 0 logs to stdout, and to log.txt where --log_dir is given."""
    place = flags.part(PlaceConfig)
    dist_util.setup_dist(device=place.device, timeout=place.dist_timeout)
    if place.log_dir:
        logger.configure(dir=place.log_dir, format_strs=["stdout", "log"] if dist_util.rank() == 0 else [])
    else:
        log_to_screen()


def extractor_of(flags: Flags) -> Extractor:
    """The network that computes the features."""
    config = flags.part(ExtractorConfig)
    return extractor_named(config.features, weights=config.inception_weights, precision=config.eval_precision)


def extractor_named(features: str, *, weights: str = "", precision: str = "fp32") -> Extractor:
    """The network of the flags --features, --inception_weights and --eval_precision, on the device of this rank."""
    from ..evaluation.features import EXTRACTORS, make_extractor

    makers = {**EXTRACTORS, "classifier": _classifier}
    return make_extractor(features, weights=weights, device=dist_util.dev(), precision=precision, makers=makers)


def _classifier(path: str, device: th.device, precision: str) -> Extractor:
    from ..evaluation.features import classifier_extractor

    given = {"classifier_path": path, "classifier_precision": precision, "classifier_use_fp16": False}
    try:
        restored = restore(Flags("classifier_sample", given), "classifier_path")
        latents = restored.flags.values["latent_channels"]
        refuse((latents, f"{path} sees the latents of an autoencoder and not images: give another"))
    except ValueError as error:
        fault = str(error).replace("--classifier_path ", "")
        raise UserError(f"--features classifier:{path} cannot be used: {fault}") from error
    facts = {name.replace("classifier_path", "features classifier"): x for name, x in restored.identity.items()}
    return classifier_extractor(restored.network, restored.flags.part(ClassifierConfig), path, device, facts)


def check_writable(path: str) -> None:
    """Refuse a file that cannot be written, before hours of work whose result it gets."""
    folder = os.path.dirname(path) or "."
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "."
    barred = os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK)
    refuse((barred, f"{path} cannot be written: give a file in a folder that may be written to"))


def evaluation_of(flags: Flags, stream: ImageStream, first_stage: FirstStage | None = None) -> Evaluation:
    """The evaluation of samples during a training; refused where it would fail later."""
    from ..evaluation.training import Evaluation

    config, schedule = flags.part(TrainEvaluationConfig), flags.part(DiffusionConfig)
    sampler = make_sampler(config.eval_sampler)
    refuse(
        (sampler.ascending, f"--eval_sampler {config.eval_sampler} turns images to noise: give another, e.g. dpm++2m"),
        (schedule.timestep_respacing, "--eval_interval has steps of its own: leave out it or --timestep_respacing"),
    )
    process = build_diffusion(replace(schedule, timestep_respacing=f"{sampler.grid}{config.eval_steps}"))
    job = evaluation_job(flags, sampler, stream)
    job = replace(job, **latent_space.decoded(first_stage, job.shape))
    with seeded(flags.part(RunConfig).seed, 0, dist_util.dev()):  # weights are drawn at random before they are read
        extractor = extractor_of(flags)
    done = step_of(flags.values["resume_checkpoint"]) or 0
    batch_size = flags.part(ExtractorConfig).eval_batch_size
    return Evaluation(config, extractor, stream, job=job, process=process, done=done, batch_size=batch_size)


def evaluation_job(flags: Flags, sampler: Sampler, stream: ImageStream) -> Job:
    """The samples of an evaluation: each has label, caption and conditioning image of an image of the data.

    These images are evenly spread over the data and in random order.
    """
    unet, seed, count = flags.part(UNetConfig), flags.part(RunConfig).seed, flags.values["eval_samples"]
    odd = unet.image_channels not in (1, 3)
    refuse((odd, f"--eval_interval compares images of 1 or 3 channels, not {unet.image_channels}: leave it out"))
    dataset = stream.dataset
    chosen = (np.arange(count) * len(dataset) // count)[np.random.default_rng(seed).permutation(count)]
    classes = dataset.local_classes if unet.class_cond else None

    def beside(indices: Sequence[int]) -> dict[str, th.Tensor]:
        images = [int(chosen[index]) for index in indices]
        keywords = prompts.first_captions(stream, images) | vectors.beside(dataset, images)
        if dataset.partners is not None:
            rows = [dataset[0, image][1]["cond_image"] for image in images]
            keywords["cond_image"] = th.from_numpy(np.stack(rows))
        return keywords

    return Job(
        conditioning=beside,
        sampler=sampler,
        shape=image_shape(unet.image_channels, unet.image_size),
        num_samples=count,
        batch_size=1,  # as asked for
        out_dir="",
        seed=seed,
        labels=[] if classes is None else [int(classes[index]) for index in chosen],
    )
