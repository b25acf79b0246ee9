"""Training with a part of everything on each rank (FSDP2, Zhao et al. 2023), for networks that do not fit on one.

Shapes: a tensor of a parameter is split along its first axis. `rows` are a rank's part of it, as many as on every other
rank but the last ones, which may have fewer or none; whole tensors are those of files and of networks in use.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch as th
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..fp16_util import MixedPrecisionTrainer, convert
from ..networks.blocks import TimestepBlock, TimestepEmbedSequential
from ..runtime.errors import UserError
from ..unet import UNetBackbone
from .gradients import Gradients, laid_out_as

OLDEST_TORCH = "2.7"
_DTYPES = {"fp16": th.float16, "bf16": th.bfloat16}

State = Mapping[int, Mapping[str, Any]]  # of an optimizer: index of the parameter -> name -> tensor or number


def shard(model: nn.Module, like: nn.Module, precision: str) -> None:
    """Split the parameters of a network in place; each block gathers its own when it is used, and lets go of them.

    :param like: a copy after convert_to(precision), perhaps without values: what it would compute, the network then
        does, with the same casts and, where these decide over kernels, the same layouts.
    :raises ValueError: for a network with converted parameters elsewhere than in the layers of blocks
        (TimestepEmbedSequential), or on a device that cannot gather.
    """
    pairs = list(zip(model.parameters(), like.parameters(), strict=True))
    small = {param for param, converted in pairs if converted.dtype != param.dtype}
    device = pairs[0][0].device
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"fsdp splits parameters on cpu or cuda, not on {device.type}: leave it out")
    blocks = [module for module in model.modules() if isinstance(module, TimestepEmbedSequential)]
    layers = [layer for block in blocks for layer in block if small & set(layer.parameters())]
    elsewhere = small - {param for layer in layers for param in layer.parameters()}
    if elsewhere:
        raise UserError(
            f"{type(model).__name__} has {len(elsewhere)} parameters in {precision} outside of its blocks, which fsdp "
            "cannot split: train it in fp32, or without fsdp"
        )
    if device.type == "cuda":
        th.cuda.set_device(device)  # where FSDP looks for it
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # One group has one precision: the layers get theirs last, or their blocks would pass over all that is in them.
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=small)
    for layer in layers:
        # An embedding stays in fp32. Images, which reach no layer with one, come in fp32 and are cast.
        policy = MixedPrecisionPolicy(
            _DTYPES[precision], reduce_dtype=th.float32, cast_forward_inputs=not isinstance(layer, TimestepBlock)
        )
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=set(layer.parameters()) - small)
    for module in [*blocks, *layers, model]:
        module.register_forward_hook(_no_view, prepend=True)
    if any(converted.ndim == 4 and not converted.is_contiguous() for _, converted in pairs):
        for layer in layers:
            layer.register_forward_pre_hook(_channels_last)  # gathered weights are contiguous, and say nothing of it


def _no_view(_: nn.Module, inputs: Any, output: Any) -> Any:
    """An output on which FSDP can hang what it does in the backward pass, even if it is changed in place later."""
    return output.clone() if isinstance(output, th.Tensor) and output._is_view() else output


def _channels_last(_: nn.Module, inputs: tuple[th.Tensor, ...]) -> tuple[th.Tensor, ...]:
    return tuple(_innermost(x) if x.ndim == 4 else x for x in inputs)


def _innermost(x: th.Tensor) -> th.Tensor:
    """[N, C, H, W] with its channels innermost, also in the strides of a single image, which kernels look at."""
    rows = x.movedim(1, -1).contiguous()
    return rows.view(rows.shape).movedim(-1, 1)


class ShardedGradients(Gradients):
    """The rows of the means of the gradients over all ranks, which the backward passes have added up in fp32."""

    def _watched(self) -> list[int]:
        return []

    def finish(self) -> tuple[list[th.Tensor], th.Tensor]:
        for param, master in self.pairs:
            master.grad = th.zeros_like(master) if param.grad is None else cast(DTensor, param.grad).to_local()
        return [master.grad for _, master in self.pairs if master.grad is not None], self._total()


class ShardedTrainer(MixedPrecisionTrainer):
    """The trainer of a network that it splits over the ranks; every rank must call the same methods.

    `master_params` are the rows of this rank: plain tensors in the memory of the model's parameters. So an optimizer,
    averages and norms work on rows, at the speed of plain tensors.
    """

    def _make_masters(self) -> list[nn.Parameter]:
        odd = {param.dtype for param in self.model_params} - {th.float32}
        if odd:
            raise UserError(f"fsdp splits weights in fp32, and the model has some of {odd.pop()}: convert them first")
        if th.__version__ < OLDEST_TORCH:
            raise UserError(f"fsdp needs torch {OLDEST_TORCH} or newer, and this is {th.__version__}: leave it out")
        self._names = [name for name, _ in self.model.named_parameters()]
        self._plain, self._rows_by_name = _without_memory(self.model), _without_memory(self.model)
        if self.precision != "fp32" and isinstance(self._plain, UNetBackbone):
            # whose layout is that of the device where it would have values
            self._plain.convert_to(self.precision, self.model_params[0].device)
        elif self.precision != "fp32":
            convert(self._plain, self.precision)
        shard(self.model, self._plain, self.precision)
        self.model_params = list(self.model.parameters())
        return [nn.Parameter(_rows_of(param), param.requires_grad) for param in self.model_params]

    def _make_gradients(self) -> Gradients:
        return ShardedGradients(self._trained)

    def _measures(self, loss: th.Tensor) -> th.Tensor:
        mean, *norms = super()._measures(loss).double()  # whose squares do not overflow
        sums = th.stack([mean / dist.get_world_size(), *(norm.square() for norm in norms)])
        dist.all_reduce(sums)
        return th.stack([sums[0], *sums[1:].sqrt()]).float()

    def sync_model(self) -> None:
        """Nothing: the masters are the model's parameters."""

    # ---- whole tensors

    def master_params_to_state_dict(self, master_params: Sequence[th.Tensor]) -> dict[str, Any]:
        return self._gathered(master_params)

    def weights_for_files(self, master_params: Sequence[th.Tensor]) -> dict[str, Any]:
        return self._gathered(master_params, cpu_offload=True)

    def state_dict_to_master_params(self, state_dict: Mapping[str, th.Tensor]) -> Sequence[th.Tensor]:
        return self._rows({name: state_dict[name].float() for name in self._names})

    def state_for_files(self, opt: th.optim.Optimizer) -> dict[str, Any]:
        saved = opt.state_dict()
        state = {index: dict(entry) for index, entry in saved["state"].items()}
        for key in _moments(state):
            rows = [state.get(index, {}).get(key, master) for index, master in enumerate(self.master_params)]
            whole = self._gathered(rows, cpu_offload=True, ignore_frozen_params=True)
            for index, entry in state.items():
                entry[key] = whole.get(self._names[index])
        return {**saved, "state": state}

    def state_from_files(self, state: State) -> State:
        result = {index: dict(entry) for index, entry in state.items()}
        for key in _moments(state):
            rows = self._rows({self._names[index]: entry[key] for index, entry in state.items()})
            for index, entry in result.items():
                entry[key] = rows[index]
        return result

    def plain_model(self, master_params: Sequence[th.Tensor] | None) -> nn.Module:
        values = self.master_params if master_params is None else master_params
        model = copy.deepcopy(self._plain)
        frame, whole = model.state_dict(), self._gathered(values)
        state = {name: laid_out_as(value.to(frame[name].dtype), frame[name]) for name, value in whole.items()}
        model.load_state_dict(state, assign=True)
        return model

    def _holder(self, rows: Sequence[th.Tensor]) -> nn.Module:
        """A network for its names alone: its parameters are these rows, all else is the model's."""
        pairs = zip(self._names, self.model_params, rows, strict=True)
        state = {name: _of_rows(values, cast(DTensor, param)) for name, param, values in pairs}
        self._rows_by_name.load_state_dict({**self.model.state_dict(), **state}, assign=True)
        return self._rows_by_name

    def _gathered(
        self, rows: Sequence[th.Tensor], *, cpu_offload: bool = False, ignore_frozen_params: bool = False
    ) -> dict[str, Any]:
        """The state dict with whole tensors; with cpu_offload on rank 0 alone, and empty on the others."""
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=cpu_offload, ignore_frozen_params=ignore_frozen_params
        )
        return get_model_state_dict(self._holder(rows), options=options)

    def _rows(self, whole: Mapping[str, th.Tensor]) -> list[th.Tensor]:
        """The rows of whole tensors, by the values that rank 0 has; zeros where there is none."""
        holder = self._holder([th.zeros_like(master) for master in self.master_params])
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(holder, dict(whole), options=options)
        return [_rows_of(param) for param in holder.parameters()]


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes and no values."""
    params = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, params)


def _rows_of(param: th.Tensor) -> th.Tensor:
    return cast(DTensor, param.detach()).to_local()


def _of_rows(rows: th.Tensor, param: DTensor) -> DTensor:
    """The rows of all ranks as a tensor of a parameter."""
    shape, stride = param.shape, param.stride()
    return DTensor.from_local(rows.detach(), param.device_mesh, param.placements, shape=shape, stride=stride)


def _moments(state: State) -> list[str]:
    """The names of what an optimizer keeps for each number of a parameter."""
    return sorted(
        {key for entry in state.values() for key, value in entry.items() if th.is_tensor(value) and value.ndim}
    )
