"""What the commands that train share: the run's folder, what a resumed run takes over, streams, the loop's keywords."""

from __future__ import annotations

import inspect
import os
import platform
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch as th

from .. import __version__, dist_util, logger
from ..config import (
    NULL_ROWS,
    AutoencoderConfig,
    DataConfig,
    DiffusionConfig,
    LoaderConfig,
    RunConfig,
    SuperResConfig,
    TrainConfig,
    TrainSpeedConfig,
)
from ..image_datasets import ImageStream, load_data, load_superres_data, save_classes
from ..networks.compiling import compile_network
from ..networks.context import ScratchEncoder
from ..networks.first_stage import FirstStage
from ..networks.memory import recompute_at
from ..runtime import files
from ..runtime.errors import WHY, as_user_error, refuse
from ..runtime.options import parse_range
from ..script_util import build_diffusion, build_network
from ..train_util import TrainLoop
from ..training import checkpoints
from ..training.report import reporting
from ..training.settings import Settings
from . import conditioning, finetuning, latent_space, latents, prompts, vectors
from .common import PRECISION_FLAGS, check_kind, precision_of
from .flag_files import OF_A_PROCESS
from .flags import COMMANDS, Flags
from .sections import MixConfig

MOST_WORKERS = 8

Load = Callable[..., ImageStream]


@dataclass(frozen=True)
class Training:
    """A network on its device, and the images that it is trained and measured on.

    :param flags: the command line over those of the run that goes on, or of the network that it starts from.
    """

    flags: Flags
    network: Any
    process: Any
    stream: ImageStream
    validation: ImageStream | None
    first_stage: FirstStage | None = None

    def run(self, kind: type[TrainLoop] = TrainLoop, **options: Any) -> None:
        """Train to the end.

        :param options: keywords of the loop that are no flags.
        """
        values, train = self.flags.values, self.flags.part(TrainConfig)
        names = {*inspect.signature(TrainLoop.__init__).parameters, *(spec.name for spec in fields(Settings))}
        keywords = {name: values[name] for name in names & values.keys()}
        # where neither the command line nor a config gives one, an optimizer file decides
        silent = "lr" not in {**self.flags.given, **self.flags.saved} and train.resume_checkpoint
        keywords |= {"lr": None} if silent and checkpoints.find_set(train.resume_checkpoint).opt else {}
        keywords |= {
            "precision": precision_of(values)[0],
            "config": {"command": self.flags.command, "version": __version__, "flags": values},
        }
        keywords |= {"data": self.stream, "val_data": self.validation, "progress": True, **options}
        loop = kind(model=self.network, diffusion=self.process, **keywords)
        with reporting(values, self.flags.defaults, title=self.flags.command, limit=loop.limit):
            loop.run_loop()
        logger.log(f"training complete: everything is in {logger.get_dir()}")


def begin(flags: Flags) -> Training:
    """The network and the images of a training, ready for its loop."""
    flags, first_stage = latent_space.of_training(start(flags))
    schedule, config = flags.part(DiffusionConfig), flags.part(finetuning.KINDS[flags.command][1])
    process = build_diffusion(schedule)
    stream, validation = open_streams(flags, **_stream_options(flags, config))
    latents.attach(first_stage, flags, stream, validation)
    flags = vectors.of_training(flags, stream, validation)
    flags, encoder = prompts.encoder_of_training(flags, stream, validation)
    config = flags.part(type(config))
    network = build_network(config, schedule.learn_sigma)
    if isinstance(encoder, ScratchEncoder):
        network.context_encoder = encoder
    network.to(dist_util.dev())
    finetuning.prepare(flags, network, stream.classes)
    recompute(flags, network)
    if flags.part(TrainSpeedConfig).compile:
        compile_network(network, "the network in training", log=logger.log)
    return Training(flags, network, process, stream, validation, first_stage)


def recompute(flags: Flags, model: Any) -> None:
    """Let the blocks at --checkpoint_resolutions compute their activations again in the backward pass."""
    if resolutions := flags.part(TrainSpeedConfig).checkpoint_resolutions:
        count = recompute_at(model, resolutions)
        logger.log(f"{count} blocks, those at {resolutions}, compute their activations again in the backward pass")


