"""Low-rank adapters (LoRA, Hu et al. 2021): what is learned of a weight W is scale * up @ down, and W stays as it is.

Shapes: a convolution's weight is [O, I, ...] with its kernel last; of rank r, down is [r, I, ...] (the convolution's
kernel, stride and padding) and up [O, r, 1, ...]. `up` starts at zero, and with it the network as it was.

Three kinds of dictionaries name weights: a state dict of the network with adapters ("W.weight", "W.lora.down",
"W.lora.up"), the plain one of the network without them, in which they are merged, and what is trained: the adapters,
and parameters beside them. A file loraNNNNNN.pt holds the last kind, as it is in training and as its moving averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from ..config import LORA_KINDS
from ..networks.blocks import AttentionBlock, ResBlock
from ..runtime import paths
from ..runtime.npz import fingerprint
from . import checkpoints

FORMAT = 1
NAME = "lora"  # of the adapter within its convolution
_DOWN, _UP, _WEIGHT = f".{NAME}.down", f".{NAME}.up", ".weight"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by axes of the weight
_OWNERS = dict(zip(LORA_KINDS, (AttentionBlock, ResBlock), strict=True))

Weights = dict[str, th.Tensor]


class Adapter(nn.Module):
    """What is added to the output of a convolution."""

    def __init__(self, conv: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        weight: th.Tensor = conv.get_parameter("weight")
        self.scale = alpha / rank
        down = th.empty(rank, *weight.shape[1:])  # drawn on the CPU: the same numbers on every device
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank, *[1] * (weight.ndim - 2)))

    def forward(self, x: th.Tensor, conv: Any) -> th.Tensor:
        """The addition for an input of the convolution."""
        convolve = _FUNCTIONS[self.down.ndim]
        hidden = convolve(x, self.down, None, conv.stride, conv.padding, conv.dilation)
        return self.scale * convolve(hidden, self.up)


def _add(conv: nn.Module, inputs: tuple[th.Tensor, ...], output: th.Tensor) -> th.Tensor:
    """The hook of a convolution that has an adapter."""
    added: th.Tensor = conv.get_submodule(NAME)(inputs[0], conv)
    return output + added


def attach(
    model: nn.Module, *, rank: int = 8, alpha: float = 0.0, on: Sequence[str] = LORA_KINDS, train: Sequence[str] = ()
) -> list[str]:
    """Give convolutions adapters, and freeze everything else; returns the names of those convolutions.

    :param alpha: adapters are scaled by alpha / rank; 0 stands for the rank.
    :param on: which of LORA_KINDS have adapters.
    :param train: names of parameters that are not frozen.
    :raises ValueError: if there is nothing to adapt.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, tuple(_OWNERS[kind] for kind in on))]
    targets = {
        f"{owner}.{name}": conv
        for owner in found
        for name, conv in model.get_submodule(owner).named_modules()
        if isinstance(conv, _CONVOLUTIONS)
    }
    if not targets or rank < 1:
        raise ValueError(f"lora_on {','.join(on)} with rank {rank} finds nothing to adapt in {type(model).__name__}")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in train)
    for conv in targets.values():
        conv.add_module(NAME, Adapter(conv, rank, alpha or float(rank)))
        conv.register_forward_hook(_add)
    return list(targets)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Name of the convolution -> its adapter; {} for networks without any."""
    ending = f".{NAME}"
    return {name.removesuffix(ending): module for name, module in model.named_modules() if isinstance(module, Adapter)}


# ---- dictionaries of weights


def is_part(name: str) -> bool:
    """Whether a parameter's name is that of a part of an adapter."""
    return name.endswith((_DOWN, _UP))


def _sum(weight: th.Tensor, down: th.Tensor, up: th.Tensor, scale: float) -> th.Tensor:
    """The weight of a convolution and its adapter in one."""
    return weight + scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)


@th.no_grad()
def merged(model: nn.Module, state: Mapping[str, th.Tensor]) -> Weights:
    """The plain weights that compute what a network with adapters does, from its state dict."""
    plain = {name: value for name, value in state.items() if not is_part(name)}
    for name, adapter in adapters(model).items():
        parts = state[name + _DOWN], state[name + _UP]
        plain[name + _WEIGHT] = _sum(state[name + _WEIGHT], *parts, adapter.scale)
    return plain


def base(model: nn.Module, state: Mapping[str, th.Tensor]) -> Weights:
    """The weights below the adapters, of a state dict."""
    return {name + _WEIGHT: state[name + _WEIGHT] for name in adapters(model)}


def split(model: nn.Module, state: Mapping[str, th.Tensor]) -> Weights:
    """The adapters of a state dict, and what else is trained."""
    return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def joined(
    model: nn.Module, plain: Mapping[str, th.Tensor], below: Mapping[str, th.Tensor], parts: Mapping[str, th.Tensor]
) -> Weights:
    """The state dict of a network with adapters: the inverse of `merged`, to the bit.

    :param below: of `base`; `parts` are those of `split`.
    :raises ValueError: if they are of other adapters.
    """
    own = model.state_dict()
    state = {**plain, **below, **{name: value for name, value in parts.items() if name in own}}
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()} or set(parts) - set(own):
        raise ValueError(
            "the adapters of the checkpoint are others than those asked for: leave lora_rank and lora_on to the run "
            "that is resumed"
        )
    return {name: state[name] for name in own}


