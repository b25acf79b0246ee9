"""Write the weights of a checkpoint, of a run its best moving average, to one file with all that is known of them."""

from __future__ import annotations

from typing import Any

from ..config import local_path, resolved_path
from ..runtime.errors import UserError
from .entry import entry
from .flags import COMMANDS, Flags
from .sections import ConvertConfig

ENDINGS = (".safetensors", ".pt")
# flags that name places on the machine of the training
PLACES = {
    spec.name
    for command in COMMANDS.values()
    for spec in command.flags().values()
    if spec.metadata["convert"] in (resolved_path, local_path)
}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def convert(flags: Flags) -> None:
    """Write the file that the flags ask for; a .pt has no place for flags and class names, they go beside it."""
    import os

    import torch as th

    from .. import dist_util, logger
    from ..runtime.files import json_bytes, parse_json, write_json
    from ..training.checkpoints import CLASSES, CONFIG, TOKENIZER, open_checkpoint, tokenizer_beside
    from ..training.weights import save
    from . import common

    config = flags.part(ConvertConfig)
    if not config.out.endswith(ENDINGS):
        raise UserError(f"{config.out!r} must end in {' or '.join(ENDINGS)}: name the file to write")
    if dist_util.rank() > 0:
        return
    common.log_to_screen()
    checkpoint, dtype = open_checkpoint(config.source, "SOURCE"), getattr(th, DTYPES[config.precision])
    weights = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for name, value in checkpoint.weights.items()
    }
    known = {name: value for name, value in checkpoint.flags.items() if name not in PLACES}
    texts: dict[str, Any] = {CONFIG: {"flags": known}} if known else {}
    texts |= {CLASSES: {"classes": list(checkpoint.classes)}} if checkpoint.classes else {}
    if (known.get("context"), known.get("text_encoder")) == ("text", "scratch"):
        texts |= {TOKENIZER: parse_json(tokenizer_beside(checkpoint.path))}
    if config.out.endswith(".pt"):
        written = save(config.out, weights)
        for name, value in texts.items():
            write_json(os.path.join(os.path.dirname(config.out), name), value)
    else:
        written = save(config.out, weights, {name: json_bytes(value).decode() for name, value in texts.items()})
    logger.log(f"{checkpoint.path} -> {config.out}: {len(weights)} tensors, {written['bytes']} bytes")


main = entry("convert", convert)
