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

from ..runtime.errors import UserError
from ..sampling.loop import MoreOptions, SampleOptions, sample_loop
from ..sampling.prediction import CondFn, MeanVariance, shift_mean, shift_score
from ..sampling.samplers import DDIM, PLMS, Ancestral, DDIMReverse, make_sampler
from ..sampling.steps import Draw, Predict, Sampler, State, StepOutput
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


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> tuple[Any, Model, Shape, dict[str, Any]]:
    """Process, network, shape and options that a loop is called with."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    more = bound.arguments.pop("more")
    options = {**bound.arguments, **more}
    return options.pop("self"), options.pop("model"), options.pop("shape"), options


def _progressive(sampler_of: Callable[P, Sampler]) -> Callable[P, Steps]:
    """The loop of the sampler that a method returns; its other arguments are the options of the loop."""
    signature = inspect.signature(sampler_of)

    @wraps(sampler_of)
    def loop(*args: P.args, **kwargs: P.kwargs) -> Steps:
        sampler = sampler_of(*args, **kwargs)
        process, model, shape, options = _arguments(signature, args, kwargs)
        options = {key: value for key, value in options.items() if key not in vars(sampler)}
        unclipped = {} if type(sampler) is Ancestral else {"clip_guided": False}
        return sample_loop(process, sampler, model, shape, **{**unclipped, **options})

    return loop


def _whole(progressive: Callable[P, Steps]) -> Callable[P, th.Tensor]:
    """The loop that returns the last sample of a progressive one.

    It calls that with all keywords of upstream's, and of the others with those in use.
    """
    signature, name = inspect.signature(progressive), progressive.__name__

    @wraps(progressive)
    def loop(*args: P.args, **kwargs: P.kwargs) -> th.Tensor:
        process, model, shape, options = _arguments(signature, args, kwargs)
        used = {key: value for key, value in options.items() if key not in FORKS or value is not FORKS[key]}
        return _last(getattr(process, name)(model, shape, **used))

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


def _routed(sampler: Sampler, options: SampleOptions) -> tuple[str, dict[str, Any]]:
    """The method that runs a sampler, '' if none has its name, and its keywords.

    Asked for by its own name, a guided x_0 is clipped again; the method itself, as in the originals, does not.
    """
    guided = options.get("cond_fn") is not None and type(sampler) is not Ancestral
    return LOOPS.get(type(sampler), ""), {**({"clip_guided": None} if guided else {}), **options, **vars(sampler)}


# fmt: off
class SamplingMethods(ForwardProcess):
    """A forward process with sampling methods."""

    @abstractmethod
    def predictor(self, model: Model, *args: Any, **options: Any) -> Predict:
        """The function (x, t) -> `prediction.Prediction` that the steps call."""

    # ---- any sampler

    def sample_loop(
        self, sampler: Sampler | str, model: Model, shape: Shape, **options: Unpack[SampleOptions]
    ) -> th.Tensor:
        """Images [N, C, H, W] sampled by any sampler of `samplers.SAMPLERS`, or the name of one."""
        loop, keywords = _routed(sampler := make_sampler(sampler), options)
        if not loop:
            return _last(self.sample_loop_progressive(sampler, model, shape, **options))
        images: th.Tensor = getattr(self, loop)(model, shape, **keywords)
        return images

    def sample_loop_progressive(
        self, sampler: Sampler | str, model: Model, shape: Shape, **options: Unpack[SampleOptions]
    ) -> Steps:
        """The steps of `sample_loop`, one `StepOutput` at a time."""
        loop, keywords = _routed(sampler := make_sampler(sampler), options)
        if not loop:
            return sample_loop(self, sampler, model, shape, **options)
        steps: Steps = getattr(self, f"{loop}_progressive")(model, shape, **keywords)
        return steps

    def rule_at(self, sampler: Sampler, index: int) -> Sampler:
        """What takes the step at an index: DDIM, where a sampler that divides by the signal would start without any."""
        blind = sampler.needs_signal and index == self.num_timesteps - 1 and self.no_signal_at_the_end
        return DDIM() if blind else sampler

    def take_step(
        self, sampler: Sampler, model: Model, x: th.Tensor, t: th.Tensor, state: Any, *, last: bool = False,
        draw: Draw | None = None, cond_fn_with_grad: bool = False, clip_guided: bool | None = None, **options: Any,
    ) -> tuple[StepOutput, Any]:
        """The output of a step, and what the next one is to be given as `state`; None at the start.

        :param last: whether t is 0 for all images.
        :param draw: returns the noise, in place of the global generator.
        """
        name = STEPS.get(type(sampler))
        if name is None:
            options |= {"draw": draw, "cond_fn_with_grad": cond_fn_with_grad, "clip_guided": clip_guided}
            return self._step(sampler, model, x, t, state=state, last=last, **options)
        options |= vars(sampler)
        if options.get("cond_fn") is not None and clip_guided is not False and name in ("ddim_sample", "plms_sample"):
            options |= {"clip_guided": clip_guided}
        if name == "plms_sample":
            options |= {"cond_fn_with_grad": cond_fn_with_grad, "old_out": state}
        elif name == "ddim_reverse_sample":
            del options["cond_fn"]
        else:
            name += "_with_grad" if cond_fn_with_grad else ""
            options |= {} if draw is None else {"draw": draw}
        output = getattr(self, name)(model, x, t, **options)
        return output, output if name == "plms_sample" else None

    def _step(
        self, sampler: Sampler, model: Model, x: th.Tensor, t: th.Tensor, *, state: State = None, last: bool = False,
        draw: Draw | None = None, **options: Any,
    ) -> tuple[StepOutput, State]:
        """One step of a sampler, with the graph kept."""
        step = sampler.last_step if last else sampler.step
        return step(self, self.predictor(model, **options), x, t, state, draw or (lambda: th.randn_like(x)))

    # ---- ancestral sampling

    def p_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, *, draw: Draw | None = None,
        cond_fn_with_grad: bool = False,
    ) -> StepOutput:
        """One ancestral step from x_t to x_{t-1}."""
        return self._step(
            Ancestral(), model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, draw=draw, cond_fn_with_grad=cond_fn_with_grad,
        )[0]

    p_sample_with_grad = _with_grad(p_sample)

    @_progressive
    def p_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> Sampler:
        """The steps of ancestral sampling, one `StepOutput` at a time."""
        return Ancestral()

    p_sample_loop = _whole(p_sample_loop_progressive)

    # ---- DDIM

    def ddim_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, eta: float = 0.0, *, draw: Draw | None = None,
        clip_guided: bool | None = False, cond_fn_with_grad: bool = False,
    ) -> StepOutput:
        """One DDIM step from x_t to x_{t-1}."""
        return self._step(
            DDIM(eta), model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, draw=draw, clip_guided=clip_guided, cond_fn_with_grad=cond_fn_with_grad,
        )[0]

    ddim_sample_with_grad = _with_grad(ddim_sample)

    def ddim_reverse_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        model_kwargs: Kwargs = None, eta: float = 0.0,
    ) -> StepOutput:
        """One deterministic DDIM step from x_t to x_{t+1}.

        :raises ValueError: if eta is not 0: the noise of a random step cannot be undone.
        """
        if eta != 0:
            raise UserError(f"eta is {eta}, but only the deterministic path, eta = 0, can be followed backwards")
        options: dict[str, Any] = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn}
        return self._step(DDIMReverse(), model, x, t, model_kwargs=model_kwargs, **options)[0]

    @_progressive
    def ddim_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, eta: float = 0.0, skip_timesteps: int = 0, init_image: Image = None,
        randomize_class: bool = False, cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> Sampler:
        """The steps of DDIM, one `StepOutput` at a time."""
        return DDIM(eta)

    ddim_sample_loop = _whole(ddim_sample_loop_progressive)

    # ---- PLMS

    def plms_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, cond_fn_with_grad: bool = False, order: int = 2,
        old_out: StepOutput | None = None, *, clip_guided: bool | None = False,
    ) -> StepOutput:
        """One PLMS step from x_t to x_{t-1}; `old_out` is what the step before returned, and stays as it is."""
        return self._step(
            PLMS(order), model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, cond_fn_with_grad=cond_fn_with_grad, clip_guided=clip_guided,
            state=None if old_out is None else tuple(old_out["old_eps"]),
        )[0]

    @_progressive
    def plms_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, order: int = 2, **more: Unpack[MoreOptions],
    ) -> Sampler:
        """The steps of PLMS, one `StepOutput` at a time."""
        return PLMS(order)

    plms_sample_loop = _whole(plms_sample_loop_progressive)

    # ---- the two rules of guidance

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
# fmt: on