def with_precision(flags: Flags) -> tuple[Flags, list[str]]:
    """The flags with a precision in place of "auto", and a line about the choice where there was one; collective."""
    precision, choices = precision_of(flags.values)
    name = "precision" if "precision" in flags.values else "classifier_precision"
    return (flags.with_values(**{name: precision}) if choices else flags), choices


def start(flags: Flags) -> Flags:
    """Join the other ranks, claim the run's folder, seed; returns the flags over those of the run that is resumed."""
    auto, folder = flags.values["resume_checkpoint"] == "auto", _log_folder(flags)
    flags = resolved(flags)
    run = flags.part(RunConfig)
    dist_util.setup_dist(device=run.device, timeout=run.dist_timeout)
    flags, choices = with_precision(flags)
    files, faults = checkpoints.choose(folder if auto else flags.values["resume_checkpoint"], auto=auto)
    flags = flags.with_values(resume_checkpoint=files.model if files else "")
    if folder and dist_util.rank() == 0:
        refuse_other_run(folder, flags, auto=auto)
    dist_util.barrier()  # nobody writes before rank 0 has looked
    logger.configure(dir=run.log_dir or None)
    for line in choices:
        logger.log(line)
    for line in faults:
        logger.warn(line)
    if files is None:
        logger.rewind(0)  # of a process that was killed before its first checkpoint
    random.seed(run.seed)
    np.random.seed(run.seed % 2**32)
    th.manual_seed(run.seed % 2**64)
    if grid := flags.values.get("timestep_respacing"):
        logger.warn(f"timestep_respacing {grid} in training: the network sees these steps alone; leave it to sampling")
    return flags


def resolved(flags: Flags) -> Flags:
    """The flags over those of the run that is resumed, or of the network that a run starts from; checked."""
    finetuning.check_beginning(flags)
    flags = finetuning.over_source(_over_resumed(flags))
    flags.check()
    flags = _with_null_rows(flags)
    dims, no_data = flags.values.get("dims", 2), not (flags.values["data_dir"] or flags.values.get("dry_run"))
    refuse(
        (no_data, "--data_dir is missing: give images: a folder, a zip or tars"),
        (dims != 2, f"--dims {dims} does not fit pictures: leave it out, or use TrainLoop yourself"),
    )
    if flags.values.get("cond_type"):
        conditioning.pairing_of(flags)
    return flags


def _log_folder(flags: Flags) -> str:
    """The folder that the command line or the environment names; '' for a new temporary one."""
    return files.local(flags.part(RunConfig).log_dir or os.environ.get("OPENAI_LOGDIR", ""))


def _over_resumed(flags: Flags) -> Flags:
    """The command line over everything that the resumed run was started with; a precision auto is that of the run."""
    path = flags.values["resume_checkpoint"]
    if path == "auto":
        folder = _log_folder(flags)
        path = folder if folder and checkpoints.newest(folder)[0] else ""
        flags = flags.with_values(resume_checkpoint=path)
    if not path:
        return flags
    checkpoints.find_set(path)  # a missing one comes before all else
    known, config = set(COMMANDS[flags.command].flags()) - set(OF_A_PROCESS), checkpoints.config_beside(path)
    given = {k: v for k, v in flags.given.items() if not (k in PRECISION_FLAGS and v == "auto" and config.get(k))}
    if any(name in given for name in PRECISION_FLAGS):
        known -= set(PRECISION_FLAGS)
    _, kind = finetuning.KINDS.get(flags.command, ("", AutoencoderConfig))
    check_kind(config, kind, f"--resume_checkpoint {path}")
    return Flags(flags.command, given, {name: value for name, value in config.items() if name in known})


def _with_null_rows(flags: Flags) -> Flags:
    """The flags with the null class and the null conditioning image that dropping classes and images makes."""
    values, saved = flags.values, flags.saved
    lacking = saved and not saved.get(NULL_ROWS["class_dropout"])
    dropout, resumed = values.get("class_dropout"), values["resume_checkpoint"]
    fault = f"--class_dropout {dropout} needs a null class, and the network of {resumed} has none"
    refuse((dropout and resumed and lacking, f"{fault}: start a new run with it, or leave it out"))
    return flags.with_values(**{name: True for dropout, name in NULL_ROWS.items() if values.get(dropout)})


