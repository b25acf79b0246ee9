"""Sample from a cascade: a base model, and upsamplers that enlarge what the stage before them made.

Every stage is the command that makes it alone, in a folder of its own below --log_dir: its images are those of that
command bit for bit, and it goes on where it was interrupted as that command does.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from ..config import ClassifierConfig, SuperResConfig, UNetConfig
from ..runtime.errors import UserError
from ..runtime.options import parse_size
from .flags import COMMANDS, Flags, parse, parser
from .sections import CascadeConfig, SampleConfig

NAME = "cascade_sample"
BASE, UPSAMPLER = "base", "up"
SEED_STEP = 1_000_000  # between stages: with one seed for all, a stage would draw the noise of the one before it
FILLED_IN = ("log_dir", "device", "num_samples", "base_samples")  # flags of the stages' commands


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``cascade_sample`` with a command line."""
    shared, stages = parse_stages(argv)
    from .. import dist_util

    dist_util.run(sample, shared, stages)


def sample(shared: Flags, stages: Mapping[str, Flags]) -> None:
    """Run the stages one after another.

    :raises ValueError: naming the stage and the flag that is wrong, before anything is sampled where that can be seen.
    """
    from .. import logger
    from . import common, sampling, super_res_sample

    common.start(shared)
    folder, config, path = logger.get_dir(), shared.part(CascadeConfig), ""
    check(stages)
    for number, (name, flags) in enumerate(stages.items(), start=1):
        values: dict[str, Any] = {"num_samples": config.num_samples, "log_dir": os.path.join(folder, name)}
        values |= {"device": config.device} if config.device else {}
        values |= {"base_samples": path} if path else {}
        values |= {"save_images": True} if config.save_images and number == len(stages) else {}
        flags = flags.with_values(**values)
        words = [f"--{flag}={value}" for flag, value in flags.given.items()]
        logger.log(f"stage {name}, {number} of {len(stages)}: {shlex.join([f'{flags.command}.py', *words])}")
        with _stage(name), _log_restored():
            path = (super_res_sample if path else sampling).sample(flags)
    logger.log(f"cascade complete: {path}")


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Say of a mistake in which stage it is."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"stage {name}: {error}") from error


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


# ---- from one command line to the flags of each stage


def parse_stages(argv: Sequence[str] | None = None) -> tuple[Flags, dict[str, Flags]]:
    """The flags that all stages share, and those of each; a wrong word ends the process with code 2 and a sentence."""
    shared_words: list[str] = []
    dotted: dict[str, list[str]] = {}
    taker = shared_words  # a value stays with the flag before it
    for word in sys.argv[1:] if argv is None else argv:
        match = re.match(r"--(\w+)\.(.+)", word, re.DOTALL)
        if match:
            taker = dotted.setdefault(match[1], [])
        elif word.startswith("--"):
            taker = shared_words
        taker.append(f"--{match[2]}" if match else word)
    shared = parse(NAME, shared_words)
    words = _words_of_file(shared.part(CascadeConfig).stages)
    for name, more in dotted.items():
        words[name] = words.get(name, []) + more
    names = [BASE, *(f"{UPSAMPLER}{number}" for number in range(1, max(len(words), 2)))]
    for name in sorted({*words} ^ {*names}):
        what = f"is missing: give its flags, as --{name}.model_path" if name in names else "is none of these"
        _refuse(f"the stages are {', '.join(names)}, and {name} {what}")
    return shared, {name: _flags_of(shared, number, name, words[name]) for number, name in enumerate(names)}


def _refuse(message: str) -> NoReturn:
    parser(NAME).error(message)


def _words_of_file(path: str) -> dict[str, list[str]]:
    """What the file of --stages says, as words of a command line."""
    if not path:
        return {}
    import tomllib

    from ..runtime.files import parse_json, read_file, reason

    try:
        content = read_file(path)
        stages: Any = tomllib.loads(content.decode()) if path.lower().endswith(".toml") else parse_json(content)
        return {name: [f"--{flag}={_plain(value)}" for flag, value in flags.items()] for name, flags in stages.items()}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        _refuse(f'--stages {path} cannot be used ({reason(error)}): write for example [up1] and model_path = "run"')


def _plain(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise UserError(f"{value} is no text, number, true or false")
    return value


def _flags_of(shared: Flags, number: int, name: str, words: Sequence[str]) -> Flags:
    """The flags of a stage: its own over those that all share."""
    flags = parse("super_res_sample" if number else "classifier_sample", words, prog=f"{NAME}.py: stage {name}")
    for flag in FILLED_IN:
        if flag in flags.changed:
            remedy = "each stage takes its images from the one before" if flag == "base_samples" else f"write --{flag}"
            _refuse(f"stage {name} has no {flag} of its own: {remedy}")
    command = flags.command if number or flags.values["classifier_path"] else "image_sample"
    config, known = shared.part(CascadeConfig), COMMANDS[command].flags()
    values: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed + number * SEED_STEP}
    values |= {"classes": config.classes} if config.classes and not number else {}
    own = {flag: value for flag, value in flags.given.items() if flag in known and flag not in FILLED_IN}
    return Flags(command, values | own)


# ---- whether the stages fit, by the configs of their checkpoints


class Made(NamedTuple):
    """The images that come out of a stage.

    :param shape: (height, width, channels).
    :param classes: names by id, [] where they are not known.
    """

    shape: tuple[int, int, int]
    labelled: bool
    classes: list[str]


def check(stages: Mapping[str, Flags]) -> None:
    """Refuse a cascade in which one stage cannot follow another.

    :raises ValueError: naming the stage.
    """
    made: Made | None = None
    for name, flags in stages.items():
        with _stage(name):
            made = _made(flags, made)


def _made(flags: Flags, before: Made | None) -> Made:
    """What a stage makes of the images of the one before, if sampler, steps and checkpoints are possible."""
    from ..script_util import build_diffusion
    from . import common, editing, super_res_sample as upsampler

    sampler = common.sampler_of(flags)
    section: Any = UNetConfig if before is None else SuperResConfig
    checkpoint, flags = common.described(flags, "model_path", section)
    flags.check()
    build_diffusion(common.schedule_of(flags))
    config, classes, guide = flags.part(section), list(checkpoint.classes), flags.values.get("classifier_path")
    guide = guide and common.described(flags, "classifier_path", ClassifierConfig)[0]
    if before is None:
        editing.check(flags, sampler)
        names = list(guide.classes if guide else []) or classes
        return Made((*parse_size(config.image_size), config.image_channels), config.class_cond or bool(guide), names)
    upsampler.level_of(flags)
    needed = (*parse_size(config.small_size), config.image_channels)
    if before.shape != needed:
        shown = ["{}x{} with {} channels".format(*shape) for shape in (needed, before.shape)]
        raise UserError(f"the upsampler enlarges images of {shown[0]}, and the stage before makes {shown[1]}")
    upsampler.check_labels(flags, before.labelled)
    if config.class_cond and before.labelled and before.classes and classes and before.classes != classes:
        raise UserError(f"the upsampler has classes {classes}, and the stage before {before.classes}")
    labelled = before.labelled or bool(flags.part(SampleConfig).classes)
    return Made((*parse_size(config.large_size), config.image_channels), labelled, before.classes or classes)
