"""Vectors that a network gets beside the image: their length in training, and those to sample for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from ..nn import traits_of
from ..runtime.errors import WHY, as_user_error, refuse
from ..runtime.files import read_file, refuse_missing
from ..runtime.npz import fingerprint
from .flags import Flags
from .sections import SampleConfig

if TYPE_CHECKING:
    from ..image_datasets import ImageStream
    from .common import Plan, Restored


def of_training(flags: Flags, *streams: ImageStream | None) -> Flags:
    """The flags with the length of the vectors of the images; refused where those of validation are of another one."""
    vectors = [stream.dataset.vectors for stream in streams if stream is not None]
    dims = {0 if each is None else each.shape[1] for each in vectors}
    refuse((len(dims) > 1, f"the vectors of --data_dir and --val_data_dir have {' and '.join(map(str, dims))} numbers"))
    return flags.with_values(vector_dim=dims.pop()) if flags.values.get("vector_columns") else flags


def extend(plan: Plan, model: Restored) -> None:
    """Make samples for vectors, which the images take in turn; without any all of their numbers are unknown."""
    values = model.flags.values
    dim, columns, before = values["vector_dim"], values["vector_columns"], plan.job.get("conditioning")
    if not dim:
        return
    config = model.flags.part(SampleConfig)
    rows = _rows(config, dim, columns)
    lacking = not rows and not traits_of(model.network).null_vector
    refuse((lacking, f"{model.path} was trained with vectors of {columns}: give --vector or --vectors"))
    table = np.array(rows or [[np.nan] * dim], np.float32)

    def conditioning(indices: Sequence[int]) -> dict[str, th.Tensor]:
        vectors = th.from_numpy(table[[index % len(table) for index in indices]])
        return {**(before(indices) if before else {}), "vector": vectors}

    plan.job["conditioning"] = conditioning
    plan.request["vectors"] = fingerprint({"vectors": table})


def _rows(config: SampleConfig, dim: int, columns: str) -> list[list[float]]:
    """The vectors of --vector or --vectors, [] where none are given."""
    name = f"--vectors {config.vectors}" if config.vectors else "--vector"
    if config.vectors:
        refuse_missing(config.vectors, name, "give a file with a vector on each line")
    lines = [part for part in config.vector.split(";") if part.strip()]
    with as_user_error(f"{name} is no list of numbers ({WHY}): write such as 1,0,0.5", OSError, ValueError):
        if config.vectors:
            lines = [line for line in read_file(config.vectors).decode("utf-8-sig").splitlines() if line.strip()]
        rows = [[float(word) for word in line.split(",")] for line in lines]
    for row in rows:
        odd = len(row) != dim or any(map(np.isinf, row))
        refuse((odd, f"{name} has the vector {row} and the network needs {dim} numbers, of {columns}"))
    return rows


def beside(dataset: Any, indices: Sequence[int]) -> dict[str, th.Tensor]:
    """The vectors of images of a data set, {} where it has none."""
    return {} if dataset.vectors is None else {"vector": th.from_numpy(dataset.vectors[list(indices)])}
