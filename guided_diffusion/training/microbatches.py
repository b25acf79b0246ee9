"""Batches in parts that the memory holds: of a size that is given, or as large a half of a half as fits.

Shapes: n images of a microbatch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch as th

from .. import dist_util, logger
from ..runtime.options import parse_microbatch
from ..runtime.pictures import to_unit
from ..runtime.seeds import to_device
from .batches import Cond
from .noise import Draw

# oneDNN's words for memory that it asked for in vain, among other things: these fail with a single image too
NO_PRIMITIVE = ("could not create a primitive", "could not execute a primitive")


def microbatches(batch: th.Tensor, cond: Cond, draw: Draw, size: int) -> Iterator[tuple[th.Tensor, Cond, Draw]]:
    """(images [n, C, H, W] in [-1, 1], model keywords, what is drawn for them), on the device of the draw."""
    device = draw.t.device
    for start in range(0, len(batch), size):
        part = slice(start, start + size)
        keywords = {name: to_device(value[part], device) for name, value in cond.items()}
        yield to_unit(to_device(batch[part], device)), keywords, draw.cut(part)


def first_microbatch(microbatch: int | str, batch_size: int, *, fsdp: bool) -> tuple[int, bool]:
    """(images that are computed at once at first, whether fewer are tried where the memory does not hold them).

    :raises ValueError: if `microbatch` is neither a number nor "auto", or auto with fsdp.
    """
    size = parse_microbatch(str(microbatch))
    if isinstance(size, int):
        return size if size > 0 else batch_size, False
    if fsdp:
        raise ValueError("microbatch auto does not go with fsdp, where all ranks make a step together: give a number")
    return batch_size, True


def halve_until_it_fits(attempt: Callable[[int], None], size: int, forget: Callable[[], None] | None) -> None:
    """Call attempt(size), then with half of it and so on, until it does not run out of memory.

    :param attempt: begins anew each time.
    :param forget: lets go of what an attempt has left, such as the gradients of its first microbatches; None: there is
        one attempt.
    :raises RuntimeError, MemoryError: that of the last attempt.
    """
    while not _fits(attempt, size, last=size == 1 or forget is None):
        assert forget is not None
        size = -(-size // 2)
        logger.log(f"out of memory: the step is repeated in microbatches of {size}")
        forget()
        gc.collect()
        if th.cuda.is_initialized():
            th.cuda.empty_cache()  # what is left are pieces of other sizes


def _fits(attempt: Callable[[int], None], size: int, *, last: bool) -> bool:
    """Whether an attempt had the memory; when this returns, the error that holds all of its tensors is gone."""
    try:
        attempt(size)
    except (MemoryError, RuntimeError) as error:
        if last or not (dist_util.is_out_of_memory(error) or str(error).startswith(NO_PRIMITIVE)):
            raise
        return False
    return True
