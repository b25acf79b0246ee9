"""What the commands that sample share in guidance: from flags to a guided network and a guide."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ..config import DiffusionConfig
from ..sampling.guidance import autoguidance, classifier_free, classifier_guidance, interval, without_labels
from ..sampling.prediction import traits_of
from ..sampling.samplers import DDIM, PLMS, Ancestral
from .common import Restored, refuse_difference, restore_weaker, sampler_of
from .flags import Flags
from .sections import FreeGuidanceConfig, GuidanceConfig, SampleConfig

SAME_IMAGES = ("image_size", "large_size", "small_size", "image_channels", "dims", "cond_type", "cond_channels")
SAME_NOISE = ("diffusion_steps", "noise_schedule", "rescale_timesteps", "zero_terminal_snr")
SAME_OUTPUT = ("predict_xstart", "predict_v", "learn_sigma")


@dataclass(frozen=True)
class Guided:
    """A network to sample from.

    :param options: of the sampling loop.
    :param request: what the result depends on, for `Job.request`.
    """

    network: Any
    options: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


def check(flags: Flags) -> None:
    """Refuse flags of guidance that are out of range or without effect, before there are any networks.

    :raises ValueError: naming the flag.
    """
    config = flags.part(FreeGuidanceConfig)
    if config.cfg_rescale > 1:
        raise ValueError(f"--cfg_rescale {config.cfg_rescale} is no share: give a number from 0 (none) to 1")
    if config.cfg_rescale and config.cfg_scale == 1:
        raise ValueError("--cfg_rescale has no effect at --cfg_scale 1, where nothing guides: give both or none")
    if "autoguide_scale" in flags.changed and not config.autoguide_path:
        raise ValueError("--autoguide_scale has no effect without --autoguide_path: give both or none")
    if config.autoguide_path and config.autoguide_scale == 1:
        raise ValueError("--autoguide_path has no effect at --autoguide_scale 1, the model alone: give another, e.g. 2")
    by_classifier = flags.values.get("classifier_path") and flags.values["classifier_scale"]
    if flags.values.get("clip_guided", "auto") != "auto":
        _check_clipping(flags, guided=bool(by_classifier))
    if config.guidance_interval:
        parse_interval(config.guidance_interval)
        if config.cfg_scale == 1 and not config.autoguide_path and not by_classifier:
            raise ValueError("--guidance_interval has no effect where nothing guides: give a scale of guidance as well")


def _check_clipping(flags: Flags, *, guided: bool) -> None:
    choice = flags.values["clip_guided"]
    if not guided:
        raise ValueError(f"--clip_guided {choice} has no effect where no classifier guides: leave it out")
    if type(sampler_of(flags)) is Ancestral:
        raise ValueError(f"--clip_guided {choice} has no effect on ddpm, whose mean is guided: leave it out")
    if choice == "True" and not _clips(flags):
        raise ValueError("--clip_guided True has no effect with --clip_denoised False: give one of the two")


def _clips(flags: Flags) -> bool:
    config = flags.part(SampleConfig)
    return config.clip_denoised or config.dynamic_threshold > 0


def _clipping_again(flags: Flags) -> dict[str, bool]:
    """Whether the guided x_0 is clipped, as an option of the loop; {} where there is nothing to clip.

    By default it is, but for what the originals offer, where their images are kept: ddim and plms on their grids.
    """
    choice, kind = flags.values["clip_guided"], type(sampler_of(flags))
    if kind is Ancestral or not _clips(flags):
        return {}
    grid = re.fullmatch(r"(ddim)?[\d, ]*", flags.values["timestep_respacing"])
    theirs = kind in (DDIM, PLMS) and grid and not flags.part(SampleConfig).steps
    return {"clip_guided": choice == "True" or (choice == "auto" and not theirs)}


def parse_interval(text: str) -> tuple[float, float]:
    """(low, high) of "LOW,HIGH", the first and the last timestep of training with guidance.

    :raises ValueError: if these are not two numbers in rising order.
    """
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1] < math.inf:
        raise ValueError(f"--guidance_interval {text!r} is no interval: write LOW,HIGH in timesteps, such as 200,700")
    return numbers[0], numbers[1]


def guided(model: Restored, classifier: Restored | None = None) -> Guided:
    """The network that the flags ask for and the options of the loop that guide it; what has no effect is left out.

    :raises ValueError: if the networks cannot be guided so.
    """
    config = model.flags.part(FreeGuidanceConfig)
    result = _free(model, config) if config.cfg_scale != 1 else Guided(model.network)
    if config.autoguide_path:
        result = _away_from_weaker(model, config, result)
    scale = model.flags.part(GuidanceConfig).classifier_scale if classifier else 0.0
    # at scale 0 there is no guide, not one of zeros: from x_0 to the score and back it would round
    guide = classifier_guidance(classifier.network, scale) if classifier and scale else None
    if classifier:
        result.request.update(classifier.identity | {"classifier_scale": scale})
    if config.guidance_interval:
        bounds = _interval(model, config.guidance_interval)
        network = result.network if result.network is model.network else interval(result.network, *bounds)
        guide = guide and interval(guide, *bounds)
        result = Guided(network, {}, {**result.request, "guidance_interval": list(bounds)})
    if guide is not None:
        result.options.update(cond_fn=guide, **_clipping_again(model.flags))
    return result


def _free(model: Restored, config: FreeGuidanceConfig) -> Guided:
    """Classifier-free guidance by the network's own null class and null conditioning image."""
    seen = model.flags.values.get("cond_type", "")
    if not model.flags.values["class_cond"] and not seen:
        raise ValueError(f"--cfg_scale {config.cfg_scale} has no effect on an unconditional model: leave it out")
    if traits_of(model.network).null_label is None and not traits_of(model.network).null_cond:
        dropout = "--cond_dropout" if seen and not model.flags.values["class_cond"] else "--class_dropout"
        raise ValueError(
            f"--cfg_scale {config.cfg_scale} needs a network that knows 'no class', and {model.path} was trained "
            f"without {dropout}: train with {dropout} 0.1, or guide with a classifier"
        )
    network = classifier_free(model.network, config.cfg_scale, rescale=config.cfg_rescale)
    return Guided(network, {}, {"cfg_scale": config.cfg_scale, "cfg_rescale": config.cfg_rescale})


