"""Noise schedules: betas by name, and the noise level at timesteps between those of training.

Symbols: beta_t is the noise of one step, alpha_bar_t = prod(1 - beta_s) the share of the variance that is signal after
steps 0 .. t. tau is a real timestep of training, 0 .. T-1; lambda = log(alpha / sigma) = logit(alpha_bar) / 2 is half
the logarithm of the signal-to-noise ratio.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch as th
import torch.nn.functional as F

from ..runtime.errors import UserError, check_choice
from ..runtime.seeds import to_device
from .steps import NO_SIGNAL

Array = npt.NDArray[np.float64]

MAX_BETA = 0.999


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = MAX_BETA
) -> Array:
    """Betas [T] whose product follows alpha_bar(time), time in [0, 1], none above `max_beta`."""
    levels = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in pairwise(levels)])


def _clamped(betas: Array, name: str) -> Array:
    if betas[-1] > MAX_BETA:
        message = f"a {name} schedule of {len(betas)} steps has betas above {MAX_BETA}: they are clamped"
        warnings.warn(message, stacklevel=4)
    return np.minimum(betas, MAX_BETA)


def _linear(steps: int, first: float = 0.0001, last: float = 0.02) -> Array:
    """Ho et al. 2020, scaled to any T."""
    scale = 1000 / steps
    return _clamped(np.linspace(scale * first, scale * last, steps, dtype=np.float64), "linear")


def _scaled_linear(steps: int, first: float = 0.00085, last: float = 0.012) -> Array:
    """Linear in sqrt(beta), as latent diffusion has it (Rombach et al. 2022), scaled to any T."""
    scale = 1000 / steps
    ends = math.sqrt(scale * first), math.sqrt(scale * last)
    return _clamped(np.linspace(*ends, steps, dtype=np.float64) ** 2, "scaled_linear")


def _cosine(steps: int) -> Array:
    """Nichol & Dhariwal 2021, eq. 17."""
    return betas_for_alpha_bar(steps, lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2)


def _sigmoid(steps: int) -> Array:
    """Jabri et al. 2022, with start -3, end 3 and tau 1."""

    start, end = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    return betas_for_alpha_bar(steps, lambda time: (end - 1 / (1 + math.exp(3 - 6 * time))) / (end - start))


SCHEDULES: dict[str, Callable[..., Array]] = {
    "linear": _linear,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
    "scaled_linear": _scaled_linear,
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Array:
    """Betas [T] of a schedule in `SCHEDULES`, of linear ones perhaps with ends: "scaled_linear:0.0015,0.0195"."""
    name, colon, text = schedule_name.partition(":")
    check_choice("noise_schedule", name, SCHEDULES)
    return SCHEDULES[name](num_diffusion_timesteps, *(_ends(name, text) if colon else ()))


def _ends(name: str, text: str) -> tuple[float, float]:
    """The first and last beta, for T = 1000, in "FIRST,LAST"."""
    try:
        first, last = map(float, text.split(","))
        if name.endswith("linear") and 0 < first < last < 1:
            return first, last
    except ValueError:
        pass
    raise UserError(
        f"noise_schedule {name}:{text} is none: write linear:FIRST,LAST or scaled_linear:FIRST,LAST with "
        "0 < FIRST < LAST < 1"
    )


def rescale_zero_terminal_snr(betas: npt.ArrayLike) -> Array:
    """Betas [T] of which the last is 1, so that nothing of the image is left at T-1 (Lin et al. 2024, algorithm 1).

    sqrt(alpha_bar) is shifted to end at 0 and scaled to begin as before.
    """
    signal = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    levels = np.append(1.0, signal**2)
    rescaled: Array = 1 - levels[1:] / levels[:-1]
    return rescaled


class NoiseLevels:
    """The noise level at real timesteps: exact at the knots, linear in lambda in between, constant beyond.

    :param alphas_cumprod: alpha_bar at the knots, falling.
    :param timesteps: the knots, rising; 0 .. T-1 where there are none.
    """

    def __init__(self, alphas_cumprod: npt.ArrayLike, timesteps: npt.ArrayLike | None = None) -> None:
        self.alpha_bar = np.asarray(alphas_cumprod, dtype=np.float64)
        with np.errstate(divide="ignore"):
            lam = (np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)) / 2
        self.lam = np.maximum(lam, NO_SIGNAL)
        self.timesteps = np.arange(len(lam), dtype=np.float64) if timesteps is None else np.asarray(timesteps, float)
        self._tables: dict[tuple[th.device, th.dtype], tuple[th.Tensor, th.Tensor]] = {}

    def level(self, tau: th.Tensor) -> th.Tensor:
        """log alpha_bar at real timesteps tau."""
        knots, lam = self._on(tau)
        return F.logsigmoid(2 * interpolate(tau, knots, lam))

    def tau(self, level: th.Tensor) -> th.Tensor:
        """The real timesteps at which log alpha_bar is `level`."""
        knots, lam = self._on(level)
        return interpolate((level - th.log(-th.expm1(level))) / 2, lam.flip(0), knots.flip(0))

    def _on(self, like: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Knots and their lambda on the device and of the dtype of a tensor."""
        key = (like.device, like.dtype)
        if key not in self._tables:  # cast first: not every device has float64
            rows = (th.from_numpy(values.copy()).to(like.dtype) for values in (self.timesteps, self.lam))
            knots, lam = (to_device(row, like.device) for row in rows)
            self._tables[key] = knots, lam
        return self._tables[key]


def interpolate(x: th.Tensor, xs: th.Tensor, ys: th.Tensor) -> th.Tensor:
    """Piecewise linear through (xs, ys), xs rising; constant beyond both ends."""
    if len(xs) == 1:
        return ys.expand_as(x)
    right = th.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    share = ((x - xs[left]) / (xs[right] - xs[left])).clamp(0, 1)
    return th.lerp(ys[left], ys[right], share)
