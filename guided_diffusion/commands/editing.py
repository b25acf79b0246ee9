"""What the commands that sample share in editing: from flags to what the images of a batch start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch as th

from .. import dist_util, logger
from ..config import DiffusionConfig, RangeConfig, UNetConfig
from ..data.init_images import InitImages
from ..runtime.jobs import Start
from ..runtime.labels import parse_classes
from ..runtime.options import parse_range
from ..sampling.editing import invert, slerp
from ..sampling.loop import network_calls
from ..sampling.samplers import make_sampler
from ..sampling.steps import Sampler
from ..script_util import build_diffusion
from .common import Restored, clipping_of
from .flags import Flags
from .sections import EditConfig, SampleConfig

NEED_IMAGE = ("mask", "strength", "invert", "interpolate")
NEED_MASK = ("mask_invert", "resample", "resample_jump")
STRENGTH = 0.6  # of an image without a mask, where none is given


@dataclass(frozen=True)
class Edit:
    """What the images of a job start from.

    :param options: of the sampling loop.
    :param request: what the result depends on, for `Job.request`.
    :param calls: how often the network is asked per batch before the sampling.
    """

    start: Start | None = None
    options: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    calls: int = 0


def check(flags: Flags, sampler: Sampler) -> None:
    """Refuse flags of editing that are out of range, without effect or contrary, before there are any networks.

    :raises ValueError: naming the flag.
    """
    config, wanted = flags.part(EditConfig), list(flags.changed)
    _check_needs(wanted, NEED_IMAGE, "init_image" if config.init_image else "", "--init_image")
    _check_needs(wanted, NEED_MASK, config.mask, "--mask")
    _check_needs(wanted, ["init_classes"], config.interpolate or config.invert, "--invert or --interpolate")
    if "resample_jump" in wanted and config.resample == 1:
        raise ValueError("--resample_jump has no effect at --resample 1, every step once: give --resample 2 or more")
    if "strength" in flags.changed and not 0 < config.strength <= 1:
        raise ValueError(f"--strength {config.strength} is no share of the way: give above 0 and up to 1")
    for name in ("invert", "mask", "strength"):
        if config.interpolate and name in wanted:
            raise ValueError(f"--interpolate goes all the way between two images: leave --{name} out")
    if (config.interpolate or config.invert) and adds_noise(sampler):
        name = "interpolate" if config.interpolate else "invert"
        raise ValueError(f"--{name} needs a sampler that adds no noise, and {sampler} does: take ddim or dpm++2m")
    if config.interpolate and flags.part(SampleConfig).num_samples < 2:
        raise ValueError("--interpolate goes from one image to another: give --num_samples 2 or more")


def _check_needs(given: Sequence[str], names: Sequence[str], there: Any, what: str) -> None:
    useless = [name for name in names if name in given]
    if useless and not there:
        raise ValueError(f"--{useless[0]} has no effect without {what}: give both or none")


def adds_noise(sampler: Sampler) -> bool:
    """Whether what a sampler draws changes its step; seen from a step with a network that sees no noise."""
    process = build_diffusion(DiffusionConfig(timestep_respacing="4"))
    x, t = th.zeros(1, 1, 1, 1), th.tensor([2])
    predict = process.predictor(lambda x, timesteps: th.zeros_like(x))
    steps = [sampler.step(process, predict, x, t, None, lambda: draw)[0]["sample"] for draw in (x, x + 1)]  # noqa: B023
    return not th.equal(*steps)


def plan(model: Restored, labels: dict[str, Any], count: int) -> Edit:
    """What the flags ask for.

    :param labels: of the job, as `common.labels_of` gives them.
    :param count: how many samples there will be.
    :raises ValueError: if an image or a mask cannot be used.
    """
    config, network = model.flags.part(EditConfig), model.flags.part(UNetConfig)
    if not config.init_image:
        return Edit()
    if network.dims != 2:
        raise ValueError(f"--init_image has no effect with --dims {network.dims}: pictures have 2")
    size, channels = network.image_size, network.image_channels
    span = parse_range(model.flags.part(RangeConfig).data_range)
    images = InitImages(config.init_image, size, channels, masks=config.mask, swap=config.mask_invert, data_range=span)
    for line in images.describe_masks(count):
        logger.log(line)
    if config.interpolate:
        other = InitImages(config.interpolate, size, channels, data_range=span)
        return _interpolation(model, images, other, labels, count)
    strength = config.strength if config.strength > 0 else 1.0 if config.mask or config.invert else STRENGTH
    options: dict[str, Any] = {"strength": strength}
    if config.resample > 1:
        options |= {"resample": config.resample, "jump": config.resample_jump}
    request = {"init_image": images.check(count)}
    if config.invert:
        return _inversion(model, images, options, request)
    return Edit(lambda indices, _: images.rows(indices), options, request)


def _noise_of(model: Restored, images: th.Tensor, labels: th.Tensor | None, strength: float = 1.0) -> th.Tensor:
    """What the unguided sampler without randomness makes these images of, [B, C, H, W]."""
    conditional = model.flags.part(UNetConfig).class_cond
    return invert(
        model.process,
        model.network,
        images.to(dist_util.dev()),
        strength=strength,
        **clipping_of(model.flags),
        model_kwargs={"y": labels.to(dist_util.dev())} if conditional and labels is not None else {},
        device=dist_util.dev(),
    )


def _inversion(model: Restored, images: InitImages, options: dict[str, Any], request: dict[str, Any]) -> Edit:
    """Every sample from the noise of its image, under the image's class."""
    own, strength = _init_classes(model), options["strength"]

    def start(indices: Sequence[int], kwargs: dict[str, Any]) -> dict[str, th.Tensor]:
        labels = th.tensor([own[index % len(own)] for index in indices]) if own else kwargs.get("y")
        rows = images.rows(indices)
        return {**rows, "start": _noise_of(model, rows["init_image"], labels, strength)}

    calls = network_calls(model.process, make_sampler("ddim"), strength=strength)
    return Edit(start, options, {**request, "invert": True, "init_classes": own}, calls)


