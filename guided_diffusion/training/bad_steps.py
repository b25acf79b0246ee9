"""Training steps whose numbers are not finite: counted, traced to their images, and the end of the run where they last.

Shapes: n images of a step on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th

from .. import dist_util, logger
from ..fp16_util import MixedPrecisionTrainer
from ..runtime.errors import UserError, listed
from . import checkpoints
from .meter import Meter

SHOWN = 8  # images in a line of the log
COLUMN = "skipped_steps"
HINTS = {
    "loss": "remove or repair the images named above, or take a lower --lr",
    "gradient": "take a lower --lr, --grad_clip 1, or --precision bf16 in place of fp16",
    "weight norm": "go back to a checkpoint before the weights grew, with a lower --lr",
}


class BadSteps:
    """Counts the steps in a row that were skipped; all ranks skip the same ones.

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
        rows = [] if losses_at is None else self._described(cond, *losses_at)
        images = [image for images in dist_util.gather_objects(rows) for image in images]
        if images:
            logger.warn(f"step {step} was skipped, as {blamed(images, self.trainer.fault)}")
        return self.in_a_row == self.limit

    def _described(self, cond: Mapping[str, th.Tensor], t: th.Tensor, losses: th.Tensor) -> list[tuple[str, bool]]:
        """(source, t and label of an image, whether its loss is finite) of this rank's."""
        names = self.data.names() if hasattr(self.data, "names") else []
        if len(names) != len(t):
            names = [f"image {index} of rank {dist_util.rank()}" for index in range(len(t))]
        labels = [f", label {label}" for label in cond["y"].tolist()] if "y" in cond else [""] * len(t)
        rows = zip(names, t.tolist(), labels, losses.isfinite().tolist(), strict=True)
        return [(f"{name} (t {step}{label})", finite) for name, step, label, finite in rows]

    def error(self, step: int, folder: str, resumed: str) -> UserError:
        """The error that ends the run.

        :param folder: of its checkpoints; `resumed`: the one that it went on from, or ''.
        """
        fault, files = self.trainer.fault, checkpoints.newest(folder)[0]
        path = files.model if files else resumed
        rest = f"go on with --resume_checkpoint {path}" if path else "no checkpoint was written before, start anew"
        return UserError(
            f"the last {self.in_a_row} steps up to step {step} were skipped, as the {fault} was not finite: "
            f"{HINTS[fault]}; {rest}"
        )


def blamed(images: list[tuple[str, bool]], fault: str) -> str:
    """The images to blame, in words; all of them where each has a finite loss."""
    bad = [text for text, finite in images if not finite]
    cause = f"the loss of {len(bad)} of its {len(images)} images" if bad else f"the {fault}"
    shown = bad or [text for text, _ in images]
    return f"{cause} was not finite: {listed(shown, SHOWN)}"
