"""Layers and functions that the networks share, and the moving average of their weights.

Shapes: N batch, C channels, T tokens (positions of a feature map in row-major order), ... any further axes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint as recompute

from .runtime.errors import UserError, refuse

GROUPS = 32
_groups: ContextVar[int] = ContextVar("groups", default=GROUPS)
_CONVOLUTIONS: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_Module = TypeVar("_Module", bound=nn.Module)
_Layer = TypeVar("_Layer")


class SiLU(nn.Module):
    """x * sigmoid(x), elementwise."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalization whose statistics are computed in float32 at least; the output has the input's dtype."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        # The CPU's kernel sums bfloat16 in float32 by itself, three times as fast as the way round by a float32 copy;
        # other devices want weights of the input's dtype.
        if x.dtype == th.bfloat16 and x.device.type == "cpu" and not transformed():
            return super().forward(x)
        return super().forward(x.to(th.promote_types(x.dtype, th.float32))).to(x.dtype)


@contextmanager
def grouped_norms(groups: int) -> Iterator[None]:
    """Inside, `normalization` and the other norms of our networks are made with so many groups."""
    token = _groups.set(groups)
    try:
        yield
    finally:
        _groups.reset(token)


def groups_for(channels: int) -> int:
    """The groups of a group normalization that is made now: 32, or those of `grouped_norms`.

    :raises UserError: if they cannot share so many channels.
    """
    groups = _groups.get()
    if channels > 0 and channels % groups == 0:
        return groups
    fewer = next(fewer for fewer in (16, 8, 4, 2, 1) if channels % fewer == 0)
    fault = f"channels must be a positive multiple of {groups} for group normalization, got {channels}"
    raise UserError(f"{fault}; change num_channels or channel_mult, or take norm_groups {fewer}.")


def normalization(channels: int) -> GroupNorm32:
    """Group normalization in 32 groups, or in those of `grouped_norms`.

    :param channels: a positive multiple of the groups, else UserError.
    """
    return GroupNorm32(groups_for(channels), channels)


def _for_dims(table: dict[int, _Layer], dims: int) -> _Layer:
    refuse((dims not in table, f"dims must be one of 1, 2, 3, the axes of space, got {dims!r}."))
    return table[dims]


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> _ConvNd:
    """A convolution over 1, 2 or 3 axes of space; the rest goes to the torch module."""
    return _for_dims(_CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """An average pooling over 1, 2 or 3 axes of space; the rest goes to the torch module."""
    return _for_dims(_AVERAGE_POOLS, dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A fully connected layer; everything goes to the torch module."""
    return nn.Linear(*args, **kwargs)


def dtype_of(module: nn.Module) -> th.dtype:
    """The dtype of a module's first weights in floating point; float32 where it has none."""
    for part in module.modules():
        copies: dict[str, th.Tensor] = getattr(part, "_former_parameters", {})  # those of a replica (DataParallel)
        for weights in (*part.parameters(recurse=False), *copies.values()):
            if weights.is_floating_point():
                return weights.dtype
    return th.float32


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741
    """Turn a convolution's weight and bias into fp16; every other module stays as it is."""
    if isinstance(l, tuple(_CONVOLUTIONS.values())):
        l.half()


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Turn a convolution's weight and bias back into fp32."""
    if isinstance(l, tuple(_CONVOLUTIONS.values())):
        l.float()


@th.no_grad()
def update_ema(target_params: Iterable[th.Tensor], source_params: Iterable[th.Tensor], rate: float = 0.99) -> None:
    """Move a running average in place: target = rate * target + (1 - rate) * source.

    :param target_params: the averages; the sources may be of another dtype.
    """
    pairs = list(zip(target_params, source_params, strict=True))
    if pairs:
        sources = [source.to(target.dtype) for target, source in pairs]
        th._foreach_lerp_([target for target, _ in pairs], sources, 1 - rate)


@th.no_grad()
def scale_module(module: _Module, scale: float) -> _Module:
    """Multiply every parameter in place, and return the module itself."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def zero_module(module: _Module) -> _Module:
    """Set every parameter to zero in place, and return the module itself: a branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def mean_flat(tensor: th.Tensor) -> th.Tensor:
    """Mean over all axes but the first: [N, ...] -> [N]."""
    return tensor.mean(dim=tuple(range(1, tensor.ndim))) if tensor.ndim > 1 else tensor


def timestep_embedding(timesteps: th.Tensor, dim: int, max_period: float = 10000) -> th.Tensor:
    """Cosines, then sines, of the timesteps at geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    :param timesteps: [N], may be fractional.
    :param dim: size of the embedding; an odd one ends in a zero.
    :param max_period: the frequencies run from 1 down to nearly 1 / max_period radians per step.
    :return: [N, dim] float32.
    """
    half = dim // 2
    steps = th.arange(half, dtype=th.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * th.exp(steps * -math.log(max_period) / half)
    return F.pad(th.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def make_neighborhood_mask(
    spatial: Sequence[int], spatial_orig: Sequence[int], device: th.device | str = "cpu"
) -> th.Tensor:
    """The attention mask by which each position of a feature map sees a window as large as the map in training.

    The window is centred on the position, half a position early for even sizes, and moved inwards at the borders.

    :param spatial: shape of the feature map, T positions.
    :param spatial_orig: shape of the window; an axis that is shorter than the window is seen whole.
    :return: [T, T] bool, True where the position of the row sees that of the column.
    """
    mask = th.ones(1, 1, dtype=th.bool, device=device)
    for side, window in zip(spatial, spatial_orig, strict=True):
        positions = th.arange(side, device=device)
        first = (positions - window // 2).clamp(0, max(0, side - window))[:, None]
        mask = th.kron(mask, (positions >= first) & (positions < first + window))
    return mask


def transformed() -> bool:
    """Whether torch.func, forward-mode derivatives or torch.jit.trace are at work, which some kernels do not know."""
    if th.compiler.is_compiling():
        return False
    return bool(th._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or th.jit.is_tracing())


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Any], flag: bool) -> Any:
    """Call func(*inputs); with flag, its activations are computed again in the backward pass and not kept.

    (Under `transformed` they are kept.)

    :param params: accepted for compatibility: what func closes over needs no listing, frozen or not.
    """
    if flag and th.is_grad_enabled() and not transformed():
        return recompute(func, *inputs, use_reentrant=False)
    return func(*inputs)


class CheckpointFunction(th.autograd.Function):
    """`checkpoint` for callers of the originals' autograd function."""

    @staticmethod
    def apply(run_function: Callable[..., Any], length: int, *args: Any) -> Any:
        """Checkpoint run_function(*args[:length]); the remaining args are its parameters."""
        return checkpoint(run_function, args[:length], args[length:], True)


class Traits(NamedTuple):
    """What a network says of its conditioning.

    known: whether it says anything: a plain function may or may not take labels.
    num_classes: K, None without classes.
    null_label: the label that means "no class"; None where there is none.
    null_cond: whether zeros mean "no conditioning image".
    null_vector: whether a vector of nan means "no vector".
    """

    known: bool
    num_classes: int | None
    null_label: int | None
    null_cond: bool
    null_vector: bool


def traits_of(model: Any) -> Traits:
    """The traits of a network, ours or anybody's callable."""
    return Traits(
        known=hasattr(model, "num_classes"),
        num_classes=getattr(model, "num_classes", None),
        null_label=getattr(model, "null_label", None),
        null_cond=bool(getattr(model, "null_cond", False)),
        null_vector=bool(getattr(model, "null_vector", False)),
    )
