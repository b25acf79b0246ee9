"""Features of all images of a set, computed by all ranks together and kept from one run to the next.

They are the same to the last bit for any number of ranks.

Shapes: N images, n per batch, D pooled features, S spatial features, K classes.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import dist_util, logger
from ..runtime.errors import UserError
from ..runtime.files import reason
from ..runtime.npz import Npz, write_arrays
from ..runtime.paths import cache_folder
from .features import Extractor, Features
from .images import ImageSet
from .metrics import RunningStatistics, Statistics
from .scores import FeatureSet

# the fields of a FeatureSet, and the field of Features that each is made of
FIELDS = {"pool": "pool", "pool_statistics": "pool", "spatial_statistics": "spatial", "probs": "probs"}
ROWS = 2**14  # that are read at a time
FORMAT = 2  # of the files that are kept: those of another number are not found


def feature_set(
    images: ImageSet,
    extractor: Extractor,
    *,
    needs: Collection[str] = tuple(FIELDS),
    batch_size: int = 64,
    cache: bool = True,
    progress: bool = False,
) -> FeatureSet:
    """The features of all images of a set, None for those that the extractor does not give.

    Collective; on ranks other than 0 they are empty.

    :param needs: the fields to compute.
    :param cache: take them from an earlier run, and keep them for later ones.
    """
    images.share_scan()
    kept = _kept(images, extractor, needs) if cache and dist_util.rank() == 0 else {}
    missing = dist_util.broadcast_object([field for field in needs if field not in kept])
    computed: dict[str, Any] = {}
    if missing:
        features = collect(images, extractor, needs=missing, batch_size=batch_size, progress=progress)
        computed = {field: getattr(features, field) for field in missing}
    if cache and dist_util.rank() == 0:
        _keep(images, extractor, computed)
    return FeatureSet(images.count, **computed, **kept, kept=tuple(kept))


# ---- computing


def collect(
    images: ImageSet, extractor: Extractor, *, needs: Collection[str], batch_size: int, progress: bool = False
) -> FeatureSet:
    """As `feature_set`, always from the images."""
    first, done = dist_util.rank() == 0, 0
    fields = needs if first else ()
    running = {field: RunningStatistics() for field in fields if field.endswith("_statistics")}
    rows: dict[str, list[NDArray[Any]]] = {field: [] for field in fields if field not in running}
    name = os.path.basename(images.path.rstrip("/"))
    with logger.progress_bar(shown=progress and first, total=images.count, desc=name, unit="image") as bar:
        for features in _in_order(images, extractor, batch_size):
            _check_finite(features, done, images, extractor)
            done += len(features.pool)
            given = {field: x for field in fields if (x := getattr(features, FIELDS[field])) is not None}
            for field, values in given.items():
                (running[field].add if field in running else rows[field].append)(values)
            bar.update(len(features.pool))
    results: dict[str, Any] = {field: statistics.result() for field, statistics in running.items() if statistics.n}
    results |= {field: np.concatenate(parts) for field, parts in rows.items() if parts}
    return FeatureSet(images.count, **results)


def _in_order(images: ImageSet, extractor: Extractor, batch_size: int) -> Iterator[Features]:
    """The features of batch after batch, on every rank; each rank computes every `world_size`-th of them."""
    world_size = dist_util.world_size()
    groups = images.groups(batch_size, first=dist_util.rank(), step=world_size)
    for _ in range(math.ceil(images.count / (batch_size * world_size))):
        group = next(groups, None)
        features = None
        if group is not None:  # one run of images of each size
            columns: Any = zip(*map(extractor, group), strict=True)
            joined: Any = (None if column[0] is None else np.concatenate(column) for column in columns)
            features = Features(*joined)
        yield from filter(None, dist_util.gather_objects(features))


def _check_finite(features: Features, start: int, images: ImageSet, extractor: Extractor) -> None:
    for values in features:
        finite = None if values is None else np.isfinite(values).all(axis=1)
        if finite is not None and not finite.all():
            raise UserError(
                f"{images.path}: image {start + int(finite.argmin())} has features by {extractor.name} that are not "
                "finite: give other weights, or --eval_precision fp32"
            )


# ---- keeping


def kept_path(images: ImageSet, extractor: Extractor, field: str) -> str:
    """The file that keeps a field of the features of these images by this network."""
    key = f"{FORMAT} {extractor.identity} {images.scanned.digest}"
    return os.path.join(cache_folder(), "features", f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.{field}.npz")


def _keep(images: ImageSet, extractor: Extractor, computed: dict[str, Any]) -> None:
    for field, values in computed.items():
        arrays: dict[str, Any] = {} if values is None else {"rows": values}  # none: the network does not give them
        if isinstance(values, Statistics):
            arrays = {"mean": values.mean, "cov": values.cov}
        try:
            write_arrays(
                kept_path(images, extractor, field), {name: (x.shape, x.dtype, [x]) for name, x in arrays.items()}
            )
        except OSError as error:
            logger.warn(f"the features are not kept: {error}")
            return


def _kept(images: ImageSet, extractor: Extractor, needs: Collection[str]) -> dict[str, Any]:
    """The fields that an earlier run kept."""
    paths = {field: kept_path(images, extractor, field) for field in needs}
    kept: dict[str, Any] = {}
    for field, path in paths.items():
        try:
            if os.path.exists(path):
                kept[field] = _read(path, images.count)
        except (OSError, ValueError) as error:
            logger.warn(f"the features kept in {path} cannot be used ({reason(error)}): they are computed again")
    return kept


def _read(path: str, count: int) -> Any:
    with Npz(path) as file:
        arrays = {name: np.concatenate(list(file.chunks(name, ROWS))) for name in file.names()}
    if set(arrays) == {"mean", "cov"}:
        return Statistics(count, **arrays)
    if arrays and (set(arrays) != {"rows"} or len(arrays["rows"]) != count):
        raise UserError(f"they are not those of {count} images")
    return arrays.get("rows")
