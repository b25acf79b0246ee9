"""Sample from a cascade: a base model, and upsamplers that enlarge what the stage before them made.

Every stage is the command that makes it alone, in a folder of its own below --log_dir: its images are those of that
command bit for bit, and it goes on where it was interrupted as that command does.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..runtime.errors import UserError, refuse
from .flag_files import as_words, read_table
from .flags import COMMANDS, Flags, parse, parser
from .sections import SEED_STEP, CascadeConfig

NAME = "cascade_sample"
# flags of the stages' commands that no stage is given by itself
FILLED_IN = ("log_dir", "device", "num_samples", "base_samples", "start_index", "shard")


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``cascade_sample`` with a command line."""
    shared, stages = parse_stages(argv)
    from .. import dist_util

    dist_util.run(sample, shared, stages)


def parse_stages(argv: Sequence[str] | None = None) -> tuple[Flags, dict[str, Flags]]:
    """The flags that all stages share, and those of each; a wrong word ends the process with code 2 and a sentence."""
    shared_words, dotted = list[str](), dict[str, list[str]]()
    taker = shared_words  # a value stays with the flag before it
    for word in sys.argv[1:] if argv is None else argv:
        match = re.match(r"--(\w+)\.(.+)", word, re.DOTALL)
        if match:
            taker = dotted.setdefault(match[1], [])
        elif word.startswith("--"):
            taker = shared_words
        taker.append(f"--{match[2]}" if match else word)
    shared = parse(NAME, shared_words)
    words = _words_of_file(shared.values["stages"]) if shared.values["stages"] else {}
    words |= {name: words.get(name, []) + more for name, more in dotted.items()}
    names = ["base", *(f"up{number}" for number in range(1, max(len(words), 2)))]
    for name in sorted({*words} ^ {*names}):
        fault = f"is missing: give its flags, as --{name}.model_path" if name in names else "is none of these"
        parser(NAME).error(f"the stages are {', '.join(names)}, and {name} {fault}")
    stages = {name: _flags_of(shared, number, name, words[name]) for number, name in enumerate(names)}
    if shared.values["save_images"]:
        stages[names[-1]] = stages[names[-1]].with_values(save_images=True)
    return shared, stages


def _words_of_file(path: str) -> dict[str, list[str]]:
    try:
        stages, remedy = read_table(path), "write for example up1: {model_path: run}"
        refuse(
            *((not isinstance(flags, dict), f"{path}: {name} is no stage: {remedy}") for name, flags in stages.items())
        )
        return {name: as_words(flags) for name, flags in stages.items()}
    except UserError as error:
        parser(NAME).error(f"--stages {error}")


def _flags_of(shared: Flags, number: int, name: str, words: Sequence[str]) -> Flags:
    """The flags of a stage: its own over those that all share."""
    flags = parse("super_res_sample" if number else "classifier_sample", words, prog=f"{NAME}.py: stage {name}")
    for flag in (flag for flag in FILLED_IN if flag in flags.changed):
        remedies = {"base_samples": "each stage takes its images from the one before"}
        remedies |= dict.fromkeys(("start_index", "shard"), "sample stage by stage, and merge the parts of each")
        remedy = remedies.get(flag, f"write --{flag}")
        parser(NAME).error(f"stage {name} has no {flag} of its own: {remedy}")
    command = flags.command if number or flags.values["classifier_path"] else "image_sample"
    config, known = shared.part(CascadeConfig), COMMANDS[command].flags()
    of_stage = {flag: value for flag, value in flags.given.items() if flag in known and flag not in FILLED_IN}
    values: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed + number * SEED_STEP}
    optional = {"device": config.device}
    if not number:  # upsamplers take them from the images
        optional |= {"classes": config.classes, "prompt": config.prompt, "prompts": config.prompts}
    values |= {flag: value for flag, value in optional.items() if value}
    return Flags(command, {**values, **of_stage, "num_samples": config.num_samples})


def sample(shared: Flags, stages: Mapping[str, Flags]) -> None:
    """Run the stages one after another; a mistake is named before anything is sampled where that can be seen."""
    from .. import logger
    from . import common, sampling

    common.start(shared)
    folder, path, made = logger.get_dir(), "", None
    for name, flags in stages.items():
        with _stage(name):
            made = sampling.made(flags, made)
    for number, (name, flags) in enumerate(stages.items(), start=1):
        flags = flags.with_values(log_dir=f"{folder}/{name}", **({"base_samples": path} if path else {}))
        words = [f"--{flag}={value}" for flag, value in flags.given.items()]
        logger.log(f"stage {name}, {number} of {len(stages)}: {shlex.join([f'{flags.command}.py', *words])}")
        with _stage(name):
            path = (sampling.enlarge if path else sampling.sample)(flags)
    logger.log(f"cascade complete: {path}")


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Name the stage of a mistake; afterwards the log of the cascade is current again."""
    from ..logger import Logger

    log = Logger.CURRENT
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"stage {name}: {error}") from error
    finally:
        if Logger.CURRENT is not None and Logger.CURRENT is not log:
            Logger.CURRENT.close()
        Logger.CURRENT = log
