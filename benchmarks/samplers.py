"""How near every sampler comes to the right answer, by how often it asks the network: docs/samplers.md and its picture.

    python benchmarks/samplers.py

The network is the exact denoiser of a mixture of Gaussians (mixture.py), so that every error is the sampler's. Two
errors are measured. A deterministic sampler is to follow the probability flow: its images are compared with those of a
fine solution from the same noise. Any sampler is to draw from the data's distribution: it is compared with that.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

import pages
import report
from guided_diffusion.respace import GRIDS, SpacedDiffusion
from guided_diffusion.sampling.loop import network_calls
from guided_diffusion.sampling.samplers import SAMPLERS, make_sampler
from guided_diffusion.script_util import create_gaussian_diffusion
from mixture import Mixture, Oracle, images, ring

DOCS = Path(__file__).parent.parent / "docs"
BUDGETS = (5, 8, 10, 15, 20, 25, 50, 100)
STEPS = 1000  # of training
CLEAN = -1e-4  # log alpha_bar of all but no noise

# name in the tables: sampler and its options
FIRST = ("ddim", "euler", "plms", "lms", "deis", "dpm++2m", "unipc", "heun", "dpm++2s", "dpm2", "dpm3")
STOCHASTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("ddpm", {}),
    "ddim, eta 1": ("ddim", {"eta": 1.0}),
    **{name: (name, {}) for name in ("euler_ancestral", "dpm++2m_sde", "dpm++3m_sde", "sa")},
}
# every other one that makes images, a new one too
DETERMINISTIC: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in dict.fromkeys((*FIRST, *SAMPLERS))
    if name not in STOCHASTIC and not SAMPLERS[name].ascending
}
ALL = DETERMINISTIC | STOCHASTIC

Rows = dict[str, list[tuple[int, float]]]  # (calls of the network, error), by sampler


def make_process(schedule: str, grid: str) -> SpacedDiffusion:
    return create_gaussian_diffusion(steps=STEPS, noise_schedule=schedule, timestep_respacing=grid)


@dataclass(frozen=True)
class Problem:
    """Data, a noise schedule, a scale of guidance by the exact classifier, and how many samples to take."""

    data: Mixture
    schedule: str
    scale: float
    count: int

    def start(self) -> tuple[th.Tensor, th.Tensor]:
        """Noise, spread as evenly as points of a Sobol sequence where that is possible, and labels."""
        labels = th.arange(self.count) * self.data.num_classes // self.count
        if self.data.shape[0] == 2:
            points = th.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(self.count, dtype=th.float64)
            return th.special.ndtri(points.clamp(1e-9, 1 - 1e-9)).view(-1, *self.data.shape), labels
        noise = th.randn(self.count, *self.data.shape, dtype=th.float64, generator=th.Generator().manual_seed(0))
        return noise, labels


@cache
def flow(problem: Problem, substeps: int = 1000) -> th.Tensor:
    """Where the probability flow takes the noise down to t = 0, and the network's x_0 there, as a last step gives it.

    In units of alpha the flow is dx / d lambda = E[x_0 | x] - x, solved by the classical Runge-Kutta method.
    """
    process, (x, y) = make_process(problem.schedule, ""), problem.start()

    def denoise(x: th.Tensor, lam: float) -> th.Tensor:
        level = -math.log1p(math.exp(-2 * lam))
        return problem.data.denoise_guided(x * math.exp(level / 2), level, y, problem.scale)

    first, last = (-math.log(math.expm1(-float(process.level(tau)))) / 2 for tau in (STEPS - 1, 0))
    x, h = x * math.sqrt(1 + math.exp(-2 * first)), (last - first) / substeps
    for step in range(substeps):
        lam = first + step * h
        slope = total = denoise(x, lam) - x
        for weight, share in ((2, 0.5), (2, 0.5), (1, 1.0)):
            moved = x + share * h * slope
            slope = denoise(moved, lam + share * h) - moved
            total = total + weight * slope
        x = x + h / 6 * total
    return denoise(x, last)


def distance_from_flow(problem: Problem, sample: th.Tensor) -> float:
    """Root mean square over all coordinates of all samples."""
    return float((sample - flow(problem)).square().mean().sqrt())


def sliced_distance(x: th.Tensor, data: Mixture, directions: int = 16) -> float:
    """Sliced Wasserstein-1 distance of points of the plane [N, 2, 1, 1] from their distribution.

    Along each direction the distribution is a mixture in one dimension, of which the quantiles are known.
    """
    total, x, axis = 0.0, x.flatten(1), th.linspace(-3, 3, 6001, dtype=th.float64)
    shares = (np.arange(len(x)) + 0.5) / len(x)
    for angle in th.arange(directions, dtype=th.float64) * math.pi / directions:
        direction = th.stack([angle.cos(), angle.sin()])
        means, stds = data.means @ direction, (data.variances @ direction.square()).sqrt()
        below = th.special.ndtr((axis[:, None] - means) / stds) @ data.log_weights.exp()
        quantiles = th.from_numpy(np.interp(shares, below.numpy(), axis.numpy()))
        total += float(((x @ direction).sort().values - quantiles).abs().mean())
    return total / directions


def distance_from_distribution(problem: Problem, sample: th.Tensor) -> float:
    """`sliced_distance`, class by class where there is guidance, of scale 1: it then leaves each class as it is."""
    if not problem.scale:
        return sliced_distance(sample, problem.data)
    labels, classes = problem.start()[1], range(problem.data.num_classes)
    return float(np.mean([sliced_distance(sample[labels == y], problem.data.of_class(y)) for y in classes]))


def error_of_scatter(problem: Problem, sample: th.Tensor, bands: int = 8) -> float:
    """How far the scatter about the means is off, as a share of what it should be: root mean square over bands.

    A sample is measured from the mean of its likeliest component, in bands of coordinates from coarse to fine.
    """
    data = problem.data
    component = data.log_joint(sample, CLEAN).argmax(dim=1)
    z = (sample.flatten(1) - data.means[component]) / data.variances[component].sqrt()
    order = data.variances[0].argsort(descending=True)
    scatter = th.stack([z[:, band].square().mean().sqrt() for band in order.chunk(bands)])
    return float((scatter - 1).square().mean().sqrt())


def steps_within(sampler: Any, budget: int) -> int:
    """The most steps with which a sampler asks the network at most `budget` times: it asks a + b N times in N steps."""
    two, three = (network_calls(make_process("cosine", str(steps)), sampler) for steps in (2, 3))
    return 2 + (budget - two) // (three - two)


def run(name: str, problem: Problem, budget: int, grid: str | None = None) -> tuple[th.Tensor, int]:
    """Samples, and how often the network was asked.

    :param name: in `ALL`.
    :param budget: how often it may be asked.
    :param grid: prefix of a step grid; the sampler's own where there is none.
    """
    kind, options = ALL[name]
    sampler = make_sampler(kind, **options)
    prefix = report.own_grid(kind) if grid is None else grid
    process = make_process(problem.schedule, f"{prefix}{steps_within(sampler, budget)}")
    oracle, (noise, labels) = Oracle(process, problem.data), problem.start()
    sample = process.sample_loop(
        sampler,
        oracle,
        noise.shape,
        noise=noise,
        device="cpu",
        clip_denoised=False,
        model_kwargs={"y": labels},
        cond_fn=oracle.guidance(problem.scale) if problem.scale else None,
        generator=th.Generator().manual_seed(1),
    )
    return sample, oracle.calls


Measure = Callable[[Problem, th.Tensor], float]


def measure(problem: Problem, distance: Measure, names: Sequence[str], budgets: Sequence[int] = BUDGETS) -> Rows:
    """Calls and errors of samplers on their own grids."""
    rows: Rows = {}
    for name in names:
        runs = (run(name, problem, budget) for budget in budgets)
        rows[name] = [(calls, distance(problem, sample)) for sample, calls in runs]
    return rows


def with_exact_samples(problem: Problem, distance: Measure, rows: Rows, draws: int = 4) -> Rows:
    """The rows, and under them what samples of the data themselves come to: no sampler is better but by chance."""
    generator, labels = th.Generator().manual_seed(2), problem.start()[1]
    kinds = [problem.data.of_class(y) for y in range(problem.data.num_classes)] if problem.scale else [problem.data]

    def sample() -> th.Tensor:
        counts = labels.bincount().tolist() if problem.scale else [problem.count]
        return th.cat([kind.sample(count, generator)[0] for kind, count in zip(kinds, counts, strict=True)])

    error = float(np.mean([distance(problem, sample()) for _ in range(draws)]))
    return {**rows, report.EXACT: [(budget, error) for budget in BUDGETS]}


def measure_grids(problem: Problem, budget: int) -> dict[str, list[float]]:
    """Distances from the flow of the deterministic samplers on every step grid."""
    return {
        name: [distance_from_flow(problem, run(name, problem, budget, grid)[0]) for grid in ("", *GRIDS)]
        for name in DETERMINISTIC
    }


def write() -> None:
    """Measure everything, and bring docs/samplers.md and docs/samplers.png up to date."""
    points, pictures = ring(), images()
    flows = {
        "flow-2d": Problem(points, "linear", 0.0, 512),
        "flow-2d-guided": Problem(points, "linear", 2.0, 512),
        "flow-images": Problem(pictures, "linear", 0.0, 16),
        "flow-images-guided": Problem(pictures, "linear", 2.0, 16),
        "flow-images-cosine": Problem(pictures, "cosine", 0.0, 16),
    }
    tables = {key: measure(problem, distance_from_flow, list(DETERMINISTIC)) for key, problem in flows.items()}
    spreads: dict[str, tuple[Problem, Measure]] = {
        "distribution-2d": (Problem(points, "linear", 0.0, 8192), distance_from_distribution),
        "distribution-2d-guided": (Problem(points, "linear", 1.0, 8192), distance_from_distribution),
        "scatter-images": (Problem(pictures, "linear", 0.0, 32), error_of_scatter),
    }
    for key, (problem, distance) in spreads.items():
        tables[key] = with_exact_samples(problem, distance, measure(problem, distance, list(ALL)))
    text = (DOCS / "samplers.md").read_text()
    text = pages.replaced(text, "overview", report.overview(make_process("cosine", "20")))
    for schedule in ("linear", "cosine"):
        errors = measure_grids(flows[f"flow-images{'' if schedule == 'linear' else '-cosine'}"], 20)
        text = pages.replaced(text, f"grids-{schedule}", report.grid_table(errors, ["", *GRIDS]))
    for key, rows in tables.items():
        text = pages.replaced(text, key, report.table(rows, BUDGETS))
    (DOCS / "samplers.md").write_text(text)
    report.draw(tables, DOCS / "samplers.png")


if __name__ == "__main__":
    argparse.ArgumentParser(description="Measure every sampler (minutes), and write docs/samplers.md.").parse_args()
    th.set_num_threads(1)
    write()
