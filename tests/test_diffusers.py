"""The same steps as the schedulers of diffusers: the same network, noise and timesteps give the same trajectory.

Theirs keep their noise levels in float32; they are given ours in float64 here, since what is compared is the rules.
Some carry x / alpha instead of x. Some combine past predictions in the step to the image as well, or fail in it, where
ours returns the network's x_0: that step is then left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import import_module as library
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from oracle import make_process

from cases import EMOJI32, IMAGES64
from guided_diffusion.sampling.samplers import make_sampler
from guided_diffusion.script_util import build_unet
from mixture import Oracle, images

os.environ["HF_HUB_OFFLINE"] = "1"  # before it is imported, which takes seconds that other tests need not wait

pytestmark = [  # what they do inside
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type `dpmsolver` is deprecated:FutureWarning"),
]
SHAPE = (4, 3, 8, 8)
DATA = images(8)
GRIDS = {
    "uneven": [0, 40, 110, 200, 310, 430, 560, 700, 850, 999],
    "many": [0, *range(49, 1000, 50)],  # theirs change their rules below 15 steps
}
FLOAT32 = 1e-4  # where theirs computes in it
EXACT = 1e-8
KINDS = {"EPSILON": "epsilon", "VELOCITY": "v_prediction"}


@pytest.fixture(params=["linear-EPSILON-uneven", "cosine-VELOCITY-uneven", "linear-VELOCITY-many"])
def process(request):
    name, mean, grid = request.param.split("-")
    steps = ",".join(map(str, GRIDS[grid]))
    return make_process(name=name, mean=mean, respacing=f"list:{steps}")


def noise():
    return th.randn(SHAPE, dtype=th.float64, generator=th.Generator().manual_seed(0))


def ours(process, name: str, **options) -> list[th.Tensor]:
    """The samples after each step; noise in between comes from a generator with seed 1."""
    loop = process.sample_loop_progressive(
        make_sampler(name, **options),
        Oracle(process, DATA),
        SHAPE,
        noise=noise(),
        device="cpu",
        clip_denoised=False,
        generator=th.Generator().manual_seed(1),
    )
    return [output["sample"] for output in loop]


def scheduler(process, kind: str | type, **options):
    """A scheduler of diffusers by its name, or of a given class."""
    made = getattr(library("diffusers"), f"{kind}Scheduler") if isinstance(kind, str) else kind
    return made(prediction_type=KINDS[process.model_mean_type.name], **options)


def levels(process, inner: Sequence[float] = ()) -> tuple[th.Tensor, th.Tensor]:
    """Timesteps and sigma / alpha, noisiest first; `inner` are further ones in each step, as shares of it in lambda."""
    tau = th.tensor(process.timestep_map[::-1], dtype=th.float64)
    log_ratio = th.expm1(-process.level(tau)).log() / 2
    shares = th.tensor([0.0, *inner], dtype=th.float64)
    between = log_ratio[:-1, None] + shares * log_ratio.diff()[:, None]
    log_ratio = th.cat([between.flatten(), log_ratio[-1:]])
    return process.tau(-th.log1p(th.exp(2 * log_ratio))), log_ratio.exp()


def on_levels(made, process, inner: Sequence[float] = (), *, last: float = 0.0):
    """The scheduler at our timesteps; `last` is its sigma / alpha for the image."""
    made.timesteps, sigmas = levels(process, inner)
    made.num_inference_steps = len(sigmas)
    made.sigmas = th.cat([sigmas, th.tensor([last])])
    return made


def run(made, process, **options) -> Iterator[th.Tensor]:
    """What a scheduler of x makes of the network, step by step."""
    network, x = Oracle(process, DATA), noise()
    for t in made.timesteps:
        x = made.step(network(x, t.expand(len(x))), t, x, **options).prev_sample
        yield x


def run_with_noise(made, process) -> Iterator[th.Tensor]:
    """The same for one that can be given its noise: that of a generator with seed 1."""
    generator, network, x = th.Generator().manual_seed(1), Oracle(process, DATA), noise()
    for t in made.timesteps:
        fresh = th.randn(SHAPE, dtype=x.dtype, generator=generator)
        x = made.step(network(x, t.expand(len(x))), t, x, variance_noise=fresh).prev_sample
        yield x


def run_scaled(made, process, **options) -> Iterator[th.Tensor]:
    """The same for a scheduler of x / alpha."""
    network, x = Oracle(process, DATA), noise() * (made.sigmas[0] ** 2 + 1).sqrt()
    for t in made.timesteps:
        scaled = made.scale_model_input(x, t)
        x = made.step(network(scaled, t.expand(len(x))), t, x, **options).prev_sample
        yield x / (made.sigmas[made.step_index] ** 2 + 1).sqrt()


def distance(own: Sequence[th.Tensor], their: Sequence[th.Tensor]) -> float:
    """The largest of all steps, relative where values are above 1."""
    return max(float(((a - b).abs() / a.abs().clamp(min=1)).max()) for a, b in zip(own, their, strict=True))


def all_but_the_image(own: Sequence[th.Tensor], their: Sequence[th.Tensor]) -> float:
    """`distance` without the last step, where ours is the network's own x_0 and theirs is not."""
    return distance(list(own)[:-1], list(their)[:-1])


