"""The Inception network of the published evaluator ("inception-2015-12-05"), in torch.

It is not the Inception of other collections: images are resized as TensorFlow 1 did, average pools leave the padding
out, the last block pools by maximum, and there are 1008 classes. The names of its state dict are torch-fidelity's, so
that ``weights-inception-2015-12-05-6726825d.pth`` loads as it is.

Shapes: N images, C channels, H W pixels. Images have 3 channels and values in [0, 255].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch as th
import torch.nn.functional as F

SIDE = 299  # pixels of what the network looks at
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of Mixed_6d, whose first channels are those of its 1x1 branch
EPS = 1e-3  # of batch normalisation


class Outputs(NamedTuple):
    """What the metrics are made of, all float32."""

    pool: th.Tensor  # [N, 2048]
    spatial: th.Tensor  # [N, 2023]: 17 x 17 places, 7 channels each
    logits_unbiased: th.Tensor  # [N, 1008]; the inception score is made of these
    logits: th.Tensor  # [N, 1008]


# ---- the table of the network


class Layer(NamedTuple):
    """A convolution with batch normalisation and ReLU; unpadded, it shrinks the image."""

    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padded: bool = True


Pool = Callable[[th.Tensor], th.Tensor]
Step = Pool | Layer | tuple[Layer, Layer]  # two layers: both of the same input, side by side
Branches = Mapping[str, Sequence[Step]]


def _average(x: th.Tensor) -> th.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: th.Tensor) -> th.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: th.Tensor) -> th.Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _block_a(pooled: int) -> Branches:
    return {
        "branch1x1": [Layer(64)],
        "branch5x5": [Layer(48), Layer(64, 5, 5)],
        "branch3x3dbl": [Layer(64), Layer(96, 3, 3), Layer(96, 3, 3)],
        "branch_pool": [_average, Layer(pooled)],
    }


def _block_c(inner: int) -> Branches:
    tall, wide = Layer(inner, 7, 1), Layer(inner, 1, 7)
    return {
        "branch1x1": [Layer(192)],
        "branch7x7": [Layer(inner), wide, Layer(192, 7, 1)],
        "branch7x7dbl": [Layer(inner), tall, wide, tall, Layer(192, 1, 7)],
        "branch_pool": [_average, Layer(192)],
    }


def _block_e(pool: Pool) -> Branches:
    fork = Layer(384, 1, 3), Layer(384, 3, 1)
    return {
        "branch1x1": [Layer(320)],
        "branch3x3": [Layer(384), fork],
        "branch3x3dbl": [Layer(448), Layer(384, 3, 3), fork],
        "branch_pool": [pool, Layer(192)],
    }


STEM: Mapping[str, Layer] = {
    "Conv2d_1a_3x3": Layer(32, 3, 3, stride=2, padded=False),
    "Conv2d_2a_3x3": Layer(32, 3, 3, padded=False),
    "Conv2d_2b_3x3": Layer(64, 3, 3),
    "Conv2d_3b_1x1": Layer(80),
    "Conv2d_4a_3x3": Layer(192, 3, 3, padded=False),
}
HALVED_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
BLOCKS: Mapping[str, Branches] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": {  # block B
        "branch3x3": [Layer(384, 3, 3, stride=2, padded=False)],
        "branch3x3dbl": [Layer(64), Layer(96, 3, 3), Layer(96, 3, 3, stride=2, padded=False)],
        "branch_pool": [_halve],
    },
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": {  # block D
        "branch3x3": [Layer(192), Layer(320, 3, 3, stride=2, padded=False)],
        "branch7x7x3": [Layer(192), Layer(192, 1, 7), Layer(192, 7, 1), Layer(192, 3, 3, stride=2, padded=False)],
        "branch_pool": [_halve],
    },
    "Mixed_7b": _block_e(_average),
    "Mixed_7c": _block_e(_maximum),  # as the published graph does, unlike the paper
}


def named_steps(branch: str, steps: Sequence[Step]) -> Iterator[tuple[Step, tuple[str, ...]]]:
    """Every step of a branch with the names of its layers: none of a pool, two of a fork."""
    alone = sum(not callable(step) for step in steps) == 1
    number = 0
    for step in steps:
        if callable(step):
            yield step, ()
            continue
        number += 1
        name = branch if alone else f"{branch}_{number}"
        yield step, (name,) if isinstance(step, Layer) else (f"{name}a", f"{name}b")


# ---- modules


class BasicConv2d(th.nn.Module):
    """One layer of the table. It always normalises by the running statistics, whatever mode it is in."""

    def __init__(self, channels: int, layer: Layer) -> None:
        super().__init__()
        kernel = layer.height, layer.width
        padding = (layer.height // 2, layer.width // 2) if layer.padded else 0
        self.conv = th.nn.Conv2d(channels, layer.channels, kernel, layer.stride, padding, bias=False)
        self.bn = th.nn.BatchNorm2d(layer.channels, eps=EPS)

    def forward(self, x: th.Tensor) -> th.Tensor:
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert isinstance(mean, th.Tensor)
        assert isinstance(variance, th.Tensor)
        scale = self.bn.weight * th.rsqrt(variance + EPS)
        weight = self.conv.weight * scale[:, None, None, None]  # in the weights' precision, then in that of x
        bias = self.bn.bias - mean * scale
        x = F.conv2d(x, weight.to(x), bias.to(x), self.conv.stride, self.conv.padding)
        return F.relu_(x)


class Mixed(th.nn.Module):
    """A block: branches over the same input, one after the other along the channels of the output."""

    def __init__(self, channels: int, branches: Branches) -> None:
        super().__init__()
        self.channels = 0  # of the output
        self.branches = [list(named_steps(branch, steps)) for branch, steps in branches.items()]
        for branch in self.branches:
            width = channels
            for step, names in branch:
                layers = [] if callable(step) else [step] if isinstance(step, Layer) else step
                for name, layer in zip(names, layers, strict=True):
                    self.add_module(name, BasicConv2d(width, layer))
                width = sum(layer.channels for layer in layers) or width
            self.channels += width

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.cat([self._along(branch, x) for branch in self.branches], 1)

    def _along(self, branch: Sequence[tuple[Step, tuple[str, ...]]], x: th.Tensor) -> th.Tensor:
        for step, names in branch:
            x = step(x) if callable(step) else _joined([self.get_submodule(name)(x) for name in names])
        return x


def _joined(parts: Sequence[th.Tensor]) -> th.Tensor:
    return parts[0] if len(parts) == 1 else th.cat(list(parts), 1)


class InceptionNetwork(th.nn.Module):
    """The network, whose weights are zero until they are loaded; to make one draws no random numbers.

    :param dtype: what the convolutions compute in; weights stay as they are, and what is before and after is float32.
    """

    def __init__(self, *, dtype: th.dtype = th.float32) -> None:
        super().__init__()
        self.dtype = dtype
        with th.device("meta"):
            channels = 3
            for name, layer in STEM.items():
                self.add_module(name, BasicConv2d(channels, layer))
                channels = layer.channels
            for name, branches in BLOCKS.items():
                block = Mixed(channels, branches)
                self.add_module(name, block)
                channels = block.channels
            self.fc = th.nn.Linear(channels, CLASSES)
        self.to_empty(device="cpu").requires_grad_(False).eval()
        for tensor in self.state_dict().values():
            tensor.zero_()

    def forward(self, images: th.Tensor) -> Outputs:
        """What the network sees in images [N, 3, H, W] of any size and type with values in [0, 255].

        TF32, which keeps 10 bits of a number, is never used.
        """
        x = resize_tf1(images).sub_(128).div_(128).to(self.dtype, memory_format=th.channels_last)
        with th.backends.cudnn.flags(enabled=th.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
            pool, spatial = self._features(x)
        unbiased = F.linear(pool, self.fc.weight.float())
        return Outputs(pool, spatial, unbiased, unbiased + self.fc.bias.float())

    def _features(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        for name in STEM:
            x = self.get_submodule(name)(x)
            x = _halve(x) if name in HALVED_AFTER else x
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()
        return x.float().mean((2, 3)), spatial


# ---- resizing


def resize_tf1(images: th.Tensor, side: int = SIDE) -> th.Tensor:
    """Images [N, 3, H, W] of any type as float32 [N, 3, side, side], by the bilinear rule of TensorFlow 1.

    Pixel i of the output is interpolated at i * H / side of the input: corners are not aligned, centres neither, and
    an image is never smoothed before it shrinks.

    :raises ValueError: if the shape is another.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not all(images.shape[2:]):
        raise ValueError(
            f"images have shape {tuple(images.shape)}: Inception takes [N, 3, H, W], so repeat grey images 3 times"
        )
    return _interpolate(_interpolate(images.float(), 3, side), 2, side)


def _interpolate(images: th.Tensor, axis: int, side: int) -> th.Tensor:
    length = images.shape[axis]
    ratio = th.tensor(length, dtype=th.float32) / side
    place = th.arange(side, dtype=th.float32) * ratio  # in float32, as TensorFlow has it
    before = place.long().clamp(max=length - 1)
    after = (before + 1).clamp(max=length - 1)
    share = (place - before).view(-1, *[1] * (3 - axis)).to(images)
    start = images.index_select(axis, before.to(images.device))
    return start.addcmul_(images.index_select(axis, after.to(images.device)).sub_(start), share)
