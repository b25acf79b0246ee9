"""Likelihoods of images measured in batches: shared out among ranks, restartable, merged into a few files.

Shapes: N images in all, B per batch, T steps of the process, K columns of numbers per image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch as th

from .. import dist_util, logger
from ..config import FlowConfig
from ..diffusion.methods import Kwargs, Model
from ..runtime.atomic import replacing
from ..runtime.errors import quoted, refuse
from ..runtime.files import write_json
from ..runtime.jobs import RestartableJob
from ..runtime.log_writers import csv_text
from ..runtime.npz import holds, read_npz, save_npz
from ..runtime.seeds import image_generator
from ..sampling.loop import drawer
from .flow_likelihood import calc_flow_bpd

if TYPE_CHECKING:
    from ..gaussian_diffusion import GaussianDiffusion
    from ..image_datasets import ImageDataset

# of the terms the means over the images [T], and on request those of each [N, T]
BPD_FILE, TABLE, SUMMARY, TERMS = "bpd.npz", "images.csv", "bpd.json", "{}_terms.npz"
Rows = npt.NDArray[np.float64]

Bits = Callable[[th.Tensor, Kwargs, list[th.Generator]], Mapping[str, th.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A kind of likelihood.

    :param bits: (images [B, C, H, W], the network's keyword arguments, a generator per image) -> tensors by name.
    :param columns: the names of those with one number per image, total_bpd and prior_bpd first.
    :param terms: the names of those that are [B, T].
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
    process: GaussianDiffusion, model: Model, *, clip_denoised: bool = True, options: FlowConfig
) -> Measure:
    """The likelihood of the probability flow."""

    def bits(images: th.Tensor, kwargs: Kwargs, generators: list[th.Generator]) -> dict[str, th.Tensor]:
        return calc_flow_bpd(process, model, images, clip_denoised, kwargs, options=options, generator=generators)

    return Measure(bits=bits, columns=("total_bpd", "prior_bpd", "volume_bpd", "data_bpd", "evaluations"))


@dataclass(frozen=True, kw_only=True)
class Survey(RestartableJob):
    """Images that are measured, and how.

    :param dataset: of images as they are, neither mirrored nor cropped at random.
    :param indices: of the images in it; the noise of an image depends on the seed and this index alone.
    :param names: of the images, in the table.
    :param save_terms: keep the terms of each image, not their means alone.
    """

    measure: Measure
    dataset: ImageDataset
    indices: Sequence[int]
    names: Sequence[str]
    save_terms: bool = False

    what: ClassVar[str] = "likelihoods"

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.indices)

    @property
    def arrays(self) -> list[tuple[tuple[int, ...], Any]]:
        """The columns and each kind of terms."""
        measure = self.measure
        return [((len(measure.columns),), np.float64), *(((measure.steps,), np.float32) for _ in measure.terms)]


def carry_out(survey: Survey) -> str:
    """Measure the rest of the images, write the result and log it; every rank calls this. Returns the line.

    :raises ValueError: if the folder holds the likelihoods of another request, or an image cannot be read.
    """
    results, request = (BPD_FILE, TABLE, SUMMARY), _request(survey)
    whole = partial(holds, survey.file(BPD_FILE), *[((survey.size,), np.float64)] * 2)
    if not dist_util.decide(lambda: survey.claim(request, [*results, "shards"]) and whole()):
        measure_batches(survey, rank=dist_util.rank(), world_size=dist_util.world_size())
        dist_util.barrier()
        dist_util.decide(lambda: merge(survey))
    sentence = dist_util.decide(lambda: _sentence(survey))
    logger.log(sentence)
    if dist_util.rank() == 0:
        survey.tidy(*results, *map(TERMS.format, survey.measure.terms))
    dist_util.barrier()
    return sentence


def _request(survey: Survey) -> dict[str, Any]:
    """Everything that the result depends on, as JSON values."""
    names = hashlib.sha256("\0".join(survey.names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return {
        **survey.request,
        "num_samples": survey.size,
        "batch_size": survey.batch_size,
        "seed": survey.seed,
        "names": names,
        "save_terms": survey.save_terms,
        "device": dist_util.dev().type,
    }


def measure_batches(survey: Survey, *, rank: int = 0, world_size: int = 1) -> None:
    """Measure and write the batches of one rank: batch b is rank b % world_size's. Those that are there stay."""
    missing = survey.missing(rank, world_size, log=logger.log)
    for batch in logger.progress_bar(shown=rank == 0, iterable=missing, desc="measuring", unit="batch"):
        save_npz(survey.shard(batch), *measured(survey, batch))


