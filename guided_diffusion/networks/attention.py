"""Cross-attention of feature maps to a context: the spatial transformer of latent diffusion (Rombach et al. 2022).

Parameters have the names and the order of CompVis/latent-diffusion's, so that its checkpoints load.

Shapes: N batch, C channels, [N, C, H, W] feature maps, T = H * W positions, L vectors of context, [N, L, E] context of
E channels (`context_dim`).
"""

from __future__ import annotations

import torch as th
import torch.nn.functional as F
from torch import nn

from ..nn import GroupNorm32, checkpoint, groups_for, zero_module


class LayerNorm32(nn.LayerNorm):
    """Layer normalization in float32; the output has the input's dtype."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class CrossAttention(nn.Module):
    """Attention of [N, T, C] to a context [N, L, E], or to itself where there is none.

    :param context_dim: E; None for attention to itself alone.
    """

    def __init__(self, dim: int, context_dim: int | None, heads: int, head_channels: int) -> None:
        super().__init__()
        self.heads, self.context_dim = heads, context_dim
        inner = heads * head_channels
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim or dim, inner, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.0))

    def forward(self, x: th.Tensor, context: th.Tensor | None = None, mask: th.Tensor | None = None) -> th.Tensor:
        """Attend.

        :param mask: bool [N, L], False for vectors of the context that are attended to by none.
        """
        source = x if context is None else context
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        attended = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        out: th.Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class GEGLU(nn.Module):
    """A layer whose output is gated by the GELU of a second one (Shazeer 2020)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * width)

    def forward(self, x: th.Tensor) -> th.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: th.Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    """A gated layer of four times the width and one back, applied to each token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Attention to itself, to the context, and a feed-forward network, each residual and normalised before."""

    def __init__(self, dim: int, context_dim: int | None, heads: int, head_channels: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, head_channels)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, head_channels)
        self.norm1, self.norm2, self.norm3 = (LayerNorm32(dim) for _ in range(3))

    def forward(self, x: th.Tensor, context: th.Tensor | None = None, mask: th.Tensor | None = None) -> th.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask)
        out: th.Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, residual.

    :param depth: blocks.
    """

    level = 0  # of the network, 0 at the resolution of the images

    def __init__(
        self,
        channels: int,
        heads: int,
        head_channels: int,
        depth: int = 1,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        inner, self.use_checkpoint = heads * head_channels, use_checkpoint
        self.norm = GroupNorm32(groups_for(channels), channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, context_dim, heads, head_channels) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner, channels, 1))

    def forward(self, x: th.Tensor, context: th.Tensor | None = None, mask: th.Tensor | None = None) -> th.Tensor:
        """Attend within [N, C, H, W] and to the context [N, L, E]."""
        inputs = tuple(value for value in (x, context, mask) if value is not None)
        out: th.Tensor = checkpoint(self._forward, inputs, self.parameters(), self.use_checkpoint)
        return out

    def cast(self, dtype: th.dtype) -> None:
        """Cast the layers that multiply, and leave the normalizations in float32."""
        for layer in self.transformer_blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.to(dtype)

    def _forward(self, x: th.Tensor, context: th.Tensor | None = None, mask: th.Tensor | None = None) -> th.Tensor:
        context = None if context is None else context.to(x.dtype)
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        out: th.Tensor = self.proj_out(tokens.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))
        return x + out
