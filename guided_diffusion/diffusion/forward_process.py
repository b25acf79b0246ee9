"""The forward process: coefficients at and between its steps, noising, and conversions between x_0, eps and means.

Symbols (Ho et al. 2020): alpha_bar_t = prod(1 - beta_s); x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
Shapes: images are [N, C, H, W] (or any [N, C, ...]); t [N] is the index in this process, 0 .. T-1, where t = 0 is one
step of noise. Where t is not an integer it is tau, a real timestep of the process that the network was trained with,
so that a solver may look between the steps of this one.

Everything is computed from the public arrays as they are at the moment, also where they were assigned or changed in
place after construction, or by a subclass that never calls `__init__`. A loop alone keeps the tables that it makes of
them (`tables_kept`). The methods with the originals' names are the ones to override: all others call them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch as th

from ..runtime.errors import UserError, refuse
from ..runtime.seeds import to_device
from ..sampling.schedules import Array, NoiseLevels, interpolate
from ..sampling.steps import Level

T = TypeVar("T")
Tables = dict[object, tuple[Sequence[object], Any]]  # key -> what it was made of, and the table

# coefficients at real timesteps, from log alpha_bar
FROM_LEVEL: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "alphas_cumprod": th.exp,
    "sqrt_alphas_cumprod": lambda level: th.exp(level / 2),
    "sqrt_one_minus_alphas_cumprod": lambda level: th.sqrt(-th.expm1(level)),
    "log_one_minus_alphas_cumprod": lambda level: th.log(-th.expm1(level)),
    "sqrt_recip_alphas_cumprod": lambda level: th.exp(-level / 2),
    "sqrt_recipm1_alphas_cumprod": lambda level: th.sqrt(th.expm1(-level)),
}


def _large(betas: Array, small: Array) -> Array:
    """The larger of the fixed variances; at t = 0, where the smaller one is 0, that at t = 1 stands for it."""
    larger: Array = np.append(small[1] if len(small) > 1 else betas[0], betas[1:])
    return larger


def _around(before: Array, now: Array, after: Array) -> Array:
    """alpha_bar from one step before 0 to one after T-1."""
    return np.concatenate([before[:1], now, after[-1:]])


# coefficients made of public arrays: of which, and how
AROUND = ("alphas_cumprod_prev", "alphas_cumprod", "alphas_cumprod_next")
DERIVED: dict[str, tuple[tuple[str, ...], Callable[..., Array]]] = {
    "log_betas": (("betas",), np.log),
    "large_variance": (("betas", "posterior_variance"), _large),
    "log_large_variance": (("betas", "posterior_variance"), lambda *arrays: np.log(_large(*arrays))),
    "snr": (("alphas_cumprod",), lambda level: level / (1 - level)),
    "alpha_bars": (AROUND, _around),
    "alphas": (AROUND, lambda *arrays: np.sqrt(_around(*arrays))),
    "sigmas": (AROUND, lambda *arrays: np.sqrt(1 - _around(*arrays))),
}


def table_of(tables: Tables | None, key: object, sources: Sequence[object], make: Callable[[], T]) -> T:
    """What `make` returns, kept in `tables`, if there are some, while the sources are the same objects."""
    if tables is None:
        return make()
    if key not in tables or any(one is not other for one, other in zip(tables[key][0], sources, strict=True)):
        tables[key] = sources, make()
    return cast(T, tables[key][1])


class Default(Generic[T]):
    """An attribute that is computed from the process until it is assigned."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute

    def __get__(self, process: Any, owner: type) -> T:
        return cast(T, self) if process is None else self.compute(process)