def _away_from_weaker(model: Restored, config: FreeGuidanceConfig, strong: Guided) -> Guided:
    """Guidance away from the model of --autoguide_path, which may be unconditional where the model has classes."""
    weak = restore_weaker(model.flags)
    names = [name for name in (*SAME_IMAGES, *SAME_NOISE, *SAME_OUTPUT) if name in model.flags.values]
    pairs = {name: (model.flags.values[name], weak.flags.values[name]) for name in names}
    if weak.flags.values["class_cond"]:
        pairs |= {name: (model.flags.values[name], weak.flags.values[name]) for name in ("class_cond", "num_classes")}
        pairs |= {"classes": (model.classes, weak.classes)} if model.classes and weak.classes else {}
    refuse_difference(pairs, "weaker model", "it must be of the same images, classes, noise and kind of prediction")
    other = weak.network if weak.flags.values["class_cond"] else without_labels(weak.network)
    network = autoguidance(strong.network, other, config.autoguide_scale)
    own = {f"autoguide {name}": value for name, value in weak.identity.items()}
    return Guided(network, {}, {**strong.request, "autoguide_scale": config.autoguide_scale, **own})


def _interval(model: Restored, text: str) -> tuple[float, float]:
    """The bounds in the unit of what networks are fed.

    :raises ValueError: if no step lies between them.
    """
    low, high = parse_interval(text)
    if not any(low <= tau <= high for tau in model.process.timestep_map):
        raise ValueError(f"--guidance_interval {text} holds none of the steps, which are {_ends(model)}: widen it")
    steps = model.flags.part(DiffusionConfig)
    unit = 1000.0 / steps.diffusion_steps if steps.rescale_timesteps else 1.0
    return low * unit, high * unit


def _ends(model: Restored) -> str:
    first, last = model.process.timestep_map[0], model.process.timestep_map[-1]
    return f"{len(model.process.timestep_map)} from {first:g} to {last:g}"
