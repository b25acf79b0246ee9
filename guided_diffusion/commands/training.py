"""What the commands that train share: the run's folder, what a resumed run takes over, streams, the loop's keywords."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch as th

from .. import __version__, dist_util, logger
from ..config import (
    DataConfig,
    ExtractorConfig,
    ImageTrainConfig,
    LoaderConfig,
    RunConfig,
    TrainConfig,
    TrainEvaluationConfig,
    TrainSpeedConfig,
)
from ..image_datasets import ImageStream, load_data, save_classes
from ..resample import create_named_schedule_sampler
from ..runtime import paths
from ..runtime.options import defaults, parse_range
from ..runtime.pictures import planes
from ..train_util import Hook, TrainLoop
from ..training import checkpoints
from ..training.saving import choose
from . import conditioning, finetuning, performance
from .common import check_kind
from .flags import COMMANDS, Flags

Load = Callable[..., ImageStream]

# never taken from an earlier part of the run
OF_A_PROCESS = ("log_dir", "device", "dist_timeout", "plugin", "resume_checkpoint")
PRECISION_FLAGS = ("precision", "use_fp16", "classifier_precision", "classifier_use_fp16")


def start(flags: Flags) -> Flags:
    """Join the other ranks, claim the run's folder, seed; returns the flags over those of the run that is resumed.

    :raises ValueError: if flags contradict each other, or the folder holds another run.
    """
    auto, folder = flags.values["resume_checkpoint"] == "auto", _log_folder(flags)
    flags = resolved(flags)
    run = flags.part(RunConfig)
    dist_util.setup_dist(device=run.device, timeout=run.dist_timeout)
    flags, choices = performance.with_precision(flags)
    files, faults = choose(folder if auto else flags.values["resume_checkpoint"], auto=auto)
    flags = Flags(flags.command, {**flags.given, "resume_checkpoint": files.model if files else ""}, flags.saved)
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
    _seed(run.seed)
    if flags.values["timestep_respacing"]:
        logger.warn(
            f"timestep_respacing {flags.values['timestep_respacing']} in training: the network sees these steps alone, "
            "and samples with them alone; leave it to sampling"
        )
    return flags


def resolved(flags: Flags) -> Flags:
    """The flags over those of the run that is resumed, or of the network that a run starts from.

    :raises ValueError: if they contradict each other.
    """
    finetuning.check_beginning(flags)
    flags = conditioning.with_null_cond(_with_null_class(finetuning.over_source(_over_resumed(flags))))
    _check(flags)
    finetuning.check(flags)
    conditioning.check(flags)
    performance.check(flags)
    return flags


def _log_folder(flags: Flags) -> str:
    """The folder that the command line or the environment names; '' for a new temporary one."""
    return paths.local(flags.part(RunConfig).log_dir or os.environ.get("OPENAI_LOGDIR", ""))


def _check(flags: Flags) -> None:
    if not (flags.values["data_dir"] or flags.values["dry_run"]):
        raise ValueError("--data_dir is missing: give a folder or a zip of images")
    if flags.values["dims"] != 2:
        raise ValueError(
            f"--dims {flags.values['dims']} does not fit pictures, which have 2: leave it out, or give "
            "guided_diffusion.train_util.TrainLoop data of your own"
        )
    samples = set(defaults(TrainEvaluationConfig)) <= set(flags.values)  # else --eval_interval is that of validation
    _refuse_useless(flags, ["ema_warmup"], "ema_rate")
    _refuse_useless(flags, ["val_interval", *([] if samples else ["eval_interval"])], "val_data_dir")
    if samples:
        _refuse_useless(flags, defaults(TrainEvaluationConfig, ExtractorConfig), "eval_interval")


def _refuse_useless(flags: Flags, names: Iterable[str], without: str) -> None:
    useless = [name for name in names if name in flags.changed and name != without]
    if useless and not flags.values[without]:
        raise ValueError(f"--{useless[0]} has no effect without --{without}: give both or none")


def _over_resumed(flags: Flags) -> Flags:
    """The command line over everything that the resumed run was started with; a precision auto is that of the run."""
    path = flags.values["resume_checkpoint"]
    if path == "auto":
        folder = _log_folder(flags)
        path = folder if folder and checkpoints.latest(folder) else ""
        flags = Flags(flags.command, {**flags.given, "resume_checkpoint": path}, flags.saved)
    if not path:
        return flags
    checkpoints.find_set(path)  # that there is one comes before all else
    known, config = set(COMMANDS[flags.command].flags()) - set(OF_A_PROCESS), checkpoints.config_beside(path)
    given = {k: v for k, v in flags.given.items() if not (k in PRECISION_FLAGS and v == "auto" and config.get(k))}
    if any(name in given for name in PRECISION_FLAGS):
        known -= set(PRECISION_FLAGS)
    check_kind(config, finetuning.KINDS[flags.command][1], f"--resume_checkpoint {path}")
    return Flags(flags.command, given, {name: value for name, value in config.items() if name in known})


def _with_null_class(flags: Flags) -> Flags:
    """The flags with the null class that --class_dropout needs."""
    values, saved = flags.values, flags.saved
    rate = values.get("class_dropout", 0)
    if not rate:
        return flags
    if not values["class_cond"]:
        raise ValueError(f"--class_dropout {rate} has no effect without --class_cond True: give both or none")
    if values["resume_checkpoint"] and saved and not saved.get("null_class"):
        raise ValueError(
            f"--class_dropout {rate} needs a null class, and the network of {values['resume_checkpoint']} has none: "
            "start a new run with it, or leave it out"
        )
    return Flags(flags.command, {**flags.given, "null_class": True}, saved)


def refuse_other_run(folder: str, flags: Flags, *, auto: bool = False) -> None:
    """Leave a folder alone whose files this run would overwrite or mix with its own.

    :param auto: what a killed process did not finish may be overwritten, even if there is nothing else.
    :raises ValueError: saying what lies there and how to go on.
    """
    resumed = flags.values["resume_checkpoint"]
    complete = checkpoints.newest(folder, checksums=bool(resumed))[0]
    newest = -1 if complete is None else complete.step or 0
    if not (resumed or auto):
        newest = max(checkpoints.sets_in(folder), default=-1)
    if resumed:
        files = checkpoints.find_set(resumed)
        step = files.step or 0
        if newest > step:
            raise ValueError(
                f"{folder} holds checkpoints up to step {newest}, which a run resumed at step {step} would overwrite: "
                f"give another --log_dir, or --resume_checkpoint {folder} to go on from the last"
            )
        if newest >= 0 and os.path.realpath(os.path.dirname(files.model)) != os.path.realpath(folder):
            raise ValueError(
                f"{folder} holds the checkpoints of another run than {resumed}, up to step {newest}: give another "
                "--log_dir"
            )
    elif newest >= 0:
        raise ValueError(
            f"{folder} holds the checkpoints of a run, up to step {newest}: give --resume_checkpoint {folder} to go on "
            "with it, or another --log_dir"
        )
    else:
        _refuse_other_flags(folder, flags.values)


def _refuse_other_flags(folder: str, values: Mapping[str, Any]) -> None:
    there = checkpoints.config_beside(folder) if paths.exists(folder) else {}
    differing = [name for name in there if name not in OF_A_PROCESS and there[name] != values.get(name, there[name])]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder} is the folder of a run with other flags ({name} {there[name]}, now {values[name]}): give "
            "another --log_dir, or remove its config.json"
        )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    th.manual_seed(seed % 2**64)


# ---- data


@dataclass(frozen=True)
class Streams:
    """The images to train on and, where there are any, those to measure on."""

    train: ImageStream
    validation: ImageStream | None


def open_streams(
    flags: Flags, load: Load = load_data, *, validation: Mapping[str, Any] | None = None, **options: Any
) -> Streams:
    """The streams that the data flags describe; writes classes.json where the images have labels.

    :param validation: keywords of `load` that are others for the validation images.
    :param options: further keywords of `load`: sizes, class_cond.
    """
    data, train, loader = flags.part(DataConfig), flags.part(TrainConfig), flags.part(LoaderConfig)
    options |= {
        "batch_size": train.batch_size,
        "image_channels": flags.values["image_channels"],
        "num_classes": flags.values["num_classes"] if options["class_cond"] else None,
        "on_bad_image": data.on_bad_image,
        "data_range": parse_range(data.data_range),
        "label_column": data.label_column,
        "seed": flags.part(RunConfig).seed,
        **asdict(loader),
        "as_bytes": True,
    }
    known = checkpoints.classes_beside(train.resume_checkpoint) if train.resume_checkpoint else ""
    stream = load(
        data_dir=data.data_dir,
        class_from=data.class_from,
        classes=known if known and options["class_cond"] else None,
        random_crop=data.random_crop,
        random_flip=data.random_flip,
        num_workers=data.num_workers,
        **options,
    )
    if len(stream.classes) < (options["num_classes"] or 0):
        logger.warn(
            f"the data have {len(stream.classes)} classes and the network has {options['num_classes']}: give "
            f"--num_classes {len(stream.classes)} for one without rows that are never trained"
        )
    if stream.classes and dist_util.rank() == 0:
        save_classes(os.path.join(logger.get_dir(), checkpoints.CLASSES), stream)
    options |= {"cache_images": False, **(validation or {})}
    return Streams(stream, _validation(train.val_data_dir, stream, load, options) if train.val_data_dir else None)


def _validation(path: str, train: ImageStream, load: Load, options: dict[str, Any]) -> ImageStream:
    """The validation images, with the ids that the classes have in training."""
    options = {**options, "log": lambda line: None if line.startswith(" ") else logger.log(f"validation: {line}")}
    labels = {"class_from": train.class_from, "classes": train.classes} if train.classes else {}
    try:
        return load(data_dir=path, random_crop=False, random_flip=False, fit=True, **labels, **options)
    except ValueError as error:
        raise ValueError(f"--val_data_dir: {error}") from error


def first_images(stream: ImageStream, count: int) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """Images from all over the data set, and their labels, without moving the stream."""
    size = len(stream.dataset)
    items = [stream.dataset[0, index * size // count] for index in range(count)]
    labels = {name: th.from_numpy(np.stack([label[name] for _, label in items])) for name in items[0][1]}
    return th.from_numpy(np.stack([image for image, _ in items])), labels


# ---- the loop


def loop_keywords(flags: Flags, diffusion: Any, streams: Streams) -> dict[str, Any]:
    """The keywords of `TrainLoop` that all training commands give it."""
    names = {spec.name for spec in fields(TrainConfig)} - {"val_data_dir", "schedule_sampler", "lr"}
    values, train = flags.values, flags.part(TrainConfig)
    # Without a word about it, here or in a config, an optimizer file decides.
    said = "lr" in flags.given or "lr" in flags.saved or not train.resume_checkpoint
    resumed = checkpoints.find_set(train.resume_checkpoint).opt if train.resume_checkpoint else ""
    return {
        **{name: values[name] for name in names},
        "fsdp": flags.part(TrainSpeedConfig).fsdp,
        "lr": train.lr if said or not resumed else None,
        "seed": flags.part(RunConfig).seed,
        "diffusion": diffusion,
        "data": streams.train,
        "val_data": streams.validation,
        "schedule_sampler": create_named_schedule_sampler(train.schedule_sampler, diffusion),
        "progress": True,
        "config": {"command": flags.command, "version": __version__, "flags": values},
    }


def train_diffusion(
    flags: Flags,
    model: Any,
    diffusion: Any,
    streams: Streams,
    *,
    precision: str,
    previewer: Callable[..., Any],
    hooks: Sequence[Hook] = (),
) -> None:
    """Run the loop of a diffusion model or an upsampler to its end.

    :param previewer: (flags, diffusion, stream) -> the function that draws previews, asked for where there are any.
    :param hooks: further looks at the model.
    """
    loop = flags.part(ImageTrainConfig)
    previews = [Hook(loop.sample_interval, previewer(flags, diffusion, streams.train))] if loop.sample_interval else []
    TrainLoop(
        model=model,
        precision=precision,
        max_steps=loop.max_steps,
        lr_anneal_steps=loop.lr_anneal_steps,
        val_interval=loop.val_interval,
        class_dropout=loop.class_dropout,
        hooks=[*previews, *hooks],
        **loop_keywords(flags, diffusion, streams),
    ).run_loop()
    finish()


def preview_path(step: int) -> str:
    """Where the preview grid of a step goes."""
    return os.path.join(previews_folder(), f"{step:06d}.png")


def previews_folder() -> str:
    """Where all previews go."""
    folder = os.path.join(logger.get_dir(), "previews")
    os.makedirs(folder, exist_ok=True)
    return folder


def compare_colours(step: int, samples: Any, images: th.Tensor) -> None:
    """Log mean and deviation of each channel of a preview and of the data: a tint shows here first.

    :param samples: uint8 [N, H, W, C]; `images` are [N, C, H, W] in [-1, 1].
    """
    rows = {"samples": planes(samples), "data": images}
    texts = [
        f"{name} {' '.join(f'{float(v[:, c].mean()):+.2f}/{float(v[:, c].std()):.2f}' for c in range(v.shape[1]))}"
        for name, v in rows.items()
    ]
    logger.log(f"preview at step {step}, mean/deviation of the channels: {', '.join(texts)}")


def finish() -> None:
    """Say where everything is: the last line of a run."""
    logger.log(f"training complete: everything is in {logger.get_dir()}")