class ForwardProcess:
    """The noise that each step adds, and the timesteps that a network knows the steps by.

    :param betas: noise per step [T], in (0, 1].
    :param rescale_timesteps: feed t * 1000 / T to the network.
    """

    # what a subclass that sets the arrays itself may leave out
    rescale_timesteps = False
    alphas_cumprod_prev: Default[Array] = Default(lambda process: np.append(1.0, process.alphas_cumprod[:-1]))
    alphas_cumprod_next: Default[Array] = Default(lambda process: np.append(process.alphas_cumprod[1:], 0.0))
    # for each step the timestep that the network was trained with, how many there were, and their alpha_bar
    timestep_map: Default[list[float]] = Default(lambda process: list(range(len(process.alphas_cumprod))))
    original_num_steps: Default[int] = Default(lambda process: process.num_timesteps)
    original_alphas_cumprod: Default[Array] = Default(lambda process: process._whole())
    _tables: Tables | None = None

    def __init__(self, *, betas: npt.ArrayLike, rescale_timesteps: bool = False) -> None:
        self.rescale_timesteps = rescale_timesteps
        self.betas = np.array(betas, dtype=np.float64)
        if self.betas.ndim != 1 or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise UserError(f"betas must be a row of numbers in (0, 1], and are {betas!r}")
        self.num_timesteps = len(self.betas)
        with np.errstate(divide="ignore"):  # alpha_bar may end at 0
            self._set_coefficients()

    @property
    def no_signal_at_the_end(self) -> bool:
        """Whether alpha_bar is 0 at T-1, as after `schedules.rescale_zero_terminal_snr`."""
        return math.isinf(self.sqrt_recip_alphas_cumprod[-1])

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

    @contextmanager
    def tables_kept(self, tables: Tables) -> Iterator[None]:
        """Inside, what is derived of the public arrays is kept in `tables` until other arrays are assigned.

        Changes in place are then not seen: a loop gives its own tables, anew for every run.
        """
        self._tables = tables
        try:
            yield
        finally:
            self._tables = None

    def _table(self, name: str, device: th.device, dtype: th.dtype) -> th.Tensor:
        """The array `name` as a tensor on a device; cast first, since not every device has float64."""
        names, compute = DERIVED.get(name, ((name,), np.asarray))
        arrays = [getattr(self, source) for source in names]

        def upload() -> th.Tensor:
            with np.errstate(divide="ignore"):
                values = compute(*(np.asarray(array, np.float64) for array in arrays))
            return to_device(th.tensor(values, dtype=dtype), device)

        return table_of(self._tables, (name, device, dtype), arrays, upload)

    def _at(self, name: str, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """Coefficient `name` at t, [N, 1, ...] to broadcast with `like`."""
        dtype = th.float64 if like.dtype == th.float64 else th.float32
        values = self._between(name, t.to(dtype)) if t.is_floating_point() else self._table(name, t.device, dtype)[t]
        return values.view(-1, *[1] * (like.ndim - 1))

    def _between(self, name: str, tau: th.Tensor) -> th.Tensor:
        """Coefficient `name` at real timesteps: of their noise level, or interpolated where it belongs to a step."""
        if name in FROM_LEVEL:
            return FROM_LEVEL[name](self.level(tau))
        knots, values = (self._table(table, tau.device, tau.dtype) for table in ("timestep_map", name))
        return interpolate(tau, knots, values)

    def alpha_bar(self, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """alpha_bar_t for t in -1 .. T: 1 before the first step, 0 after the last."""
        return self._at("alphas_cumprod", t, like) if t.is_floating_point() else self._at("alpha_bars", t + 1, like)

    def alpha_bar_prev(self, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """alpha_bar where the step at t ends."""
        return self._at("alphas_cumprod_prev", t, like)

    def alpha_bar_next(self, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """alpha_bar where the step backwards at t ends."""
        return self._at("alphas_cumprod_next", t, like)

    def at(self, t: th.Tensor, like: th.Tensor) -> Level:
        """alpha and sigma [N, 1, ...] at t, in float64 where the device has it; t = -1 is the image."""
        precise = like[:0].to(th.float32 if like.device.type == "mps" else th.float64)
        if t.is_floating_point():
            return Level(*(self._at(f"sqrt_{name}alphas_cumprod", t, precise) for name in ("", "one_minus_")))
        return Level(self._at("alphas", t + 1, precise), self._at("sigmas", t + 1, precise))

    def _levels(self) -> NoiseLevels:
        """The levels of training, where this process's (assigned since, perhaps) are among them, else its own."""
        alphas_cumprod, whole = self.alphas_cumprod, vars(self).get("original_alphas_cumprod")
        timestep_map = self.timestep_map

        def make() -> NoiseLevels:
            if whole is not None:
                levels = NoiseLevels(whole)
                if np.allclose(levels.level(th.tensor(timestep_map, dtype=th.float64)).exp().numpy(), alphas_cumprod):
                    return levels
            return NoiseLevels(alphas_cumprod, timestep_map)

        return table_of(self._tables, "levels", (alphas_cumprod, whole, timestep_map), make)

    def _whole(self) -> Array:
        """alpha_bar at all timesteps of the training, of which this process knows its own."""
        if len(self.alphas_cumprod) == self.original_num_steps:
            return cast(Array, self.alphas_cumprod)
        every = th.arange(self.original_num_steps, dtype=th.float64)
        return cast(Array, self.level(every).exp().numpy())

    def level(self, tau: th.Tensor | float) -> th.Tensor:
        """log alpha_bar at a real timestep of training: linear in log-SNR between integers, exact on them."""
        return self._levels().level(th.as_tensor(tau, dtype=None if isinstance(tau, th.Tensor) else th.float64))

    def tau(self, level: th.Tensor | float) -> th.Tensor:
        """The real timestep of training at which log alpha_bar is `level`: the inverse of `level`."""
        return self._levels().tau(th.as_tensor(level, dtype=None if isinstance(level, th.Tensor) else th.float64))

    def _wrap_model(self, model: Any) -> Any:
        """The network, to be called with t; a respaced process wraps it, so that t becomes a timestep of training."""
        return model

    def _scale_timesteps(self, t: th.Tensor) -> th.Tensor:
        """The argument for t of the network, or of what `_wrap_model` made of it: t, rescaled where asked."""
        if not self.rescale_timesteps:
            return t
        return (t if t.is_floating_point() else t.float()) * (1000.0 / self.num_timesteps)

    def timesteps(self, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """What a network is fed for t in the end, with images like `like`."""
        timesteps: th.Tensor = self._wrap_model(lambda x, timesteps: timesteps)(like, self._scale_timesteps(t))
        return timesteps

    def _index(self, t: th.Tensor) -> th.Tensor:
        """The index of the step of this process that is nearest to t."""
        if not t.is_floating_point():
            return t
        knots = self._table("timestep_map", t.device, t.dtype)
        return interpolate(t, knots, th.arange(len(knots), dtype=t.dtype, device=t.device)).round().long()

    def q_mean_variance(self, x_start: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start)
        return mean, (1 - self._at("alphas_cumprod", t, x_start)).expand_as(x_start), log_variance

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """x_t from x_0 and noise (drawn when absent)."""
        noise = th.randn_like(x_start) if noise is None else noise
        shapes = f"noise of shape {tuple(noise.shape)} does not fit x_start, {tuple(x_start.shape)}"
        refuse((noise.shape != x_start.shape, shapes))
        signal, sigma = (self._at(f"sqrt_{name}alphas_cumprod", t, x_start) for name in ("", "one_minus_"))
        return signal * x_start + sigma * noise

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)

    def _predict_xstart_from_eps(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        signal, sigma = (self._at(f"sqrt_{name}_alphas_cumprod", t, x_t) for name in ("recip", "recipm1"))
        return signal * x_t - sigma * eps

    def _predict_xstart_from_xprev(self, x_t: th.Tensor, t: th.Tensor, xprev: th.Tensor) -> th.Tensor:
        return (xprev - self._at("posterior_mean_coef2", t, x_t) * x_t) / self._at("posterior_mean_coef1", t, x_t)

    def _predict_eps_from_xstart(self, x_t: th.Tensor, t: th.Tensor, pred_xstart: th.Tensor) -> th.Tensor:
        if self.no_signal_at_the_end:  # the coefficients below are infinite there
            signal, sigma = (self._at(f"sqrt_{name}alphas_cumprod", t, x_t) for name in ("", "one_minus_"))
            return (x_t - signal * pred_xstart) / sigma
        signal, sigma = (self._at(f"sqrt_{name}_alphas_cumprod", t, x_t) for name in ("recip", "recipm1"))
        return (signal * x_t - pred_xstart) / sigma

    def predict_xstart(self, x: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        """x_0 from x_t and eps."""
        return self._predict_xstart_from_eps(x, t, eps)

    def predict_eps(self, x: th.Tensor, t: th.Tensor, xstart: th.Tensor) -> th.Tensor:
        """eps from x_t and x_0."""
        return self._predict_eps_from_xstart(x, t, xstart)

    def posterior_mean(self, xstart: th.Tensor, x: th.Tensor, t: th.Tensor) -> th.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        return self.q_posterior_mean_variance(x_start=xstart, x_t=x, t=t)[0]

    def xstart_of_mean(self, x: th.Tensor, t: th.Tensor, mean: th.Tensor) -> th.Tensor:
        """The x_0 whose posterior mean is `mean`."""
        return self._predict_xstart_from_xprev(x_t=x, t=t, xprev=mean)
