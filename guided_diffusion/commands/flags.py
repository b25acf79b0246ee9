"""Command lines made of the config classes: which script takes which flags, and what a wrong one is told.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .. import __version__
from ..config import (
    ClassifierConfig,
    ClassifierDataConfig,
    ClassifierTrainConfig,
    CompileConfig,
    CondDataConfig,
    CondTrainConfig,
    DataConfig,
    DiffusionConfig,
    ExtractorConfig,
    ImageTrainConfig,
    InitConfig,
    LoaderConfig,
    LoraConfig,
    RangeConfig,
    RunConfig,
    SuperResConfig,
    TrainEvaluationConfig,
    TrainSpeedConfig,
    UNetConfig,
)
from ..runtime.launchers import announced_rank
from ..runtime.options import defaults, means_not_given, nearest, reader_of, saved_values
from .sections import (
    AdapterConfig,
    CascadeConfig,
    CondSampleConfig,
    DemoConfig,
    DownloadConfig,
    EditConfig,
    EvaluatorConfig,
    FlowConfig,
    FreeGuidanceConfig,
    FromImagesConfig,
    GuidanceConfig,
    LikelihoodConfig,
    MeasureConfig,
    NpzToolConfig,
    PlaceConfig,
    ReferenceConfig,
    SampleConfig,
    SweepConfig,
    ToPngConfig,
    UpsampleConfig,
)

Section = TypeVar("Section", bound=object)

SAVED = (UNetConfig, SuperResConfig, ClassifierConfig, DiffusionConfig)  # what a checkpoint's config.json says


@dataclass(frozen=True)
class Command:
    """A script: what it is for and the sections of its flags."""

    about: str
    sections: tuple[type[Any], ...]

    def flags(self) -> dict[str, Field[Any]]:
        """Every flag of the command by name."""
        return {spec.name: spec for section in self.sections for spec in fields(section)}

    def words(self) -> list[str]:
        """Everything that may stand behind the two dashes: names and aliases."""
        flags = {name: spec for name, spec in self.flags().items() if not spec.metadata["positional"]}
        return [word for name, spec in flags.items() for word in (name, spec.metadata["alias"]) if word]


COMMANDS = {
    "image_train": Command(
        "Train a diffusion model.",
        (
            *(RunConfig, DataConfig, LoaderConfig, ImageTrainConfig, TrainSpeedConfig, InitConfig, LoraConfig),
            *(TrainEvaluationConfig, ExtractorConfig, CondTrainConfig, UNetConfig, DiffusionConfig),
        ),
    ),
    "image_sample": Command(
        "Sample from a diffusion model.",
        (
            *(RunConfig, SampleConfig, AdapterConfig, FreeGuidanceConfig, EditConfig, CondSampleConfig),
            *(RangeConfig, CompileConfig, UNetConfig, DiffusionConfig),
        ),
    ),
    "image_nll": Command(
        "Bits per dimension of images under a diffusion model.",
        (
            *(RunConfig, LikelihoodConfig, MeasureConfig, FlowConfig, AdapterConfig, CondDataConfig),
            *(CompileConfig, UNetConfig, DiffusionConfig),
        ),
    ),
    "classifier_train": Command(
        "Train a classifier of noisy images.",
        (
            *(RunConfig, ClassifierDataConfig, LoaderConfig, ClassifierTrainConfig, TrainSpeedConfig),
            *(InitConfig, LoraConfig, ClassifierConfig, DiffusionConfig),
        ),
    ),
    "classifier_sample": Command(
        "Sample from a diffusion model, guided by a classifier.",
        (
            *(RunConfig, SampleConfig, AdapterConfig, GuidanceConfig, FreeGuidanceConfig, EditConfig),
            *(CondSampleConfig, RangeConfig, CompileConfig, UNetConfig, ClassifierConfig, DiffusionConfig),
        ),
    ),
    "super_res_train": Command(
        "Train an upsampler.",
        (
            *(RunConfig, DataConfig, LoaderConfig, ImageTrainConfig, TrainSpeedConfig, InitConfig, LoraConfig),
            *(SuperResConfig, DiffusionConfig),
        ),
    ),
    "super_res_sample": Command(
        "Enlarge images.",
        (
            *(RunConfig, SampleConfig, UpsampleConfig, AdapterConfig, GuidanceConfig, FreeGuidanceConfig),
            *(RangeConfig, CompileConfig, SuperResConfig, ClassifierConfig, DiffusionConfig),
        ),
    ),
    "cascade_sample": Command(
        "Sample from a cascade: a base model (stage base) and upsamplers (up1, up2, ...). The base takes the flags of "
        "classifier_sample.py, upsamplers those of super_res_sample.py: --base.steps 50 --up1.steps 20.",
        (CascadeConfig,),
    ),
    "evaluator": Command(
        "Compare samples with real images: Inception Score, FID, sFID, precision, recall.",
        (EvaluatorConfig, RangeConfig, ExtractorConfig, PlaceConfig),
    ),
    "make_reference": Command(
        "Write the reference that samples are compared with.",
        (ReferenceConfig, RangeConfig, ExtractorConfig, PlaceConfig),
    ),
    "sweep": Command(
        "Sample at several scales of guidance, and draw what it gains and costs.",
        (SweepConfig, RangeConfig, ExtractorConfig, RunConfig, UNetConfig, ClassifierConfig, DiffusionConfig),
    ),
    "download": Command("Fetch weights to the cache.", (DownloadConfig,)),
    "npz_tool": Command("Images of an npz to PNG files and back.", (NpzToolConfig,)),
    "demo": Command("Train on the bundled pictures for some minutes, sample with and without guidance.", (DemoConfig,)),
}


# what the console does not list: the tools of npz_tool by their first word, to which the converters add themselves
OTHERS = {
    "npz_tool to-png": Command("Write the images of an npz as PNG files.", (ToPngConfig,)),
    "npz_tool from-images": Command("Write a folder or zip of images as an npz.", (FromImagesConfig,)),
}


def command_of(name: str) -> Command:
    """A command of the console, a tool of npz_tool, or a converter."""
    return {**OTHERS, **COMMANDS}[name]


@dataclass(frozen=True)
class Flags:
    """The flags of one run: what the command line said, over what a checkpoint saved, over the defaults."""

    command: str
    given: Mapping[str, Any]
    saved: Mapping[str, Any] = field(default_factory=dict)

    @property
    def usual(self) -> dict[str, Any]:
        """The default of every flag."""
        return defaults(*command_of(self.command).sections)

    @property
    def values(self) -> dict[str, Any]:
        """Every flag resolved, as plain JSON values."""
        return {**self.usual, **self.saved, **self.given}

    @property
    def changed(self) -> dict[str, Any]:
        """What the command line gives otherwise than by default: what a flag "without effect" is said of."""
        usual = self.usual
        return {name: value for name, value in self.given.items() if value != usual.get(name)}

    def part(self, section: type[Section]) -> Section:
        """The values of one config class."""
        values = self.values
        return section(**{name: values[name] for name in defaults(section)})

    def over(self, saved: Mapping[str, Any], *sections: type[Any]) -> Flags:
        """The same command line over flags saved with a checkpoint, taken for the given config classes alone.

        :raises ValueError: if a saved value has another type than its flag.
        """
        return Flags(self.command, self.given, {**self.saved, **saved_values(saved, *sections)})


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence each, said once for all ranks."""

    def error(self, message: str) -> NoReturn:
        if announced_rank() == 0:
            self._print_message(f"{self.prog}: error: {message}\n")
        self.exit(2)


