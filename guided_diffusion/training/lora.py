"""Low-rank adapters (LoRA, Hu et al. 2021) by the library peft: W stays, and scale * lora_B @ lora_A is learned.

Shapes: a convolution's weight is [O, I, ...] with its kernel last; of rank r, lora_A is [r, I, ...] (the convolution's
kernel) and lora_B [O, r, 1, ...], which starts at zero.

peft puts layers around the convolutions. Files, and all dictionaries here, name weights as the plain network does:
"W.weight", "W.lora_A.weight", "W.lora_B.weight". A folder loraNNNNNN of a run is one of peft's: adapter_config.json and
adapter_model.safetensors, with the slowest average. Older runs wrote files loraNNNNNN.pt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch as th
import torch.nn as nn

from ..networks.blocks import AttentionBlock, ResBlock
from ..runtime import files
from ..runtime.errors import UserError, as_user_error, refuse
from ..runtime.npz import fingerprint
from . import checkpoints
from .weights import load, shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DOWN, _UP, _WEIGHT, _PREFIX = ".lora_A.weight", ".lora_B.weight", ".weight", "base_model.model."
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = {"attention": AttentionBlock, "convolutions": ResBlock}  # the names are those of --lora_on
_BASE = "weights "  # what goes before their fingerprint
_UNKNOWN = ("use_dora", "alpha_pattern", "layer_replication", "use_qalora", "target_parameters")

Weights = dict[str, th.Tensor]


def attach(
    model: nn.Module, *, rank: int = 8, alpha: float = 0.0, on: Sequence[str] = tuple(KINDS), train: Sequence[str] = ()
) -> list[str]:
    """Give convolutions adapters, and freeze everything else; returns the names of those convolutions.

    :param alpha: adapters are scaled by alpha / rank; 0 stands for the rank.
    :param on: which of KINDS have adapters.
    :param train: names of parameters that are not frozen.
    """
    owners = [name for name, module in model.named_modules() if isinstance(module, tuple(KINDS[kind] for kind in on))]
    targets = [
        f"{owner}.{name}"
        for owner in owners
        for name, module in model.get_submodule(owner).named_modules()
        if isinstance(module, _CONVOLUTIONS)
    ]
    nothing = f"lora_on {','.join(on)} with rank {rank} finds nothing to adapt in {type(model).__name__}"
    refuse((not targets or rank < 1, nothing))
    with as_user_error('adapters are those of the library peft: pip install "guided-diffusion[lora]"', ImportError):
        import peft
    scale: Any = alpha or rank  # a fraction too, whatever peft's annotation
    config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=targets)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_part(_plain(name)) or _plain(name) in train)
    return targets


def adapters(model: nn.Module) -> dict[str, Any]:
    """Name of the convolution -> peft's layer around it; {} for networks without adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def scale_of(model: nn.Module) -> float:
    """The scale of all adapters of a network."""
    scale: float = next(iter(adapters(model).values())).scaling["default"]
    return scale


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def plain_names(state: Mapping[str, th.Tensor]) -> Weights:
    """A state dict of a network with peft's layers under the names of the plain one."""
    return {_plain(name): value for name, value in state.items()}


def is_part(name: str) -> bool:
    """Whether a plain name is that of a part of an adapter."""
    return name.endswith((_DOWN, _UP))


def _sum(weight: th.Tensor, down: th.Tensor, up: th.Tensor, scale: float) -> th.Tensor:
    return weight + scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)


@th.no_grad()
def merged(model: nn.Module, state: Mapping[str, th.Tensor]) -> Weights:
    """The weights without adapters that compute what a network with them does, from its state dict."""
    named = plain_names(state)
    result = {name: value for name, value in named.items() if not is_part(name)}
    for name, layer in adapters(model).items():
        parts = named[name + _DOWN], named[name + _UP]
        result[name + _WEIGHT] = _sum(result[name + _WEIGHT], *parts, layer.scaling["default"])
    return result


def base(model: nn.Module, state: Mapping[str, th.Tensor]) -> Weights:
    """The weights below the adapters, of a state dict."""
    named = plain_names(state)
    return {name + _WEIGHT: named[name + _WEIGHT] for name in adapters(model)}


