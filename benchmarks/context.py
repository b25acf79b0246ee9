"""What a text costs: a pass with cross-attention beside others, and the memory of a network of Stable Diffusion's size.

    python benchmarks/context.py [--only attention,memory] [--json PATH]

Two minutes on two quiet cores, and 8 GB for the second part: a pass of Stable Diffusion 1's U-Net with random weights,
two latents of 64x64, ours and diffusers', each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch as th

from benching import Bench, megabytes, milliseconds, times
from evaluation import peak
from guided_diffusion.unet import UNetModel

TOKENS, CONTEXT = 77, 768
SMALL: dict[str, Any] = {"model_channels": 64, "num_res_blocks": 1, "channel_mult": (1, 2, 4), "num_head_channels": 32}
LARGE: dict[str, Any] = {"model_channels": 320, "num_res_blocks": 2, "channel_mult": (1, 2, 4, 4), "num_heads": 8}
QUICK: dict[str, Any] = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2, 2, 2), "num_heads": 2}
LATENTS = 4  # channels


def network(options: dict[str, Any], **more: Any) -> UNetModel:
    """A U-Net of latents with attention in its three finest levels, as Stable Diffusion has it."""
    return UNetModel(32, LATENTS, out_channels=LATENTS, attention_resolutions=(4, 2, 1), **options, **more).eval()


def attention(bench: Bench) -> None:
    """The table of passes: the same U-Net with three kinds of attention."""
    small = {**SMALL, "model_channels": 32} if bench.quick else SMALL
    side = 8 if bench.quick else 32
    x, t = th.randn(4, LATENTS, side, side, device=bench.device), th.arange(4, device=bench.device)
    texts = {"context": th.randn(4, TOKENS, CONTEXT, device=bench.device)}
    transformer = {"use_spatial_transformer": True}
    ways = {
        "attention of the image": (network(small), {}),
        "transformer blocks, no text": (network(small, **transformer), {}),
        f"transformer blocks, {TOKENS} vectors": (network(small, context_dim=CONTEXT, **transformer), texts),
        "the same and pooled": (network(small, context_dim=CONTEXT, context_pooled=True, **transformer), texts),
    }
    for model, _ in ways.values():
        model.to(bench.device)
    with th.no_grad():
        turns = bench.turns({name: (lambda m=m, more=more: m(x, t, **more)) for name, (m, more) in ways.items()})
    first = next(iter(ways))
    rows = [[name, milliseconds(turns.seconds(name)), times(1 / turns.ratio(first, name))] for name in ways]
    bench.add("A forward pass, four 32x32 latents, 64 channels", ["way", "ms", "time"], rows, seconds=turns.rounds)


def memory(way: str, quick: bool, threads: int) -> tuple[float, float]:
    """Bytes of the weights of a network of Stable Diffusion's size, and the most that this process had for one pass."""
    from diffusers import UNet2DConditionModel  # whose import is none of either's

    th.set_num_threads(threads)
    side = 8 if quick else 64
    x, t, context = th.randn(2, LATENTS, side, side), th.tensor([1, 2]), th.randn(2, TOKENS, CONTEXT)
    before = peak()
    if way == "ours":
        options = QUICK if quick else LARGE
        model: Any = network(options, use_spatial_transformer=True, context_dim=CONTEXT, legacy=False)
        words: dict[str, Any] = {"context": context}
    else:
        widths = (32, 64, 64, 64) if quick else (320, 640, 1280, 1280)
        options = {"layers_per_block": 1 if quick else 2, "attention_head_dim": 2 if quick else 8}
        model = UNet2DConditionModel(64, block_out_channels=widths, cross_attention_dim=CONTEXT, **options).eval()
        words = {"encoder_hidden_states": context}
    with th.no_grad():
        model(x, t, **words)
    return sum(param.nbytes for param in model.parameters()), peak() - before


def memories(bench: Bench) -> None:
    """The table of memory."""
    rows = []
    for way in ("ours", "diffusers"):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            weights, most = process.submit(memory, way, bench.quick, th.get_num_threads()).result()
        rows.append([way, megabytes(weights), megabytes(most), times(most / weights)])
    bench.add(
        "Stable Diffusion 1's U-Net, two latents, fp32", ["way", "weights, MB", "most, MB", "most over weights"], rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for."""
    bench = Bench.begin(__doc__, "context", argv, parts=["attention", "memory"])
    if bench.wants("attention"):
        attention(bench)
    if bench.wants("memory"):
        memories(bench)
    bench.finish()


if __name__ == "__main__":
    main()
