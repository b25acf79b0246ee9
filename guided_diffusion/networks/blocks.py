"""The parts of the networks: residual blocks, self-attention, and the resampling between resolutions.

Shapes: N batch, C channels, [N, C, ...] feature maps with 1 to 3 axes of space, T = product of these axes, H heads of
D channels each, E embedding size.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from ..nn import avg_pool_nd, checkpoint, conv_nd, linear, make_neighborhood_mask, normalization, zero_module
from ..runtime.errors import UserError, refuse
from .attention import SpatialTransformer
from .ops import attention, over_tokens, skippable, through, untouched


def strides(dims: int, stride: int) -> tuple[int, ...]:
    """The same stride along each axis, except that the first axis of volumes keeps its length."""
    return (1, stride, stride) if dims == 3 else (stride,) * dims


class TimestepBlock(nn.Module):
    """A module whose output depends on the embedding of timestep and label."""

    @abstractmethod
    def forward(self, x: th.Tensor, emb: th.Tensor, context: th.Tensor | None = None) -> th.Tensor:
        """Transform x [N, C, ...] by emb [N, E]; context is for blocks that attend to a sequence."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence whose children receive what they can use of embedding and context."""

    def forward(  # type: ignore[override]
        self, x: th.Tensor, emb: th.Tensor, context: th.Tensor | None = None, mask: th.Tensor | None = None
    ) -> th.Tensor:
        extra = () if context is None else (context,)  # so that blocks written without a context go on working
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb, *extra)
            elif isinstance(layer, AttentionBlock | SpatialTransformer):
                x = layer(x, *extra) if mask is None else layer(x, context, mask)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Doubles the resolution by repeating positions; of volumes along the last two axes only.

    :param use_conv: follow with a convolution of kernel 3, to out_channels.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        if use_conv:
            self.conv: nn.Module = conv_nd(dims, channels, self.out_channels, 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        size = [side * stride for side, stride in zip(x.shape[2:], strides(self.dims, 2), strict=True)]
        x = F.interpolate(x, size, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halves the resolution; of volumes along the last two axes only.

    :param use_conv: by a strided convolution of kernel 3, to out_channels; else by averaging, which keeps the channels.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        widens = not use_conv and out_channels not in (None, channels)
        refuse((widens, f"out_channels {out_channels} needs use_conv=True: averaging keeps the {channels} channels."))
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        stride = strides(dims, 2)
        self.op: nn.Module = (
            conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=1)
            if use_conv
            else avg_pool_nd(dims, kernel_size=stride, stride=stride)
        )

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.op(x)
        return out


WIDE = 128  # channels from which channels_last helps convolutions on a CPU more than it costs normalizations


def cast_convolutions(module: nn.Module, dtype: th.dtype, *, channels_last: bool) -> None:
    """Cast the convolutions inside a module in place; the weights of 2-D ones may become channels_last."""
    layout = th.channels_last if channels_last else th.contiguous_format
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            layer.to(dtype)
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=layout)  # type: ignore[call-overload]
        if isinstance(layer, SpatialTransformer):
            layer.cast(dtype)


