"""Write the weights of a checkpoint, of a run its best moving average, to one file with all that is known of them.

Where a folder is named, it becomes one of diffusers, which `load` and the commands read as they read runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import local_path, resolved_path
from ..runtime.errors import UserError
from .entry import entry
from .flags import COMMANDS, Flags
from .tool_sections import ConvertConfig

if TYPE_CHECKING:
    import torch as th

    from ..training.checkpoints import Checkpoint

    State = dict[str, th.Tensor]

ENDINGS = (".safetensors", ".pt")
# flags that name places on the machine of the training
PLACES = {
    spec.name
    for command in COMMANDS.values()
    for spec in command.flags().values()
    if spec.metadata["convert"] in (resolved_path, local_path)
}
MOVED = ("autoencoder_path", "text_encoder")  # but these go with the weights, and are relative to their folder
NAMED = ("scratch", "minilm", "glide")  # text encoders that have no folder
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def convert(flags: Flags) -> None:
    """Write what the flags ask for; a .pt has no place for flags and class names, they go beside it."""
    import torch as th

    from .. import dist_util
    from ..training.diffusers_files import FILE
    from . import common

    config = flags.part(ConvertConfig)
    to_folder = bool(config.out) and not os.path.splitext(config.out)[1]
    if not to_folder:
        check_ending(config.out)
    if dist_util.rank() > 0:
        return
    common.log_to_screen()
    checkpoint, dtype = _chosen(config), getattr(th, DTYPES[config.precision])
    weights, theirs = _weights_of(checkpoint, for_diffusers=to_folder)
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    write(os.path.join(config.out, FILE) if to_folder else config.out, weights, checkpoint, theirs)


def check_ending(path: str) -> None:
    """:raises UserError: for a file that is not written."""
    if not path.endswith(ENDINGS):
        raise UserError(f"{path!r} must end in {' or '.join(ENDINGS)}, or be a folder without an ending")


def write(
    out: str, weights: Mapping[str, Any], checkpoint: Checkpoint, theirs: Mapping[str, Any] | None = None
) -> None:
    """Write weights with all that is known of the checkpoint that they are of.

    :param theirs: the config.json of diffusers to write beside them.
    """
    from .. import logger
    from ..runtime.files import json_bytes, write_json
    from ..training.checkpoints import CONFIG
    from ..training.weights import save

    weights = {name: value.contiguous() for name, value in weights.items()}
    texts, beside = _texts(checkpoint, os.path.dirname(out)), {CONFIG: theirs} if theirs else {}
    if out.endswith(".pt"):
        written, beside = save(out, weights), texts
    else:
        header = {name: json_bytes(value).decode() for name, value in texts.items()}
        written = save(out, weights, header | {"format": "pt"})  # which some readers ask for
    for name, value in beside.items():
        write_json(os.path.join(os.path.dirname(out), name), value)
    logger.log(f"{checkpoint.path} -> {out}: {len(weights)} tensors, {written['bytes']} bytes")


def _chosen(config: ConvertConfig) -> Checkpoint:
    """The checkpoint, of a run's folder with the moving average of the rate that is asked for."""
    from dataclasses import replace

    from ..training.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(config.source, "SOURCE")
    if not config.ema_rate:
        return checkpoint
    paths = {float(rate): path for rate, path in checkpoint.emas.items()} | (
        {0.0: checkpoint.model} if checkpoint.model else {}
    )
    try:
        return replace(checkpoint, path=paths[float(config.ema_rate)])
    except (ValueError, KeyError) as error:
        rates = ", ".join(f"{rate:g}" for rate in sorted(paths)) or "none"
        raise UserError(f"--ema_rate {config.ema_rate} is no average of {config.source}: it has {rates}") from error


def _weights_of(checkpoint: Checkpoint, *, for_diffusers: bool) -> tuple[State, dict[str, Any]]:
    """The weights to write, and the config.json of diffusers where they are for it."""
    import torch as th

    from ..training import diffusers_files
    from ..training.first_stage import load_autoencoder
    from . import presets

    weights, path = checkpoint.weights, checkpoint.path
    if "encoder.conv_in.weight" in weights:
        network, factor = load_autoencoder(path)
        if not for_diffusers:
            return network.state_dict() | {"scale_factor": th.tensor(factor)}, {}
        config, weights = diffusers_files.write_autoencoder(network, factor, path)
        return weights, config
    if not for_diffusers:
        return weights, {}
    preset = presets.find(os.path.splitext(os.path.basename(path))[0])
    flags = checkpoint.flags or (preset.flags if preset else {})
    size = checkpoint.size_of_inputs(flags["image_size"], flags) if "image_size" in flags else 0
    config, weights = diffusers_files.write_unet(weights, flags, size, path)
    return weights, config


def _texts(checkpoint: Checkpoint, folder: str) -> dict[str, Any]:
    """What is known of the weights, by the names of the files in a run's folder.

    :param folder: that they are written to.
    """
    from ..runtime.files import parse_json
    from ..training.checkpoints import CLASSES, CONFIG, TOKENIZER, from_folder, tokenizer_beside

    known = {name: value for name, value in checkpoint.flags.items() if name not in PLACES or name in MOVED}
    there = {name: known[name] for name in MOVED if os.path.exists(known.get(name, "")) and known[name] not in NAMED}
    known |= {name: from_folder(place, folder) for name, place in there.items()}
    texts: dict[str, Any] = {CONFIG: {"flags": known}} if known else {}
    texts |= {CLASSES: {"classes": list(checkpoint.classes)}} if checkpoint.classes else {}
    if (known.get("context"), known.get("text_encoder")) == ("text", "scratch"):
        texts |= {TOKENIZER: parse_json(tokenizer_beside(checkpoint.path))}
    return texts


main = entry("convert", convert)
