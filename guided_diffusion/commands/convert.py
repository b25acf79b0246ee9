"""Write the weights of a checkpoint, of a run its best moving average, to one file with all that is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import local_path, resolved_path
from ..runtime.errors import UserError
from .entry import entry
from .flags import COMMANDS, Flags
from .sections import ConvertConfig

if TYPE_CHECKING:
    from ..training.checkpoints import Checkpoint

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
    import torch as th

    from .. import dist_util
    from ..training.checkpoints import open_checkpoint
    from . import common

    config = flags.part(ConvertConfig)
    check_ending(config.out)
    if dist_util.rank() > 0:
        return
    common.log_to_screen()
    checkpoint, dtype = open_checkpoint(config.source, "SOURCE"), getattr(th, DTYPES[config.precision])
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in checkpoint.weights.items()
    }
    write(config.out, weights, checkpoint)


def check_ending(path: str) -> None:
    """:raises UserError: for a file that is not written."""
    if not path.endswith(ENDINGS):
        raise UserError(f"{path!r} must end in {' or '.join(ENDINGS)}: name the file to write")


def write(out: str, weights: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Write weights with all that is known of the checkpoint that they are of."""
    import os

    from .. import logger
    from ..runtime.files import json_bytes, parse_json, write_json
    from ..training.checkpoints import CLASSES, CONFIG, TOKENIZER, tokenizer_beside
    from ..training.weights import save

    weights = {name: value.contiguous() for name, value in weights.items()}
    known = {name: value for name, value in checkpoint.flags.items() if name not in PLACES}
    texts: dict[str, Any] = {CONFIG: {"flags": known}} if known else {}
    texts |= {CLASSES: {"classes": list(checkpoint.classes)}} if checkpoint.classes else {}
    if (known.get("context"), known.get("text_encoder")) == ("text", "scratch"):
        texts |= {TOKENIZER: parse_json(tokenizer_beside(checkpoint.path))}
    if out.endswith(".pt"):
        written = save(out, weights)
        for name, value in texts.items():
            write_json(os.path.join(os.path.dirname(out), name), value)
    else:
        written = save(out, weights, {name: json_bytes(value).decode() for name, value in texts.items()})
    logger.log(f"{checkpoint.path} -> {out}: {len(weights)} tensors, {written['bytes']} bytes")


main = entry("convert", convert)
