"""Make an average of a run's weights of any width, of those that were saved by --ema_profiles."""

from __future__ import annotations

from .entry import entry
from .flags import Flags
from .tool_sections import EmaConfig


def make(flags: Flags) -> None:
    """Write the average that the flags ask for."""
    from .. import dist_util, logger
    from ..runtime.errors import refuse
    from ..runtime.files import join, refuse_missing
    from ..training import averages
    from ..training.checkpoints import Checkpoint, powers_in
    from . import common
    from .convert import check_ending, write

    config = flags.part(EmaConfig)
    if dist_util.rank() > 0:
        return
    common.log_to_screen()
    remedy = "give the folder of a run with --ema_profiles"
    refuse_missing(config.source, config.source, remedy)
    files = powers_in(config.source)
    refuse((not files, f"{config.source} holds no power_WIDTH_NNNNNN.pt: {remedy}"))
    steps = sorted({step for step, _ in files})
    step = config.step or steps[-1]
    known = f"{', '.join(map(str, steps))}, of which {config.source} has averages"
    refuse((step not in steps, f"--step {step} is none of {known}"))
    out = config.out or join(config.source, f"profile_{config.profile:g}_{step:06d}.safetensors")
    check_ending(out)
    stored = [key for key in files if key[0] <= step]
    shares, distance = averages.checked_shares(stored, step, config.profile)
    weights = averages.weighted(list(zip(shares, [files[key] for key in stored], strict=True)))
    logger.log(f"{len(stored)} averages of up to {step} updates; the profile is {100 * distance:.2g} % off")
    newest = max(stored)
    write(out, weights, Checkpoint(step, path=files[newest]))


main = entry("ema", make)
