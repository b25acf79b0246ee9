"""Enlarge images with an upsampler and save them in an npz, in the order in which they came."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..config import RangeConfig, RunConfig, SuperResConfig
from ..runtime.errors import UserError
from ..runtime.options import parse_range, parse_size
from .entry import entry
from .flags import Flags
from .sections import GuidanceConfig, SampleConfig, UpsampleConfig

if TYPE_CHECKING:
    from ..data.sources import ImageSource
    from ..data.upsampling import BaseImages


def sample(flags: Flags) -> str:
    """Enlarge as the flags say; returns the path of the npz."""
    from ..sampling.guidance import without_labels
    from . import common, guidance, sampling

    common.sampler_of(flags)  # refuses a wrong one before anything else
    common.start(flags)
    model = common.restore(flags)
    flags = model.flags
    config, level = flags.part(SuperResConfig), level_of(flags)
    classifier = guidance.restore_guide(model) if flags.part(GuidanceConfig).classifier_path else None
    plan = guidance.plan(model, classifier)
    names = (classifier.classes if classifier else []) or model.classes
    base = read_base(flags, names, labelled=wants_labels(flags))
    check_labels(flags, base.labels is not None)
    plan.request |= {**base.request(), **({"cond_aug_level": level} if level else {})}
    plan.job |= {"num_samples": len(base), "names": base.names}
    plan.job["conditioning"] = partial(base.conditioning, level=level, seed=flags.part(RunConfig).seed)
    if base.labels is not None:
        plan.job |= {"labels": base.labels, "class_names": names}
    elif flags.part(SampleConfig).classes:
        plan.job |= sampling.labels_of(flags, names, config.num_classes)
    if not config.class_cond:
        plan.network = without_labels(plan.network)
    return sampling.run(model, plan, common.image_shape(config.image_channels, config.large_size))[0]


def level_of(flags: Flags) -> float:
    """The noise to put on the small images, at most that of the training."""
    level, trained = flags.part(UpsampleConfig).cond_aug_level, flags.part(SuperResConfig).cond_aug
    if level > trained:
        raise UserError(f"--cond_aug_level {level} is above {trained}, the greatest level of the training")
    return level


def wants_labels(flags: Flags) -> bool:
    """Whether the upsampler, or the classifier that guides it, asks for labels."""
    guided = flags.part(GuidanceConfig)
    return flags.part(SuperResConfig).class_cond or bool(guided.classifier_path and guided.classifier_scale)


def read_base(flags: Flags, classes: Sequence[str] = (), *, labelled: bool = False) -> BaseImages:
    """The images of --base_samples, as many as are wanted, and their labels if any.

    :param classes: class names by id, where they are known.
    :param labelled: the files of a folder or zip tell their classes, where --classes does not.
    """
    from .. import logger
    from ..data.labels import read_labels
    from ..data.sources import Selection
    from ..data.upsampling import read_base as read

    config, options, source = flags.part(SuperResConfig), flags.part(SampleConfig), flags.part(UpsampleConfig)

    def label(listing: ImageSource) -> list[int]:
        count, column = len(classes) or config.num_classes, source.label_column
        try:
            return read_labels(listing, source.class_from, classes or None, count, label_column=column).ids
        except ValueError as error:
            raise UserError(f"the images have no labels that fit ({error}); or give --classes") from error

    by_files = (labelled and not options.classes) or source.class_from != "auto"
    selection = Selection(options.num_samples, all="num_samples" in flags.changed, label=label if by_files else None)
    shape = (*parse_size(config.small_size), config.image_channels)
    base = read(source.base_samples, shape, selection, parse_range(flags.part(RangeConfig).data_range))
    if "num_samples" in flags.given and len(base) < options.num_samples:
        logger.warn(f"{len(base)} images are there, not {options.num_samples}: each is enlarged once")
    if base.left_out and not selection.all:
        logger.warn(f"the first {len(base)} images are enlarged and {base.left_out} more are not: give --num_samples")
    return base


def check_labels(flags: Flags, labelled: bool) -> None:
    """Refuse labels that are missing or given twice.

    :param labelled: the images have labels of their own.
    """
    text = flags.part(SampleConfig).classes
    if text and labelled:
        raise UserError(f"--classes {text} has no effect, as the images have labels of their own: leave it out")
    if wants_labels(flags) and not (labelled or text):
        reason = "is class-conditional" if flags.part(SuperResConfig).class_cond else "is guided by a classifier"
        raise UserError(f"the upsampler {reason} and the images have no labels (arr_1): give --classes")


main = entry("super_res_sample", sample)
