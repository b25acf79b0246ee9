"""The Gaussian diffusion process: schedules, forward and reverse moments, losses, likelihood, sampling loops.

Symbols (Ho et al. 2020): alpha_bar_t = prod(1 - beta_s); x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
Shapes: images are [N, C, H, W] (or any [N, C, ...]); t [N] is the index in this process, 0 .. T-1, where t = 0 is one
step of noise; what the network is fed for it is `timesteps`.
"""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch as th

from guided_diffusion.config import nearest
from guided_diffusion.guidance import CondFn, MeanVariance, Prediction, detached
from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.nn import mean_flat
from guided_diffusion.samplers import Predict
from guided_diffusion.surfaces import DenoisedFn, Kwargs, Model, SamplingSurfaces

Array = npt.NDArray[np.float64]

MAX_BETA = 0.999


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


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
    """Loss terms per image [N]; `loss` is the one to minimise, `vb` is in bits per dimension."""

    loss: th.Tensor
    mse: th.Tensor
    vb: th.Tensor


# ---- schedules


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = MAX_BETA
) -> Array:
    """Betas [T] whose product follows alpha_bar(time), time in [0, 1], none above `max_beta`."""
    levels = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in pairwise(levels)])


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Array:
    """Betas [T]: linear (Ho et al. 2020, scaled to any T) or cosine (Nichol & Dhariwal 2021, eq. 17).

    :raises ValueError: for another name.
    """
    if schedule_name == "linear":
        return _linear_betas(num_diffusion_timesteps)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    hint = nearest(schedule_name, ("linear", "cosine"))
    raise ValueError(f"noise_schedule {schedule_name!r} is unknown: use linear or cosine{hint}")


def _linear_betas(steps: int) -> Array:
    scale = 1000 / steps
    betas = np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)
    if betas[-1] > MAX_BETA:
        warnings.warn(f"a linear schedule of {steps} steps has betas above {MAX_BETA}: they are clamped", stacklevel=3)
    return np.minimum(betas, MAX_BETA)


def _extract_into_tensor(arr: Array, timesteps: th.Tensor, broadcast_shape: Sequence[int]) -> th.Tensor:
    """arr[timesteps] as float32, expanded to `broadcast_shape`."""
    values = th.from_numpy(np.asarray(arr, dtype=np.float32)).to(timesteps.device)[timesteps]
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(tuple(broadcast_shape))


