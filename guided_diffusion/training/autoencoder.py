"""Losses of autoencoders, their discriminator's part, and the codes of a codebook that nothing uses.

Shapes: N images [N, C, H, W] in [-1, 1], latents [N, D, h, w], K codes [K, D]; a loss is [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .. import dist_util
from ..fp16_util import Gradients
from ..networks.autoencoder import AutoencoderKL, DiagonalGaussian, PatchDiscriminator, VQModel, straight_through
from ..runtime.seeds import to_device
from .gradients import AdamW, AveragedGradients
from .noise import TRAINING

if TYPE_CHECKING:
    from ..config import AutoencoderTrainConfig

DISTANCES: dict[str, Callable[..., th.Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}
RESEEDED = 3  # spawn key: another stream than those of timesteps and dropped labels
LARGEST_WEIGHT, LEAST_NORM = 1e4, 1e-4  # of the adaptive weight (Esser et al. 2021)

FeatureNetwork = Callable[[th.Tensor], th.Tensor]  # differentiable, images -> features [N, F]


class Reconstruction(NamedTuple):
    """What an autoencoder makes of images.

    :ivar images: the reconstructions [N, C, H, W].
    :ivar penalty: of the latents [N]: their KL divergence or the codebook's loss.
    :ivar latents: [N, D, h, w], before a codebook.
    :ivar ids: the code of each position [N * h * w]; None without a codebook.
    """

    images: th.Tensor
    penalty: th.Tensor
    latents: th.Tensor
    ids: th.Tensor | None = None


def per_image(values: th.Tensor) -> th.Tensor:
    """The mean over everything but the first axis, [N]."""
    return values.flatten(1).mean(1)


def codebook_loss(latents: th.Tensor, codes: th.Tensor, commitment: float) -> th.Tensor:
    """Draws codes to latents, and latents to their codes by `commitment` (van den Oord et al. 2017), [N]."""
    return per_image((latents.detach() - codes).square() + commitment * (latents - codes.detach()).square())


def hinge_loss(real: th.Tensor, fake: th.Tensor) -> th.Tensor:
    """The discriminator's loss from its scores of images and of reconstructions, [N]."""
    return 0.5 * (per_image(F.relu(1 - real)) + per_image(F.relu(1 + fake)))


