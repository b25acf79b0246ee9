"""Starting a training from another network: its flags, its weights, and which of them are trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch as th

from .. import dist_util, logger
from ..config import ClassifierConfig, DiffusionConfig, SuperResConfig, UNetConfig
from ..runtime import files
from ..runtime.errors import refuse
from ..training import finetuning, lora
from ..training.checkpoints import CLASSIFIER, UNET, UPSAMPLER
from .flags import COMMANDS, Flags
from .sections import InitConfig, LatentConfig, LoraConfig

REPORT = "init.json"
KINDS: dict[str, tuple[str, type[Any]]] = {
    "image_train": (UNET, UNetConfig),
    "super_res_train": (UPSAMPLER, SuperResConfig),
    "classifier_train": (CLASSIFIER, ClassifierConfig),
}


def check_beginning(flags: Flags) -> None:
    """Refuse a command line that would start a run and go on with one."""
    both = flags.given.get("init_from") and flags.given.get("resume_checkpoint", "auto") not in ("", "auto")
    remedy = "give one of the two, or --resume_checkpoint auto"
    refuse((both, f"--init_from starts a run and --resume_checkpoint goes on with one: {remedy}"))


def over_source(flags: Flags) -> Flags:
    """The command line over what the checkpoint of --init_from says of itself, where a run starts from one."""
    path = flags.values.get("init_from")
    if not path or flags.values["resume_checkpoint"]:
        return flags
    kind, section = KINDS[flags.command]
    size = finetuning.SIZE_FLAGS[kind]
    saved = finetuning.flags_for(finetuning.open_source(path), kind, flags.given.get(size), flags.values[size])
    if flags.given.get("class_cond") is False:
        saved.pop("null_class", None)
    latents = [LatentConfig] if "autoencoder_path" in COMMANDS[flags.command].flags() else []
    return flags.over(saved, section, DiffusionConfig, *latents)


def prepare(flags: Flags, model: th.nn.Module, classes: Sequence[str]) -> None:
    """Give a new run's network the weights of --init_from, and any run's what --freeze and --lora_rank ask for.

    :param classes: names of the data's classes by id.
    """
    config, changed = flags.part(InitConfig), list[str]()
    if config.init_from and not flags.values["resume_checkpoint"]:
        size = flags.values[finetuning.SIZE_FLAGS[KINDS[flags.command][0]]]
        source = finetuning.open_source(config.init_from)
        report = finetuning.initialise(model, source, mismatch=config.init_mismatch, classes=classes, size=size)
        for line in filter(None, [source.picked.sentence, *report.lines()]):
            logger.log(line)
        if dist_util.rank() == 0:
            files.write_json(os.path.join(logger.get_dir(), REPORT), asdict(report))
        changed = list(report.changed)
    choose_trained(flags, model, changed)


def choose_trained(flags: Flags, model: th.nn.Module, changed: Sequence[str] = ()) -> None:
    """Freeze what --freeze names, or attach the adapters of --lora_rank.

    :param changed: parameters that are not those of --init_from, and therefore not to be frozen by adapters.
    """
    frozen, adapters = flags.part(InitConfig).freeze, flags.part(LoraConfig)
    if not adapters.lora_rank:
        if frozen:
            names = finetuning.freeze(model, frozen)
            logger.log(f"frozen: {len(names)} of {len(list(model.parameters()))} parameters")
        return
    train = finetuning.matching(model, adapters.lora_train, "lora_train")
    untrained = [name for name in changed if name not in train]
    left = f"{''.join(untrained[:1])} is not the checkpoint's, and adapters would leave it as it is"
    refuse((untrained, f"{left}: name it in --lora_train, e.g. label_emb.*"))
    kinds = adapters.lora_on.split(",")
    names = lora.attach(model, rank=adapters.lora_rank, alpha=adapters.lora_alpha, on=kinds, train=train)
    also = f", trained beside {len(train)} other parameters" if train else ""
    logger.log(f"adapters of rank {adapters.lora_rank} on {len(names)} convolutions{also}")
