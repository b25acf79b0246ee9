"""The sampling methods that a diffusion process offers, by the names and parameters that users know.

Every one of them is a line over a sampler's `step` or over the loop; what their parameters mean is said once, in
`loop.SampleOptions`. Two parameters are not there: `eta` and `order`, which are the samplers' own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Unpack

import torch as th

from .loop import MoreOptions, SampleOptions, sample_loop
from .prediction import CondFn, MeanVariance, shift_mean, shift_score
from .samplers import DDIM, PLMS, Ancestral, DDIMReverse
from .steps import Process, Sampler, State, StepOutput

Model = Callable[..., th.Tensor]
Kwargs = dict[str, Any] | None
DenoisedFn = Callable[[th.Tensor], th.Tensor] | None
Device = th.device | str | None
Image = th.Tensor | None
Guide = CondFn | None
Shape = Sequence[int]
Steps = Iterator[StepOutput]


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a surface that the loop or the step takes under the same name; x_0 is clipped as ever."""
    own, options = ("self", "eta", "order", "old_out", "more"), {"clip_guided": False}
    return {**options, **{name: value for name, value in given.items() if name not in own}, **given.get("more", {})}


# once the loops went through these
OVERRIDDEN_IN_VAIN = {"p_sample", "ddim_sample", "plms_sample", "condition_mean", "condition_score"}


# fmt: off
class SamplingSurfaces(Process, Protocol):
    """A diffusion process's sampling methods."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in OVERRIDDEN_IN_VAIN & set(vars(cls)):
            warnings.warn(
                f"{cls.__name__} overrides {name}, which the sampling loops do not call: override p_mean_variance, or "
                "write a sampler with its own step and run it with sample_loop()",
                stacklevel=2,
            )

    def _scale_timesteps(self, t: th.Tensor) -> th.Tensor: ...

    # ---- any sampler

    def sample_loop(
        self, sampler: Sampler | str, model: Model, shape: Shape, **options: Unpack[SampleOptions]
    ) -> th.Tensor:
        """Images [N, C, H, W] sampled by any sampler of `samplers.SAMPLERS`, or the name of one."""
        return _last(self.sample_loop_progressive(sampler, model, shape, **options))

    def sample_loop_progressive(
        self, sampler: Sampler | str, model: Model, shape: Shape, **options: Unpack[SampleOptions]
    ) -> Steps:
        """The steps of `sample_loop`, one `StepOutput` at a time."""
        return sample_loop(self, sampler, model, shape, **options)

    def _step(
        self, sampler: Sampler, model: Model, x: th.Tensor, t: th.Tensor, *, state: State = None, **options: Any
    ) -> StepOutput:
        """One step of a sampler, with the graph kept."""
        predict = self.predictor(model, **options)
        return sampler.step(self, predict, x, t, state, lambda: th.randn_like(x))[0]

    # ---- ancestral sampling

    def p_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None,
    ) -> StepOutput:
        """One ancestral step from x_t to x_{t-1}."""
        return self._step(Ancestral(), **_options(locals()))

    def p_sample_with_grad(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None,
    ) -> StepOutput:
        """`p_sample` with a cond_fn that sees the graph through the network."""
        return self._step(Ancestral(), cond_fn_with_grad=True, **_options(locals()))

    def p_sample_loop(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> th.Tensor:
        """Images [N, C, H, W] by ancestral sampling."""
        return self.sample_loop(Ancestral(), **_options(locals()))

    def p_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of `p_sample_loop`."""
        return self.sample_loop_progressive(Ancestral(), **_options(locals()))

    # ---- DDIM

    def ddim_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, eta: float = 0.0,
    ) -> StepOutput:
        """One DDIM step from x_t to x_{t-1}."""
        return self._step(DDIM(eta), **_options(locals()))

    def ddim_sample_with_grad(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, eta: float = 0.0,
    ) -> StepOutput:
        """`ddim_sample` with a cond_fn that sees the graph through the network."""
        return self._step(DDIM(eta), cond_fn_with_grad=True, **_options(locals()))

    def ddim_reverse_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        model_kwargs: Kwargs = None, eta: float = 0.0,
    ) -> StepOutput:
        """One deterministic DDIM step from x_t to x_{t+1}.

        :raises ValueError: if eta is not 0: the noise of a random step cannot be undone.
        """
        if eta != 0:
            raise ValueError(f"eta is {eta}, but only the deterministic path, eta = 0, can be followed backwards")
        return self._step(DDIMReverse(), **_options(locals()))

    def ddim_sample_loop(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, eta: float = 0.0, skip_timesteps: int = 0, init_image: Image = None,
        randomize_class: bool = False, cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> th.Tensor:
        """Images [N, C, H, W] by DDIM."""
        return self.sample_loop(DDIM(eta), **_options(locals()))

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, eta: float = 0.0, skip_timesteps: int = 0, init_image: Image = None,
        randomize_class: bool = False, cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of `ddim_sample_loop`."""
        return self.sample_loop_progressive(DDIM(eta), **_options(locals()))

    # ---- PLMS

    def plms_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, cond_fn_with_grad: bool = False, order: int = 2,
        old_out: StepOutput | None = None,
    ) -> StepOutput:
        """One PLMS step from x_t to x_{t-1}; `old_out` is what the step before returned, and stays as it is."""
        state = None if old_out is None else tuple(old_out["old_eps"])
        return self._step(PLMS(order), **_options(locals()))

    def plms_sample_loop(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, order: int = 2, **more: Unpack[MoreOptions],
    ) -> th.Tensor:
        """Images [N, C, H, W] by PLMS."""
        return self.sample_loop(PLMS(order), **_options(locals()))

    def plms_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, order: int = 2, **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of `plms_sample_loop`."""
        return self.sample_loop_progressive(PLMS(order), **_options(locals()))

    # ---- the two rules of guidance

    def condition_mean(
        self, cond_fn: CondFn, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor, model_kwargs: Kwargs = None
    ) -> th.Tensor:
        """The mean after guidance by rule "mean"."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return shift_mean(self, p_mean_var, x, t, gradient)["mean"]

    def condition_mean_with_grad(
        self, cond_fn: CondFn, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor, model_kwargs: Kwargs = None
    ) -> th.Tensor:
        """`condition_mean` with a cond_fn that is called as (x, t, p_mean_var)."""
        gradient = cond_fn(x, t, self._fed(p_mean_var, t), **(model_kwargs or {}))
        return shift_mean(self, p_mean_var, x, t, gradient)["mean"]

    def condition_score(
        self, cond_fn: CondFn, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor, model_kwargs: Kwargs = None
    ) -> MeanVariance:
        """The prediction after guidance by rule "score"."""
        return shift_score(self, p_mean_var, x, t, cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {})))

    def condition_score_with_grad(
        self, cond_fn: CondFn, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor, model_kwargs: Kwargs = None
    ) -> MeanVariance:
        """`condition_score` with a cond_fn that is called as (x, t, p_mean_var)."""
        return shift_score(self, p_mean_var, x, t, cond_fn(x, t, self._fed(p_mean_var, t), **(model_kwargs or {})))

    def _fed(self, p_mean_var: MeanVariance, t: th.Tensor) -> MeanVariance:
        """The prediction with what the network was fed for it, which guides through the denoiser may ask for."""
        return {**p_mean_var, "timesteps": self._scale_timesteps(t)}
# fmt: on


def _last(steps: Steps) -> th.Tensor:
    """The sample of the last step."""
    for output in steps:  # noqa: B007 - the loop always yields at least once
        pass
    return output["sample"]
