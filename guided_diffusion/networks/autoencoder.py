"""Autoencoders of images, whose latents diffusion models work on (Rombach et al. 2022; Esser et al. 2021).

Parameters have the names and the order of CompVis/latent-diffusion's, so that its checkpoints load.

Shapes: N batch, C channels of an image, [N, C, H, W] images in [-1, 1]; D channels (`embed_dim`) of a latent,
[N, D, H / f, W / f] latents, where f = 2 ** (levels - 1); K codes of a codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn

from ..nn import GROUPS, grouped_norms, groups_for

EPSILON, NORM_GROUPS = 1e-6, "norm_groups"
DISCRIMINATOR_GROUPS = 8
DTYPES = {"fp32": th.float32, "fp16": th.float16, "bf16": th.bfloat16}
LOGVAR_RANGE = (-30.0, 20.0)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups_for(channels), channels, eps=EPSILON)


class AutoencoderResBlock(nn.Module):
    """A residual block of two convolutions, [N, channels, H, W] -> [N, width, H, W]."""

    def __init__(self, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), nn.Conv2d(channels, width, 3, padding=1)
        self.norm2, self.dropout = _norm(width), nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width != channels:
            self.nin_shortcut = nn.Conv2d(channels, width, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        h: th.Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        shortcut: th.Tensor = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h


class AutoencoderAttention(nn.Module):
    """Residual self-attention of one head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: th.Tensor) -> th.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: th.Tensor = self.proj_out(attended.transpose(1, 2).reshape(x.shape))
        return x + out


