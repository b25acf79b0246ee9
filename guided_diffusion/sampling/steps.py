"""What a step of a sampler is made of: the protocols between samplers, guidance and process, and noise levels.

Symbols: x is x_t [N, C, H, W] = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1; lambda = log(alpha / sigma); t [N] is
an index of the (respaced) process, where t = 0 is one step of noise, t = -1 the image; tau [N] is a real timestep of
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import torch as th
import torch.nn.functional as F

from .schedules import NO_SIGNAL

State = tuple[th.Tensor, ...] | None
Draw = Callable[[], th.Tensor]
Generators = th.Generator | Sequence[th.Generator] | None


class StepOutput(TypedDict):
    """What a step yields: x_{t-1}, the network's own x_0 and, in a guided step, the guided x_0.

    guided_outside: share of values [N] of the guided x_0 that lay far outside of [-1, 1] before it was clipped, where
        predictions are clipped and the sampler is guided by the score.
    """

    sample: th.Tensor
    pred_xstart: th.Tensor
    pred_xstart_guided: NotRequired[th.Tensor]
    guided_outside: NotRequired[th.Tensor]
    old_eps: NotRequired[list[th.Tensor]]


class Level(NamedTuple):
    """A noise level: x = alpha x_0 + sigma eps. Both are [N, 1, ...], in float64 where the device has it."""

    alpha: th.Tensor
    sigma: th.Tensor

    @property
    def lam(self) -> th.Tensor:
        """lambda = log(alpha / sigma): infinite for the image itself, NO_SIGNAL where alpha is 0."""
        return (th.log(self.alpha) - th.log(self.sigma)).clamp(min=NO_SIGNAL)

    @property
    def ratio(self) -> th.Tensor:
        """sigma / alpha, the noise that Karras et al. 2022 call sigma."""
        return self.sigma / self.alpha

    @classmethod
    def at_lam(cls, lam: th.Tensor) -> Level:
        """The level of a given lambda."""
        return cls(th.sigmoid(2 * lam).sqrt(), th.sigmoid(-2 * lam).sqrt())

    @classmethod
    def at_ratio(cls, ratio: th.Tensor) -> Level:
        """The level of a given sigma / alpha."""
        return cls.at_lam(-th.log(ratio))

    @property
    def log_alpha_bar(self) -> th.Tensor:
        """2 log alpha, what a process calls the level."""
        return F.logsigmoid(2 * self.lam)


class Prediction(Protocol):
    """What the network says at (x, t)."""

    @property
    def mean(self) -> th.Tensor: ...
    @property
    def log_variance(self) -> th.Tensor: ...
    @property
    def pred_xstart(self) -> th.Tensor: ...
    @property
    def eps(self) -> th.Tensor: ...
    def guided(self, rule: str) -> Prediction: ...
    def output(self, sample: th.Tensor) -> StepOutput: ...


Predict = Callable[[th.Tensor, th.Tensor], Prediction]


class Process(Protocol):
    """What samplers, guidance and the loop need of a diffusion process; t is an index or a real timestep of training.

    num_timesteps: T, the steps of this process.
    timestep_map, original_num_steps: the timesteps that a network knows them by, and how many it was trained with.
    no_signal_at_the_end: whether alpha_bar is 0 at T-1.
    """

    num_timesteps: int

    @property
    def timestep_map(self) -> list[Any]: ...
    @property
    def original_num_steps(self) -> int: ...
    @property
    def no_signal_at_the_end(self) -> bool: ...

    def alpha_bar(self, t: th.Tensor, like: th.Tensor) -> th.Tensor: ...
    def alpha_bar_prev(self, t: th.Tensor, like: th.Tensor) -> th.Tensor: ...
    def alpha_bar_next(self, t: th.Tensor, like: th.Tensor) -> th.Tensor: ...
    def at(self, t: th.Tensor, like: th.Tensor) -> Level: ...
    def tau(self, level: th.Tensor) -> th.Tensor: ...
    def timesteps(self, t: th.Tensor, like: th.Tensor) -> th.Tensor: ...
    def predict_xstart(self, x: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor: ...
    def predict_eps(self, x: th.Tensor, t: th.Tensor, xstart: th.Tensor) -> th.Tensor: ...
    def posterior_mean(self, xstart: th.Tensor, x: th.Tensor, t: th.Tensor) -> th.Tensor: ...
    def xstart_of_mean(self, x: th.Tensor, t: th.Tensor, mean: th.Tensor) -> th.Tensor: ...
    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor: ...
    def predictor(
        self,
        model: Any,
        *,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Callable[..., Any] | None = None,
        cond_fn_with_grad: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        clip_guided: bool | None = None,
    ) -> Predict: ...
    def take_step(
        self,
        sampler: Sampler,
        model: Any,
        x: th.Tensor,
        t: th.Tensor,
        state: Any,
        *,
        draw: Draw | None = None,
        cond_fn_with_grad: bool = False,
        **options: Any,
    ) -> tuple[StepOutput, Any]: ...


class Sampler(Protocol):
    """One step of a sampler: x_t and the sampler's memory to x_{t-1} and its memory, None at the start.

    A sampler may say more of itself in class attributes: `grid`, the prefix of its own step grid; `stages`, how often
    a step asks the network (the last one, to the image, asks once); `starting_calls`, what the first step asks beyond
    that; `needs_signal`, that it cannot start where alpha_bar is 0; `ascending`, that it goes from the image to noise.
    """

    def step(
        self, process: Any, predict: Predict, x: th.Tensor, t: th.Tensor, state: State, draw: Draw
    ) -> tuple[StepOutput, State]: ...


def same_index(index: int, count: int, device: th.device) -> th.Tensor:
    """t [N] for images all at one step; it remembers the number, since to ask a GPU for it would be to wait for it."""
    t = th.full((count,), index, device=device)
    t._index = index  # type: ignore[attr-defined]
    return t


def ends_noisy(t: th.Tensor) -> bool:
    """Whether a step at t ends, for any of the images, before the image itself."""
    index = getattr(t, "_index", None)
    return bool((t > 0).any()) if index is None else index > 0


def where_noisy(t: th.Tensor, x: th.Tensor) -> th.Tensor:
    """True [N, 1, ...] where t > 0: the last step goes to the image and adds no noise."""
    return (t > 0).view(-1, *[1] * (x.ndim - 1))


def mix(*terms: tuple[th.Tensor, th.Tensor]) -> th.Tensor:
    """The sum of coefficient * tensor, in the tensors' dtype: coefficients stay in float64 until here."""
    parts = [coefficient.to(value.dtype) * value for coefficient, value in terms]
    return sum(parts[1:], parts[0])


