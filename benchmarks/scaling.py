"""Training on 1 to 1024 GPUs on paper: the time of a step by its messages; and bytes of real ranks beside the formula.

    python benchmarks/scaling.py [--json PATH] [--write]

A minute. Nothing here is measured on a GPU: arithmetic and bytes are counted on the networks themselves, speeds are
those of data sheets, and the schedule of the messages is that of training/gradients.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
import torch.distributed as dist

import pages
from benching import Bench
from guided_diffusion.commands import dry_run, flags as cli
from guided_diffusion.config import DiffusionConfig, UNetConfig
from guided_diffusion.script_util import build_network
from guided_diffusion.training import gradients

PAGE = pages.DOCS / "scaling.md"
ADM = "--data_dir - --class_cond True --learn_sigma True --resblock_updown True --num_head_channels 64"
# flags of the published models, and the global batch that they were trained with
MODELS = {
    "64x64": (f"{ADM} --image_size 64 --num_channels 192 --num_res_blocks 3 --attention_resolutions 32,16,8", 2048),
    "256x256": (f"{ADM} --image_size 256 --num_channels 256 --num_res_blocks 2 --attention_resolutions 32,16,8", 256),
    "512x512": (f"{ADM} --image_size 512 --num_channels 256 --num_res_blocks 2 --attention_resolutions 32,16,8", 256),
}
NODE = 8  # GPUs
ARITHMETIC = 0.4 * 989e12  # FLOP/s of an H100 in bf16 that a good implementation reaches
MEMORY = 3.35e12  # bytes/s
NVLINK = 0.8 * 450e9  # bytes/s of a GPU in each direction
LATENCY = 15e-6  # seconds of a message between machines
BACKWARD = 2 / 3  # of the time of a step
GPUS, GBITS, RANKS = (1, 8, 16, 64, 256, 1024), (100, 200, 400), (1, 2, 4, 8)


@dataclass(frozen=True)
class Model:
    """What a step of a network is made of.

    :param buckets: bytes of its messages, in the order of sending.
    """

    parameters: int
    flops: float
    buckets: Sequence[int]
    largest: int


def model_of(words: str) -> Model:
    """Count a network, which has no values."""
    flags = cli.parse("image_train", words.split())
    config = flags.part(UNetConfig)
    with dry_run.META:
        network = build_network(config, flags.part(DiffusionConfig).learn_sigma)
        cost = dry_run.count(network, dry_run.loss_of(flags, config), 1)
    network.requires_grad_(True)
    buckets = [4 * sum(p.numel() for p in group) for group in groups(list(network.parameters()))]
    blocks = [*network.input_blocks, network.middle_block, *network.output_blocks]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return Model(sum(cost.parts.values()), cost.step, buckets, largest)


def groups(parameters: Sequence[th.Tensor]) -> Iterator[list[th.Tensor]]:
    """The gradients that travel together."""
    for indices in gradients.grouped([(p, p) for p in parameters]):
        yield [parameters[index] for index in indices]


def all_reduce(size: float, gpus: int, gbit: float) -> float:
    """Seconds to add up so many bytes: within machines by rings, and between them, each of which has one link.

    Every GPU of a machine has an eighth of the sum there, so that the link carries the sum once in each direction.
    """
    local, nodes = min(gpus, NODE), -(-gpus // NODE)
    inside = 2 * (local - 1) / local * size / NVLINK
    between = 2 * (nodes - 1) / nodes * size / (gbit * 1e9 / 8) + 2 * LATENCY * max(nodes - 1, 0).bit_length()
    return inside + (between if nodes > 1 else 0.0)


def step_time(model: Model, batch: float, gpus: int, gbit: float) -> tuple[float, float]:
    """Seconds of a step with so many images on each GPU, and those of them in which it only waits for messages."""
    compute = model.flops * batch / ARITHMETIC
    total, ready, sent, done = sum(model.buckets), 0.0, 0.0, 0.0
    for size in model.buckets:
        ready += size
        sent = max(compute * (1 - BACKWARD * (1 - ready / total)), sent) + all_reduce(size, gpus, gbit) * (gpus > 1)
        done = max(done, sent)
    update = 4 * model.parameters * 8 / MEMORY  # AdamW and an average read and write eight numbers for each
    waiting = max(0.0, done - compute)
    return compute + waiting + update, waiting


def rank_main(number: int, count: int, folder: str, steps: int) -> None:
    """One of several ranks that train a small network; the counters of the network's loopback go to a file."""
    th.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=count)
    th.manual_seed(0)
    network = th.nn.Sequential(*[th.nn.Linear(512, 512) for _ in range(8)])
    trainer = gradients.AveragingTrainer(model=network)
    opt = gradients.AdamW(trainer.master_params, lr=1e-4, fused=True)
    sent = []
    for _ in range(steps + 1):  # the first one also makes connections
        dist.barrier()
        sent.append(bytes_sent())
        dist.barrier()
        trainer.zero_grad()
        trainer.backward(network(th.ones(1, 512)).square().mean(), last=True)
        trainer.optimize(opt)
    dist.barrier()
    sent.append(bytes_sent())
    if number == 0:
        size = 4 * sum(p.numel() for p in network.parameters())
        Path(folder, "result").write_text(f"{(sent[-1] - sent[1]) / steps} {size}")
    dist.barrier()
    dist.destroy_process_group()


