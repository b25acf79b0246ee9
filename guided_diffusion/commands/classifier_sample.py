"""Sample from a diffusion model, guided by a classifier of noisy images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import ClassifierConfig, DiffusionConfig, UNetConfig
from .entry import entry
from .flags import Flags
from .sections import SampleConfig

if TYPE_CHECKING:
    from .common import Restored

SHARED = {
    "image_size": (UNetConfig, ClassifierConfig),
    "image_channels": (UNetConfig, ClassifierConfig),
    "dims": (UNetConfig, ClassifierConfig),
    "diffusion_steps": (DiffusionConfig, DiffusionConfig),
    "noise_schedule": (DiffusionConfig, DiffusionConfig),
    "rescale_timesteps": (DiffusionConfig, DiffusionConfig),
}
PER_CLASS = {"num_classes": (UNetConfig, ClassifierConfig)}


def sample(flags: Flags) -> str:
    """Sample as the flags say; returns the path of the npz. The classifier's flags come from its own folder.

    :raises ValueError: naming the flag that is wrong.
    """
    from ..sampling.guidance import without_labels
    from . import common, conditioning, editing, guidance

    sampler = common.sampler_of(flags)
    flags = common.on_its_grid(flags, sampler)
    guidance.check(flags)
    editing.check(flags, sampler)
    conditioning.check_sampling(flags)
    common.start(flags)
    model = common.restore_unet(flags)
    classifier = common.restore_classifier(model.flags)
    check_agreement(model, classifier)
    flags, config = model.flags, model.flags.part(UNetConfig)
    names = classifier.classes or model.classes
    labels = common.labels_of(flags, names, classifier.flags.part(ClassifierConfig).num_classes)
    given = conditioning.condition(model, labels, names)
    guided = guidance.guided(model, classifier)
    edit = editing.plan(model, labels, flags.part(SampleConfig).num_samples)
    shape = common.image_shape(config.image_channels, config.image_size, config.dims)
    request = {**guided.request, **model.identity, **edit.request, **given.request}
    job = common.job_of(flags, sampler, shape, request, start=edit.start, **given.job)
    network = guided.network if config.class_cond else without_labels(guided.network)
    loop = {**guided.options, **edit.options}
    return common.sample_and_say(flags, model.process, network, job, calls=edit.calls, **loop)


def check_agreement(model: Restored, classifier: Restored) -> None:
    """Refuse a classifier that was trained for other images, classes or noise than the model.

    :raises ValueError: naming both values of the first flag that differs.
    """
    from .common import refuse_difference

    conditional = model.flags.values["class_cond"]
    pairs: dict[str, tuple[type[Any], type[Any]]] = {**SHARED, **(PER_CLASS if conditional else {})}
    values = {
        name: (getattr(model.flags.part(ours), name), getattr(classifier.flags.part(theirs), name))
        for name, (ours, theirs) in pairs.items()
    }
    if conditional and model.classes and classifier.classes:
        values["classes"] = (model.classes, classifier.classes)
    remedy = "guidance needs a classifier trained for the same images, classes and noise as the model"
    refuse_difference(values, "classifier", remedy)


main = entry("classifier_sample", sample)
