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
from ..runtime.errors import UserError, as_user_errors
from ..runtime.files import reason, replacing
from ..runtime.paths import cache_folder
from .features import Extractor, Features
from .images import ImageSet
from .metrics import RunningStatistics, Statistics
from .scores import FeatureSet

# the fields of a FeatureSet, and the field of Features that each is made of
FIELDS = {"pool": "pool", "pool_statistics": "pool", "spatial_statistics": "spatial", "probs": "probs"}
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
    :raises ValueError: if an image cannot be read, or a feature is not finite.
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
    collectors: dict[str, RunningStatistics | _Rows] = {
        field: RunningStatistics() if field.endswith("_statistics") else _Rows(images.count)
        for field in (needs if first else ())
    }
    name = os.path.basename(images.path.rstrip("/"))
    with logger.progress_bar(shown=progress and first, total=images.count, desc=name, unit="image") as bar:
        for features in _in_order(images, extractor, batch_size):
            _check_finite(features, done, images, extractor)
            done += len(features.pool)
            given = {field: getattr(features, FIELDS[field]) for field in collectors}
            for field in (field for field, values in given.items() if values is not None):
                collectors[field].add(given[field])
            bar.update(len(features.pool))
    results: dict[str, Any] = {field: collector.result() for field, collector in collectors.items() if collector.n}
    return FeatureSet(images.count, **results)


class _Rows:
    """Rows of an array that come in batches."""

    def __init__(self, count: int) -> None:
        self.n = 0
        self._array, self._count = np.empty((0, 0), np.float32), count

    @as_user_errors()
    def add(self, rows: NDArray[np.float32]) -> None:
        if not self.n:
            self._array = np.empty((self._count, *rows.shape[1:]), np.float32)
        self._array[self.n : self.n + len(rows)] = rows
        self.n += len(rows)

    def result(self) -> NDArray[np.float32]:
        return self._array


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
    """:raises ValueError: naming an image whose features are not finite."""
    for values in features:
        finite = None if values is None else np.isfinite(values).all(axis=1)
        if finite is not None and not finite.all():
            raise UserError(
                f"{images.path}: image {start + int(finite.argmin())} has features by {extractor.name} that are not "
                "finite: the weights are damaged, or too large for the precision: give others, or --eval_precision fp32"
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
            with replacing(kept_path(images, extractor, field)) as file:
                np.savez(file, **arrays)
        except OSError as error:
            logger.warn(f"the features are not kept: {error}")
            return


def _kept(images: ImageSet, extractor: Extractor, needs: Collection[str]) -> dict[str, Any]:
    """The fields that an earlier run kept."""
    kept = {}
    for field in needs:
        path = kept_path(images, extractor, field)
        try:
            kept[field] = _read(path, images.count)
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged file leads zipfile to errors of many kinds
            logger.warn(f"the features kept in {path} cannot be used ({reason(error)}): they are computed again")
    return kept


def _read(path: str, count: int) -> Any:
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if set(arrays) == {"mean", "cov"}:
        return Statistics(count, arrays["mean"], arrays["cov"])
    if arrays and len(arrays["rows"]) != count:
        raise UserError(f"they are not those of {count} images")
    return arrays.get("rows")
