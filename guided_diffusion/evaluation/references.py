"""Features of sets of images, and references: statistics of all features and some of the images, in one npz.

All ranks compute features together, the same to the last bit for any number of ranks, and keep them for later runs.
The original's references hold the same arrays without a record of what the statistics are of.

Shapes: N images, n per batch, H W space, D pooled features, S spatial features, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import dist_util, logger
from ..runtime.errors import UserError, reason, refuse
from ..runtime.files import cache_folder
from ..runtime.npz import Npz, write_arrays
from ..runtime.options import Size, parse_size
from .features import Extractor, Features
from .metrics import RunningStatistics, Statistics
from .scores import RECORD, STATISTICS, FeatureSet

if TYPE_CHECKING:
    from .images import ImageSet

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
    """
    images.share_scan()
    kept = _kept(images, extractor, needs) if cache and dist_util.rank() == 0 else {}
    missing = dist_util.broadcast_object([field for field in needs if field not in kept])
    results = kept | (_collect(images, extractor, missing, batch_size, progress) if missing else {})
    if cache and dist_util.rank() == 0:
        _keep(images, extractor, {field: results.get(field) for field in missing})
    return FeatureSet(images.count, **results, kept=tuple(kept))


def _collect(
    images: ImageSet, extractor: Extractor, needs: Collection[str], batch_size: int, progress: bool
) -> dict[str, Any]:
    """The fields that the extractor gives, on rank 0."""
    first, done = dist_util.rank() == 0, 0
    running: dict[str, RunningStatistics] = defaultdict(RunningStatistics)
    rows: dict[str, list[NDArray[Any]]] = defaultdict(list)
    name = os.path.basename(images.path.rstrip("/"))
    with logger.progress_bar(shown=progress and first, total=images.count, desc=name, unit="image") as bar:
        for features in _in_order(images, extractor, batch_size):
            _check_finite(features, done, images, extractor)
            given = {field: getattr(features, FIELDS[field]) for field in (needs if first else ())}
            for field in (field for field, values in given.items() if values is not None):
                (running[field].add if field.endswith("_statistics") else rows[field].append)(given[field])
            done += len(features.pool)
            bar.update(len(features.pool))
    results: dict[str, Any] = {field: statistics.result() for field, statistics in running.items()}
    return results | {field: np.concatenate(parts) for field, parts in rows.items()}


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
        finite = np.isfinite(values).all(axis=1) if values is not None else np.ones(1, bool)
        fault = f"{images.path}: image {start + int(np.argmin(finite))} has features by {extractor.name} that are not"
        refuse((not finite.all(), f"{fault} finite: give other weights, or --eval_precision fp32"))


def kept_path(images: ImageSet, extractor: Extractor, field: str) -> str:
    """The file that keeps a field of the features of these images by this network."""
    key = f"{FORMAT} {extractor.identity} {images.scanned.digest}"
    return os.path.join(cache_folder(), "features", f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.{field}.npz")


def _keep(images: ImageSet, extractor: Extractor, computed: Mapping[str, Any]) -> None:
    try:
        for field, values in computed.items():
            arrays = {} if values is None else {"rows": values}  # none: the network does not give them
            if isinstance(values, Statistics):
                arrays = {"mean": values.mean, "cov": values.cov}
            write_arrays(kept_path(images, extractor, field), arrays)
    except OSError as error:
        logger.warn(f"the features are not kept: {error}")


def _kept(images: ImageSet, extractor: Extractor, needs: Collection[str]) -> dict[str, Any]:
    """The fields that an earlier run kept."""
    kept: dict[str, Any] = {}
    for field in needs:
        path = kept_path(images, extractor, field)
        if not os.path.exists(path):
            continue
        try:
            with Npz(path) as file:
                arrays = {name: file.whole(name) for name in file.names()}
            if field.endswith("_statistics") and arrays:
                kept[field] = Statistics(images.count, arrays["mean"], arrays["cov"])
            elif arrays and len(arrays["rows"]) != images.count:
                raise UserError(f"they are not those of {images.count} images")
            else:
                kept[field] = arrays.get("rows")
        except (OSError, ValueError, KeyError) as error:
            logger.warn(f"the features kept in {path} cannot be used ({reason(error)}): they are computed again")
    return kept


def write_reference(
    images: ImageSet,
    out: str,
    extractor: Extractor | None,
    *,
    size: Size,
    num_samples: int = 10_000,
    batch_size: int = 64,
) -> list[str]:
    """Write mu [D], sigma [D, D], mu_s [S], sigma_s [S, S] of all images, and arr_0 [n, H, W, 3] of some; collective.

    :param images: opened with the same `size`.
    :param extractor: None for no statistics.
    :param num_samples: images to keep, evenly over all; 0 for all of them.
    :return: sentences that say what was written.
    """
    refuse((not images.count, f"{images.path} holds statistics and no images: a reference is made of images"))
    images.share_scan()
    if images.shape is not None and images.shape[:2] != parse_size(size):
        height, width, _ = images.shape
        raise UserError(
            f"{images.path} holds images of {height}x{width}, and those of an npz are not scaled: give --image_size "
            f"{height}x{width}, or a folder or zip of images"
        )
    kept = images.count if not num_samples else min(num_samples, images.count)
    indices = np.arange(kept) * images.count // kept
    arrays: dict[str, Any] = {"arr_0": ((kept, *parse_size(size), 3), np.uint8, images.take(indices))}
    if images.labels is not None:
        arrays["arr_1"] = images.labels[indices]
    about = ""
    if extractor is not None:
        arrays |= _statistics_of(images, extractor, batch_size)
        about = f", mean and covariance of the features of {images.count} by {extractor.name}"
    dist_util.decide(lambda: write_arrays(out, arrays))
    return [*images.notes, *(f"warning: {text}" for text in images.warnings()), f"{out}: {kept} images{about}"]


def _statistics_of(images: ImageSet, extractor: Extractor, batch_size: int) -> dict[str, NDArray[Any]]:
    needs = ("pool_statistics", "spatial_statistics")
    features = feature_set(images, extractor, needs=needs, batch_size=batch_size, cache=False, progress=True)
    statistics = {kind: getattr(features, f"{kind}_statistics") for kind in STATISTICS}
    record = {"extractor": extractor.name, "identity": extractor.identity, "n": images.count}
    return statistics_arrays({kind: value for kind, value in statistics.items() if value is not None}, record)


def statistics_arrays(statistics: Mapping[str, Statistics], record: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of a reference: of "pool" and "spatial" features, and the record of what they are of."""
    arrays: dict[str, NDArray[Any]] = {}
    for kind, value in statistics.items():
        arrays |= dict(zip(STATISTICS[kind], (value.mean, value.cov), strict=True))
    return {**arrays, RECORD: record_bytes(record)}


def record_bytes(record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """A record as the array that is stored."""
    return np.frombuffer(json.dumps(dict(record)).encode(), np.uint8)
