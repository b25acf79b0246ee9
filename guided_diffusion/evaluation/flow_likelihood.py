"""The likelihood of images under the probability flow (Song et al. 2021, sec. 4.3 and D.2).

The flow turns an image at the first noise level of a process into noise at the last one, by
dx / dtheta = v = (alpha x - x_0(x)) / sigma with alpha = cos theta, sigma = sin theta, and changes of variables give

    log p(x) = log N(x at the end; 0, 1) + integral of div v along the way.

div v is measured along random directions e (Hutchinson): e . dv/dx e, whose mean is the divergence.

Shapes: images are [N, C, H, W] (or any [N, C, ...]) of D numbers each; theta is [N], points of the flow are [N, D + 1]:
the numbers of the images, and the integral of div v so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch as th
import torch.nn.functional as F

from ..config import FlowConfig
from ..diffusion.methods import Kwargs, Model
from ..losses import HALF_BIN, discretized_gaussian_log_likelihood
from ..runtime.errors import UserError, refuse
from ..sampling.loop import drawer
from ..sampling.steps import Generators, Level

if TYPE_CHECKING:
    from ..gaussian_diffusion import GaussianDiffusion

MAX_STEPS = 10_000
FASTER, SLOWER, SAFETY = 5.0, 0.2, 0.9  # bounds of how a step's length changes, and how much of the allowed is used

# Dormand & Prince 1980: six stages of order 5, and the difference to order 4 with the seventh
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


Slope = Callable[[th.Tensor, th.Tensor], th.Tensor]  # (points, theta [N]) -> their derivatives by theta

DEFAULTS = FlowConfig()


def calc_flow_bpd(
    process: GaussianDiffusion,
    model: Model,
    x_start: th.Tensor,
    clip_denoised: bool = True,
    model_kwargs: Kwargs = None,
    *,
    options: FlowConfig = DEFAULTS,
    generator: Generators = None,
) -> dict[str, th.Tensor]:
    """Bits per dimension [N] of 8-bit images as points that the probability flow makes of noise.

    prior_bpd is that of the noise at the end, volume_bpd what the flow adds, data_bpd what the rounding to 8 bits does;
    they sum to total_bpd. evaluations says how often the network was asked for each image.

    :param x_start: pixels that are levels of [-1, 1] in steps of 2/255.
    :param generator: source of all randomness; a sequence of N draws each image from its own.
    :raises ValueError: if the solver cannot follow the flow, or there is none.
    """
    one = process.num_timesteps < 2
    refuse((one, "one step has no flow between its ends: give --timestep_respacing 2 or more, or none"))
    x, data = _dequantized(process, model, x_start, clip_denoised, model_kwargs, options=options, generator=generator)
    probes = _probes(x, options, generator)
    slope = partial(
        _slope, process, model, like=x, clip_denoised=clip_denoised, kwargs=model_kwargs or {}, probes=probes
    )
    level = process.at(th.arange(process.num_timesteps, device=x.device), x)
    angles = th.atan2(level.sigma, level.alpha).flatten()  # theta of the steps, in float64 where the device has it
    start = F.pad(x.flatten(1).to(angles), (0, 1))
    with process.tables_kept({}):
        if options.flow_solver == "heun":
            end, evaluations = _heun(slope, start, angles)
        else:
            end, evaluations = _rk45(slope, start, angles[[0, -1]], options.flow_tolerance)
    size = math.log(2) * x[0].numel()
    prior, volume = -_log_normal(end[:, :-1]) / size, -end[:, -1] / size
    return {
        "total_bpd": prior + volume + data,
        "prior_bpd": prior,
        "volume_bpd": volume,
        "data_bpd": data,
        "evaluations": evaluations.to(prior) + (options.dequantize == "decoder"),
    }


def _log_normal(x: th.Tensor) -> th.Tensor:
    """log N(x; 0, 1) [N], summed in float64 where the device has it."""
    wide = x if x.device.type == "mps" else x.double()
    return -0.5 * (wide**2 + math.log(2 * math.pi)).flatten(1).sum(dim=1)


def _dequantized(
    process: GaussianDiffusion,
    model: Model,
    x_start: th.Tensor,
    clip_denoised: bool,
    model_kwargs: Kwargs,
    *,
    options: FlowConfig,
    generator: Generators,
) -> tuple[th.Tensor, th.Tensor]:
    """A point of the flow for each image, and -log2 P(image | point) + log2 q(point | image) per dimension [N].

    "uniform": q is uniform in the bins, and rounding leads back for certain (Theis et al. 2016). "decoder": q is the
    first step of diffusion, and what leads back is the last step of the variational bound (Ho et al. 2020, eq. 13).
    """
    if options.dequantize == "uniform":
        draw = drawer(partial(th.rand, dtype=x_start.dtype), x_start.shape, x_start.device, generator)
        bits = -math.log2(2 * HALF_BIN)
        return x_start + (2 * draw() - 1) * HALF_BIN, th.full((len(x_start),), bits, device=x_start.device)
    noise = drawer(partial(th.randn, dtype=x_start.dtype), x_start.shape, x_start.device, generator)()
    t = th.zeros(len(x_start), dtype=th.int64, device=x_start.device)
    x = process.q_sample(x_start, t, noise)
    with th.no_grad():
        out = process.p_mean_variance(model, x, t, clip_denoised, model_kwargs=model_kwargs)
    back = discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=out["log_variance"] / 2)
    forth = _log_normal(noise) / noise[0].numel() - float(process.log_one_minus_alphas_cumprod[0]) / 2
    return x, (forth - back.flatten(1).mean(1)) / math.log(2)


def _probes(x: th.Tensor, options: FlowConfig, generator: Generators) -> list[th.Tensor]:
    """Directions with the identity as their covariance, each like x; the same all along the way."""
    signs = options.probe_noise == "rademacher"
    make: Callable[..., th.Tensor] = partial(th.randint, 2) if signs else partial(th.randn, dtype=x.dtype)
    draw = drawer(make, x.shape, x.device, generator)
    return [(2 * draw() - 1 if signs else draw()).to(x.dtype) for _ in range(options.probes)]


def _slope(
    process: GaussianDiffusion,
    model: Model,
    point: th.Tensor,
    theta: th.Tensor,
    *,
    like: th.Tensor,
    clip_denoised: bool,
    kwargs: dict[str, th.Tensor],
    probes: Sequence[th.Tensor],
) -> th.Tensor:
    """v and div v at points of angle theta, for images like `like`."""
    alpha, sigma = th.cos(theta), th.sin(theta)
    tau = process.tau(Level(alpha, sigma).log_alpha_bar)
    tau = tau.to(th.float64 if like.dtype == th.float64 else th.float32)
    with th.enable_grad():
        leaf = point[:, :-1].to(like.dtype).view_as(like).detach().requires_grad_()
        xstart = process.p_mean_variance(model, leaf, tau, clip_denoised, model_kwargs=kwargs)["pred_xstart"]
        traces = []
        for probe in probes:
            (product,) = th.autograd.grad(xstart, leaf, probe, retain_graph=probe is not probes[-1])
            traces.append((product * probe).flatten(1).sum(dim=1))
    trace = th.stack(traces).mean(dim=0).to(theta)
    velocity = (alpha[:, None] * point[:, :-1] - xstart.detach().flatten(1).to(point)) / sigma[:, None]
    return th.cat([velocity, ((alpha * like[0].numel() - trace) / sigma)[:, None]], dim=1)


def _weighted(slopes: Sequence[th.Tensor], weights: Sequence[float]) -> th.Tensor:
    """The sum of slopes times weights."""
    return sum((weight * slope for slope, weight in zip(slopes, weights, strict=True) if weight), 0 * slopes[0])


def _heun(slope: Slope, point: th.Tensor, angles: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """The end of the way in steps from angle to angle, and how often the network was asked [N]."""
    count = len(point)
    for now, then in pairwise(angles):
        first = slope(point, now.expand(count))
        second = slope(point + (then - now) * first, then.expand(count))
        point = point + (then - now) / 2 * (first + second)
    _check_finite(bool(point.isfinite().all()))  # numbers that break on the way stay broken
    return point, th.full((count,), 2.0 * (len(angles) - 1), device=point.device)


def _rk45(slope: Slope, point: th.Tensor, ends: th.Tensor, tolerance: float) -> tuple[th.Tensor, th.Tensor]:
    """As `_heun`, in steps whose length each image chooses for itself, whatever images are beside it."""
    theta, end = ends[0].expand(len(point)), ends[1]
    length = theta.clamp(max=float(end - ends[0]))  # of the order of the first noise level
    first, evaluations, after = slope(point, theta), th.ones_like(theta), point
    for _ in range(MAX_STEPS):
        going = theta < end
        more, finite = th.stack([going.any(), after.isfinite().all()]).tolist()  # the step's one wait for the device
        _check_finite(finite)
        if not more:
            return point, evaluations
        last = theta + length >= end
        length = th.where(last, end - theta, length)
        slopes = [first]
        for weights in STAGES:
            after = point + length[:, None] * _weighted(slopes, weights)
            slopes.append(slope(after, theta + sum(weights) * length))
        error = _error(point, after, length[:, None] * _weighted(slopes, ERROR), tolerance)
        accepted = going & (error <= 1)
        evaluations = evaluations + 6 * going
        theta = th.where(accepted, th.where(last, end, theta + length), theta)
        point = th.where(accepted[:, None], after, point)
        first = th.where(accepted[:, None], slopes[-1], first)
        length = length * (SAFETY * error.clamp(min=1e-10) ** -0.2).clamp(SLOWER, FASTER)
    raise UserError(
        f"the flow is not at its end after {MAX_STEPS} steps: give --flow_solver heun or a larger --flow_tolerance"
    )


def _error(before: th.Tensor, after: th.Tensor, error: th.Tensor, tolerance: float) -> th.Tensor:
    """The error of a step [N] over the allowed one: of x the root mean square, of the volume per dimension."""
    size, largest = before.shape[1] - 1, th.maximum(before.abs(), after.abs())
    of_x = (error / (tolerance * (1 + largest)))[:, :-1].square().mean(dim=1).sqrt()
    return th.maximum(of_x, error[:, -1].abs() / (tolerance * (size + largest[:, -1])))


def _check_finite(finite: bool) -> None:
    refuse((not finite, "the flow leads to numbers that are not finite: look at the diffusion flags and --precision"))
