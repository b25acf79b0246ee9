"""Samplers as pure steps: the classical ones, those of Karras et al., and the table of all.

A sampler is a frozen dataclass whose `step` maps x_t to x_{t-1}. `predict` gives it the network's prediction, that has
its guided form, and `draw` noise; its memory is a value that it returns, so that a step can be taken alone, twice, or
from a notebook. A new sampler is a `Sampler` here and its entry in `SAMPLERS`; the loop that runs them all is in
loop.py, the exponential integrators are in solvers.py.

Symbols: x is x_t [N, C, H, W]; t [N] is the index in the (respaced) process, t = 0 one step of noise; alpha_bar_t is
the share of the variance that is signal: x_t = alpha x_0 + sigma eps, with alpha^2 = alpha_bar_t and sigma^2 = 1 -
alpha_bar_t.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch as th
from torch import Tensor

from ..runtime.errors import UserError, nearest, refuse
from .solvers import (
    DEIS,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2MSDE,
    DPMSolverPP2S,
    DPMSolverPP3MSDE,
    SASolver,
    Solver,
    UniPC,
    recall,
    remember,
)
from .steps import Draw, Level, Predict, Sampler, State, Step, mix, polynomial_weights, predict_at, where_noisy

if TYPE_CHECKING:
    from ..diffusion.methods import SamplingMethods as Process
    from .prediction import Prediction


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Ancestral sampling: x_{t-1} ~ N(mean, variance) (Ho et al. 2020, algorithm 2)."""

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t)
        noise = draw()
        prediction = prediction.guided("mean")
        deviation = th.exp(prediction.out["log_variance"] / 2)
        sample = prediction.out["mean"] + where_noisy(t, x) * deviation * noise
        return prediction.output(sample), None


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (Song et al. 2021, eq. 12); eta = 0 is deterministic, eta = 1 as noisy as ancestral sampling.

    Of order 1 in the step size for eta = 0.

    :param eta: above 1 adds more noise, at most all that there is at the end of the step.
    """

    eta: float = 0.0
    grid: ClassVar[str] = ""

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        now, before = process.alpha_bar(t, x), process.alpha_bar_prev(t, x)
        sigma = self.eta * th.sqrt((1 - before) / (1 - now) * (1 - now / before))  # eq. 16
        sigma = sigma.minimum(th.sqrt(1 - before))
        # where all noise is fresh the difference is 0, and may round to less
        direction = th.sqrt((1 - before - sigma**2).clamp(min=0)) * prediction.eps
        noise = draw()  # drawn also where it is not used: the order of draws is public
        sample = th.sqrt(before) * prediction.pred_xstart + direction + where_noisy(t, x) * sigma * noise
        return prediction.output(sample), None


@dataclass(frozen=True)
class DDIMReverse(Sampler):
    """The deterministic DDIM step backwards, x_t to x_{t+1}: encodes an image as noise (Song et al. 2021, sec. 4.3)."""

    ascending: ClassVar[bool] = True

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t)
        after = process.alpha_bar_next(t, x)
        sample = th.sqrt(after) * prediction.pred_xstart + th.sqrt(1 - after) * prediction.eps
        return prediction.output(sample), None


# Adams-Bashforth weights of eps_t, eps_{t+1}, ... (Liu et al. 2022, eq. 12, and its lower orders)
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class PLMS(Solver):
    """Pseudo linear multistep (Liu et al. 2022): DDIM's step along a combination of the last `order` eps.

    The first step is a pseudo improved Euler step, so the order in the step size is 1 for `order` 1, else 2. Its state
    is the past eps, newest last.
    """

    order: int = 2
    orders: ClassVar[int] = 4
    needs_signal: ClassVar[bool] = True

    @property
    def starting_calls(self) -> int:
        return int(self.order > 1)

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        eps = prediction.eps
        history = (*(state or ()), eps)[-self.order :]
        # whether a single step leads to the image is asked of the device in a first step alone, which waits for it
        if state is None and self.order > 1 and bool((t > 0).any()):
            ahead = self._move(process, x, t, prediction.pred_xstart, eps)
            eps = (eps + predict(ahead, (t - 1).clamp(min=0)).guided("score").eps) / 2
        else:
            weights = ADAMS_BASHFORTH[len(history) - 1]
            eps = sum((w * past for w, past in zip(weights, reversed(history), strict=True)), th.zeros_like(x))
        moved = self._move(process, x, t, process.predict_xstart(x, t, eps), eps)
        sample = th.where(where_noisy(t, x), moved, prediction.pred_xstart)
        return prediction.output(sample) | {"old_eps": list(history)}, history

    @staticmethod
    def _move(process: Process, x: Tensor, t: Tensor, xstart: Tensor, eps: Tensor) -> Tensor:
        """DDIM's step with eta = 0 along a given eps."""
        before = process.alpha_bar_prev(t, x)
        return th.sqrt(before) * xstart + th.sqrt(1 - before) * eps


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method with churn: noise added before each step (Karras et al. 2022, algorithm 2 up to line 8).

    Without churn it is DDIM with eta = 0, and of order 1. (The grid karras is for noise that ends at sigma / alpha =
    80, and that of the schedules here goes on.)

    :param churn: S_churn, how much noise is added over all steps: 0 none; sigma grows by up to 41 % per step.
    :param churn_min: sigma / alpha below which none is added, their S_tmin; `churn_max` that above which, S_tmax.
    :param churn_noise: deviation of the noise added, their S_noise.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    needs_signal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        nothing = not self.churn_max >= self.churn_min
        fault = f"churn_max {self.churn_max} is below churn_min {self.churn_min}: nothing would be churned"
        refuse((nothing, fault))

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction, _, _ = self._noisier(process, predict, x, t, draw)
        return prediction.output(self._along(process.at(t - 1, x), prediction)), None

    @staticmethod
    def _along(end: Level, prediction: Prediction) -> Tensor:
        """Where a straight line along a prediction ends: line 8."""
        return mix((end.alpha, prediction.pred_xstart), (end.sigma, prediction.eps))

    def _noisier(
        self, process: Process, predict: Predict, x: Tensor, t: Tensor, draw: Draw
    ) -> tuple[Prediction, Tensor, Level]:
        """Lines 4 to 7: the prediction after the churn, x there, and its level, no noisier than the process is."""
        now = process.at(t, x)
        if not self.churn:
            return predict(x, t).guided("score"), x, now
        most = process.at(th.full_like(t, process.num_timesteps - 1), x).ratio
        grown = now.ratio * (1 + min(self.churn / process.num_timesteps, 2**0.5 - 1))
        churned = (now.ratio >= self.churn_min) & (now.ratio <= self.churn_max)
        ratio = th.where(churned, grown, now.ratio).minimum(most)
        level = Level.at_lam(-th.log(ratio))
        added = self.churn_noise * th.sqrt((ratio**2 - now.ratio**2).clamp(min=0))
        x = mix((level.alpha / now.alpha, x), (level.alpha * added, draw()))
        return predict_at(process, predict, x, level), x, level


