"""Mixed precision: a network that computes in fp16 or bf16, with fp32 master weights for its optimizer.

Shapes: masters and their gradients have the shapes of the parameters, in parameter order. The flat layout of
`make_master_params` (one vector of all biases and gains, one [1, M] row of all matrices) is that of older fp16 runs.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np  # noqa: F401
import torch as th
import torch.nn as nn
from torch.nn.utils import get_total_norm

from . import logger
from .config import resolve_precision
from .nn import convert_module_to_f16 as convert_module_to_f16, convert_module_to_f32 as convert_module_to_f32
from .runtime.errors import refuse

INITIAL_LOG_LOSS_SCALE = 20.0

Pairs = Sequence[tuple[th.Tensor, th.Tensor]]
NamedParams = list[tuple[str, th.Tensor]]
Groups = Sequence[tuple[NamedParams, Any]]  # (named parameters, shape of their flat master)


def param_grad_or_zeros(param: th.Tensor) -> th.Tensor:
    """The gradient of a parameter, or zeros where it took no part."""
    return th.zeros_like(param) if param.grad is None else param.grad.detach()


def zero_grad(model_params: Iterable[th.Tensor]) -> None:
    """Set gradients to zero in place, keeping their memory."""
    for param in model_params:
        if param.grad is not None:
            param.grad = param.grad.detach().zero_()


def zero_master_grads(master_params: Iterable[th.Tensor]) -> None:
    """Drop the gradients of the masters."""
    for param in master_params:
        param.grad = None


def check_overflow(value: float) -> bool:
    """Whether a number is infinite or not a number."""
    return not math.isfinite(value)


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, th.Tensor]]) -> list[tuple[NamedParams, Any]]:
    """[(vectors and scalars, -1), (matrices, (1, -1))]: which parameters share a flat master, and its shape."""
    vectors: NamedParams = []
    matrices: NamedParams = []
    for name, param in named_model_params:
        (matrices if param.ndim > 1 else vectors).append((name, param))
    return [(vectors, -1), (matrices, (1, -1))]


def _flat(tensors: Iterable[th.Tensor], shape: Any) -> th.Tensor:
    return th.cat([tensor.detach().float().flatten() for tensor in tensors]).view(shape)


def make_master_params(param_groups_and_shapes: Groups) -> list[nn.Parameter]:
    """One flat fp32 copy per group of parameters."""
    return [nn.Parameter(_flat((param for _, param in group), shape)) for group, shape in param_groups_and_shapes]


def unflatten_master_params(param_group: NamedParams, master_param: th.Tensor) -> list[th.Tensor]:
    """Views of a flat master with the shapes of its parameters."""
    pieces = master_param.flatten().split([param.numel() for _, param in param_group])
    return [piece.view_as(param) for piece, (_, param) in zip(pieces, param_group, strict=True)]


def _pairs(groups: Groups, masters: Sequence[th.Tensor]) -> Iterator[tuple[str, th.Tensor, th.Tensor]]:
    """(name, parameter, its part of the flat masters)."""
    for (group, _), master in zip(groups, masters, strict=True):
        for (name, param), part in zip(group, unflatten_master_params(group, master), strict=True):
            yield name, param, part


def model_grads_to_master_grads(param_groups_and_shapes: Groups, master_params: Sequence[th.Tensor]) -> None:
    """Collect the gradients of each group in its flat master, in fp32."""
    for (group, shape), master in zip(param_groups_and_shapes, master_params, strict=True):
        master.grad = _flat((param_grad_or_zeros(param) for _, param in group), shape)


def master_params_to_model_params(param_groups_and_shapes: Groups, master_params: Sequence[th.Tensor]) -> None:
    """Write flat masters back into the parameters, in the precision that these have."""
    for _, param, part in _pairs(param_groups_and_shapes, master_params):
        param.detach().copy_(part.detach())


def master_params_to_state_dict(
    model: nn.Module, param_groups_and_shapes: Groups | None, master_params: Sequence[th.Tensor], use_fp16: bool
) -> dict[str, Any]:
    """The model's state dict with the values of the masters: flat ones with `use_fp16`, else one per parameter."""
    state = model.state_dict()
    if use_fp16:
        state.update((name, part) for name, _, part in _pairs(param_groups_and_shapes or (), master_params))
    else:
        state.update(zip((name for name, _ in model.named_parameters()), master_params, strict=True))
    return state