def measured(survey: Survey, batch: int) -> list[npt.NDArray[Any]]:
    """The columns [B, K] and the terms [B, T] of one batch."""
    rows, device, measure = survey.rows(batch), dist_util.dev(), survey.measure
    indices = [survey.indices[row] for row in rows]
    images, labels = zip(*[survey.dataset[index] for index in indices], strict=True)
    kwargs = {name: th.tensor(np.stack([label[name] for label in labels]), device=device) for name in labels[0]}
    generators = [image_generator(survey.seed, index, device) for index in indices]
    out = measure.bits(th.tensor(np.stack(images), device=device), kwargs, generators)
    columns = th.stack([out[name].cpu().double() for name in measure.columns], dim=1)
    broken = (~columns.isfinite().all(dim=1)).nonzero().flatten().tolist()
    fault = f"{len(broken)} of the {len(rows)} images of batch {batch} have no finite likelihood"
    first = "".join(quoted(survey.names[rows[row]]) for row in broken[:1])
    refuse((broken, f"{fault}, the first is {first}: look at the diffusion flags and --precision"))
    return [columns.numpy(), *(out[name].cpu().float().numpy() for name in measure.terms)]


def merge(survey: Survey) -> None:
    """Write the result from the shards; bpd.npz comes last, and says that all is there."""
    survey.check_complete()
    rows: Rows = np.concatenate(list(survey.column(0)))
    for array, name in enumerate(survey.measure.terms, start=1):
        start = np.zeros(survey.measure.steps)
        total = sum((part.sum(axis=0, dtype=np.float64) for part in survey.column(array)), start)
        each = [survey.merged()[array]] if survey.save_terms else []
        save_npz(survey.file(TERMS.format(name)), (total.shape, np.float64, [total / survey.size]), *each)
    with replacing(survey.file(TABLE)) as file:
        lines = ([name, *map(repr, row)] for name, row in zip(survey.names, rows.tolist(), strict=True))
        text = csv_text([["image", *survey.measure.columns], *lines])
        file.write(text.encode("utf-8", "surrogateescape"))
    write_json(survey.file(SUMMARY), summary(survey, rows))
    save_npz(survey.file(BPD_FILE), rows[:, 0].copy(), rows[:, 1].copy())


def summary(survey: Survey, rows: Rows) -> dict[str, Any]:
    """The means over the images with their standard errors (None for a single image), and the request."""

    def named(values: Rows | list[float]) -> dict[str, float | None]:
        numbers = [float(value) if math.isfinite(value) else None for value in values]
        return dict(zip(survey.measure.columns, numbers, strict=True))

    errors = rows.std(axis=0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else [math.nan] * rows.shape[1]
    return {
        "images": len(rows),
        "mean": named(rows.mean(axis=0)),
        "standard_error": named(errors),
        "request": _request(survey),
    }


def _sentence(survey: Survey) -> str:
    """The mean, as it stands in the finished files."""
    (total,) = read_npz(survey.file(BPD_FILE), "arr_0", survey.size)
    error = f" +- {np.std(total, ddof=1) / math.sqrt(len(total)):.4f}" if len(total) > 1 else ""
    bits = f"{total.mean():.4f}{error} bits per dimension (mean and standard error)"
    return f"{len(total)} images: {bits}; in {survey.out_dir}"
