"""The gradients of several ranks on their way to the optimizer, averaged in fp32; and torch's AdamW, faster on a CPU.

Those of a bucket are averaged while the backward pass goes on with the others, in the precision of the masters:
torch's DistributedDataParallel would do it in the precision of the weights, and would wrap the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch as th
import torch.distributed as dist

from ..fp16_util import Gradients, MixedPrecisionTrainer, Pairs, alike, laid_out_as

BUCKET = 2**22  # values per all-reduce: enough to fill a link, few enough for the last one, which nothing hides
ALIGNED = 4  # values: a gradient begins at a multiple of them, for kernels that read 16 bytes at once


class AdamW(th.optim.AdamW):
    """torch's, whose fused kernel for CPUs takes all tensors by their memory, and copies what is not contiguous first.

    Here they lie in memory as their parameter does, and those of channels-last weights are given to it as rows: the
    same numbers in half of the time. A parameter with gaps in its memory, such as a part of another tensor, keeps its
    group from the fused kernel, which would write into the gaps.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        group["fused"] = group["fused"] and all(alike(p, th.empty_like(p, device="meta")) for p in group["params"])
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


class AveragedGradients(Gradients):
    """The means of the gradients of all ranks, the same bits on each; every rank must call `finish`.

    A bucket is sent when the last backward pass has all of its gradients and the buckets before it are on their way:
    in the same order on every rank, last parameters first, as a backward pass reaches them.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._buckets = [_Bucket({index: pairs[index][1] for index in group}) for group in grouped(pairs)]
        self._bucket_of = {index: bucket for bucket in self._buckets for index in bucket.missing}
        self._sent = 0
        super().__init__(pairs)

    def _watched(self) -> list[int]:
        return list(range(len(self.pairs)))

    def reset(self) -> None:
        super().reset()
        self._sent = 0
        for bucket in self._buckets:
            bucket.begin()
            bucket.vector = None

    def _arrived(self, index: int) -> None:
        bucket = self._bucket_of[index]
        if bucket.work is not None:
            raise RuntimeError(
                "a gradient came after its bucket was sent to other ranks: only one pass can be the last"
            )
        self._move(index)
        if self._last:
            bucket.missing.discard(index)
            self._send()

    def _move(self, index: int) -> None:
        (param, master), grad = self.pairs[index], self.pairs[index][0].grad
        if grad is None:
            return
        if param is not master and master.grad is not None:
            master.grad.add_(grad)
        else:
            part = self._bucket_of[index].part(index)
            master.grad = part if part.data_ptr() == grad.data_ptr() else part.copy_(grad)
        if param is not master:
            param.grad = None

    def _send(self, *, unready: bool = False) -> None:
        """Send the next buckets that have all of their gradients, or, with `unready`, all that are left."""
        while self._sent < len(self._buckets) and (unready or not self._buckets[self._sent].missing):
            self._buckets[self._sent].send(self._total())
            self._sent += 1

    def finish(self) -> tuple[list[th.Tensor], th.Tensor]:
        for index in range(len(self.pairs)):
            self._move(index)  # what came without `collecting`
        self._send(unready=True)
        vectors = [bucket.wait() for bucket in self._buckets]
        th._foreach_div_(vectors, float(dist.get_world_size()))
        self._sent = 0
        return self._found(), vectors[0][0]


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


def grouped(pairs: Pairs) -> Iterator[list[int]]:
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


class AveragingTrainer(MixedPrecisionTrainer):
    """A trainer whose gradients are the means over all ranks; every rank must call `optimize`, and skips the same."""

    def _make_gradients(self) -> Gradients:
        return AveragedGradients(self._trained)