def integral(function, start, end, **_) -> tuple[float, None]:
    """Of a polynomial of up to degree 15, exactly."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    points = (start + end) / 2 + (end - start) / 2 * th.from_numpy(nodes)
    values = sum(weight * function(point) for weight, point in zip(weights, points, strict=True))
    return float((end - start) / 2 * values), None


@pytest.fixture(params=KINDS)
def strided(request):
    return make_process(respacing="ddim20", mean=request.param)


def on_stride(made, process):
    made.set_timesteps(process.num_timesteps)
    assert sorted(set(made.timesteps.tolist())) == process.timestep_map
    made.alphas_cumprod = th.from_numpy(make_process().alphas_cumprod)
    return made


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim(strided, eta):
    theirs = on_stride(scheduler(strided, "DDIM", clip_sample=False), strided)
    generator = th.Generator().manual_seed(1)
    steps = list(run(theirs, strided, eta=eta, generator=generator))
    assert distance(ours(strided, "ddim", eta=eta), steps) < EXACT


def test_plms():
    """Theirs combines past v where the network predicts v, ours past eps (Liu et al. 2022), so only eps compares."""
    process = make_process(respacing="ddim20")
    theirs = on_stride(scheduler(process, "PNDM", skip_prk_steps=True, set_alpha_to_one=True), process)
    _, *steps = run(theirs, process)  # their first is the trial step of the improved Euler step
    assert all_but_the_image(ours(process, "plms", order=4), steps) < EXACT


def test_euler(process):
    theirs = on_levels(scheduler(process, "EulerDiscrete"), process)
    assert distance(ours(process, "euler"), run_scaled(theirs, process)) < FLOAT32


def test_euler_ancestral(process):
    theirs = on_levels(scheduler(process, "EulerAncestralDiscrete"), process)
    steps = run_scaled(theirs, process, generator=th.Generator().manual_seed(1))
    assert distance(ours(process, "euler_ancestral"), steps) < FLOAT32


def test_heun(process):
    theirs = on_levels(scheduler(process, "HeunDiscrete"), process)
    tau, sigmas = theirs.timesteps, theirs.sigmas
    theirs.timesteps = th.cat([tau[:1], tau[1:].repeat_interleave(2)])
    theirs.sigmas = th.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    steps = list(run_scaled(theirs, process))
    assert distance(ours(process, "heun"), [*steps[1::2], steps[-1]]) < EXACT


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(process, order, monkeypatch):
    """Their integrals of polynomials come from scipy, which is not needed for that."""
    scheduling_lms_discrete = library("diffusers.schedulers.scheduling_lms_discrete")
    monkeypatch.setattr(scheduling_lms_discrete, "integrate", SimpleNamespace(quad=integral), raising=False)
    theirs = on_levels(scheduler(process, scheduling_lms_discrete.LMSDiscreteScheduler), process)
    assert all_but_the_image(ours(process, "lms", order=order), run_scaled(theirs, process, order=order)) < EXACT


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(process, order):
    theirs = on_levels(scheduler(process, "DEISMultistep", solver_order=order, lower_order_final=False), process)
    theirs.timesteps = theirs.timesteps[:-1]  # they fail in the last, where log(sigma / alpha) is infinite
    assert distance(ours(process, "deis", order=order)[:-1], run(theirs, process)) < EXACT


@pytest.mark.parametrize("order", [1, 2])
def test_unipc(process, order):
    theirs = on_levels(scheduler(process, "UniPCMultistep", solver_order=order), process)
    assert distance(ours(process, "unipc", order=order), run(theirs, process)) < EXACT


def test_unipc_of_order_3(process):
    """Theirs lowers the order of the last step but one too, unless told not to, and then fails in the last."""
    theirs = on_levels(scheduler(process, "UniPCMultistep", solver_order=3, lower_order_final=False), process)
    theirs.timesteps = theirs.timesteps[:-1]
    assert distance(ours(process, "unipc", order=3)[:-1], run(theirs, process)) < EXACT


def test_dpm_2m(process):
    theirs = on_levels(scheduler(process, "DPMSolverMultistep", lower_order_final=False), process)
    assert distance(ours(process, "dpm++2m"), run(theirs, process)) < FLOAT32


def test_dpm_2m_sde(process):
    options = {"algorithm_type": "sde-dpmsolver++", "lower_order_final": False}
    theirs = on_levels(scheduler(process, "DPMSolverMultistep", **options), process)
    assert distance(ours(process, "dpm++2m_sde"), run_with_noise(theirs, process)) < FLOAT32


def whole_parabola():
    class WholeParabola(library("diffusers").DPMSolverMultistepScheduler):
        """Integrates the parabola through three predictions, where theirs weighs its second difference otherwise.

        Theirs is fed with predictions of another second difference, such that its weight times that is the integral's.
        """

        def multistep_dpm_solver_third_order_update(self, outputs, **kwargs):
            *past, now, end = -self.sigmas[self.step_index - 2 : self.step_index + 2].log()
            slopes = [(value - outputs[2]) / (lam - now) for value, lam in zip(outputs[:2], past, strict=True)]
            bend = (slopes[0] - slopes[1]) / (past[0] - past[1])
            bend = bend * (self.proper_share(end - now) - 1)
            bent = [value + bend * (lam - now) ** 2 for value, lam in zip(outputs[:2], past, strict=True)]
            return super().multistep_dpm_solver_third_order_update([*bent, outputs[2]], **kwargs)

        def proper_share(self, h: th.Tensor) -> float:
            """Without noise theirs has half the integral, with noise another sign in it."""
            if self.config.algorithm_type == "dpmsolver++":
                return 2.0
            part = (1 - th.exp(-2 * h) - 2 * h) / (2 * h) ** 2
            return float((2 * part + 1) / (part - 0.5))

    return WholeParabola


@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_dpm_3m(process, eta, algorithm):
    options = {"algorithm_type": algorithm, "solver_order": 3, "solver_type": "heun", "lower_order_final": False}
    theirs = on_levels(scheduler(process, whole_parabola(), **options), process)
    assert distance(ours(process, "dpm++3m_sde", eta=eta), run_with_noise(theirs, process)) < FLOAT32


# our name, their algorithm and the rule of each stage, where the stages lie as shares of the step in lambda
SINGLE_STEP = [
    ("dpm++2s", "dpmsolver++", ["midpoint", "midpoint"], (1 / 2,)),
    ("dpm2", "dpmsolver", ["midpoint", "midpoint"], (1 / 2,)),
    ("dpm3", "dpmsolver", ["midpoint", "heun", "midpoint"], (1 / 3, 2 / 3)),
]


@pytest.mark.parametrize(("name", "algorithm", "rules", "inner"), SINGLE_STEP)
def test_dpm_single_step(process, name, algorithm, rules, inner):
    order = len(rules)
    options = {"solver_order": order, "algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
    theirs = on_levels(scheduler(process, "DPMSolverSinglestep", **options), process, inner)
    theirs.order_list = [*range(1, order + 1)] * (process.num_timesteps - 1) + [1]

    network, x, steps = Oracle(process, DATA), noise(), []
    for t, rule in zip(theirs.timesteps[:-1], rules * process.num_timesteps, strict=False):
        theirs.register_to_config(solver_type=rule)
        x = theirs.step(network(x, t.expand(len(x))), t, x).prev_sample
        steps.append(x)
    assert distance(ours(process, name)[:-1], steps[order - 1 :: order]) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("case", [EMOJI32, IMAGES64], ids=lambda case: case.name)
def test_the_unet_that_benchmarks_compare_with_is_of_the_same_size(case):
    with th.device("meta"):
        ours, theirs = build_unet(case.unet, case.learn_sigma), case.diffusers_unet()
        sizes = [sum(param.numel() for param in network.parameters()) for network in (ours, theirs)]
        out = theirs(th.zeros(1, 3, case.size, case.size), th.zeros(1), th.zeros(1, dtype=th.long))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    assert out.shape == (1, 6 if case.learn_sigma else 3, case.size, case.size)
