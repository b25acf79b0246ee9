"""What samples start from: from the flags of editing to the images or the noise of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch as th

from .. import dist_util, logger
from ..config import DiffusionConfig, RangeConfig, UNetConfig
from ..data.init_images import InitImages
from ..data.labels import listed_classes
from ..runtime.errors import UserError, refuse
from ..runtime.options import parse_range
from ..sampling.editing import invert, slerp
from ..sampling.loop import network_calls
from ..sampling.samplers import make_sampler
from ..sampling.steps import Sampler
from ..script_util import build_diffusion
from . import latent_space
from .flags import Flags
from .sections import EditConfig, SampleConfig

if TYPE_CHECKING:
    from .common import Plan, Restored

STRENGTH = 0.6  # of an image without a mask, where none is given


def check(flags: Flags, sampler: Sampler) -> None:
    """Refuse to turn images to noise by a sampler that adds some."""
    config = flags.part(EditConfig)
    if (config.interpolate or config.invert) and adds_noise(sampler):
        name = "interpolate" if config.interpolate else "invert"
        raise UserError(f"--{name} needs a sampler that adds no noise, and {sampler} does: take ddim or dpm++2m")


def adds_noise(sampler: Sampler) -> bool:
    """Whether what a sampler draws changes its step; seen from a step with a network that sees no noise."""
    process = build_diffusion(DiffusionConfig(timestep_respacing="4"))
    x, t = th.zeros(1, 1, 1, 1), th.tensor([2])
    predict = process.predictor(lambda x, timesteps: th.zeros_like(x))
    steps = [sampler.step(process, predict, x, t, None, lambda: draw)[0]["sample"] for draw in (x, x + 1)]  # noqa: B023
    return not th.equal(*steps)


def extend(plan: Plan, model: Restored) -> None:
    """Let samples start from --init_image, where the flags ask for it."""
    config, network = model.flags.part(EditConfig), model.flags.part(UNetConfig)
    if not config.init_image:
        return
    refuse((network.dims != 2, f"--init_image has no effect with --dims {network.dims}: pictures have 2"))
    count = model.flags.part(SampleConfig).num_samples
    images = images_of(model, config.init_image, masks=config.mask, swap=config.mask_invert)
    for line in images.describe_masks(count):
        logger.log(line)
    text = config.init_classes
    classes = listed_classes(text, len(model.classes) or network.num_classes, model.classes) if text else []
    if config.interpolate:
        _interpolate(plan, model, images, classes)
        return
    strength = config.strength if config.strength > 0 else 1.0 if config.mask or config.invert else STRENGTH
    plan.loop["strength"] = strength
    if config.resample > 1:
        plan.loop |= {"resample": config.resample, "jump": config.resample_jump}
    plan.request["init_image"] = images.check(count)
    rows = latent_space.starts(model.first_stage, images)
    plan.job["start"] = lambda indices, _: rows(indices)
    if model.first_stage is not None:
        plan.job["decode"] = latent_space.pasted(model.first_stage, images)
    if config.invert:
        _invert(plan, model, classes, strength)


def images_of(model: Restored, path: str, **options: Any) -> InitImages:
    """The images at a path, of the size and the channels of the model's."""
    config, span = model.flags.part(UNetConfig), parse_range(model.flags.part(RangeConfig).data_range)
    return InitImages(path, config.image_size, config.image_channels, data_range=span, **options)


def starts_of(model: Restored, images: InitImages) -> th.Tensor:
    """All of some images as what a network works on."""
    return latent_space.starts(model.first_stage, images)(range(len(images)))["init_image"]


def noise_of(
    model: Restored, images: th.Tensor, labels: th.Tensor | None, beside: Mapping[str, th.Tensor], strength: float = 1.0
) -> th.Tensor:
    """The noise that the unguided sampler without randomness turns images [B, C, H, W] to.

    :param beside: the keywords of their prompts.
    """
    conditional, device = model.flags.part(UNetConfig).class_cond, dist_util.dev()
    kwargs = {name: value.to(device) for name, value in beside.items()}
    kwargs |= {"y": labels.to(device)} if conditional and labels is not None else {}
    options = {**model.clipping, "model_kwargs": kwargs, "device": device}
    return invert(model.process, model.network, images.to(device), strength=strength, **options)


def _invert(plan: Plan, model: Restored, classes: list[int], strength: float) -> None:
    images = plan.job["start"]

    def start(indices: Sequence[int], kwargs: dict[str, Any]) -> dict[str, th.Tensor]:
        labels = th.tensor([classes[index % len(classes)] for index in indices]) if classes else kwargs.get("y")
        rows = images(indices, kwargs)
        beside = {name: value for name, value in kwargs.items() if name != "y"}
        return {**rows, "start": noise_of(model, rows["init_image"], labels, beside, strength)}

    plan.job["start"] = start
    plan.request |= {"invert": True, "init_classes": classes}
    plan.calls += network_calls(model.process, make_sampler("ddim"), strength=strength)


def _interpolate(plan: Plan, model: Restored, first: InitImages, classes: list[int]) -> None:
    """Start samples from noise on the way from that of one image to that of another."""
    second = images_of(model, model.flags.part(EditConfig).interpolate)
    count = model.flags.part(SampleConfig).num_samples
    turns = list(plan.job.get("labels", ()))
    unlabelled = model.flags.part(UNetConfig).class_cond and not turns
    several = "images, and --interpolate goes from one to one: give one"
    refuse(
        (len(first) > 1, f"--init_image holds {len(first)} {several}"),
        (len(second) > 1, f"--interpolate holds {len(second)} {several}"),
        (unlabelled, "--interpolate needs the class of every sample: give --classes, one or as many as samples"),
    )
    classes = classes or [turns[index % len(turns)] for index in (0, count - 1) if turns]
    conditioning = plan.job.get("conditioning")  # by prompts
    ends: list[th.Tensor] = []  # made when first asked for, and for the two at once: the same on every rank

    def start(indices: Sequence[int], _: dict[str, Any]) -> dict[str, th.Tensor]:
        if not ends:
            both = th.cat([starts_of(model, images) for images in (first, second)])
            labels = th.tensor([classes[0], classes[-1]]) if classes else None
            ends.extend(noise_of(model, both, labels, conditioning([0, count - 1]) if conditioning else {}))
        return {"start": slerp(ends[0], ends[1], th.tensor([index / (count - 1) for index in indices]))}

    plan.job["start"] = start
    plan.request |= {"init_image": first.check(1), "interpolate": second.check(1), "init_classes": classes}
    plan.calls += network_calls(model.process, make_sampler("ddim"))
