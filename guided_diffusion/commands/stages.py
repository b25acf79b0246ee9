"""The stages of a cascade: from one command line to the flags of each stage."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .flags import COMMANDS, Flags, parse, parser
from .sections import CascadeConfig

NAME = "cascade_sample"
BASE, UPSAMPLER = "base", "up"
SEED_STEP = 1_000_000  # between stages: with one seed for all, a stage would draw the noise of the one before it
OWN = ("log_dir", "device", "num_samples", "base_samples")  # flags of the stages' commands that the cascade fills in

Words = dict[str, list[str]]


@dataclass(frozen=True)
class Stage:
    """One command of a cascade.

    :param name: base, up1, up2, ...
    :param flags: of its command, but those in `OWN`.
    """

    name: str
    flags: Flags

    def placed(self, **own: Any) -> Stage:
        """The stage with flags that the cascade fills in."""
        return Stage(self.name, Flags(self.flags.command, {**self.flags.given, **own}, self.flags.saved))

    def command_line(self) -> str:
        """What runs this stage alone."""
        words = [f"{self.flags.command}.py"]
        for name, value in self.flags.given.items():
            words += [f"--{name}", str(value)]
        return shlex.join(words)


def parse_stages(argv: Sequence[str] | None = None) -> tuple[Flags, list[Stage]]:
    """The flags that all stages share, and the stages; a wrong word ends the process with code 2 and a sentence."""
    shared_words, dotted = _split(sys.argv[1:] if argv is None else argv)
    for word in (word.partition("=")[0].removeprefix("--") for word in shared_words if word.startswith("--")):
        if word not in COMMANDS[NAME].words() and word in COMMANDS["classifier_sample"].words():
            _refuse(f"--{word} is a flag of the stages: write --{BASE}.{word}, --{UPSAMPLER}1.{word}")
    shared = parse(NAME, shared_words)
    words = _words_of_file(shared.part(CascadeConfig).stages)
    for name, more in dotted.items():
        words[name] = words.get(name, []) + more
    names = [BASE, *(f"{UPSAMPLER}{number}" for number in range(1, max(len(words), 2)))]
    for name in words:
        if name not in names:
            _refuse(f"there is a stage {name}, and the stages of {len(words)} are {', '.join(names)}")
    for name in names:
        if name not in words:
            _refuse(f"stage {name} is missing: give its flags, as --{name}.model_path")
    return shared, [_stage(shared, number, name, words[name]) for number, name in enumerate(names)]


def _refuse(message: str) -> NoReturn:
    parser(NAME).error(message)


def _split(argv: Sequence[str]) -> tuple[list[str], Words]:
    """The words that belong to all stages, and those of each; a value stays with the flag before it."""
    shared: list[str] = []
    dotted: Words = {}
    taker = shared
    for word in argv:
        found = re.match(r"--(\w+)\.(.+)", word, re.DOTALL)
        if found:
            taker = dotted.setdefault(found[1], [])
            word = f"--{found[2]}"
        elif word.startswith("--"):
            taker = shared
        taker.append(word)
    return shared, dotted


def _words_of_file(path: str) -> Words:
    """What the file of --stages says, as words of a command line."""
    if not path:
        return {}
    from ..runtime.files import reason

    try:
        stages = _read(path)
        if not isinstance(stages, dict) or not all(isinstance(flags, dict) for flags in stages.values()):
            raise ValueError("it holds no flags by stage")
        return {str(name): [_word(*item) for item in flags.items()] for name, flags in stages.items()}
    except (OSError, ValueError, RecursionError) as error:
        _refuse(f'--stages {path} cannot be used ({reason(error)}): write for example [up1] and model_path = "run"')


def _read(path: str) -> Any:
    import tomllib

    from ..runtime.files import parse_json, read_file

    content = read_file(path)
    return tomllib.loads(content.decode()) if path.lower().endswith(".toml") else parse_json(content)


def _word(name: str, value: Any) -> str:
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"{name} is no text, number, true or false")
    return f"--{name}={value}"


def _stage(shared: Flags, number: int, name: str, words: Sequence[str]) -> Stage:
    """The flags of a stage: its own over those that all share."""
    prog = f"{NAME}.py: stage {name}"
    own = parse("super_res_sample" if number else "classifier_sample", words, prog=prog)
    for flag in OWN:
        if flag in own.changed:
            remedy = "each stage takes its images from the one before" if flag == "base_samples" else f"write --{flag}"
            _refuse(f"stage {name} has no {flag} of its own: {remedy}")
    command = own.command if number or own.values["classifier_path"] else "image_sample"
    known = COMMANDS[command].flags()
    useless = [flag for flag in own.changed if flag not in known]
    if useless:
        _refuse(f"stage {name}: --{useless[0]} has no effect without --classifier_path: give both or none")
    given = {flag: value for flag, value in own.given.items() if flag in known and flag not in OWN}
    return Stage(name, Flags(command, {**_inherited(shared, number), **given}))


def _inherited(shared: Flags, number: int) -> Mapping[str, Any]:
    """What a stage takes from the flags of all."""
    config = shared.part(CascadeConfig)
    flags: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed + number * SEED_STEP}
    return flags if number or not config.classes else {**flags, "classes": config.classes}
