"""Training a classifier of noisy images, which guides a diffusion model.

Shapes: n images of a microbatch, K classes.
"""

from __future__ import annotations

from typing import Any

import torch as th
import torch.nn.functional as F

from .batches import RollingValidation
from .draws import Draw
from .saving import skip_batches
from .train_util import Cond, TrainLoop


class ClassifierTrainLoop(TrainLoop):
    """Trains a classifier of noisy images: model(x_t, timesteps) returns logits [n, K], cond holds labels y [n].

    Logs train_loss, train_acc@1, train_acc@5 (at most K) and, from the next batch of `val_data` each time, val_ ones.

    :param noised: False trains on clean images, at t = 0.
    """

    loss_prefix, validation_of = "train_", RollingValidation

    def __init__(self, *, noised: bool = True, **keywords: Any) -> None:
        self.noised = noised
        super().__init__(**keywords)
        skip_batches(self.validation.data, self.resume_step // max(1, self.val_interval))

    def _draw(self, batch: th.Tensor, index: int, *, validation: bool = False, counted: int | None = None) -> Draw:
        draw = super()._draw(batch, index, validation=validation, counted=counted)
        return draw if self.noised else Draw(th.zeros_like(draw.t), th.ones_like(draw.weights), draw.noise)

    def compute_losses(
        self, batch: th.Tensor, cond: Cond, draw: Draw, model: th.nn.Module | None = None
    ) -> dict[str, th.Tensor]:
        """Cross-entropy [n], and 1 or 0 for each image whose label is among the first 1 and 5 guesses."""
        noisy = self.diffusion.q_sample(batch, draw.t, draw.noise) if self.noised else batch
        network = self.ddp_model if model is None else model
        logits = network(noisy, timesteps=self.diffusion.timesteps(draw.t, noisy))
        labels = cond["y"]
        ranks = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        accuracies = {f"acc@{k}": ranks[:, :k].any(dim=1).float() for k in (1, ranks.shape[1])}
        return {"loss": F.cross_entropy(logits, labels, reduction="none"), **accuracies}
