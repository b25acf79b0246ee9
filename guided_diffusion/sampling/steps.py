"""What samplers share: the `Sampler` base class, noise levels, and the weights of polynomials.

Symbols: x is x_t [N, C, H, W] = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1; lambda = log(alpha / sigma); t [N] is
an index of the (respaced) process, where t = 0 is one step of noise, t = -1 the image; tau [N] is a real timestep of
training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, NotRequired, TypedDict

import torch as th
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..diffusion.methods import SamplingMethods as Process
    from .prediction import Prediction

State = tuple[Tensor, ...] | None
Draw = Callable[[], Tensor]
Predict = Callable[[Tensor, Tensor], "Prediction"]
Generators = th.Generator | Sequence[th.Generator] | None
NO_SIGNAL = -20.0  # lambda that stands for alpha_bar = 0 between timesteps: a signal of 2e-9


class StepOutput(TypedDict):
    """What a step yields: x_{t-1}, the network's own x_0 and, in a guided step, the guided x_0.

    guided_outside: share of values [N] of the guided x_0 that lay far outside of [-1, 1] before it was clipped, where
        predictions are clipped and the sampler is guided by the score.
    old_eps: of PLMS, the last eps, newest last.
    """

    sample: Tensor
    pred_xstart: Tensor
    pred_xstart_guided: NotRequired[Tensor]
    guided_outside: NotRequired[Tensor]
    old_eps: NotRequired[list[Tensor]]


Step = tuple[StepOutput, State]  # what a step returns


class Sampler(ABC):
    """One step of a sampler; subclasses are frozen dataclasses whose fields are its options.

    Class attributes that a sampler overrides where they differ for it:

    grid: prefix of the step grid it works best on, as in `respace.GRIDS`; '' is the even and rounded one.
    stages: calls of the network per step, but for the step to the image, which makes one.
    starting_calls: calls that the first step makes beyond those.
    needs_signal: whether it cannot start where alpha_bar is 0; the loop then takes that step by DDIM.
    ascending: whether it goes from the image to noise.
    """

    grid: ClassVar[str] = ""
    stages: ClassVar[int] = 1
    needs_signal: ClassVar[bool] = False
    ascending: ClassVar[bool] = False

    @property
    def starting_calls(self) -> int:
        return 0

    @abstractmethod
    def step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        """The output of the step from x_t to x_{t-1}, and the state that the next step is to be given.

        :param predict: (x, t) -> `prediction.Prediction`.
        :param t: [N], not all the same where images are at different steps.
        :param state: of the step before; None in the first one.
        :param draw: returns new noise like x.
        """

    def last_step(self, process: Process, predict: Predict, x: Tensor, t: Tensor, state: State, draw: Draw) -> Step:
        """The step at t = 0 for all images, in one call of the network: `step` where that makes one, else to x_0."""
        if self.stages == 1:
            return self.step(process, predict, x, t, state, draw)
        prediction = predict(x, t).guided("score")
        return prediction.output(prediction.pred_xstart), None


class Level(NamedTuple):
    """A noise level: x = alpha x_0 + sigma eps. Both are [N, 1, ...], in float64 where the device has it."""

    alpha: Tensor
    sigma: Tensor

    @property
    def lam(self) -> Tensor:
        """lambda = log(alpha / sigma): infinite for the image itself, NO_SIGNAL where alpha is 0."""
        return (th.log(self.alpha) - th.log(self.sigma)).clamp(min=NO_SIGNAL)

    @property
    def ratio(self) -> Tensor:
        """sigma / alpha, the noise that Karras et al. 2022 call sigma."""
        return self.sigma / self.alpha

    @classmethod
    def at_lam(cls, lam: Tensor) -> Level:
        """The level of a given lambda."""
        return cls(th.sigmoid(2 * lam).sqrt(), th.sigmoid(-2 * lam).sqrt())

    @property
    def log_alpha_bar(self) -> Tensor:
        """2 log alpha, what a process calls the level."""
        return F.logsigmoid(2 * self.lam)


def where_noisy(t: Tensor, x: Tensor) -> Tensor:
    """True [N, 1, ...] where t > 0: the last step goes to the image and adds no noise."""
    return (t > 0).view(-1, *[1] * (x.ndim - 1))


def mix(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of coefficient * tensor, in the tensors' dtype: coefficients stay in float64 until here."""
    parts = [coefficient.to(value.dtype) * value for coefficient, value in terms]
    return sum(parts[1:], parts[0])


def polynomial_weights(nodes: Sequence[Tensor], moments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """w_i such that sum_i w_i f(nodes_i) is an integral of f, exactly for polynomials of degree < len(nodes).

    :param moments: that integral of 1, s, s^2, ...; all are [N, 1, ...].
    """
    powers = th.stack([th.stack([node**k for node in nodes], dim=-1) for k in range(len(nodes))], dim=-2)
    # solve() would wait for the device, to raise an error where nodes coincide: weights are then not finite
    solution, _ = th.linalg.solve_ex(powers, th.stack(list(moments), dim=-1))
    weights: tuple[Tensor, ...] = solution.unbind(-1)
    return weights


def predict_at(process: Process, predict: Predict, x: Tensor, level: Level) -> Prediction:
    """The prediction, guided by the score, at a noise level between those of the process."""
    tau = process.tau(level.log_alpha_bar).flatten()
    return predict(x, tau.to(x.dtype if x.dtype == th.float64 else th.float32)).guided("score")
