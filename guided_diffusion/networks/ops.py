"""Fused operations: convolutions over tokens, and normalization and attention in bfloat16 on a CPU.

torch's own are slow there, or keep too much for the gradient. Modules with hooks, or with another forward than their
class had at first, are called as they are; so are all where torch.func, forward-mode derivatives, tracing or a compiler
is at work.

Shapes: N batch, C channels, G groups, [N, C, ...] feature maps; H heads of D channels each, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import _has_any_global_hook

from ..nn import GroupNorm32, transformed

_FUSED = [GroupNorm32, nn.SiLU]
CHUNK = 2**20  # attention weights that are held at a time: what a core's cache takes

Kind = TypeVar("Kind", bound=type[nn.Module])
Pair = tuple[th.Tensor, th.Tensor]
Film = Pair | None
Gradients = tuple[th.Tensor | None, ...]


_CALL = nn.Module.__call__
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}


def skippable(kind: Kind) -> Kind:
    """Let `untouched` know a class of modules by its present forward; returns the class."""
    _FORWARDS[kind] = kind.forward
    return kind


for _kind in (GroupNorm32, nn.Conv1d, nn.SiLU, nn.Sequential):
    skippable(_kind)


def untouched(*modules: nn.Module) -> bool:
    """Whether calling these modules does nothing but the forwards of `skippable` classes.

    Hooks, and forwards replaced in an instance, a class or a subclass, make it False.
    """
    return not _has_any_global_hook() and nn.Module.__call__ is _CALL and all(_is_plain(m) for m in modules)


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return _FORWARDS.get(kind) is kind.forward and "forward" not in module.__dict__ and not any(hooks)


def takes(x: th.Tensor) -> bool:
    """Whether the fused operations in bfloat16 are for x."""
    if x.dtype != th.bfloat16 or x.device.type != "cpu":
        return False
    return not (th.compiler.is_compiling() or transformed())


def _with_graph(function: Callable[..., th.Tensor], inputs: Sequence[Any], grad: th.Tensor) -> Gradients:
    """Gradients of function(*inputs) that can be differentiated again; None for what needs none."""
    inputs = [value.view_as(value) if isinstance(value, th.Tensor) else value for value in inputs]
    needed = [isinstance(value, th.Tensor) and value.requires_grad for value in inputs]
    leaves = [value for value, needs in zip(inputs, needed, strict=True) if needs]
    gradients = iter(th.autograd.grad(function(*inputs), leaves, grad, create_graph=True))
    return tuple(next(gradients) if needs else None for needs in needed)


def over_tokens(conv: nn.Module, x: th.Tensor) -> th.Tensor:
    """The output of a Conv1d for tokens [N, C, T].

    Of a kernel of 1 it is a view of [N, T, C] memory: attention reads its heads from it without a copy, and a
    channels-last input is never rearranged.
    """
    if isinstance(conv, nn.Conv1d) and untouched(conv) and _is_pointwise(conv):
        return F.linear(x.transpose(1, 2).contiguous(), conv.weight.squeeze(2), conv.bias).transpose(1, 2)
    out: th.Tensor = conv(x)
    return out


def _is_pointwise(conv: nn.Conv1d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1,), (1,), (0,), 1)


def through(layers: Any, x: th.Tensor, film: Film = None) -> th.Tensor:
    """The output of a normalization, film, and the layers after them, for [N, C, ...].

    Where `takes(x)` and a SiLU comes next, one feature map is kept for the gradient, instead of three.

    :param layers: a module, which is called as a whole unless it is an untouched nn.Sequential, or a list of modules.
    :param film: (scale, shift), both [N, C, 1, ...] in the dtype of x: h -> h * scale + shift.
    """
    if isinstance(layers, nn.Module) and not untouched(layers):
        whole: th.Tensor = layers(x)
        return whole
    norm, *rest = layers
    if takes(x) and [type(layer) for layer in (norm, *rest[:1])] == _FUSED and untouched(norm, rest[0]):
        shape = *(film or (None, None)), norm.num_groups, norm.eps
        h: th.Tensor = _NormSiLU.apply(x, norm.weight, norm.bias, *shape)  # type: ignore[no-untyped-call]
        rest = rest[1:]
    else:
        h = norm(x)
        h = h if film is None else th.addcmul(film[1], h, film[0])
    for layer in rest:
        h = layer(h)
    return h


def _norm_silu(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, *rest: Any) -> th.Tensor:
    scale, shift, groups, eps = rest
    h = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(h if scale is None else th.addcmul(shift, h, scale))


def _dense(x: th.Tensor) -> th.Tensor:
    """x in one of the layouts that the kernels take; they look at the first stride of a single image too."""
    layout = {4: th.channels_last, 5: th.channels_last_3d}.get(x.ndim)
    if x.is_contiguous() or layout is None or not x.is_contiguous(memory_format=layout):
        return x.contiguous()
    return x.as_strided(x.shape, (x[0].numel(), *x.stride()[1:]))


class _NormSiLU(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor, *rest: Any) -> th.Tensor:
        scale, shift, ctx.groups, ctx.eps = rest
        x = _dense(x)
        h, mean, rstd = _modulated(x, (weight, bias), (scale, shift), ctx)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        return F.silu(h, inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: th.Tensor) -> Gradients:
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        if th.is_grad_enabled():  # create_graph
            return _with_graph(_norm_silu, (x, weight, bias, scale, shift, ctx.groups, ctx.eps), grad)
        g = th.ops.aten.silu_backward(grad, _modulated(x, (weight, bias), (scale, shift), ctx)[0])
        factor = 1 if scale is None else scale.flatten(1).float()
        gain = (weight * factor).expand(x.shape[:2])
        of_x, of_gain, of_offset = (_by_kernel if x.is_contiguous() else _by_sums)(g, x, gain, mean, rstd)
        film: tuple[th.Tensor | None, ...] = None, None
        if scale is not None:
            of_scale = of_gain * weight + of_offset * bias
            film = of_scale.to(x.dtype).view_as(scale), of_offset.to(x.dtype).view_as(scale)
        return of_x, (of_gain * factor).sum(0), (of_offset * factor).sum(0), *film, None, None


def _modulated(x: th.Tensor, affine: Pair, film: tuple[th.Tensor | None, ...], ctx: Any) -> tuple[th.Tensor, ...]:
    """(x normalized, scaled and shifted, means [N, G], reciprocal deviations [N, G]); the sums are float32."""
    (n, channels), (weight, bias), (scale, shift) = x.shape[:2], affine, film
    size = x[0, 0].numel()
    if scale is None or shift is None:
        return th.native_group_norm(x, weight, bias, n, channels, size, ctx.groups, ctx.eps)
    if not x.is_contiguous():
        h, mean, rstd = th.native_group_norm(x, weight, bias, n, channels, size, ctx.groups, ctx.eps)
        return th.addcmul(shift, h, scale), mean, rstd
    # As one image of N * C channels, each with weights of its own: in one pass.
    factor, offset = scale.flatten(1).float(), shift.flatten(1).float()
    gains = (weight * factor).flatten(), th.addcmul(offset, bias, factor).flatten()
    h, mean, rstd = th.native_group_norm(
        x.view(1, -1, *x.shape[2:]), *gains, 1, n * channels, size, n * ctx.groups, ctx.eps
    )
    return h.view_as(x), mean.view(n, -1), rstd.view(n, -1)


def _by_kernel(g: th.Tensor, x: th.Tensor, gain: th.Tensor, mean: th.Tensor, rstd: th.Tensor) -> tuple[th.Tensor, ...]:
    """Gradients of x, gain and offset [N, C] from that of x normalized * gain + offset, for contiguous x."""
    rows, flat = gain.numel(), (g.contiguous().view(1, -1, *g.shape[2:]), x.view(1, -1, *x.shape[2:]))
    of_x, of_gain, of_offset = th.ops.aten.native_group_norm_backward(
        *flat, mean.view(1, -1), rstd.view(1, -1), gain.reshape(-1), 1, rows, x[0, 0].numel(), mean.numel(), [True] * 3
    )
    return of_x.view_as(x), of_gain.view_as(gain), of_offset.view_as(gain)


def _by_sums(g: th.Tensor, x: th.Tensor, gain: th.Tensor, mean: th.Tensor, rstd: th.Tensor) -> tuple[th.Tensor, ...]:
    """The same for channels innermost, from two sums over space: the kernel takes no vectors if groups are small."""
    space, each = tuple(range(2, x.ndim)), x.shape[1] // mean.shape[1]
    mean, rstd = (values.repeat_interleave(each, 1) for values in (mean, rstd))
    middle = _over_space(mean, x)
    centred, rest = x - middle, mean - middle.flatten(1)  # means may be far larger than what they are the means of
    sums = g.sum(space, dtype=th.float32)
    products = ((g * centred).sum(space, dtype=th.float32) - sums * rest) * rstd
    level, slope = (
        (gain * value).unflatten(1, (-1, each)).mean(2).repeat_interleave(each, 1) / x[0, 0].numel()
        for value in (sums, products)
    )
    slope = slope * rstd.square()
    rows = (slope * rest - level * rstd, -slope, gain * rstd)
    offset, of_x, of_g = (_over_space(row, x) for row in rows)
    return th.addcmul(th.addcmul(offset, centred, of_x), g, of_g), products, sums


def _over_space(row: th.Tensor, x: th.Tensor) -> th.Tensor:
    """[N, C] as [N, C, 1, ...] in the dtype of x."""
    return row.to(x.dtype).view(*row.shape, *[1] * (x.ndim - 2))


def attention(q: th.Tensor, k: th.Tensor, v: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """Scaled dot-product attention, [N, H, T, D] each, with a mask [T, T], True where a row sees a column.

    Gradients of gradients (create_graph) need torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around the call, as no
    fused kernel has them; under `transformed` it is taken here.
    """
    if transformed():
        return _by_products(q, k, v, mask)
    if mask is None and takes(q) and th.is_grad_enabled() and th.backends.cuda.flash_sdp_enabled():
        out: th.Tensor = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _by_products(q: th.Tensor, k: th.Tensor, v: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _Attention(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: th.Tensor, k: th.Tensor, v: th.Tensor) -> th.Tensor:
        out, logsumexp = th.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        result: th.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: th.Tensor) -> Gradients:
        """Dao et al. 2022, appendix B.4.

        What is subtracted from a product is subtracted within its float32 sum: as two further columns, high and low
        part, that meet ones. A scaled q is in two parts likewise.
        """
        if th.is_grad_enabled():  # create_graph
            return _with_graph(_by_products, ctx.saved_tensors[:3], grad)
        q, k, v, out, logsumexp = (value.flatten(0, 1) for value in ctx.saved_tensors)
        shape, scale, grad = grad.shape, grad.shape[-1] ** -0.5, grad.flatten(0, 1)
        inner = (grad.float() * out.float()).sum(-1, keepdim=True)
        ones = k.new_ones(*k.shape[:2], 2)
        logits = th.cat([*_parts(q.float() * scale), *_parts(-logsumexp[..., None])], -1), th.cat([k, k, ones], -1)
        slopes = th.cat([grad, *_parts(-inner)], -1), th.cat([v, ones], -1)
        of_q, of_k, of_v = (th.empty_like(k) for _ in range(3))
        step = max(1, CHUNK // k.shape[1] ** 2)
        for part in (slice(start, start + step) for start in range(0, len(k), step)):
            weights = th.bmm(logits[0][part], logits[1][part].transpose(1, 2)).exp_()
            th.bmm(weights.transpose(1, 2), grad[part], out=of_v[part])
            of_logits = th.bmm(slopes[0][part], slopes[1][part].transpose(1, 2)).mul_(weights)
            th.bmm(of_logits, k[part], out=of_q[part])
            th.bmm(of_logits.transpose(1, 2), q[part], out=of_k[part])
        return of_q.mul_(scale).view(shape), of_k.mul_(scale).view(shape), of_v.view(shape)


def _parts(values: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """float32 as the sum of two bfloat16."""
    high = values.bfloat16()
    return high, (values - high).bfloat16()
