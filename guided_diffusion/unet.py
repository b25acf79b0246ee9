"""The networks: a U-Net of residual and attention blocks (Dhariwal and Nichol 2021), an upsampler and a classifier.

Shapes: N batch, C channels, [N, C, ...] feature maps with 1 to 3 axes of space, T = product of these axes, H heads,
E embedding size, K classes. `rate` is how many pixels one position of a feature map stands for, along an axis.

The order in which modules are built is the order of the parameters, which checkpoints rely on.
"""

import math as math
import sys
from abc import abstractmethod as abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np  # noqa: F401
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .config import POOLS
from .networks import backbone, blocks
from .networks.backbone import UNetBackbone as UNetBackbone, UNetModel as UNetModel
from .networks.blocks import (
    AttentionBlock as AttentionBlock,
    AttentionPool2d,
    Downsample as Downsample,
    QKVAttention as QKVAttention,
    QKVAttentionLegacy as QKVAttentionLegacy,
    ResBlock as ResBlock,
    TimestepBlock as TimestepBlock,
    TimestepEmbedSequential as TimestepEmbedSequential,
    Upsample as Upsample,
    count_flops_attn as count_flops_attn,
)
from .nn import (
    GROUPS,
    avg_pool_nd as avg_pool_nd,
    checkpoint as checkpoint,
    conv_nd,
    convert_module_to_f16 as convert_module_to_f16,
    convert_module_to_f32 as convert_module_to_f32,
    dtype_of,
    grouped_norms,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from .runtime.errors import UserError, check_choice


class _Door(ModuleType):
    """This module: a name that is replaced in it, such as QKVAttention or checkpoint, is replaced in `networks` too."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        for module in (backbone, blocks):
            if name in vars(module) and not name.startswith("__"):
                setattr(module, name, value)


sys.modules[__name__].__class__ = _Door


class SuperResModel(UNetModel):
    """A U-Net that also sees a smaller version of its image, enlarged to the same size.

    :param in_channels: of one of the two images.
    :param cond_aug: there is noise on the small images, whose level the network gets (Ho et al. 2022, sec. 4).
    """

    def __init__(
        self, image_size: int | Sequence[int], in_channels: int, *args: Any, cond_aug: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(image_size, in_channels * 2, *args, **kwargs)
        self.cond_aug = cond_aug
        if cond_aug:  # the last parameters; at 0 the network is the one without them
            first, size = self.model_channels, 4 * self.model_channels
            self.low_res_embed = nn.Sequential(linear(first, size), nn.SiLU(), zero_module(linear(size, size)))

    def forward(  # type: ignore[override]
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        low_res: th.Tensor | None = None,
        *,
        low_res_level: th.Tensor | None = None,
        **kwargs: Any,
    ) -> th.Tensor:
        """Predict from noisy images and their small versions.

        :param low_res: [N, C, ...] of any resolution.
        :param low_res_level: [N] of the noise on them, 0 to 1; None: there is none.
        """
        if low_res is None:
            raise UserError("low_res is missing: give the small images, [N, C, ...].")
        mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
        if low_res_level is not None and not self.cond_aug:
            raise UserError("low_res_level was given to an upsampler without cond_aug; leave it out.")
        both = th.cat([x, F.interpolate(low_res, x.shape[2:], mode=mode)], dim=1)
        if not self.cond_aug:
            return super().forward(both, timesteps, **kwargs)
        level = x.new_zeros(len(x)) if low_res_level is None else low_res_level
        waves = timestep_embedding(1000 * level, self.model_channels)
        y = kwargs.pop("y", None)
        emb = self._embed(x, timesteps, y, kwargs.pop("vector", None)) + self.low_res_embed(
            waves.to(dtype_of(self.low_res_embed))
        )
        return self._predict(both, emb, *self._attended(y, **kwargs))


class EncoderUNetModel(UNetBackbone):
    """The encoder half with a head, e.g. a classifier of noisy images.

    :param pool: the head: "adaptive" averages the last feature map; "attention" attends over it, so the images must be
        of image_size; "spatial" and "spatial_v2" feed the averages of all feature maps to a two-layer network.
    """

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
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
        use_neighborhood_attention: bool = False,
        *,
        norm_groups: int = GROUPS,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "pool", "__class__")}
        super().__init__(**options)
        self.pool = pool
        with grouped_norms(norm_groups):
            self.out = self._head()

    def _head(self) -> nn.Sequential:
        width = self._widths[-1]
        if self.pool == "adaptive":
            mean = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[self.dims](1)
            last = zero_module(conv_nd(self.dims, width, self.out_channels, 1))
            return nn.Sequential(normalization(width), nn.SiLU(), mean, last, nn.Flatten())
        if self.pool == "attention":
            shape = self._shape(len(self._widths) - 1)
            pool = AttentionPool2d(shape, width, self.num_head_channels, self.out_channels)
            return nn.Sequential(normalization(width), nn.SiLU(), pool)
        check_choice("pool", self.pool, POOLS)
        hidden = linear(self._feature_size, 2048)
        between = [nn.ReLU()] if self.pool == "spatial" else [normalization(2048), nn.SiLU()]
        return nn.Sequential(hidden, *between, linear(2048, self.out_channels))

    def forward(self, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """Features of noisy images, [N, in_channels, ...] -> [N, out_channels], e.g. unnormalized log probabilities."""
        means = []
        for h in self._encode(x, self._embed(x, timesteps, None)):
            if self.pool.startswith("spatial"):
                means.append(h.flatten(2).to(x.dtype).mean(2))
        out: th.Tensor = self.out(th.cat(means, dim=1) if means else h.to(x.dtype))
        return out
