"""Numbers of any range that images are saved in, as levels: uint8 [n, H, W, 3] of 0 .. 255.

Shapes: n images, H W space, C channels (1, 3 or 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Images = NDArray[np.uint8]


class Rule(NamedTuple):
    """What is done with numbers of some kinds of type (numpy's letters) that all lie in a range."""

    kinds: str
    low: float
    high: float
    said: str
    scale: Callable[[NDArray[Any]], NDArray[Any]]


RULES = (
    Rule("iu", 0, 255, "its integers of 0 .. 255 are taken as they are", lambda numbers: numbers),
    Rule("f", 0, 1, "its values lie in [0, 1], and are scaled to 0 .. 255 and rounded", lambda x: x * 255 + 0.5),
    Rule(
        "f", -1, 1, "its values lie in [-1, 1], and are scaled to 0 .. 255 as sampling does", lambda x: (x + 1) * 127.5
    ),
    Rule("f", 0, 255, "its values lie in [0, 255], and are rounded", lambda x: x + 0.5),
)


def find_rule(dtype: np.dtype[Any], low: float, high: float, path: str) -> Rule:
    """The rule for numbers of a type from `low` to `high`.

    :raises ValueError: if images have no such range.
    """
    for rule in RULES:
        if dtype.kind in rule.kinds and rule.low <= low <= high <= rule.high:
            return rule
    shown = f"from {low:.6g} to {high:.6g}" if np.isfinite([low, high]).all() else "some of them not finite"
    raise ValueError(
        f"{path} holds numbers of {dtype}, {shown}, where images are uint8, integers of 0 .. 255, or floats in "
        "[-1, 1], [0, 1] or [0, 255]: clip and scale them to 0 .. 255, and save them as uint8"
    )


def to_levels(numbers: NDArray[Any], rule: Rule) -> Images:
    """What a rule makes of numbers."""
    if numbers.dtype.kind == "f" and numbers.dtype.itemsize < 4:
        numbers = numbers.astype(np.float32)
    return numbers if numbers.dtype == np.uint8 else np.clip(rule.scale(numbers), 0, 255).astype(np.uint8)


def to_rgb(images: Images) -> Images:
    """[n, H, W] or [n, H, W, C] -> [n, H, W, 3]: grey is repeated, transparency laid on white, as in training."""
    images = images[..., None] if images.ndim == 3 else images
    if images.shape[-1] == 1:
        return np.repeat(images, 3, -1)
    return np.stack([_opaque(image) for image in images]) if images.shape[-1] == 4 else images


def _opaque(image: Images) -> Images:
    picture = Image.fromarray(image)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
