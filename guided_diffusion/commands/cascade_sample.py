"""Sample from a cascade: a base model, and upsamplers that enlarge what the stage before them made.

Every stage is the command that makes it alone, in a folder of its own below --log_dir: its images are those of that
command bit for bit, and it goes on where it was interrupted as that command does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..config import ClassifierConfig, DiffusionConfig, SuperResConfig, UNetConfig
from ..runtime.options import parse_size
from .flags import Flags
from .sections import CascadeConfig, GuidanceConfig, SampleConfig
from .stages import Stage, parse_stages


def sample(shared: Flags, stages: Sequence[Stage]) -> None:
    """Run the stages one after another.

    :raises ValueError: naming the stage and the flag that is wrong, before anything is sampled where that can be seen.
    """
    from .. import logger
    from . import common

    common.start(shared)
    folder, config = logger.get_dir(), shared.part(CascadeConfig)
    check(stages)
    path = ""
    for number, stage in enumerate(stages):
        own: dict[str, Any] = {"num_samples": config.num_samples, "log_dir": os.path.join(folder, stage.name)}
        own |= {"device": config.device} if config.device else {}
        own |= {"base_samples": path} if path else {}
        own |= {"save_images": True} if config.save_images and number == len(stages) - 1 else {}
        placed = stage.placed(**own)
        logger.log(f"stage {stage.name}, {number + 1} of {len(stages)}: {placed.command_line()}")
        with _told(stage.name), _log_restored():
            path = import_module(f".{placed.flags.command}", __package__).sample(placed.flags)
    logger.log(f"cascade complete: {path}")


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Say of a mistake in which stage it is."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"stage {name}: {error}") from error


@contextmanager
def _log_restored() -> Iterator[None]:
    """The log of the cascade after that of a stage."""
    from ..logger import Logger

    outer = Logger.CURRENT
    try:
        yield
    finally:
        if Logger.CURRENT is not outer and Logger.CURRENT is not None:
            Logger.CURRENT.close()
        Logger.CURRENT = outer


# ---- whether the stages fit, by the configs of their checkpoints


@dataclass(frozen=True)
class Made:
    """What comes out of a stage.

    :param size: (height, width).
    :param labelled: the images have labels.
    :param classes: their names by id, [] where they are not known.
    """

    size: tuple[int, int]
    channels: int
    labelled: bool
    classes: list[str]


def check(stages: Sequence[Stage]) -> None:
    """Refuse a cascade in which one stage cannot follow another.

    :raises ValueError: naming the stage.
    """
    with _told(stages[0].name):
        made = _made_by_base(stages[0].flags)
    for stage in stages[1:]:
        with _told(stage.name):
            made = _made_by_upsampler(stage.flags, made)


def _made_by_base(flags: Flags) -> Made:
    from . import common, editing, guidance

    guidance.check(flags)
    editing.check(flags, common.sampler_of(flags))
    path, flags = _described(flags, UNetConfig)
    config, classes = flags.part(UNetConfig), _classes(path)
    if flags.command == "classifier_sample":
        classes = _classes(common.described(flags, "classifier_path", ClassifierConfig)[0]) or classes
    labelled = config.class_cond or flags.command == "classifier_sample"
    return Made(parse_size(config.image_size), config.image_channels, labelled, classes)


def _made_by_upsampler(flags: Flags, before: Made) -> Made:
    from . import common, super_res_sample as upsampler

    upsampler.check(flags)
    path, flags = _described(flags, SuperResConfig)
    config, guidance, classes = flags.part(SuperResConfig), flags.part(GuidanceConfig), _classes(path)
    upsampler.level_of(flags)
    if guidance.classifier_path:
        common.described(flags, "classifier_path", ClassifierConfig)
    given, wanted = (before.size, before.channels), (parse_size(config.small_size), config.image_channels)
    if given != wanted:
        shown = [f"{size[0]}x{size[1]} with {channels} channels" for size, channels in (wanted, given)]
        raise ValueError(f"the upsampler enlarges images of {shown[0]}, and the stage before makes {shown[1]}")
    guided = bool(guidance.classifier_path and guidance.classifier_scale)
    upsampler.check_labels(flags, before.labelled, wanted=config.class_cond or guided)
    if config.class_cond and before.labelled and before.classes and classes and before.classes != classes:
        raise ValueError(f"the upsampler has classes {_short(classes)}, and the stage before {_short(before.classes)}")
    labelled = before.labelled or bool(flags.part(SampleConfig).classes)
    return Made(parse_size(config.large_size), config.image_channels, labelled, before.classes or classes)


def _described(flags: Flags, section: type[Any]) -> tuple[str, Flags]:
    """The checkpoint of --model_path and the flags over its own, once sampler and steps are possible."""
    from ..script_util import build_diffusion
    from . import common

    path, flags = common.described(common.on_its_grid(flags, common.sampler_of(flags)), "model_path", section)
    build_diffusion(flags.part(DiffusionConfig))
    return path, flags


def _classes(path: str) -> list[str]:
    """The class names that lie beside a checkpoint."""
    from ..image_datasets import load_classes
    from ..training import checkpoints

    names = checkpoints.classes_beside(path)
    return load_classes(names) if names else []


def _short(classes: Sequence[str]) -> str:
    return ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``cascade_sample`` with a command line."""
    shared, stages = parse_stages(argv)
    from .. import dist_util

    dist_util.run(sample, shared, stages)
