"""How a gradient changes a prediction, and makers of the functions that give the gradient.

A cond_fn returns the gradient of a log-probability at the noisy image: (x, timesteps, **model_kwargs) -> [N, C, H, W].
There are two rules for what it does to a prediction. "mean" shifts the mean of the ancestral step by
variance * gradient (Sohl-Dickstein et al. 2015; Dhariwal & Nichol 2021, algorithm 1). "score" shifts the score, that is
eps -= sqrt(1 - alpha_bar) * gradient (Song et al. 2021; Dhariwal & Nichol 2021, algorithm 2), for every other sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, cast

import torch as th
import torch.nn.functional as F

from guided_diffusion.samplers import Process, StepOutput

Gradient = Callable[[], th.Tensor]
CondFn = Callable[..., th.Tensor]


class MeanVariance(TypedDict):
    """p(x_{t-1} | x_t) as the network sees it, and the x_0 behind it; all [N, C, H, W]."""

    mean: th.Tensor
    variance: th.Tensor
    log_variance: th.Tensor
    pred_xstart: th.Tensor


def shift_mean(process: Process, out: MeanVariance, x: th.Tensor, t: th.Tensor, gradient: th.Tensor) -> MeanVariance:
    """Rule "mean": the mean moves by variance * gradient; pred_xstart is the x_0 that has this posterior mean."""
    mean = out["mean"].to(x.dtype) + out["variance"] * gradient.to(x.dtype)
    return {**out, "mean": mean, "pred_xstart": process.xstart_of_mean(x, t, mean)}


def shift_score(process: Process, out: MeanVariance, x: th.Tensor, t: th.Tensor, gradient: th.Tensor) -> MeanVariance:
    """Rule "score": eps loses sqrt(1 - alpha_bar) * gradient; x_0 and mean follow, and x_0 is not clipped again."""
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
        if self.gradient is None:
            return self
        out = RULES[rule](self.process, self.out, self.x, self.t, self.gradient())
        return Prediction(self.process, self.x, self.t, out, own=self.out)

    def output(self, sample: th.Tensor) -> StepOutput:
        """What the step yields: `pred_xstart` is the network's own, the guided one comes beside it."""
        if self.own is None:
            return {"sample": sample, "pred_xstart": self.pred_xstart}
        return {"sample": sample, "pred_xstart": self.own["pred_xstart"], "pred_xstart_guided": self.pred_xstart}


def detached(out: MeanVariance) -> MeanVariance:
    """The same values without their graph."""
    return cast(MeanVariance, {name: value.detach() for name, value in cast(dict[str, th.Tensor], out).items()})


# ---- makers of cond_fns, and of networks that a sampler can call


def classifier_guidance(classifier: Callable[[th.Tensor, th.Tensor], th.Tensor], scale: float) -> CondFn:
    """scale * grad log p(y | x_t) of a classifier of noisy images (Dhariwal & Nichol 2021, sec. 4.1).

    :param classifier: (x, timesteps) -> logits [N, K].
    :param scale: 1 is Bayes' rule for an unconditional model; larger trades diversity for fidelity.
    """

    def cond_fn(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None, **_: Any) -> th.Tensor:
        if y is None:
            raise ValueError('classifier guidance needs labels: give model_kwargs={"y": labels}')
        if scale == 0:
            return th.zeros_like(x)
        with th.enable_grad():
            x = x.detach().requires_grad_()
            log_likelihood = -F.cross_entropy(classifier(x, timesteps).float(), y.view(-1), reduction="sum")
            return scale * th.autograd.grad(log_likelihood, x)[0]

    return cond_fn


def without_labels(model: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """An unconditional network that may be called with labels, which only the classifier then sees."""

    def unconditional(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None, **kwargs: Any) -> th.Tensor:
        return model(x, timesteps, **kwargs)

    return unconditional
