"""References: mean and covariance of the features of all images, and some of the images, in one npz.

The original's files hold the same arrays without a record of what the statistics are of.

Shapes: N images, H W space, D pooled features, S spatial features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import dist_util
from ..runtime.errors import UserError
from ..runtime.files import parse_json
from ..runtime.npz import Npz, Rows, write_arrays
from ..runtime.options import Size, parse_size
from .feature_sets import collect
from .features import Extractor, make_extractor
from .images import RECORD, STATISTICS, ArrayImages, ImageSet, Opened, open_images
from .metrics import Statistics
from .scores import FeatureSet

LARGEST_D = 2**14  # features that a stored covariance may have
RECORDED = {"extractor": str, "identity": str, "n": int}


def write_reference(
    images: Opened,
    out: str,
    extractor: str | Extractor | None,
    *,
    size: Size,
    num_samples: int = 10_000,
    batch_size: int = 64,
) -> list[str]:
    """Write mu [D], sigma [D, D], mu_s [S], sigma_s [S, S] of all images, and arr_0 [n, H, W, 3] of some; collective.

    :param images: a path, or images that have been opened with the same `size`.
    :param extractor: one, or its name as `make_extractor` has it; None for no statistics.
    :param num_samples: images to keep, evenly over all; 0 for all of them.
    :return: sentences that say what was written.
    """
    images = open_images(images, size)
    if not images.count:
        raise UserError(f"{images.path} holds statistics and no images: a reference is made of images")
    images.share_scan()
    if images.shape is not None and images.shape[:2] != parse_size(size):
        height, width, _ = images.shape
        raise UserError(
            f"{images.path} holds images of {height}x{width}, and those of an npz are not scaled: give --image_size "
            f"{height}x{width}, or a folder or zip of images"
        )
    features = None
    if extractor is not None:
        extractor = make_extractor(extractor, device=dist_util.dev())
        needs = ("pool_statistics", "spatial_statistics")
        features = collect(images, extractor, needs=needs, batch_size=batch_size, progress=True)
    kept = images.count if not num_samples else min(num_samples, images.count)
    dist_util.decide(lambda: _write(images, out, extractor, features, size=size, kept=kept))
    about = f", mean and covariance of the features of {images.count} by {extractor.name}" if extractor else ""
    return [*images.notes, *(f"warning: {text}" for text in images.warnings()), f"{out}: {kept} images{about}"]


def _write(
    images: ImageSet, out: str, extractor: Extractor | None, features: FeatureSet | None, *, size: Size, kept: int
) -> None:
    indices = np.arange(kept) * images.count // kept
    arrays: dict[str, Rows] = {"arr_0": ((kept, *parse_size(size), 3), np.uint8, images.take(indices))}
    if images.labels is not None:
        arrays["arr_1"] = ((kept,), np.int64, [images.labels[indices]])
    for kind, names in STATISTICS.items():
        statistics = getattr(features, f"{kind}_statistics", None)
        if statistics is not None:
            arrays |= {names[0]: _whole(statistics.mean), names[1]: _whole(statistics.cov)}
    if extractor is not None:
        record = {"extractor": extractor.name, "identity": extractor.identity, "n": images.count}
        arrays[RECORD] = _whole(record_bytes(record))
    write_arrays(out, arrays)


def _whole(array: NDArray[Any]) -> Rows:
    return array.shape, array.dtype, [array]


def record_bytes(record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """A record as the array that is stored."""
    return np.frombuffer(json.dumps(dict(record)).encode(), np.uint8)


def read_statistics(images: ImageSet) -> tuple[dict[str, Statistics], dict[str, Any]]:
    """The stored statistics of "pool" and "spatial" features, and the record of what they are of, or {}."""
    if not isinstance(images, ArrayImages) or len(images.parts) != 1:
        return {}, {}
    with Npz(images.parts[0]) as archive:
        record = _read_record(archive) if RECORD in archive else {}
        pairs = {kind: pair for kind, pair in STATISTICS.items() if all(name in archive for name in pair)}
        return {kind: _read_pair(archive, *pair, record.get("n", 0)) for kind, pair in pairs.items()}, record


def _read_pair(archive: Npz, mu: str, sigma: str, n: int) -> Statistics:
    shapes = archive.header(mu).shape, archive.header(sigma).shape
    if shapes == (shapes[0][:1], shapes[0] * 2) and 0 < shapes[0][0] <= LARGEST_D:
        mean, cov = (next(archive.chunks(name, shapes[0][0])).astype(np.float64) for name in (mu, sigma))
        if np.isfinite(mean).all() and np.isfinite(cov).all():
            return Statistics(n, mean, cov)
    raise UserError(
        f"{archive.path}: {mu} {shapes[0]} and {sigma} {shapes[1]} are no mean and covariance of finite numbers: make "
        "the file again"
    )


def _read_record(archive: Npz) -> dict[str, Any]:
    try:
        record = parse_json(next(archive.chunks(RECORD, 2**16), np.empty(0)).tobytes())
        if not isinstance(record, dict) or any(type(record.get(name)) is not kind for name, kind in RECORDED.items()):
            raise UserError(f"it does not name {', '.join(RECORDED)}")
    except ValueError as error:
        raise UserError(
            f"{archive.path}: {RECORD} does not say what the statistics are of ({error}): make the file again"
        ) from error
    return record
