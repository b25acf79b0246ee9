"""The sampling methods that a diffusion process offers, by the names and parameters that users know.

Every one of them is a line over a sampler's `step` or over the loop; what their parameters mean is said once, in
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

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Unpack

import torch as th

from ..sampling.loop import MoreOptions, SampleOptions, sample_loop
from ..sampling.prediction import CondFn, MeanVariance, shift_mean, shift_score
from ..sampling.samplers import DDIM, PLMS, Ancestral, DDIMReverse, make_sampler
from ..sampling.steps import Draw, Process, Sampler, State, StepOutput

Model = Callable[..., th.Tensor]
Kwargs = dict[str, Any] | None
DenoisedFn = Callable[[th.Tensor], th.Tensor] | None
Device = th.device | str | None
Image = th.Tensor | None
Guide = CondFn | None
Shape = Sequence[int]
Steps = Iterator[StepOutput]


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method that the loop or the step takes under the same name."""
    own = ("self", "eta", "order", "old_out", "more")
    return {**{name: value for name, value in given.items() if name not in own}, **given.get("more", {})}


def _used(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a loop for its progressive twin: those that upstream's knows, and of the others those in use."""
    taken = {name: value for name, value in _options(given).items() if name not in ("model", "shape")}
    return {name: value for name, value in taken.items() if name not in UNUSED or value is not UNUSED[name]}


UNUSED = {"skip_timesteps": 0, "init_image": None, "randomize_class": False, "cond_fn_with_grad": False}


def _routed(sampler: Sampler, options: SampleOptions) -> tuple[str, dict[str, Any]]:
    """The method that runs a sampler, '' if none has its name, and its keywords.

    Asked for by its own name, a guided x_0 is clipped again; the method itself, as in the originals, does not.
    """
    guided = options.get("cond_fn") is not None and type(sampler) is not Ancestral
    return LOOPS.get(type(sampler), ""), {**({"clip_guided": None} if guided else {}), **options, **vars(sampler)}


# the methods that run a sampler and that take its steps
LOOPS: dict[type[Sampler], str] = {Ancestral: "p_sample_loop", DDIM: "ddim_sample_loop", PLMS: "plms_sample_loop"}
STEPS: dict[type[Sampler], str] = {
    Ancestral: "p_sample",
    DDIM: "ddim_sample",
    PLMS: "plms_sample",
    DDIMReverse: "ddim_reverse_sample",
}


# fmt: off
class SamplingSurfaces(Process, Protocol):
    """A diffusion process's sampling methods."""

    def _scale_timesteps(self, t: th.Tensor) -> th.Tensor: ...
    def _index(self, t: th.Tensor) -> th.Tensor: ...

    # ---- any sampler

    def sample_loop(
        self, sampler: Sampler | str, model: Model, shape: Shape, **options: Unpack[SampleOptions]
    ) -> th.Tensor:
        """Images [N, C, H, W] sampled by any sampler of `samplers.SAMPLERS`, or the name of one."""
        loop, own = _routed(sampler := make_sampler(sampler), options)
        if not loop:
            return _last(self.sample_loop_progressive(sampler, model, shape, **options))
        images: th.Tensor = getattr(self, loop)(model, shape, **own)
        return images

    def sample_loop_progressive(
        self, sampler: Sampler | str, model: Model, shape: Shape, **options: Unpack[SampleOptions]
    ) -> Steps:
        """The steps of `sample_loop`, one `StepOutput` at a time."""
        loop, own = _routed(sampler := make_sampler(sampler), options)
        if not loop:
            return sample_loop(self, sampler, model, shape, **options)
        steps: Steps = getattr(self, f"{loop}_progressive")(model, shape, **own)
        return steps

    def take_step(
        self, sampler: Sampler, model: Model, x: th.Tensor, t: th.Tensor, state: Any, *, draw: Draw | None = None,
        cond_fn_with_grad: bool = False, clip_guided: bool | None = None, **options: Any,
    ) -> tuple[StepOutput, Any]:
        """What a step yields, and what the next one is to be given as `state`; None at the start.

        :param draw: returns the noise, in place of the global generator.
        """
        name = STEPS.get(type(sampler))
        if name is None:
            options |= {"draw": draw, "cond_fn_with_grad": cond_fn_with_grad, "clip_guided": clip_guided}
            return self._step(sampler, model, x, t, state=state, **options)
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
        self, sampler: Sampler, model: Model, x: th.Tensor, t: th.Tensor, *, state: State = None,
        draw: Draw | None = None, **options: Any,
    ) -> tuple[StepOutput, State]:
        """One step of a sampler, with the graph kept."""
        predict = self.predictor(model, **options)
        return sampler.step(self, predict, x, t, state, draw or (lambda: th.randn_like(x)))

    # ---- ancestral sampling

    def p_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, *, draw: Draw | None = None,
    ) -> StepOutput:
        """One ancestral step from x_t to x_{t-1}."""
        return self._step(Ancestral(), **_options(locals()))[0]

    def p_sample_with_grad(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, *, draw: Draw | None = None,
    ) -> StepOutput:
        """`p_sample` with a cond_fn that sees the graph through the network."""
        return self._step(Ancestral(), cond_fn_with_grad=True, **_options(locals()))[0]

    def p_sample_loop(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> th.Tensor:
        """Images [N, C, H, W] by ancestral sampling."""
        return _last(self.p_sample_loop_progressive(model, shape, **_used(locals())))

    def p_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of `p_sample_loop`."""
        return sample_loop(self, Ancestral(), **_options(locals()))

    # ---- DDIM

    def ddim_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, eta: float = 0.0, *, draw: Draw | None = None,
        clip_guided: bool | None = False,
    ) -> StepOutput:
        """One DDIM step from x_t to x_{t-1}."""
        return self._step(DDIM(eta), **_options(locals()))[0]

    def ddim_sample_with_grad(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, eta: float = 0.0, *, draw: Draw | None = None,
        clip_guided: bool | None = False,
    ) -> StepOutput:
        """`ddim_sample` with a cond_fn that sees the graph through the network."""
        return self._step(DDIM(eta), cond_fn_with_grad=True, **_options(locals()))[0]

    def ddim_reverse_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        model_kwargs: Kwargs = None, eta: float = 0.0,
    ) -> StepOutput:
        """One deterministic DDIM step from x_t to x_{t+1}.

        :raises ValueError: if eta is not 0: the noise of a random step cannot be undone.
        """
        if eta != 0:
            raise ValueError(f"eta is {eta}, but only the deterministic path, eta = 0, can be followed backwards")
        return self._step(DDIMReverse(), **_options(locals()))[0]

    def ddim_sample_loop(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, eta: float = 0.0, skip_timesteps: int = 0, init_image: Image = None,
        randomize_class: bool = False, cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> th.Tensor:
        """Images [N, C, H, W] by DDIM."""
        return _last(self.ddim_sample_loop_progressive(model, shape, **_used(locals()), eta=eta))

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, eta: float = 0.0, skip_timesteps: int = 0, init_image: Image = None,
        randomize_class: bool = False, cond_fn_with_grad: bool = False, **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of `ddim_sample_loop`."""
        return sample_loop(self, DDIM(eta), **{"clip_guided": False, **_options(locals())})

    # ---- PLMS

    def plms_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: DenoisedFn = None,
        cond_fn: Guide = None, model_kwargs: Kwargs = None, cond_fn_with_grad: bool = False, order: int = 2,
        old_out: StepOutput | None = None, *, clip_guided: bool | None = False,
    ) -> StepOutput:
        """One PLMS step from x_t to x_{t-1}; `old_out` is what the step before returned, and stays as it is."""
        state = None if old_out is None else tuple(old_out["old_eps"])
        return self._step(PLMS(order), **_options(locals()))[0]

    def plms_sample_loop(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, order: int = 2, **more: Unpack[MoreOptions],
    ) -> th.Tensor:
        """Images [N, C, H, W] by PLMS."""
        return _last(self.plms_sample_loop_progressive(model, shape, **_used(locals()), order=order))

    def plms_sample_loop_progressive(
        self, model: Model, shape: Shape, noise: Image = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None, cond_fn: Guide = None, model_kwargs: Kwargs = None, device: Device = None,
        progress: bool = False, skip_timesteps: int = 0, init_image: Image = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False, order: int = 2, **more: Unpack[MoreOptions],
    ) -> Steps:
        """The steps of `plms_sample_loop`."""
        return sample_loop(self, PLMS(order), **{"clip_guided": False, **_options(locals())})

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


def _last(steps: Steps) -> th.Tensor:
    """The sample of the last step."""
    for output in steps:  # noqa: B007 - the loop always yields at least once
        pass
    return output["sample"]
