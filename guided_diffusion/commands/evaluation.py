"""What the commands that evaluate share: ranks, the log, the network of the features, samples during the training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch as th

from .. import dist_util, logger
from ..config import DiffusionConfig, ExtractorConfig, RunConfig, TrainEvaluationConfig, UNetConfig
from ..gaussian_diffusion import GaussianDiffusion
from ..image_datasets import ImageDataset, ImageStream
from ..runtime.jobs import Conditioning, Job
from ..runtime.options import parse_size
from ..runtime.seeds import seeded
from ..sampling.samplers import make_sampler
from ..sampling.steps import Sampler
from ..script_util import build_diffusion
from ..training import checkpoints
from .flags import Flags
from .sections import PlaceConfig

if TYPE_CHECKING:
    from ..evaluation.features import Extractor
    from ..evaluation.training import Evaluation


def start(flags: Flags) -> None:
    """Join the other ranks; rank 0 says what there is to say, and keeps it in log.txt where --log_dir is given."""
    place = flags.part(PlaceConfig)
    dist_util.setup_dist(device=place.device, timeout=place.dist_timeout)
    first = dist_util.rank() == 0
    if place.log_dir:
        logger.configure(dir=place.log_dir, format_strs=["stdout", "log"] if first else [])
    else:
        console = [logger.HumanOutputFormat(sys.stdout)] if first else []
        logger.Logger.CURRENT = logger.Logger(dir="", output_formats=console)


def extractor_of(flags: Flags) -> Extractor:
    """The network that makes the features."""
    from ..evaluation.features import make_extractor

    config = flags.part(ExtractorConfig)
    return make_extractor(
        config.features, weights=config.inception_weights, device=dist_util.dev(), precision=config.eval_precision
    )


def check_writable(path: str) -> None:
    """Find out before hours of work whether a file can be written at their end.

    :raises ValueError: if it cannot.
    """
    folder = os.path.dirname(path) or "."
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: give a file in a folder that may be written to")


# ---- during the training


def evaluation_of(flags: Flags, stream: ImageStream) -> Evaluation:
    """The evaluation of samples during a training.

    :raises ValueError: if it could not be done later.
    """
    from ..evaluation.training import Evaluation

    config, seed = flags.part(TrainEvaluationConfig), flags.part(RunConfig).seed
    process, sampler = _process(config, flags.part(DiffusionConfig))
    job = evaluation_job(flags, sampler, stream)
    with seeded(seed, 0, dist_util.dev()):  # weights are drawn at random before they are read
        extractor = extractor_of(flags)
    done = checkpoints.step_of(flags.values["resume_checkpoint"]) or 0
    batch_size = flags.part(ExtractorConfig).eval_batch_size
    return Evaluation(config, extractor, stream, job=job, process=process, done=done, batch_size=batch_size)


def _process(config: TrainEvaluationConfig, schedule: DiffusionConfig) -> tuple[GaussianDiffusion, Sampler]:
    """The process in the steps of the evaluation, and its sampler.

    :raises ValueError: if they cannot be combined.
    """
    sampler = make_sampler(config.eval_sampler)
    if sampler.ascending:
        raise ValueError(f"--eval_sampler {config.eval_sampler} turns images to noise: give another, e.g. dpm++2m")
    if schedule.timestep_respacing:
        raise ValueError(
            f"--eval_interval takes steps of its own, and --timestep_respacing {schedule.timestep_respacing} trains on "
            "some alone: leave one of them out"
        )
    grid = f"{sampler.grid}{config.eval_steps}"
    return build_diffusion(replace(schedule, timestep_respacing=grid)), sampler


def evaluation_job(flags: Flags, sampler: Sampler, stream: ImageStream) -> Job:
    """The samples of an evaluation: labels in the shares that they have in the data, in random order.

    :raises ValueError: if features cannot be made of such images.
    """
    config, unet, seed = flags.part(TrainEvaluationConfig), flags.part(UNetConfig), flags.part(RunConfig).seed
    if unet.image_channels not in (1, 3):
        raise ValueError(f"--eval_interval compares images of 1 or 3 channels, not {unet.image_channels}: leave it out")
    labels: list[int] = []
    if unet.class_cond and stream.dataset.local_classes is not None:
        classes = stream.dataset.local_classes
        order = np.random.default_rng(seed).permutation(config.eval_samples)
        picked = _evenly(len(classes), config.eval_samples)
        labels = [int(classes[picked[index]]) for index in order]
    return Job(
        conditioning=_conditioning(stream.dataset, config.eval_samples, seed),
        sampler=sampler,
        shape=(unet.image_channels, *parse_size(unet.image_size)),
        num_samples=config.eval_samples,
        batch_size=1,  # as asked for
        out_dir="",
        seed=seed,
        labels=labels,
    )


def _evenly(size: int, count: int) -> list[int]:
    """`count` indices of 0 .. size - 1."""
    return [index * size // count for index in range(count)]


def _conditioning(dataset: ImageDataset, count: int, seed: int) -> Conditioning | None:
    """The conditioning images of the images whose labels the samples have; None without conditioning images."""
    if dataset.partners is None:
        return None
    order, picked = np.random.default_rng(seed).permutation(count), _evenly(len(dataset), count)

    def take(indices: Sequence[int]) -> dict[str, th.Tensor]:
        rows = [dataset.take((0, picked[order[index]]))[0][1]["cond_image"] for index in indices]
        return {"cond_image": th.from_numpy(np.stack(rows))}

    return take
