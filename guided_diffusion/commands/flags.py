"""Command lines made of the config classes: which script takes which flags, and what a wrong one is answered.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, NamedTuple, NoReturn, TypeVar

from .. import __version__, config as c
from ..runtime.errors import UserError
from ..runtime.launchers import announced_rank
from ..runtime.options import defaults, means_not_given, reader_of, saved_values
from . import sections as s, tool_sections as t
from .flag_files import as_words, flags_in
from .help_page import FIRST_STEPS, example_of, others, width
from .synonyms import SYNONYMS, flag_instead

Section = TypeVar("Section", bound=object)

# what a checkpoint's config.json says
SAVED = (c.UNetConfig, c.SuperResConfig, c.ClassifierConfig, c.DiffusionConfig, s.LatentConfig)
SAVED_NAMES = {spec.name for section in SAVED for spec in fields(section) if not spec.metadata["runtime"]}


class Command(NamedTuple):
    """A script: what it is for and the sections of its flags."""

    about: str
    sections: tuple[type[Any], ...]

    def flags(self) -> dict[str, Field[Any]]:
        """Every flag of the command by name; one of several sections is that of the first."""
        return {spec.name: spec for section in reversed(self.sections) for spec in fields(section)}

    def words(self) -> list[str]:
        """Names and aliases of all flags that are written with two dashes."""
        specs = [spec for spec in self.flags().values() if not spec.metadata["positional"]]
        return [word for spec in specs for word in (spec.name, spec.metadata["alias"]) if word]

    def needs(self, name: str) -> list[str]:
        """What a flag has no effect without, itself and as one of its section."""
        section = next(section for section in self.sections if name in defaults(section))
        return f"{getattr(section, 'NEEDS', '')} {self.flags()[name].metadata['needs']}".split()


UNET = (c.UNetConfig, c.DiffusionConfig)
UPSAMPLER = (c.SuperResConfig, c.DiffusionConfig)
CLASSIFIER = (c.ClassifierConfig, c.DiffusionConfig)
TRAINING = (s.MixConfig, c.LoaderConfig, c.TrainSpeedConfig, s.InitConfig, s.LoraConfig)
EVALUATION = (c.TrainEvaluationConfig, s.ExtractorConfig)
PROMPTED = (s.PromptConfig, s.ClipConfig)
SAMPLING = (
    c.RunConfig,
    s.SampleConfig,
    *PROMPTED,
    s.AdapterConfig,
    s.FreeGuidanceConfig,
    c.RangeConfig,
    c.CompileConfig,
)
MEASURING = (s.LikelihoodConfig, s.MeasureConfig, c.FlowConfig, s.CondDataConfig)

COMMANDS = {
    "image_train": Command(
        "Train a diffusion model.",
        (
            c.RunConfig,
            c.DataConfig,
            c.CaptionConfig,
            c.ImageTrainConfig,
            *TRAINING,
            *EVALUATION,
            s.CondTrainConfig,
            s.LatentTrainConfig,
            *UNET,
        ),
    ),
    "image_sample": Command(
        "Sample from a diffusion model.", (*SAMPLING, s.EditConfig, s.CondSampleConfig, s.LatentConfig, *UNET)
    ),
    "image_nll": Command(
        "Bits per dimension of images under a diffusion model.",
        (c.RunConfig, *MEASURING, s.AdapterConfig, c.CompileConfig, *UNET),
    ),
    "classifier_train": Command(
        "Train a classifier of noisy images.",
        (c.RunConfig, s.ClassifierDataConfig, c.ClassifierTrainConfig, *TRAINING, s.LatentTrainConfig, *CLASSIFIER),
    ),
    "classifier_sample": Command(
        "Sample from a diffusion model, guided by a classifier.",
        (*SAMPLING, s.GuidanceConfig, s.EditConfig, s.CondSampleConfig, s.LatentConfig, c.UNetConfig, *CLASSIFIER),
    ),
    "autoencoder_train": Command(
        "Train an autoencoder, on whose latents a diffusion model can work.",
        (
            c.RunConfig,
            *(c.DataConfig, s.MixConfig),
            c.AutoencoderTrainConfig,
            c.LoaderConfig,
            s.ExtractorConfig,
            c.AutoencoderConfig,
        ),
    ),
    "super_res_train": Command(
        "Train an upsampler.", (c.RunConfig, c.DataConfig, c.CaptionConfig, c.ImageTrainConfig, *TRAINING, *UPSAMPLER)
    ),
    "super_res_sample": Command(
        "Enlarge images.", (*SAMPLING, s.UpsampleConfig, s.GuidanceConfig, c.SuperResConfig, *CLASSIFIER)
    ),
    "cascade_sample": Command(
        "Sample from a cascade: a base model (stage base) and upsamplers (up1, up2, ...). The base takes the flags of "
        "classifier_sample.py, upsamplers those of super_res_sample.py: --base.steps 50 --up1.steps 20.",
        (s.CascadeConfig,),
    ),
    "evaluator": Command(
        "Compare samples with real images: Inception Score, FID, sFID, precision, recall.",
        (t.EvaluatorConfig, c.RangeConfig, s.ExtractorConfig, t.PlaceConfig),
    ),
    "make_reference": Command(
        "Write the reference that samples are compared with.",
        (t.ReferenceConfig, c.RangeConfig, s.ExtractorConfig, t.PlaceConfig),
    ),
    "sweep": Command(
        "Sample at several scales of guidance, and draw what it gains and costs.",
        (
            t.SweepConfig,
            s.PromptConfig,
            c.RangeConfig,
            s.ExtractorConfig,
            c.RunConfig,
            s.LatentConfig,
            c.UNetConfig,
            *CLASSIFIER,
        ),
    ),
    "models": Command("List, show, download and verify the models that have a name.", (t.ModelsConfig,)),
    "download": Command("Fetch weights to the cache.", (t.DownloadConfig,)),
    "convert": Command("Weights of a run or a checkpoint to one file, .safetensors or .pt.", (t.ConvertConfig,)),
    "ema": Command("Make another average of the weights of a run with --ema_profiles.", (t.EmaConfig,)),
    "npz_tool": Command("Images of an npz to PNG files and back.", (t.NpzToolConfig, t.FromImagesConfig)),
    "demo": Command("Sample from the bundled model, with and without guidance, and draw a page.", (t.DemoConfig,)),
    "page": Command("Draw in a browser: a page of all that the models here can do.", (t.PageConfig,)),
}
OTHERS: dict[str, Command] = {}  # what the console does not list: the converters of datasets/ add themselves


def command_of(name: str) -> Command:
    """A command of the console, or a converter."""
    return COMMANDS.get(name) or OTHERS[name]


@dataclass(frozen=True)
class Flags:
    """The flags of one run: what the command line said, over what a checkpoint saved, over the defaults."""

    command: str
    given: Mapping[str, Any]
    saved: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of every flag."""
        return defaults(*command_of(self.command).sections)

    @property
    def values(self) -> dict[str, Any]:
        """Every flag resolved, as plain JSON values."""
        return {**self.defaults, **self.saved, **self.given}

    @property
    def changed(self) -> dict[str, Any]:
        """What the command line gives otherwise than by default: what a flag "without effect" is said of."""
        known = self.defaults
        return {name: value for name, value in self.given.items() if value != known.get(name)}

    def part(self, section: type[Section]) -> Section:
        """The values of one config class."""
        values = self.values
        return section(**{name: values[name] for name in defaults(section)})

    def with_values(self, **values: Any) -> Flags:
        """The same flags with these values, as if the command line had said so."""
        return Flags(self.command, {**self.given, **values}, self.saved)

    def over(self, saved: Mapping[str, Any], *sections: type[Any]) -> Flags:
        """The same command line over flags saved with a checkpoint, taken for the given config classes alone."""
        return Flags(self.command, self.given, {**self.saved, **saved_values(saved, *sections)})

    def check(self, pending: Collection[str] = ()) -> None:
        """Refuse flags of the command line that have no effect beside the others, or contradict them.

        :param pending: flags whose values are not known yet: they meet every need, and contradict nothing.
        """
        command, values = command_of(self.command), self.values
        specs, pending = command.flags(), set(pending) - self.given.keys()

        def holds(condition: str) -> bool:
            name, sign, words = re.split("(!?=|$)", condition, maxsplit=1)
            if name in pending:
                return True
            if sign:
                return (str(values[name]) in words.split(",")) == (sign == "=")
            return bool(values[name]) and not means_not_given(specs[name], values[name])

        for name in self.changed:
            for need in command.needs(name):
                ways = [way for way in need.split("|") if _names(way) <= specs.keys()]
                if ways and not any(all(map(holds, way.split("&"))) for way in ways):
                    text = " or ".join(f"--{way}".replace("&", " with --") for way in ways)
                    text = re.sub("--(tool|action)=", r"the \1 ", text).replace("!=", " other than ").replace("=", " ")
                    fixed = all(_names(way) <= self.saved.keys() for way in ways)
                    remedy = "and the checkpoint is without: leave it out" if fixed else f"leave it out or give {text}"
                    raise UserError(f"--{name} has no effect without {text}{', ' if fixed else ': '}{remedy}")
            for other in specs[name].metadata["excludes"].split():
                if _names(other) <= specs.keys() - pending and holds(other):
                    flag = _names(other).pop()
                    raise UserError(f"--{name} and --{flag} exclude each other{self._remedy(name, flag)}")

    def _remedy(self, name: str, other: str) -> str:
        """What to write where a flag of the command line excludes another one."""
        if other in self.changed:
            return ": give one"
        if other in self.saved.keys() & SAVED_NAMES:
            return f", and the checkpoint has --{other}: leave --{name} out"
        default = self.defaults[other]
        return f": give --{other} {type(default)() if self.values[other] == default else default!r} beside it"


