"""The Gaussian diffusion process: the reverse of the forward process, losses, likelihood, sampling loops.

Symbols, shapes, and what a real t means: as in diffusion/forward_process.py.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch as th

from .config import LOSS_WEIGHTS
from .diffusion.methods import DenoisedFn, Kwargs, Model, SamplingMethods
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .runtime.errors import refuse
from .sampling.prediction import Bounds, CondFn, MeanVariance, Prediction, apply_rule, detached, sees_denoiser
from .sampling.schedules import (
    Array,
    betas_for_alpha_bar as betas_for_alpha_bar,
    get_named_beta_schedule as get_named_beta_schedule,
)
from .sampling.steps import Draw, Predict


class ModelMeanType(enum.Enum):
    """What the network predicts; VELOCITY is alpha eps - sigma x_0 (Salimans & Ho 2022)."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()
    VELOCITY = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of the reverse process comes from; LEARNED_RANGE interpolates between the two fixed ones."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What is minimised; RESCALED_MSE adds the variational bound for a learned variance at a weight of T / 1000."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class Losses(TypedDict, total=False):
    """Loss terms per image [N]; `loss` is the one to minimise, `mse` is not weighted, `vb` is in bits per dimension."""

    loss: th.Tensor
    mse: th.Tensor
    vb: th.Tensor


def _extract_into_tensor(arr: Array, timesteps: th.Tensor, broadcast_shape: Sequence[int]) -> th.Tensor:
    """arr[timesteps] as float32, expanded to `broadcast_shape`."""
    values = th.from_numpy(np.asarray(arr, dtype=np.float32)).to(timesteps.device)[timesteps]
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(tuple(broadcast_shape))


