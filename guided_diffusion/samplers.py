"""Samplers as pure steps, and the one loop that runs them.

A sampler is a frozen dataclass whose `step` maps x_t to x_{t-1}. It asks `predict` for what the network says, the
prediction for its guided form, and `draw` for noise; what it must remember it returns as a value, so that a step can be
taken alone, twice, or from a notebook. A new sampler is a dataclass here and its entry in `SAMPLERS`.

Symbols: x is x_t [N, C, H, W]; t [N] is the index in the (respaced) process, t = 0 one step of noise; alpha_bar_t is
the share of the variance that is signal: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NotRequired, Protocol, TypedDict, Unpack

import torch as th
from tqdm.auto import tqdm

from guided_diffusion.config import nearest

State = tuple[th.Tensor, ...] | None
Draw = Callable[[], th.Tensor]
Generators = th.Generator | Sequence[th.Generator] | None


class StepOutput(TypedDict):
    """What a step yields: x_{t-1}, the network's own x_0 and, in a guided step, the guided x_0."""

    sample: th.Tensor
    pred_xstart: th.Tensor
    pred_xstart_guided: NotRequired[th.Tensor]
    old_eps: NotRequired[list[th.Tensor]]


class Prediction(Protocol):
    """What the network says at (x, t)."""

    mean: th.Tensor
    log_variance: th.Tensor
    pred_xstart: th.Tensor

    @property
    def eps(self) -> th.Tensor: ...
    def guided(self, rule: str) -> Prediction: ...
    def output(self, sample: th.Tensor) -> StepOutput: ...


Predict = Callable[[th.Tensor, th.Tensor], Prediction]


