"""From images to noise and between images: DDIM inversion and interpolation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch as th

if TYPE_CHECKING:
    from ..diffusion.methods import SamplingMethods as Process
    from .loop import SampleOptions


def invert(process: Process, model: Any, images: th.Tensor, **options: Unpack[SampleOptions]) -> th.Tensor:
    """The noise [N, C, H, W] from which deterministic DDIM makes these images (Song et al. 2021, sec. 4.3).

    Given to the loop as `start`, with the same process and options, any deterministic sampler leads back to about the
    images; with other labels, to what they would look like as another class. Guidance does not enter.

    :param images: [N, C, H, W] in [-1, 1].
    :param options: of the loop; with `strength` or `skip_timesteps` the way ends, and begins, that much earlier.
    """
    options["init_image"] = images
    return process.sample_loop("ddim_reverse", model, images.shape, **options)


def slerp(start: th.Tensor, end: th.Tensor, shares: th.Tensor) -> th.Tensor:
    """Points on the great circle from one noise to another: mixtures of about the same norm (Shoemake 1985).

    :param start: and `end`, [C, H, W].
    :param shares: [M] from 0, the start, to 1, the end; the result is [M, C, H, W].
    """
    directions = start / start.norm(), end / end.norm()
    # not the arc cosine, which is rough where they are almost parallel
    angle = 2 * th.atan2((directions[0] - directions[1]).norm(), (directions[0] + directions[1]).norm())
    shares = shares.to(start).view(-1, *[1] * start.ndim)
    if float(th.sin(angle)) < 1e-4:  # parallel: the circle is a line, or not one circle
        return th.lerp(start[None], end[None], shares)
    # the weights first: they are exactly 0 and 1 at the ends
    return th.sin((1 - shares) * angle) / th.sin(angle) * start + th.sin(shares * angle) / th.sin(angle) * end
