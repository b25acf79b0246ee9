"""Recomputed activations: the blocks at some resolutions compute theirs again in the backward pass.

Most of the memory is at the high resolutions, and little of the work where there are few channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.errors import refuse
from .attention import SpatialTransformer
from .blocks import AttentionBlock, ResBlock

if TYPE_CHECKING:
    from ..unet import UNetBackbone


def recompute_at(network: UNetBackbone, resolutions: str) -> int:
    """Let the blocks at these resolutions compute their activations again; returns how many blocks those are.

    :param resolutions: pixels of the longer side, "32,16"; '' changes nothing.
    :raises ValueError: if one of them does not occur in the network.
    """
    longer = network.image_size if isinstance(network.image_size, int) else max(network.image_size)
    level_of = {str(longer // 2**level): level for level in range(len(network.channel_mult))}
    words = {word.strip() for word in resolutions.split(",")} - {""}
    unknown = ", ".join(sorted(words - set(level_of)))
    fault = f"checkpoint_resolutions {unknown} of {resolutions!r} do not occur at size {longer}"
    refuse((unknown, f"{fault}: its levels are {', '.join(level_of)}; use these, or '' for none"))
    levels, blocks = {level_of[word] for word in words}, (ResBlock, AttentionBlock, SpatialTransformer)
    chosen = [block for block in network.modules() if isinstance(block, blocks) and block.level in levels]
    for block in chosen:
        block.use_checkpoint = True
    return len(chosen)
