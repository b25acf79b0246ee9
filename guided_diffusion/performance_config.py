"""The flags of speed and memory. What is computed changes with --fast_decode, and with --compile, which rounds
otherwise and draws other masks of dropout. As in config.py, a field is a flag, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import flag


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Compiling the networks."""

    compile: bool = flag(
        False,
        "compile the networks before their first use, which takes minutes: for long runs; needs a C++ compiler; rounds "
        "otherwise, and draws other masks of dropout",
    )


@dataclass(frozen=True, kw_only=True)
class TrainSpeedConfig(CompileConfig):
    """Speed and memory of training."""

    checkpoint_resolutions: str = flag(
        "",
        "recompute activations in the backward pass at these resolutions alone, e.g. 32,16; --use_checkpoint at all",
        runtime=True,
    )
    fsdp: bool = flag(False, "spread weights, gradients, optimizer and averages over the ranks (FSDP2)")
    dry_run: bool = flag(False, "say how large the network is, what a step costs and what memory it takes, and end")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Speed of reading images."""

    fast_decode: bool = flag(
        False, "decode JPEGs at a half, a quarter or an eighth where that is enough; pixels differ a little"
    )
    cache_images: bool = flag(False, "keep the decoded images in memory, shared by the processes of --num_workers")
