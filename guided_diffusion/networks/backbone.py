"""The U-Net of residual and attention blocks (Dhariwal and Nichol 2021), and the base of every network like it.

Shapes: N batch, C channels, [N, C, ...] feature maps with 1 to 3 axes of space, E embedding size, K classes. `rate` is
how many pixels one position of a feature map stands for, along an axis.

The order in which modules are built is the order of the parameters, which checkpoints rely on.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch as th
import torch.nn as nn

from ..nn import GROUPS, conv_nd, dtype_of, grouped_norms, linear, normalization, timestep_embedding, zero_module
from ..runtime.errors import UserError, check_choice, refuse
from .attention import SpatialTransformer
from .blocks import (
    WIDE,
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    cast_convolutions,
    strides,
)
from .context import ClassEmbedder, check_context, context_for, pooled

_DTYPES = {"fp32": th.float32, "fp16": th.float16, "bf16": th.bfloat16}  # by config.PRECISIONS
_CONVERTED = ("input_blocks", "middle_block", "output_blocks")


class UNetBackbone(nn.Module):
    """The base of every network: the embedding of timestep and label, the encoder and the middle block.

    :param image_size: side, or shape, of the images; only windowed attention and attention pooling depend on it.
    :param model_channels: channels of the first level before channel_mult.
    :param attention_resolutions: the *rates* with attention blocks: 4 is where 4 pixels became 1.
    :param channel_mult: factor of model_channels per level, may be fractional; each level halves the resolution.
    :param conv_resample: resample by learned convolutions, where resblock_updown does not do it.
    :param num_classes: K for networks that take labels.
    :param use_fp16: kept for callers of the originals; weights stay float32 until `convert_to`.
    :param num_head_channels: fixed size of a head, which then overrides the numbers of heads.
    :param num_heads_upsample: heads in the decoder; -1 is num_heads.
    :param use_neighborhood_attention: in images larger than image_size, attend to windows of that size.
    :param null_class: label K means "no class", for classifier-free guidance (Ho and Salimans 2022).
    :param use_spatial_transformer: attention is that of latent diffusion: `transformer_depth` transformer blocks, which
        also attend to a context [N, L, context_dim] where there is one. `legacy` is latent-diffusion's, without effect.
    :param class_context: labels become a context of one vector, and are not added to the embedding of the timesteps.
    :param context_pooled: the mean of the context's vectors is added to the embedding of the timesteps too (GLIDE).
    :param vector_dim: D of vectors [N, D] that a linear layer adds to the embedding, such as attributes; 0: none.
    :param encoder_channels: E of a context [N, L, E] that the attention of the U-Net attends to as well, as in GLIDE.
    :param norm_groups: of group normalization; fewer than channels let a network of few channels tell colours apart.
    """

    null_class = False
    _dtype: th.dtype | None = None

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_neighborhood_attention: bool = False,
        *,
        null_class: bool = False,
        vector_dim: int = 0,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        legacy: bool = True,
        encoder_channels: int | None = None,
        class_context: bool = False,
        context_pooled: bool = False,
        norm_groups: int = GROUPS,
    ) -> None:
        attends, unlabelled = context_dim is not None, num_classes is None and not vector_dim
        transformer = "use_spatial_transformer=True, which attends to the context"
        classes = "a network with classes: give num_classes (by flags: class_cond True)."
        refuse(
            (context_pooled and not attends, "context_pooled needs context_dim"),
            (attends and not use_spatial_transformer, f"context_dim needs {transformer}"),
            (class_context and (num_classes is None or not attends), "class_context needs num_classes and context_dim"),
            (null_class and unlabelled, f"null_class needs {classes}"),
        )
        super().__init__()
        self.image_size, self.dims, self.dropout = image_size, dims, dropout
        self.in_channels, self.model_channels, self.out_channels = in_channels, model_channels, out_channels
        self.num_res_blocks, self.channel_mult = num_res_blocks, channel_mult
        self.attention_resolutions, self.num_head_channels = attention_resolutions, num_head_channels
        self.conv_resample, self.resblock_updown = conv_resample, resblock_updown
        self.num_classes, self.null_class, self.vector_dim = num_classes, null_class, vector_dim
        self.use_checkpoint, self.use_fp16 = use_checkpoint, use_fp16
        self.num_heads, self.num_heads_upsample = num_heads, num_heads_upsample
        if num_heads_upsample == -1:
            self.num_heads_upsample = num_heads
        self.use_scale_shift_norm, self.use_new_attention_order = use_scale_shift_norm, use_new_attention_order
        self.use_neighborhood_attention = use_neighborhood_attention
        self.use_spatial_transformer, self.transformer_depth = use_spatial_transformer, transformer_depth
        self.context_dim, self.encoder_channels, self.legacy = context_dim, encoder_channels, legacy
        self.class_context, self.context_pooled = class_context, context_pooled
        self.context_encoder: nn.Module | None = None  # or a ScratchEncoder, put here when the network is made
        with grouped_norms(norm_groups):
            self._build()

    def _build(self) -> None:
        """Make the modules, in the order of the parameters."""
        size, width, last = 4 * self.model_channels, self._widths[-1], len(self._widths) - 1
        self.time_embed = nn.Sequential(linear(self.model_channels, size), nn.SiLU(), linear(size, size))
        if self.num_classes is not None and self.context_dim is not None and self.class_context:
            self.context_encoder = ClassEmbedder(self.context_dim, self.num_classes + self.null_class)
        elif self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes + self.null_class, size)
        if self.vector_dim:
            self.vector_emb = linear(2 * self.vector_dim, size)  # of the numbers, and of which of them are unknown
        if self.context_pooled and self.context_dim:
            self.context_emb = zero_module(linear(self.context_dim, size))
        self.input_blocks = nn.ModuleList(TimestepEmbedSequential(*layers) for layers in self._encoder())
        self.middle_block = TimestepEmbedSequential(
            self._residual(width, width, last),
            self._attention(width, last, self.num_heads),
            self._residual(width, width, last),
        )
        self._feature_size = sum(self._block_widths) + width  # channels of all outputs together

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", which is K; None for networks that know no such label."""
        return self.num_classes if self.null_class else None

    @property
    def null_vector(self) -> bool:
        """Whether the network was trained on vectors of unknown numbers alone."""
        return self.null_class and bool(self.vector_dim)

    @property
    def _widths(self) -> list[int]:
        """Channels of each level."""
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    @property
    def _block_widths(self) -> list[int]:
        """Channels of each input block's output."""
        repeats = [self.num_res_blocks + 1] * (len(self._widths) - 1) + [self.num_res_blocks]
        return self._widths[:1] + [width for width, n in zip(self._widths, repeats, strict=True) for _ in range(n)]

    def _encoder(self) -> Iterator[list[nn.Module]]:
        """The layers of one input block after another."""
        channels = self._widths[0]
        yield [conv_nd(self.dims, self.in_channels, channels, 3, padding=1)]
        for level, width in enumerate(self._widths):
            if level > 0:
                yield [self._resample(channels, level - 1, up=False)]
            for _ in range(self.num_res_blocks):
                yield self._cell(channels, width, level, self.num_heads)
                channels = width

    def _cell(self, channels: int, width: int, level: int, heads: int) -> list[nn.Module]:
        """A residual block, and attention where this level has it."""
        cell: list[nn.Module] = [self._residual(channels, width, level)]
        if 2**level in self.attention_resolutions:
            cell.append(self._attention(width, level, heads))
        return cell

    def _residual(self, channels: int, width: int, level: int, **resampling: bool) -> ResBlock:
        options: dict[str, Any] = {"dims": self.dims, "use_checkpoint": self.use_checkpoint, **resampling}
        options["use_scale_shift_norm"] = self.use_scale_shift_norm
        block = ResBlock(channels, 4 * self.model_channels, self.dropout, out_channels=width, **options)
        block.level = level
        return block

    def _attention(self, channels: int, level: int, heads: int) -> AttentionBlock | SpatialTransformer:
        block: AttentionBlock | SpatialTransformer
        if self.use_spatial_transformer:
            size = channels // heads if self.num_head_channels == -1 else self.num_head_channels
            shape = channels // size, size
            block = SpatialTransformer(channels, *shape, self.transformer_depth, self.context_dim, self.use_checkpoint)
            block.level = level
            return block
        windowed = self.use_neighborhood_attention
        further: dict[str, Any] = {"encoder_channels": self.encoder_channels} if self.encoder_channels else {}
        if windowed:
            further |= {"use_neighborhood_attention": True, "spatial": self._shape(level)}
        options = self.num_head_channels, self.use_checkpoint, self.use_new_attention_order
        block = AttentionBlock(channels, heads, *options, **further)
        block.level = level
        return block

    def _shape(self, level: int) -> tuple[int, ...]:
        """Shape of a level's feature map for images of image_size."""
        sides = (self.image_size,) * self.dims if isinstance(self.image_size, int) else tuple(self.image_size)
        fault = f"image_size must be an int or have {self.dims} sides (dims), got {self.image_size!r}."
        refuse((len(sides) != self.dims, fault))
        keeps_odd = self.conv_resample and not self.resblock_updown  # a strided convolution rounds up, averaging down
        rates = strides(self.dims, 2**level)
        return tuple((side + keeps_odd * (rate - 1)) // rate for side, rate in zip(sides, rates, strict=True))

    def _resample(self, channels: int, level: int, *, up: bool) -> nn.Module:
        """The layer that doubles or halves the resolution; level is that of the higher one."""
        if self.resblock_updown:
            return self._residual(channels, channels, level, up=up, down=not up)
        return (Upsample if up else Downsample)(channels, self.conv_resample, self.dims)

    @property
    def dtype(self) -> th.dtype:
        """The dtype that blocks compute in: as assigned after the last `convert_to`, else that of their weights."""
        return self._dtype or dtype_of(self.input_blocks)

    @dtype.setter
    def dtype(self, value: th.dtype) -> None:
        self._dtype = value

    def convert_to(self, precision: str, device: th.device | None = None) -> None:
        """Cast the convolutions of the blocks, and nothing else: embeddings, normalizations and the head stay float32.

        In two dimensions the weights of 16 bits lie with their channels innermost, and so do feature maps then, as the
        units for matrix products take them; on a CPU only in wide networks, as normalization is slower so.

        :param precision: fp32, fp16 or bf16.
        :param device: that the network will be on, where it is on the meta device, without values.
        """
        check_choice("precision", precision, _DTYPES)
        self._dtype = None
        on_cpu = (device or next(self.parameters()).device).type in ("cpu", "meta")
        innermost = precision != "fp32" and (min(self._widths) >= WIDE or not on_cpu)
        for name, child in self.named_children():
            if name in _CONVERTED:
                cast_convolutions(child, _DTYPES[precision], channels_last=innermost)

    def convert_to_fp16(self) -> None:
        self.convert_to("fp16")

    def convert_to_fp32(self) -> None:
        self.convert_to("fp32")

    def _embed(
        self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None, vector: th.Tensor | None = None
    ) -> th.Tensor:
        """The embedding [N, E] of timesteps and, for networks with classes or vectors, of those of the images x."""
        if y is None and self.num_classes is not None:
            raise UserError(f"y is missing: the network has {self.num_classes} classes, give one label per image.")
        if y is not None and self.num_classes is None:
            raise UserError("y was given to a network without classes (num_classes is None); leave it out.")
        if y is not None and y.shape != x.shape[:1]:
            raise UserError(f"y must have one label per image, shape {tuple(x.shape[:1])}, got {tuple(y.shape)}.")
        waves = timestep_embedding(timesteps, self.model_channels)
        emb: th.Tensor = self.time_embed(waves.to(dtype_of(self.time_embed)))
        emb = emb if y is None or self.class_context else emb + self.label_emb(y)
        shape = (len(x), self.vector_dim)
        if (None if vector is None else tuple(vector.shape)) != (shape if self.vector_dim else None):
            given = "none" if vector is None else tuple(vector.shape)
            raise UserError(f"vector must be of shape {shape if self.vector_dim else 'none'}, got {given}")
        if vector is None:
            return emb
        unknown = vector.isnan()
        added: th.Tensor = self.vector_emb(th.cat([vector.masked_fill(unknown, 0.0), unknown], dim=1).to(emb.dtype))
        return emb + added

    def _encode(self, x: th.Tensor, emb: th.Tensor, *context: th.Tensor | None) -> Iterator[th.Tensor]:
        """The output of one input block after another, then of the middle block."""
        h = x.to(self.dtype)
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb, *context)
            yield h


