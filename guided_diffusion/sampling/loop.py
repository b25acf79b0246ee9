"""The one loop that runs every sampler from x_T to x_0, and what happens beside the steps: images to start from, masks.

Shapes: N images, C channels, H W space (or any [N, C, ...]). An index t of the process counts from T-1, the noisiest
step, to 0; level t - 1 is where the step at t ends, and level -1 is the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypedDict, Unpack

import torch as th
from tqdm.auto import tqdm

from ..runtime.labels import check_labels
from ..runtime.options import nearest
from .samplers import DDIM, make_sampler
from .steps import Draw, Generators, Process, Sampler, StepOutput, same_index

Image = th.Tensor | None
JUMP = 10  # steps in a stretch that is taken again


class MoreOptions(TypedDict, total=False):
    """What every sampling loop takes beyond the originals' parameters.

    generator: source of all randomness; a sequence of N draws each image from its own.
    start: x at the first step, as it is: the end of an inversion; in place of `noise`, and of `init_image` where there
        is no mask.
    strength: how far from `init_image` to start, in place of `skip_timesteps`: 1 is T-1, 0 returns the image.
    mask: [N or 1, 1 or C, H, W]: 1 keeps `init_image`, 0 paints. What is kept is noised anew for every step, from a
        generator of its own, whose seed is one draw from `generator`, and put back exactly at the end. What lies
        between acts at every step, and so adds up.
    resample, jump: take every stretch of `jump` steps `resample` times, with noise added in between, so that what is
        painted can agree with what is kept (Lugmayr et al. 2022, RePaint).
    clip_guided: whether x_0 is clipped, and given to `denoised_fn`, again after guidance by the score, which moves it
        by sigma^2 / alpha times the gradient: thousands at the start of a cosine schedule. None is True, but False in
        the loops and steps by the originals' names, which do not clip it again. ddpm is guided by the mean, unclipped.
    callback: called as (t, output) after every step.
    """

    generator: Generators
    start: Image
    strength: float | None
    mask: th.Tensor | None
    resample: int
    jump: int
    clip_guided: bool | None
    callback: Callable[[int, StepOutput], object] | None


class SampleOptions(MoreOptions, total=False):
    """What every sampling loop takes.

    noise: x_T [N, C, H, W]; drawn when absent.
    clip_denoised, denoised_fn: applied to every prediction of x_0, `denoised_fn` first.
    cond_fn: gradient of a log-probability, (x, timesteps, **model_kwargs) -> [N, C, H, W], or None for no guidance.
    cond_fn_with_grad: cond_fn is called as (x, t, out, **model_kwargs) with a graph from x to out["pred_xstart"].
    model_kwargs: what the network gets besides x and timesteps, e.g. {"y": labels [N]}.
    skip_timesteps: how many of the noisiest steps to leave out, starting from `init_image` (default: zeros) noised.
    randomize_class: new random labels in every step, where there are labels in model_kwargs.
    progress: show a progress bar.
    """

    noise: Image
    clip_denoised: bool
    denoised_fn: Callable[[th.Tensor], th.Tensor] | None
    cond_fn: Callable[..., th.Tensor | None] | None
    model_kwargs: dict[str, Any] | None
    device: th.device | str | None
    progress: bool
    skip_timesteps: int
    init_image: Image
    randomize_class: bool
    cond_fn_with_grad: bool


def sample_loop(
    process: Process, sampler: Sampler | str, model: Any, shape: Sequence[int], **options: Unpack[SampleOptions]
) -> Iterator[StepOutput]:
    """Run `sampler` from x_T to x_0, lazily: one `StepOutput` per step, none taken ahead of its being asked for.

    :param sampler: or its name, for its own options.
    :param shape: of the images, [N, C, H, W].
    :raises ValueError: for options that cannot take effect.
    :raises TypeError: for an option that there is not.
    """
    device = th.device(options.get("device") or next(model.parameters()).device)
    given, sampler = options.get("model_kwargs"), make_sampler(sampler)
    labels = (given or {}).get("y")
    _check_labels(labels, model)
    _check(sampler, options)
    indices, generator = _indices(process, sampler, options), options.get("generator")
    x, image = _start(process, sampler, shape, device, indices, options)
    kept = _Kept.of(process, image, x, options)
    x = kept.paste(x, indices[0] if indices else -1) if kept else x
    if not indices:
        yield {"sample": x, "pred_xstart": x}
    new_classes = None
    if options.get("randomize_class") and labels is not None:
        new_classes = _class_drawer(model, labels, device, generator)
    asked: dict[str, Any] = {
        "clip_denoised": options.get("clip_denoised", True),
        "denoised_fn": options.get("denoised_fn"),
        "cond_fn": options.get("cond_fn"),
        "cond_fn_with_grad": options.get("cond_fn_with_grad", False),
        "clip_guided": options.get("clip_guided"),
        # without generators each step draws its noise like x, whose layout decides where the numbers go
        "draw": None if generator is None else drawer(partial(th.randn, dtype=x.dtype), shape, device, generator),
    }
    state: Any = None
    walk = list(_walk(indices, options.get("resample", 1), options.get("jump", JUMP)))
    for index, back in tqdm(walk) if options.get("progress") else walk:
        kwargs = given if new_classes is None else {**(given or {}), "y": new_classes()}
        with th.no_grad():
            t = same_index(index, shape[0], device)
            rule = DDIM() if _is_blind(process, sampler, index) else sampler
            output, state = process.take_step(rule, model, x, t, state, model_kwargs=kwargs, **asked)
            if kept is not None:
                output["sample"] = kept.paste(output["sample"], index - 1)
        _call(options.get("callback"), index, output)
        yield output
        x = output["sample"]
        if back is not None and kept is not None:
            x, state = kept.noised(x, index - 1, back), None


def network_calls(process: Process, sampler: Sampler | str, **options: Unpack[SampleOptions]) -> int:
    """How often a run of the loop asks the network."""
    calls, fresh, sampler = 0, True, make_sampler(sampler)
    walk = _walk(_indices(process, sampler, options), options.get("resample", 1), options.get("jump", JUMP))
    for index, back in walk:
        if _is_blind(process, sampler, index):
            calls += 1
            continue
        inner = index > 0
        calls += (getattr(sampler, "stages", 1) if inner else 1) + fresh * inner * getattr(sampler, "starting_calls", 0)
        fresh = back is not None
    return calls


def _call(callback: Callable[[int, StepOutput], object] | None, index: int, output: StepOutput) -> None:
    if callback is not None:
        callback(index, output)


# ---- which steps


def _indices(process: Process, sampler: Sampler, options: SampleOptions) -> list[int]:
    """The indices of the steps to take, noisiest first, or last where the sampler goes from the image to noise."""
    steps, skip = process.num_timesteps, options.get("skip_timesteps") or 0
    strength = options.get("strength")
    if strength is not None:
        furthest = strength * (process.original_num_steps - 1)
        skip = sum(tau > furthest for tau in process.timestep_map[:steps]) if strength else steps
    if not 0 <= skip <= steps:
        raise ValueError(f"skip_timesteps {skip} is not in 0 .. {steps}, the steps of this process")
    if _ascends(sampler):
        return list(range(steps - skip - 1))  # the last of them ends where the first one of the way back starts
    return list(reversed(range(steps - skip)))


def _walk(indices: Sequence[int], resample: int, jump: int) -> Iterator[tuple[int, int | None]]:
    """(t of a step, t to go back to after it or None)."""
    for start in range(0, len(indices), jump):
        stretch = indices[start : start + jump]
        for again in reversed(range(resample)):
            yield from ((index, stretch[0] if again and index == stretch[-1] else None) for index in stretch)


def _ascends(sampler: Sampler) -> bool:
    return bool(getattr(sampler, "ascending", False))


def _is_blind(process: Process, sampler: Sampler, index: int) -> bool:
    """Whether a step starts from pure noise, where solvers that divide by the signal have no step: DDIM takes it."""
    last = index == process.num_timesteps - 1 and bool(getattr(sampler, "needs_signal", False))
    return last and process.no_signal_at_the_end


# ---- where to start


def _start(
    process: Process,
    sampler: Sampler,
    shape: Sequence[int],
    device: th.device,
    indices: Sequence[int],
    options: SampleOptions,
) -> tuple[th.Tensor, Image]:
    """x at the first step, and the image it may be made of; no steps leave the image as it is."""
    given, image = options.get("start"), options.get("init_image")
    if image is not None and _ascends(sampler):
        given = image
    if given is not None:
        x = _fitted(given, th.empty(tuple(shape), dtype=given.dtype, device=device), "start")
        assert x is not None
        return x, _fitted(image, x, "init_image")
    noise = options.get("noise")
    x = drawer(th.randn, shape, device, options.get("generator"))() if noise is None else noise.to(device)
    image = _fitted(image, x, "init_image")
    if image is None and len(indices) == process.num_timesteps:
        return x, None
    clean = th.zeros_like(x) if image is None else image
    return process.q_sample(clean, th.full((len(x),), indices[0], device=device), x) if indices else clean, image


def _fitted(image: Image, x: th.Tensor, name: str) -> Image:
    """An image or mask as one for each sample.

    :raises ValueError: if its sides are others.
    """
    if image is None:
        return None
    sides = zip(reversed(image.shape), reversed(x.shape), strict=False)
    if image.ndim > x.ndim or any(own not in (1, side) for own, side in sides):
        raise ValueError(f"{name} of shape {tuple(image.shape)} does not fit the samples, {tuple(x.shape)}")
    return image.to(x).expand_as(x)


class _Kept:
    """What stays as it is: an image where its mask is 1, and noise for it."""

    def __init__(self, process: Process, image: th.Tensor, mask: th.Tensor, draw: Draw) -> None:
        self.process, self.image, self.mask, self.draw = process, image, mask, draw

    @classmethod
    def of(cls, process: Process, image: Image, x: th.Tensor, options: SampleOptions) -> _Kept | None:
        """What a mask keeps; None where it keeps nothing and nothing is taken again."""
        mask = _fitted(options.get("mask"), x, "mask")
        if mask is None or image is None:
            return None
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError("mask has values outside of 0 .. 1: 1 keeps the image, 0 paints")
        needs = mask.flatten(1).any(dim=1).tolist() if options.get("resample", 1) == 1 else [True] * len(mask)
        if not any(needs):
            return None
        own = _own(options.get("generator"), x, needs)
        return cls(process, image, mask, drawer(partial(th.randn, dtype=x.dtype), x.shape, x.device, own))

    def paste(self, x: th.Tensor, level: int) -> th.Tensor:
        """The samples at `level` with what is kept at the same level of noise."""
        known = self.image
        if level >= 0:
            known = self.process.q_sample(known, th.full((len(x),), level, device=x.device), self.draw())
        return th.where(self.mask == 1, known, th.lerp(x, known, self.mask))

    def noised(self, x: th.Tensor, level: int, back: int) -> th.Tensor:
        """The samples at `level`, taken back to the noisier level `back`."""
        now, then = (self.process.alpha_bar(th.full((len(x),), t, device=x.device), x) for t in (level, back))
        return th.sqrt(then / now) * x + th.sqrt(1 - then / now) * self.draw()


def _own(generator: Generators, x: th.Tensor, needs: Sequence[bool]) -> Generators:
    """Generators of their own, each with a seed that is drawn from one of the loop.

    :param needs: the images that need one; where each has its own generator, that of another is not drawn from.
    """

    def seeded(source: th.Generator | None, drawn: bool = True) -> th.Generator:
        device = x.device if source is None else source.device
        seed = th.randint(2**63 - 1, (), generator=source, device=device) if drawn else 0
        return th.Generator(device).manual_seed(int(seed))

    if generator is None or isinstance(generator, th.Generator):
        return seeded(generator)
    return [seeded(source, drawn) for source, drawn in zip(generator, needs, strict=False)]


# ---- draws and checks


def drawer(
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


def _check_labels(labels: Image, model: Any) -> None:
    """Refuse labels that the network has no embedding for, before a device assertion does."""
    classes, null = getattr(model, "num_classes", None), getattr(model, "null_label", None)
    if labels is not None and classes is not None:
        check_labels(labels.flatten().tolist(), classes if null is None else null + 1)


def _class_drawer(model: Any, labels: th.Tensor, device: th.device, generator: Generators) -> Draw:
    """A function that draws new labels [N] for the network's classes, in place of the given ones."""
    classes = getattr(model, "num_classes", None)
    if classes is None:
        raise ValueError("randomize_class needs a class-conditional network: one with a number in .num_classes")
    return drawer(lambda size, **kw: th.randint(classes, size, **kw), tuple(labels.shape), device, generator)