class GaussianDiffusion(SamplingSurfaces):
    """A diffusion process, the meaning of its network's output, and everything computed from both.

    :param betas: noise per step [T], in (0, 1].
    :param rescale_timesteps: feed t * 1000 / (original T) to the network.
    :param timestep_map: for each step of this process, the index that the network was trained with.
    :param original_num_steps: T of the process that the network was trained with.
    """

    def __init__(
        self,
        *,
        betas: npt.ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        timestep_map: Sequence[int] | None = None,
        original_num_steps: int | None = None,
    ) -> None:
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = np.array(betas, dtype=np.float64)
        if self.betas.ndim != 1 or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(f"betas must be a row of numbers in (0, 1], and are {betas!r}")
        self.num_timesteps = len(self.betas)
        self.timestep_map = list(range(self.num_timesteps)) if timestep_map is None else list(timestep_map)
        self.original_num_steps = original_num_steps or self.num_timesteps
        self._tables: dict[tuple[str, th.device, th.dtype], th.Tensor] = {}
        self._set_coefficients()

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
        self._alpha_bar = np.concatenate(
            [[1.0], self.alphas_cumprod, [0.0]]
        )  # shifted: one step before 0 and after T-1
        self._timestep_map = np.array(self.timestep_map)
        self._respaced = self.timestep_map != list(range(self.num_timesteps))

    def _table(self, name: str, device: th.device, dtype: th.dtype) -> th.Tensor:
        """The array `name` as a tensor that stays on the device; cast first, since not every device has float64."""
        key = (name, device, dtype)
        if key not in self._tables:
            self._tables[key] = th.from_numpy(getattr(self, name)).to(dtype).to(device)
        return self._tables[key]

    def _at(self, name: str, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """Coefficient `name` at t, [N, 1, ...] to broadcast with `like`."""
        dtype = th.float64 if like.dtype == th.float64 else th.float32
        return self._table(name, t.device, dtype)[t].view(-1, *[1] * (like.ndim - 1))

    def alpha_bar(self, t: th.Tensor, like: th.Tensor) -> th.Tensor:
        """alpha_bar_t for t in -1 .. T: 1 before the first step, 0 after the last."""
        return self._at("_alpha_bar", t + 1, like)

    def _scale_timesteps(self, t: th.Tensor) -> th.Tensor:
        """What a network is fed for t: the index that it was trained with, rescaled where asked."""
        if self._respaced:
            t = self._table("_timestep_map", t.device, th.int64)[t]
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

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

    # ---- the reverse process

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
        :raises ValueError: if the network returns another number of channels than the variance type needs.
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        output, log_variance, variance = self._variance(output, x, t)
        xstart = self._xstart(output, x, t)
        xstart = xstart if denoised_fn is None else denoised_fn(xstart)
        xstart = xstart.clamp(-1, 1) if clip_denoised else xstart
        previous = self.model_mean_type is ModelMeanType.PREVIOUS_X
        mean = output if previous else self.posterior_mean(xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": xstart}

    def _variance(self, output: th.Tensor, x: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The network's output without its variance channels, log-variance, variance."""
        learned = self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        channels = x.shape[1] * (2 if learned else 1)
        expected = (x.shape[0], channels, *x.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} where {expected} is expected: does learn_sigma fit?"
            )
        if not learned:
            large = self.model_var_type is ModelVarType.FIXED_LARGE
            names = ("_large_variance", "_log_large_variance")
            small_names = ("posterior_variance", "posterior_log_variance_clipped")
            variance, log_variance = (self._at(n, t, x).expand_as(x) for n in (names if large else small_names))
            return output, log_variance, variance
        output, values = output.chunk(2, dim=1)
        if self.model_var_type is ModelVarType.LEARNED_RANGE:  # Nichol & Dhariwal 2021, eq. 15
            share = (values + 1) / 2
            small, large_log = self._at("posterior_log_variance_clipped", t, x), self._at("_log_betas", t, x)
            values = share * large_log + (1 - share) * small
        return output, values, values.exp()

    def _xstart(self, output: th.Tensor, x: th.Tensor, t: th.Tensor) -> th.Tensor:
        """The prediction of x_0 that the network's output stands for."""
        if self.model_mean_type is ModelMeanType.START_X:
            return output
        if self.model_mean_type is ModelMeanType.EPSILON:
            return self.predict_xstart(x, t, output)
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
    ) -> Predict:
        """The function (x, t) -> `guidance.Prediction` that the steps call; `model_kwargs` is read at every call."""
        kwargs = {} if model_kwargs is None else model_kwargs

        def predict(x: th.Tensor, t: th.Tensor) -> Prediction:
            out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, kwargs)
            if cond_fn is None:
                return Prediction(self, x, t, out)
            return Prediction(self, x, t, out, gradient=lambda: cond_fn(x, self._scale_timesteps(t), **kwargs))

        def predict_with_graph(x: th.Tensor, t: th.Tensor) -> Prediction:
            with th.enable_grad():
                leaf = x.detach().requires_grad_()
                graph = self.p_mean_variance(model, leaf, t, clip_denoised, denoised_fn, kwargs)
            out = detached(graph)
            return Prediction(self, x.detach(), t, out, gradient=lambda: self._through(cond_fn, leaf, t, graph, kwargs))

        return predict_with_graph if cond_fn is not None and cond_fn_with_grad else predict

    @staticmethod
    def _through(
        cond_fn: CondFn | None, x: th.Tensor, t: th.Tensor, out: MeanVariance, kwargs: dict[str, Any]
    ) -> th.Tensor:
        """The gradient of a cond_fn that sees the graph from x to the network's prediction."""
        assert cond_fn is not None
        with th.enable_grad():
            return cond_fn(x, t, out, **kwargs).detach()

    # ---- losses and likelihood

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
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
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
        x_t = self.q_sample(x_start, t, noise)
        if self.loss_type.is_vb():
            bits = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": bits * (self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1)}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        prediction, _, _ = self._variance(output, x_t, t)
        mse = mean_flat((self._target(x_start, x_t, t, noise) - prediction) ** 2)
        if output is prediction:
            return {"loss": mse, "mse": mse}
        vb = self._variance_loss(output, x_start, x_t, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _target(self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """What the network ought to return."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        return x_start if self.model_mean_type is ModelMeanType.START_X else self.posterior_mean(x_start, x_t, t)

    def _variance_loss(self, output: th.Tensor, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        """The variational bound as a loss of the variance alone: the mean gets no gradient from it.

        (Nichol & Dhariwal 2021, sec. 3.1.)
        """
        mean, values = output.chunk(2, dim=1)
        frozen = th.cat([mean.detach(), values], dim=1)
        vb = self._vb_terms_bpd(lambda *_: frozen, x_start, x_t, t, clip_denoised=False)["output"]
        return vb * (self.num_timesteps / 1000) if self.loss_type is LossType.RESCALED_MSE else vb

    def _prior_bpd(self, x_start: th.Tensor) -> th.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) [N] in bits per dimension."""
        last = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)

    def calc_bpd_loop(
        self, model: Model, x_start: th.Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> dict[str, th.Tensor]:
        """The variational bound of images: total_bpd and prior_bpd [N], and vb, xstart_mse, mse [N, T].

        All but the two mean squared errors are in bits per dimension.
        """
        terms: dict[str, list[th.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for index in reversed(range(self.num_timesteps)):
            t = th.full((len(x_start),), index, device=x_start.device)
            noise = th.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            with th.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            terms["vb"].append(out["output"])
            terms["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            terms["mse"].append(mean_flat((self.predict_eps(x_t, t, out["pred_xstart"]) - noise) ** 2))
        stacked = {name: th.stack(values, dim=1) for name, values in terms.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": stacked["vb"].sum(dim=1) + prior, "prior_bpd": prior, **stacked}