def split(model: nn.Module, state: Mapping[str, th.Tensor]) -> Weights:
    """The adapters of a state dict, and what else is trained."""
    return {_plain(name): state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def layered(model: nn.Module, named: Mapping[str, th.Tensor]) -> Weights:
    """The state dict of a network with adapters from what `merged`, then `base`, then `split` named.

    :raises ValueError: if they are of other adapters.
    """
    expected = model.state_dict()
    others = "the adapters of the checkpoint are others than those asked for"
    remedy = "leave lora_rank and lora_on to the run that is resumed"
    refuse((shapes(named) != shapes(plain_names(expected)), f"{others}: {remedy}"))
    return {name: named[_plain(name)] for name in expected}


class Pack(NamedTuple):
    """Adapters from a file.

    :ivar base: fingerprint of the weights that they were trained over, '' where it is unknown.
    :ivar weights: of `split`, where whole modules may stand for the parameters that are trained.
    """

    scale: float
    base: str
    weights: Weights


def content(model: nn.Module, state: Mapping[str, th.Tensor]) -> dict[str, Any]:
    """The files of peft's folder for a state dict with adapters: name -> content.

    peft saves what else is trained by whole modules, so these have their frozen parameters too.
    """
    named, parts, adapted = plain_names(state), split(model, state), list(adapters(model))
    modules = {name.rpartition(".")[0] for name in parts if not is_part(name)} - {*adapted, ""}
    whole = {name: value for name, value in named.items() if name in parts or name.rpartition(".")[0] in modules}
    configs: Any = model.peft_config
    config = {name: getattr(value, "value", value) for name, value in configs["default"].to_dict().items()}
    config |= {"modules_to_save": sorted(modules) or None, "inference_mode": True, "target_modules": adapted}
    config |= {"base_model_name_or_path": _BASE + fingerprint(dict(sorted(base(model, state).items())))}
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return {CONFIG: config, WEIGHTS: {_PREFIX + name: value for name, value in whole.items()}}


def read(path: str) -> Pack:
    """A folder or file of adapters, or the newest of a run's folder."""
    path = files.resolve(path)
    if os.path.basename(path) in (CONFIG, WEIGHTS):
        path = os.path.dirname(path) or "."
    if files.isdir(path) and CONFIG not in files.names_in(path):
        adapted = [entry.lora for entry in checkpoints.sets_in(path).values() if entry.lora]
        remedy = "give the folder of a run with --lora_rank, or one of peft's"
        refuse((not adapted, f"{path} holds no loraNNNNNN: {remedy}"))
        path = adapted[-1]
    folder = files.isdir(path)
    config = files.read_file(files.join(path, CONFIG)) if folder else b""
    value = load(files.join(path, WEIGHTS) if folder else path)
    try:
        if folder:
            pack = _of_peft(files.parse_json(config), value)
        else:
            packs = older_packs(value)
            pack = packs[max(packs, key=lambda key: -1.0 if key == "model" else float(key))]  # the slowest average
        whole = _is_paired(pack.weights)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError):
        whole = False
    remedy = "give a folder loraNNNNNN of a run with --lora_rank"
    refuse((not whole, f"{path} holds no adapters that can be merged: {remedy}"))
    return pack


def _of_peft(config: Any, value: Mapping[str, th.Tensor]) -> Pack:
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))
    origin = str(config.get("base_model_name_or_path"))
    understood = not any(config.get(name) for name in _UNKNOWN)
    weights = {name.removeprefix(_PREFIX): value[name] for name in sorted(value) if understood}
    return Pack(float(scale), origin.removeprefix(_BASE) if origin.startswith(_BASE) else "", weights)


def older_packs(value: Any) -> dict[str, Pack]:
    """The adapters in a file loraNNNNNN.pt of older versions, by "model" or the rate of a moving average."""
    return {
        key: Pack(
            float(value["scale"]),
            str(value["base"]),
            {name.replace(".lora.down", _DOWN).replace(".lora.up", _UP): part for name, part in parts.items()},
        )
        for key, parts in value["weights"].items()
    }


def _is_paired(weights: Mapping[str, th.Tensor]) -> bool:
    """Whether some of these tensors are adapters, each with both parts, of one rank."""
    ranks = [
        {name.removesuffix(ending): value.shape[axis] for name, value in weights.items() if name.endswith(ending)}
        for ending, axis in ((_DOWN, 0), (_UP, 1))
    ]
    return ranks[0] == ranks[1] != {} and all(value.is_floating_point() for value in weights.values())


@th.no_grad()
def applied(weights: Mapping[str, th.Tensor], pack: Pack, *, scale: float = 1.0) -> tuple[Weights, str]:
    """Plain weights with adapters merged into them.

    :param scale: how much of them, and of the parameters that were trained beside them: 1 as they were trained.
    :return: the weights, and a warning, '' for none.
    """
    result, below = dict(weights), dict[str, th.Tensor]()
    for name, value in pack.weights.items():
        if name.endswith(_UP):
            continue
        adapted = name.endswith(_DOWN)
        target = name.removesuffix(_DOWN) + _WEIGHT if adapted else name
        up = pack.weights[name.removesuffix(_DOWN) + _UP] if adapted else value
        weight, shape = weights.get(target), (len(up), *value.shape[1:]) if value.ndim else ()
        if weight is None or weight.shape != shape:
            raise UserError(
                f"the adapters are of another network: there is one of {list(shape)} for {target}, which "
                f"{'is missing' if weight is None else f'has {list(weight.shape)}'}"
            )
        if adapted:
            below[target] = weight
            result[target] = _sum(weight, value, up, scale * pack.scale)
        else:
            result[name] = weight + scale * (value - weight)
    same = not pack.base or fingerprint(dict(sorted(below.items()))) == pack.base
    return result, "" if same else "the adapters were trained over other weights than these"
