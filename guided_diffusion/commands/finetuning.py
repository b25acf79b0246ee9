"""What the training commands do to start from another network: its flags, its weights, and what of them is trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch as th

from .. import dist_util, logger
from ..config import ClassifierConfig, DiffusionConfig, InitConfig, LoraConfig, SuperResConfig, UNetConfig
from ..runtime import files
from ..training import finetuning, lora
from .flags import Flags

REPORT = "init.json"
KINDS: dict[str, tuple[str, type[Any]]] = {
    "image_train": (finetuning.UNET, UNetConfig),
    "super_res_train": (finetuning.UPSAMPLER, SuperResConfig),
    "classifier_train": (finetuning.CLASSIFIER, ClassifierConfig),
}


def check_beginning(flags: Flags) -> None:
    """:raises ValueError: if a run is to start and to go on at once."""
    if flags.given.get("init_from") and flags.given.get("resume_checkpoint", "auto") not in ("", "auto"):
        raise ValueError(
            "--init_from starts a run and --resume_checkpoint goes on with one: give one of the two, or "
            "--resume_checkpoint auto"
        )


def over_source(flags: Flags) -> Flags:
    """The command line over what the checkpoint of --init_from says of itself, where a run starts from one."""
    path = flags.part(InitConfig).init_from
    if not path or flags.values["resume_checkpoint"]:
        return flags
    kind, section = KINDS[flags.command]
    size = finetuning.SIZE_FLAGS[kind]
    said = finetuning.flags_for(finetuning.open_source(path), kind, flags.given.get(size), flags.values[size])
    return flags.over(said, section, DiffusionConfig)


def prepare(flags: Flags, model: th.nn.Module, classes: Sequence[str]) -> None:
    """Give a new run's network the weights of --init_from, and any run's what --freeze and --lora_rank ask for.

    :param classes: names of the data's classes by id.
    :raises ValueError: if something does not fit.
    """
    resumed = flags.values["resume_checkpoint"] or not flags.part(InitConfig).init_from
    choose_trained(flags, model, [] if resumed else _start(flags, model, classes))


def choose_trained(flags: Flags, model: th.nn.Module, changed: Sequence[str] = ()) -> None:
    """Freeze what --freeze names, or attach the adapters of --lora_rank.

    :param changed: parameters that are not those of --init_from.
    """
    config, adapt = flags.part(InitConfig), flags.part(LoraConfig)
    if adapt.lora_rank:
        _adapt(model, adapt, changed)
    elif config.freeze:
        names = finetuning.freeze(model, config.freeze)
        logger.log(f"frozen: {len(names)} of {len(list(model.parameters()))} parameters")


def _start(flags: Flags, model: th.nn.Module, classes: Sequence[str]) -> list[str]:
    """Load the weights, say which, and return the names of those that are not the checkpoint's."""
    config, kind = flags.part(InitConfig), KINDS[flags.command][0]
    source = finetuning.open_source(config.init_from)
    size = flags.values[finetuning.SIZE_FLAGS[kind]]
    report = finetuning.initialise(model, source, mismatch=config.init_mismatch, classes=classes, size=size)
    other = [
        f"{name} {value}, it was {source.flags[name]}"
        for name, value in asdict(flags.part(DiffusionConfig)).items()
        if source.flags.get(name, value) != value and not _is_runtime(DiffusionConfig, name)
    ]
    lines = [
        *filter(None, [source.choice]),
        *report.lines(),
        *([f"  other flags than the checkpoint's: {'; '.join(other)}"] if other else []),
    ]
    for line in lines:
        logger.log(line)
    if dist_util.rank() == 0:
        files.write_json(os.path.join(logger.get_dir(), REPORT), {**asdict(report), "other_flags": other})
    return list(report.changed)


def _is_runtime(section: type[Any], name: str) -> bool:
    return any(spec.name == name and spec.metadata["runtime"] for spec in fields(section))


def _adapt(model: th.nn.Module, config: LoraConfig, changed: Sequence[str]) -> None:
    """Attach adapters.

    :param changed: parameters that are not the checkpoint's, and therefore not to be frozen.
    """
    train = finetuning.matching(model, config.lora_train, "lora_train")
    untrained = [name for name in changed if name not in train]
    if untrained:
        raise ValueError(
            f"{untrained[0]} is not the checkpoint's, and adapters would leave it as it is: name it in --lora_train, "
            "e.g. label_emb.*"
        )
    kinds = config.lora_on.split(",")
    names = lora.attach(model, rank=config.lora_rank, alpha=config.lora_alpha, on=kinds, train=train)
    also = f", trained beside {len(train)} other parameters" if train else ""
    logger.log(f"adapters of rank {config.lora_rank} on {len(names)} convolutions{also}")
