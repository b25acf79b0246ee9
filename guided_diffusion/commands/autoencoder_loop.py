"""Training autoencoders in the one training loop.

Shapes: N images of a step on all ranks together, n of them in a microbatch, [n, C, H, W] in [-1, 1]; D channels of a
latent [n, D, h, w].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from torch import nn

from .. import dist_util, logger
from ..config import AutoencoderTrainConfig
from ..networks.autoencoder import AutoencoderKL, VQModel
from ..runtime.errors import refuse
from ..runtime.pictures import DRAWN_CHANNELS, Pixels, save_grid, to_uint8, to_unit
from ..runtime.seeds import to_device
from ..train_util import TrainLoop
from ..training.autoencoder import Adversary, AutoencoderLoss, DeadCodes, FeatureNetwork, latent_moments
from ..training.batches import Cond
from ..training.noise import Draw
from ..training.saving import get_blob_logdir
from ..training.similarity import psnr, ssim

SHOWN = 8  # columns of the grid of reconstructions


class Untimed:
    """Stands in for the process of diffusion: an autoencoder knows no timesteps."""

    num_timesteps = 1


class Scale:
    """1 / standard deviation of the latents, which makes them as large as the noise of diffusion."""

    def __init__(self) -> None:
        self.factor = 1.0

    def state_dict(self) -> dict[str, float]:
        """What `load_autoencoder` returns beside the network."""
        return {"factor": self.factor}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take it up."""
        self.factor = state["factor"]