@dataclass(frozen=True)
class Heun(Euler):
    """Heun's method with churn (Karras et al. 2022, algorithm 2). Of order 2 without churn."""

    stages: ClassVar[int] = 2
    last_step = Euler.step

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction, x, now = self._noisier(process, predict, x, t, draw)
        end = process.at(t - 1, x)
        euler = self._along(end, prediction)
        ahead = predict(euler, (t - 1).clamp(min=0)).guided("score")
        slope = (prediction.eps + ahead.eps) / 2  # lines 10 and 11
        heun = mix((end.alpha / now.alpha, x), (end.alpha * (end.ratio - now.ratio), slope))
        return prediction.output(heun.where(where_noisy(t, x), euler)), None  # line 9


@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """Euler's method to below the next noise level, and noise up to it: in these variables, DDIM, with eta = 1."""

    eta: float = 1.0
    grid: ClassVar[str] = "logsnr"


@dataclass(frozen=True)
class LMS(Solver):
    """Linear multistep in sigma / alpha: the polynomial through the last `order` eps (Adams-Bashforth on any grid).

    The first steps have fewer eps to go by, so the order in the step size is 1 for `order` 1, else 2.
    """

    order: int = 4
    orders: ClassVar[int] = 4
    needs_signal: ClassVar[bool] = True

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        now, end = process.at(t, x), process.at(t - 1, x)
        history, ratios = recall(state, prediction.eps, now.ratio, self.order)
        change = end.ratio - now.ratio
        nodes = [(ratio - now.ratio) / change for ratio in ratios]
        weights = polynomial_weights(nodes, [th.full_like(change, 1 / (k + 1)) for k in range(len(nodes))])
        steps = ((end.alpha * change * weight, eps) for weight, eps in zip(weights, history, strict=True))
        sample = mix((end.alpha / now.alpha, x), *steps).where(where_noisy(t, x), prediction.pred_xstart)
        return prediction.output(sample), remember(history, ratios)


