"""What a call of the network costs, forward, backward and in a training step: ours, the plain path, diffusers.

    python benchmarks/network.py [--only 64x64,emoji32,256x256] [--compile] [--json PATH] [--write]

Five minutes on two quiet cores of a Xeon with AMX, one on a GPU, where 256x256 can be asked for too. All ways take
turns in one process. Operations are counted on the plain network, two for a multiplication and an addition, and their
rate is compared with the better of a large matrix product and a large convolution in the same precision and run.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch as th

from benching import Bench, Turns, milliseconds, times
from cases import ADM256, EMOJI32, IMAGES64, TINY, Case, count_flops, diffusers_flag, ours, plain, theirs
from guided_diffusion.networks.compiling import compile_network
from ours import Training, silent
from plain import PlainTraining

CASES = {case.name: case for case in (IMAGES64, EMOJI32, ADM256)}
COLUMNS = ["way", "ms", "speed-up", "GFLOP/s", "of the ceiling"]


def unets(case: Case, bench: Bench) -> dict[str, Any]:
    """The U-Net in all its forms, by way and precision."""
    source, on = case.make_unet().eval(), bench.device
    found = {f"plain {precision}": plain(source, precision).to(on) for precision in bench.plain_precisions}
    for precision in bench.precisions:
        found[f"ours {precision}"] = ours(copy.deepcopy(source).to(on), precision)
    for precision in bench.precisions if bench.given.diffusers else ():
        found[f"diffusers {precision}"] = theirs(case.diffusers_unet().eval().to(on), precision)
    return found


def classifiers(case: Case, bench: Bench) -> dict[str, Any]:
    """The classifier in its forms, by way and precision; diffusers has none."""
    source, on = case.make_classifier().eval(), bench.device
    found = {f"plain {precision}": plain(source, precision).to(on) for precision in bench.plain_precisions}
    for precision in bench.precisions:
        found[f"ours {precision}"] = ours(copy.deepcopy(source).to(on), precision)
    return found


def compiled(case: Case, bench: Bench, inputs: Sequence[th.Tensor]) -> dict[str, Any]:
    """Our U-Net as --compile has it in sampling, in each precision; says how long the first call took."""
    found = {}
    for precision in bench.precisions if bench.given.compile else ():
        network = ours(case.make_unet().eval().to(bench.device), precision)
        with silent():
            compile_network(network, case.name, sampling=True)
            began = time.perf_counter()
            forward(network, inputs)()
        bench.note(f"Compiling the U-Net of {case.name} in {precision} took {time.perf_counter() - began:.0f} s.")
        found[f"ours, compiled, {precision}"] = network
    return found


def forward(network: Any, inputs: Sequence[th.Tensor]) -> Callable[[], object]:
    """A pass as in sampling."""

    def run() -> None:
        with th.no_grad():
            network(*inputs)

    return run


def backward(network: Any, inputs: Sequence[th.Tensor]) -> Callable[[], object]:
    """A pass and the gradients of all weights."""

    def run() -> None:
        network(*inputs).square().mean().backward()
        network.zero_grad(set_to_none=True)

    return run


def gradient(network: Any, inputs: Sequence[th.Tensor]) -> Callable[[], object]:
    """A pass and the gradient of the image, as in guidance."""
    image, *rest = inputs

    def run() -> None:
        start = image.detach().requires_grad_()
        th.autograd.grad(network(start, *rest).log_softmax(dim=-1)[:, 0].sum(), start)

    return run


def training_steps(case: Case, bench: Bench) -> dict[str, Callable[[], object]]:
    """Steps with optimizer and moving average, by way and precision, on a fixed batch."""
    images, _, labels = case.inputs(bench.device)
    process, source = case.make_process(), case.make_unet()
    steps: dict[str, Any] = {
        f"plain {precision}": PlainTraining(plain(source, precision).to(bench.device), process)
        for precision in bench.plain_precisions
    }
    for precision in bench.precisions:
        model = copy.deepcopy(source).to(bench.device)
        steps[f"ours {precision}"] = Training(model, process, batch_size=case.batch, precision=precision)
    return {name: lambda step=step: step(images.clamp(-1, 1), {"y": labels}) for name, step in steps.items()}


def report(bench: Bench, title: str, turns: Turns, flops: float) -> None:
    """A table: the median of each way, and what it is beside the originals' own."""
    rows = []
    for name in turns.names:
        seconds, precision = turns.seconds(name), name.split()[-1]
        speed = [milliseconds(seconds), times(turns.ratio(bench.base, name)), f"{flops / seconds / 1e9:,.0f}"]
        rows.append([name, *speed, bench.share(flops, seconds, precision)])
    bench.add(f"{title}, {flops / 1e9:,.1f} GFLOP", COLUMNS, rows, flops=flops, seconds=turns.rounds)


def measure(case: Case, bench: Bench) -> None:
    """All tables of a case."""
    batch = f"{case.name}, batch {case.batch}"
    inputs = case.inputs(bench.device)
    counted = plain(case.make_unet(), "fp32").to(bench.device)
    once, twice = (count_flops(counted, *inputs, backward=which) for which in ("", "weights"))
    del counted
    networks = unets(case, bench)
    ways = {name: forward(network, inputs) for name, network in (networks | compiled(case, bench, inputs)).items()}
    report(bench, f"U-Net forward, {batch}", bench.turns(ways), once)
    ways = {name: backward(network, inputs) for name, network in networks.items()}
    report(bench, f"U-Net forward and backward, {batch}", bench.turns(ways), twice)
    del networks, ways
    report(bench, f"U-Net training step, {batch}", bench.turns(training_steps(case, bench), lead=1), twice)
    ways = {name: gradient(network, inputs[:2]) for name, network in classifiers(case, bench).items()}
    counted = plain(case.make_classifier(), "fp32").to(bench.device)
    work = count_flops(counted, *inputs[:2], backward="image")
    report(bench, f"Classifier, gradient of the image, {batch}", bench.turns(ways), work)


def own_flags(parser: argparse.ArgumentParser) -> None:
    """What else can be measured."""
    diffusers_flag(parser)
    parser.add_argument("--compile", action="store_true", help="the forward pass compiled, too (minutes more on a CPU)")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case that is asked for."""
    bench = Bench.begin(__doc__, "network", argv, parts=list(CASES), default=["64x64", "emoji32"], flags=own_flags)
    for case in [TINY] if bench.quick else [case for name, case in CASES.items() if bench.wants(name)]:
        measure(case, bench)
    bench.finish()


if __name__ == "__main__":
    main()
