"""The network's prediction at a noisy image, and the two rules by which the gradient of a cond_fn changes it.

"mean" shifts the mean of the ancestral step by variance * gradient (Sohl-Dickstein et al. 2015; Dhariwal & Nichol 2021,
algorithm 1). "score" shifts the score, that is eps -= sqrt(1 - alpha_bar) * gradient (Song et al. 2021; Dhariwal &
Nichol 2021, algorithm 2), for every other sampler. The gradient is that of a log-probability at the noisy image.

Rule "score" moves x_0 by sigma^2 / alpha * gradient. Where next to no signal is left, that is thousands for the
gradient of any trained classifier, so that the guided x_0 has to be clipped as the network's own is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import torch as th

from .steps import StepOutput, mix

if TYPE_CHECKING:
    from ..diffusion.methods import SamplingMethods as Process

CondFn = Callable[..., th.Tensor | None]

FAR_OUTSIDE = 1.5  # size of a value of x_0 that counts as outside of [-1, 1]: predictions rightly lie on its ends


class MeanVariance(TypedDict):
    """p(x_{t-1} | x_t) as the network sees it, and the x_0 behind it; all [N, C, H, W].

    timesteps: what the network was fed [N]; there for a cond_fn that sees the graph through it.
    """

    mean: th.Tensor
    variance: th.Tensor
    log_variance: th.Tensor
    pred_xstart: th.Tensor
    timesteps: NotRequired[th.Tensor]


def sees_denoiser(cond_fn: CondFn | None) -> bool:
    """Whether a cond_fn is called with the graph through the network."""
    return bool(getattr(cond_fn, "through_denoiser", False))


@dataclass(frozen=True)
class Bounds:
    """What is done to a prediction of x_0: `denoised_fn`, then clipping to [-1, 1].

    :param guided: to the guided prediction of rule "score" too; None is True.
    """

    clip: bool = True
    denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None
    guided: bool | None = None

    def __call__(self, xstart: th.Tensor) -> th.Tensor:
        xstart = xstart if self.denoised_fn is None else self.denoised_fn(xstart)
        return xstart.clamp(-1, 1) if self.clip else xstart


UNBOUNDED = Bounds(clip=False)


def shift_mean(out: MeanVariance, x: th.Tensor, gradient: th.Tensor | None) -> th.Tensor:
    """The mean after rule "mean": it moves by variance * gradient."""
    if gradient is None:
        return out["mean"]
    return out["mean"].to(x.dtype) + out["variance"] * gradient.to(x.dtype)


def shift_score(
    process: Process, out: MeanVariance, x: th.Tensor, t: th.Tensor, gradient: th.Tensor | None
) -> MeanVariance:
    """The prediction after rule "score": eps loses sqrt(1 - alpha_bar) * gradient; x_0, unclipped, and mean follow."""
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


def apply_rule(
    process: Process,
    rule: str,
    out: MeanVariance,
    x: th.Tensor,
    t: th.Tensor,
    *,
    cond_fn: CondFn,
    model_kwargs: dict[str, Any] | None,
    with_grad: bool = False,
) -> MeanVariance | None:
    """The prediction after the process's method for a rule; None where there is no guidance."""
    before = dict(out)
    condition = getattr(process, f"condition_{rule}{'_with_grad' if with_grad else ''}")
    guided = condition(cond_fn, out, x, t, model_kwargs=model_kwargs)
    if rule == "mean":
        same = guided is before["mean"]
        guided = out if same else {**out, "mean": guided, "pred_xstart": process.xstart_of_mean(x, t, guided)}
    return None if all(guided.get(name) is value for name, value in before.items()) else guided


@dataclass
class Prediction:
    """The network's prediction at (x, t), and on demand the guided one.

    The gradient is asked for in `guided` and not before, so that a step may draw its noise in between.

    :param guide: rule -> the guided prediction, or None where nothing changes; None for no guidance at all.
    :param bounds: of predictions of x_0, which `out` has been through.
    :param unguided: the prediction before guidance, where this one is guided.
    :param outside: share of values [N] that guidance by rule "score" moved out of the range, before they are clipped.
    """

    process: Process
    x: th.Tensor
    t: th.Tensor
    out: MeanVariance
    guide: Callable[[str], MeanVariance | None] | None = None
    bounds: Bounds = UNBOUNDED
    unguided: MeanVariance | None = None
    outside: th.Tensor | None = None

    @property
    def pred_xstart(self) -> th.Tensor:
        """The prediction of x_0."""
        return self.out["pred_xstart"]

    @property
    def eps(self) -> th.Tensor:
        """The noise that belongs to pred_xstart."""
        return self.process.predict_eps(self.x, self.t, self.pred_xstart)

    def guided(self, rule: str) -> Prediction:
        """The prediction after guidance by rule "mean" or "score"; itself where there is no guidance."""
        out, outside = None if self.guide is None else self.guide(rule), None
        if out is None:
            return self
        if rule == "score" and (self.bounds.clip or self.bounds.denoised_fn is not None):
            outside = (out["pred_xstart"].detach().abs() > FAR_OUTSIDE).flatten(1).float().mean(dim=1)
            if self.bounds.guided is not False:
                xstart = self.bounds(out["pred_xstart"])
                mean = self.process.posterior_mean(xstart, self.x, self.t)
                out = {**out, "mean": mean, "pred_xstart": xstart}
        return Prediction(self.process, self.x, self.t, out, unguided=self.out, outside=outside)

    def output(self, sample: th.Tensor) -> StepOutput:
        """The output of the step: `pred_xstart` is the network's own, the guided one comes beside it."""
        if self.unguided is None:
            return {"sample": sample, "pred_xstart": self.pred_xstart}
        output: StepOutput = {"sample": sample, "pred_xstart": self.unguided["pred_xstart"]}
        output["pred_xstart_guided"] = self.pred_xstart
        if self.outside is not None:
            output["guided_outside"] = self.outside
        return output


def detached(out: MeanVariance) -> MeanVariance:
    """The same values without their graph."""
    return cast(MeanVariance, {k: v.detach() if isinstance(v, th.Tensor) else v for k, v in out.items()})