def state_dict_to_master_params(
    model: nn.Module, state_dict: Mapping[str, th.Tensor], use_fp16: bool
) -> Sequence[th.Tensor]:
    """Masters with the values of a state dict: flat ones with `use_fp16`, else one per parameter."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    return make_master_params(get_param_groups_and_shapes(named)) if use_fp16 else [value for _, value in named]


def alike(one: th.Tensor, other: th.Tensor) -> bool:
    """Whether two tensors of one shape have the same strides, along axes of more than one."""
    return all(size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True))


def laid_out_as(value: th.Tensor, like: th.Tensor) -> th.Tensor:
    """A tensor in the order of memory of another one of its shape; the tensor itself where it has it.

    Kernels over many tensors at once take their fast way where weights, gradients and moments lie alike in memory;
    torch's fused AdamW on a CPU is right only there.
    """
    return value if alike(value, like) else th.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


class Gradients:
    """The gradients of one process, each moved to its fp32 master and added up as soon as autograd has it.

    So the model's own gradients are never held all at once.

    :param pairs: (parameter, its master) of all that is trained; the same tensor twice where it is its own master.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self._collects, self._last = pairs, False, False
        self._loss: th.Tensor | None = None
        for index in self._watched():
            handle = pairs[index][0].register_post_accumulate_grad_hook(self._hook(index))
            weakref.finalize(self, handle.remove)

    def _watched(self) -> list[int]:
        return [index for index, (param, master) in enumerate(self.pairs) if param is not master]

    def _hook(self, index: int) -> Callable[[th.Tensor], None]:
        """Moves gradient `index`, as long as this object is there: a model may outlive its trainers."""
        reference = weakref.ref(self)

        def arrived(_: th.Tensor) -> None:
            gradients = reference()
            if gradients is not None and gradients._collects:
                gradients._arrived(index)

        return arrived

    def reset(self) -> None:
        """Forget all gradients, and the loss."""
        self._loss = None
        for param, master in self.pairs:
            param.grad = master.grad = None

    @contextmanager
    def collecting(self, loss: th.Tensor, *, last: bool) -> Iterator[None]:
        """Around a backward pass; gradients of other passes are left alone.

        :param loss: [], which is added up as the gradients are.
        :param last: no other pass follows before `finish`.
        """
        value = loss.detach().reshape(())
        self._loss = value if self._loss is None else self._loss + value
        self._collects, self._last = True, last
        try:
            yield
        finally:
            self._collects = False

    def _arrived(self, index: int) -> None:
        self._move(index)

    def _move(self, index: int) -> None:
        """Add the gradient of a parameter to its master's, and let go of it."""
        param, master = self.pairs[index]
        if param.grad is None or param is master:
            return
        if master.grad is None:
            master.grad = laid_out_as(param.grad.to(master.dtype), master)
        else:
            master.grad.add_(param.grad)
        param.grad = None

    def finish(self) -> tuple[list[th.Tensor], th.Tensor]:
        """The gradients of all masters, zeros for one that took no part, and the loss []."""
        for index, (_, master) in enumerate(self.pairs):
            self._move(index)  # what came without `collecting`
            if master.grad is None:
                master.grad = th.zeros_like(master)
        return self._found(), self._total()

    def _found(self) -> list[th.Tensor]:
        return [master.grad for _, master in self.pairs if master.grad is not None]

    def _total(self) -> th.Tensor:
        """The loss of all passes; 0 where there was none."""
        return self.pairs[0][1].new_zeros(()) if self._loss is None else self._loss


def convert(model: nn.Module, precision: str) -> None:
    """Let a network compute in a precision, by its own convert_to or convert_to_fp16."""
    convert_to, convert_to_fp16 = (getattr(model, name, None) for name in ("convert_to", "convert_to_fp16"))
    if convert_to is not None:
        convert_to(precision)
    elif precision == "fp16" and convert_to_fp16 is not None:
        convert_to_fp16()
    else:
        raise TypeError(f"{type(model).__name__} cannot train in {precision}: it has no method convert_to(precision)")