def adaptive_weight(reconstruction: th.Tensor, adversarial: th.Tensor, last_layer: th.Tensor) -> th.Tensor:
    """The ratio of the norms of two losses' gradients at the decoder's last layer (Esser et al. 2021, eq. 7), [].

    Gradients are averaged over the ranks first: every rank calls it.

    :param reconstruction: a mean loss []; so is `adversarial`.
    """
    grads = [th.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    both = th.stack(grads)
    if dist_util.world_size() > 1:
        dist.all_reduce(both)
        both /= dist_util.world_size()
    wanted, given = both.flatten(1).norm(dim=1)
    ratio: th.Tensor = wanted / (given + LEAST_NORM)
    return ratio.clamp(0, LARGEST_WEIGHT).detach()


@dataclass(frozen=True)
class AutoencoderLoss:
    """The losses of an autoencoder but for a discriminator's.

    :param features: with `config.feature_weight`, a network whose features of images and reconstructions are compared.
    """

    config: AutoencoderTrainConfig
    features: FeatureNetwork | None = None

    def reconstruct(self, model: Any, images: th.Tensor, noise: th.Tensor | None) -> Reconstruction:
        """The reconstructions from latents drawn with noise [N, D, h, w]; None takes the most probable latents."""
        if isinstance(model, VQModel):
            latents = model.encode(images)
            codes, ids = model.quantize.codes(latents)
            made = model.decode(straight_through(latents, codes), force_not_quantize=True)
            return Reconstruction(made, codebook_loss(latents, codes, self.config.commitment), latents, ids)
        posterior: DiagonalGaussian = model.encode(images)
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return Reconstruction(model.decode(latents), posterior.kl() / images[0].numel(), latents)

    def terms(self, images: th.Tensor, made: Reconstruction) -> dict[str, th.Tensor]:
        """Each term [N] by its name; "reconstruction" and "loss" are weighted sums without and with the penalty."""
        config = self.config
        distance = per_image(DISTANCES[config.loss](made.images, images, reduction="none"))
        terms, total = {config.loss: distance}, distance
        if self.features is not None:
            with th.no_grad():
                targets = F.normalize(self.features(images), dim=1)
            terms["feature"] = (F.normalize(self.features(made.images), dim=1) - targets).square().sum(1)
            total = total + config.feature_weight * terms["feature"]
        name, weight = ("kl", config.kl_weight) if made.ids is None else ("codebook", config.codebook_weight)
        return {**terms, name: made.penalty, "reconstruction": total, "loss": total + weight * made.penalty}


class Adversary:
    """A discriminator with its own optimizer.

    :param config: its width, depth, and weight in the autoencoder's loss.
    """

    def __init__(self, config: AutoencoderTrainConfig, channels: int, device: th.device) -> None:
        self.weight, self.start = config.disc_weight, config.disc_start
        self.network = PatchDiscriminator(channels, config.disc_channels, config.disc_layers).to(device)
        params = list(self.network.parameters())
        dist_util.sync_params(params)
        self.opt = AdamW(params, lr=0.0, betas=(0.5, 0.9), weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
        kind = AveragedGradients if dist_util.world_size() > 1 else Gradients
        self._gradients = kind([(param, param) for param in params])
        self._used = False

    def begin(self) -> None:
        """Forget the gradients of a step that was not made."""
        self._gradients.reset()
        self._used = False

    def autoencoder_loss(
        self, made: th.Tensor, reconstruction: th.Tensor, last_layer: th.Tensor
    ) -> dict[str, th.Tensor]:
        """What the scores of reconstructions add to the autoencoder's loss: "g_loss" [N] and its factor "d_weight" [N].

        :param reconstruction: the other losses [N] of the reconstructions.
        """
        self.network.requires_grad_(False)
        g_loss = -per_image(self.network(made))
        weight = self.weight * adaptive_weight(reconstruction.mean(), g_loss.mean(), last_layer)
        self.network.requires_grad_(True)
        return {"g_loss": g_loss, "d_weight": weight.expand(len(made))}

    def learn(self, images: th.Tensor, made: th.Tensor, share: float) -> th.Tensor:
        """Add the gradients of the hinge loss of a microbatch, this share of a rank's batch; returns it [N]."""
        loss = hinge_loss(self.network(images), self.network(made.detach()))
        mean, self._used = loss.mean() * share, True
        with self._gradients.collecting(mean, last=False):
            mean.backward()
        return loss.detach()

    @th.no_grad()
    def step(self, lr: float) -> None:
        """Step on the gradients of all ranks, where there are any and they are finite; every rank calls it."""
        if not self._used:
            return
        grads, _ = self._gradients.finish()
        for group in self.opt.param_groups:
            group["lr"] = lr
        if bool(th.stack([grad.isfinite().all() for grad in grads]).all()):
            self.opt.step()
        self.begin()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer."""
        return {"network": self.network.state_dict(), "opt": self.opt.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up both."""
        self.network.load_state_dict(state["network"])
        self.opt.load_state_dict(state["opt"])


class DeadCodes:
    """Re-seeds codes that no image has used in `interval` updates with latents of the last batch; 0: never.

    :param seed: with the number of updates, the key by which the latents are chosen.
    """

    def __init__(self, n_codes: int, interval: int, seed: int, device: th.device) -> None:
        self._interval, self._seed = interval, seed
        self._used = th.zeros(n_codes, device=device)
        self.begin()

    def begin(self) -> None:
        """Forget the latents and the codes of a batch."""
        self._now, self._latents = th.zeros_like(self._used), list[th.Tensor]()

    def see(self, latents: th.Tensor, ids: th.Tensor) -> None:
        """Note the codes of latents [N, D, h, w]."""
        self._now[ids] = 1.0
        self._latents.append(latents.detach().movedim(1, -1).flatten(0, -2))

    @th.no_grad()
    def reseed(self, codes: th.Tensor, opt: th.optim.Optimizer, updates: int) -> int:
        """Count an update, and replace codes [K, D] in place where one is due; every rank calls it.

        :param updates: made so far, this one included.
        :return: how many codes were replaced.
        """
        self._used = th.stack([self._used, *dist_util.gather(self._now)]).amax(0)
        due = self._interval > 0 and updates % self._interval == 0
        dead = th.nonzero(self._used == 0)[:, 0] if due else th.empty(0, dtype=th.long)
        if len(dead):
            every = th.cat(dist_util.gather(th.cat(self._latents)))
            rng = np.random.default_rng(np.random.SeedSequence(self._seed + TRAINING, spawn_key=(RESEEDED, updates)))
            chosen = rng.choice(len(every), len(dead), replace=len(every) < len(dead))
            codes[dead] = every[to_device(th.from_numpy(chosen), every.device)].to(codes)
            for value in opt.state.get(codes, {}).values():
                if isinstance(value, th.Tensor) and value.shape == codes.shape:
                    value[dead] = 0
        if due:
            self._used = th.zeros_like(self._used)
        self.begin()
        return len(dead)

    def state_dict(self) -> dict[str, Any]:
        """The codes used since the last re-seeding."""
        return {"used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up."""
        self._used = state["used"].to(self._used)


def latent_moments(model: nn.Module, images: th.Tensor) -> th.Tensor:
    """[3], float64: how many numbers the latents of images have, their sum, and the sum of their expected squares."""
    if isinstance(model, AutoencoderKL):
        posterior = model.encode(images)
        mean, square = posterior.mean.double(), posterior.mean.double() ** 2 + posterior.std.double() ** 2
    else:
        assert isinstance(model, VQModel)
        mean = model.encode(images).double()
        square = mean**2
    return th.stack([th.tensor(mean.numel(), dtype=mean.dtype, device=mean.device), mean.sum(), square.sum()])
