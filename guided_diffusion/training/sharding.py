"""Training with a part of everything on each rank (FSDP2, Zhao et al. 2023), for networks that do not fit on one.

Shapes: a tensor of a parameter is split along its first axis. `rows` are a rank's part of it, as many as on every other
rank but the last ones, which may have fewer or none; whole tensors are those of files and of networks in use.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch as th
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .. import dist_util
from ..fp16_util import Gradients, MixedPrecisionTrainer, convert, laid_out_as
from ..networks.blocks import TimestepBlock, TimestepEmbedSequential
from ..runtime.errors import refuse

OLDEST_TORCH = "2.7"
_DTYPES = {"fp16": th.float16, "bf16": th.bfloat16}

State = Mapping[int, Mapping[str, Any]]  # of an optimizer: index of the parameter -> name -> tensor or number


def mesh_of(device: str) -> DeviceMesh:
    """The ranks among which tensors are split: all, or those of each of several machines, which then have copies."""
    ranks = dist.get_world_size()  # a ValueError where there is no process group
    hosts = dist_util.gather_objects(socket.gethostname())
    count = len(set(hosts))
    alike = hosts == [host for host in dict.fromkeys(hosts) for _ in range(ranks // count)]
    if count == 1 or not alike or ranks == count:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("split",))
    return init_device_mesh(device, (count, ranks // count), mesh_dim_names=("copies", "split"))


def shard(model: nn.Module, like: nn.Module, precision: str, mesh: DeviceMesh) -> None:
    """Split the parameters of a network in place; each block gathers its own when it is used, and lets go of them.

    :param like: a copy after convert_to(precision), perhaps without values: what it would compute, the network then
        does, with the same casts and, where these decide over kernels, the same layouts.
    """
    pairs = list(zip(model.parameters(), like.parameters(), strict=True))
    small = {param for param, converted in pairs if converted.dtype != param.dtype}
    device = pairs[0][0].device
    blocks = [module for module in model.modules() if isinstance(module, TimestepEmbedSequential)]
    layers = [layer for block in blocks for layer in block if small & set(layer.parameters())]
    elsewhere = small - {param for layer in layers for param in layer.parameters()}
    outside = f"{len(elsewhere)} parameters in {precision} outside of its blocks, which fsdp cannot split"
    other_device = device.type not in ("cpu", "cuda")
    refuse(
        (other_device, f"fsdp splits parameters on cpu or cuda, not on {device.type}: leave it out"),
        (elsewhere, f"{type(model).__name__} has {outside}: train it in fp32, or without fsdp"),
    )
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
        return self._found(), self._total()


class ShardedTrainer(MixedPrecisionTrainer):
    """The trainer of a network that it splits over the ranks; every rank must call the same methods.

    `master_params` are the rows of this rank: plain tensors in the memory of the model's parameters. So an optimizer,
    averages and norms work on rows, at the speed of plain tensors.
    """

    def _make_masters(self) -> list[nn.Parameter]:
        odd, old = {str(param.dtype) for param in self.model_params} - {"torch.float32"}, th.__version__ < OLDEST_TORCH
        refuse(
            (odd, f"fsdp splits weights in fp32, and the model has some of {' and '.join(odd)}: convert them first"),
            (old, f"fsdp needs torch {OLDEST_TORCH} or newer, and this is {th.__version__}: leave it out"),
        )
        self._names = [name for name, _ in self.model.named_parameters()]
        self._plain = _without_memory(self.model)
        convert_to: Any = hasattr(self._plain, "model_channels") and self._plain.convert_to  # of our networks
        if self.precision != "fp32" and convert_to:
            # the layout of the device where the weights would have values
            convert_to(self.precision, self.model_params[0].device)
        elif self.precision != "fp32":
            convert(self._plain, self.precision)
        device = self.model_params[0].device
        if device.type == "cuda":
            th.cuda.set_device(device)  # where FSDP looks for it
        self.mesh = mesh_of(device.type if device.type in ("cpu", "cuda") else "cpu")
        shard(self.model, self._plain, self.precision, self.mesh)
        split: list[Any] = list(self.model.parameters())
        self.model_params = split
        return [nn.Parameter(param.detach().to_local(), param.requires_grad) for param in split]

    def _make_gradients(self) -> Gradients:
        return ShardedGradients(self._trained)

    def _measures(self, loss: th.Tensor) -> th.Tensor:
        mean, *norms = super()._measures(loss).double()  # whose squares do not overflow
        copies = dist.get_world_size() // self.mesh["split"].size()
        sums = th.stack([mean / dist.get_world_size(), *(norm.square() / copies for norm in norms)])
        dist.all_reduce(sums)
        return th.stack([sums[0], *sums[1:].sqrt()]).float()

    def sync_model(self) -> None:
        """Nothing: the masters are the model's parameters."""

    def master_params_to_state_dict(self, master_params: Sequence[th.Tensor]) -> dict[str, Any]:
        return self._state_dict(_whole, master_params)

    def weights_for_files(self, master_params: Sequence[th.Tensor]) -> dict[str, Any]:
        return self._state_dict(_on_rank_0, master_params)

    def _state_dict(self, gather: Callable[..., th.Tensor], master_params: Sequence[th.Tensor]) -> dict[str, Any]:
        whole = map(gather, master_params, self.model_params)
        return {**self.model.state_dict(), **dict(zip(self._names, whole, strict=True))}

    def state_dict_to_master_params(self, state_dict: Mapping[str, th.Tensor]) -> Sequence[th.Tensor]:
        return [self._rows(index, state_dict[name]) for index, name in enumerate(self._names)]

    def state_for_files(self, opt: th.optim.Optimizer) -> dict[str, Any]:
        saved = opt.state_dict()
        state = _with_moments(saved["state"], lambda index, rows: _on_rank_0(rows, self.model_params[index]))
        return {**saved, "state": state}

    def state_from_files(self, state: State) -> State:
        return _with_moments(state, self._rows)

    def rows_for_files(self, lists: Mapping[str, Sequence[th.Tensor]], opt: th.optim.Optimizer) -> dict[str, Any]:
        """part -> name -> rows of this rank, of lists with one tensor per master, and of the optimizer's moments."""
        rows = {part: dict(zip(self._names, values, strict=True)) for part, values in lists.items()}
        state = opt.state_dict()["state"]
        return {**rows, "opt": {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}}

    def split_again(self, parts: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, dict[str, Any]]:
        """`rows_for_files` in the memory of the CPU as parts of whole tensors.

        :param mesh: as the trainer's, for the CPU.
        """
        params = dict(zip(self._names, self.model_params, strict=True))

        def part(name: str, rows: th.Tensor) -> Any:
            param: Any = params.get(name) if name in params else self.model_params[int(name.partition(".")[0])]
            if not rows.ndim:
                return rows
            layout: dict[str, Any] = {"shape": param.shape, "stride": param.stride()}
            return DTensor.from_local(rows, mesh, param.placements, **layout)

        return {key: {name: part(name, rows) for name, rows in values.items()} for key, values in parts.items()}

    def plain_model(self, master_params: Sequence[th.Tensor] | None) -> nn.Module:
        whole = self.master_params_to_state_dict(self.master_params if master_params is None else master_params)
        model = copy.deepcopy(self._plain)
        frame = model.state_dict()
        state = {name: laid_out_as(value.to(frame[name].dtype), frame[name]) for name, value in whole.items()}
        model.load_state_dict(state, assign=True)
        return model

    def _rows(self, index: int, whole: th.Tensor) -> th.Tensor:
        """This rank's part of a tensor of parameter `index`, with the layout of its master."""
        master = self.master_params[index]
        split = self.mesh["split"]
        first = split.get_local_rank() * -(-len(whole) // split.size())
        return th.empty_like(master).copy_(whole[first : first + len(master)])


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes and no values."""
    params = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, params)


def _whole(rows: th.Tensor, param: Any) -> th.Tensor:
    """The tensor of a parameter that the rows of all ranks make; every rank must call it."""
    layout: dict[str, Any] = {"shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(rows.detach(), param.device_mesh, param.placements, **layout).full_tensor()


def _on_rank_0(rows: th.Tensor, param: Any) -> th.Tensor:
    """The same in the memory of the CPU, and nothing on other ranks."""
    whole = _whole(rows, param)
    return whole.cpu() if dist.get_rank() == 0 else th.empty(0)


def _with_moments(state: State, change: Callable[[int, th.Tensor], th.Tensor]) -> State:
    """An optimizer's state with other values of what it keeps for each number of a parameter."""
    return {
        index: {
            key: change(index, value) if th.is_tensor(value) and value.ndim else value for key, value in entry.items()
        }
        for index, entry in state.items()
    }
