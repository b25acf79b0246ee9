"""Which precision this hardware is fastest in."""

from __future__ import annotations

from typing import NamedTuple

import torch as th


class Choice(NamedTuple):
    """A precision of `config.PRECISIONS`, and why."""

    precision: str
    reason: str


def fastest_precision(device: th.device | str) -> Choice:
    """The precision that networks train and sample in fastest on a device, without a loss of quality."""
    device = th.device(device)
    if device.type == "cuda":
        return _of_gpu(device)
    if device.type == "cpu":
        return _of_cpu()
    return Choice("fp32", f"nothing is known of lower precisions on {device.type}")


def _of_gpu(device: th.device) -> Choice:
    name = th.cuda.get_device_name(device)
    with th.cuda.device(device):
        native = th.cuda.is_bf16_supported(including_emulation=False)
    if native:
        return Choice("bf16", f"{name} computes in it and it has the range of fp32")
    return Choice("fp16", f"{name} does not compute in bf16")


def _of_cpu() -> Choice:
    # AVX512_BF16 alone does not make up for what the conversions cost: 0.7 to 0.8 of the speed of fp32 was measured.
    if not (th.backends.mkldnn.is_available() and _has_matrix_unit()):
        return Choice("fp32", "this CPU has no matrix unit for bf16 (AMX), without which bf16 is slower")
    return Choice("bf16", "this CPU has a matrix unit for it (AMX)")


def _has_matrix_unit() -> bool:
    supported = getattr(th.cpu, "_is_amx_tile_supported", None)  # torch has no public name for it before 2.13
    return bool(supported is not None and supported())
