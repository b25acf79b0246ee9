"""Measuring images in batches: shared out among ranks, restartable, each image once, merged into a few files.

Shapes: N images in all, B per batch, T steps of the process, K columns of numbers per image.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th

from .. import dist_util, logger
from ..diffusion.methods import Kwargs, Model
from ..gaussian_diffusion import GaussianDiffusion
from ..image_datasets import ImageDataset
from ..runtime.files import PART, quoted, replacing, write_json
from ..runtime.npz import holds, read_npz, save_npz, write_npz
from ..runtime.results import REQUEST, read_request, refuse_another
from ..runtime.seeds import image_generator
from ..sampling.loop import drawer
from .flow_likelihood import FlowOptions, calc_flow_bpd

BPD_FILE, TABLE, SUMMARY = "bpd.npz", "images.csv", "bpd.json"
Rows = npt.NDArray[np.float64]

Bits = Callable[[th.Tensor, Kwargs, list[th.Generator]], Mapping[str, th.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A kind of likelihood.

    :param bits: (images [B, C, H, W], the network's keyword arguments, a generator per image) -> what is measured.
    :param columns: the names of it that are one number per image, total_bpd and prior_bpd first.
    :param terms: the names of it that are [B, T].
    :param steps: T.
    """

    bits: Bits
    columns: tuple[str, ...]
    terms: tuple[str, ...] = ()
    steps: int = 0


def variational_bound(process: GaussianDiffusion, model: Model, *, clip_denoised: bool = True) -> Measure:
    """The variational bound (Ho et al. 2020, eq. 5), term by term, the noisiest t first."""

    def bits(images: th.Tensor, kwargs: Kwargs, generators: list[th.Generator]) -> dict[str, th.Tensor]:
        draw = drawer(partial(th.randn, dtype=images.dtype), images.shape, images.device, generators)
        return process.calc_bpd_loop(model, images, clip_denoised, kwargs, draw=draw)

    terms = ("vb", "mse", "xstart_mse")
    return Measure(bits=bits, columns=("total_bpd", "prior_bpd"), terms=terms, steps=process.num_timesteps)