class UNetModel(UNetBackbone):
    """The U-Net: the backbone, and a decoder that sees every output of the encoder."""

    def _build(self) -> None:
        super()._build()
        first = self._widths[0]
        self.output_blocks = nn.ModuleList(TimestepEmbedSequential(*layers) for layers in self._decoder())
        last = zero_module(conv_nd(self.dims, first, self.out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(first), nn.SiLU(), last)
        self._feature_size += (self.num_res_blocks + 1) * sum(self._widths)

    def _decoder(self) -> Iterator[list[nn.Module]]:
        """The layers of one output block after another."""
        skips, channels = self._block_widths, self._widths[-1]
        for level, width in reversed(list(enumerate(self._widths))):
            for remaining in reversed(range(self.num_res_blocks + 1)):
                layers = self._cell(channels + skips.pop(), width, level, self.num_heads_upsample)
                channels = width
                if level > 0 and remaining == 0:
                    layers.append(self._resample(channels, level - 1, up=True))
                yield layers

    def _check_size(self, x: th.Tensor) -> None:
        step = 2 ** (len(self.channel_mult) - 1)
        sides = x.shape[2:][-2:]  # the first axis of volumes is not resampled
        if any(side % step for side in sides):
            nearest = "x".join(str(max(1, round(side / step)) * step) for side in sides)
            raise UserError(
                f"images must be a multiple of {step} on each side for {len(self.channel_mult)} levels (channel_mult), "
                f"got {'x'.join(map(str, sides))}; the nearest is {nearest}."
            )

    def forward(
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        y: th.Tensor | None = None,
        *,
        vector: th.Tensor | None = None,
        context: th.Tensor | None = None,
        context_mask: th.Tensor | None = None,
        tokens: th.Tensor | None = None,
    ) -> th.Tensor:
        """Predict from noisy images, [N, in_channels, ...] -> [N, out_channels, ...].

        :param timesteps: [N], in the units of training, may be fractional.
        :param y: [N] int64 labels, if and only if num_classes was given.
        :param vector: [N, vector_dim] numbers, nan for those that are unknown, if and only if vector_dim was given.
        :param context: [N, L, D] vectors to attend to, if and only if context_dim or encoder_channels, which is D, was
            given.
        :param context_mask: bool [N, L], False for vectors that are attended to by none.
        :param tokens: [N, L] int64, in place of a context, for networks whose `context_encoder` makes one of them.
        """
        emb = self._embed(x, timesteps, y, vector)  # which checks them
        return self._predict(x, emb, *self._attended(y, context=context, context_mask=context_mask, tokens=tokens))

    def _attended(
        self,
        y: th.Tensor | None,
        *,
        context: th.Tensor | None = None,
        context_mask: th.Tensor | None = None,
        tokens: th.Tensor | None = None,
    ) -> tuple[th.Tensor | None, ...]:
        """The context and its mask, () for a network without."""
        width = self.context_dim or self.encoder_channels
        context = context_for(width, self.context_encoder, context, tokens=tokens, mask=context_mask, y=y)
        return () if context is None else (context, context_mask)

    def _predict(self, x: th.Tensor, emb: th.Tensor, *context: th.Tensor | None) -> th.Tensor:
        """The output for images and the embedding [N, E] of all else but the context and its mask."""
        self._check_size(x)
        if context and context[0] is not None:
            check_context(len(x), context[0], *context[1:])
        if self.context_pooled and context[0] is not None:
            emb = emb + self.context_emb(pooled(context[0], *context[1:]).to(emb.dtype))
        skips = list(self._encode(x, emb, *context))
        h = skips.pop()
        for block in self.output_blocks:
            h = block(th.cat([h, skips.pop()], dim=1), emb, *context)
        out: th.Tensor = self.out(h.to(x.dtype))
        return out.contiguous() if x.is_contiguous() else out  # noise drawn like x follows its layout