class MixedPrecisionTrainer:
    """Backward passes and optimizer steps of a model in fp32, fp16 (with a loss scale) or bf16.

    `master_params` are what an optimizer trains, in parameter order: the model's own parameters where these are fp32,
    an fp32 copy of each other one, with its strides. Gradients of several backward passes add up in fp32. A step in
    which a loss, a gradient or a weight is not finite is skipped; `fault` then names which of the three, and
    is '' otherwise.

    :param precision: fp32, fp16 or bf16; '' is what `use_fp16` says.
    :param grad_clip: the largest norm of the gradient that is not scaled down; 0: no clipping.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        precision: str = "",
        grad_clip: float = 0.0,
    ) -> None:
        self.model = model
        self.precision = resolve_precision(precision, use_fp16)
        self.use_fp16 = self.precision == "fp16"
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.grad_clip = grad_clip
        self.fault, self.only_scaled = "", False
        self._loss: th.Tensor | None = None  # of the backward passes whose gradients the masters have
        self.model_params = list(model.parameters())
        self.master_params = self._make_masters()
        pairs = zip(self.model_params, self.master_params, strict=True)
        self._trained = [(param, master) for param, master in pairs if param.requires_grad]
        refuse((not self._trained, "the model has no parameter that requires a gradient: nothing can be trained"))
        self.gradients = self._make_gradients()

    def _make_gradients(self) -> Gradients:
        return Gradients(self._trained)

    def _make_masters(self) -> list[nn.Parameter]:
        if self.precision == "fp32":
            odd = {str(param.dtype) for param in self.model_params} - {"torch.float32", "torch.float64"}
            found = f"the model has parameters of {' and '.join(odd)}"
            refuse((odd, f"{found} but precision is fp32: call convert_to_fp32()"))
            return self.model_params
        # Copied before the conversion, or the masters would start from rounded values.
        copies = [param.detach().float().clone() for param in self.model_params]
        convert(self.model, self.precision)
        return [
            param if param.dtype == th.float32 else nn.Parameter(laid_out_as(copy, param), param.requires_grad)
            for param, copy in zip(self.model_params, copies, strict=True)
        ]

    @property
    def param_groups_and_shapes(self) -> list[tuple[NamedParams, Any]] | None:
        """The layout of `master_params` for the functions above, a group each; None where they are no copies."""
        if self.precision == "fp32":
            return None
        return [([(name, param)], param.shape) for name, param in self.model.named_parameters()]

    def trained(self, values: Sequence[th.Tensor] | None = None) -> list[th.Tensor]:
        """Of one value per parameter, by default its master, those of the parameters that are trained."""
        pairs = zip(self.master_params if values is None else values, self.master_params, strict=True)
        return [value for value, master in pairs if master.requires_grad]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for param in self.model_params:
            param.grad = None
        self.gradients.reset()

    def backward(self, loss: th.Tensor, *, last: bool = False) -> None:
        """Add the gradients of a scalar loss to those of the masters.

        :param last: no other call follows before `optimize`: ranks begin to average while this one goes on.
        """
        with self.gradients.collecting(loss.float(), last=last):
            (loss * 2.0**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def _gradients(self) -> tuple[list[th.Tensor], th.Tensor]:
        """The gradients of all trained masters, no longer scaled, and the loss."""
        grads, loss = self.gradients.finish()
        if self.use_fp16:
            th._foreach_mul_(grads, 2.0**-self.lg_loss_scale)
        return grads, loss.float()

    @th.no_grad()
    def optimize(self, opt: th.optim.Optimizer) -> bool:
        """Let `opt` step on the masters and copy them to the model.

        :return: False if something was not finite: then nothing changed but the loss scale.
        """
        (_, self._loss), self.fault = self._gradients(), ""
        taken = bool((self._optimize_fp16 if self.use_fp16 else self._optimize_normal)(opt))
        self._loss = None
        if taken:
            self.only_scaled = False
            self.sync_model()
            self.lg_loss_scale += self.fp16_scale_growth if self.use_fp16 else 0
        return taken

    def _optimize_fp16(self, opt: th.optim.Optimizer) -> bool:
        """As `_optimize_normal`, with the loss scale in the log; the gradients are no longer scaled."""
        logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        return MixedPrecisionTrainer._optimize_normal(self, opt)

    def _optimize_normal(self, opt: th.optim.Optimizer) -> bool:
        """Step on the masters, whose gradients are those of all ranks, if everything is finite."""
        loss = self._gradients()[1] if self._loss is None else self._loss
        mean, grad_norm, param_norm = self._measures(loss).tolist()  # the step's one wait for the device
        # A norm overflows long before what it is the norm of does: weights and averages never take such a value.
        numbers = {"weight norm": param_norm, "loss": mean, "gradient": grad_norm}
        self.fault = next((name for name, value in numbers.items() if check_overflow(value)), "")
        if self.fault:
            return self._skip()
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)
        if 0 < self.grad_clip < grad_norm:
            th._foreach_mul_(self._grads(), self.grad_clip / grad_norm)
        opt.step()
        return True

    def _grads(self) -> list[th.Tensor]:
        return [master.grad for _, master in self._trained if master.grad is not None]

    @th.no_grad()
    def _compute_norms(self, grad_scale: float = 1.0) -> tuple[th.Tensor, th.Tensor]:
        """The norms [] of the gradients that the masters have, divided by grad_scale, and of the masters."""
        grads, weights = self._grads(), [master for _, master in self._trained]
        return get_total_norm(grads) / grad_scale, get_total_norm(weights)

    def _measures(self, loss: th.Tensor) -> th.Tensor:
        """[3]: the loss, and the norms of gradients and weights."""
        return th.stack([loss, *(th.as_tensor(norm).to(loss) for norm in self._compute_norms())])

    def _skip(self) -> bool:
        message = f"step skipped: its {self.fault} is not finite"
        self.only_scaled = self.use_fp16 and self.fault == "gradient" and self.lg_loss_scale > 0
        if self.use_fp16:
            self.lg_loss_scale = max(0.0, self.lg_loss_scale - 1.0)
            message += f"; lg_loss_scale is now {self.lg_loss_scale:.6g}"
        if self.use_fp16 and self.lg_loss_scale == 0:
            message += " and falls no further: fp16 does not hold these numbers, but bf16 may"
        logger.log(message)
        self.zero_grad()
        return False

    @th.no_grad()
    def sync_model(self) -> None:
        """Copy the masters to the model, in the model's precision."""
        both = zip(self.model_params, self.master_params, strict=True)
        pairs = [(param.detach(), master) for param, master in both if param is not master]
        if pairs:
            th._foreach_copy_([param for param, _ in pairs], [master for _, master in pairs])

    def master_params_to_state_dict(self, master_params: Sequence[th.Tensor]) -> dict[str, Any]:
        """The model's fp32 state dict with these values (the masters themselves, or a moving average of them)."""
        return master_params_to_state_dict(self.model, None, master_params, use_fp16=False)

    def state_dict_to_master_params(self, state_dict: Mapping[str, th.Tensor]) -> Sequence[th.Tensor]:
        """The parameters of a state dict as fp32 tensors, in parameter order and with the strides of the masters."""
        values = state_dict_to_master_params(self.model, state_dict, use_fp16=False)
        pairs = zip(values, self.master_params, strict=True)
        return [laid_out_as(value.detach().to(master.device, th.float32), master) for value, master in pairs]

    def weights_for_files(self, master_params: Sequence[th.Tensor]) -> dict[str, Any]:
        """`master_params_to_state_dict` on rank 0, which writes files; every rank must call it."""
        return self.master_params_to_state_dict(master_params)

    def state_for_files(self, opt: th.optim.Optimizer) -> dict[str, Any]:
        """The state dict of an optimizer of the masters on rank 0; every rank must call it."""
        return opt.state_dict()

    def state_from_files(self, state: Mapping[int, Mapping[str, Any]]) -> Mapping[int, Mapping[str, Any]]:
        """What `state_for_files` has under "state", as an optimizer of the masters takes it."""
        return state

    def plain_model(self, values: Sequence[th.Tensor] | None) -> nn.Module:
        """A network to look at: a copy with the values of a moving average; None: the model as it is."""
        if values is None:
            return self.model
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.master_params_to_state_dict(values))
        return model

    def state_dict(self) -> dict[str, float]:
        """The loss scale, which a resumed run needs beside the weights."""
        return {"lg_loss_scale": self.lg_loss_scale} if self.use_fp16 else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the loss scale of `state_dict`, where there is one."""
        self.lg_loss_scale = state.get("lg_loss_scale", self.lg_loss_scale)
