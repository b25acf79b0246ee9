"""The batches that a training learns from, those that it is measured on, and the parts that the memory holds.

Shapes: N images of a batch on all ranks together, n of them on this one or in one microbatch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch as th

from .. import dist_util, logger
from ..runtime.errors import as_user_error
from ..runtime.pictures import range_in_words, to_unit
from ..runtime.seeds import to_device
from .meter import Meter, gather_losses, join
from .noise import Draw

Cond = Mapping[str, th.Tensor]

# oneDNN's words for memory that it asked for in vain, among other things: these fail with a single image too
NO_PRIMITIVE = ("could not create a primitive", "could not execute a primitive")


class Supply:
    """The batches to learn from, one after the other: (images [n, C, H, W], model keywords).

    :param data: an endless iterator.
    :param meter: measures how long they are waited for.
    """

    def __init__(self, data: Any, meter: Meter) -> None:
        self._data, self._meter, self._iterator = data, meter, iter(data)
        self._last: tuple[th.Tensor, Cond] | None = None

    @property
    def begun(self) -> bool:
        """Whether a batch was taken."""
        return self._last is not None

    def take(self, updates: int) -> tuple[th.Tensor, Cond]:
        """The next batch, after so many updates; logs the range of the first one's numbers."""
        with self._meter.waiting_for_data():
            ended = f"the data ended after {updates} updates"
            with as_user_error(f"{ended}: give an endless iterator, or max_steps {updates}", StopIteration):
                batch, cond = next(self._iterator)
        if not self.begun:
            logger.log(self._first(batch))
        self._last = batch, cond
        return self._last

    def _first(self, batch: th.Tensor) -> str:
        if getattr(self._data, "encoder", None) is None:
            return f"images of the first batch, {range_in_words(to_unit(batch))}"
        return f"latents of the first batch, mean {batch.mean():.3g} and deviation {batch.std():.3g}, which should be 1"

    def give_back(self) -> None:
        """Let a resumed run begin with the batch that was taken last, where the data can."""
        if hasattr(self._data, "give_back"):
            self._data.give_back()

    def spoiled(self) -> tuple[th.Tensor, Cond]:
        """A batch whose loss is not finite: all ranks skip its step."""
        assert self._last is not None
        images, cond = self._last
        return th.full_like(images, float("nan"), dtype=th.float32), cond


class Part(NamedTuple):
    """A batch to measure, and the key of its noise; `counted` of its N images count, None: all."""

    key: int
    images: th.Tensor
    cond: Cond
    counted: int | None = None


class Validation:
    """The batches to measure: the same ones every time, the first `most` or fewer where these hold all images.

    Where the images do not fill the last batch, an `ImageStream` fills it with images of its next round, which do not
    count.
    """

    def __init__(self, data: Any, most: int) -> None:
        self.data, self.most = data, most
        self._parts: list[Part] = []

    def parts(self, updates: int) -> list[Part]:
        """The batches to measure after so many updates."""
        if not self._parts:
            size = getattr(self.data, "global_batch", 0)  # 0 where the data are no stream, and may be without end
            total = len(self.data.dataset) if size else 0
            count = min(self.most, -(-total // size)) if size else self.most
            for key, (images, cond) in enumerate(islice(self.data, count)):
                self._parts.append(Part(key, images, cond, min(size, total - key * size) if size else None))
            each = len(self._parts[0].images) * dist_util.world_size()
            logger.log(
                f"validation on the same {sum(part.counted or each for part in self._parts)} images every time, in "
                f"batches of {each}, with the same noise"
            )
        return self._parts


class RollingValidation(Validation):
    """The next batch every time, with noise of its own."""

    def parts(self, updates: int) -> list[Part]:
        return [Part(updates, *next(self.data))]


def measured(
    parts: Iterable[Part],
    draw: Callable[..., Draw],
    terms: Callable[..., Mapping[str, th.Tensor]],
    model: th.nn.Module,
    size: int,
) -> dict[str, th.Tensor]:
    """t and the terms of the images of all ranks, which all call it; {} where there are no parts.

    :param draw: and `terms`: as `TrainLoop._draw` and `compute_losses`.
    :param size: of a microbatch.
    """
    rows = []
    for key, batch, cond, counted in parts:
        drawn = draw(batch, key, validation=True, counted=counted)
        values = join([terms(*cut, model) for cut in microbatches(batch, cond, drawn, size)])
        t, values = gather_losses({"t": drawn.t, **values})
        rows.append({name: value[:counted] for name, value in [("t", t), *values.items()]})
    return join(rows) if rows else {}


def microbatches(batch: th.Tensor, cond: Cond, draw: Draw, size: int) -> Iterator[tuple[th.Tensor, Cond, Draw]]:
    """(images [n, C, H, W] in [-1, 1], model keywords, what is drawn for them), on the device of the draw."""
    device = draw.t.device
    for start in range(0, len(batch), size):
        part = slice(start, start + size)
        keywords = {name: to_device(value[part], device) for name, value in cond.items()}
        yield to_unit(to_device(batch[part], device)), keywords, draw.cut(part)


def halve_until_it_fits(attempt: Callable[[int], None], size: int, forget: Callable[[], None] | None) -> None:
    """Call attempt(size), then with half of it and so on, until it does not run out of memory.

    :param attempt: begins anew each time.
    :param forget: lets go of what an attempt has left, such as the gradients of its first microbatches; None: there is
        one attempt.
    :raises RuntimeError: that of the last attempt, as is a MemoryError.
    """
    while True:
        try:
            return attempt(size)
        except (MemoryError, RuntimeError) as error:
            memory = dist_util.is_out_of_memory(error) or str(error).startswith(NO_PRIMITIVE)
            if size == 1 or forget is None or not memory:
                raise
        # here the error, which holds all tensors of the attempt, is gone
        size = -(-size // 2)
        logger.log(f"out of memory: the step is repeated in microbatches of {size}")
        forget()
        gc.collect()
        if th.cuda.is_initialized():
            th.cuda.empty_cache()  # what is left are pieces of other sizes
