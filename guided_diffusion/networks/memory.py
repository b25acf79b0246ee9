"""Which blocks of a network compute their activations again in the backward pass: those of some resolutions alone.

Most of the memory is at the high resolutions, and little of the work where there are few channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from .blocks import AttentionBlock, ResBlock, Upsample

if TYPE_CHECKING:
    from ..unet import UNetBackbone


def recompute_at(network: UNetBackbone, resolutions: str) -> int:
    """Let the blocks at these resolutions compute their activations again; returns how many blocks those are.

    A block that halves or doubles the resolution belongs to the higher one, where it keeps most. Parameters and their
    names stay what they are.

    :param resolutions: pixels of the longer side, "32,16"; '' changes nothing.
    :raises ValueError: if one of them does not occur in the network.
    """
    chosen = _levels(network, resolutions)
    blocks = [block for level, block in _blocks(network) if level in chosen]
    for block in blocks:
        block.use_checkpoint = True
    return len(blocks)


def _levels(network: UNetBackbone, text: str) -> set[int]:
    """The levels at which there are these resolutions."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    size = network.image_size
    longer = size if isinstance(size, int) else max(size)
    level_of = {str(longer // 2**level): level for level in range(len(network.channel_mult))}
    lost = [word for word in words if word not in level_of]
    if lost:
        raise ValueError(
            f"checkpoint_resolutions {', '.join(lost)} of {text!r} do not occur at size {longer}: its levels are "
            f"{', '.join(level_of)}; use these, or '' for none"
        )
    return {level_of[word] for word in words}


def _blocks(network: UNetBackbone) -> Iterator[tuple[int, ResBlock | AttentionBlock]]:
    """Every block that can be computed again, and its level."""
    for level, part in _parts(network):
        for module in part.modules():
            if isinstance(module, ResBlock | AttentionBlock):
                doubles = isinstance(module, ResBlock) and isinstance(module.h_upd, Upsample)
                yield level - doubles, module


def _parts(network: UNetBackbone) -> Iterator[tuple[int, nn.Module]]:
    """The parts of the network, and the level that the input of each is at."""
    last, repeats = len(network.channel_mult) - 1, network.num_res_blocks
    down = [0] + [level for level in range(last + 1) for _ in range(repeats + (level < last))]
    up = [level for level in range(last, -1, -1) for _ in range(repeats + 1)]
    yield from zip(down, network.input_blocks, strict=True)
    yield last, network.middle_block
    decoder = getattr(network, "output_blocks", None)  # classifiers have none
    if decoder is not None:
        yield from zip(up, decoder, strict=True)
