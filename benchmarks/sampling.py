"""What sampling costs: a step with and without guidance, a whole sample, and every sampler's own share.

    python benchmarks/sampling.py [--only step,sample,samplers,beyond] [--json PATH] [--write]

Five minutes on two quiet cores of a Xeon with AMX. All ways run in our loop and take turns in one process; the plain
ones differ in the networks, the gradient and the precision. A step is one of 250 of ddpm.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import plain as originals
from benching import Bench, milliseconds, synchronize, times
from cases import EMOJI32, IMAGES64, TINY, Case, diffusers_flag, ours, plain, theirs
from guided_diffusion.sampling.guidance import classifier_guidance
from guided_diffusion.sampling.loop import network_calls
from guided_diffusion.sampling.samplers import SAMPLERS, make_sampler

PARTS = ("step", "sample", "samplers", "beyond")
STEPS, BEST, FEW = 250, "unipc", 20  # the originals' way to a sample, and ours
SOLVER = "dpm++2m"
SAMPLERS_BATCH, SAMPLERS_STEPS = 8, 10
MEASURED = [name for name, kind in SAMPLERS.items() if not kind.ascending]  # those that make images


def shape_of(case: Case) -> tuple[int, ...]:
    """Of a batch of images."""
    return (case.batch, 3, case.size, case.size)


def endless(case: Case, bench: Bench, network: Any, cond_fn: Any = None) -> Callable[[], object]:
    """A function that takes one step of ddpm after another."""
    process, labels = case.make_process(str(STEPS)), case.inputs(bench.device)[2]

    def steps() -> Any:
        while True:
            yield from process.p_sample_loop_progressive(
                network, shape_of(case), model_kwargs={"y": labels}, cond_fn=cond_fn, device=bench.device
            )

    return steps().__next__


def sampled(case: Case, bench: Bench, network: Any, sampler: str, steps: int) -> Callable[[], object]:
    """A function that makes a batch of samples."""
    prefix = SAMPLERS[sampler].grid
    process, labels = case.make_process(f"{prefix}{steps}"), case.inputs(bench.device)[2]
    return lambda: process.sample_loop(
        make_sampler(sampler), network, shape_of(case), model_kwargs={"y": labels}, device=bench.device
    )


def measure_steps(case: Case, bench: Bench) -> None:
    """A step of ddpm, unguided and guided by a classifier."""
    unet, classifier = case.make_unet().eval(), case.make_classifier().eval()
    free, guided = {}, {}
    for precision in bench.plain_precisions:
        one, other = (plain(network, precision).to(bench.device) for network in (unet, classifier))
        free[f"plain {precision}"] = endless(case, bench, one)
        guided[f"plain {precision}"] = endless(case, bench, one, originals.guidance(other, 1.0))
    for precision in bench.precisions:
        one, other = (ours(copy.deepcopy(network).to(bench.device), precision) for network in (unet, classifier))
        free[f"ours {precision}"] = endless(case, bench, one)
        guided[f"ours {precision}"] = endless(case, bench, one, classifier_guidance(other, 1.0))
    for precision in bench.precisions if bench.given.diffusers else ():
        network = theirs(case.diffusers_unet().eval().to(bench.device), precision)
        free[f"diffusers {precision}"] = endless(case, bench, network)
    for title, ways in (("A step", free), ("A step guided by a classifier", guided)):
        turns = bench.turns(ways)
        rows = [[name, milliseconds(turns.seconds(name)), times(turns.ratio(bench.base, name))] for name in turns.names]
        bench.add(f"{title}, {case.name}, batch {case.batch}", ["way", "ms", "speed-up"], rows, seconds=turns.rounds)


def measure_samples(case: Case, bench: Bench) -> None:
    """The time to a batch of samples: by so many steps of ddpm, and by few of the best solver."""
    few, best = (2 if bench.quick else FEW), bench.precisions[1]
    source = case.make_unet().eval()
    slow, fast = plain(source, bench.base.split()[-1]).to(bench.device), ours(source.to(bench.device), best)
    ways = {
        "plain": endless(case, bench, slow),
        "ours": endless(case, bench, fast),
        "solver": sampled(case, bench, fast, BEST, few),
    }
    turns = bench.turns(ways, rounds=max(1, bench.rounds - 1))
    whole = turns.ratio("plain", "solver") * STEPS
    rows = [
        [f"{bench.base}, ddpm, {STEPS} steps", f"{turns.seconds('plain') * STEPS:.1f}", times(1)],
        [
            f"ours {best}, ddpm, {STEPS} steps",
            f"{turns.seconds('ours') * STEPS:.1f}",
            times(turns.ratio("plain", "ours")),
        ],
        [f"ours {best}, {BEST}, {few} steps", f"{turns.seconds('solver'):.1f}", times(whole)],
    ]
    title = f"Samples, {case.name}, batch {case.batch} (those of {STEPS} steps from the time of one)"
    bench.add(title, ["way", "s", "speed-up"], rows, seconds=turns.rounds)


def measure_samplers(case: Case, bench: Bench) -> None:
    """Every sampler that makes images, with the same network."""
    steps, source = (2 if bench.quick else SAMPLERS_STEPS), case.make_unet().eval()
    networks = {bench.base: plain(source, bench.base.split()[-1]).to(bench.device)}
    for precision in bench.precisions[:2]:
        networks[f"ours {precision}"] = ours(copy.deepcopy(source).to(bench.device), precision)
    rows, seconds = [], {}
    for name in MEASURED[:3] if bench.quick else MEASURED:
        kind = SAMPLERS[name]
        ways = {way: sampled(case, bench, network, name, steps) for way, network in networks.items()}
        turns = bench.turns(ways, warm_up=0 if rows else 1)
        calls = network_calls(case.make_process(f"{kind.grid}{steps}"), make_sampler(name))
        fastest = turns.names[-1]
        per_call = [milliseconds(turns.seconds(way) / calls) for way in turns.names]
        rows.append([f"`{name}`", calls, *per_call, times(turns.ratio(bench.base, fastest))])
        seconds[name] = turns.rounds
    title = f"Samplers in {steps} steps, {case.name}, batch {case.batch}: milliseconds per call of the network"
    bench.add(title, ["sampler", "calls", *networks, "speed-up"], rows, seconds=seconds)


def measure_beyond(case: Case, bench: Bench) -> None:
    """What a guided step takes besides its networks: the solver, the rule of guidance, the loop."""
    steps, spent, rows, seconds = (2 if bench.quick else FEW), [0.0], [], {}
    precision = bench.precisions[-1] if bench.device.type == "cuda" else "fp32"
    unet, classifier = (
        ours(net.eval().to(bench.device), precision) for net in (case.make_unet(), case.make_classifier())
    )

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(bench.device)
            began = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(bench.device)
            spent[0] += time.perf_counter() - began
            return result

        return call

    for batch in (1, case.batch):
        few, shares = case.with_batch(batch), []
        options = {"cond_fn": timed(classifier_guidance(classifier, 1.0)), "device": bench.device}
        options["model_kwargs"] = {"y": few.inputs(bench.device)[2]}
        process = few.make_process(f"{SAMPLERS[SOLVER].grid}{steps}")
        for _ in range(bench.rounds + 1):
            spent[0], began = 0.0, time.perf_counter()
            process.sample_loop(make_sampler(SOLVER), timed(unet), shape_of(few), **options)
            total = time.perf_counter() - began
            shares.append((total - spent[0]) / total)
        rows.append(
            [
                f"{SOLVER}, batch {batch}, {precision}",
                milliseconds(total / steps),
                f"{statistics.median(shares[1:]):.1%}",
            ]
        )
        seconds[str(batch)] = shares
    title = f"A step guided by a classifier, {case.name}: what is beyond the networks"
    bench.add(title, ["way", "ms", "of the step"], rows, shares=seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for."""
    bench = Bench.begin(__doc__, "sampling", argv, parts=PARTS, flags=diffusers_flag)
    large, small = (TINY, TINY) if bench.quick else (IMAGES64, EMOJI32)
    if bench.wants("step"):
        measure_steps(large, bench)
    if bench.wants("sample"):
        measure_samples(large, bench)
    if bench.wants("samplers"):
        measure_samplers(small.with_batch(1 if bench.quick else SAMPLERS_BATCH), bench)
    if bench.wants("beyond"):
        measure_beyond(small if bench.quick else small.with_batch(16), bench)
    bench.finish()


if __name__ == "__main__":
    main()
