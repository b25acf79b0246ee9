"""Which images of the reference samples are most like: whether a model repeats what it was trained on.

Shapes: N samples, k neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..runtime.pictures import Pixels, save_grid
from .evaluator import Side
from .images import ImageSet
from .metrics import manifold_radii, nearest_neighbours

SHOWN, K = 16, 3


def draw_neighbours(path: str, reference: Side, samples: Side) -> tuple[dict[str, Any], str]:
    """Draw the samples that are nearest to the reference, each beside its nearest images there.

    :return: numbers, distances being those of features, and a sentence.
    """
    made, real = samples.features.pool, reference.features.pool
    assert made is not None
    assert real is not None
    distances, indices = nearest_neighbours(made, real, K)
    own = np.sqrt(manifold_radii(real, 1))  # of images of the reference from their nearest other
    shown = np.argsort(distances[:, 0], kind="stable")[:SHOWN]
    pictures = _together(samples.images, shown), _together(reference.images, indices[shown].ravel())
    near = [_scaled(image, pictures[0][0]) for image in pictures[1]]
    rows = [[_scaled(image, pictures[0][0]), *near[K * row : K * row + K]] for row, image in enumerate(pictures[0])]
    save_grid(path, np.concatenate(rows), K + 1, [f"{index}: {distances[index, 0]:.3g}" for index in shown])
    nearer = int((distances[:, 0] < own[indices[:, 0]]).sum())
    medians = float(np.median(distances[:, 0])), float(np.median(own))
    pairs = [{"sample": int(i), "reference": indices[i].tolist(), "distances": distances[i].tolist()} for i in shown]
    facts = {"nearer": nearer, "median": medians[0], "median_of_reference": medians[1], "nearest": pairs}
    return facts, (
        f"{path}: the {len(shown)} samples nearest to the reference; {nearer} of {len(made)} are nearer to an image "
        f"there than its other images are; the median distance is {medians[0]:.4g}, of the reference's own images "
        f"{medians[1]:.4g}"
    )


def _together(images: ImageSet, indices: NDArray[np.int64]) -> list[Pixels]:
    """The images with these indices, in any order."""
    rising, places = np.unique(indices, return_inverse=True)
    taken = [image for batch in images.take(rising) for image in batch]
    return [taken[place] for place in places]


def _scaled(image: Pixels, model: Pixels) -> Pixels:
    """An image in the size of another one."""
    height, width = model.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width, height)))
