"""The one loop that runs every sampler from x_T to x_0, and what happens beside the steps: images to start from, masks.

Shapes: N images, C channels, H W space (or any [N, C, ...]). An index t of the process counts from T-1, the noisiest
step, to 0; level t - 1 is where the step at t ends, and level -1 is the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch as th
from tqdm.auto import tqdm

from ..nn import traits_of
from ..runtime.errors import UserError, nearest, refuse
from ..runtime.labels import check_labels
from .steps import Draw, Generators, Sampler, StepOutput

if TYPE_CHECKING:
    from ..diffusion.methods import SamplingMethods as Process

Image = th.Tensor | None
JUMP = 10  # steps in a stretch that is taken again
# the options of single steps, and their defaults
OF_STEPS = {
    **dict.fromkeys(("denoised_fn", "cond_fn", "clip_guided")),
    "clip_denoised": True,
    "cond_fn_with_grad": False,
}


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
    sampler = process.make_sampler(sampler)
    model_kwargs, generator = options.get("model_kwargs"), options.get("generator")
    labels = (model_kwargs or {}).get("y")
    _check_labels(labels, model)
    _check(sampler, options)
    indices = _indices(process, sampler, options)
    x, image = _start(process, sampler, shape, device, indices, options)
    kept = _Kept.of(process, image, x, options)
    x = kept.paste(x, indices[0] if indices else -1) if kept else x
    if not indices:
        yield {"sample": x, "pred_xstart": x}
    new_labels = None
    if options.get("randomize_class") and labels is not None:
        new_labels = _label_drawer(model, labels, device, generator)
    step_options = {name: dict(options).get(name, default) for name, default in OF_STEPS.items()}
    # without generators each step draws its noise like x, whose layout decides where the numbers go
    draw = None if generator is None else drawer(partial(th.randn, dtype=x.dtype), shape, device, generator)
    callback, state, tables = options.get("callback"), None, dict[object, Any]()
    walk = list(_walk(indices, options))
    for index, back in tqdm(walk) if options.get("progress") else walk:
        kwargs = model_kwargs if new_labels is None else {**(model_kwargs or {}), "y": new_labels()}
        step_options |= {"model_kwargs": kwargs, "last": index == 0, "draw": draw}
        rule = process.rule_at(sampler, index)
        with th.no_grad(), process.tables_kept(tables):
            t = th.full((shape[0],), index, device=device)
            output, state = process.take_step(rule, model, x, t, state, **step_options)
            if kept is not None:
                output["sample"] = kept.paste(output["sample"], index - 1)
        if callback is not None:
            callback(index, output)
        yield output
        x = output["sample"]
        if back is not None and kept is not None:
            x, state = kept.noised(x, index - 1, back), None


def network_calls(process: Process, sampler: Sampler | str, **options: Unpack[SampleOptions]) -> int:
    """How often a run of the loop calls the network."""
    calls, first, sampler = 0, True, process.make_sampler(sampler)
    for index, back in _walk(_indices(process, sampler, options), options):
        rule = process.rule_at(sampler, index)
        calls += rule.stages + first * rule.starting_calls if index else 1
        first = back is not None or (first and rule is not sampler)
    return calls


def _indices(process: Process, sampler: Sampler, options: SampleOptions) -> list[int]:
    """The indices of the steps to take, noisiest first, or last where the sampler goes from the image to noise."""
    steps, skip = process.num_timesteps, options.get("skip_timesteps") or 0
    strength = options.get("strength")
    if strength is not None:
        furthest = strength * (process.original_num_steps - 1)
        skip = sum(tau > furthest for tau in process.timestep_map[:steps]) if strength else steps
    refuse((not 0 <= skip <= steps, f"skip_timesteps {skip} is not in 0 .. {steps}, the steps of this process"))
    if sampler.ascending:
        return list(range(steps - skip - 1))  # the last of them ends where the first one of the way back starts
    return list(reversed(range(steps - skip)))


def _walk(indices: Sequence[int], options: SampleOptions) -> Iterator[tuple[int, int | None]]:
    """(t of a step, t to go back to after it or None)."""
    jump = options.get("jump", JUMP)
    for start in range(0, len(indices), jump):
        stretch = indices[start : start + jump]
        for again in reversed(range(options.get("resample", 1))):
            yield from ((index, stretch[0] if again and index == stretch[-1] else None) for index in stretch)


def _start(
    process: Process, sampler: Sampler, shape: Sequence[int], device: th.device, indices: list[int], options: Any
) -> tuple[th.Tensor, Image]:
    """x at the first step, and the image it may be made of; no steps leave the image as it is."""
    image = options.get("init_image")
    given = image if sampler.ascending else options.get("start")
    if given is not None:
        x = _fitted(given, th.empty(tuple(shape), dtype=given.dtype, device=device), "start")
        return x, None if image is None else _fitted(image, x, "init_image")
    noise = options.get("noise")
    x = drawer(th.randn, shape, device, options.get("generator"))() if noise is None else noise.to(device)
    image = None if image is None else _fitted(image, x, "init_image")
    if image is None and len(indices) == process.num_timesteps:
        return x, None
    clean = th.zeros_like(x) if image is None else image
    return process.q_sample(clean, th.full((len(x),), indices[0], device=device), x) if indices else clean, image


def _fitted(image: th.Tensor, x: th.Tensor, name: str) -> th.Tensor:
    """An image or mask as one for each sample.

    :raises ValueError: if its sides are others.
    """
    sides = zip(reversed(image.shape), reversed(x.shape), strict=False)
    odd = image.ndim > x.ndim or any(given not in (1, side) for given, side in sides)
    refuse((odd, f"{name} of shape {tuple(image.shape)} does not fit the samples, {tuple(x.shape)}"))
    return image.to(x).expand_as(x)


class _Kept:
    """The image where its mask is 1, and the noise that it is kept with."""

    def __init__(self, process: Process, image: th.Tensor, mask: th.Tensor, draw: Draw) -> None:
        self.process, self.image, self.mask, self.draw = process, image, mask, draw

    @classmethod
    def of(cls, process: Process, image: Image, x: th.Tensor, options: SampleOptions) -> _Kept | None:
        """What a mask keeps; None where it keeps nothing and nothing is taken again."""
        mask = options.get("mask")
        if mask is None or image is None:
            return None
        mask = _fitted(mask, x, "mask")
        inside = bool(((mask >= 0) & (mask <= 1)).all())
        refuse((not inside, "mask has values outside of 0 .. 1: 1 keeps the image, 0 paints"))
        needed = mask.flatten(1).any(dim=1).tolist() if options.get("resample", 1) == 1 else [True] * len(mask)
        if not any(needed):
            return None
        separate = _separate(options.get("generator"), x, needed)
        return cls(process, image, mask, drawer(partial(th.randn, dtype=x.dtype), x.shape, x.device, separate))

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


def _separate(generator: Generators, x: th.Tensor, needed: Sequence[bool]) -> Generators:
    """Generators with seeds that are drawn from those of the loop; of several, from those of the images needed."""

    def seeded(source: th.Generator | None, drawn: bool = True) -> th.Generator:
        device = x.device if source is None else source.device
        seed = th.randint(2**63 - 1, (), generator=source, device=device) if drawn else 0
        return th.Generator(device).manual_seed(int(seed))

    if generator is None or isinstance(generator, th.Generator):
        return seeded(generator)
    return [seeded(source, drawn) for source, drawn in zip(generator, needed, strict=False)]


def drawer(
    make: Callable[..., th.Tensor], shape: Sequence[int], device: th.device, generator: Generators
) -> Callable[[], th.Tensor]:
    """A function that draws a tensor of `shape` from one source of randomness, or image by image from N."""
    if generator is None:
        return lambda: make(tuple(shape), device=device)
    if isinstance(generator, th.Generator):
        return lambda: make(tuple(shape), device=generator.device, generator=generator).to(device)
    other = len(generator) != shape[0]
    refuse((other, f"{len(generator)} generators for {shape[0]} images: give one, or one per image"))
    return lambda: th.stack([make(tuple(shape[1:]), device=g.device, generator=g) for g in generator]).to(device)


def _check_labels(labels: Image, model: Any) -> None:
    """Refuse labels that the network has no embedding for, before a device assertion does."""
    traits = traits_of(model)
    if labels is not None and traits.num_classes is not None:
        count = traits.num_classes if traits.null_label is None else traits.null_label + 1
        check_labels(labels.flatten().tolist(), count)


def _label_drawer(model: Any, labels: th.Tensor, device: th.device, generator: Generators) -> Draw:
    """A function that draws new labels [N] for the network's classes, in place of the given ones."""
    classes = traits_of(model).num_classes
    if classes is None:
        raise UserError("randomize_class needs a class-conditional network: one with a number in .num_classes")
    return drawer(lambda size, **kw: th.randint(classes, size, **kw), tuple(labels.shape), device, generator)