def _check(sampler: Sampler, options: SampleOptions) -> None:
    """:raises ValueError: for options that contradict each other or the sampler; TypeError for an unknown one."""
    image, mask, strength = options.get("init_image"), options.get("mask"), options.get("strength")
    resample, jump, start = options.get("resample", 1), options.get("jump", JUMP), options.get("start")
    unknown = sorted(set(options) - SampleOptions.__optional_keys__)
    if unknown:
        raise TypeError(f"{unknown[0]} is no option of sampling{nearest(unknown[0], SampleOptions.__optional_keys__)}")
    if options.get("clip_guided") and not options.get("clip_denoised", True) and options.get("denoised_fn") is None:
        raise ValueError("clip_guided has no effect where no prediction is clipped: give clip_denoised or denoised_fn")
    if strength is not None and not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} is not in 0 .. 1: 1 starts from noise, 0 returns the image")
    if strength is not None and options.get("skip_timesteps"):
        raise ValueError("strength and skip_timesteps both say where to start: give one of the two")
    if strength is not None and image is None and start is None:
        raise ValueError("strength has no effect without an init_image: give both or none")
    if mask is not None and image is None:
        raise ValueError("mask has no effect without an init_image: give both or none")
    if start is not None and options.get("noise") is not None:
        raise ValueError("start and noise both say where x is at the first step: give one of the two")
    if start is not None and image is not None and mask is None and strength is None:
        raise ValueError("init_image has no effect beside start, where x is at first: leave one of the two out")
    if resample < 1 or jump < 1:
        raise ValueError(f"resample {resample} and jump {jump} must be 1 or more")
    for name, value, default in (("resample", resample, 1), ("jump", jump, JUMP)):
        if value != default and mask is None:
            raise ValueError(f"{name} {value} has no effect without a mask: leave it out")
    if _ascends(sampler) and (image is None or mask is not None or options.get("noise") is not None):
        raise ValueError("the sampler ddim_reverse goes from an image to noise: give init_image, and no mask or noise")
