"""Networks compiled to machine code: every call is one graph, made before the first call of each shape.

Compiling takes minutes on a CPU, so it pays for long runs alone. The code is cached for the next run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch as th
import torch._functorch.config as autograd_config
from torch import nn

from ..runtime.errors import UserError, refuse
from ..runtime.files import cache_folder

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # the compiler's own variable
SHAPES = 64  # that all networks together may be compiled for: their calls are one function to the compiler
Key = tuple[Any, ...]
Log = Callable[[str], object]


def compile_network(
    network: nn.Module, name: str, *, sampling: bool = False, backend: str = "inductor", log: Log = print
) -> Callable[..., Any]:
    """Compile the calls of a network in place; parameters and their names stay, and copies of it are not compiled.

    :param name: of the network, for the lines that `log` takes before and after its first call.
    :param sampling: freezes the parameters, for calls whose output and perhaps its gradient by the input are used. On
        a CPU they become constants of the code where no gradient is needed. On a GPU the launches of a call are
        recorded once and replayed (CUDA graphs); in training the gradients of the parameters would lie in the memory
        of such a record, which the next microbatch overwrites.
    :raises ValueError: if there is no compiler.
    """
    device = next(network.parameters()).device
    if backend == "inductor":
        _check_compiler(device)
    th._dynamo.config.recompile_limit = max(th._dynamo.config.recompile_limit, SHAPES)
    if sampling:
        network.requires_grad_(False)
        # Guidance and likelihoods go back through a graph twice; its backward pass is made when it is first needed.
        autograd_config.donated_buffer = False
    # The place that torch.nn.Module.compile uses: copies and files of the module leave it out.
    network._compiled_call_impl = compiled = _Compiled(network, name, device.type, backend, sampling, log)
    return compiled


class _Compiled:
    """The compiled call of a network, which logs when it is compiled."""

    def __init__(self, network: nn.Module, name: str, device: str, backend: str, sampling: bool, log: Log) -> None:
        self.network, self.name, self.log = network, name, log
        self.folder = use_cache() if backend == "inductor" else ""  # first: the compiler sets its own
        self.recorded = sampling and device == "cuda"  # outputs lie in memory that the next call overwrites
        self.constants = sampling and device == "cpu" and backend == "inductor"
        mode = "reduce-overhead" if self.recorded else None
        self.call: Callable[..., Any] = th.compile(
            network._call_impl, backend=backend, fullgraph=True, dynamic=False, mode=mode
        )
        self.known: set[Key] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, th.Tensor)]
        shapes = [(tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for tensor in tensors]
        key = (self.network.training, th.is_grad_enabled(), *shapes)
        out = self.call(*args, **kwargs) if key in self.known else self._first(key, args, kwargs)
        return out.clone() if self.recorded else out

    def _first(self, key: Key, args: Any, kwargs: Any) -> Any:
        kept = f", and is kept in {self.folder}" if self.folder else ""
        twice = ", and as many for its backward pass" if th.is_grad_enabled() else ""
        sizes = "x".join(map(str, key[2][0])) if key[2:] else "no tensors"
        self.log(f"compiling {self.name} for {sizes}, which may take minutes{twice}{kept}")
        began = time.monotonic()
        try:
            with th._inductor.config.patch(freezing=True) if self.constants else nullcontext():
                out = self.call(*args, **kwargs)
        except (th._dynamo.exc.TorchDynamoException, th._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{self.name} could not be compiled ({reason}): leave out --compile") from error
        self.log(f"compiled {self.name}: its first call took {time.monotonic() - began:.1f} s")
        self.known.add(key)
        return out


@contextmanager
def eagerly(network: nn.Module) -> Iterator[None]:
    """Inside, the calls of a network run as if `compile_network` had not been there."""
    compiled, network._compiled_call_impl = network._compiled_call_impl, None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled


@contextmanager
def evaluating(network: Callable[..., Any]) -> Iterator[None]:
    """The network in evaluation mode, and afterwards every module as it was."""
    modes = [(module, module.training) for module in network.modules()] if isinstance(network, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def use_cache() -> str:
    """The folder of the compiler's cache, ours where the user has set none."""
    return os.environ.setdefault(CACHE, os.path.join(cache_folder(), "compiled"))


def _check_compiler(device: th.device) -> None:
    """:raises ValueError: if something that the compiler needs is missing."""
    program = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    without_triton = device.type == "cuda" and importlib.util.find_spec("triton") is None
    without_compiler = shutil.which(program.split()[0]) is None
    refuse(
        (device.type not in ("cpu", "cuda"), f"--compile is for cpu and cuda, not for {device.type}: leave it out"),
        (
            without_triton,
            "--compile needs the package triton on cuda, which is not installed: leave it out, or install",
        ),
        (
            without_compiler,
            f"--compile needs a C++ compiler, and there is no {program}: name one in $CXX, or leave it out",
        ),
    )
