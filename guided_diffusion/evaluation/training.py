"""Metrics of a model during its training: samples of it, evaluation.csv and evaluation.png.

Shapes: N images, n per batch, H W space, C channels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from .. import dist_util, logger
from ..config import LoaderConfig, TrainEvaluationConfig
from ..runtime.errors import WHY, as_user_error, refuse
from ..runtime.jobs import Job
from ..runtime.log_writers import CSVOutputFormat, read_rows
from ..runtime.pictures import levels, to_uint8
from ..sample_util import Model, sampled
from .evaluator import Report, Side, evaluate, prepare
from .features import Extractor
from .images import ImageSet, Pixels, open_images, to_rgb
from .plots import base, best, draw_progress, require
from .references import FIELDS
from .scores import METRICS, WORDS, Options, needs_of, rehearse

if TYPE_CHECKING:
    from ..gaussian_diffusion import GaussianDiffusion
    from ..image_datasets import ImageDataset, ImageStream

REFERENCE_IMAGES = 10_000  # of those trained on; more if more samples are compared with them
TABLE, PICTURE = "evaluation.csv", "evaluation.png"
LEADING = ("FID", "FD")  # the best step is that of the best of these, else of the first metric


class FreshSamples(ImageSet):
    """Samples of a model, made when they are asked for and kept nowhere; the same for any number of ranks."""

    def __init__(self, name: str, process: GaussianDiffusion, model: Model, job: Job) -> None:
        super().__init__(name, job.num_samples)
        self._process, self._model, self._job = process, model, job

    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Pixels]]:
        job, device = replace(self._job, batch_size=size), dist_util.dev()
        for x, _ in sampled(self._process, self._model, job, rank=first, world_size=step, device=device):
            yield [to_rgb(to_uint8(x))]


class TrainingImages(ImageSet):
    """`count` of the images that are trained on, evenly over the data, cropped as in training and not mirrored."""

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        super().__init__("the training data", count)
        paths = [dataset.local_images[index * len(dataset) // count] for index in range(count)]
        options = replace(dataset.options, **asdict(LoaderConfig()))
        self._dataset = type(dataset)(dataset.resolution, paths, random_flip=False, options=options)

    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Pixels]]:
        for start in range(first * size, self.count, step * size):
            indices = range(start, min(start + size, self.count))
            images = np.stack([self._dataset[0, index][0] for index in indices])
            yield [to_rgb(np.round(levels(images)).astype(np.uint8).transpose(0, 2, 3, 1))]


class Evaluation:
    """Called as (model, step) on all ranks, adds a row to evaluation.csv and redraws evaluation.png.

    What an evaluation would fail at later is an error before the training begins.

    :param job: the samples to make.
    :param process: in the steps in which they are sampled.
    :param done: steps that the training has behind it; the rows of later ones are dropped.
    """

    def __init__(
        self,
        config: TrainEvaluationConfig,
        extractor: Extractor,
        stream: ImageStream,
        *,
        job: Job,
        process: GaussianDiffusion,
        done: int = 0,
        batch_size: int = 64,
    ) -> None:
        require()
        self._names = config.eval_metrics.split(",")
        self._metrics = [METRICS[name] for name in self._names]
        self._extractor, self._job, self._process, self._batch_size = extractor, job, process, batch_size
        features = extractor(np.zeros((1, *job.shape[1:], 3), np.uint8))
        for name, metric in zip(self._names, self._metrics, strict=True):
            lacks = getattr(features, FIELDS[metric.field]) is None
            refuse((lacks, f"--eval_metrics {name} needs {WORDS[metric.field]}, and {extractor.name} gives none"))
        self._reference = self._prepare(config, stream)
        self._table: CSVOutputFormat | None = None
        if dist_util.rank() == 0:
            self._table = CSVOutputFormat(os.path.join(logger.get_dir(), TABLE), ("step", "samples"))
            self._table.rewind(done)
        self._warned = False

    def _prepare(self, config: TrainEvaluationConfig, stream: ImageStream) -> Side:
        """The features of the reference; those of training data are not cached, since a digest would read it all."""
        if config.eval_reference:
            images = open_images(config.eval_reference, None, stream.dataset.options.data_range)
        else:
            count = min(len(stream.dataset), max(REFERENCE_IMAGES, config.eval_samples))
            images = TrainingImages(stream.dataset, count)
        options: dict[str, Any] = {"batch_size": self._batch_size, "cache": bool(config.eval_reference)}
        side = prepare(images, self._extractor, needs=needs_of(self._metrics), progress=True, **options)
        for line in side.notes:
            logger.log(f"evaluation: {line}")
        dist_util.decide(lambda: self._check_reference(side))
        return side

    def _check_reference(self, side: Side) -> None:
        with as_user_error(f"{side.images.path} cannot be the reference: {WHY}", ValueError):
            for metric in self._metrics:
                lack = metric.lacks(side.features, side.features)
                refuse((metric.compares and lack, f"{lack}; give images, or leave that out of --eval_metrics"))
            rehearse(side.features, self._metrics, Options())

    def __call__(self, model: th.nn.Module, step: int) -> None:
        samples = FreshSamples(f"the samples of step {step}", self._process, model, self._job)
        options: dict[str, Any] = {"metrics": self._names, "cache": False, "batch_size": self._batch_size}
        report = evaluate(self._reference, samples, self._extractor, **options)
        dist_util.decide(lambda: self._record(step, report))

    def _record(self, step: int, report: Report) -> None:
        assert self._table is not None
        folder, results = logger.get_dir(), report.results
        self._table.writekvs({"step": step, "samples": self._job.num_samples, **results})
        for name, value in results.items():
            logger.logkv(f"eval_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}", value)
        rows = [row for row in read_rows(os.path.join(folder, TABLE)) if row["samples"] == self._job.num_samples]
        draw_progress(rows, list(results), os.path.join(folder, PICTURE))
        for line in [*report.warnings, *report.omitted] if not self._warned else []:
            logger.warn(f"evaluation: {line}")
        self._warned = True
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in results.items())
        leading = next((name for name in results if base(name) in LEADING), next(iter(results)))
        if top := best(rows, leading):
            numbers += f"; the best {leading} so far is {top[leading]:.4g}, at step {top['step']:.0f}"
        logger.log(f"evaluation at step {step}: {numbers}")
