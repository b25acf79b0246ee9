"""What the commands that sample share in guidance: from flags to a guided network and a cond_fn."""

from __future__ import annotations

import re
from typing import Any

from ..config import DiffusionConfig
from ..nn import traits_of
from ..runtime.errors import UserError
from ..runtime.options import parse_range, size_flag
from ..sampling.guidance import autoguidance, classifier_free, classifier_guidance, interval, without_labels
from ..sampling.samplers import DDIM, PLMS, Ancestral
from .common import Plan, Restored, restore, sampler_of
from .sections import FreeGuidanceConfig, GuidanceConfig, SampleConfig

# flags that two networks must have in common
OF_A_CLASSIFIER = ("image_size", "image_channels", "dims", "diffusion_steps", "noise_schedule", "rescale_timesteps")
OF_A_WEAKER_MODEL = (
    *OF_A_CLASSIFIER,
    *("large_size", "small_size", "cond_type", "cond_channels"),
    *("zero_terminal_snr", "predict_xstart", "predict_v", "learn_sigma"),
)


def restore_guide(model: Restored) -> Restored:
    """The classifier of --classifier_path, trained for the same images, classes and noise as the model."""
    classifier = restore(model.flags, "classifier_path")
    _check_agreement(model, classifier, "classifier", OF_A_CLASSIFIER)
    return classifier


def _check_agreement(model: Restored, other: Restored, title: str, names: tuple[str, ...]) -> None:
    """Refuse a network that does not go together with the model.

    :param names: flags that have to be the same; classes are compared where both have them.
    """
    ours, theirs = dict(model.flags.values), dict(other.flags.values)
    if title == "classifier" and "large_size" in ours:  # it sees the upsampler's output
        ours["image_size"] = ours["large_size"]
    if ours["class_cond"] and theirs.get("class_cond", True):
        names += ("num_classes", "classes")
        known = model.classes and other.classes
        ours["classes"], theirs["classes"] = (model.classes, other.classes) if known else ([], [])
    for name in (name for name in names if name in ours):
        same = size_flag if name.endswith("_size") else lambda value: value
        if same(ours[name]) != same(theirs[name]):
            both = f"the model has {name} {ours[name]} and the {title} {theirs[name]}"
            raise UserError(f"{both}: they must be of the same images, classes and noise")


def plan(model: Restored, classifier: Restored | None = None) -> Plan:
    """The network that the flags ask for and the options of the loop that guide it; what has no effect is left out."""
    config = model.flags.part(FreeGuidanceConfig)
    result = Plan(model.network)
    if config.cfg_scale != 1:
        _guide_freely(result, model, config)
    if config.autoguide_path:
        _guide_away_from_weaker(result, model, config)
    scale = model.flags.part(GuidanceConfig).classifier_scale if classifier else 0.0
    # at scale 0 there is no guide, not one of zeros: from x_0 to the score and back it would round
    guide = classifier_guidance(classifier.network, scale) if classifier and scale else None
    if classifier:
        result.request |= classifier.identity | {"classifier_scale": scale}
    if config.guidance_interval:
        bounds = _interval(model, config.guidance_interval)
        result.request["guidance_interval"] = list(bounds)
        if result.network is not model.network:
            result.network = interval(result.network, *bounds)
        guide = guide and interval(guide, *bounds)
    if guide is not None:
        result.loop |= {"cond_fn": guide, **_clipping_again(model)}
    result.request |= model.identity
    return result


def _clipping_again(model: Restored) -> dict[str, bool]:
    """Whether the guided x_0 is clipped, as an option of the loop; {} where there is nothing to clip.

    By default it is, except where the originals' images are kept: in ddim and plms on the originals' grids.
    """
    config, values, kind = model.flags.part(SampleConfig), model.flags.values, type(sampler_of(model.flags))
    if kind is Ancestral or not (config.clip_denoised or config.dynamic_threshold):
        return {}
    grid = re.fullmatch(r"(ddim)?[\d, ]*", values["timestep_respacing"])
    theirs = kind in (DDIM, PLMS) and grid and not config.steps
    return {"clip_guided": values["clip_guided"] == "True" or (values["clip_guided"] == "auto" and not theirs)}


def _guide_freely(plan: Plan, model: Restored, config: FreeGuidanceConfig) -> None:
    """Classifier-free guidance by the network's own null class and null conditioning image."""
    traits = traits_of(model.network)
    if traits.null_label is None and not traits.null_cond:
        dropout = "--class_dropout" if model.flags.values["class_cond"] else "--cond_dropout"
        raise UserError(
            f"--cfg_scale {config.cfg_scale} needs a network that knows 'no class', and {model.path} was trained "
            f"without {dropout}: train with {dropout} 0.1, or guide with a classifier"
        )
    plan.network = classifier_free(plan.network, config.cfg_scale, rescale=config.cfg_rescale)
    plan.request |= {"cfg_scale": config.cfg_scale, "cfg_rescale": config.cfg_rescale}


def _guide_away_from_weaker(plan: Plan, model: Restored, config: FreeGuidanceConfig) -> None:
    """Guidance away from the model of --autoguide_path, which may be unconditional where the model has classes."""
    weak = restore(model.flags, "autoguide_path")
    labelled: bool = weak.flags.values["class_cond"]
    _check_agreement(model, weak, "weaker model", OF_A_WEAKER_MODEL + (("class_cond",) if labelled else ()))
    network = weak.network if labelled else without_labels(weak.network)
    plan.network = autoguidance(plan.network, network, config.autoguide_scale)
    plan.request |= {f"autoguide {name}": value for name, value in weak.identity.items()}
    plan.request["autoguide_scale"] = config.autoguide_scale


def _interval(model: Restored, text: str) -> tuple[float, float]:
    """The bounds of --guidance_interval in the unit of what networks are fed."""
    low, high = parse_range(text) or (0.0, 0.0)
    taus: Any = model.process.timestep_map
    if not any(low <= tau <= high for tau in taus):
        steps = f"{len(taus)} from {taus[0]:g} to {taus[-1]:g}"
        raise UserError(f"--guidance_interval {text} holds none of the steps, which are {steps}: widen it")
    schedule = model.flags.part(DiffusionConfig)
    unit = 1000.0 / schedule.diffusion_steps if schedule.rescale_timesteps else 1.0
    return low * unit, high * unit
