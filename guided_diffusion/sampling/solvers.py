"""Solvers that treat the linear part exactly: DPM-Solver, DPM-Solver++, UniPC, DEIS, SA-Solver.

With lambda = log(alpha / sigma), D the prediction of x_0 and eps that of the noise, the probability flow from a level
(alpha, sigma) to one that is h larger in lambda, (alpha', sigma'), is

    x' = sigma'/sigma x + alpha' int_0^h e^(v - h) D dv                   (1; Lu et al. 2022b, eq. 8)
    x' = alpha'/alpha x - sigma' int_0^h e^(h - v) eps dv                 (2; Lu et al. 2022a, eq. 3.4)

and, with the noise of an SDE of strength eta and z ~ N(0, 1) (Xue et al. 2023, eq. 8, where eta is tau^2),

    x' = sigma'/sigma e^(-eta h) x + alpha' int_0^h (1 + eta) e^((1 + eta)(v - h)) D dv
         + sigma' sqrt(1 - e^(-2 eta h)) z                                (3)

The solvers differ in the polynomial in lambda that stands for D or eps, and in where it is asked for. All take one step
to the image, where h is infinite, along D or eps alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch as th
from torch import Tensor

from ..runtime.errors import UserError
from .steps import Draw, Level, Predict, Sampler, State, Step, mix, polynomial_weights, predict_at, where_noisy

if TYPE_CHECKING:
    from ..diffusion.methods import SamplingMethods as Process
    from .prediction import Prediction


def integral(
    now: Level, end: Level, values: Sequence[Tensor], lams: Sequence[Tensor], *, rate: float, halved: bool = False
) -> Tensor:
    """int_0^h rate e^(rate (v - h)) p(v) dv for the polynomial p through `values` at `lams`; values[0] is at `now`.

    :param halved: with two values, p's value in the middle of the step in place of p, which is of the same order.
    """
    h = end.lam - now.lam
    moments = [-th.expm1(-rate * h).masked_fill(-rate * h == th.inf, 0.0)]  # infinite is what `noise_step` replaces
    if len(values) == 1:
        return mix((moments[0], values[0]))
    last = h.isinf()
    h = h.masked_fill(last, 1.0)
    nodes = [(lam - now.lam) / h for lam in lams]
    if halved and len(values) == 2:
        share = (0.5 / nodes[1]).masked_fill(last, 0.0)
        return mix((moments[0] * (1 - share), values[0]), (moments[0] * share, values[1]))
    for k in range(1, len(values)):
        moments.append(1 - k / (rate * h) * moments[-1])
    weights = polynomial_weights(nodes, moments)
    first = [w.masked_fill(last, 0.0) for w in weights[1:]]
    return mix(*zip([th.where(last, moments[0], weights[0]), *first], values, strict=True))


def data_step(
    now: Level,
    end: Level,
    x: Tensor,
    values: Sequence[Tensor],
    lams: Sequence[Tensor],
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    halved: bool = False,
) -> Tensor:
    """Equation (3), and (1) where eta is 0, with the polynomial through predictions of x_0."""
    shrink = end.sigma * now.alpha / (end.alpha * now.sigma)  # e^-h
    drift = integral(now, end, values, lams, rate=1 + eta, halved=halved)
    terms = [(end.sigma / now.sigma * shrink**eta, x), (end.alpha, drift)]
    return mix(*terms) if noise is None else mix(*terms, (end.sigma * th.sqrt(1 - shrink ** (2 * eta)), noise))


def noise_step(now: Level, end: Level, x: Tensor, values: Sequence[Tensor], lams: Sequence[Tensor]) -> Tensor:
    """Equation (2) with the polynomial through predictions of eps; to the image, along the first of them."""
    first = mix((end.alpha / now.alpha, x), (end.sigma - end.alpha * now.ratio, values[0]))
    if len(values) == 1:
        return first
    drift = integral(now, end, values, lams, rate=-1.0)
    return mix((end.alpha / now.alpha, x), (end.sigma, drift)).where(end.sigma > 0, first)


def recall(state: State, newest: Tensor, lam: Tensor, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions and their lambdas, newest first, at most so many; a state is value, lambda, value, lambda, ..."""
    past = (newest, lam, *(state or ()))[: 2 * most]
    return list(past[::2]), list(past[1::2])


