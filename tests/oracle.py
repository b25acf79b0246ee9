"""Exact answers for Gaussian data; those for mixtures of Gaussians are in benchmarks/mixture.py.

For x_0 ~ N(mean, std^2), pixel by pixel, the best denoiser is known, and the probability-flow map is affine:
z = (x_t - sqrt(alpha_bar) mean) / sqrt(alpha_bar std^2 + 1 - alpha_bar) stays constant along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch as th

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule as schedule,
)
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.sampling.schedules import rescale_zero_terminal_snr
from guided_diffusion.sampling.steps import Sampler


def make_process(
    steps: int = 1000,
    respacing: str | Sequence[float] = "",
    *,
    name: str = "linear",
    mean: str = "EPSILON",
    var: str = "FIXED_LARGE",
    zero_terminal_snr: bool = False,
) -> SpacedDiffusion:
    """A process that is made as the factory makes it, on any grid that `space_timesteps` takes."""
    betas = schedule(name, steps)
    if zero_terminal_snr:
        betas = rescale_zero_terminal_snr(betas)
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, respacing or [steps], alphas_cumprod=np.cumprod(1 - betas)),
        betas=betas,
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[var],
        loss_type=LossType.MSE,
    )


class GaussianData:
    """The perfect network for N(mean, std^2) at any real timestep, which counts its calls."""

    def __init__(self, process: GaussianDiffusion, mean: float = 0.3, std: float = 0.5) -> None:
        self.process, self.mean, self.std, self.calls = process, mean, std, 0

    def __call__(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        self.calls += 1
        tau = timesteps.double()
        level = self.process.level(tau).view(-1, *[1] * (x.ndim - 1))
        alpha, sigma = (value.to(x.dtype) for value in (th.exp(level / 2), th.sqrt(-th.expm1(level))))
        x_start = self.mean + alpha * self.std**2 * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        eps = (x - alpha * x_start) / sigma
        kind = self.process.model_mean_type
        if kind is ModelMeanType.PREVIOUS_X:
            return self.process.q_posterior_mean_variance(x_start, x, tau)[0]
        predictions = {
            ModelMeanType.START_X: x_start,
            ModelMeanType.EPSILON: eps,
            ModelMeanType.VELOCITY: alpha * eps - sigma * x_start,
        }
        return predictions[kind]

    def flow(self, x: th.Tensor, before: float, after: float) -> th.Tensor:
        """Where the probability flow takes x from level alpha_bar = before to after."""
        deviation = [np.sqrt(level * self.std**2 + 1 - level) for level in (before, after)]
        z = (x - np.sqrt(before) * self.mean) / deviation[0]
        return np.sqrt(after) * self.mean + deviation[1] * z


def affine_step(
    sampler: Sampler, process: GaussianDiffusion, model: Callable[..., th.Tensor], index: int
) -> tuple[float, float, float]:
    """A, B, C of one step x -> A x + B + C z of a memoryless sampler, found by probing it."""
    predict = process.predictor(model, clip_denoised=False)
    x, z = th.tensor([[[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]], dtype=th.float64)
    out, _ = sampler.step(process, predict, x, th.full((3,), index), None, lambda: z)
    offset, of_x, of_z = out["sample"].flatten().tolist()
    return of_x - offset, offset, of_z - offset


def moments(
    sampler: Sampler, process: GaussianDiffusion, model: Callable[..., th.Tensor], *, last: int = 0
) -> tuple[float, float]:
    """Mean and variance of the samples after the step at index `last`, without drawing any."""
    mean, variance = 0.0, 1.0
    with process.tables_kept({}):
        for index in reversed(range(last, process.num_timesteps)):
            scale, offset, noise = affine_step(sampler, process, model, index)
            mean, variance = scale * mean + offset, scale**2 * variance + noise**2
    return mean, variance