# ---- files


@dataclass(frozen=True)
class Pack:
    """What a file of adapters holds.

    :param base: fingerprint of the weights that they were trained over.
    :param weights: "model", or the rate of an average -> the weights of `split`.
    """

    scale: float
    base: str
    weights: dict[str, Weights]

    @property
    def best(self) -> Weights:
        """The slowest average, else the adapters themselves."""
        rates = [key for key in self.weights if key != "model"]
        return self.weights[max(rates, key=float)] if rates else self.weights["model"]


def content(model: nn.Module, states: Mapping[str, Mapping[str, th.Tensor]]) -> dict[str, Any]:
    """What goes into a file of adapters.

    :param states: "model", or the rate of an average -> the state dict with adapters.
    """
    first = next(iter(adapters(model).values()))
    return {
        "format": FORMAT,
        "rank": len(first.down),
        "scale": first.scale,
        "base": _fingerprint(base(model, states["model"])),
        "weights": {key: split(model, state) for key, state in states.items()},
    }


def read(path: str) -> Pack:
    """A file of adapters, or the newest one of a run's folder.

    :raises FileNotFoundError, ValueError: if there is none, or it holds something else.
    """
    if paths.names_in(path):
        found = [entry.lora for entry in checkpoints.sets_in(path).values() if entry.lora]
        if not found:
            raise ValueError(
                f"{path} holds no loraNNNNNN.pt: give the folder of a run with --lora_rank, or such a file"
            )
        path = found[-1]
    value = checkpoints.load(path)
    try:
        return _unpacked(value)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError):
        raise ValueError(f"{path} holds no adapters: give a file loraNNNNNN.pt of a run with --lora_rank") from None


def _unpacked(value: Any) -> Pack:
    weights = {key: dict(parts) for key, parts in value["weights"].items()}
    rates = [float(key) for key in weights if key != "model"]
    if value["format"] != FORMAT or len(rates) == len(weights) or not all(map(_whole, weights.values())):
        raise ValueError("of another kind")
    return Pack(float(value["scale"]), str(value["base"]), weights)


def _whole(parts: Mapping[str, Any]) -> bool:
    """Whether these are tensors, and some of them adapters with both parts, of one rank."""
    floats = all(isinstance(value, th.Tensor) and value.is_floating_point() for value in parts.values())
    downs = [name for name in parts if name.endswith(_DOWN)]
    ups = [name for name in parts if name.endswith(_UP)]
    paired = {_partner(name) for name in downs} == set(ups)
    return floats and bool(downs) and paired and all(len(parts[n]) == parts[_partner(n)].shape[1] for n in downs)


def _partner(name: str) -> str:
    """The name of the other part of the same adapter."""
    return name.removesuffix(_DOWN) + _UP if name.endswith(_DOWN) else name.removesuffix(_UP) + _DOWN


@th.no_grad()
def applied(weights: Mapping[str, th.Tensor], pack: Pack, *, scale: float = 1.0) -> tuple[Weights, str]:
    """Plain weights with the best adapters of a file merged into them.

    What was trained beside the adapters is moved towards as far as they are added.

    :param scale: how much of them: 1 as they were trained.
    :return: the weights, and what to warn of, '' for nothing.
    :raises ValueError: if they are of another network.
    """
    result, below = dict(weights), list[str]()
    for name, value in pack.best.items():
        target = name.removesuffix(_DOWN).removesuffix(_UP) + _WEIGHT if is_part(name) else name
        there = weights.get(target)
        if there is None or not _fits(name, value, there):
            raise ValueError(
                f"the adapters are of another network: there is {name} {list(value.shape)} for "
                f"{'nothing' if there is None else f'{target} {list(there.shape)}'}"
            )
        if name.endswith(_DOWN):
            below.append(target)
            result[target] = _sum(there, value, pack.best[_partner(name)], scale * pack.scale)
        elif not is_part(name):
            result[name] = there + scale * (value - there)
    same = _fingerprint({name: weights[name] for name in below}) == pack.base
    return result, "" if same else "the adapters were trained over other weights than these"


def _fingerprint(weights: Mapping[str, th.Tensor]) -> str:
    return fingerprint(dict(sorted(weights.items())))


def _fits(name: str, value: th.Tensor, there: th.Tensor) -> bool:
    if name.endswith(_DOWN):
        return value.ndim == there.ndim > 2 and value.shape[1:] == there.shape[1:]
    if name.endswith(_UP):
        return value.ndim == there.ndim > 2 and len(value) == len(there) and set(value.shape[2:]) == {1}
    return value.shape == there.shape
