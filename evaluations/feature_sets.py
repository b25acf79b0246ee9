"""Features of all images of a source, made by all ranks together, and kept from one run to the next.

What an image's features are made into is the same to the last bit for any number of ranks and any batch size.

Shapes: N images, n per batch, D pooled features, S spatial features, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluations.features import Extractor, Features
from evaluations.metrics import RunningStatistics, Statistics
from evaluations.scores import FeatureSet
from evaluations.sources import ImageSource
from guided_diffusion import dist_util, logger
from guided_diffusion.downloads import cache_folder
from guided_diffusion.npz import Npz, Rows, write_arrays
from guided_diffusion.untrusted import parse_json, reason

# the fields of a FeatureSet, and the columns of Features that they are made of
COLUMNS = {"pool": "pool", "pool_statistics": "pool", "spatial_statistics": "spatial", "probs": "probs"}
FIELDS = tuple(COLUMNS)
FORMAT = 1  # of the files that are kept: those of another number are not found
PIECE = 4096  # rows read at a time

Array = NDArray[Any]


@dataclass(frozen=True)
class Made:
    """A set of features, and whether it is of an earlier run.

    :param kept: where it was kept; '' for one that is new.
    """

    features: FeatureSet
    kept: str = ""


def feature_set(
    source: ImageSource,
    extractor: Extractor,
    *,
    needs: Collection[str] = FIELDS,
    batch_size: int = 64,
    cache: bool = True,
    progress: bool = False,
) -> FeatureSet:
    """The features of all images of a source; collective, and on ranks other than 0 an empty set.

    :param needs: the fields of the set that are wanted; what the network has not got stays None.
    :param cache: take them from an earlier run, and keep them for later ones.
    :raises ValueError: if an image cannot be read, or a feature is not finite.
    """
    return make(source, extractor, needs=needs, batch_size=batch_size, cache=cache, progress=progress).features


def make(
    source: ImageSource,
    extractor: Extractor,
    *,
    needs: Collection[str] = FIELDS,
    batch_size: int = 64,
    cache: bool = True,
    progress: bool = False,
) -> Made:
    """What `feature_set` gives, and where it is from."""
    source.adopt(dist_util.decide(lambda: source.seen))
    path = kept_path(source, extractor)
    kept = _load(path, source.count, needs) if cache and dist_util.rank() == 0 else None
    asked = frozenset() if kept is None else kept.asked
    asked, enough = dist_util.broadcast_object((asked | set(needs), kept is not None and asked >= set(needs)))
    if enough:
        return Made(FeatureSet(source.count) if kept is None else kept.features, path)
    features = collect(source, extractor, needs=asked, batch_size=batch_size, progress=progress)
    if cache and dist_util.rank() == 0:
        _keep(path, features, asked)
    return Made(features)


# ---- making them


def collect(
    source: ImageSource, extractor: Extractor, *, needs: Collection[str], batch_size: int, progress: bool = False
) -> FeatureSet:
    """As `feature_set`, always from the images."""
    first = dist_util.rank() == 0
    takers = {name: TAKERS[name](source.count) for name in needs if first}
    name = os.path.basename(source.path.rstrip("/"))
    with logger.progress_bar(shown=progress and first, total=source.count, desc=name, unit="image") as bar:
        for features in _in_order(source, extractor, batch_size):
            bar.update(len(features.pool))
            for part, taker in takers.items():
                taker.add(getattr(features, COLUMNS[part]))
    found: dict[str, Any] = {part: taker.result() for part, taker in takers.items()}
    return FeatureSet(source.count, **found)


class _Rows:
    """All rows in one array, which is taken when the first of them are there; None for what there is not."""

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._array: Array | None = None

    def add(self, rows: Array | None) -> None:
        """The next rows."""
        if rows is None:
            return
        if self._array is None:
            self._array = np.empty((self._count, *rows.shape[1:]), np.float32)
        self._array[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def result(self) -> Array | None:
        """All of them."""
        return self._array


class _Running:
    """Statistics of all rows; None for what there is not."""

    def __init__(self, count: int) -> None:
        self._running: RunningStatistics | None = None

    def add(self, rows: Array | None) -> None:
        """The next rows."""
        if rows is not None:
            self._running = self._running or RunningStatistics()
            self._running.add(rows)

    def result(self) -> Statistics | None:
        """Of all of them."""
        return None if self._running is None else self._running.result()


TAKERS: dict[str, type[_Rows | _Running]] = {
    "pool": _Rows,
    "pool_statistics": _Running,
    "spatial_statistics": _Running,
    "probs": _Rows,
}


def _in_order(source: ImageSource, extractor: Extractor, batch_size: int) -> Iterator[Features]:
    """The features of batch after batch, on every rank: each makes every `world_size`-th of them."""
    world_size, done = dist_util.world_size(), 0
    own = source.groups(batch_size, first=dist_util.rank(), step=world_size)
    for _ in range(math.ceil(source.count / (batch_size * world_size))):
        group = next(own, None)
        mine = None if group is None else _joined([extractor(images) for images in group])
        for features in dist_util.gather_objects(mine):
            if features is not None:
                _check(features, done, source, extractor)
                done += len(features.pool)
                yield features


def _joined(parts: Sequence[Features]) -> Features:
    """The features of images of different sizes together."""
    if len(parts) == 1:
        return parts[0]
    columns = [[getattr(part, name) for part in parts] for name in ("spatial", "probs")]
    others = [None if column[0] is None else np.concatenate(column) for column in columns]
    return Features(np.concatenate([part.pool for part in parts]), *others)


def _check(features: Features, start: int, source: ImageSource, extractor: Extractor) -> None:
    """Refuse features that are no numbers.

    :raises ValueError: naming the image.
    """
    for values in features:
        whole = None if values is None else np.isfinite(values).all(axis=1)
        if whole is not None and not whole.all():
            raise ValueError(
                f"{source.path}: image {start + int(whole.argmin())} has features by {extractor.name} that are not "
                "finite: the weights are damaged, or too large for the precision: give others, or --eval_precision fp32"
            )


# ---- keeping them


@dataclass(frozen=True)
class _Kept:
    features: FeatureSet
    asked: frozenset[str]


def kept_path(source: ImageSource, extractor: Extractor) -> str:
    """Where the features of these very images by this very network are kept."""
    key = f"{FORMAT} {extractor.identity} {source.digest()}"
    return os.path.join(cache_folder(), "features", f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz")


def _keep(path: str, features: FeatureSet, asked: Collection[str]) -> None:
    arrays = {"record": np.frombuffer(json.dumps({"n": features.n, "asked": sorted(asked)}).encode(), np.uint8)}
    for name in ("pool", "probs"):
        values = getattr(features, name)
        arrays |= {} if values is None else {name: values}
    for name in ("pool_statistics", "spatial_statistics"):
        values = getattr(features, name)
        arrays |= {} if values is None else {f"{name}.mean": values.mean, f"{name}.cov": values.cov}
    rows: dict[str, Rows] = {name: (array.shape, array.dtype, [array]) for name, array in arrays.items()}
    try:
        write_arrays(path, rows)
    except OSError as error:
        logger.warn(f"the features are not kept: {error}")


def _load(path: str, count: int, needs: Collection[str]) -> _Kept | None:
    """What is kept at a path of these fields, if it is there, whole and of so many images."""
    if not os.path.exists(path):
        return None
    try:
        with Npz(path) as archive:
            wanted = [name for name in archive.names() if name.partition(".")[0] in {"record", *needs}]
            return _unpack({name: _whole(archive, name) for name in wanted}, count)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warn(f"the features kept in {path} cannot be used ({reason(error)}): they are computed again")
        return None


def _whole(archive: Npz, name: str) -> Array:
    header = archive.header(name)
    array, start = np.empty(header.shape, header.dtype), 0
    for chunk in archive.chunks(name, PIECE):
        array[start : start + len(chunk)] = chunk
        start += len(chunk)
    return array


def _unpack(arrays: dict[str, Array], count: int) -> _Kept:
    record = parse_json(arrays["record"].tobytes())
    if record["n"] != count or any(len(arrays.get(name, range(count))) != count for name in ("pool", "probs")):
        raise ValueError(f"they are not those of {count} images")
    found: dict[str, Any] = {name: arrays.get(name) for name in ("pool", "probs")}
    for name in ("pool_statistics", "spatial_statistics"):
        if f"{name}.mean" in arrays:
            found[name] = Statistics(count, arrays[f"{name}.mean"], arrays[f"{name}.cov"])
    return _Kept(FeatureSet(count, **found), frozenset(record["asked"]))