SAMPLERS: dict[str, type[Any]] = {  # a `Sampler` each, by the name that users write
    "ddpm": Ancestral,
    "ddim": DDIM,
    "ddim_reverse": DDIMReverse,
    "plms": PLMS,
    "dpm++2m": DPMSolverPP2M,
    "dpm++2m_sde": DPMSolverPP2MSDE,
    "dpm++2s": DPMSolverPP2S,
    "dpm++3m_sde": DPMSolverPP3MSDE,
    "dpm2": DPMSolver2,
    "dpm3": DPMSolver3,
    "unipc": UniPC,
    "deis": DEIS,
    "sa": SASolver,
    "heun": Heun,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "lms": LMS,
}


# what else k-diffusion, diffusers and stable-diffusion-webui call them, as `_plain` writes it
ALIASES = {
    "ddiminverse": "ddim_reverse",
    "deismultistep": "deis",
    "dpmsolvermultistep": "dpm++2m",
    "dpmsolversinglestep": "dpm++2s",
    "eulera": "euler_ancestral",
    "pndm": "plms",
    "sasolver": "sa",
    "unipcbh2": "unipc",
    "unipcmultistep": "unipc",
}


def _plain(name: str) -> str:
    """A sampler's name in small letters and digits, without the words that other libraries put around it."""
    word = re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
    return word.removeprefix("sample").removesuffix("scheduler").removesuffix("discrete").removeprefix("k")


def _named(name: str) -> str:
    """The key in `SAMPLERS` of a name, which may be another library's."""
    known = {**{_plain(key): key for key in SAMPLERS}, **ALIASES}
    word = _plain(name)
    if name in SAMPLERS or word in known:
        return name if name in SAMPLERS else known[word]
    hint = nearest(name, SAMPLERS)
    if word.removesuffix("karras") in known:
        hint = f"; karras is a grid of steps: use {known[word.removesuffix('karras')]} on the grid 'karras20'"
    raise UserError(f"sampler {name!r} is unknown: use one of {', '.join(SAMPLERS)}{hint}")


def make_sampler(name: str | Sampler, **options: Any) -> Sampler:
    """The sampler called `name`, e.g. ``make_sampler("ddim", eta=0.5)``; a sampler itself is returned as it is.

    :param name: in `SAMPLERS`, or as k-diffusion, diffusers or stable-diffusion-webui have it ("dpmpp_2m", "Euler a").
    """
    if not isinstance(name, str):
        if not isinstance(name, Sampler) or options:
            raise TypeError(f"a sampler must be a name, or a Sampler of sampling.steps with its options, got {name!r}")
        return name
    name = _named(name)
    known = [spec.name for spec in fields(SAMPLERS[name])]
    for option in sorted(set(options) - set(known)):
        takers = [other for other, kind in SAMPLERS.items() if option in kind.__dataclass_fields__]
        hint = f"it is an option of {', '.join(takers)}" if takers else f"it takes {', '.join(known) or 'none'}"
        raise UserError(f"the sampler {name} has no option {option}: {hint}")
    sampler: Sampler = SAMPLERS[name](**options)
    return sampler
