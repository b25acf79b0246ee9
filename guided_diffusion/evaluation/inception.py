"""The Inception network of the published evaluator ("inception-2015-12-05"), in torch.

It differs from torchvision's: images are resized as TensorFlow 1 did, average pools leave the padding out, the last
block pools by maximum, and there are 1008 classes. The names of its state dict are torch-fidelity's, so that
``weights-inception-2015-12-05-6726825d.pth`` loads as it is.

Shapes: N images, C channels, H W pixels. Images have 3 channels and values in [0, 255].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch as th
import torch.nn.functional as F

SIDE = 299  # pixels of the images that the layers get
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of Mixed_6d, whose first channels are those of its 1x1 branch
EPS = 1e-3  # of batch normalisation


class Outputs(NamedTuple):
    """What the metrics are computed from, all float32."""

    pool: th.Tensor  # [N, 2048]
    spatial: th.Tensor  # [N, 2023]: 17 x 17 places, 7 channels each
    logits_unbiased: th.Tensor  # [N, 1008]; the inception score is made of these
    logits: th.Tensor  # [N, 1008]


class Layer(NamedTuple):
    """A convolution with batch normalisation and ReLU.

    :ivar beside: it takes the input of the layer before it, and its output is appended to that layer's.
    """

    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padded: bool = True
    beside: bool = False


Pool = Callable[[th.Tensor], th.Tensor]
Branch = Mapping[str, Layer | Pool]  # steps that follow each other, by the names of the state dict

_average: Pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum: Pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve: Pool = partial(F.max_pool2d, kernel_size=3, stride=2)
_strided = partial(Layer, height=3, width=3, stride=2, padded=False)


def _chain(name: str, *layers: Layer) -> Branch:
    return {f"{name}_{number}": layer for number, layer in enumerate(layers, 1)}


def _block_a(pooled: int) -> tuple[Branch, ...]:
    return (
        {"branch1x1": Layer(64)},
        _chain("branch5x5", Layer(48), Layer(64, 5, 5)),
        _chain("branch3x3dbl", Layer(64), Layer(96, 3, 3), Layer(96, 3, 3)),
        {"pool": _average, "branch_pool": Layer(pooled)},
    )


def _block_c(inner: int) -> tuple[Branch, ...]:
    tall, wide = Layer(inner, 7, 1), Layer(inner, 1, 7)
    return (
        {"branch1x1": Layer(192)},
        _chain("branch7x7", Layer(inner), wide, Layer(192, 7, 1)),
        _chain("branch7x7dbl", Layer(inner), tall, wide, tall, Layer(192, 1, 7)),
        {"pool": _average, "branch_pool": Layer(192)},
    )


def _block_e(pool: Pool) -> tuple[Branch, ...]:
    wide, tall = Layer(384, 1, 3), Layer(384, 3, 1, beside=True)
    double = _chain("branch3x3dbl", Layer(448), Layer(384, 3, 3))
    return (
        {"branch1x1": Layer(320)},
        {"branch3x3_1": Layer(384), "branch3x3_2a": wide, "branch3x3_2b": tall},
        {**double, "branch3x3dbl_3a": wide, "branch3x3dbl_3b": tall},
        {"pool": pool, "branch_pool": Layer(192)},
    )


STEM: Branch = {
    "Conv2d_1a_3x3": _strided(32),
    "Conv2d_2a_3x3": Layer(32, 3, 3, padded=False),
    "Conv2d_2b_3x3": Layer(64, 3, 3),
    "pool_1": _halve,
    "Conv2d_3b_1x1": Layer(80),
    "Conv2d_4a_3x3": Layer(192, 3, 3, padded=False),
    "pool_2": _halve,
}
BLOCKS: Mapping[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (  # block B
        {"branch3x3": _strided(384)},
        _chain("branch3x3dbl", Layer(64), Layer(96, 3, 3), _strided(96)),
        {"pool": _halve},
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (  # block D
        _chain("branch3x3", Layer(192), _strided(320)),
        _chain("branch7x7x3", Layer(192), Layer(192, 1, 7), Layer(192, 7, 1), _strided(192)),
        {"pool": _halve},
    ),
    "Mixed_7b": _block_e(_average),
    "Mixed_7c": _block_e(_maximum),  # as the published graph does, unlike the paper
}


class BasicConv2d(th.nn.Module):
    """One layer of the table; it normalises by the running statistics in every mode."""

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
        return F.relu_(F.conv2d(x, weight.to(x), bias.to(x), self.conv.stride, self.conv.padding))


class Mixed(th.nn.Module):
    """A block: its branches take the same input, and their outputs are joined along the channels."""

    def __init__(self, channels: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = sum(add_layers(self, channels, branch) for branch in branches)  # of the output

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.cat([along(self, branch, x) for branch in self.branches], 1)


def add_layers(module: th.nn.Module, channels: int, branch: Branch) -> int:
    """Add the layers of a branch to a module, and return the channels of its output."""
    before = channels
    for name, step in branch.items():
        if isinstance(step, Layer):
            module.add_module(name, BasicConv2d(before if step.beside else channels, step))
            before, channels = channels, step.channels + channels * step.beside
    return channels


def along(module: th.nn.Module, branch: Branch, x: th.Tensor) -> th.Tensor:
    """The output of a branch whose layers a module has."""
    before = x
    for name, step in branch.items():
        if not isinstance(step, Layer):
            before, x = x, step(x)
        elif step.beside:
            x = th.cat([x, module.get_submodule(name)(before)], 1)
        else:
            before, x = x, module.get_submodule(name)(x)
    return x


class InceptionNetwork(th.nn.Module):
    """The network, whose weights are zero until they are loaded; to make one draws no random numbers.

    :param dtype: what the convolutions compute in; weights stay as they are, and what is before and after is float32.
    """

    def __init__(self, *, dtype: th.dtype = th.float32) -> None:
        super().__init__()
        self.dtype = dtype
        with th.device("meta"):
            channels = add_layers(self, 3, STEM)
            for name, branches in BLOCKS.items():
                block = Mixed(channels, branches)
                self.add_module(name, block)
                channels = block.channels
            self.fc = th.nn.Linear(channels, CLASSES)
        self.to_empty(device="cpu").requires_grad_(False).eval()
        for tensor in self.state_dict().values():
            tensor.zero_()

    def forward(self, images: th.Tensor) -> Outputs:
        """The outputs for images [N, 3, H, W] of any size and type with values in [0, 255].

        TF32, which keeps 10 bits of a number, is never used.
        """
        x = resize_tf1(images).sub_(128).div_(128).to(self.dtype, memory_format=th.channels_last)
        with th.backends.cudnn.flags(enabled=th.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
            x = along(self, STEM, x)
            for name in BLOCKS:
                x = self.get_submodule(name)(x)
                if name == "Mixed_6d":
                    spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()
        pool = x.float().mean((2, 3))
        unbiased = F.linear(pool, self.fc.weight.float())
        return Outputs(pool, spatial, unbiased, unbiased + self.fc.bias.float())


def resize_tf1(images: th.Tensor, side: int = SIDE) -> th.Tensor:
    """Images [N, 3, H, W] of any type as float32 [N, 3, side, side], by the bilinear rule of TensorFlow 1.

    Pixel i of the output is interpolated at i * H / side of the input: neither corners nor centres are aligned, and an
    image is never smoothed before it shrinks.
    """
    return _interpolate(_interpolate(images.float(), 3, side), 2, side)


def _interpolate(images: th.Tensor, axis: int, side: int) -> th.Tensor:
    length = images.shape[axis]
    scale = th.tensor(length, dtype=th.float32) / side  # float32 as in TensorFlow
    position = th.arange(side, dtype=th.float32) * scale
    before = position.long().clamp(max=length - 1)
    after = (before + 1).clamp(max=length - 1)
    share = (position - before).view(-1, *[1] * (3 - axis)).to(images)
    start, end = (images.index_select(axis, index.to(images.device)) for index in (before, after))
    return start.addcmul_(end.sub_(start), share)
