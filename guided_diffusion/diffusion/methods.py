"""The sampling methods that a diffusion process offers, by the names and parameters of the originals.

Every one of them is a line over a sampler's `step` or over the loop; their parameters are documented once, in
`loop.SampleOptions`. Three parameters are not there: `eta` and `order`, which are the samplers' own, and `draw` of a
single step, which returns its noise in place of the global generator's.

Each may be replaced, in a subclass, on the class or on an instance. The loops call the steps (`p_sample`,
`ddim_sample`, `plms_sample`, with the keywords that the originals' loops give them), the steps call `p_mean_variance`
and `condition_mean` or `condition_score`, and `sample_loop` calls the loop that has the sampler's name. A keyword that
the originals do not know (`draw`, where there is a `generator`; an option of `MoreOptions`) is passed on only where it
is used. The other samplers have no method of their own: they go through `p_mean_variance`, `condition_score`,
`_predict_eps_from_xstart` and `_predict_xstart_from_eps`.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec, Unpack

import torch as th

from ..runtime.errors import refuse
from ..sampling.loop import MoreOptions, SampleOptions, sample_loop
from ..sampling.prediction import CondFn, MeanVariance, shift_mean, shift_score
from ..sampling.samplers import DDIM, PLMS, Ancestral, DDIMReverse, make_sampler
from ..sampling.steps import Draw, Predict, Sampler, StepOutput
from .forward_process import ForwardProcess

P = ParamSpec("P")
Model = Callable[..., th.Tensor]
Kwargs = dict[str, Any] | None
DenoisedFn = Callable[[th.Tensor], th.Tensor] | None
Device = th.device | str | None
Image = th.Tensor | None
Guide = CondFn | None
Shape = Sequence[int]
Steps = Iterator[StepOutput]

# the methods that run a sampler, and those that take its steps
LOOPS: dict[type[Sampler], str] = {Ancestral: "p_sample_loop", DDIM: "ddim_sample_loop", PLMS: "plms_sample_loop"}
STEPS = {Ancestral: "p_sample", DDIM: "ddim_sample", PLMS: "plms_sample", DDIMReverse: "ddim_reverse_sample"}
# of the loops' parameters those that upstream's do not have, and their defaults
FORKS = {"skip_timesteps": 0, "init_image": None, "randomize_class": False, "cond_fn_with_grad": False}


def _last(steps: Steps) -> th.Tensor:
    """The sample of the last step."""
    for output in steps:  # noqa: B007 - the loop always yields at least once
        pass
    return output["sample"]


def _given(arguments: dict[str, Any], *left_out: str) -> dict[str, Any]:
    """The arguments of a method, from its `locals()`, but for self and those named; `more` as if written out."""
    options = {name: value for name, value in arguments.items() if name != "self" and name not in left_out}
    more = options.pop("more", {})
    return {**options, **more}


def _whole(progressive: Callable[P, Steps]) -> Callable[P, th.Tensor]:
    """The loop that returns the last sample of a progressive one.

    It calls that with all keywords of upstream's, and of the others with those in use.
    """
    signature, name = inspect.signature(progressive), progressive.__name__

    @wraps(progressive)
    def loop(*args: P.args, **kwargs: P.kwargs) -> th.Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = _given(bound.arguments, *(key for key in FORKS if bound.arguments[key] is FORKS[key]))
        process, model, shape = bound.arguments["self"], options.pop("model"), options.pop("shape")
        return _last(getattr(process, name)(model, shape, **options))

    loop.__name__ = name.removesuffix("_progressive")
    loop.__doc__ = f"Images [N, C, H, W]: the last sample of `{name}`, with the same parameters."
    return loop


def _with_grad(step: Callable[P, StepOutput]) -> Callable[P, StepOutput]:
    """The step with a cond_fn that sees the graph through the network."""

    @wraps(step)
    def with_grad(*args: P.args, **kwargs: P.kwargs) -> StepOutput:
        return step(*args, **{**kwargs, "cond_fn_with_grad": True})  # type: ignore[arg-type]

    with_grad.__name__ = f"{step.__name__}_with_grad"
    with_grad.__doc__ = f"`{step.__name__}` with a cond_fn that sees the graph through the network."
    return with_grad


class SamplingMethods(ForwardProcess):
    """A forward process with sampling methods."""

    @abstractmethod
    def predictor(self, model: Model, *args: Any, **options: Any) -> Predict:
        """The function (x, t) -> `prediction.Prediction` that the steps call."""

    make_sampler = staticmethod(make_sampler)

    def sample_loop(
        self, sampler: Sampler | str, model: Model, shape: Shape, **options: Unpack[SampleOptions]
    ) -> th.Tensor:
        """Images [N, C, H, W] sampled by any sampler of `samplers.SAMPLERS`, or the name of one."""
        images: th.Tensor = self._routed("", make_sampler(sampler), model, shape, options)
        return images

    def sample_loop_progressive(
        self, sampler: Sampler | str, model: Model, shape: Shape, **options: Unpack[SampleOptions]
    ) -> Steps:
        """The steps of `sample_loop`, one `StepOutput` at a time."""
        steps: Steps = self._routed("_progressive", make_sampler(sampler), model, shape, options)
        return steps

    def _routed(self, suffix: str, sampler: Sampler, model: Model, shape: Shape, options: SampleOptions) -> Any:
        """The loop of the method that has a sampler's name, if there is one.

        Asked for here, a guided x_0 is clipped again; the method itself, as in the originals, does not.
        """
        kind = type(sampler)
        if kind not in LOOPS:
            steps = sample_loop(self, sampler, model, shape, **options)
            return steps if suffix else _last(steps)
        guided = options.get("cond_fn") is not None and kind is not Ancestral
        clipped: dict[str, Any] = {"clip_guided": None} if guided else {}
        return getattr(self, LOOPS[kind] + suffix)(model, shape, **{**clipped, **options, **vars(sampler)})

    def rule_at(self, sampler: Sampler, index: int) -> Sampler:
        """What takes the step at an index: DDIM, where a sampler that divides by the signal would start without any."""
        blind = sampler.needs_signal and index == self.num_timesteps - 1 and self.no_signal_at_the_end
        return DDIM() if blind else sampler

    def take_step(
        self, sampler: Sampler, model: Model, x: th.Tensor, t: th.Tensor, state: Any, **options: Any
    ) -> tuple[StepOutput, Any]:
        """The output of a step, and what the next one is to be given as `state`; None at the start.

        :param options: `last`, whether t is 0 for all images; `draw`, which returns the noise in place of the global
            generator; and those of `predictor`.
        """
        name = STEPS.get(type(sampler))
        if name is None:
            return self._step(sampler, model, x, t, state=state, **options)
        _, draw, with_grad, clip = (options.pop(key) for key in ("last", "draw", "cond_fn_with_grad", "clip_guided"))
        options |= vars(sampler)
        if options["cond_fn"] is not None and clip is not False and name in ("ddim_sample", "plms_sample"):
            options |= {"clip_guided": clip}
        if name == "plms_sample":
            options |= {"cond_fn_with_grad": with_grad, "old_out": state}
        elif name == "ddim_reverse_sample":
            del options["cond_fn"]
        else:
            name += "_with_grad" if with_grad else ""
            options |= {} if draw is None else {"draw": draw}
        output = getattr(self, name)(model, x, t, **options)
        return output, output if name == "plms_sample" else None

    def _step(
        self, sampler: Sampler, model: Model, x: th.Tensor, t: th.Tensor, **options: Any
    ) -> tuple[StepOutput, Any]:
        """One step of a sampler, with the graph kept."""
        state, last, draw = (options.pop(name, None) for name in ("state", "last", "draw"))
        step = sampler.last_step if last else sampler.step
        return step(self, self.predictor(model, **options), x, t, state, draw or (lambda: th.randn_like(x)))

    def p_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None,
        model_kwargs: Kwargs = None,
        *,
        draw: Draw | None = None,
        cond_fn_with_grad: bool = False,
    ) -> StepOutput:
        """One ancestral step from x_t to x_{t-1}."""
        return self._step(Ancestral(), **_given(locals()))[0]

    p_sample_with_grad = _with_grad(p_sample)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Shape,
        noise: Image = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None,
        model_kwargs: Kwargs = None,
        device: Device = None,
        progress: bool = False,
        skip_timesteps: int = 0,
        init_image: Image = None,
        randomize_class: bool = False,
        cond_fn_with_grad: bool = False,
        **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of ancestral sampling, one `StepOutput` at a time."""
        return sample_loop(self, Ancestral(), **_given(locals()))

    p_sample_loop = _whole(p_sample_loop_progressive)

    def ddim_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
        *,
        draw: Draw | None = None,
        clip_guided: bool | None = False,
        cond_fn_with_grad: bool = False,
    ) -> StepOutput:
        """One DDIM step from x_t to x_{t-1}."""
        return self._step(DDIM(eta), **_given(locals(), "eta"))[0]

    ddim_sample_with_grad = _with_grad(ddim_sample)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> StepOutput:
        """One deterministic DDIM step from x_t to x_{t+1}.

        :raises ValueError: if eta is not 0: the noise of a random step cannot be undone.
        """
        refuse((eta != 0, f"eta is {eta}, but only the deterministic path, eta = 0, can be followed backwards"))
        return self._step(DDIMReverse(), **_given(locals(), "eta"))[0]

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Shape,
        noise: Image = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None,
        model_kwargs: Kwargs = None,
        device: Device = None,
        progress: bool = False,
        eta: float = 0.0,
        skip_timesteps: int = 0,
        init_image: Image = None,
        randomize_class: bool = False,
        cond_fn_with_grad: bool = False,
        **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of DDIM, one `StepOutput` at a time."""
        return sample_loop(self, DDIM(eta), **{"clip_guided": False, **_given(locals(), "eta")})

    ddim_sample_loop = _whole(ddim_sample_loop_progressive)

    def plms_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None,
        model_kwargs: Kwargs = None,
        cond_fn_with_grad: bool = False,
        order: int = 2,
        old_out: StepOutput | None = None,
        *,
        clip_guided: bool | None = False,
    ) -> StepOutput:
        """One PLMS step from x_t to x_{t-1}; `old_out` is what the step before returned, and stays as it is."""
        state = None if old_out is None else tuple(old_out["old_eps"])
        return self._step(PLMS(order), **_given(locals(), "order", "old_out"))[0]

    def plms_sample_loop_progressive(
        self,
        model: Model,
        shape: Shape,
        noise: Image = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None,
        model_kwargs: Kwargs = None,
        device: Device = None,
        progress: bool = False,
        skip_timesteps: int = 0,
        init_image: Image = None,
        randomize_class: bool = False,
        cond_fn_with_grad: bool = False,
        order: int = 2,
        **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of PLMS, one `StepOutput` at a time."""
        return sample_loop(self, PLMS(order), **{"clip_guided": False, **_given(locals(), "order")})

    plms_sample_loop = _whole(plms_sample_loop_progressive)

    def condition_mean(
        self, cond_fn: CondFn, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor, model_kwargs: Kwargs = None
    ) -> th.Tensor:
        """The mean after guidance by rule "mean"."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return shift_mean(p_mean_var, x, gradient)

    def condition_mean_with_grad(
        self, cond_fn: CondFn, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor, model_kwargs: Kwargs = None
    ) -> th.Tensor:
        """`condition_mean` with a cond_fn that is called as (x, t, p_mean_var)."""
        gradient = cond_fn(x, self._index(t), self._fed(p_mean_var, x, t), **(model_kwargs or {}))
        return shift_mean(p_mean_var, x, gradient)

    def condition_score(
        self, cond_fn: CondFn, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor, model_kwargs: Kwargs = None
    ) -> MeanVariance:
        """The prediction after guidance by rule "score"."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return shift_score(self, p_mean_var, x, t, gradient)

    def condition_score_with_grad(
        self, cond_fn: CondFn, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor, model_kwargs: Kwargs = None
    ) -> MeanVariance:
        """`condition_score` with a cond_fn that is called as (x, t, p_mean_var)."""
        gradient = cond_fn(x, self._index(t), self._fed(p_mean_var, x, t), **(model_kwargs or {}))
        return shift_score(self, p_mean_var, x, t, gradient)

    def _fed(self, p_mean_var: MeanVariance, x: th.Tensor, t: th.Tensor) -> MeanVariance:
        """The prediction with what the network was fed for it, which guides through the denoiser may ask for."""
        return {**p_mean_var, "timesteps": self.timesteps(t, x)}
