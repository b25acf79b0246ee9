"""What commands do about speed and memory: a precision for the hardware, compiled networks, recomputed blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import dist_util, logger
from ..config import TrainConfig, TrainSpeedConfig, resolve_precision
from ..networks.compiling import compile_network
from ..networks.hardware import fastest_precision
from ..networks.memory import recompute_at
from .flags import Flags

ALIASES = {"precision": "use_fp16", "classifier_precision": "classifier_use_fp16"}
WIDTHS = {"precision": "num_channels", "classifier_precision": "classifier_width"}


def settled(name: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """fp32, fp16 or bf16 for one of the flags of precision, and what to say of the choice, '' where there was none.

    Collective where the flag is "auto", as all ranks take rank 0's choice.

    :raises ValueError: if the precision contradicts its older alias, or is unknown.
    """
    precision, alias = values[name], ALIASES[name]
    if precision != "auto":
        return resolve_precision(precision, values[alias], name, alias), ""
    if values[alias]:
        raise ValueError(f"{name} auto contradicts {alias} True: give one of the two")
    choice = dist_util.decide(lambda: fastest_precision(dist_util.dev(), values[WIDTHS[name]]))
    return choice.precision, f"{name} auto: {choice.precision}, because {choice.reason}"


def with_precision(flags: Flags) -> tuple[Flags, list[str]]:
    """The flags with a precision in place of every "auto", and what to say of it; collective."""
    found = {name: settled(name, flags.values) for name in ALIASES if flags.values.get(name) == "auto"}
    chosen = {name: precision for name, (precision, _) in found.items()}
    return Flags(flags.command, {**flags.given, **chosen}, flags.saved), [line for _, line in found.values()]


def check(flags: Flags) -> None:
    """:raises ValueError: for flags of a training that contradict each other."""
    config = flags.part(TrainSpeedConfig)
    if config.compile and config.fsdp:
        raise ValueError("--compile does not go with --fsdp, whose gathering of weights breaks the graph: give one")
    if flags.part(TrainConfig).microbatch == "auto":
        if config.fsdp:
            raise ValueError(
                "--microbatch auto does not go with --fsdp, where no rank can begin a step anew by itself: give a "
                "number"
            )
        if config.compile:
            raise ValueError(
                "--microbatch auto does not go with --compile, which takes minutes for each size that is tried: give a "
                "number"
            )
    if config.checkpoint_resolutions and flags.values.get("use_checkpoint"):
        raise ValueError(
            f"--checkpoint_resolutions {config.checkpoint_resolutions} has no effect with --use_checkpoint True, which "
            "computes all blocks again: give one of the two"
        )


def prepare(flags: Flags, model: Any) -> None:
    """Make a network in training recompute and run compiled, as the flags say.

    :raises ValueError: if there are no such resolutions, or there is no compiler.
    """
    recompute(flags, model)
    if flags.part(TrainSpeedConfig).compile:
        compile_network(model, "the network in training")


def recompute(flags: Flags, model: Any) -> None:
    """Let the blocks at --checkpoint_resolutions compute their activations again in the backward pass.

    :raises ValueError: if there are no such resolutions.
    """
    resolutions = flags.part(TrainSpeedConfig).checkpoint_resolutions
    if not resolutions:
        return
    count = recompute_at(model, resolutions)
    logger.log(f"{count} blocks, those at {resolutions}, compute their activations again in the backward pass")
