"""The pictures beside a file of samples: a grid of the first of them, and one PNG of each."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from .npz import read_npz
from .pictures import save_grid, save_png

GRID_IMAGES = 100
CHUNK = 64  # images in memory at a time


def draw_grid(path: str, samples: str, turns: Sequence[int] = (), class_names: Sequence[str] = ()) -> None:
    """The first images in one picture; a row for each class where they take turns.

    :param samples: the npz.
    :param turns: image i has the label turns[i % len(turns)]; empty where labels are random, or there are none.
    :param class_names: names by class id.
    """
    images = next(read_npz(samples, "arr_0", GRID_IMAGES))
    columns = len(images) // len(turns) if len(turns) > 1 else 0
    if columns < 2:
        save_grid(path, images, math.ceil(math.sqrt(len(images))))
        return
    rows = np.arange(columns * len(turns)).reshape(columns, len(turns)).T
    named = dict(enumerate(class_names))
    names = [named.get(label, f"class {label}") for label in turns]
    save_grid(path, images[rows.ravel()], columns, names)


def draw_each(
    folder: str, samples: str, *, labelled: bool, rank: int = 0, world_size: int = 1, names: Sequence[str] = ()
) -> None:
    """NNNNNN_yK.png, or as `names` say, of every world_size-th image of the npz `samples`."""
    os.makedirs(folder, exist_ok=True)
    labels = np.concatenate(list(read_npz(samples, "arr_1", CHUNK))) if labelled else None
    images = (image for chunk in read_npz(samples, "arr_0", CHUNK) for image in chunk)
    for index, image in enumerate(images):
        if index % world_size == rank:
            suffix = "" if labels is None else f"_y{labels[index]}"
            path = os.path.join(folder, names[index] if names else f"{index:06d}{suffix}.png")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            save_png(path, image)
