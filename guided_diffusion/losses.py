"""Divergences and likelihoods of diagonal Gaussians, in nats.

Shapes: everything broadcasts; images are [N, C, H, W] in [-1, 1].
"""

from __future__ import annotations

import math

import numpy as np  # noqa: F401
import torch as th

Value = th.Tensor | float

HALF_BIN = 1 / 255  # half the distance between two of the 256 levels of [-1, 1]
SMALLEST_PROBABILITY = 1e-12


def normal_kl(mean1: Value, logvar1: Value, mean2: Value, logvar2: Value) -> th.Tensor:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)), element by element, in nats; one argument is a tensor."""
    like = next((value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, th.Tensor)), None)
    if like is None:
        raise ValueError("normal_kl needs at least one tensor among its arguments, and got only numbers")
    logvar1, logvar2 = (
        value.to(like) if isinstance(value, th.Tensor) else th.full((), value, dtype=like.dtype, device=like.device)
        for value in (logvar1, logvar2)
    )
    log_ratio = logvar1 - logvar2
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x: th.Tensor) -> th.Tensor:
    """The standard normal distribution function to about 2e-4, by a hyperbolic tangent (Page 1977)."""
    return (1 + th.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))) / 2


def discretized_gaussian_log_likelihood(x: th.Tensor, *, means: th.Tensor, log_scales: th.Tensor) -> th.Tensor:
    """log P of 8-bit pixels under a Gaussian cut into 256 bins (Ho et al. 2020, eq. 13), in nats per element.

    The first and the last bin reach to infinity, so that the 256 probabilities sum to 1.

    :param x: pixels that are levels of [-1, 1] in steps of 2/255.
    """
    inverse_scale, distance = th.exp(-log_scales), x - means
    below = approx_standard_normal_cdf((distance - HALF_BIN) * inverse_scale).masked_fill(x < -0.999, 0)
    above = approx_standard_normal_cdf((distance + HALF_BIN) * inverse_scale).masked_fill(x > 0.999, 1)
    return (above - below).clamp(min=SMALLEST_PROBABILITY).log()
