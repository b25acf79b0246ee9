"""Features of all images of a set, made by all ranks together, and kept from one run to the next.

What an image's features are made into is the same to the last bit for any number of ranks and any batch size.

Shapes: N images, n per batch, D pooled features, S spatial features, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import dist_util, logger
from ..runtime.files import parse_json, reason, replacing
from ..runtime.paths import cache_folder
from .features import Extractor, Features
from .images import ImageSet
from .metrics import RunningStatistics, Statistics
from .scores import FeatureSet

# the fields of a FeatureSet, and the columns of Features that they are made of
ROWS = {"pool": "pool", "probs": "probs"}
MEANS = {"pool_statistics": "pool", "spatial_statistics": "spatial"}
COLUMNS = {**ROWS, **MEANS}
FIELDS = ("pool", "pool_statistics", "spatial_statistics", "probs")
FORMAT = 1  # of the files that are kept: those of another number are not found

Array = NDArray[Any]


def feature_set(
    images: ImageSet,
    extractor: Extractor,
    *,
    needs: Collection[str] = FIELDS,
    batch_size: int = 64,
    cache: bool = True,
    progress: bool = False,
) -> FeatureSet:
    """The features of all images of a set; collective, and on ranks other than 0 an empty set.

    :param needs: the fields that are wanted; what the network has not got stays None.
    :param cache: take them from an earlier run, and keep them for later ones.
    :raises ValueError: if an image cannot be read, or a feature is not finite.
    """
    images.share_scan()
    path = kept_path(images, extractor)
    kept, asked = FeatureSet(images.count), frozenset[str]()
    if cache and dist_util.rank() == 0:
        kept, asked = _load(path, images.count, needs) or (kept, asked)
    found, wanted = dist_util.broadcast_object((asked >= set(needs) and bool(kept.origin), asked | set(needs)))
    if found:
        return kept
    features = collect(images, extractor, needs=wanted, batch_size=batch_size, progress=progress)
    if cache and dist_util.rank() == 0:
        _keep(path, features, wanted)
    return features


# ---- making them


def collect(
    images: ImageSet, extractor: Extractor, *, needs: Collection[str], batch_size: int, progress: bool = False
) -> FeatureSet:
    """As `feature_set`, always from the images."""
    first = dist_util.rank() == 0
    collected = _Collected(images.count, needs if first else ())
    name = os.path.basename(images.path.rstrip("/"))
    with logger.progress_bar(shown=progress and first, total=images.count, desc=name, unit="image") as bar:
        for features in _in_order(images, extractor, batch_size):
            _check_finite(features, collected.n, images, extractor)
            collected.add(features)
            bar.update(len(features.pool))
    return collected.result()


class _Collected:
    """The wanted fields of a `FeatureSet`, filled batch by batch; an array is taken when its first rows are there."""

    def __init__(self, count: int, needs: Collection[str]) -> None:
        self.n, self._count, self._needs = 0, count, needs
        self._rows: dict[str, Array] = {}
        self._means: dict[str, RunningStatistics] = {}

    def add(self, features: Features) -> None:
        """The next rows."""
        for field in self._needs:
            values: Array | None = getattr(features, COLUMNS[field])
            if values is not None and field in MEANS:
                self._means.setdefault(field, RunningStatistics()).add(values)
            elif values is not None:
                if field not in self._rows:
                    self._rows[field] = np.empty((self._count, *values.shape[1:]), np.float32)
                self._rows[field][self.n : self.n + len(values)] = values
        self.n += len(features.pool)

    def result(self) -> FeatureSet:
        """Of all rows."""
        found: dict[str, Any] = {**self._rows, **{field: mean.result() for field, mean in self._means.items()}}
        return FeatureSet(self._count, **found)


def _in_order(images: ImageSet, extractor: Extractor, batch_size: int) -> Iterator[Features]:
    """The features of batch after batch, on every rank: each makes every `world_size`-th of them."""
    world_size = dist_util.world_size()
    own = images.groups(batch_size, first=dist_util.rank(), step=world_size)
    for _ in range(math.ceil(images.count / (batch_size * world_size))):
        group = next(own, None)
        mine = None if group is None else _joined([extractor(run) for run in group])
        yield from filter(None, dist_util.gather_objects(mine))


def _joined(parts: Sequence[Features]) -> Features:
    """The features of images of different sizes together."""
    if len(parts) == 1:
        return parts[0]
    columns: Any = zip(*parts, strict=True)
    joined: list[Any] = [None if column[0] is None else np.concatenate(column) for column in columns]
    return Features(*joined)


def _check_finite(features: Features, start: int, images: ImageSet, extractor: Extractor) -> None:
    """:raises ValueError: naming an image whose features are not finite."""
    for values in features:
        finite = None if values is None else np.isfinite(values).all(axis=1)
        if finite is not None and not finite.all():
            raise ValueError(
                f"{images.path}: image {start + int(finite.argmin())} has features by {extractor.name} that are not "
                "finite: the weights are damaged, or too large for the precision: give others, or --eval_precision fp32"
            )


# ---- keeping them


def kept_path(images: ImageSet, extractor: Extractor) -> str:
    """Where the features of these very images by this very network are kept."""
    key = f"{FORMAT} {extractor.identity} {images.scanned.digest}"
    return os.path.join(cache_folder(), "features", f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz")


def _keep(path: str, features: FeatureSet, asked: Collection[str]) -> None:
    record = json.dumps({"n": features.n, "asked": sorted(asked)}).encode()
    arrays: dict[str, Any] = {"record": np.frombuffer(record, np.uint8)}
    for name in FIELDS:
        values = getattr(features, name)
        if isinstance(values, Statistics):
            arrays |= {f"{name}.mean": values.mean, f"{name}.cov": values.cov}
        elif values is not None:
            arrays[name] = values
    try:
        with replacing(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        logger.warn(f"the features are not kept: {error}")


def _load(path: str, count: int, needs: Collection[str]) -> tuple[FeatureSet, frozenset[str]] | None:
    """The fields of `needs` that are kept at a path, and all that was asked for; None if there is nothing of use."""
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name.partition(".")[0] in {"record", *needs}}
        record = parse_json(arrays["record"].tobytes())
        if record["n"] != count or any(len(arrays.get(name, range(count))) != count for name in ROWS):
            raise ValueError(f"they are not those of {count} images")
        found: dict[str, Any] = {name: arrays.get(name) for name in ROWS}
        for name in MEANS:
            if f"{name}.mean" in arrays:
                found[name] = Statistics(count, arrays[f"{name}.mean"], arrays[f"{name}.cov"])
        return FeatureSet(count, origin=path, **found), frozenset(record["asked"])
    except Exception as error:  # zipfile does not say what a damaged file leads it to
        logger.warn(f"the features kept in {path} cannot be used ({reason(error)}): they are computed again")
        return None
