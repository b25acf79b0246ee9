"""References to compare samples with: mean and covariance of the features of all images, and some of the images.

Shapes: N images, H W space, D pooled features, S spatial features.
"""

from __future__ import annotations

if __name__ == "__main__":  # python evaluations/make_reference.py DIR OUT.npz
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from guided_diffusion.commands.make_reference import main

    main()
    raise SystemExit

import os

import numpy as np

from evaluations.feature_sets import collect
from evaluations.features import Extractor, make_extractor
from evaluations.npz import RECORD, STATISTICS, open_images, record_bytes
from evaluations.scores import FeatureSet
from evaluations.sources import ImageSource
from guided_diffusion import dist_util
from guided_diffusion.config import Size, parse_size
from guided_diffusion.npz import Rows, write_arrays


def write_reference(
    source: str | os.PathLike[str] | ImageSource,
    out: str,
    extractor: str | Extractor | None,
    *,
    size: Size,
    num_samples: int = 10_000,
    batch_size: int = 64,
) -> list[str]:
    """Write mu [D], sigma [D, D], mu_s [S], sigma_s [S, S] of all images, and arr_0 [n, H, W, 3] of some; collective.

    The original's evaluator reads it, and so does `np.load`.

    :param source: a path, or images that are cropped to `size` already.
    :param extractor: one, or its name; None for no statistics.
    :param num_samples: images to keep, evenly over all; 0 for all of them.
    :return: sentences that say what was written.
    :raises ValueError: if an image cannot be read, or there are no images of that size.
    """
    source = open_images(source, size)
    if not source.count:
        raise ValueError(f"{source.path} holds statistics and no images: a reference is made of images")
    source.adopt(dist_util.decide(lambda: source.seen))
    if source.shape is not None and source.shape[:2] != parse_size(size):
        height, width, _ = source.shape
        raise ValueError(
            f"{source.path} holds images of {height}x{width}, and those of an npz are not scaled: give --image_size "
            f"{height}x{width}, or a folder or zip of images"
        )
    features = None
    if extractor is not None:
        extractor = make_extractor(extractor, device=dist_util.dev())
        needs = ("pool_statistics", "spatial_statistics")
        features = collect(source, extractor, needs=needs, batch_size=batch_size, progress=True)
    kept = source.count if not num_samples else min(num_samples, source.count)
    dist_util.decide(lambda: _write(source, out, extractor, features, size=size, kept=kept))
    about = f", mean and covariance of the features of {source.count} by {extractor.name}" if extractor else ""
    return [*source.notes, *(f"warning: {text}" for text in source.warnings()), f"{out}: {kept} images{about}"]


def _write(
    source: ImageSource, out: str, extractor: Extractor | None, features: FeatureSet | None, *, size: Size, kept: int
) -> None:
    indices = np.arange(kept) * source.count // kept
    arrays: dict[str, Rows] = {"arr_0": ((kept, *parse_size(size), 3), np.uint8, source.take(indices))}
    if source.labels is not None:
        arrays["arr_1"] = ((kept,), np.int64, [source.labels[indices]])
    for kind, names in STATISTICS.items():
        found = getattr(features, f"{kind}_statistics", None)
        if found is not None:
            arrays |= {name: _whole(values) for name, values in zip(names, (found.mean, found.cov), strict=True)}
    if extractor is not None:
        record = {"extractor": extractor.name, "identity": extractor.identity, "n": source.count}
        arrays[RECORD] = _whole(record_bytes(record))
    write_arrays(out, arrays)


def _whole(array: np.ndarray) -> Rows:
    return array.shape, array.dtype, [array]