def bytes_sent() -> int:
    """What has left by the loopback of this process's network."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).partition(":")[2].split()[8])


def measured(count: int, steps: int) -> tuple[float, float]:
    """Bytes that ranks send in a step, alone in their network where the system lets them, and those of gradients."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, __file__, "--ranks", str(count), "--folder", folder, "--steps", str(steps)]
        alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        private = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        subprocess.run([*(alone if private else []), *program], env=environment, check=True)
        sent, size = Path(folder, "result").read_text().split()
    return float(sent), float(size)


def fork(count: int, folder: str, steps: int) -> None:
    """Be all ranks."""
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            rank_main(number, count, folder, steps)
            os._exit(0)
        children.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in children):
        raise SystemExit(1)


def weak(models: dict[str, tuple[Model, int]], gbit: float) -> list[list[Any]]:
    """Images a second with a fixed batch on each GPU, as a share of so many single ones."""
    rows = []
    for name, (model, _) in models.items():
        batch = {"64x64": 32, "256x256": 8, "512x512": 2}[name]
        alone, _ = step_time(model, batch, 1, gbit)
        cells = [f"{alone / step_time(model, batch, gpus, gbit)[0]:.0%}" for gpus in GPUS]
        rows.append([f"{name}, {batch} images, {gbit:.0f} Gbit/s", f"{1000 * alone:.0f}", *cells])
    return rows


def strong(models: dict[str, tuple[Model, int]], gbit: float) -> list[list[Any]]:
    """Milliseconds of a step of the published global batch; and from where twice the GPUs gain less than a half."""
    rows = []
    for name, (model, batch) in models.items():
        possible = [gpus for gpus in GPUS if gpus <= batch]
        seconds = {gpus: step_time(model, batch / gpus, gpus, gbit)[0] for gpus in possible}
        counts = [2**power for power in range(11) if 2**power <= batch]
        all_of = {gpus: step_time(model, batch / gpus, gpus, gbit)[0] for gpus in counts}
        pays = max([n for n in counts[1:] if all_of[n // 2] / all_of[n] >= 1.5], default=1)
        cells = [f"{1000 * seconds[gpus]:,.0f}" if gpus in seconds else "" for gpus in GPUS]
        rows.append([f"{name}, {batch} images, {gbit:.0f} Gbit/s", *cells, str(pays)])
    return rows


def memory(models: dict[str, tuple[Model, int]]) -> list[list[Any]]:
    """Gigabytes of a rank without activations: four numbers, an average and a gradient for each parameter."""
    rows = []
    for name, (model, _) in models.items():
        held = [24 * model.parameters / gpus + (12 * model.largest if gpus > 1 else 0) for gpus in GPUS]
        cells = [f"{value / 1e9:.2f}" for value in held]
        rows.append(
            [
                name,
                f"{model.parameters / 1e6:.0f}",
                f"{4 * model.parameters / 1e9:.2f}",
                str(len(model.buckets)),
                *cells,
            ]
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Make all tables."""

    def own(parser: Any) -> None:
        for name in ("ranks", "steps"):
            parser.add_argument(f"--{name}", type=int, default=0, help="of the ranks that it starts itself")
        parser.add_argument("--folder", default="", help="of these")

    bench = Bench.begin(__doc__, "scaling", argv, flags=own)
    if bench.given.ranks:
        fork(bench.given.ranks, bench.given.folder, bench.given.steps)
        return
    models = {name: (model_of(words), batch) for name, (words, batch) in MODELS.items()}
    counts = [str(gpus) for gpus in GPUS]
    rows = [row for gbit in GBITS for row in weak(models, gbit)]
    bench.add("images a second per GPU, over those of one alone", ["a batch on each GPU", "ms alone", *counts], rows)
    rows = [row for gbit in GBITS for row in strong(models, gbit)]
    bench.add("ms of a step of the published batch", ["the batch on all GPUs", *counts, "pays up to"], rows)
    columns = ["with --fsdp", "M parameters", "GB of gradients", "messages", *counts]
    bench.add("GB of a rank, without activations", columns, memory(models))
    rows = []
    for count in RANKS[:2] if bench.quick else RANKS:
        sent, size = measured(count, 2 if bench.quick else 5)
        formula = 2 * (count - 1) * size
        share = f"{sent / formula:.3f}" if formula else ""
        rows.append([f"{count} ranks", f"{size / 1e6:.2f}", f"{formula / 1e6:.2f}", f"{sent / 1e6:.2f}", share])
    columns = ["gloo here", "MB of gradients", "MB by 2 (n - 1) size", "MB sent by all", "ratio"]
    bench.add("bytes of a step of real ranks", columns, rows)
    bench.page = PAGE
    bench.finish()


if __name__ == "__main__":
    main()
