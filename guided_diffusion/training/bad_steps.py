"""Training steps whose numbers are not finite: counted, traced to their images, and the end of the run where they last.

Shapes: n images of a step on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch as th

from .. import dist_util, logger
from ..fp16_util import MixedPrecisionTrainer
from . import checkpoints
from .meter import Meter

SHOWN = 8  # images in a line of the log
COLUMN = "skipped_steps"
HINTS = {
    "loss": "remove or repair the images named above, or take a lower --lr",
    "gradient": "take a lower --lr, --grad_clip 1, or --precision bf16 in place of fp16",
    "weight norm": "go back to a checkpoint before the weights grew, with a lower --lr",
}


class Suspect(NamedTuple):
    """An image of a step: where it comes from, its t and label (None: it has none), and whether its loss is finite."""

    name: str
    t: int
    label: int | None
    finite: bool

    def __str__(self) -> str:
        return f"{self.name} (t {self.t}{'' if self.label is None else f', label {self.label}'})"


class BadSteps:
    """The steps in a row that were skipped; all ranks skip the same ones.

    Steps that only lower the loss scale of fp16 are how it is found: they are logged, and do not count.

    :param limit: how many end the run; 0: no number does.
    :param trainer: its `fault` says what was wrong with a step.
    :param data: the stream; one with names() tells the file of each image.
    :param meter: forgets losses that are not finite.
    """

    def __init__(self, limit: int, trainer: MixedPrecisionTrainer, data: Any, meter: Meter) -> None:
        self.limit, self.trainer, self.data, self.meter = limit, trainer, data, meter
        self.in_a_row = 0

    def skipped(self, step: int, cond: Mapping[str, th.Tensor], losses_at: tuple[th.Tensor, th.Tensor] | None) -> bool:
        """Log a step that was skipped, and return whether it was one too many; every rank calls it.

        :param step: its number, from 1.
        :param cond: what the network saw beside this rank's images.
        :param losses_at: t [n] and losses [n] of them, where they are known.
        """
        logger.logkv(COLUMN, logger.getkvs().get(COLUMN, 0) + 1)
        if self.trainer.fault == "loss":
            self.meter.drop_losses()
        if self.trainer.only_scaled:
            return False
        self.in_a_row += 1
        own = [] if losses_at is None else self._suspects(cond, *losses_at)
        images = [image for images in dist_util.gather_objects(own) for image in images]
        if images:
            logger.warn(f"step {step} was skipped, as {_accusation(images, self.trainer.fault)}")
        return self.in_a_row == self.limit

    def _suspects(self, cond: Mapping[str, th.Tensor], t: th.Tensor, losses: th.Tensor) -> list[Suspect]:
        labels = cond["y"].tolist() if "y" in cond else [None] * len(t)
        names = self.data.names() if hasattr(self.data, "names") else []
        if len(names) != len(t):
            names = [f"image {index} of rank {dist_util.rank()}" for index in range(len(t))]
        return [Suspect(*row) for row in zip(names, t.tolist(), labels, losses.isfinite().tolist(), strict=True)]

    def error(self, step: int, folder: str, resumed: str) -> ValueError:
        """What ends the run.

        :param folder: of its checkpoints; `resumed`: the one that it went on from, or ''.
        """
        fault, files = self.trainer.fault, checkpoints.latest(folder)
        path = resumed if files is None else files.model
        rest = f"go on with --resume_checkpoint {path}" if path else "no checkpoint was written before, start anew"
        return ValueError(
            f"the last {self.in_a_row} steps up to step {step} were skipped, as the {fault} was not finite: "
            f"{HINTS[fault]}; {rest}"
        )


def _accusation(images: list[Suspect], fault: str) -> str:
    """Which images are to blame; all of them where each has a finite loss."""
    bad = [image for image in images if not image.finite]
    what = f"the loss of {len(bad)} of its {len(images)} images" if bad else f"the {fault}"
    shown = bad or images
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"{what} was not finite: {', '.join(map(str, shown[:SHOWN]))}{more}"