class Process(Protocol):
    """What samplers, guidance and the loop need of a diffusion process."""

    num_timesteps: int

    def alpha_bar(self, t: th.Tensor, like: th.Tensor) -> th.Tensor: ...
    def predict_xstart(self, x: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor: ...
    def predict_eps(self, x: th.Tensor, t: th.Tensor, xstart: th.Tensor) -> th.Tensor: ...
    def posterior_mean(self, xstart: th.Tensor, x: th.Tensor, t: th.Tensor) -> th.Tensor: ...
    def xstart_of_mean(self, x: th.Tensor, t: th.Tensor, mean: th.Tensor) -> th.Tensor: ...
    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor: ...
    def predictor(
        self,
        model: Any,
        *,
        clip_denoised: bool = True,
        denoised_fn: Callable[[th.Tensor], th.Tensor] | None = None,
        cond_fn: Callable[..., th.Tensor] | None = None,
        cond_fn_with_grad: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Predict: ...


class Sampler(Protocol):
    """One step of a sampler: x_t and the sampler's memory to x_{t-1} and its memory."""

    def step(
        self, process: Any, predict: Predict, x: th.Tensor, t: th.Tensor, state: State, draw: Draw
    ) -> tuple[StepOutput, State]: ...


def _where_noisy(t: th.Tensor, x: th.Tensor) -> th.Tensor:
    """True [N, 1, ...] where t > 0: the last step adds no noise."""
    return (t > 0).view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Ancestral:
    """Ancestral sampling: x_{t-1} ~ N(mean, variance) (Ho et al. 2020, algorithm 2)."""

    def step(
        self, process: Process, predict: Predict, x: th.Tensor, t: th.Tensor, state: State, draw: Draw
    ) -> tuple[StepOutput, State]:
        prediction = predict(x, t)
        noise = draw()
        prediction = prediction.guided("mean")
        deviation = th.exp(prediction.log_variance / 2)
        sample = prediction.mean + _where_noisy(t, x) * deviation * noise
        return prediction.output(sample), None


@dataclass(frozen=True)
class DDIM:
    """DDIM (Song et al. 2021, eq. 12); eta = 0 is deterministic, eta = 1 as noisy as ancestral sampling.

    Of order 1 in the step size for eta = 0.
    """

    eta: float = 0.0

    def step(
        self, process: Process, predict: Predict, x: th.Tensor, t: th.Tensor, state: State, draw: Draw
    ) -> tuple[StepOutput, State]:
        prediction = predict(x, t).guided("score")
        now, before = process.alpha_bar(t, x), process.alpha_bar(t - 1, x)
        sigma = self.eta * th.sqrt((1 - before) / (1 - now) * (1 - now / before))  # eq. 16
        direction = th.sqrt(1 - before - sigma**2) * prediction.eps
        noise = draw()  # drawn also where it is not used: the order of draws is public
        sample = th.sqrt(before) * prediction.pred_xstart + direction + _where_noisy(t, x) * sigma * noise
        return prediction.output(sample), None


@dataclass(frozen=True)
class DDIMReverse:
    """The deterministic DDIM step backwards, x_t to x_{t+1}: encodes an image as noise (Song et al. 2021, sec. 4.3)."""

    def step(
        self, process: Process, predict: Predict, x: th.Tensor, t: th.Tensor, state: State, draw: Draw
    ) -> tuple[StepOutput, State]:
        prediction = predict(x, t)
        after = process.alpha_bar(t + 1, x)
        sample = th.sqrt(after) * prediction.pred_xstart + th.sqrt(1 - after) * prediction.eps
        return prediction.output(sample), None


# Adams-Bashforth weights of eps_t, eps_{t+1}, ... (Liu et al. 2022, eq. 12, and its lower orders)
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class PLMS:
    """Pseudo linear multistep (Liu et al. 2022): DDIM's step along a combination of the last `order` eps.

    The first step is a pseudo improved Euler step, so the order in the step size is 1 for `order` 1, else 2. Its state
    is the past eps, newest last.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in ADAMS_BASHFORTH:
            raise ValueError(f"plms order {self.order} is unknown: use 1, 2, 3 or 4")

    def step(
        self, process: Process, predict: Predict, x: th.Tensor, t: th.Tensor, state: State, draw: Draw
    ) -> tuple[StepOutput, State]:
        prediction = predict(x, t).guided("score")
        history = (*(state or ()), prediction.eps)[-self.order :]
        if state is None and self.order > 1 and bool((t > 0).any()):
            ahead = self._move(process, x, t, prediction.eps)
            eps = (prediction.eps + predict(ahead, (t - 1).clamp(min=0)).guided("score").eps) / 2
        else:
            weights = ADAMS_BASHFORTH[len(history)]
            eps = sum((w * past for w, past in zip(weights, reversed(history), strict=True)), th.zeros_like(x))
        sample = th.where(_where_noisy(t, x), self._move(process, x, t, eps), prediction.pred_xstart)
        return prediction.output(sample) | {"old_eps": list(history)}, history

    @staticmethod
    def _move(process: Process, x: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        """DDIM's step with eta = 0 along a given eps."""
        before = process.alpha_bar(t - 1, x)
        return th.sqrt(before) * process.predict_xstart(x, t, eps) + th.sqrt(1 - before) * eps


SAMPLERS: dict[str, type[Any]] = {"ddpm": Ancestral, "ddim": DDIM, "plms": PLMS}


def make_sampler(name: str, **options: Any) -> Sampler:
    """The sampler called `name`, e.g. ``make_sampler("ddim", eta=0.5)``.

    :raises ValueError: if there is no such sampler, or it has no such option.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown: use one of {', '.join(SAMPLERS)}{nearest(name, SAMPLERS)}")
    known = [spec.name for spec in fields(SAMPLERS[name])]
    for option in options:
        if option not in known:
            takers = [other for other, kind in SAMPLERS.items() if option in [spec.name for spec in fields(kind)]]
            hint = f"it is an option of {', '.join(takers)}" if takers else f"it takes {', '.join(known) or 'none'}"
            raise ValueError(f"the sampler {name} has no option {option}: {hint}")
    sampler: Sampler = SAMPLERS[name](**options)
    return sampler


# ---- the loop


class SampleOptions(TypedDict, total=False):
    """What every sampling loop takes.

    noise: x_T [N, C, H, W]; drawn when absent.
    clip_denoised, denoised_fn: applied to every prediction of x_0, `denoised_fn` first.
    cond_fn: gradient of a log-probability, (x, timesteps, **model_kwargs) -> [N, C, H, W].
    cond_fn_with_grad: cond_fn is called as (x, t, out, **model_kwargs) with a graph from x to out["pred_xstart"].
    model_kwargs: what the network gets besides x and timesteps, e.g. {"y": labels [N]}.
    skip_timesteps: how many of the noisiest steps to leave out, starting from `init_image` (default: zeros) noised.
    randomize_class: new random labels in every step, where there are labels in model_kwargs.
    generator: source of all randomness; a sequence of N draws each image from its own.
    progress: show a progress bar.
    """

    noise: th.Tensor | None
    clip_denoised: bool
    denoised_fn: Callable[[th.Tensor], th.Tensor] | None
    cond_fn: Callable[..., th.Tensor] | None
    model_kwargs: dict[str, Any] | None
    device: th.device | str | None
    progress: bool
    skip_timesteps: int
    init_image: th.Tensor | None
    randomize_class: bool
    cond_fn_with_grad: bool
    generator: Generators


def _drawer(
    make: Callable[..., th.Tensor], shape: Sequence[int], device: th.device, generator: Generators
) -> Callable[[], th.Tensor]:
    """A function that draws a tensor of `shape` from one source of randomness, or image by image from N."""
    if generator is None:
        return lambda: make(tuple(shape), device=device)
    if isinstance(generator, th.Generator):
        return lambda: make(tuple(shape), device=generator.device, generator=generator).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} images: give one, or one per image")
    return lambda: th.stack([make(tuple(shape[1:]), device=g.device, generator=g) for g in generator]).to(device)


def _check_labels(labels: th.Tensor | None, num_classes: int | None) -> None:
    """Refuse labels that the network has no embedding for, before a device assertion does."""
    if labels is not None and num_classes is not None and bool(((labels < 0) | (labels >= num_classes)).any()):
        raise ValueError(f"labels {labels.tolist()} are not all in 0 .. {num_classes - 1}, the network's classes")


def _class_drawer(model: Any, labels: th.Tensor, device: th.device, generator: Generators) -> Draw:
    """A function that draws new labels [N] for the network's classes, in place of the given ones."""
    classes = getattr(model, "num_classes", None)
    if classes is None:
        raise ValueError("randomize_class needs a class-conditional network: one with a number in .num_classes")
    return _drawer(lambda size, **kw: th.randint(classes, size, **kw), tuple(labels.shape), device, generator)


def sample_loop(
    process: Process, sampler: Sampler, model: Any, shape: Sequence[int], **options: Unpack[SampleOptions]
) -> Iterator[StepOutput]:
    """Run `sampler` from x_T to x_0, lazily: one `StepOutput` per step, none taken ahead of its being asked for.

    :param shape: of the images, [N, C, H, W].
    :raises ValueError: for options that cannot take effect.
    """
    device = th.device(options.get("device") or next(model.parameters()).device)
    kwargs = dict(options.get("model_kwargs") or {})
    _check_labels(kwargs.get("y"), getattr(model, "num_classes", None))
    generator = options.get("generator")
    noise = options.get("noise")
    x = _drawer(th.randn, shape, device, generator)() if noise is None else noise.to(device)
    indices = _indices(process.num_timesteps, options.get("skip_timesteps") or 0)
    x = _start(process, x, indices, options)
    if not indices:
        yield {"sample": x, "pred_xstart": x}
    new_classes = None
    if options.get("randomize_class") and kwargs.get("y") is not None:
        new_classes = _class_drawer(model, kwargs["y"], device, generator)
    predict = process.predictor(
        model,
        clip_denoised=options.get("clip_denoised", True),
        denoised_fn=options.get("denoised_fn"),
        cond_fn=options.get("cond_fn"),
        cond_fn_with_grad=options.get("cond_fn_with_grad", False),
        model_kwargs=kwargs,
    )
    # like x in dtype and memory layout, which decides the order in which the global generator's numbers fill it
    draw: Draw = lambda: th.randn_like(x)  # noqa: E731 - it sees the x of its step
    if generator is not None:
        draw = _drawer(partial(th.randn, dtype=x.dtype), shape, device, generator)
    state: State = None
    for index in tqdm(indices) if options.get("progress") else indices:
        if new_classes is not None:
            kwargs["y"] = new_classes()
        with th.no_grad():
            t = th.full((shape[0],), index, device=device)
            output, state = sampler.step(process, predict, x, t, state, draw)
        yield output
        x = output["sample"]


def _indices(num_timesteps: int, skip: int) -> list[int]:
    """The indices of the steps to take, noisiest first."""
    if not 0 <= skip <= num_timesteps:
        raise ValueError(f"skip_timesteps {skip} is not in 0 .. {num_timesteps}, the steps of this process")
    return list(reversed(range(num_timesteps - skip)))


def _start(process: Process, x: th.Tensor, indices: list[int], options: SampleOptions) -> th.Tensor:
    """Where the loop starts: noise, or an image with the noise of the first step taken; no steps leave it as it is."""
    image = options.get("init_image")
    if image is None and not options.get("skip_timesteps"):
        return x
    image = th.zeros_like(x) if image is None else image.to(x)
    sides = zip(reversed(image.shape), reversed(x.shape), strict=False)
    if image.ndim > x.ndim or any(own not in (1, side) for own, side in sides):
        raise ValueError(f"init_image of shape {tuple(image.shape)} does not fit the samples, {tuple(x.shape)}")
    image = image.expand_as(x)
    if not indices:
        return image
    return process.q_sample(image, th.full((len(x),), indices[0], device=x.device), x)
