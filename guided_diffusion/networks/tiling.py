"""Networks of one size on larger images: in overlapping tiles, whose outputs are blended.

In every step the network predicts each tile of the same noisy image, and the mean of the predictions, with weights that
fall to the edges of a tile, makes the step (Bar-Tal et al. 2023, MultiDiffusion). So tiles agree where they meet.

Shapes: N images, C channels, H W space, h w that of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch as th

MOST_OVERLAP = 0.9  # share of a tile, above which there would be very many


def starts(side: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin that cover a side evenly, and overlap by at least this share of them."""
    count = math.ceil((side - overlap * tile) / max(1.0, (1 - overlap) * tile)) if side > tile else 1
    return [round(number * (side - tile) / max(1, count - 1)) for number in range(count)]


def blended(
    function: Callable[[Sequence[slice]], th.Tensor],
    sides: Sequence[int],
    tile: Sequence[int],
    overlap: float,
    scale: int,
) -> th.Tensor:
    """[N, C, scale H, scale W] of what a function makes of the tiles of an image.

    :param function: (rows, columns) of a tile -> [N, C, scale h, scale w].
    :param sides: (H, W), each at least that of the `tile`.
    :param overlap: least share of a tile that the next one covers too, 0 to below 1.
    """
    total, weights, ramps = None, None, [_ramp(scale * side) for side in tile]
    for corner in product(*(starts(side, length, overlap) for side, length in zip(sides, tile, strict=True))):
        part = function([slice(first, first + length) for first, length in zip(corner, tile, strict=True)])
        weight = th.outer(*ramps).to(part)
        if total is None or weights is None:
            shape = [scale * side for side in sides]
            total, weights = part.new_zeros(*part.shape[:2], *shape), part.new_zeros(shape)
        place = tuple(slice(scale * first, scale * (first + side)) for first, side in zip(corner, tile, strict=True))
        total[..., place[0], place[1]] += weight * part
        weights[place] += weight
    assert total is not None and weights is not None, "there is at least one tile"  # noqa: PT018
    return total / weights


def _ramp(length: int) -> th.Tensor:
    """[length] weights that fall from the middle of a tile to its ends, and are above 0."""
    places = th.arange(length) + 0.5
    return th.minimum(places, length - places) / length


def tiled(
    network: Callable[..., th.Tensor], tile: Sequence[int], scale: int, overlap: float
) -> Callable[..., th.Tensor]:
    """An upsampler for small images of any size from that of its training on.

    :param tile: (h, w) of the small images of its training.
    :param scale: how often these fit into the large ones.
    :param overlap: as for `blended`.
    """

    def predict(x: th.Tensor, timesteps: th.Tensor, low_res: th.Tensor, **kwargs: Any) -> th.Tensor:
        def one(place: Sequence[slice]) -> th.Tensor:
            rows, columns = (slice(scale * part.start, scale * part.stop) for part in place)
            return network(x[..., rows, columns], timesteps, low_res=low_res[..., place[0], place[1]], **kwargs)

        return blended(one, low_res.shape[2:], tile, overlap, scale)

    return predict
