"""Enlarge images with an upsampler and save them in an npz, in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import RangeConfig, RunConfig, SuperResConfig
from ..runtime.options import parse_range, parse_size
from .entry import entry
from .flags import Flags
from .sections import GuidanceConfig, SampleConfig, UpsampleConfig

if TYPE_CHECKING:
    from ..data.sources import ImageSource
    from ..data.upsampling import BaseImages
    from .common import Restored

SHARED = ("image_channels", "dims", "diffusion_steps", "noise_schedule", "rescale_timesteps")


def sample(flags: Flags) -> str:
    """Enlarge as the flags say; returns the path of the npz.

    :raises ValueError: naming the flag that is wrong.
    """
    from ..sampling.guidance import without_labels
    from . import common, guidance

    sampler = common.sampler_of(flags)
    flags = common.on_its_grid(flags, sampler)
    check(flags)
    common.start(flags)
    model = common.restore_upsampler(flags)
    flags = model.flags
    config, level = flags.part(SuperResConfig), level_of(flags)
    classifier = classifier_of(model)
    guided = guidance.guided(model, classifier)
    names = (classifier.classes if classifier else []) or model.classes
    wanted = config.class_cond or "cond_fn" in guided.options
    base = read_base(flags, names, labelled=wanted)
    request = {**guided.request, **model.identity, **base.request(), **({"cond_aug_level": level} if level else {})}
    size = {"num_samples": len(base), "names": base.names}
    size["conditioning"] = partial(base.conditioning, level=level, seed=flags.part(RunConfig).seed)
    labels = labels_of(flags, base.labels, names, wanted=wanted)
    shape = (config.image_channels, *parse_size(config.large_size))
    job = common.job_of(flags, sampler, shape, request, **size, **labels)
    network = guided.network if config.class_cond else without_labels(guided.network)
    return common.sample_and_say(flags, model.process, network, job, **guided.options)


def check(flags: Flags) -> None:
    """Refuse flags of guidance that are out of range or without effect, before there are any networks.

    :raises ValueError: naming the flag.
    """
    from . import guidance

    if not flags.part(GuidanceConfig).classifier_path:
        useless = [name for name in flags.changed if name.startswith("classifier_") or name == "clip_guided"]
        if useless:
            raise ValueError(f"--{useless[0]} has no effect without --classifier_path: give both or none")
        if "image_size" in flags.changed:
            raise ValueError("--image_size is that of a classifier: an upsampler has --large_size and --small_size")
    guidance.check(flags)


def level_of(flags: Flags) -> float:
    """The noise to put on the small images.

    :raises ValueError: if the upsampler was not trained with as much.
    """
    level, trained = flags.part(UpsampleConfig).cond_aug_level, flags.part(SuperResConfig).cond_aug
    if level and not trained:
        raise ValueError(f"--cond_aug_level {level} needs an upsampler trained with --cond_aug, and this one was not")
    if level > trained:
        raise ValueError(f"--cond_aug_level {level} is above {trained}, the greatest level of the training")
    return level


def classifier_of(model: Restored) -> Restored | None:
    """The classifier of --classifier_path, None without.

    :raises ValueError: if it was trained for other images, classes or noise than the upsampler.
    """
    from . import common

    if not model.flags.part(GuidanceConfig).classifier_path:
        return None
    classifier = common.restore_classifier(model.flags)
    ours, theirs = model.flags.values, classifier.flags.values
    pairs: dict[str, tuple[Any, Any]] = {
        "large_size": (parse_size(ours["large_size"]), parse_size(theirs["image_size"]))
    }
    pairs |= {name: (ours[name], theirs[name]) for name in SHARED}
    if ours["class_cond"]:
        pairs["num_classes"] = ours["num_classes"], theirs["num_classes"]
        pairs |= {"classes": (model.classes, classifier.classes)} if model.classes and classifier.classes else {}
    remedy = "guidance needs a classifier trained for the same images, classes and noise as the upsampler's output"
    common.refuse_difference(pairs, "classifier", remedy)
    return classifier


def read_base(flags: Flags, classes: list[str] | None = None, *, labelled: bool = False) -> BaseImages:
    """The images of --base_samples, as many as are wanted, and their labels if any.

    :param classes: class names by id, where they are known.
    :param labelled: the files of a folder or zip tell their classes, where --classes does not.
    :raises ValueError: if there are fewer than asked for, or they do not fit the upsampler.
    """
    from .. import logger
    from ..data.upsampling import Wanted, read_base as read

    config, options = flags.part(SuperResConfig), flags.part(SampleConfig)
    labelled = (labelled and not options.classes) or flags.part(UpsampleConfig).class_from != "auto"
    height, width = parse_size(config.small_size)
    wanted = Wanted(
        (height, width, config.image_channels),
        options.num_samples,
        all="num_samples" in flags.changed,
        label=_by_files(flags, classes or []) if labelled else None,
        data_range=parse_range(flags.part(RangeConfig).data_range),
    )
    base = read(flags.part(UpsampleConfig).base_samples, wanted)
    if "num_samples" in flags.given and len(base) < options.num_samples:
        logger.warn(f"{len(base)} images are there, not {options.num_samples}: each is enlarged once")
    if base.left_out and not wanted.all:
        logger.warn(f"the first {len(base)} images are enlarged and {base.left_out} more are not: give --num_samples")
    return base


def _by_files(flags: Flags, classes: list[str]) -> Callable[[ImageSource], list[int]]:
    """The classes of a folder's images by the rule of --class_from."""
    from ..data.labels import read_labels

    def label(listing: ImageSource) -> list[int]:
        config, count = flags.part(UpsampleConfig), len(classes) or flags.part(SuperResConfig).num_classes
        try:
            column = config.label_column
            return read_labels(listing, config.class_from, classes or None, count, label_column=column).ids
        except ValueError as error:
            raise ValueError(f"the images have no labels that fit ({error}); or give --classes") from error

    return label


def labels_of(flags: Flags, own: list[int] | None, names: list[str], *, wanted: bool) -> dict[str, Any]:
    """The labels of the job: the images' own, else those of --classes.

    :param wanted: something asks for labels: the upsampler, or the classifier that guides it.
    :raises ValueError: if labels are wanted and there are none, or they are given twice.
    """
    from . import common

    check_labels(flags, own is not None, wanted=wanted)
    if own is not None:
        return {"labels": own, "class_names": names}
    given = flags.part(SampleConfig).classes
    return common.labels_of(flags, names, flags.values["num_classes"]) if given else {}


def check_labels(flags: Flags, labelled: bool, *, wanted: bool) -> None:
    """Refuse labels that are missing or given twice.

    :param labelled: the images have labels of their own.
    :raises ValueError: naming --classes.
    """
    text = flags.part(SampleConfig).classes
    if text and (labelled or not wanted):
        why = "the images have labels of their own" if wanted else "the upsampler is unconditional"
        raise ValueError(f"--classes {text} has no effect, as {why}: leave it out")
    if wanted and not (labelled or text):
        what = "is class-conditional" if flags.part(SuperResConfig).class_cond else "is guided by a classifier"
        raise ValueError(f"the upsampler {what} and the images have no labels (arr_1): give --classes")


main = entry("super_res_sample", sample)
