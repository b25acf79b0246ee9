"""Metrics of a model while it is trained: samples made for them, a table of their values, a picture of the table.

Shapes: N images, n per batch, H W space, C channels.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch as th

from evaluations.evaluator import Report, Side, evaluate, prepare
from evaluations.figures import base, best, require
from evaluations.levels import Images, to_rgb
from evaluations.npz import open_images
from evaluations.plots import draw_progress
from evaluations.scores import METRICS, Options, rehearse
from evaluations.sources import ImageSource, Look
from guided_diffusion import checkpoint, dist_util, logger
from guided_diffusion.cli import Flags
from guided_diffusion.commands._evaluation import extractor_of
from guided_diffusion.config import DiffusionConfig, RunConfig, UNetConfig, parse_size
from guided_diffusion.evaluation_config import ExtractorConfig, TrainEvaluationConfig
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import ImageDataset, ImageStream
from guided_diffusion.jobs import Conditioning, Job
from guided_diffusion.log_writers import CSVOutputFormat
from guided_diffusion.sample_util import Model, sampled
from guided_diffusion.samplers import make_sampler
from guided_diffusion.script_util import build_diffusion
from guided_diffusion.seeds import seeded
from guided_diffusion.steps import Sampler

REFERENCE_IMAGES = 10_000  # of those trained on; more where more samples are compared with them
TABLE, PICTURE = "evaluation.csv", "evaluation.png"
LEADING = ("FID", "FD")  # the best step is that of the best of these, else of the first metric


class FreshSamples(ImageSource):
    """Samples of a model, made when they are asked for and kept nowhere; the same for any number of ranks."""

    def __init__(self, name: str, process: GaussianDiffusion, model: Model, job: Job) -> None:
        super().__init__(name, job.num_samples)
        self._process, self._model, self._job = process, model, job

    def look(self) -> Look:
        """Nothing to look at before they are made."""
        return Look(digest=self.path)

    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Images]]:
        """The batches number `first`, `first` + `step`, ..., each as one array in a list."""
        job, device = replace(self._job, batch_size=size), dist_util.dev()
        for _, images in sampled(self._process, self._model, job, rank=first, world_size=step, device=device):
            yield [to_rgb(images)]


class TrainingImages(ImageSource):
    """Images that are trained on, cropped as in training, and not mirrored: `count` of them, evenly over the data."""

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        super().__init__("the training data", count)
        paths = [dataset.local_images[index] for index in _evenly(len(dataset), count)]
        kind: dict[str, Any] = {"image_channels": dataset.image_channels, "on_bad_image": dataset.on_bad_image}
        self._dataset = ImageDataset(dataset.resolution, paths, random_flip=False, seed=dataset.seed, **kind)

    def look(self) -> Look:
        """They are as they are trained on."""
        return Look(digest=self.path)

    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Images]]:
        """The batches number `first`, `first` + `step`, ..., each as one array in a list."""
        for start in range(first * size, self.count, step * size):
            indices = range(start, min(start + size, self.count))
            images = np.stack([self._dataset.take((0, index))[0][0] for index in indices])
            yield [to_rgb(np.round((images + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1))]


def _evenly(size: int, count: int) -> list[int]:
    return [index * size // count for index in range(count)]


class Evaluation:
    """Called as (model, step), on all ranks: a row of evaluation.csv, and evaluation.png anew.

    :raises ValueError: before the training begins, if it could not be done later.
    """

    def __init__(self, flags: Flags, stream: ImageStream) -> None:
        require()
        config, network = flags.part(TrainEvaluationConfig), flags.part(ExtractorConfig)
        self._metrics = config.eval_metrics.split(",")
        self._process, sampler = _process(flags)
        self._job = _job(flags, sampler, stream)
        run = flags.part(RunConfig)
        with seeded(run.seed, 0, dist_util.dev()):  # the weights of a network are drawn before they are read
            self._extractor = extractor_of(flags)
            self._check_network()
        self._options: dict[str, Any] = {"batch_size": network.eval_batch_size}
        self._reference = self._prepare(config, stream)
        self._table: CSVOutputFormat | None = None
        if dist_util.rank() == 0:
            self._table = CSVOutputFormat(os.path.join(logger.get_dir(), TABLE), ("step", "samples"))
            self._table.rewind(checkpoint.step_of(flags.values["resume_checkpoint"]) or 0)
        self._said = False

    def _prepare(self, config: TrainEvaluationConfig, stream: ImageStream) -> Side:
        """The features of the reference.

        :raises ValueError: if it has not got those that a metric needs.
        """
        needs = {name for metric in self._metrics for name in METRICS[metric].needs}
        count = min(len(stream.dataset), max(REFERENCE_IMAGES, config.eval_samples))
        own = TrainingImages(stream.dataset, count)
        given = config.eval_reference and open_images(config.eval_reference, None, stream.dataset.data_range)
        side = prepare(given or own, self._extractor, needs=needs, progress=True, **self._own(config))
        for line in side.notes:
            logger.log(f"evaluation: {line}")
        dist_util.decide(lambda: self._check_reference(side))
        return side

    def _check_network(self) -> None:
        """Try the network once.

        :raises ValueError: if it gives no features that a metric needs.
        """
        tried = self._extractor(np.zeros((1, *self._job.shape[1:], 3), np.uint8))
        for metric in self._metrics:
            for name in METRICS[metric].needs_samples:
                if getattr(tried, name.removesuffix("_statistics")) is None:
                    what = name.replace("_", " ")
                    raise ValueError(f"--eval_metrics {metric} needs {what}, and {self._extractor.name} gives none")

    def _check_reference(self, side: Side) -> None:
        for metric in self._metrics:
            if any(getattr(side.features, name) is None for name in METRICS[metric].needs):
                raise ValueError(
                    f"--eval_metrics {metric} needs the images of a reference, and {side.source.path} holds their "
                    f"statistics: give images, or leave {metric} out"
                )
        try:
            rehearse(side.features, [METRICS[metric] for metric in self._metrics], Options())
        except ValueError as error:
            raise ValueError(f"{side.source.path} cannot be the reference: {error}") from error

    def _own(self, config: TrainEvaluationConfig) -> dict[str, Any]:
        """Features of the training data are not kept: their content would have to be read to know them again."""
        return {**self._options, "cache": bool(config.eval_reference)}

    def __call__(self, model: th.nn.Module, step: int) -> None:
        samples = FreshSamples(f"the samples of step {step}", self._process, model, self._job)
        report = evaluate(
            self._reference, samples, self._extractor, metrics=self._metrics, cache=False, **self._options
        )
        dist_util.decide(lambda: self._record(step, report))

    def _record(self, step: int, report: Report) -> None:
        assert self._table is not None
        folder, results = logger.get_dir(), report.results
        self._table.writekvs({"step": step, "samples": self._job.num_samples, **results})
        for name, value in results.items():
            logger.logkv(f"eval_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}", value)
        rows = [row for row in read_table(os.path.join(folder, TABLE)) if row["samples"] == self._job.num_samples]
        draw_progress(rows, list(results), os.path.join(folder, PICTURE))
        for line in [*report.warnings, *report.omitted] if not self._said else []:
            logger.warn(f"evaluation: {line}")
        self._said = True
        logger.log(_sentence(step, report, rows))


def _process(flags: Flags) -> tuple[GaussianDiffusion, Sampler]:
    """The process in the steps of the evaluation, and its sampler."""
    config, process = flags.part(TrainEvaluationConfig), flags.part(DiffusionConfig)
    sampler = make_sampler(config.eval_sampler)
    if getattr(sampler, "ascending", False):
        raise ValueError(f"--eval_sampler {config.eval_sampler} turns images to noise: give another, e.g. dpm++2m")
    if process.timestep_respacing:
        raise ValueError(
            f"--eval_interval takes steps of its own, and --timestep_respacing {process.timestep_respacing} trains on "
            "some alone: leave one of them out"
        )
    grid = f"{getattr(sampler, 'grid', '')}{config.eval_steps}"
    return build_diffusion(replace(process, timestep_respacing=grid)), sampler


def _job(flags: Flags, sampler: Sampler, stream: ImageStream) -> Job:
    """What is sampled: labels in the shares that they have in the data, in no order."""
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


def _conditioning(dataset: ImageDataset, count: int, seed: int) -> Conditioning | None:
    """The conditioning images of the images whose labels the samples have, None where there are none."""
    if dataset.partners is None:
        return None
    order, picked = np.random.default_rng(seed).permutation(count), _evenly(len(dataset), count)

    def take(indices: Sequence[int]) -> dict[str, th.Tensor]:
        rows = [dataset.take((0, picked[order[index]]))[0][1]["cond_image"] for index in indices]
        return {"cond_image": th.from_numpy(np.stack(rows))}

    return take


def read_table(path: str) -> list[dict[str, Any]]:
    """The rows of a table of numbers; what is none is left out."""
    with open(path, encoding="utf-8", newline="") as file:
        return [dict(_numbers(row)) for row in csv.DictReader(file)]


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, text in row.items():
        try:
            yield name, float(text)
        except (TypeError, ValueError):
            continue


def _sentence(step: int, report: Report, rows: list[dict[str, Any]]) -> str:
    """What is said of an evaluation."""
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in report.results.items())
    chosen = next((name for name in report.results if base(name) in LEADING), next(iter(report.results)))
    top = best(rows, chosen)
    so_far = "" if top is None else f"; the best {chosen} so far is {top[chosen]:.4g}, at step {top['step']:.0f}"
    return f"evaluation at step {step}: {numbers}{so_far}"