class ResBlock(TimestepBlock):
    """A residual block, which the embedding shifts, or scales and shifts.

    :param use_conv: change the channels of the residual by a convolution of kernel 3, not 1.
    :param use_scale_shift_norm: the embedding scales and shifts what the second normalization makes, not just shifts
        what it takes.
    :param up: double the resolution inside the block; `down` halves it.
    """

    level = 0  # of the network, 0 at the resolution of the images; a block that changes it belongs to the higher one

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.emb_channels, self.out_channels = channels, emb_channels, out_channels or channels
        self.dropout, self.use_conv, self.use_checkpoint = dropout, use_conv, use_checkpoint
        self.use_scale_shift_norm, self.updown = use_scale_shift_norm, up or down
        width = self.out_channels
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv_nd(dims, channels, width, 3, padding=1))
        self.h_upd: nn.Module
        self.x_upd: nn.Module
        self.h_upd = self.x_upd = nn.Identity()
        if self.updown:
            self.h_upd, self.x_upd = ((Upsample if up else Downsample)(channels, False, dims) for _ in range(2))
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, 2 * width if use_scale_shift_norm else width))
        last = zero_module(conv_nd(dims, width, width, 3, padding=1))
        self.out_layers = nn.Sequential(normalization(width), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection: nn.Module = nn.Identity()
        if width != channels:
            kernel = 3 if use_conv else 1
            self.skip_connection = conv_nd(dims, channels, width, kernel, padding=kernel // 2)

    def forward(self, x: th.Tensor, emb: th.Tensor, context: th.Tensor | None = None) -> th.Tensor:
        """Transform [N, C, ...]; the context is for other blocks."""
        out: th.Tensor = checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)
        return out

    def _forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        if self.updown:  # between the layers, which are then never called as a whole
            *first, conv = self.in_layers
            h, x = self.h_upd(through(first, x)), self.x_upd(x)
            h = conv(h)
        else:
            h = through(self.in_layers, x)
        h = self._condition(h, emb)
        out: th.Tensor = self.skip_connection(x) + h
        return out

    def _condition(self, h: th.Tensor, emb: th.Tensor) -> th.Tensor:
        film = self.emb_layers(emb).to(h.dtype)
        film = film.view(*film.shape, *[1] * (h.ndim - 2))
        if not self.use_scale_shift_norm:
            return through(self.out_layers, h + film)
        scale, shift = film.chunk(2, dim=1)
        return through([*self.out_layers], h, (1 + scale, shift))


def count_flops_attn(model: Any, _x: Any, y: Any) -> None:
    """Add the multiplications of an attention's two matrix products to model.total_ops (a hook for thop).

    :param y: the attention's output [N, C, ...], or a tuple that starts with it.
    """
    n, channels, *spatial = (y[0] if isinstance(y, tuple | list) else y).shape
    model.total_ops += 2 * n * channels * th.Size(spatial).numel() ** 2


def _joint_mask(
    mask: th.Tensor | None, encoder_mask: th.Tensor | None, q: th.Tensor, keys: th.Tensor
) -> th.Tensor | None:
    """Which queries attend to which keys, those of a context first; None where all attend to all."""
    if mask is None and encoder_mask is None:
        return None
    n, _, length, _ = q.shape
    own = q.new_ones(length, length, dtype=th.bool) if mask is None else mask
    others = q.new_ones(n, keys.shape[2], dtype=th.bool) if encoder_mask is None else encoder_mask
    return th.cat([others[:, None, None].expand(-1, 1, length, -1), own.expand(n, 1, -1, -1)], dim=3)


class _QKVAttention(nn.Module):
    """Scaled dot-product attention.

    :param spatial: shape of the feature map in training, the window for use_neighborhood_attention.
    :param use_neighborhood_attention: in larger feature maps each position attends to a window of that shape.
    """

    count_flops = staticmethod(count_flops_attn)

    def __init__(
        self, n_heads: int, spatial: Sequence[int] | None = None, use_neighborhood_attention: bool = False
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        unknown = use_neighborhood_attention and spatial is None
        refuse((unknown, "use_neighborhood_attention needs spatial, the shape of the feature map in training."))
        self.window = tuple(spatial or ()) if use_neighborhood_attention else None

    def get_neighborhood_mask(self, spatial: Sequence[int] | None, device: th.device | str) -> th.Tensor | None:
        """Which positions of a feature map attend to which, [T, T] bool; None where all attend to all."""
        if self.window is None or not any(side > seen for side, seen in zip(spatial or (), self.window, strict=True)):
            return None
        return make_neighborhood_mask(spatial or (), self.window, device)

    def forward(
        self,
        qkv: th.Tensor,
        spatial: Sequence[int] | None = None,
        encoder_kv: th.Tensor | None = None,
        encoder_mask: th.Tensor | None = None,
    ) -> th.Tensor:
        """Attend, [N, 3 * H * D, T] -> [N, H * D, T].

        :param spatial: shape of the feature map whose positions, row by row, are the T tokens.
        :param encoder_kv: keys and values of a context, [N, 2 * H * D, L], which are attended to as well.
        :param encoder_mask: bool [N, L], False for those of them that are attended to by none.
        """
        q, k, v = self._heads(qkv.transpose(1, 2).contiguous(), 3).unbind()
        mask = self.get_neighborhood_mask(spatial, qkv.device)
        if encoder_kv is not None:
            keys, values = self._heads(encoder_kv.transpose(1, 2).contiguous(), 2).unbind()
            k, v = th.cat([keys, k], dim=2), th.cat([values, v], dim=2)
            mask = _joint_mask(mask, encoder_mask, q, keys)
        out = attention(q, k, v, mask)
        return out.transpose(1, 2).flatten(2).transpose(1, 2)

    @abstractmethod
    def _heads(self, tokens: th.Tensor, parts: int) -> th.Tensor:
        """[N, T, parts * H * D] -> [parts, N, H, T, D], a view with D contiguous, as the fused kernels insist on."""


@skippable
class QKVAttention(_QKVAttention):
    """Attention whose input has the channels of q for all heads, then those of k, then those of v."""

    def _heads(self, tokens: th.Tensor, parts: int) -> th.Tensor:
        return tokens.view(*tokens.shape[:2], parts, self.n_heads, -1).permute(2, 0, 3, 1, 4)


@skippable
class QKVAttentionLegacy(_QKVAttention):
    """The same attention for the older order of channels: q, k, v of the first head, then of the next."""

    def _heads(self, tokens: th.Tensor, parts: int) -> th.Tensor:
        return tokens.view(*tokens.shape[:2], self.n_heads, parts, -1).permute(3, 0, 2, 1, 4)


def _attend(attention: nn.Module, qkv: th.Tensor, *more: Any) -> th.Tensor:
    """The output of an attention module; one that is not ours gets contiguous memory, as the originals' do."""
    out: th.Tensor = attention(qkv if untouched(attention) else qkv.contiguous(), *more)
    return out


def _share(channels: int, divisor: int, name: str) -> int:
    it = "it, or in the decoder num_heads_upsample" if name == "num_heads" else "it"
    remedy = f"change {it}, or the width of the network (num_channels, classifier_width) or where it attends."
    odd = divisor < 1 or channels % divisor
    refuse((odd, f"{name} must divide the {channels} channels that attend, got {divisor}; {remedy}"))
    return channels // divisor


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions of a feature map.

    :param num_head_channels: channels of a head; -1 shares the channels among num_heads instead.
    :param use_new_attention_order: the weights are laid out for QKVAttention, not for QKVAttentionLegacy.
    :param spatial: shape of the feature map in training, for use_neighborhood_attention.
    :param encoder_channels: E of a context [N, L, E] that is attended to as well (Nichol et al. 2021, GLIDE).
    """

    level = 0  # as for ResBlock

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
        spatial: Sequence[int] | None = None,
        use_neighborhood_attention: bool = False,
        *,
        encoder_channels: int | None = None,
    ) -> None:
        super().__init__()
        if num_head_channels == -1:
            num_head_channels = _share(channels, num_heads, "num_heads")
        self.channels, self.num_heads = channels, _share(channels, num_head_channels, "num_head_channels")
        self.use_checkpoint, self.use_neighborhood_attention = use_checkpoint, use_neighborhood_attention
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        attention = QKVAttention if use_new_attention_order else QKVAttentionLegacy
        self.attention = attention(self.num_heads, spatial, use_neighborhood_attention)
        self.encoder_kv: nn.Module | None = None
        if encoder_channels:
            self.encoder_kv = conv_nd(1, encoder_channels, 2 * channels, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: th.Tensor, context: th.Tensor | None = None, mask: th.Tensor | None = None) -> th.Tensor:
        """Attend within [N, C, ...] and, with `encoder_channels`, to a context [N, L, E] where its mask is True."""
        given = (context, mask) if context is not None and self.encoder_kv is not None else ()
        inputs = tuple(value for value in (x, *given) if value is not None)
        out: th.Tensor = checkpoint(self._forward, inputs, self.parameters(), self.use_checkpoint)
        return out

    def _forward(self, x: th.Tensor, context: th.Tensor | None = None, mask: th.Tensor | None = None) -> th.Tensor:
        h = self.norm(x).flatten(2) if untouched(self.norm) else self.norm(x.flatten(2))
        spatial = (x.shape[2:],) if self.use_neighborhood_attention or context is not None else ()
        encoder: tuple[th.Tensor | None, ...] = ()
        if context is not None and self.encoder_kv is not None:
            encoder = self.encoder_kv(context.transpose(1, 2).to(h.dtype)), mask
        h = over_tokens(self.proj_out, _attend(self.attention, over_tokens(self.qkv, h), *spatial, *encoder))
        return x + h.reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Pools a feature map [N, C, ...] to [N, output_dim]: its mean attends to all positions (Radford et al. 2021).

    :param spacial_dim: shape of the feature map; an int is a square of that side.
    :param num_heads_channels: channels of a head, a divisor of embed_dim.
    """

    def __init__(
        self, spacial_dim: int | Sequence[int], embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = _share(embed_dim, num_heads_channels, "num_head_channels")
        self.spatial = (spacial_dim,) * 2 if isinstance(spacial_dim, int) else tuple(spacial_dim)
        length = th.Size(self.spatial).numel() + 1
        self.positional_embedding = nn.Parameter(th.randn(embed_dim, length) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: th.Tensor) -> th.Tensor:
        if tuple(x.shape[2:]) != self.spatial:
            raise UserError(
                f"attention pooling was built for feature maps of {self.spatial}, got {tuple(x.shape[2:])}; "
                "use images of the network's image_size, or another pool."
            )
        tokens = x.flatten(2)
        tokens = th.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + self.positional_embedding.to(x.dtype)
        attended = _attend(self.attention, over_tokens(self.qkv_proj, tokens))
        return over_tokens(self.c_proj, attended)[:, :, 0]