def polynomial_weights(nodes: Sequence[th.Tensor], moments: Sequence[th.Tensor]) -> tuple[th.Tensor, ...]:
    """w_i such that sum_i w_i f(nodes_i) is an integral of f, exactly for polynomials of degree < len(nodes).

    :param moments: that integral of 1, s, s^2, ...; all are [N, 1, ...].
    """
    powers = th.stack([th.stack([node**k for node in nodes], dim=-1) for k in range(len(nodes))], dim=-2)
    # solve() would wait for the device, to raise an error where nodes coincide: weights are then not finite
    solution, _ = th.linalg.solve_ex(powers, th.stack(list(moments), dim=-1))
    weights: tuple[th.Tensor, ...] = solution.unbind(-1)
    return weights


def predict_at(process: Process, predict: Predict, x: th.Tensor, level: Level) -> Prediction:
    """What the network says, guided by the score, at a noise level between those of the process."""
    tau = process.tau(level.log_alpha_bar).flatten()
    return predict(x, tau.to(x.dtype if x.dtype == th.float64 else th.float32)).guided("score")


def refuse_negative(**options: float) -> None:
    """:raises ValueError: naming the first option that is no number from 0 on."""
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value} is not a number from 0 on")


def refuse_order(sampler: str, order: int, most: int) -> None:
    """:raises ValueError: for an order that the sampler does not have."""
    if order not in range(1, most + 1):
        known = ", ".join(map(str, range(1, most)))
        raise ValueError(f"{sampler} order {order} is unknown: use {known} or {most}")