def run_plugins(argv: Sequence[str] | None, prog: str) -> None:
    """Run the files of --plugin in a command line, each once."""
    reader = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    reader.add_argument("--plugin", action="append", default=[])
    for path in ",".join(reader.parse_known_args(argv)[0].plugin).split(","):
        name = f"plugin {os.path.abspath(path)}"
        if not path or name in sys.modules:
            continue
        spec = spec_from_file_location(name, path) if os.path.isfile(path) else None
        if spec is None or spec.loader is None:
            reader.error(f"argument --plugin: {path} is no Python file")
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def sampler_names() -> list[str]:
    """The names in `SAMPLERS`, read off its source as long as nobody has imported it, and torch with it."""
    loaded = sys.modules.get(f"{__package__.rpartition('.')[0]}.sampling.samplers")
    if loaded is not None:
        return list(loaded.SAMPLERS)
    tree = ast.parse((Path(__file__).parents[1] / "sampling" / "samplers.py").read_text(encoding="utf-8"))
    tables = [node.value for node in tree.body if isinstance(node, ast.AnnAssign | ast.Assign) and _is_table(node)]
    return [ast.literal_eval(key) for table in tables if isinstance(table, ast.Dict) for key in table.keys if key]


def _is_table(node: ast.AnnAssign | ast.Assign) -> bool:
    """Whether an assignment is that of `SAMPLERS`."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [ast.unparse(target) for target in targets] == ["SAMPLERS"]


def _help(spec: Field[Any]) -> str:
    """The help text of a field, with the samplers' names where it asks for them."""
    text: str = spec.metadata["help"]
    return text.format(samplers=", ".join(sampler_names())) if "{samplers}" in text else text