def refuse_other_run(folder: str, flags: Flags, *, auto: bool = False) -> None:
    """Leave a folder alone whose checkpoints this run would overwrite or mix with its own.

    :param auto: what a killed process did not finish may be overwritten, even if there is nothing else.
    """
    resumed = flags.values["resume_checkpoint"]
    complete = checkpoints.newest(folder, checksums=bool(resumed))[0]
    newest, last = -1 if complete is None else complete.step or 0, -1
    if resumed:
        files = checkpoints.find_set(resumed)
        if os.path.realpath(os.path.dirname(files.model)) == os.path.realpath(folder):
            last = files.step or 0
    elif not auto:
        newest = max(checkpoints.sets_in(folder), default=-1)
    remedy = f"give --resume_checkpoint {folder} to go on with it, or another --log_dir"
    refuse((newest > last, f"{folder} holds the checkpoints of a run, up to step {newest}: {remedy}"))


def _stream_options(flags: Flags, config: Any) -> dict[str, Any]:
    """Keywords of `open_streams` for the images of a network."""
    options = prompts.captioning_of(flags)
    options["validation"] = {name: replace(captioning, dropout=0.0) for name, captioning in options.items()}
    if isinstance(config, SuperResConfig):
        sizes = {name: getattr(config, name) for name in ("large_size", "small_size", "cond_aug", "class_cond")}
        return {**options, "load": load_superres_data, **sizes}
    options |= {"image_size": config.image_size, "class_cond": getattr(config, "class_cond", True)}
    if flags.values.get("cond_type") and (pairing := conditioning.pairing_of(flags)):
        options["pairing"] = pairing
        options["validation"]["pairing"] = replace(pairing, folder=flags.values["val_cond_dir"], dropout=0.0)
    return options


def open_streams(
    flags: Flags, load: Load = load_data, *, validation: Mapping[str, Any] | None = None, **options: Any
) -> tuple[ImageStream, ImageStream | None]:
    """The images to train on and those to measure on; writes classes.json where the images have labels.

    :param validation: keywords of `load` that are others for the validation images.
    :param options: further keywords of `load`: sizes, class_cond.
    """
    data, train = flags.part(DataConfig), flags.part(TrainConfig)
    num_classes = flags.values["num_classes"] if options["class_cond"] else None
    options |= {
        **asdict(flags.part(LoaderConfig)),
        "batch_size": train.batch_size,
        "image_channels": flags.values["image_channels"],
        "num_classes": num_classes,
        "on_bad_image": data.on_bad_image,
        "data_range": parse_range(data.data_range),
        "label_column": data.label_column,
        "vector_columns": flags.values.get("vector_columns", ""),
        "seed": flags.part(RunConfig).seed,
        "as_bytes": True,
    }
    known = checkpoints.classes_beside(train.resume_checkpoint) if train.resume_checkpoint else ""
    names = ("data_dir", "class_from", "random_crop", "random_flip", "num_workers")
    mix = asdict(flags.part(MixConfig))
    of_training = {name: getattr(data, name) for name in names} | mix
    if data.num_workers < 0:
        of_training["num_workers"] = _workers()
    stream = load(**of_training, classes=known if known and options["class_cond"] else None, **options)
    if len(stream.classes) < (num_classes or 0):
        logger.warn(
            f"the data have {len(stream.classes)} classes and the network has {num_classes}: give "
            f"--num_classes {len(stream.classes)} for one without rows that are never trained"
        )
    if stream.classes and dist_util.rank() == 0:
        save_classes(os.path.join(logger.get_dir(), checkpoints.CLASSES), stream)
    if not train.val_data_dir:
        return stream, None
    options |= {"fit": mix["fit"], **(validation or {})}
    return stream, _validation(train.val_data_dir, stream, load, options)


def _workers() -> int:
    """As many processes as this rank has CPUs where the ranks of the machine share them, at most 8; collective."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cpus // dist_util.gather_objects(platform.node()).count(platform.node())))


def _validation(path: str, train: ImageStream, load: Load, options: Mapping[str, Any]) -> ImageStream:
    """The validation images, with the ids that the classes have in training."""
    labels = {"class_from": train.class_from, "classes": train.classes} if train.classes else {}
    fixed = {"random_crop": False, "random_flip": False, "few": True, **labels}

    def log(line: str) -> None:
        if not line.startswith(" "):
            logger.log(f"validation: {line}")

    with as_user_error(f"--val_data_dir: {WHY}", ValueError):
        return load(data_dir=path, log=log, **fixed, **options)
