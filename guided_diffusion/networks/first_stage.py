"""The frozen autoencoder in whose space a diffusion model works (Rombach et al. 2022).

Shapes: N batch, [N, C, H, W] images in [-1, 1]; [N, D, H / f, W / f] latents of about deviation 1; moments are what an
autoencoder says of the latents of an image, [N, 2 D, H / f, W / f], or [N, D, H / f, W / f] where there is a codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch as th
import torch.nn.functional as F

from .autoencoder import AutoencoderKL, DiagonalGaussian, VQModel
from .tiling import blended

PIXELS = 2**20  # that are encoded or decoded at once, 256 images of 64x64 or 4 of 512x512, which bounds the memory
OVERLAP = 0.25  # share of a tile that the next one covers too


def _in_parts(function: Callable[[th.Tensor], th.Tensor], x: th.Tensor, pixels: int) -> th.Tensor:
    """function(x), on parts of the batch.

    :param pixels: of an image.
    """
    return th.cat([function(part) for part in x.split(max(1, PIXELS // pixels))])


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder, frozen and in evaluation mode.

    :param scale_factor: what its latents are multiplied by in diffusion.
    :param fingerprint: of its weights.
    :param path: of the file that it comes from.
    :param tile: decode in overlapping tiles of so many numbers a side, which are blended; 0: as a whole.
    """

    network: AutoencoderKL | VQModel
    scale_factor: float
    fingerprint: str = ""
    path: str = ""
    tile: int = 0

    @property
    def factor(self) -> int:
        """f, the pixels of a side for each number of a latent's."""
        return self.network.factor

    @property
    def channels(self) -> int:
        """D."""
        return self.network.embed_dim

    @property
    def image_channels(self) -> int:
        """C."""
        return int(self.network.ddconfig["in_channels"])

    @property
    def draws(self) -> bool:
        """Whether latents are drawn at random, which those of a codebook are not."""
        return isinstance(self.network, AutoencoderKL)

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(D, H / f, W / f) for an image of shape (C, H, W)."""
        return (self.channels, *(side // self.factor for side in shape[1:]))

    def moments_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of the moments of an image of shape (C, H, W)."""
        channels, *sides = self.latent_shape(shape)
        return (channels * (1 + self.draws), *sides)

    def moments(self, images: th.Tensor) -> th.Tensor:
        """Moments of images."""
        return _in_parts(self._moments, images, images[0, 0].numel())

    def _moments(self, images: th.Tensor) -> th.Tensor:
        encoded = self.network.encode(images)
        return encoded.parameters if isinstance(encoded, DiagonalGaussian) else encoded

    def latents(self, moments: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """The latents that moments and noise [N, D, h, w] make; None takes the most probable ones."""
        if not self.draws:
            return self.scale_factor * moments
        posterior = DiagonalGaussian(moments)
        return self.scale_factor * (posterior.mean if noise is None else posterior.mean + posterior.std * noise)

    def encode(self, images: th.Tensor) -> th.Tensor:
        """The most probable latents of images."""
        return self.latents(self.moments(images))

    def _decoded(self, latents: th.Tensor) -> th.Tensor:
        sides, tile = latents.shape[2:], [min(self.tile or side, side) for side in latents.shape[2:]]

        def one(place: Sequence[slice]) -> th.Tensor:
            part = latents[..., place[0], place[1]]
            return _in_parts(self.network.decode, part, part[0, 0].numel() * self.factor**2)

        return one([slice(None)] * 2) if tile == list(sides) else blended(one, sides, tile, OVERLAP, self.factor)

    def decode(self, latents: th.Tensor) -> th.Tensor:
        """Images of latents, with the graph where latents have one; NaN where latents are not finite."""
        images = self._decoded(latents / self.scale_factor)
        # the code of a codebook that is nearest to NaN would be as good as any
        broken = ~latents.isfinite().flatten(1).all(1)
        return images.masked_fill(broken.view(-1, 1, 1, 1), th.nan)

    def kept(self, mask: th.Tensor) -> th.Tensor:
        """The mask [N, 1, h, w] of latents for a mask [N, 1, H, W] of pixels: the least of the pixels of a number."""
        return -F.max_pool2d(-mask, self.factor)
