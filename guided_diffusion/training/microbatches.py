"""How many images are computed at once where the memory decides: all of a batch, a half of it, a quarter."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch as th

from .. import dist_util, logger
from ..runtime.options import parse_microbatch

# oneDNN's words for memory that it asked for in vain, among other things: these fail with a single image too
NO_PRIMITIVE = ("could not create a primitive", "could not execute a primitive")


def first_microbatch(microbatch: int | str, batch_size: int, *, fsdp: bool) -> tuple[int, bool]:
    """(images that are computed at once at first, whether fewer are tried where the memory does not hold them).

    :raises ValueError: if `microbatch` is neither a number nor "auto", or auto with fsdp.
    """
    wanted = parse_microbatch(str(microbatch))
    if isinstance(wanted, int):
        return wanted if wanted > 0 else batch_size, False
    if fsdp:
        raise ValueError(
            "microbatch auto does not go with fsdp, where no rank can begin a step anew by itself: give a number"
        )
    return batch_size, True


def halve_until_it_fits(attempt: Callable[[int], None], size: int, forget: Callable[[], None]) -> None:
    """Call attempt(size), then with half of it and so on, until it does not ask for memory in vain.

    :param attempt: begins anew each time.
    :param forget: lets go of what an attempt has left, such as the gradients of its first microbatches.
    :raises RuntimeError, MemoryError: that of the attempt with a single image.
    """
    while not _fits(attempt, size):
        size = -(-size // 2)
        logger.log(f"out of memory: the step is repeated in microbatches of {size}")
        forget()
        gc.collect()
        if th.cuda.is_initialized():
            th.cuda.empty_cache()  # what is left are pieces of other sizes


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    """Whether an attempt had the memory; when this returns, the error that holds all of its tensors is gone."""
    try:
        attempt(size)
    except (MemoryError, RuntimeError) as error:
        if size == 1 or not (dist_util.is_out_of_memory(error) or str(error).startswith(NO_PRIMITIVE)):
            raise
        return False
    return True
