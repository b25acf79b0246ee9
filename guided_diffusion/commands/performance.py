"""What commands do about speed and memory: a precision for the hardware, recomputed blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import dist_util, logger
from ..config import TrainSpeedConfig, resolve_precision
from ..networks.hardware import fastest_precision
from ..networks.memory import recompute_at
from ..runtime.errors import UserError
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
        raise UserError(f"{name} auto contradicts {alias} True: give one of the two")
    choice = dist_util.decide(lambda: fastest_precision(dist_util.dev(), values[WIDTHS[name]]))
    return choice.precision, f"{name} auto: {choice.precision}, because {choice.reason}"


def with_precision(flags: Flags) -> tuple[Flags, list[str]]:
    """The flags with a precision in place of every "auto", and what to say of it; collective."""
    chosen = {name: settled(name, flags.values) for name in ALIASES if flags.values.get(name) == "auto"}
    values = {name: precision for name, (precision, _) in chosen.items()}
    return flags.with_values(**values), [line for _, line in chosen.values()]


def precision_of(flags: Flags) -> str:
    """The precision of the network that a command trains, once no flag is "auto"."""
    return settled("precision" if "precision" in flags.values else "classifier_precision", flags.values)[0]


def recompute(flags: Flags, model: Any) -> None:
    """Let the blocks at --checkpoint_resolutions compute their activations again in the backward pass.

    :raises ValueError: if there are no such resolutions.
    """
    resolutions = flags.part(TrainSpeedConfig).checkpoint_resolutions
    if resolutions:
        count = recompute_at(model, resolutions)
        logger.log(f"{count} blocks, those at {resolutions}, compute their activations again in the backward pass")
