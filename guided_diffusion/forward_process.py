"""The forward process: coefficients at every step and between the steps, noising, and x_0, eps and means of each other.

Symbols (Ho et al. 2020): alpha_bar_t = prod(1 - beta_s); x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
Shapes: images are [N, C, H, W] (or any [N, C, ...]); t [N] is the index in this process, 0 .. T-1, where t = 0 is one
step of noise. Where t is not an integer it is tau, a real timestep of the process that the network was trained with,
so that a solver may look between the steps of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch as th

from .schedules import NoiseLevels, interpolate
from .seeds import to_device
from .steps import Level

# coefficients at real timesteps, from log alpha_bar
FROM_LEVEL: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "alphas_cumprod": th.exp,
    "sqrt_alphas_cumprod": lambda level: th.exp(level / 2),
    "sqrt_one_minus_alphas_cumprod": lambda level: th.sqrt(-th.expm1(level)),
    "log_one_minus_alphas_cumprod": lambda level: th.log(-th.expm1(level)),
    "sqrt_recip_alphas_cumprod": lambda level: th.exp(-level / 2),
    "sqrt_recipm1_alphas_cumprod": lambda level: th.sqrt(th.expm1(-level)),
}


class ForwardProcess:
    """The noise that each step adds, and the timesteps that a network knows the steps by.

    :param betas: noise per step [T], in (0, 1].
    :param rescale_timesteps: feed t * 1000 / (original T) to the network.
    :param timestep_map: for each step of this process, the timestep that the network was trained with.
    :param original_num_steps: T of the process that the network was trained with.
    :param original_alphas_cumprod: its alpha_bar [T]; without it, levels between steps follow those of this process.
    """

    def __init__(
        self,
        *,
        betas: npt.ArrayLike,
        rescale_timesteps: bool = False,
        timestep_map: Sequence[float] | None = None,
        original_num_steps: int | None = None,
        original_alphas_cumprod: npt.ArrayLike | None = None,
    ) -> None:
        self.rescale_timesteps = rescale_timesteps
        self.betas = np.array(betas, dtype=np.float64)
        if self.betas.ndim != 1 or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(f"betas must be a row of numbers in (0, 1], and are {betas!r}")
        self.num_timesteps = len(self.betas)
        self.timestep_map = list(range(self.num_timesteps)) if timestep_map is None else list(timestep_map)
        self.original_num_steps = original_num_steps or self.num_timesteps
        self._tables: dict[tuple[str, th.device, th.dtype], th.Tensor] = {}
        with np.errstate(divide="ignore"):  # alpha_bar may end at 0
            self._set_coefficients()
        whole = original_alphas_cumprod is not None
        self.original_alphas_cumprod = np.asarray(original_alphas_cumprod if whole else self.alphas_cumprod, np.float64)
        self._levels = NoiseLevels(self.original_alphas_cumprod, None if whole else self.timestep_map)

    @property
    def no_signal_at_the_end(self) -> bool:
        """Whether alpha_bar is 0 at T-1, as after `schedules.rescale_zero_terminal_snr`."""
        return bool(self.betas[-1] == 1)

    def _set_coefficients(self) -> None:
        """The public float64 arrays [T]."""
        alphas = 1 - self.betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        # q(x_{t-1} | x_t, x_0): Ho et al. 2020, eq. 7
        noise_share = (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_variance = self.betas * noise_share
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = noise_share * np.sqrt(alphas)
        # the variance is 0 at t = 0, whose logarithm is then taken from t = 1
        first = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self._large_variance = np.append(first, self.betas[1:])
        self._log_large_variance = np.log(self._large_variance)
        self._log_betas = np.log(self.betas)
        self._alpha_bar = np.concatenate([[1.0], self.alphas_cumprod, [0.0]])  # one step before 0 and after T-1
        self._alpha, self._sigma = np.sqrt(self._alpha_bar), np.sqrt(1 - self._alpha_bar)
        self._timestep_map = np.array(self.timestep_map)
        self._respaced = self.timestep_map != list(range(self.num_timesteps))

    def _table(self, name: str, device: th.device, dtype: th.dtype) -> th.Tensor:
        """The array `name` as a tensor that stays on the device; cast first, since not every device has float64."""
        key = (name, device, dtype)
        if key not in self._tables:
            self._tables[key] = to_device(th.from_numpy(getattr(self, name)).to(dtype), device)
        return self._tables[key]

    def _at(self, name: str, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """Coefficient `name` at t, [N, 1, ...] to broadcast with `like`."""
        dtype = th.float64 if like.dtype == th.float64 else th.float32
        values = self._between(name, t.to(dtype)) if t.is_floating_point() else self._table(name, t.device, dtype)[t]
        return values.view(-1, *[1] * (like.ndim - 1))

    def _between(self, name: str, tau: th.Tensor) -> th.Tensor:
        """Coefficient `name` at real timesteps: of their noise level, or interpolated where it belongs to a step."""
        if name in FROM_LEVEL:
            return FROM_LEVEL[name](self.level(tau))
        knots, values = (self._table(table, tau.device, tau.dtype) for table in ("_timestep_map", name))
        return interpolate(tau, knots, values)

    def alpha_bar(self, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """alpha_bar_t for t in -1 .. T: 1 before the first step, 0 after the last."""
        return self._at("alphas_cumprod", t, like) if t.is_floating_point() else self._at("_alpha_bar", t + 1, like)

    def at(self, t: th.Tensor, like: th.Tensor) -> Level:
        """alpha and sigma [N, 1, ...] at t, in float64 where the device has it; t = -1 is the image."""
        precise = like[:0].to(th.float32 if like.device.type == "mps" else th.float64)
        if t.is_floating_point():
            return Level(*(self._at(f"sqrt_{name}alphas_cumprod", t, precise) for name in ("", "one_minus_")))
        return Level(self._at("_alpha", t + 1, precise), self._at("_sigma", t + 1, precise))

    def level(self, tau: th.Tensor | float) -> th.Tensor:
        """log alpha_bar at a real timestep of training: linear in log-SNR between integers, exact on them."""
        return self._levels.level(th.as_tensor(tau, dtype=None if isinstance(tau, th.Tensor) else th.float64))

    def tau(self, level: th.Tensor | float) -> th.Tensor:
        """The real timestep of training at which log alpha_bar is `level`: the inverse of `level`."""
        return self._levels.tau(th.as_tensor(level, dtype=None if isinstance(level, th.Tensor) else th.float64))

    def timesteps(self, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """What a network is fed for t, with images like `like`: the timestep that it was trained with, rescaled
        where asked.
        """
        if self._respaced and not t.is_floating_point():
            real = th.float64 if like.dtype == th.float64 else th.float32
            t = self._table("_timestep_map", t.device, th.int64 if self._timestep_map.dtype.kind == "i" else real)[t]
        if not self.rescale_timesteps:
            return t
        return (t if t.is_floating_point() else t.float()) * (1000.0 / self.original_num_steps)

    def _scale_timesteps(self, t: th.Tensor) -> th.Tensor:
        """`timesteps` for images in float32."""
        return self.timesteps(t, th.empty(0))

    def _index(self, t: th.Tensor) -> th.Tensor:
        """The index of the step of this process that is nearest to t."""
        if not t.is_floating_point():
            return t
        knots = self._table("_timestep_map", t.device, t.dtype)
        return interpolate(t, knots, th.arange(len(knots), dtype=t.dtype, device=t.device)).round().long()

    # ---- the forward process

    def q_mean_variance(self, x_start: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start)
        return mean, (1 - self._at("alphas_cumprod", t, x_start)).expand_as(x_start), log_variance

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """x_t from x_0 and noise (drawn when absent)."""
        noise = th.randn_like(x_start) if noise is None else noise
        if noise.shape != x_start.shape:
            raise ValueError(f"noise of shape {tuple(noise.shape)} does not fit x_start, {tuple(x_start.shape)}")
        signal, sigma = (
            self._at(name, t, x_start) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        )
        return signal * x_start + sigma * noise

    def posterior_mean(self, xstart: th.Tensor, x: th.Tensor, t: th.Tensor) -> th.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        return self._at("posterior_mean_coef1", t, x) * xstart + self._at("posterior_mean_coef2", t, x) * x

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)."""
        variance = self._at("posterior_variance", t, x_t).expand_as(x_t)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)
        return self.posterior_mean(x_start, x_t, t), variance, log_variance

    # ---- from one prediction to another

    def predict_xstart(self, x: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        """x_0 from x_t and eps."""
        return self._at("sqrt_recip_alphas_cumprod", t, x) * x - self._at("sqrt_recipm1_alphas_cumprod", t, x) * eps

    def predict_eps(self, x: th.Tensor, t: th.Tensor, xstart: th.Tensor) -> th.Tensor:
        """eps from x_t and x_0."""
        if self.no_signal_at_the_end:  # the coefficients below are infinite there
            return (x - self._at("sqrt_alphas_cumprod", t, x) * xstart) / self._at(
                "sqrt_one_minus_alphas_cumprod", t, x
            )
        signal, sigma = (self._at(name, t, x) for name in ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"))
        return (signal * x - xstart) / sigma

    def xstart_of_mean(self, x: th.Tensor, t: th.Tensor, mean: th.Tensor) -> th.Tensor:
        """The x_0 whose posterior mean is `mean`."""
        return (mean - self._at("posterior_mean_coef2", t, x) * x) / self._at("posterior_mean_coef1", t, x)

    def _predict_xstart_from_eps(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        return self.predict_xstart(x_t, t, eps)

    def _predict_xstart_from_xprev(self, x_t: th.Tensor, t: th.Tensor, xprev: th.Tensor) -> th.Tensor:
        return self.xstart_of_mean(x_t, t, xprev)

    def _predict_eps_from_xstart(self, x_t: th.Tensor, t: th.Tensor, pred_xstart: th.Tensor) -> th.Tensor:
        return self.predict_eps(x_t, t, pred_xstart)
