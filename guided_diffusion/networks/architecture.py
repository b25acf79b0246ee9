"""The flags of a network, read off the names and shapes of its state dict.

Heads, dropout and the order of q, k, v leave no trace in the shapes, nor do the pixels of the images, except where an
attention pool fixes them. A null class looks like one more class: num_classes is the number of rows of label_emb. A
period is the number of blocks per level: num_res_blocks and the one that changes the resolution. Block 0 is a
convolution; level l has the blocks l * period + 1 .. l * period + num_res_blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch as th

from ..runtime.options import Size, parse_size

Shape = tuple[int, ...]
Layer = dict[str, Shape]  # name within the layer -> shape
Block = dict[int, Layer]  # position within the block -> layer

_FIRST = re.compile(r"(|.*\.)time_embed\.0\.weight")  # all networks of this package begin with it
_CROSS = re.compile(r".*\.transformer_blocks\.(\d{1,4})\.attn2\.to_k\.weight")
_TEXT_LAYER = re.compile(r"context_encoder\.transformer\.attn_layers\.layers\.(\d{1,4})\.")
GLIDE = "glide"  # the text_encoder of the networks of glide.py
MAX_EMPTY = 1000  # blocks without weights: a network of ours has fewer


class Weights(NamedTuple):
    """The weights that were chosen of a file.

    :ivar flags: of their network and its process, where another program's file shows them.
    :ivar sentence: for the user, which of the weights these are; '' where the file holds no others.
    """

    state: dict[str, th.Tensor]
    flags: dict[str, Any]
    sentence: str


CLASSIFIER_NAMES = {
    "num_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "channel_mult": "classifier_channel_mult",
    "attention_resolutions": "classifier_attention_resolutions",
    "use_scale_shift_norm": "classifier_use_scale_shift_norm",
    "resblock_updown": "classifier_resblock_updown",
}


def networks_in(content: Any, where: str = "") -> Iterator[tuple[str, dict[str, th.Tensor]]]:
    """Every network of this package in dicts of dicts, as programs save them: where it is, and its state dict.

    Names may stand behind any prefix, which counts as a part of the place: ("state_dict.model.diffusion_model", ...).
    """
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, th.Tensor)}
    for match in filter(None, map(_FIRST.fullmatch, tensors)):
        prefix = match[1]
        network = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        yield f"{where}{prefix}".rstrip("."), network
    for name, value in content.items():
        yield from networks_in(value, f"{where}{name}.")


def architecture(state_dict: Mapping[str, th.Tensor], image_size: Size | None = None) -> dict[str, Any]:
    """The flags of a U-Net, an upsampler or a classifier that can be read off its weights; {} for other networks.

    :param image_size: of the images; without it (and without an attention pool) attention_resolutions stays unknown.
    """
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    if not {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.out_layers.0.weight"} <= set(shapes):
        return {}
    try:
        return _read(shapes, image_size)
    except (LookupError, ValueError, ArithmeticError):  # a network that only begins like one of ours, or a part of one
        return {}


def _read(shapes: Mapping[str, Shape], image_size: Size | None) -> dict[str, Any]:
    if any(name.startswith("output_blocks.") for name in shapes):
        return {**_trunk(shapes, image_size), **_unet(shapes), **_context(shapes)}
    head = _classifier(shapes)
    side = image_size if image_size is not None else _pooled_size(shapes)
    size = {} if side is None or image_size is not None else {"image_size": side}
    return {CLASSIFIER_NAMES.get(name, name): value for name, value in _trunk(shapes, side).items()} | head | size


def _blocks(shapes: Mapping[str, Shape], part: str) -> list[Block]:
    """The layers of each block of "input_blocks" or "output_blocks"; a block without weights is empty."""
    blocks: dict[int, Block] = {}
    for name, shape in shapes.items():
        first, *words = name.split(".", 3)
        if first == part:
            blocks.setdefault(int(words[0]), {}).setdefault(int(words[1]), {})[words[2]] = shape
    if len(blocks) <= max(blocks, default=0) - MAX_EMPTY:
        raise LookupError(f"{part}.{max(blocks)} without those before it")
    return [blocks.get(index, {}) for index in range(max(blocks, default=-1) + 1)]


def _is_residual(block: Block) -> bool:
    return "in_layers.0.weight" in block.get(0, {})


def _attends(layer: Layer) -> bool:
    return "qkv.weight" in layer or "proj_in.weight" in layer


def _has_attention(block: Block) -> bool:
    return any(map(_attends, block.values()))


def _period(encoder: list[Block], decoder: list[Block]) -> int | None:
    """Blocks per level, or None where several numbers fit."""
    plain = [index for index, block in enumerate(encoder) if index and not _is_residual(block)]
    if plain:
        return plain[0]
    if decoder:
        last = (block[max(block)] if len(block) > 1 else {} for block in decoder)
        ups = (index for index, layer in enumerate(last) if layer and not _attends(layer))
        return next(ups, len(decoder) - 1) + 1
    fitting = [period for period in range(2, len(encoder) + 1) if _fits(encoder, period)]
    return fitting[0] if len(fitting) == 1 else None


def _fits(encoder: list[Block], period: int) -> bool:
    """Whether levels of so many blocks explain where the encoder gets wider and where it has attention."""
    first = set(range(1, len(encoder), period))  # of each level
    wider = {index for index, block in enumerate(encoder) if "skip_connection.weight" in block[0]}
    attentive = {index for index, block in enumerate(encoder) if _has_attention(block)}
    levels = [set(range(start, start + period - 1)) for start in first]
    one_kind = all(level <= attentive or not level & attentive for level in levels)
    return len(encoder) % period == 0 and wider <= first and attentive <= set().union(*levels) and one_kind


def _trunk(shapes: Mapping[str, Shape], image_size: Size | None) -> dict[str, Any]:
    """The flags that U-Nets and classifiers share, under the names of the U-Net's."""
    encoder, decoder = _blocks(shapes, "input_blocks"), _blocks(shapes, "output_blocks")
    first, channels = shapes["input_blocks.0.0.weight"], shapes["time_embed.0.weight"][1]
    embedded = shapes["middle_block.0.emb_layers.1.weight"][0]
    flags: dict[str, Any] = {
        "num_channels": channels,
        "image_channels": first[1],
        "dims": len(first) - 2,
        "use_scale_shift_norm": embedded == 2 * shapes["middle_block.0.out_layers.0.weight"][0],
    }
    period = _period(encoder, decoder)
    if period is None:
        return flags
    starts = encoder[1::period]
    flags["num_res_blocks"] = period - 1
    flags["channel_mult"] = ",".join(f"{block[0]['out_layers.0.weight'][0] / channels:g}" for block in starts)
    if len(starts) > 1:
        flags["resblock_updown"] = _is_residual(encoder[period])
    if image_size is not None:
        longer = max(parse_size(image_size))
        rates = [2**level for level, block in enumerate(starts) if _has_attention(block)]
        flags["attention_resolutions"] = ",".join(str(longer // rate) for rate in rates)
    return flags


def _unet(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The flags of the two ends. A network of n channels in and n out is an upsampler of RGB if n is 6."""
    inputs, outputs = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
    upsampler = inputs == 2 * outputs or inputs == outputs == 6
    channels = inputs // 2 if upsampler else inputs
    classes = shapes.get("label_emb.weight")
    flags: dict[str, Any] = {"image_channels": channels, "learn_sigma": outputs == 2 * channels}
    flags["class_cond"] = classes is not None
    if "low_res_embed.0.weight" in shapes:
        flags["cond_aug"] = 1.0  # or less: the level it was trained to leaves no trace
    flags |= {"vector_dim": shapes["vector_emb.weight"][1] // 2} if "vector_emb.weight" in shapes else {}
    return flags if classes is None else flags | {"num_classes": classes[0]}


def _context(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The flags of what the network attends to beside the image; {} where that is nothing.

    A frozen text encoder leaves no trace but the width of its vectors.
    """
    places = [match for match in map(_CROSS.fullmatch, shapes) if match]
    if not places:
        return {}
    flags: dict[str, Any] = {
        "context": "text",
        "context_dim": shapes[places[0][0]][1],
        "transformer_depth": 1 + max(int(place[1]) for place in places),
        "context_pooled": "context_emb.weight" in shapes,
    }
    if "context_encoder.embedding.weight" in shapes:
        rows = shapes["context_encoder.embedding.weight"][0]
        return flags | {"context": "classes", "class_cond": True, "num_classes": rows}
    layers = [int(match[1]) for match in map(_TEXT_LAYER.match, shapes) if match]
    if not layers:
        return flags | {"text_encoder": ""}
    length = shapes["context_encoder.transformer.pos_emb.emb.weight"][0]
    return flags | {"text_encoder": "scratch", "text_depth": (1 + max(layers)) // 2, "max_tokens": length}


def _classifier(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The pool and the number of classes."""
    if "out.2.positional_embedding" in shapes:
        pool, last = "attention", "out.2.c_proj.weight"
    elif len(shapes["out.0.weight"]) == 1:
        pool, last = "adaptive", "out.3.weight"
    elif "out.3.weight" in shapes:
        pool, last = "spatial_v2", "out.3.weight"
    else:
        pool, last = "spatial", "out.2.weight"
    return {"classifier_pool": pool, "num_classes": shapes[last][0]}


def _pooled_size(shapes: Mapping[str, Shape]) -> int | None:
    """Pixels of a side of the square images for which an attention pool was made."""
    period, dims = _period(encoder := _blocks(shapes, "input_blocks"), []), len(shapes["input_blocks.0.0.weight"]) - 2
    if "out.2.positional_embedding" not in shapes or period is None or dims != 2:
        return None
    side = math.isqrt(shapes["out.2.positional_embedding"][1] - 1)
    return side << (len(encoder) // period - 1)
