"""What a training will take before it begins: parameters, arithmetic, memory, by a step on tensors without values.

Shapes: n images of a microbatch. All sizes are bytes, of one rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch as th
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .gradients import Gradients

Loss = Callable[[nn.Module, int], th.Tensor]  # (network, n) -> the mean loss of n images
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Footprint:
    """What a training takes.

    :param parts: parameters of each part of the network.
    :param forward: floating-point operations of a forward pass per image, `step` those of forward and backward pass.
    :param activations: activations and gradients, when they are most.
    """

    parts: dict[str, int]
    trained: int
    forward: float
    step: float
    weights: int
    masters: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def lasting(self) -> int:
        """What there is between two steps."""
        return self.weights + self.masters + self.optimizer + self.averages

    @property
    def peak(self) -> int:
        """The most that there is at a time."""
        return self.lasting + max(self.activations, self.gradients)

    def spread(self, ranks: int) -> Footprint:
        """The same with --fsdp: a rank has its share of all that is in fp32, and gathers the weights part by part."""
        share = {name: getattr(self, name) // ranks for name in ("gradients", "optimizer", "averages")}
        masters = 4 * sum(self.parts.values()) // ranks
        activations = self.activations - self.gradients + share["gradients"]
        return replace(self, **share, masters=masters, weights=0, activations=activations)


def measure(network: nn.Module, loss: Loss, sizes: Iterable[int], device: th.device, averages: int = 1) -> Footprint:
    """What a step with AdamW takes, of parameters that require a gradient.

    :param network: on the meta device, in its precision.
    :param sizes: of its microbatches, one after the other.
    :param averages: how many moving averages of the weights there are.
    """
    sizes = list(sizes)
    with FakeTensorMode():
        _give_memory(network, device)
        pairs = _pairs(network)
        gradients = Gradients(pairs)
        with _counting() as counter:  # not at once with the memory, as the counter holds on to what it has seen
            mean = loss(network, sizes[0])
            forward = counter.get_total_flops()
            _step(gradients, mean)
        gradients.reset()
        del mean
        with _Live() as live:
            for n in sizes:
                _step(gradients, loss(network, n) * (n / sum(sizes)))
        moved = sum(master.grad.nbytes for _, master in pairs if master.grad is not None)
    params = list(network.parameters())
    trained = sum(param.numel() for param, _ in pairs)
    return Footprint(
        parts={name: _count(part) for name, part in network.named_children()},
        trained=trained,
        forward=forward / sizes[0],
        step=counter.get_total_flops() / sizes[0],
        weights=sum(param.nbytes for param in params),
        masters=4 * sum(param.numel() for param in params if param.dtype != th.float32),
        gradients=moved,
        optimizer=4 * ADAM_MOMENTS * trained,
        averages=4 * averages * sum(param.numel() for param in params),
        activations=live.peak,
    )


def _count(part: nn.Module) -> int:
    return sum(param.numel() for param in part.parameters())


def _step(gradients: Gradients, loss: th.Tensor) -> None:
    with gradients.collecting(loss.float(), last=False):
        loss.backward()


def _pairs(network: nn.Module) -> list[tuple[th.Tensor, th.Tensor]]:
    """The trained parameters and their masters."""
    trained = [param for param in network.parameters() if param.requires_grad]
    return [(param, param if param.dtype == th.float32 else param.detach().float()) for param in trained]


def _give_memory(network: nn.Module, device: th.device) -> None:
    """Move parameters and buffers from meta to a device on which the mode gives them no values."""
    for module in network.modules():
        for name, param in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(_alike(param, device), param.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = _alike(buffer, device)


def _alike(tensor: th.Tensor, device: th.device) -> th.Tensor:
    return th.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


class _Live(TorchDispatchMode):
    """Counts the memory of tensors that came to be inside, as long as they are held."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, th.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, th.Tensor) and tensor.untyped_storage()._cdata not in before:
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: th.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


# ---- arithmetic


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Counts operations, those of the attention on CPUs too, which torch leaves out."""
    aten = th.ops.aten
    extra = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        yield counter


def _attention(query: th.Size, key: th.Size, value: th.Size, *_: Any, **__: Any) -> int:
    """Of [N, H, T, D], two products of matrices."""
    n, heads, tokens, width = query
    return 2 * n * heads * tokens * key[2] * (width + value[3])


def _attention_backward(grad: th.Size, query: th.Size, key: th.Size, value: th.Size, *_: Any, **__: Any) -> int:
    """Five products of matrices, one of which is made again."""
    return _attention(query, key, value) * 5 // 2
