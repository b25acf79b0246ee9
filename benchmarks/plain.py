"""The plain path: networks, guidance, training steps and pictures computed operation for operation as the originals do.

Contiguous tensors, attention by two matrix products with a float32 softmax between them, SiLU as a product with a
sigmoid, every intermediate result in memory of its own; AdamW as torch has it, moving averages parameter by parameter,
norms and losses fetched one by one. The weights are those of our own networks, so that results can be compared.

Shapes: N images, C channels, H W space, T = H * W tokens, E embedding.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from guided_diffusion.fp16_util import (
    convert_module_to_f16,
    get_param_groups_and_shapes,
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
)
from guided_diffusion.networks.blocks import AttentionBlock, Downsample, QKVAttentionLegacy, ResBlock, Upsample
from guided_diffusion.resample import UniformSampler
from guided_diffusion.unet import EncoderUNetModel, UNetModel


def silu(x: th.Tensor) -> th.Tensor:
    """In two operations."""
    return x * th.sigmoid(x)


def group_norm(norm: Any, x: th.Tensor) -> th.Tensor:
    """In float32, whatever x is."""
    return F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).type(x.dtype)


def conv(layer: Any, x: th.Tensor) -> th.Tensor:
    """Over [N, C, T] or [N, C, H, W]."""
    convolve: Callable[..., th.Tensor] = {3: F.conv1d, 4: F.conv2d}[x.ndim]
    return convolve(x, layer.weight, layer.bias, layer.stride, layer.padding)


def perceptron(layers: Any, x: th.Tensor) -> th.Tensor:
    """Two linear layers, SiLU between them."""
    first, _, second = layers
    return F.linear(silu(F.linear(x, first.weight, first.bias)), second.weight, second.bias)


def waves(timesteps: th.Tensor, size: int) -> th.Tensor:
    """Cosines and sines of the timesteps, [N] -> [N, size], made anew for every call."""
    frequencies = th.exp(-math.log(10000) * th.arange(size // 2, dtype=th.float32) / (size // 2))
    angles = timesteps[:, None].float() * frequencies.to(timesteps.device)[None]
    return th.cat([th.cos(angles), th.sin(angles)], dim=-1)


def resample(layer: Any, x: th.Tensor) -> th.Tensor:
    """Half or twice the resolution."""
    if isinstance(layer, Upsample):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return conv(layer.conv, x) if layer.use_conv else x
    return conv(layer.op, x) if hasattr(layer.op, "weight") else F.avg_pool2d(x, 2, 2)


def residual(block: ResBlock, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
    """A residual block."""
    h = silu(group_norm(block.in_layers[0], x))
    if block.updown:
        h, x = resample(block.h_upd, h), resample(block.x_upd, x)
    h = conv(block.in_layers[2], h)
    affine = block.emb_layers[1]
    film = F.linear(silu(emb), affine.weight, affine.bias).type(h.dtype)[..., None, None]
    norm, _, dropout, last = block.out_layers
    if block.use_scale_shift_norm:
        scale, shift = th.chunk(film, 2, dim=1)
        h = group_norm(norm, h) * (1 + scale) + shift
    else:
        h = group_norm(norm, h + film)
    h = conv(last, F.dropout(silu(h), dropout.p, block.training))
    skip = block.skip_connection
    return (conv(skip, x) if hasattr(skip, "weight") else x) + h


def attend(qkv: th.Tensor, heads: int, *, legacy: bool) -> th.Tensor:
    """Attention with its whole matrix of weights in memory, [N, 3 * C, T] -> [N, C, T]."""
    n, width, length = qkv.shape
    size = width // (3 * heads)
    shape = (n, heads, 3, size, length) if legacy else (n, 3, heads, size, length)
    q, k, v = (part.reshape(n * heads, size, length) for part in qkv.view(shape).unbind(2 if legacy else 1))
    scale = size**-0.25  # on both, so that their product overflows less in fp16
    weights = th.einsum("bct,bcs->bts", q * scale, k * scale)
    weights = th.softmax(weights.float(), dim=-1).type(weights.dtype)
    return th.einsum("bts,bcs->bct", weights, v).reshape(n, -1, length)


def self_attention(block: AttentionBlock, x: th.Tensor) -> th.Tensor:
    """A residual block of attention."""
    tokens = x.reshape(*x.shape[:2], -1)
    qkv = conv(block.qkv, group_norm(block.norm, tokens))
    h = attend(qkv, block.num_heads, legacy=isinstance(block.attention, QKVAttentionLegacy))
    return (tokens + conv(block.proj_out, h)).reshape(x.shape)


def attention_pool(pool: Any, x: th.Tensor) -> th.Tensor:
    """What the mean of a feature map has attended to; all other tokens attend too, for nothing."""
    tokens = x.reshape(*x.shape[:2], -1)
    tokens = th.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)
    tokens = tokens + pool.positional_embedding[None].to(x.dtype)
    tokens = attend(conv(pool.qkv_proj, tokens), pool.num_heads, legacy=False)
    return conv(pool.c_proj, tokens)[:, :, 0]


class Plain(th.nn.Module):
    """A copy of a U-Net or of a classifier with attention pooling, computed the plain way.

    :param network: in float32.
    :param precision: fp32; or fp16, in which the convolutions of the blocks then are, as in the originals.
    :param recompute_attention: in the backward pass, as openai's networks do, and their fork does not.
    """

    def __init__(self, network: Any, precision: str = "fp32", *, recompute_attention: bool = False) -> None:
        super().__init__()
        if type(network) not in (UNetModel, EncoderUNetModel):
            raise TypeError(f"{type(network).__name__} has no plain form: give a UNetModel or an EncoderUNetModel")
        self.network = copy.deepcopy(network)
        self.recompute_attention = recompute_attention
        self.num_classes, self.null_label = network.num_classes, network.null_label
        blocks = [child for name, child in self.network.named_children() if name.endswith(("_blocks", "_block"))]
        if precision == "fp16":
            for block in blocks:
                block.apply(convert_module_to_f16)

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """As our own networks."""
        net = self.network
        emb = perceptron(net.time_embed, waves(timesteps, net.model_channels))
        if y is not None:
            emb = emb + net.label_emb(y)
        h, skips = x.type(next(net.input_blocks.parameters()).dtype), []
        for block in net.input_blocks:
            h = self._sequence(block, h, emb)
            skips.append(h)
        h = self._sequence(net.middle_block, h, emb)
        if isinstance(net, EncoderUNetModel):
            return attention_pool(net.out[2], silu(group_norm(net.out[0], h.type(x.dtype))))
        for block in net.output_blocks:
            h = self._sequence(block, th.cat([h, skips.pop()], dim=1), emb)
        return conv(net.out[2], silu(group_norm(net.out[0], h.type(x.dtype))))

    def _sequence(self, layers: Any, h: th.Tensor, emb: th.Tensor) -> th.Tensor:
        for layer in layers:
            if isinstance(layer, ResBlock):
                h = residual(layer, h, emb)
            elif isinstance(layer, AttentionBlock):
                h = self._attention(layer, h)
            else:
                h = resample(layer, h) if isinstance(layer, Upsample | Downsample) else conv(layer, h)
        return h

    def _attention(self, block: AttentionBlock, h: th.Tensor) -> th.Tensor:
        if self.recompute_attention and th.is_grad_enabled():
            return checkpoint(self_attention, block, h, use_reentrant=False)
        return self_attention(block, h)


def guidance(classifier: th.nn.Module, scale: float) -> Callable[..., th.Tensor]:
    """scale * grad log p(y | x_t) as a cond_fn, through log-probabilities of all classes."""

    def cond_fn(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor, **_: Any) -> th.Tensor:
        with th.enable_grad():
            start = x.detach().requires_grad_(True)
            log_probabilities = F.log_softmax(classifier(start, timesteps), dim=-1)
            chosen = log_probabilities[range(len(y)), y.view(-1)]
            return th.autograd.grad(chosen.sum(), start)[0] * scale

    return cond_fn


class PlainTraining:
    """Training steps of a plain network with torch's AdamW as it comes, and one moving average.

    In fp16 the masters are two flat vectors, and the loss is scaled.
    """

    log_scale = 10.0

    def __init__(self, model: th.nn.Module, diffusion: Any, *, lr: float = 1e-4, ema_rate: float = 0.9999) -> None:
        self.model, self.diffusion, self.ema_rate = model, diffusion, ema_rate
        self.parameters = list(model.parameters())
        self.half = any(param.dtype == th.float16 for param in self.parameters)
        self.groups = get_param_groups_and_shapes(model.named_parameters())
        self.masters = make_master_params(self.groups) if self.half else self.parameters
        self.averages = [param.detach().clone() for param in self.masters]
        self.sampler = UniformSampler(diffusion)
        self.optimizer = th.optim.AdamW(self.masters, lr=lr, weight_decay=0.0)
        self.logged: dict[str, float] = {}

    def __call__(self, images: th.Tensor, cond: Mapping[str, th.Tensor]) -> None:
        """One step."""
        for param in self.parameters:
            if param.grad is not None:
                param.grad.detach_().zero_()
        t, weights = self.sampler.sample(len(images), images.device)
        losses = self.diffusion.training_losses(self.model, images, t, model_kwargs=dict(cond))
        loss = (losses["loss"] * weights).mean()
        self._log({name: values * weights for name, values in losses.items()}, t)
        (loss * 2**self.log_scale if self.half else loss).backward()
        self._optimize()
        self._average()

    def _log(self, losses: Mapping[str, th.Tensor], t: th.Tensor) -> None:
        """Means, and those of each quarter of the timesteps: every one of them waits for the device."""
        for name, values in losses.items():
            self.logged[name] = values.mean().item()
            for step, value in zip(t.cpu().numpy(), values.detach().cpu().numpy(), strict=True):
                self.logged[f"{name}_q{4 * step // self.diffusion.num_timesteps}"] = float(value)

    def _optimize(self) -> None:
        if self.half:
            model_grads_to_master_grads(self.groups, self.masters)
        self.logged["grad_norm"] = self._norm(param.grad for param in self.masters)
        self.logged["param_norm"] = self._norm(param.detach() for param in self.masters)
        if self.half:
            for param in self.masters:
                assert param.grad is not None
                param.grad.mul_(2**-self.log_scale)
        self.optimizer.step()
        if self.half:
            for param in self.masters:
                param.grad = None
            master_params_to_model_params(self.groups, self.masters)

    @staticmethod
    def _norm(tensors: Iterable[th.Tensor | None]) -> float:
        squares = (th.norm(x, p=2, dtype=th.float32).item() ** 2 for x in tensors if x is not None)
        return math.sqrt(sum(squares))

    def _average(self) -> None:
        for average, param in zip(self.averages, self.masters, strict=True):
            average.mul_(self.ema_rate).add_(param.detach(), alpha=1 - self.ema_rate)


class PlainImages(Dataset[tuple[np.ndarray, dict[str, np.ndarray]]]):
    """Image files with their labels: decoded whole, halved by boxes, scaled, cropped, mirrored, and made floats."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], size: int) -> None:
        self.paths, self.labels, self.size = list(paths), list(labels), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        pixels = picture(self.paths[index], self.size)
        pixels = pixels[:, ::-1] if random.random() < 0.5 else pixels
        planes = np.transpose(pixels.astype(np.float32) / 127.5 - 1, (2, 0, 1))
        return planes, {"y": np.array(self.labels[index], dtype=np.int64)}


def picture(path: str, size: int) -> np.ndarray:
    """The middle of an image file, uint8 [size, size, 3]."""
    with open(path, "rb") as file:
        image = Image.open(file)
        image.load()
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(sides, resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def plain_batches(
    images: PlainImages, batch_size: int
) -> Generator[tuple[th.Tensor, dict[str, th.Tensor]], None, None]:
    """Batches without end, floats made by one worker."""
    loader = DataLoader(images, batch_size=batch_size, shuffle=True, num_workers=1, drop_last=True)
    while True:
        yield from loader