class GaussianDiffusion(SamplingMethods):
    """A diffusion process, the meaning of its network's output, and everything computed from both.

    :param betas: and `rescale_timesteps`, as for `ForwardProcess`.
    :param loss_weight: "min_snr" weighs the squared error at t as min(SNR, min_snr_gamma) does that of x_0 (Hang et
        al. 2023); '' does not weigh. A step without signal, where that is 0, counts as if its SNR were 1: sampling
        starts from it, and it would never be trained.
    :raises ValueError: if the network predicts eps and the last step leaves no signal, or an argument is out of range.
    """

    loss_weight, min_snr_gamma = "", 5.0

    def __init__(
        self,
        *,
        betas: npt.ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        loss_weight: str = "",
        min_snr_gamma: float = 5.0,
    ) -> None:
        super().__init__(betas=betas, rescale_timesteps=rescale_timesteps)
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.loss_weight, self.min_snr_gamma = loss_weight, min_snr_gamma
        blind = self.no_signal_at_the_end and model_mean_type is ModelMeanType.EPSILON
        weight = f"loss_weight {loss_weight!r}"
        refuse(
            (blind, "zero_terminal_snr leaves no signal, and eps says nothing of x_0: use predict_v or predict_xstart"),
            (loss_weight not in LOSS_WEIGHTS, f"{weight} is unknown: use min_snr, or '' for none"),
            (
                loss_weight and loss_type.is_vb(),
                f"{weight} weighs squared errors, and use_kl has none: give one of two",
            ),
            (not min_snr_gamma > 0, f"min_snr_gamma {min_snr_gamma} is not above 0: the usual value is 5"),
        )

    def _mse_weight(self, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """The min-SNR weight of the squared error of what is predicted."""
        snr = self._at("snr", t, like)
        larger_than_of_xstart = {
            ModelMeanType.START_X: th.ones_like(snr),
            ModelMeanType.EPSILON: snr,
            ModelMeanType.VELOCITY: snr + 1,
            ModelMeanType.PREVIOUS_X: self._at("posterior_mean_coef1", t, like) ** 2,
        }
        of_xstart = th.where(snr > 0, snr, 1.0).clamp(max=self.min_snr_gamma)
        return of_xstart / larger_than_of_xstart[self.model_mean_type]

    def p_mean_variance(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        model_kwargs: Kwargs = None,
    ) -> MeanVariance:
        """p(x_{t-1} | x_t) and the prediction of x_0 behind it.

        :param denoised_fn: applied to the prediction of x_0, before it is clipped to [-1, 1].
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        output, log_variance, variance = self._variance(output, x, t)
        xstart = Bounds(clip_denoised, denoised_fn)(self._xstart(output, x, t))
        previous = self.model_mean_type is ModelMeanType.PREVIOUS_X
        mean = output if previous else self.posterior_mean(xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": xstart}

    def _variance(self, output: th.Tensor, x: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The network's output without its variance channels, log-variance, variance."""
        learned = self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        got = tuple(output.shape)
        fault = f"the network returned shape {got} where {expected} is expected: does learn_sigma fit?"
        refuse((got != expected, fault))
        if not learned:
            names = ("posterior_variance", "posterior_log_variance_clipped")
            if self.model_var_type is ModelVarType.FIXED_LARGE:
                names = ("large_variance", "log_large_variance")
            variance, log_variance = (self._at(name, t, x).expand_as(x) for name in names)
            return output, log_variance, variance
        output, values = output.chunk(2, dim=1)
        if self.model_var_type is ModelVarType.LEARNED_RANGE:  # Nichol & Dhariwal 2021, eq. 15
            share = (values + 1) / 2
            small, large_log = self._at("posterior_log_variance_clipped", t, x), self._at("log_betas", t, x)
            values = share * large_log + (1 - share) * small
        return output, values, values.exp()

    def _xstart(self, output: th.Tensor, x: th.Tensor, t: th.Tensor) -> th.Tensor:
        """The prediction of x_0 that the network's output stands for."""
        if self.model_mean_type is ModelMeanType.START_X:
            return output
        if self.model_mean_type is ModelMeanType.EPSILON:
            return self._predict_xstart_from_eps(x_t=x, t=t, eps=output)
        if self.model_mean_type is ModelMeanType.VELOCITY:
            return self._at("sqrt_alphas_cumprod", t, x) * x - self._at("sqrt_one_minus_alphas_cumprod", t, x) * output
        return self.xstart_of_mean(x, t, output)

    def predictor(
        self,
        model: Model,
        *,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: CondFn | None = None,
        cond_fn_with_grad: bool = False,
        model_kwargs: Kwargs = None,
        clip_guided: bool | None = None,
    ) -> Predict:
        """The function (x, t) -> `Prediction` that the steps call; `model_kwargs` is read at every call."""
        options: Any = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "model_kwargs": model_kwargs}
        if cond_fn is None:
            return lambda x, t: Prediction(self, x, t, self.p_mean_variance(model, x, t, **options))
        graph = cond_fn_with_grad or sees_denoiser(cond_fn)
        rule_options: Any = {"cond_fn": cond_fn, "model_kwargs": model_kwargs, "with_grad": graph}
        bounds = Bounds(clip_denoised, denoised_fn, clip_guided)

        def predict(x: th.Tensor, t: th.Tensor) -> Prediction:
            leaf = x.detach().requires_grad_() if graph else x
            with th.set_grad_enabled(graph or th.is_grad_enabled()):
                out = self.p_mean_variance(model, leaf, t, **options)

            def guide(rule: str) -> MeanVariance | None:
                with th.set_grad_enabled(graph or th.is_grad_enabled()):
                    guided = apply_rule(self, rule, out, leaf, t, **rule_options)
                return detached(guided) if graph and guided is not None else guided

            return Prediction(self, x.detach() if graph else x, t, detached(out) if graph else out, guide, bounds)

        return predict

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: th.Tensor,
        x_t: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> dict[str, th.Tensor]:
        """One term of the variational bound [N] in bits per dimension: a KL, and at t = 0 the decoder's likelihood."""
        mean, _, log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(mean, log_variance, out["mean"], out["log_variance"])
        likelihood = discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=out["log_variance"] / 2)
        bits = th.where(t == 0, -mean_flat(likelihood), mean_flat(kl)) / math.log(2)
        return {"output": bits, "pred_xstart": out["pred_xstart"]}

    def training_losses(
        self,
        model: Model,
        x_start: th.Tensor,
        t: th.Tensor,
        model_kwargs: Kwargs = None,
        noise: th.Tensor | None = None,
    ) -> Losses:
        """Loss terms [N] of images noised to t.

        :param noise: drawn when absent.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            images: Any = {"x_start": x_start, "x_t": x_t, "t": t, "clip_denoised": False, "model_kwargs": model_kwargs}
            bits = self._vb_terms_bpd(model=model, **images)["output"]
            return {"loss": bits * (self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1)}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        prediction, _, _ = self._variance(output, x_t, t)
        mse = mean_flat((self._target(x_start, x_t, t, noise) - prediction) ** 2)
        loss = self._mse_weight(t, mse) * mse if self.loss_weight else mse
        if output is prediction:
            return {"loss": loss, "mse": mse}
        vb = self._variance_loss(output, x_start, x_t, t)
        return {"loss": loss + vb, "mse": mse, "vb": vb}

    def _target(self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """What the network ought to return."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.VELOCITY:
            signal, sigma = (self._at(f"sqrt_{name}alphas_cumprod", t, x_t) for name in ("", "one_minus_"))
            return signal * noise - sigma * x_start
        return x_start if self.model_mean_type is ModelMeanType.START_X else self.posterior_mean(x_start, x_t, t)

    def _variance_loss(self, output: th.Tensor, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        """The variational bound as a loss of the variance alone: the mean gets no gradient from it.

        (Nichol & Dhariwal 2021, sec. 3.1.)
        """
        mean, values = output.chunk(2, dim=1)
        frozen = th.cat([mean.detach(), values], dim=1)
        vb = self._vb_terms_bpd(lambda *_: frozen, x_start=x_start, x_t=x_t, t=t, clip_denoised=False)["output"]
        return vb * (self.num_timesteps / 1000) if self.loss_type is LossType.RESCALED_MSE else vb

    def _prior_bpd(self, x_start: th.Tensor) -> th.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) [N] in bits per dimension."""
        last = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: th.Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
        *,
        draw: Draw | None = None,
    ) -> dict[str, th.Tensor]:
        """The variational bound of images: total_bpd and prior_bpd [N], and vb, xstart_mse, mse [N, T].

        All but the two mean squared errors are in bits per dimension.

        :param draw: called for the noise of each step, T-1 first, in place of the global generator.
        """
        options: Any = {"clip_denoised": clip_denoised, "model_kwargs": model_kwargs}
        terms: dict[str, list[th.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        with self.tables_kept({}):
            for index in reversed(range(self.num_timesteps)):
                t = th.full((len(x_start),), index, device=x_start.device)
                noise = th.randn_like(x_start) if draw is None else draw()
                x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
                with th.no_grad():
                    out = self._vb_terms_bpd(model, x_start=x_start, x_t=x_t, t=t, **options)
                terms["vb"].append(out["output"])
                terms["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
                terms["mse"].append(mean_flat((self.predict_eps(x_t, t, out["pred_xstart"]) - noise) ** 2))
        stacked = {name: th.stack(values, dim=1) for name, values in terms.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": stacked["vb"].sum(dim=1) + prior, "prior_bpd": prior, **stacked}