def _interpolation(model: Restored, first: InitImages, second: InitImages, labels: dict[str, Any], count: int) -> Edit:
    """Samples from noise on the way from that of one image to that of another."""
    for name, images in (("init_image", first), ("interpolate", second)):
        if len(images) > 1:
            raise ValueError(f"--{name} holds {len(images)} images, and --interpolate goes from one to one: give one")
    turns = list(labels.get("labels", ()))
    if model.flags.part(UNetConfig).class_cond and not turns:
        raise ValueError("--interpolate needs the class of every sample: give --classes, one or as many as samples")
    classes = _init_classes(model) or [turns[index % len(turns)] for index in (0, count - 1) if turns]
    ends: list[th.Tensor] = []  # made when first asked for, and for the two at once: the same on every rank

    def start(indices: Sequence[int], _: dict[str, Any]) -> dict[str, th.Tensor]:
        if not ends:
            both = th.cat([images.rows([0])["init_image"] for images in (first, second)])
            own = th.tensor([classes[0], classes[-1]]) if classes else None
            ends.extend(_noise_of(model, both, own))
        return {"start": slerp(ends[0], ends[1], th.tensor([index / (count - 1) for index in indices]))}

    request = {"init_image": first.check(1), "interpolate": second.check(1), "init_classes": classes}
    return Edit(start, {}, request, network_calls(model.process, make_sampler("ddim")))


def _init_classes(model: Restored) -> list[int]:
    """The class ids of --init_classes.

    :raises ValueError: if the model knows none of them, or no classes at all.
    """
    text, config = model.flags.part(EditConfig).init_classes, model.flags.part(UNetConfig)
    if text and not config.class_cond:
        raise ValueError(f"--init_classes {text} has no effect on an unconditional model: leave it out")
    return parse_classes(text, len(model.classes) or config.num_classes, model.classes) if text else []
