"""A GPU in name only: tensors say that they are on cuda:0, and the CPU computes them.

    with SimulatedGPU() as gpu:
        network.to("cuda")(images)  # RuntimeError where the images are still on the CPU
    gpu.waits                       # where the host waited for the device

What is on the GPU is memory: a storage is marked, and with it every view of it. Two layers look after the marks. What
Python says of devices (`.to("cuda")`, `device=`, `.numpy()`) is seen by `_Surface`. What is computed, in backward
passes too, is seen by `_Kernels`: results are where their inputs are, inputs on two devices are an error as in torch,
and an operation whose result the host needs is a wait, as is a copy between the devices that is not asynchronous.

Not seen: what CUDA's own kernels wait for inside, streams, and whether an asynchronous copy is read too early.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch as th
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion import dist_util

CPU, CUDA = th.device("cpu"), th.device("cuda", 0)
ROOT = Path(__file__).parent.parent
OURS = tuple(f"{ROOT / name}{os.sep}" for name in ("guided_diffusion", "evaluations", "tests"))
aten = th.ops.aten

INDEXING = {aten.index, aten.index_put_, aten._index_put_impl_}
# ops whose result, or its shape, the host has to know
WAITS = {
    aten._local_scalar_dense,
    aten._linalg_check_errors,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
}


class SimulatedGPU:
    """One GPU, as a context; nothing of it is left afterwards.

    calls: how often a network was called, whichever.
    waits: at each "file:function" of ours that led to waits for the device, the calls that these came after.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.waits: defaultdict[str, set[int]] = defaultdict(set)
        self.call: tuple[Any, ...] = ()  # what the present call from Python is given
        self.marks: dict[int, StorageWeakRef] = {}  # a weak reference also keeps an address from being used again
        self._pinned: dict[int, StorageWeakRef] = {}

    def __enter__(self) -> SimulatedGPU:
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            surface = _Surface(self)
            _patch(patch, self, surface)
            stack.enter_context(self._counted_calls())
            stack.enter_context(_Kernels(self))
            stack.enter_context(surface)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextlib.contextmanager
    def _counted_calls(self) -> Iterator[None]:
        """Count the calls of modules that no other module makes."""
        depth = 0

        def before(*_: Any) -> None:
            nonlocal depth
            self.calls, depth = self.calls + (depth == 0), depth + 1

        def after(*_: Any) -> None:
            nonlocal depth
            depth -= 1

        with (
            hooks.register_module_forward_pre_hook(before),
            hooks.register_module_forward_hook(after, always_call=True),
        ):
            yield

    def holds(self, tensor: th.Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return _address(tensor) in self.marks

    def place(self, value: Any, device: th.device) -> Any:
        """The same tensors, which are on the device from now on."""
        for tensor in _tensors(value):
            if device.type == "cuda":
                self.marks[_address(tensor)] = StorageWeakRef(tensor.untyped_storage())
            else:
                self.marks.pop(_address(tensor), None)
        return value

    def pin(self, value: Any) -> Any:
        """The same tensors, in page-locked memory from now on."""
        for tensor in _tensors(value):
            self._pinned[_address(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return value

    def is_pinned(self, tensor: th.Tensor) -> bool:
        """Whether a tensor is in page-locked memory."""
        return _address(tensor) in self._pinned

    def wait(self) -> None:
        """Note a wait at the place in our code that led to it."""
        self.waits[_place()].add(self.calls)

    def waits_per_step(self, steps: int) -> set[str]:
        """Where the host waited again and again: after as many calls of networks as there were steps, or more."""
        return {place for place, calls in self.waits.items() if len(calls) >= steps}


def _address(tensor: th.Tensor) -> int:
    """Of the storage; nothing above or below sees the question."""
    address: int = th._C._storage_address(tensor)
    return address


def _tensors(value: Any) -> list[th.Tensor]:
    """All tensors in tuples, lists and dicts."""
    if isinstance(value, th.Tensor):
        return [value]
    if not isinstance(value, list | tuple | dict):
        return []
    return [tensor for item in (value.values() if isinstance(value, dict) else value) for tensor in _tensors(item)]


def _place() -> str:
    """The innermost function of ours."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OURS) and path != __file__:
            return f"{os.path.basename(path)}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


class _Kernels(TorchDispatchMode):
    """Below autograd: results are where their inputs are."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what hides the method below from torch.compile costs more than it does

    def __init__(self, gpu: SimulatedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, kwargs or {}
        inputs = _tensors((args, kwargs))
        known = [_address(tensor) for tensor in inputs]
        on_gpu = [address in gpu.marks for address in known]
        if any(on_gpu):
            self._check(func, inputs, on_gpu, args, kwargs)
        # what autograd makes of no tensor at all belongs to the call that it is in
        device = CUDA if any(on_gpu or map(gpu.holds, _tensors(gpu.call))) else CPU
        result = func(*args, **kwargs)
        gpu.place([made for made in _tensors(result) if _address(made) not in known], device)
        return result

    def _check(self, func: Any, inputs: list[th.Tensor], on_gpu: list[bool], args: Any, kwargs: Any) -> None:
        op = func.overloadpacket
        if op in INDEXING:  # an index may come from the CPU; how many values a mask picks the GPU alone knows
            mixes, waits = not on_gpu[0], not all(on_gpu[1:]) or any(index.dtype == th.bool for index in inputs[1:])
        elif op is aten.copy_:
            mixes, waits = False, not (all(on_gpu) or kwargs.get("non_blocking", len(args) > 2 and args[2]))
        else:
            pairs = zip(inputs, on_gpu, strict=True)
            mixes, waits = any(not there and tensor.ndim for tensor, there in pairs if not tensor.is_meta), op in WAITS
        if mixes:
            places = [f"{list(tensor.shape)} on {tensor.device}" for tensor in inputs]
            raise RuntimeError(f"{func} mixes devices: {', '.join(places)}")
        if waits:
            self.gpu.wait()


class _Surface(TorchFunctionMode):
    """Above autograd: names of devices, and what leaves torch."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        answer = ANSWERS.get(name)
        if answer is not None:
            return answer(self, func, *args, **kwargs)
        pinned, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        if device is None and name.startswith("new_"):
            device = args[0].device
        device = None if device is None else th.device(device)
        if kwargs.get("generator") is not None:
            self._check_generator(kwargs["generator"], device or (_tensors(args)[0].device if _tensors(args) else CPU))
        result = self._called(func, args, kwargs, device)
        return self.gpu.pin(result) if pinned else result

    @staticmethod
    def _check_generator(generator: th.Generator, device: th.device) -> None:
        if generator.device.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found {generator.device}")

    def _called(self, func: Any, args: Any, kwargs: Any, device: th.device | None = None) -> Any:
        """The result of a call whose `device` is the real one; that of its tensors where it has none."""
        outer, self.gpu.call = self.gpu.call, (args, kwargs)
        if device is not None and device.type == "cuda":
            kwargs["device"] = CPU
            if func.__name__ in ("tensor", "as_tensor", "new_tensor"):
                self.gpu.wait()  # copied from memory that is not page-locked
        try:
            result = func(*args, **kwargs)
        finally:
            self.gpu.call = outer
        return result if device is None else self.gpu.place(result, device)

    def to(self, func: Any, tensor: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        named = [value for value in (*args, *kwargs.values()) if isinstance(value, th.device | str)]
        like = [value for value in (*args, *kwargs.values()) if isinstance(value, th.Tensor)]
        device = th.device(named[0]) if named else (like[0] if like else tensor).device
        args = tuple(CPU if isinstance(value, th.device | str) else value for value in args)
        kwargs = {key: CPU if isinstance(value, th.device | str) else value for key, value in kwargs.items()}
        if device.type == "meta":
            return func(tensor, device, *args[1:], **{k: v for k, v in kwargs.items() if k != "device"})
        return self._moved(func, tensor, args, kwargs, device)

    def cpu(self, func: Any, tensor: th.Tensor, **kwargs: Any) -> th.Tensor:
        return self._moved(func, tensor, (), kwargs, CPU)

    def cuda(self, func: Any, tensor: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        return self._moved(th.Tensor.to, tensor, (CPU,), {"non_blocking": kwargs.get("non_blocking", False)}, CUDA)

    def type_as(self, func: Any, tensor: th.Tensor, other: th.Tensor) -> th.Tensor:
        return self.to(th.Tensor.to, tensor, other)

    def as_tensor(self, func: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        device = th.device(kwargs.pop("device", None) or getattr(value, "device", CPU))
        if isinstance(value, th.Tensor):
            return self.to(th.Tensor.to, func(value, *args, **kwargs), device)
        return self._called(func, (value, *args), {**kwargs, "device": device}, device)

    def _moved(self, func: Any, tensor: th.Tensor, args: Any, kwargs: Any, device: th.device) -> th.Tensor:
        result: th.Tensor = func(tensor, *args, **kwargs)
        if tensor.device.type == device.type:
            return result
        if not (kwargs.get("non_blocking") or any(value is True for value in args)):
            self.gpu.wait()
        result = result.clone() if _address(result) == _address(tensor) else result
        placed: th.Tensor = self.gpu.place(result, device)
        return placed

    def pin_memory(self, func: Any, tensor: th.Tensor, *args: Any) -> th.Tensor:
        pinned: th.Tensor = self.gpu.pin(tensor.clone())
        return pinned

    def numpy(self, func: Any, tensor: th.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gpu.holds(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return func(tensor, *args, **kwargs)

    def read(self, func: Any, tensor: th.Tensor, **kwargs: Any) -> Any:
        if self.gpu.holds(tensor):
            self.gpu.wait()
        return func(tensor, **kwargs)


ANSWERS: dict[str, Callable[..., Any]] = {
    "is_pinned": lambda surface, _, tensor: surface.gpu.is_pinned(tensor),
    **{name: getattr(_Surface, name) for name in ("to", "cpu", "cuda", "type_as", "as_tensor")},
    "pin_memory": _Surface.pin_memory,
    **dict.fromkeys(("numpy", "__array__"), _Surface.numpy),
    **dict.fromkeys(("tolist", "__repr__"), _Surface.read),
}


class _Generator(th.Generator):
    """One of the CPU that says that it is of the GPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        generator = super().__new__(cls, "cpu")
        generator.shown = CUDA if th.device(device).type == "cuda" else CPU
        return generator

    @property
    def device(self) -> th.device:
        return self.shown


@contextlib.contextmanager
def _nothing(*_: Any) -> Iterator[None]:
    yield


def _patch(patch: pytest.MonkeyPatch, gpu: SimulatedGPU, surface: _Surface) -> None:
    """Let torch say that it has a GPU, and follow it into backward passes."""
    run_backward = th.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with surface:  # a mode is off inside of what it handles, and this runs hooks and functions of ours
            return run_backward(*args, **kwargs)

    patch.setattr(dist_util, "_device", None)
    patch.setattr(th.autograd, "_engine_run_backward", backward)
    patch.setattr(th, "Generator", _Generator)
    generator = _Generator(CUDA)
    state = th.zeros(16, dtype=th.uint8)
    real = th.Tensor.device
    where = lambda tensor: CUDA if gpu.holds(tensor) else real.__get__(tensor)  # noqa: E731
    patch.setattr(th.Tensor, "device", property(where))
    patch.setattr(th.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda"))
    patch.setattr(th.Tensor, "is_cpu", property(lambda tensor: tensor.device.type == "cpu"))
    constants = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "simulated",
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(name="simulated", major=9, minor=0, total_memory=1 << 36),
        "mem_get_info": (1 << 35, 1 << 36),
    }
    for name, value in constants.items():
        patch.setattr(th.cuda, name, lambda *_, value=value, **__: value)
    for name in ("init", "_lazy_init", "set_device", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state"):
        patch.setattr(th.cuda, name, lambda *_: None)
    patch.setattr(th.cuda, "get_rng_state", lambda *_: state)
    patch.setattr(th.cuda, "synchronize", lambda *_: gpu.wait())
    patch.setattr(th.cuda, "default_generators", (generator,))
    patch.setattr(th.cuda, "device", _nothing)
    patch.setattr(th.accelerator, "is_available", lambda *_: True)
    patch.setattr(th.accelerator, "current_accelerator", lambda **_: None)
