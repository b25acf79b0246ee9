"""Gradients on their way from a backward pass to the optimizer: moved to fp32, added up, averaged over the ranks.

Each is moved as soon as autograd has it, so that the model's own gradients are never held all at once. On several
ranks those of a bucket are averaged while the backward pass goes on with the others, in the precision of the masters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

BUCKET = 2**22  # values per all-reduce: enough to fill a link, few enough for the last one, which nothing hides
ALIGNED = 4  # values: a gradient begins at a multiple of them, for kernels that read 16 bytes at once

Pairs = Sequence[tuple[th.Tensor, th.Tensor]]


def _alike(one: th.Tensor, other: th.Tensor) -> bool:
    """Whether two tensors of one shape have the same strides, along axes of more than one."""
    return all(size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True))


def is_dense(value: th.Tensor) -> bool:
    """Whether a tensor has its numbers in memory once each and without gaps, in whatever order."""
    return _alike(value, th.empty_like(value, device="meta"))


def laid_out_as(value: th.Tensor, like: th.Tensor) -> th.Tensor:
    """A tensor in the order of memory of another one of its shape; the tensor itself where it has it.

    Kernels over many tensors at once take their fast way where weights, gradients and moments lie alike in memory;
    torch's fused AdamW on a CPU is right only there.
    """
    return value if _alike(value, like) else th.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


class AdamW(th.optim.AdamW):
    """torch's, whose fused kernel for CPUs takes all tensors by their memory, and copies what is not contiguous first.

    Here they lie in memory as their parameter does, and those of channels-last weights are given to it as rows: the
    same numbers in half of the time. A parameter with gaps in its memory, such as a part of another tensor, keeps its
    group from the fused kernel, which would write into the gaps.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        group["fused"] = group["fused"] and all(map(is_dense, group["params"]))
        if group["fused"]:
            self._lay_out(group["params"])
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        if group["fused"]:
            _align(*[tensors for tensors in lists if isinstance(tensors, list)])
        return has_complex

    def _lay_out(self, params: list[th.Tensor]) -> None:
        """Replace the moments that do not lie as their parameter: what is loaded lies as it did in its file."""
        for param in params:
            state = self.state.get(param, {})
            for key, value in state.items():
                if th.is_tensor(value) and value.shape == param.shape and value.stride() != param.stride():
                    state[key] = laid_out_as(value, param)


def _align(params: list[th.Tensor], *others: list[th.Tensor]) -> None:
    """Replace what the lists hold for parameters on a CPU: one place of each list is one parameter's."""
    for index, param in enumerate(params):
        if param.device.type != "cpu":
            continue
        states = [tensors for tensors in others if tensors and tensors[index].shape == param.shape]
        for tensors in states:
            tensors[index] = laid_out_as(tensors[index], param)
        if not param.is_contiguous():
            for tensors in (params, *states):
                tensors[index] = tensors[index].as_strided((param.numel(),), (1,))


