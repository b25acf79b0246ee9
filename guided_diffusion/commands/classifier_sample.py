"""Sample from a diffusion model, guided by a classifier of noisy images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guided_diffusion import cli
from guided_diffusion.commands._entry import entry
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, GuidanceConfig, UNetConfig

if TYPE_CHECKING:
    from guided_diffusion.commands._common import Restored

SHARED = {
    "image_size": (UNetConfig, ClassifierConfig),
    "image_channels": (UNetConfig, ClassifierConfig),
    "dims": (UNetConfig, ClassifierConfig),
    "diffusion_steps": (DiffusionConfig, DiffusionConfig),
    "noise_schedule": (DiffusionConfig, DiffusionConfig),
    "rescale_timesteps": (DiffusionConfig, DiffusionConfig),
}
PER_CLASS = {"num_classes": (UNetConfig, ClassifierConfig)}


def sample(flags: cli.Flags) -> None:
    """Sample as the flags say; the classifier's flags come from its own folder.

    :raises ValueError: naming the flag that is wrong.
    """
    from guided_diffusion.commands import _common as common
    from guided_diffusion.guidance import classifier_guidance, without_labels
    from guided_diffusion.script_util import build_diffusion

    sampler = common.sampler_of(flags)
    common.start(flags)
    model = common.restore_unet(flags)
    classifier = common.restore_classifier(model.flags)
    check_agreement(model, classifier)
    flags = model.flags
    config, scale = flags.part(UNetConfig), flags.part(GuidanceConfig).classifier_scale
    names = classifier.classes or model.classes
    labels = common.labels_of(flags, names, classifier.flags.part(ClassifierConfig).num_classes)
    request = {**classifier.identity, **model.identity, "classifier_scale": scale}
    shape = common.image_shape(config.image_channels, config.image_size, config.dims)
    job = common.job_of(flags, sampler, shape, request, **labels)
    # at scale 0 there is no guide, not one of zeros: from x_0 to the score and back it would round
    guide = classifier_guidance(classifier.network, scale) if scale else None
    network = model.network if config.class_cond else without_labels(model.network)
    common.sample_and_say(flags, build_diffusion(flags.part(DiffusionConfig)), network, job, cond_fn=guide)


def check_agreement(model: Restored, classifier: Restored) -> None:
    """Refuse a classifier that was trained for other images, classes or noise than the model.

    :raises ValueError: naming both values of the first flag that differs.
    """
    conditional = model.flags.values["class_cond"]
    pairs: dict[str, tuple[type[Any], type[Any]]] = {**SHARED, **(PER_CLASS if conditional else {})}
    values = {
        name: (getattr(model.flags.part(ours), name), getattr(classifier.flags.part(theirs), name))
        for name, (ours, theirs) in pairs.items()
    }
    if conditional and model.classes and classifier.classes:
        values["classes"] = (model.classes, classifier.classes)
    for name, (ours, theirs) in values.items():
        if ours != theirs:
            raise ValueError(
                f"the model has {name} {ours} and the classifier {theirs}: guidance needs a classifier trained "
                "for the same images, classes and noise as the model"
            )


main = entry("classifier_sample", sample)
