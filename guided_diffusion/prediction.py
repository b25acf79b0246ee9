"""What the network says at a noisy image, and the two rules for what the gradient of a guide makes of it.

"mean" shifts the mean of the ancestral step by variance * gradient (Sohl-Dickstein et al. 2015; Dhariwal & Nichol 2021,
algorithm 1). "score" shifts the score, that is eps -= sqrt(1 - alpha_bar) * gradient (Song et al. 2021; Dhariwal &
Nichol 2021, algorithm 2), for every other sampler. The gradient is that of a log-probability at the noisy image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NotRequired, TypedDict, cast

import torch as th

from .steps import Process, StepOutput, mix

Gradient = Callable[[], th.Tensor | None]
CondFn = Callable[..., th.Tensor | None]


class MeanVariance(TypedDict):
    """p(x_{t-1} | x_t) as the network sees it, and the x_0 behind it; all [N, C, H, W].

    timesteps: what the network was fed [N]; there for a cond_fn that sees the graph through it.
    """

    mean: th.Tensor
    variance: th.Tensor
    log_variance: th.Tensor
    pred_xstart: th.Tensor
    timesteps: NotRequired[th.Tensor]


def shift_mean(
    process: Process, out: MeanVariance, x: th.Tensor, t: th.Tensor, gradient: th.Tensor | None
) -> MeanVariance:
    """Rule "mean": the mean moves by variance * gradient; pred_xstart is the x_0 that has this posterior mean."""
    if gradient is None:
        return out
    mean = out["mean"].to(x.dtype) + out["variance"] * gradient.to(x.dtype)
    return {**out, "mean": mean, "pred_xstart": process.xstart_of_mean(x, t, mean)}


def shift_score(
    process: Process, out: MeanVariance, x: th.Tensor, t: th.Tensor, gradient: th.Tensor | None
) -> MeanVariance:
    """Rule "score": eps loses sqrt(1 - alpha_bar) * gradient; x_0 and mean follow, and x_0 is not clipped again."""
    if gradient is None:
        return out
    if process.no_signal_at_the_end:  # eps says nothing of x_0 there, and there is nothing to guide
        level = process.at(t, x)
        slope = (level.sigma**2 / level.alpha).masked_fill(level.alpha == 0, 0.0)
        xstart = out["pred_xstart"] + mix((slope, gradient.to(x.dtype)))
    else:
        eps = process.predict_eps(x, t, out["pred_xstart"]) - th.sqrt(1 - process.alpha_bar(t, x)) * gradient
        xstart = process.predict_xstart(x, t, eps)
    return {**out, "mean": process.posterior_mean(xstart, x, t), "pred_xstart": xstart}


RULES = {"mean": shift_mean, "score": shift_score}


class Prediction:
    """What the network says at (x, t), and on demand what guidance makes of it.

    The gradient is asked for in `guided` and not before, so that a step may draw its noise in between.

    :param gradient: computes the gradient [N, C, H, W]; None where there is no guidance.
    :param own: the prediction before guidance, where this one is guided.
    """

    def __init__(
        self,
        process: Process,
        x: th.Tensor,
        t: th.Tensor,
        out: MeanVariance,
        *,
        gradient: Gradient | None = None,
        own: MeanVariance | None = None,
    ) -> None:
        self.process, self.x, self.t, self.out, self.gradient, self.own = process, x, t, out, gradient, own
        self.mean, self.log_variance, self.pred_xstart = out["mean"], out["log_variance"], out["pred_xstart"]

    @property
    def eps(self) -> th.Tensor:
        """The noise that belongs to pred_xstart."""
        return self.process.predict_eps(self.x, self.t, self.pred_xstart)

    def guided(self, rule: str) -> Prediction:
        """The prediction after guidance by rule "mean" or "score"; itself where there is no guidance."""
        gradient = None if self.gradient is None else self.gradient()
        if gradient is None:
            return self
        out = RULES[rule](self.process, self.out, self.x, self.t, gradient)
        return Prediction(self.process, self.x, self.t, out, own=self.out)

    def output(self, sample: th.Tensor) -> StepOutput:
        """What the step yields: `pred_xstart` is the network's own, the guided one comes beside it."""
        if self.own is None:
            return {"sample": sample, "pred_xstart": self.pred_xstart}
        return {"sample": sample, "pred_xstart": self.own["pred_xstart"], "pred_xstart_guided": self.pred_xstart}


def detached(out: MeanVariance) -> MeanVariance:
    """The same values without their graph."""
    return cast(MeanVariance, {name: value.detach() for name, value in cast(dict[str, th.Tensor], out).items()})