def add_flag(group: argparse._ActionsContainer, spec: Field[Any], *, saved: bool = False) -> None:
    """Add the option of one field; a boolean may stand alone (``--use_ddim``) or take a word (``--use_ddim True``).

    :param saved: what a checkpoint says of it comes before its default.
    """
    if spec.metadata["positional"]:
        group.add_argument(spec.name, type=reader_of(spec), metavar=spec.name.upper(), help=_help(spec))
        return
    names = [f"--{name}" for name in (spec.name, spec.metadata["alias"]) if name]
    extra: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(spec.default, bool) else {}
    shown = ("from the checkpoint, else " if saved else "default: ") + (str(spec.default) or "''")
    group.add_argument(
        *names,
        dest=spec.name,
        default=argparse.SUPPRESS,
        type=reader_of(spec),
        metavar=type(spec.default).__name__.upper(),
        help=f"{_help(spec)} ({shown})".replace("%", "%%"),
        **extra,
    )


def parser(name: str) -> argparse.ArgumentParser:
    """The command line of one script; flags that are not given stay absent from the result."""
    command, seen = command_of(name), set[str]()
    result = _Parser(prog=f"{name}.py", description=command.about, allow_abbrev=False)
    result.add_argument("--version", action="version", version=f"guided-diffusion {__version__}")
    for section in command.sections:
        group = result.add_argument_group((section.__doc__ or section.__name__).strip().rstrip("."))
        for spec in fields(section):
            if spec.name not in seen:
                saved = section in SAVED and "model_path" in command.flags() and not spec.metadata["runtime"]
                add_flag(group, spec, saved=saved)
        seen |= set(defaults(section))
    return result


# what other programs call our flags: the first of these that the command has
SYNONYMS = {
    **dict.fromkeys(("learning_rate", "learning-rate"), ("lr",)),
    **dict.fromkeys(("steps", "num_steps"), ("steps", "max_steps")),
    **dict.fromkeys(("epochs", "max_iters", "train_steps"), ("max_steps",)),
    **dict.fromkeys(("num_inference_steps", "ddim_steps", "sampling_steps", "n_steps"), ("steps",)),
    **dict.fromkeys(("output", "output_dir", "out", "out_dir", "outdir", "logdir", "save_dir"), ("log_dir",)),
    **dict.fromkeys(("data", "dataset", "data_path", "train_dir", "images"), ("data_dir",)),
    **dict.fromkeys(("model", "checkpoint", "ckpt", "weights"), ("model_path",)),
    **dict.fromkeys(("resume", "resume_from"), ("resume_checkpoint",)),
    **dict.fromkeys(("resolution", "size", "img_size"), ("image_size",)),
    **dict.fromkeys(("guidance_scale", "scale"), ("classifier_scale", "cfg_scale")),
    **dict.fromkeys(("cfg", "cond_scale", "unconditional_guidance_scale"), ("cfg_scale",)),
    **dict.fromkeys(("guidance_rescale", "rescale"), ("cfg_rescale",)),
    **dict.fromkeys(("scheduler", "solver", "method"), ("sampler",)),
    **dict.fromkeys(("init_img", "init", "source", "input_image"), ("init_image",)),
    **dict.fromkeys(("mask_image", "mask_path"), ("mask",)),
    **dict.fromkeys(("denoising_strength", "noise_strength"), ("strength",)),
    **dict.fromkeys(("s_churn", "S_churn"), ("churn",)),
    **dict.fromkeys(("jump", "jump_length"), ("resample_jump",)),
    **dict.fromkeys(("label", "labels", "class", "prompt"), ("classes",)),
    **dict.fromkeys(("fp16", "half"), ("use_fp16",)),
    **dict.fromkeys(("dtype", "amp", "mixed_precision"), ("precision", "classifier_precision")),
    **dict.fromkeys(("gradient_checkpointing", "grad_checkpoint"), ("use_checkpoint", "checkpoint_resolutions")),
    **dict.fromkeys(("torch_compile", "compile_model"), ("compile",)),
    **dict.fromkeys(("gpu", "cuda"), ("device",)),
}


def _hint(word: str, known: Sequence[str]) -> str:
    """What to write instead of an unknown flag."""
    bare = word.split("=")[0].lstrip("-")
    for name in SYNONYMS.get(bare, ()):
        if name in known:
            return f"; did you mean --{name}?"
    return nearest(f"--{bare}", [f"--{name}" for name in known]) or "; --help lists the flags"


def parse(name: str, argv: Sequence[str] | None = None, *, prog: str = "") -> Flags:
    """The flags of script `name` from a command line; a wrong one ends the process with code 2 and a sentence.

    :param prog: how the sentence begins, where it is not the script's name.
    """
    if "plugin" in command_of(name).flags():
        run_plugins(argv, prog or f"{name}.py")
    command_line = parser(name)
    command_line.prog = prog or command_line.prog
    namespace, unknown = command_line.parse_known_args(argv)
    for word in unknown:
        if not word.startswith("-"):
            command_line.error(f"unexpected word {word}: flags are written --NAME VALUE; --help lists them")
        command_line.error(f"unknown flag {word}{_hint(word, command_of(name).words())}")
    flags = command_of(name).flags()
    return Flags(name, {k: v for k, v in vars(namespace).items() if not means_not_given(flags[k], v)})