def probability_flow(
    process: GaussianDiffusion, model: Model, *, clip_denoised: bool = True, options: FlowOptions
) -> Measure:
    """The likelihood of the probability flow."""

    def bits(images: th.Tensor, kwargs: Kwargs, generators: list[th.Generator]) -> dict[str, th.Tensor]:
        return calc_flow_bpd(process, model, images, clip_denoised, kwargs, options=options, generator=generators)

    return Measure(bits=bits, columns=("total_bpd", "prior_bpd", "volume_bpd", "data_bpd", "evaluations"))


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Which images are measured, how, and where it goes.

    :param dataset: of images as they are, neither mirrored nor cropped at random.
    :param indices: of the images in it; the noise of an image depends on the seed and this index alone.
    :param names: what the table calls them.
    :param request: what else the numbers depend on (weights, flags, ...), as JSON values.
    :param request_defaults: values that an older request, which does not name them, had.
    :param save_terms: keep the terms of each image, not their means alone.
    """

    measure: Measure
    dataset: ImageDataset
    indices: Sequence[int]
    names: Sequence[str]
    batch_size: int
    out_dir: str
    seed: int = 0
    request: Mapping[str, Any] = field(default_factory=dict)
    request_defaults: Mapping[str, Any] = field(default_factory=dict)
    save_terms: bool = False

    @property
    def batches(self) -> int:
        """Number of batches; the last one may be smaller."""
        return math.ceil(len(self.indices) / self.batch_size)

    def batch(self, number: int) -> Sequence[int]:
        """Indices of the images of one batch."""
        return self.indices[number * self.batch_size : (number + 1) * self.batch_size]

    def file(self, *names: str) -> str:
        """The path of a file of this survey."""
        return os.path.join(self.out_dir, *names)

    def shard(self, number: int) -> str:
        """Where one batch goes until all are merged."""
        return self.file("shards", f"{number:06d}.npz")

    def has(self, number: int) -> bool:
        """Whether the shard of a batch is there and whole."""
        count = len(self.batch(number))
        terms = [((count, self.measure.steps), np.float32) for _ in self.measure.terms]
        return holds(self.shard(number), ((count, len(self.measure.columns)), np.float64), *terms)

    @property
    def finished(self) -> bool:
        """Whether the result is there: its last file is."""
        return holds(self.file(BPD_FILE), *[((len(self.indices),), np.float64)] * 2)


def carry_out(survey: Survey) -> str:
    """Measure what is not measured yet, and write and say the result; every rank calls this. Returns a sentence.

    :raises ValueError: if the folder holds the likelihoods of another request, or an image cannot be read.
    """
    if not dist_util.decide(lambda: _claim(survey)):
        measure_batches(survey, rank=dist_util.rank(), world_size=dist_util.world_size())
        dist_util.barrier()
        dist_util.decide(lambda: merge(survey))
    sentence = dist_util.decide(lambda: _sentence(survey))
    logger.log(sentence)
    if dist_util.rank() == 0:
        _tidy(survey)
    dist_util.barrier()
    return sentence


def _claim(survey: Survey) -> bool:
    """Make the folder this survey's; True where its result is there already."""
    path, what = survey.file(REQUEST), "likelihoods"
    request = _request(survey)
    if os.path.exists(path):
        was, usual = read_request(path, what=what), survey.request_defaults
        refuse_another(was, request, survey.out_dir, what=what, defaults=usual)
        return survey.finished
    taken = [name for name in (BPD_FILE, TABLE, SUMMARY, "shards") if os.path.exists(survey.file(name))]
    if taken:
        raise ValueError(
            f"{survey.file(taken[0])} exists and no {REQUEST} says what it is: give another --log_dir or remove it"
        )
    write_json(path, request)
    return False


