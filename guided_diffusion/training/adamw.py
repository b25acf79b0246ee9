"""AdamW for weights in any order of memory."""

from __future__ import annotations

from typing import Any

import torch as th

from .gradients import is_dense, laid_out_as


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
        there = [tensors for tensors in others if tensors and tensors[index].shape == param.shape]
        for tensors in there:
            tensors[index] = laid_out_as(tensors[index], param)
        if not param.is_contiguous():
            for tensors in (params, *there):
                tensors[index] = tensors[index].as_strided((param.numel(),), (1,))