class _Halve(nn.Module):
    """Halves the resolution by a convolution whose padding is below and to the right alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Double(nn.Module):
    """Doubles the resolution by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _Middle(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = AutoencoderResBlock(channels, channels, dropout)
        self.attn_1 = AutoencoderAttention(channels)
        self.block_2 = AutoencoderResBlock(channels, channels, dropout)

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it, and a change of resolution."""

    def __init__(
        self, widths: Sequence[int], dropout: float, *, attends: bool, resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(AutoencoderResBlock(channels, width, dropout) for channels, width in pairs)
        self.attn = nn.ModuleList(AutoencoderAttention(width) for _, width in pairs if attends)
        if resample is not None:
            self.add_module(*resample)

    def forward(self, x: th.Tensor) -> th.Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            x = self.attn[number](x) if len(self.attn) else x
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Encoder(nn.Module):
    """[N, C, H, W] -> [N, z_channels, H / f, W / f], or twice as many channels with `double_z`."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        dropout: float = 0.0,
        double_z: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (channels, width) in enumerate(zip([ch, *widths], widths, strict=False)):
            halve = ("downsample", _Halve(width)) if level + 1 < len(widths) else None
            attends = resolution // 2**level in attn_resolutions
            self.down.append(_Level([channels, *[width] * num_res_blocks], dropout, attends=attends, resample=halve))
        self.mid = _Middle(widths[-1], dropout)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels * (1 + double_z), 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: th.Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """[N, z_channels, H / f, W / f] -> [N, out_ch, H, W]."""

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        z_channels: int,
        dropout: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], dropout)
        self.up = nn.ModuleList()  # by level, the last one of which comes first
        for level, width in enumerate(widths):
            double = ("upsample", _Double(width)) if level else None
            attends = resolution // 2**level in attn_resolutions
            before = widths[min(level + 1, len(widths) - 1)]
            self.up.append(_Level([before, *[width] * (num_res_blocks + 1)], dropout, attends=attends, resample=double))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    @property
    def last_layer(self) -> th.Tensor:
        """The weight whose gradients balance the losses of reconstruction and discriminator."""
        return self.conv_out.weight

    def forward(self, z: th.Tensor) -> th.Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: th.Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class DiagonalGaussian:
    """The normal distribution of a latent, from its moments: D channels of means, then D of log-variances.

    :param parameters: [N, 2 D, h, w].
    """

    def __init__(self, parameters: th.Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> th.Tensor:
        """The standard deviation of each number."""
        return (0.5 * self.logvar).exp()

    def sample(self, generator: th.Generator | None = None) -> th.Tensor:
        """A latent [N, D, h, w]."""
        noise = th.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.std * noise

    def mode(self) -> th.Tensor:
        """The most probable latent, which is the mean."""
        return self.mean

    def kl(self) -> th.Tensor:
        """KL divergence from N(0, 1) in nats, summed over each latent, [N]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class Autoencoder(nn.Module):
    """What both kinds share.

    :param ddconfig: arguments of `Encoder` and `Decoder`, as latent-diffusion's configs spell them, and norm_groups.
    :param embed_dim: D, channels of a latent.
    """

    quant_conv: nn.Conv2d
    post_quant_conv: nn.Conv2d

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        self.ddconfig, self.embed_dim = dict(ddconfig), embed_dim
        with grouped_norms(groups := ddconfig.get(NORM_GROUPS, GROUPS)):
            self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        if groups != GROUPS:  # in the weights, which tell the architecture
            self.register_buffer(NORM_GROUPS, th.tensor(float(groups)))
        self.precision = "fp32"

    def convert_to(self, precision: str) -> None:
        """Compute in fp32, fp16 or bf16 from now on; the weights stay fp32."""
        self.precision = precision

    def _computing(self, x: th.Tensor) -> th.autocast:
        return th.autocast(x.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    @property
    def factor(self) -> int:
        """f, by which a side of an image is longer than that of its latent."""
        return int(2 ** (len(self.ddconfig["ch_mult"]) - 1))

    def _encoded(self, x: th.Tensor) -> th.Tensor:
        if any(side % self.factor for side in x.shape[2:]):
            raise ValueError(
                f"images must be a multiple of {self.factor} on each side for this autoencoder, got "
                f"{'x'.join(map(str, x.shape[2:]))}"
            )
        with self._computing(x):
            out: th.Tensor = self.quant_conv(self.encoder(x))
        return out.float()

    def decode(self, z: th.Tensor) -> th.Tensor:
        """Images of latents."""
        with self._computing(z):
            out: th.Tensor = self.decoder(self.post_quant_conv(z))
        return out.float()


class AutoencoderKL(Autoencoder):
    """An autoencoder whose latents are drawn from normal distributions, held near N(0, 1) by their KL divergence."""

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__(ddconfig, embed_dim)
        z_channels = ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, x: th.Tensor) -> DiagonalGaussian:
        """The distribution of the latents of images."""
        return DiagonalGaussian(self._encoded(x))


def straight_through(latents: th.Tensor, codes: th.Tensor) -> th.Tensor:
    """The codes, whose gradients pass to the latents unchanged."""
    return latents + (codes - latents).detach()


class Codebook(nn.Module):
    """K vectors, the nearest of which takes the place of each vector of a latent.

    :param n_codes: K.
    """

    def __init__(self, n_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_codes, 1 / n_codes)

    def ids(self, h: th.Tensor) -> th.Tensor:
        """The nearest code of each position, row by row, of all images: [N, D, h, w] -> [N * h * w]."""
        vectors, codes = h.movedim(1, -1).flatten(0, -2), self.embedding.weight
        return (codes.pow(2).sum(1) - 2 * vectors @ codes.T).argmin(1)  # |v - c|^2 but for |v|^2

    def codes(self, h: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """The codes nearest to latents [N, D, h, w], in their place, and their ids."""
        ids = self.ids(h)
        return self.embedding(ids).view(h.movedim(1, -1).shape).movedim(-1, 1), ids

    def forward(self, h: th.Tensor) -> th.Tensor:
        """The codes nearest to latents [N, D, h, w]; gradients pass to h as if nothing had been replaced."""
        return straight_through(h, self.codes(h)[0])


class VQModel(Autoencoder):
    """An autoencoder whose latents are made of the vectors of a codebook.

    :param n_embed: K, codes of the codebook.
    """

    def __init__(self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int) -> None:
        super().__init__(ddconfig, embed_dim)
        z_channels = ddconfig["z_channels"]
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels * (1 + bool(ddconfig.get("double_z", False))), embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, x: th.Tensor) -> th.Tensor:
        """Latents [N, D, h, w] of images, before the codebook."""
        return self._encoded(x)

    def decode(self, h: th.Tensor, force_not_quantize: bool = False) -> th.Tensor:
        """Images of latents, which go through the codebook first unless `force_not_quantize`."""
        return super().decode(h if force_not_quantize else self.quantize(h))


VQModelInterface = VQModel  # latent-diffusion's name for a VQModel whose encode() stops before the codebook


class PatchDiscriminator(nn.Module):
    """Scores of patches of images, high for real ones, [N, C, H, W] -> [N, 1, h, w] (Isola et al. 2017).

    It normalises over groups of channels of one image, so that a score does not depend on the rest of the batch.

    :param layers: halvings of the resolution.
    """

    def __init__(self, in_channels: int, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (width, wider) in enumerate(pairwise(widths), 1):
            stride = 2 if level < layers else 1
            body += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(DISCRIMINATOR_GROUPS, wider),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.main(x)
        return out