def _request(survey: Survey) -> dict[str, Any]:
    """Everything that the result depends on, as JSON values."""
    names = hashlib.sha256("\0".join(survey.names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    own = {"num_samples": len(survey.indices), "batch_size": survey.batch_size, "seed": survey.seed, "names": names}
    where = {"save_terms": survey.save_terms, "device": dist_util.dev().type}
    request: dict[str, Any] = json.loads(json.dumps({**survey.request, **own, **where}))
    return request


# ---- batches


def measure_batches(survey: Survey, *, rank: int = 0, world_size: int = 1) -> None:
    """Measure and write the batches of one rank: batch b is rank b % world_size's. Those that are there stay."""
    own = range(rank, survey.batches, world_size)
    missing = [number for number in own if not survey.has(number)]
    if len(missing) < len(own):
        logger.log(f"going on where an earlier run stopped: {len(own) - len(missing)} of {len(own)} batches are there")
    for number in logger.progress_bar(shown=rank == 0, iterable=missing, desc="measuring", unit="batch"):
        save_npz(survey.shard(number), *_measured(survey, number))


def _measured(survey: Survey, number: int) -> list[npt.NDArray[Any]]:
    """The columns [B, K] and the terms [B, T] of one batch.

    :raises ValueError: if a likelihood is not finite.
    """
    indices, device, measure = survey.batch(number), dist_util.dev(), survey.measure
    images, labels = zip(*[survey.dataset[index] for index in indices], strict=True)
    kwargs = {name: th.tensor(np.stack([label[name] for label in labels]), device=device) for name in labels[0]}
    generators = [image_generator(survey.seed, index, device) for index in indices]
    out = measure.bits(th.tensor(np.stack(images), device=device), kwargs, generators)
    columns = th.stack([out[name].cpu().double() for name in measure.columns], dim=1)
    rows = (~columns.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if rows:
        first = quoted(survey.names[number * survey.batch_size + rows[0]])
        raise ValueError(
            f"{len(rows)} of the {len(indices)} images of batch {number} have no finite likelihood, the first is "
            f"{first}, and no result is written: do the diffusion flags fit those of the training? Else give "
            "--precision fp32 and another --log_dir"
        )
    return [columns.numpy(), *(out[name].cpu().float().numpy() for name in measure.terms)]


# ---- the result


def merge(survey: Survey) -> None:
    """Write the result from the shards; bpd.npz comes last, and says that all is there.

    :raises ValueError: if a shard is missing or damaged.
    """
    missing = [number for number in range(survey.batches) if not survey.has(number)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {survey.batches} batches are missing in {survey.file('shards')}, the first is "
            f"{missing[0]}: all ranks must write to the same folder"
        )
    rows: Rows = np.concatenate(list(_column(survey, 0)))
    for number, name in enumerate(survey.measure.terms, start=1):
        _write_terms(survey, name, number)
    _write_table(survey, rows)
    write_json(survey.file(SUMMARY), summary(survey, rows))
    save_npz(survey.file(BPD_FILE), rows[:, 0].copy(), rows[:, 1].copy())


def _column(survey: Survey, array: int) -> Iterator[npt.NDArray[Any]]:
    """One array of the shards, batch by batch."""
    for number in range(survey.batches):
        path = survey.shard(number)
        try:
            yield from read_npz(path, f"arr_{array}", survey.batch_size)
        except ValueError as error:
            os.remove(path)
            raise ValueError(
                f"{path} was damaged after it was written ({error}): it is removed, run the same command again"
            ) from error


def _write_terms(survey: Survey, name: str, array: int) -> None:
    """NAME_terms.npz: the means over the images [T], and on request what they are the means of [N, T]."""
    steps, count = survey.measure.steps, len(survey.indices)
    total = sum((part.sum(axis=0, dtype=np.float64) for part in _column(survey, array)), np.zeros(steps))
    each = [((count, steps), np.float32, _column(survey, array))] if survey.save_terms else []
    write_npz(survey.file(f"{name}_terms.npz"), ((steps,), np.float64, [total / count]), *each)


def _write_table(survey: Survey, rows: Rows) -> None:
    """images.csv: the file of each image and what was measured of it."""
    with replacing(survey.file(TABLE)) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", *survey.measure.columns])
        writer.writerows([name, *map(repr, row)] for name, row in zip(survey.names, rows.tolist(), strict=True))
        text.detach()


def summary(survey: Survey, rows: Rows) -> dict[str, Any]:
    """The means over the images with their standard errors (None for a single image), and what they are of."""
    error = rows.std(axis=0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else [math.nan] * rows.shape[1]
    columns = survey.measure.columns
    means = dict(zip(columns, map(_number, rows.mean(axis=0)), strict=True))
    errors = dict(zip(columns, map(_number, error), strict=True))
    return {"images": len(rows), "mean": means, "standard_error": errors, "request": _request(survey)}


def _number(value: float) -> float | None:
    """A number as JSON has it."""
    return float(value) if math.isfinite(value) else None


def _sentence(survey: Survey) -> str:
    """The mean, as it stands in the finished files."""
    (total,) = read_npz(survey.file(BPD_FILE), "arr_0", len(survey.indices))
    error = f" +- {np.std(total, ddof=1) / math.sqrt(len(total)):.4f}" if len(total) > 1 else ""
    return (
        f"{len(total)} images: {total.mean():.4f}{error} bits per dimension (mean and standard error); "
        f"in {survey.out_dir}"
    )


def _tidy(survey: Survey) -> None:
    """Remove the shards, and what runs that were killed left half written."""
    shutil.rmtree(survey.file("shards"), ignore_errors=True)
    ours = (BPD_FILE, TABLE, SUMMARY, REQUEST, *(f"{name}_terms.npz" for name in survey.measure.terms))
    for name in os.listdir(survey.out_dir):
        stem, part, _ = name.partition(PART)
        if part and stem in ours:
            os.remove(survey.file(name))