def _names(way: str) -> set[str]:
    """The flags of which one way to meet a need speaks."""
    return {re.split("!?=", condition)[0] for condition in way.split("&")}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence each, said once for all ranks."""

    where = ""  # the file that the flags come from

    def error(self, message: str) -> NoReturn:
        if announced_rank() == 0:
            self._print_message(f"{self.prog}: error: {self.where}{message}\n")
        self.exit(2)


def _paths(name: str, words: Sequence[str], prog: str) -> list[str]:
    reader = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    reader.add_argument(f"--{name}", dest="paths", action="append", default=[])
    return [path for path in ",".join(reader.parse_known_args(words)[0].paths).split(",") if path]


def run_plugins(words: Sequence[str], prog: str) -> None:
    """Run the files of --plugin in a command line, each once."""
    for path in _paths("plugin", words, prog):
        name = f"plugin {os.path.abspath(path)}"
        if name in sys.modules:
            continue
        spec = spec_from_file_location(name, path) if os.path.isfile(path) else None
        if spec is None or spec.loader is None:
            _Parser(prog=prog).error(f"argument --plugin: {path} is no Python file")
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def sampler_names() -> list[str]:
    """The names of all samplers, those of plugins too, as these have loaded the table."""
    loaded = sys.modules.get(f"{__package__.rpartition('.')[0]}.sampling.samplers")
    return list(loaded.SAMPLERS) if loaded else c.SAMPLER_NAMES


def _about(spec: Field[Any]) -> str:
    return str(spec.metadata["help"]).replace("{samplers}", ", ".join(sampler_names()))


def _add_flag(group: argparse._ActionsContainer, spec: Field[Any], saved: bool) -> None:
    """Add the option of one field; a boolean may stand alone (``--use_ddim``) or take a word (``--use_ddim True``)."""
    about, choices = _about(spec).replace("%", "%%"), [choice for choice in spec.metadata["choices"] if choice]
    if spec.metadata["positional"]:
        count: dict[str, Any] = (
            {"nargs": "?", "default": argparse.SUPPRESS} if spec.metadata["positional"] == "?" else {}
        )
        group.add_argument(spec.name, type=reader_of(spec), metavar=spec.name.upper(), help=about, **count)
        return
    names = [f"--{name}" for name in (spec.name, spec.metadata["alias"]) if name]
    listed = "" if set(choices) <= set(re.findall(r"\w+", about)) else f"one of {', '.join(choices)}; "
    shown = ("from the checkpoint, else " if saved else "default: ") + (str(spec.default) or "''")
    options: dict[str, Any] = {"metavar": type(spec.default).__name__.upper(), "help": f"{about} ({listed}{shown})"}
    options |= {"nargs": "?", "const": True} if isinstance(spec.default, bool) else {}
    group.add_argument(*names, dest=spec.name, default=argparse.SUPPRESS, type=reader_of(spec), **options)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Folds texts between words alone: a flag's value may hold a hyphen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=width())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, topic: Any, option: str | None = None) -> None:
        print(help_page(str(self.const), topic if topic != self.const else ""), end="")
        parser.exit(0)


def parser(name: str, only: Sequence[str] = (), title: str = "") -> _Parser:
    """The command line of one script; flags that are not given stay absent from the result.

    :param only: these flags alone, all and those of every command if it is empty; in one group if that has a `title`.
    """
    command, specs = command_of(name), command_of(name).flags()
    positional = [spec.name.upper() for spec in specs.values() if spec.metadata["positional"]]
    result = _Parser(
        prog=f"{name}.py",
        usage=" ".join(["%(prog)s", *positional, "[--FLAG VALUE ...]"]),
        description=textwrap.fill(command.about, width()).replace("%", "%%") + example_of(name),
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {title: list(only)} if title else _groups(command)
    for heading, names in groups.items():
        group = result.add_argument_group(heading)
        for spec in (specs[flag] for flag in names if flag in only or not only):
            saved = spec.name in SAVED_NAMES and "model_path" in specs
            _add_flag(group, spec, saved)
    if only and not title:
        return result
    group = result.add_argument_group("help, and flags from files")
    about = "this page; --help all explains every flag, --help WORD those about a word"
    group.add_argument(
        "-h", "--help", action=_Help, nargs="?", const=name, default=argparse.SUPPRESS, metavar="all", help=about
    )
    group.add_argument("--version", action="version", version=f"guided-diffusion {__version__}")
    about = "flags from a .yaml or .json file, or a run's config.json; of several files the last one, and of all "
    group.add_argument("--config", action="append", metavar="FILE", help=f"{about}the command line has the last word")
    return result


def _groups(command: Command) -> dict[str, list[str]]:
    """The flags of a command by the title of their section; one of several sections is in the first."""
    result, seen = dict[str, list[str]](), set[str]()
    for section in command.sections:
        title = (section.__doc__ or section.__name__).strip().rstrip(".")
        result.setdefault(title, []).extend(name for name in defaults(section) if name not in seen)
        seen |= set(defaults(section))
    return result


def help_page(name: str, topic: str = "") -> str:
    """The text of ``--help``: the flags to start with, and the names of the others.

    :param topic: "all" for every flag, or a word that is looked for in the names and the texts of the flags.
    """
    command, first = command_of(name), FIRST_STEPS.get(name, ("", ""))[0].split()
    if topic not in ("", "all"):
        word = topic.lower()
        near = next((flags.split() for flags, known in SYNONYMS.items() if word in known.split()), [])
        texts = {flag: f"{flag} {_about(spec)}".lower() for flag, spec in command.flags().items()}
        first = [flag for flag, text in texts.items() if flag in near or word in text or word.replace("_", " ") in text]
        nothing = f"no flag of {name}.py is about {topic}: --help all explains every flag\n"
        return parser(name, first).format_help() if first else nothing
    if topic == "all" or not first:
        return parser(name).format_help()
    page = parser(name, first, "the flags to start with")
    rest = {title: [f"--{flag}" for flag in names if flag not in first] for title, names in _groups(command).items()}
    page.epilog = others(rest).replace("%", "%%")
    return page.format_help()


def parse(name: str, argv: Sequence[str] | None = None, *, prog: str = "") -> Flags:
    """The flags of script `name` from a command line; a wrong one ends the process with code 2 and a sentence.

    :param prog: how the sentence begins, where it is not the script's name.
    """
    specs, words, prog = command_of(name).flags(), list(sys.argv[1:] if argv is None else argv), prog or f"{name}.py"
    values, saved = _of_files(name, words, prog)
    if "plugin" in specs:
        run_plugins([*as_words({"plugin": values.get("plugin", "")}), *words], prog)
    command_line = parser(name)
    command_line.prog = prog
    values |= _read(command_line, name, words)
    values.pop("config")
    try:
        values = _with_preset(name, values)
        flags = Flags(name, {k: v for k, v in values.items() if not means_not_given(specs[k], v)}, saved)
        earlier = {"resume_checkpoint", "init_from"} & flags.given.keys()  # it may say anything, and a model what it is
        if saved and flags.given.get("resume_checkpoint", "auto") != "auto":
            raise UserError("--config CONFIG.JSON begins a run and --resume_checkpoint goes on with one: give one")
        flags.check(pending=specs if earlier else SAVED_NAMES if "model_path" in specs else ())
    except ValueError as error:
        command_line.error(str(error))
    return flags


def _with_preset(name: str, words: dict[str, Any]) -> dict[str, Any]:
    """The words of a command line over the flags of the model that --preset names."""
    if not words.get("preset"):
        return words
    from . import presets

    return presets.given(words["preset"], name, command_of(name).flags().keys(), words)


def _read(command_line: argparse.ArgumentParser, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Flag -> value of some words."""
    namespace, unknown = command_line.parse_known_intermixed_args(words)
    for word in unknown:
        if not word.startswith("-"):
            command_line.error(f"unexpected word {word}: flags are written --NAME VALUE; --help lists them")
        command_line.error(f"unknown flag {word}{flag_instead(word, command_of(name).words())}")
    return vars(namespace)


def _of_files(name: str, words: Sequence[str], prog: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flag -> value in the files of --config, of which later ones have the last word: those given, those of runs."""
    given, saved, specs = dict[str, Any](), dict[str, Any](), command_of(name).flags()
    for path in _paths("config", words, prog):
        file = parser(name, [flag for flag, spec in specs.items() if not spec.metadata["positional"]])
        file.prog = prog
        try:
            flags, of_run = flags_in(path)
            words_of_file = as_words(flags)
        except UserError as error:
            file.error(str(error))
        file.where = f"{path}: "
        values = _read(file, name, words_of_file)
        given = {flag: value for flag, value in given.items() if flag not in values}
        saved = {flag: value for flag, value in saved.items() if flag not in values}
        (saved if of_run else given).update(values)
    return given, saved
