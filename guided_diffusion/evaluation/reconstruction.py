"""The distance of images from their reconstructions by an autoencoder, for its validation."""

from __future__ import annotations

from collections.abc import Callable

from ..runtime.pictures import Pixels
from .features import Extractor
from .metrics import frechet_distance, statistics

BATCH = 64  # images per pass of the network


def frechet(extractor: Extractor) -> Callable[[Pixels, Pixels], tuple[str, float]]:
    """The function of (images, reconstructions) uint8 [N, H, W, C] that gives the name and the value of their distance.

    The name is fid for the published network's features, else fd.
    """

    def distance(images: Pixels, made: Pixels) -> tuple[str, float]:
        both = [
            statistics(extractor(rows[start : start + BATCH]).pool for start in range(0, len(rows), BATCH))
            for rows in (images, made)
        ]
        value = frechet_distance(both[0].mean, both[0].cov, both[1].mean, both[1].cov)
        return ("fid" if extractor.published else "fd"), value

    return distance