# ---- from a backward pass to the optimizer


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class Gradients:
    """The gradients of one process, or the means of those of all ranks, the same bits on each.

    A bucket is sent when the last backward pass has all of its gradients and the buckets before it are on their way:
    in the same order on every rank, last parameters first, as a backward pass reaches them.

    :param pairs: (parameter, its master) of all that is trained; the same tensor twice where it is its own master.
    :param averaged: over the ranks; every rank must call `finish`.
    """

    def __init__(self, pairs: Pairs, *, averaged: bool = False) -> None:
        self.pairs, self._collects, self._last, self._sent = pairs, False, False, 0
        self._loss: th.Tensor | None = None
        groups = _grouped(pairs) if averaged else ()
        self._buckets = [_Bucket({index: pairs[index][1] for index in group}) for group in groups]
        self._bucket_of = {index: bucket for bucket in self._buckets for index in bucket.missing}
        handles = [pairs[index][0].register_post_accumulate_grad_hook(self._hook(index)) for index in self._watched()]
        weakref.finalize(self, _remove, handles)

    def _watched(self) -> list[int]:
        """The gradients that are moved when autograd has them: of one process in fp32 none is."""
        return [index for index, (param, master) in enumerate(self.pairs) if self._buckets or param is not master]

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
        self._sent = 0
        for bucket in self._buckets:
            bucket.begin()
            bucket.vector = None

    @contextmanager
    def collecting(self, loss: th.Tensor, *, last: bool) -> Iterator[None]:
        """Around a backward pass; gradients of other passes are left alone.

        :param loss: [], which is added up and averaged as the gradients are.
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
        bucket = self._bucket_of.get(index)
        if bucket is not None and bucket.work is not None:
            raise RuntimeError(
                "a gradient came after its bucket was sent to other ranks: only one pass can be the last"
            )
        self._move(index)
        if bucket is not None and self._last:
            bucket.missing.discard(index)
            self._send()

    def _move(self, index: int) -> None:
        """Add the gradient of a parameter to its master's, and let go of it."""
        (param, master), bucket = self.pairs[index], self._bucket_of.get(index)
        grad = param.grad
        if grad is None or (bucket is None and param is master):
            return
        if param is not master and master.grad is not None:
            master.grad.add_(grad)
        elif bucket is None:
            master.grad = laid_out_as(grad.to(master.dtype), master)
        else:
            part = bucket.part(index)
            master.grad = part if part.data_ptr() == grad.data_ptr() else part.copy_(grad)
        if param is not master:
            param.grad = None

    def _send(self, *, unready: bool = False) -> None:
        """Send the next buckets that have all of their gradients, or, with `unready`, all that are left."""
        while self._sent < len(self._buckets) and (unready or not self._buckets[self._sent].missing):
            self._buckets[self._sent].send(self._total())
            self._sent += 1

    def finish(self) -> tuple[list[th.Tensor], th.Tensor]:
        """The gradients of all masters, zeros for one that took no part, and the loss []."""
        for index, (_, master) in enumerate(self.pairs):
            self._move(index)  # what came without `collecting`
            if master.grad is None and not self._buckets:
                master.grad = th.zeros_like(master)
        loss = self._average() if self._buckets else self._total()
        return [master.grad for _, master in self.pairs if master.grad is not None], loss

    def _average(self) -> th.Tensor:
        """Wait for the buckets, and divide them; returns the loss."""
        self._send(unready=True)
        vectors = [bucket.wait() for bucket in self._buckets]
        th._foreach_div_(vectors, float(dist.get_world_size()))
        self._sent = 0
        return vectors[0][0]

    def _total(self) -> th.Tensor:
        """The loss of all passes; 0 where there was none."""
        return self.pairs[0][1].new_zeros(()) if self._loss is None else self._loss


class _Bucket:
    """Gradients that travel together: parts of one vector, which is there from the first of them to the end of a step.

    :param masters: by index, in the order in which a backward pass reaches them; of one dtype, on one device.
    """

    def __init__(self, masters: dict[int, th.Tensor]) -> None:
        self._masters = masters
        self._starts, self._size = {}, ALIGNED  # the first few values are for the loss
        for index, master in masters.items():
            self._starts[index] = self._size
            self._size += -(-master.numel() // ALIGNED) * ALIGNED
        self.vector: th.Tensor | None = None
        self.begin()

    def begin(self) -> None:
        """Expect all gradients again."""
        self.missing = set(self._masters)
        self.work: dist.Work | None = None

    def flat(self) -> th.Tensor:
        """The vector; made when it is first asked for, so that the forward pass has the memory."""
        if self.vector is None:
            like = next(iter(self._masters.values()))
            self.vector = th.empty(self._size, dtype=like.dtype, device=like.device)
        return self.vector

    def part(self, index: int) -> th.Tensor:
        """Where a gradient belongs, with the shape and the strides of its master."""
        master = self._masters[index]
        strides = th.empty_like(master, device="meta").stride()  # of memory without gaps, whatever the master's is
        return self.flat().as_strided(master.shape, strides, self._starts[index])

    def send(self, loss: th.Tensor) -> None:
        """Begin to add up over the ranks: the gradients, zeros for one that took no part, and a loss []."""
        for index, master in self._masters.items():
            if master.grad is None:
                master.grad = self.part(index).zero_()
        flat = self.flat()
        flat[0] = loss
        self.work = dist.all_reduce(flat, async_op=True)

    def wait(self) -> th.Tensor:
        """The sums, when they are there; then it begins again."""
        assert self.work is not None
        self.work.wait()
        self.begin()
        return self.flat()


def _grouped(pairs: Pairs) -> Iterator[list[int]]:
    """The gradients that share a bucket, by index."""
    group: list[int] = []
    for index in reversed(range(len(pairs))):
        master = pairs[index][1]
        kinds = {(pairs[i][1].dtype, pairs[i][1].device) for i in (*group, index)}
        if group and (len(kinds) > 1 or sum(pairs[i][1].numel() for i in group) + master.numel() > BUCKET):
            yield group
            group = []
        group.append(index)
    yield group