class AutoencoderLoop(TrainLoop):
    """Trains an `AutoencoderKL` or a `VQModel`.

    A step trains the autoencoder, then the discriminator on the same reconstructions. Validation logs the losses, PSNR
    and SSIM of the most probable latents, and draws originals above reconstructions. Every checkpoint holds the scale
    of the latents of the batch before it.

    :param losses: the weights of the losses, and the discriminator's settings.
    :param features: the network of the feature loss, where `losses.feature_weight` is not 0.
    :param distance: of (images, reconstructions) uint8 [N, H, W, C]: (name, value) to log in validation.
    """

    def __init__(
        self,
        *,
        model: AutoencoderKL | VQModel,
        losses: AutoencoderTrainConfig,
        features: FeatureNetwork | None = None,
        distance: Callable[[Pixels, Pixels], tuple[str, float]] | None = None,
        diffusion: Any = None,
        **keywords: Any,
    ) -> None:
        uneven = losses.disc_weight and keywords["microbatch"] == "auto" and dist_util.world_size() > 1
        alone = bool(losses.feature_weight) != (features is not None)
        refuse(
            (keywords.get("fsdp"), "fsdp does not go with autoencoders: leave it out"),
            (uneven, "microbatch auto does not go with a discriminator on several ranks: give a number"),
            (alone, "feature_weight and a network of features need each other"),
        )
        device, channels = next(model.parameters()).device, model.ddconfig["in_channels"]
        self.losses, self.distance = AutoencoderLoss(losses, features), distance
        self.autoencoder, self.scale, self.extra = model, Scale(), {}
        self.adversary: Adversary | None = None
        self.dead_codes: DeadCodes | None = None
        self.extra["scale"] = self.scale
        if losses.disc_weight:
            self.adversary = self.extra["discriminator"] = Adversary(losses, channels, device)
        if isinstance(model, VQModel):
            codes, seed = model.quantize.embedding.num_embeddings, keywords.get("seed", 0)
            self.dead_codes = self.extra["codes"] = DeadCodes(codes, losses.reseed_interval, seed, device)
        self._latest: th.Tensor | None = None  # images of this rank
        super().__init__(model=model, diffusion=diffusion or Untimed(), **keywords)

    def _draw(self, batch: th.Tensor, index: int, *, validation: bool = False, counted: int | None = None) -> Draw:
        """Noise of the latents' shape."""
        sides = [side // self.autoencoder.factor for side in batch.shape[2:]]
        latents = th.empty(len(batch), self.autoencoder.embed_dim, *sides, device="meta")
        return super()._draw(latents, index, validation=validation, counted=counted)

    def forward_backward(self, batch: th.Tensor, cond: Cond) -> None:
        """Gradients of a batch, of the discriminator's loss too."""
        self._latest = batch
        if self.adversary is not None:
            self.adversary.begin()
        if self.dead_codes is not None:
            self.dead_codes.begin()
        super().forward_backward(batch, cond)

    def compute_losses(
        self, batch: th.Tensor, cond: Cond, draw: Draw, model: nn.Module | None = None
    ) -> dict[str, th.Tensor]:
        """Losses [n] of a microbatch; of a model that is measured, PSNR and SSIM beside them."""
        if model is not None:
            made = self.losses.reconstruct(model, batch, None)
            images = made.images.clamp(-1, 1)
            return {**self.losses.terms(batch, made), "psnr": psnr(images, batch), "ssim": ssim(images, batch)}
        made = self.losses.reconstruct(self.model, batch, draw.noise)
        terms = self.losses.terms(batch, made)
        if self.dead_codes is not None and made.ids is not None:
            self.dead_codes.see(made.latents, made.ids)
        if self.adversary is None or self.updates < self.adversary.start:
            return terms
        share = len(batch) / self.batch_size
        last_layer = self.autoencoder.decoder.last_layer
        terms |= self.adversary.autoencoder_loss(made.images, terms["reconstruction"], last_layer)
        terms["loss"] = terms["loss"] + terms["d_weight"] * terms["g_loss"]
        return {**terms, "d_loss": self.adversary.learn(batch, made.images, share)}

    def _update_ema(self) -> None:
        """Follow an update of the autoencoder: the discriminator's, dead codes, and the moving averages."""
        if self.adversary is not None:
            self.adversary.step(self.opt.param_groups[0]["lr"])
        if self.dead_codes is not None and isinstance(self.autoencoder, VQModel):
            codes = self.autoencoder.quantize.embedding.weight
            logger.logkv("reseeded_codes", self.dead_codes.reseed(codes, self.opt, self.updates + 1))
        super()._update_ema()

    def save(self) -> None:
        """Write the checkpoint of the updates made so far, with the scale of the latents; every rank calls it."""
        if self._latest is not None:
            with self.evaluation_model() as model:
                moments = latent_moments(model, to_unit(to_device(self._latest, self.device)))
            count, total, squares = th.stack(dist_util.gather(moments)).sum(0).tolist()
            self.scale.factor = max(squares / count - (total / count) ** 2, 1e-12) ** -0.5
        super().save()

    def validate(self) -> None:
        """Log losses, PSNR and SSIM of the validation images, and draw the first of them; every rank calls it."""
        super().validate()
        parts = self.failures.keep(self.validation.parts, self.updates)
        if self.failures.tell() or not parts:
            return
        originals, made = list[th.Tensor](), list[th.Tensor]()
        with self.evaluation_model() as model:
            for part in parts if self.distance else parts[:1]:
                images = to_unit(to_device(part.images, self.device))
                out = th.cat(
                    [self.losses.reconstruct(model, rows, None).images for rows in images.split(self.microbatch)]
                )
                for rows, all_rows in ((images, originals), (out, made)):
                    all_rows.append(th.cat(dist_util.gather(rows))[: part.counted])
        if dist_util.rank() == 0:
            self._show(to_uint8(th.cat(originals)), to_uint8(th.cat(made)))

    def _show(self, images: Pixels, made: Pixels) -> None:
        if images.shape[-1] in DRAWN_CHANNELS:
            columns = min(SHOWN, len(images))
            rows = [pixels[:columns] for pixels in (images, made)]
            path = os.path.join(get_blob_logdir(), "reconstructions", f"{self.updates:06d}.png")
            save_grid(path, th.cat([th.from_numpy(row) for row in rows]).numpy(), columns)
        if self.distance is not None:
            name, value = self.distance(images, made)
            logger.logkv(f"val_{name}", value)