def _check(sampler: Sampler, options: SampleOptions) -> None:
    """:raises ValueError: for options that contradict each other or the sampler; TypeError for an unknown one."""
    for name in sorted(set(options) - SampleOptions.__optional_keys__):
        raise TypeError(f"{name} is no option of sampling{nearest(name, SampleOptions.__optional_keys__)}")
    image, mask, noise, start = (options.get(name) is not None for name in ("init_image", "mask", "noise", "start"))
    strength, resample, jump = options.get("strength", None), options.get("resample", 1), options.get("jump", JUMP)
    placed, skips = strength is not None, options.get("skip_timesteps")
    clipped = options.get("clip_denoised", True) or options.get("denoised_fn") is not None
    alone = "has no effect without"
    refuse(
        (options.get("clip_guided") and not clipped, f"clip_guided {alone} clip_denoised or denoised_fn: give one"),
        (strength is not None and not 0 <= strength <= 1, f"strength {strength} is not in 0 .. 1: 0 returns the image"),
        (placed and skips, "strength and skip_timesteps both say where to start: give one of the two"),
        (placed and not image and not start, f"strength {alone} an init_image: give both or none"),
        (mask and not image, f"mask {alone} an init_image: give both or none"),
        (start and noise, "start and noise both say where x is at the first step: give one of the two"),
        (
            start and image and not mask and not placed,
            "init_image has no effect beside start: leave one of the two out",
        ),
        (resample < 1 or jump < 1, f"resample {resample} and jump {jump} must be 1 or more"),
        (resample != 1 and not mask, f"resample {resample} {alone} a mask: leave it out"),
        (jump != JUMP and not mask, f"jump {jump} {alone} a mask: leave it out"),
        (sampler.ascending and (not image or mask or noise), "ddim_reverse needs init_image, and no mask or noise"),
    )