def remember(values: Sequence[Tensor], lams: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The state that `recall` reads."""
    return tuple(part for pair in zip(values, lams, strict=True) for part in pair)


class Solver(Sampler):
    """A sampler with numbers from 0 on as options, among them an `order` of 1 to `orders`."""

    grid: ClassVar[str] = "logsnr"
    orders: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "order" and value not in range(1, self.orders + 1):
                known = ", ".join(map(str, range(1, self.orders)))
                raise UserError(f"order {value} of {type(self).__name__} is unknown: use {known} or {self.orders}")
            if not 0 <= value < math.inf and value != getattr(type(self), name):
                raise UserError(f"{name} {value} is not a number from 0 on")


@dataclass(frozen=True)
class DPMSolverPP2M(Solver):
    """DPM-Solver++(2M), multistep (Lu et al. 2022b, algorithm 2): along the last predictions of x_0. Of order 2."""

    points: ClassVar[int] = 2  # predictions that a step goes by

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        return self._along(process, predict(x, t).guided("score"), x, t, state)

    def _along(
        self, process: Process, prediction: Prediction, x: Tensor, t: Tensor, state: State, **noise: Any
    ) -> Step:
        now, end = process.at(t, x), process.at(t - 1, x)
        values, lams = recall(state, prediction.pred_xstart, now.lam, self.points)
        sample = data_step(now, end, x, values, lams, halved=self.points == 2, **noise)
        return prediction.output(sample), remember(values, lams)


@dataclass(frozen=True)
class DPMSolverPP2MSDE(DPMSolverPP2M):
    """SDE-DPM-Solver++(2M), multistep (Lu et al. 2022b, eq. 18); eta = 0 is DPM-Solver++(2M)."""

    eta: float = 1.0

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        return self._along(process, prediction, x, t, state, eta=self.eta, noise=draw())


@dataclass(frozen=True)
class DPMSolverPP3MSDE(DPMSolverPP2MSDE):
    """SDE-DPM-Solver++(3M), multistep, along the parabola through three predictions of x_0 (Lu et al. 2022b, app. B).

    The published code halves the second difference and so falls back to order 2; here the parabola is exact.
    """

    points: ClassVar[int] = 3


@dataclass(frozen=True)
class DPMSolverPP2S(Solver):
    """DPM-Solver++(2S), singlestep: along the x_0 in the middle (Lu et al. 2022b, algorithm 1). Of order 2."""

    stages: ClassVar[int] = 2
    needs_signal: ClassVar[bool] = True
    target: ClassVar[str] = "pred_xstart"  # what is integrated, and the step along it
    advance: ClassVar[Callable[..., Tensor]] = staticmethod(data_step)

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        now, end = process.at(t, x), process.at(t - 1, x)
        middle = Level.at_lam((now.lam + end.lam) / 2)
        x_middle = self.advance(now, middle, x, [getattr(prediction, self.target)], [now.lam])
        value = getattr(predict_at(process, predict, x_middle, middle), self.target)
        sample = self.advance(now, end, x, [value], [now.lam]).where(where_noisy(t, x), prediction.pred_xstart)
        return prediction.output(sample), None


@dataclass(frozen=True)
class DPMSolver2(DPMSolverPP2S):
    """DPM-Solver-2, singlestep: along the eps in the middle (Lu et al. 2022a, algorithm 1). Of order 2."""

    target: ClassVar[str] = "eps"
    advance: ClassVar[Callable[..., Tensor]] = staticmethod(noise_step)


@dataclass(frozen=True)
class DPMSolver3(Solver):
    """DPM-Solver-3, singlestep (Lu et al. 2022a, algorithm 2, with r1 = 1/3 and r2 = 2/3). Of order 3."""

    stages: ClassVar[int] = 3
    needs_signal: ClassVar[bool] = True

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        now, end = process.at(t, x), process.at(t - 1, x)
        values, lams = [prediction.eps], [now.lam]
        for share in (1 / 3, 2 / 3):
            between = Level.at_lam(now.lam + share * (end.lam - now.lam))
            ahead = predict_at(process, predict, noise_step(now, between, x, values, lams), between)
            values, lams = [values[0], ahead.eps], [now.lam, between.lam]
        sample = noise_step(now, end, x, values, lams).where(where_noisy(t, x), prediction.pred_xstart)
        return prediction.output(sample), None


@dataclass(frozen=True)
class DEIS(Solver):
    """DEIS, multistep: the polynomial through the last `order` eps, integrated exactly (Zhang & Chen 2022, eq. 15).

    The polynomial is in lambda = -log rho, where their tAB-DEIS has it in t. The first steps have fewer predictions to
    go by, so the order in the step size is 1 for `order` 1, else 2.
    """

    order: int = 3
    needs_signal: ClassVar[bool] = True
    orders: ClassVar[int] = 4

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        now, end = process.at(t, x), process.at(t - 1, x)
        values, lams = recall(state, prediction.eps, now.lam, self.order)
        return prediction.output(noise_step(now, end, x, values, lams)), remember(values, lams)


def predict_and_correct(
    process: Process, prediction: Prediction, x: Tensor, t: Tensor, state: State, **options: Any
) -> Step:
    """Take the step that led to x again, now that the prediction at its end is known; then the next one.

    The state begins with where that step started, its noise, and where it led: what was pasted over that since stays.

    :param options: `order`, the number of predictions that a step goes by, and those of `data_step`.
    """
    now, end = process.at(t, x), process.at(t - 1, x)
    order, noise = options.pop("order"), options.pop("noise", None)
    values, lams = recall(state[3:] if state else None, prediction.pred_xstart, now.lam, order + 1)
    if state:
        before, newest_second = process.at(t + 1, x), [1, 0, *range(2, len(values))]
        past = [values[i] for i in newest_second], [lams[i] for i in newest_second]
        corrected = data_step(before, now, state[0], *past, noise=None if noise is None else state[1], **options)
        x = corrected.where(x == state[2], x + corrected - state[2])
    values, lams = values[:order], lams[:order]
    sample = data_step(now, end, x, values, lams, noise=noise, **options)
    return prediction.output(sample), (x, x if noise is None else noise, sample, *remember(values, lams))


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC with B(h) = e^h - 1: predicts a step, corrects it by the next prediction (Zhao et al. 2023, alg. 1 and 2).

    A correction costs no call of the network. Of order 2 for `order` 1, else 3.
    """

    order: int = 2
    orders: ClassVar[int] = 3

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        return predict_and_correct(process, prediction, x, t, state, order=self.order, halved=True)


@dataclass(frozen=True)
class SASolver(Solver):
    """SA-Solver, stochastic Adams: a step and its correction have the same noise (Xue et al. 2023, algorithm 1).

    With eta = 0 of order 2 for `order` 1, else 3.

    :param eta: their tau^2: 0 is deterministic, 1 the reverse SDE.
    """

    order: int = 2
    eta: float = 1.0
    orders: ClassVar[int] = 3

    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        prediction = predict(x, t).guided("score")
        return predict_and_correct(process, prediction, x, t, state, order=self.order, eta=self.eta, noise=draw())
