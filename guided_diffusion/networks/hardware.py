"""The precision that this hardware is fastest in."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch as th

from .blocks import WIDE, ResBlock, cast_convolutions

GAIN = 1.1  # how much faster 16 bits must be: a smaller gain may be that of another process on the machine
NARROWEST, WIDEST, PIXELS = 32, 256, 2048  # channels that are measured; channels times pixels of a side
TURNS, SECONDS = 8, 0.4  # steps in each precision, fewer where they take longer together
MEASURED: dict[int, dict[str, float]] = {}  # on the CPU in this process: channels -> precision -> seconds


class Choice(NamedTuple):
    """A precision of `config.PRECISIONS`, and why."""

    precision: str
    reason: str


def fastest_precision(device: th.device | str, width: int = 128) -> Choice:
    """The precision that networks train and sample in fastest on a device, without a loss of quality.

    On a CPU it is measured, once per process and width.

    :param width: channels of the network's first level.
    """
    device = th.device(device)
    if device.type == "cuda":
        name = th.cuda.get_device_name(device)
        with th.cuda.device(device):
            native = th.cuda.is_bf16_supported(including_emulation=False)
        if native:
            return Choice("bf16", f"{name} computes in it and it has the range of fp32")
        return Choice("fp16", f"{name} does not compute in bf16")
    if device.type != "cpu":
        return Choice("fp32", f"nothing is known of lower precisions on {device.type}")
    width = max(NARROWEST, min(width, WIDEST)) // 32 * 32
    seconds = MEASURED[width] = MEASURED.get(width) or _measured(width)
    return Choice(
        "bf16" if seconds["bf16"] * GAIN < seconds["fp32"] else "fp32",
        f"a block of {width} channels took {1e3 * seconds['bf16']:.3g} ms in bf16 and {1e3 * seconds['fp32']:.3g} ms "
        "in fp32 on this CPU, forward and backward",
    )


def _measured(width: int) -> dict[str, float]:
    """The least seconds of a forward and a backward pass of a block, after one that is not counted, taken in turns."""
    side, turns = PIXELS // width, list[dict[str, float]]()
    with th.random.fork_rng(devices=[]):
        x, emb = th.randn(1, width, side, side), th.randn(1, 4 * width)
        blocks = {name: ResBlock(width, 4 * width, 0.0) for name in ("fp32", "bf16")}
    cast_convolutions(blocks["bf16"], th.bfloat16, channels_last=width >= WIDE)
    inputs = {"fp32": x.requires_grad_(), "bf16": x.detach().bfloat16().requires_grad_()}
    while len(turns) < 2 or (len(turns) <= TURNS and sum(sum(turn.values()) for turn in turns) < SECONDS):
        turns.append({})
        for name, block in blocks.items():
            start = time.perf_counter()
            block(inputs[name], emb).sum().backward()
            turns[-1][name] = time.perf_counter() - start
    return {name: min(turn[name] for turn in turns[1:]) for name in blocks}
