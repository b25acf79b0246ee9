"""Every sampler against exact answers for Gaussian data, against each other, and against the loop's contract."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import islice, product

import pytest
import torch as th
from few import FEW, few
from oracle import GaussianData, affine_step, make_process, moments

from guided_diffusion.respace import GRIDS
from guided_diffusion.sampling.loop import network_calls
from guided_diffusion.sampling.samplers import (
    DDIM,
    LMS,
    PLMS,
    SAMPLERS,
    Ancestral,
    Euler,
    EulerAncestral,
    Heun,
    make_sampler,
)
from guided_diffusion.sampling.schedules import SCHEDULES
from guided_diffusion.sampling.solvers import (
    DEIS,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2S,
    SASolver,
    UniPC,
)
from guided_diffusion.sampling.steps import Sampler

SHAPE = (2, 3, 4, 4)
NAMES = sorted(set(SAMPLERS) - {"ddim_reverse"})  # from noise to images
RANDOM = {"ddpm": {}, "ddim": {"eta": 1.0}} | {
    name: {} for name in ("dpm++2m_sde", "dpm++3m_sde", "sa", "euler_ancestral")
}


def noise_like(shape=SHAPE, seed=0):
    return th.randn(shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def error(sampler, steps, *, schedule="linear", mean="EPSILON"):
    """Largest distance from the exact flow after nine tenths of a grid of `steps` steps, the sampler's own.

    Not after all of it: sqrt(1 - alpha_bar) has no derivative at t = 0, where no method keeps its order.
    """
    grid = sampler.grid or "linspace"
    process = make_process(1000, f"{grid}{steps + 1}", name=schedule, mean=mean)
    data, noise, level = GaussianData(process), noise_like(), steps // 10
    loop = process.sample_loop_progressive(sampler, data, SHAPE, noise=noise, device="cpu", clip_denoised=False)
    sample = next(islice(loop, steps - 1 - level, None))["sample"]
    exact = data.flow(noise, process.alphas_cumprod[-1], process.alphas_cumprod[level])
    return float((sample - exact).abs().max())


MODELS = [
    *[("linear", "EPSILON"), ("linear", "START_X"), ("linear", "VELOCITY")],
    *[("cosine", "START_X"), ("scaled_linear", "VELOCITY")],
]

CLAIMS = [
    *[(DDIM(), 1), (Euler(), 1), (PLMS(1), 1), (DEIS(1), 1), (LMS(1), 1)],
    *[(PLMS(2), 2), (PLMS(3), 2), (PLMS(4), 2), (DPMSolverPP2M(), 2), (DPMSolverPP2S(), 2), (DPMSolver2(), 2)],
    *[(Heun(), 2), (DEIS(2), 2), (DEIS(3), 2), (DEIS(4), 2), (LMS(2), 2), (LMS(3), 2), (LMS(4), 2), (UniPC(1), 2)],
    *[(DPMSolver3(), 3), (UniPC(2), 3), (UniPC(3), 3)],
    *[(make_sampler("dpm++2m_sde", eta=0.0), 2), (make_sampler("dpm++3m_sde", eta=0.0), 2), (SASolver(2, 0.0), 3)],
]


# one of each family on one model, and one of them on all
MEASURED = (DDIM(), PLMS(2), Heun(), DPMSolverPP2M(), UniPC(2))
ORDERS = few(
    [(*claim, *model) for claim in CLAIMS for model in MODELS],
    lambda row: row[0] == DPMSolverPP2M() or (row[0] in MEASURED and row[2:] == MODELS[3]),
)


@pytest.mark.parametrize(("sampler", "order", "schedule", "mean"), ORDERS, ids=lambda value: str(value)[:28])
def test_order_of_convergence(sampler, order, schedule, mean):
    """The orders that the docstrings claim."""
    numbers = (120, 360) if isinstance(sampler, DEIS) else (60, 180)  # until the start, of order 1, decides
    coarse, fine = (error(sampler, steps, schedule=schedule, mean=mean) for steps in numbers)
    found = math.log(coarse / fine, 3)
    assert found >= order - 0.2
    assert order > 1 or found <= 1.1


def test_every_deterministic_sampler_has_its_order_measured():
    measured = {type(sampler) for sampler, _ in CLAIMS}
    assert {SAMPLERS[name] for name in NAMES if name not in ("ddpm", "euler_ancestral")} <= measured


class Impulses:
    """Finds what each draw of a run does to its end: row k of the batch has the k-th draw at 1 and the others at 0."""

    def __init__(self, sampler, process, model):
        self.sampler, self.process, self.model = sampler, process, model

    def moments(self, last):
        """Mean and variance after the step at index `last`, where everything is affine in the draws."""
        draws = 3 * self.process.num_timesteps
        alpha_bar, data, state, count = self.process.alphas_cumprod[-1], self.model, None, 1
        x = th.full((draws, 1), alpha_bar**0.5 * data.mean, dtype=th.float64)
        x[1] += (alpha_bar * data.std**2 + 1 - alpha_bar) ** 0.5  # row 0 has no draw at 1; x_T is the first one

        def draw():
            nonlocal count
            count += 1
            return (th.arange(draws) == count).double()[:, None]

        predict = self.process.predictor(self.model, clip_denoised=False)
        with self.process.tables_kept({}):
            for index in reversed(range(last, self.process.num_timesteps)):
                t = th.full((draws,), index)
                output, state = self.sampler.step(self.process, predict, x, t, state, draw)
                x = output["sample"]
        assert count < draws
        return float(x[0]), float(((x - x[0]) ** 2).sum())


KNOWN = [(name, *model) for name in sorted(RANDOM) for model in MODELS]


@pytest.mark.parametrize(("name", "schedule", "mean"), few(KNOWN, lambda row: row[0] in FEW and row[1:] == MODELS[3]))
def test_moments_are_exact_to_first_order_in_the_step(name, schedule, mean):
    """Against the data, noised to the level where the run is stopped; four times the steps, a quarter of the error."""
    sampler, errors = make_sampler(name, **RANDOM[name]), []
    for steps in (60, 240):
        grid = sampler.grid or "linspace"
        process = make_process(1000, f"{grid}{steps + 1}", name=schedule, mean=mean, var="FIXED_SMALL")
        level = steps // 10
        mean_found, variance = Impulses(sampler, process, GaussianData(process)).moments(level)
        alpha_bar = process.alphas_cumprod[level - 1]
        expected = alpha_bar**0.5 * 0.3, alpha_bar * 0.25 + 1 - alpha_bar
        errors.append((abs(mean_found - expected[0]), abs(variance - expected[1])))
    for coarse, fine in zip(*errors, strict=True):
        assert fine < max(coarse / 3, 3e-4)
        assert fine < 0.03


SAME = [
    (Euler(), DDIM()),
    (EulerAncestral(), DDIM(1.0)),
    (DEIS(1), DDIM()),
    (LMS(1), DDIM()),
    (PLMS(1), DDIM()),
    (make_sampler("dpm++2m_sde", eta=0.0), DPMSolverPP2M()),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=lambda value: str(value)[:28])
def test_samplers_that_are_one_another(one, other):
    process, images = make_process(respacing="logsnr12"), []
    for sampler in (one, other):
        th.manual_seed(4)
        options = {"noise": noise_like(), "device": "cpu", "clip_denoised": False}
        images.append(process.sample_loop(sampler, GaussianData(process), SHAPE, **options))
    assert th.allclose(*images, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("dpm++") or name in ("unipc", "sa")])
def test_the_first_step_of_solvers_in_x_0_is_ddims(name):
    """Without memory and noise; a singlestep solver agrees to second order."""
    process = make_process(respacing="logsnr60")
    options = {"eta": 0.0} if "eta" in [spec.name for spec in fields(SAMPLERS[name])] else {}
    scales = [
        affine_step(sampler, process, GaussianData(process), 30)[:2]
        for sampler in (make_sampler(name, **options), DDIM())
    ]
    assert scales[0] == pytest.approx(scales[1], abs=2e-3 if name == "dpm++2s" else 1e-12)


@pytest.mark.parametrize("kind", few([Euler, Heun], [Euler]))
def test_churn_keeps_the_distribution(kind):
    """Noise is added and taken away again: mean and variance stay, draws are made."""
    process = make_process(1000, "karras160")
    for sampler in (kind(), kind(churn=60.0), kind(churn=60.0, churn_min=0.05, churn_max=20.0)):
        mean, variance = moments(sampler, process, GaussianData(process), last=16)
        alpha_bar = process.alphas_cumprod[15]
        assert mean == pytest.approx(alpha_bar**0.5 * 0.3, abs=0.01)
        assert variance == pytest.approx(alpha_bar * 0.25 + 1 - alpha_bar, abs=0.01 if kind is Heun else 0.05)
    noise = [affine_step(kind(churn=churn), process, GaussianData(process), 80)[2] for churn in (0.0, 60.0)]
    assert noise[0] == 0
    assert abs(noise[1]) > 0.01


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM])
def test_deterministic_samplers_draw_nothing(name):
    process = make_process(respacing="10")
    options = {"noise": noise_like(), "device": "cpu"}
    before = th.get_rng_state()
    process.sample_loop(make_sampler(name), GaussianData(process), SHAPE, **options)
    assert th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize("respacing", ["ddim25", "40", "10,15,20"])
def test_large_fixed_variance_keeps_unit_gaussians(respacing):
    process = make_process(respacing=respacing)
    mean, variance = moments(Ancestral(), process, GaussianData(process, 0.0, 1.0), last=1)
    assert abs(mean) < 1e-12
    assert abs(variance - 1) < 1e-10


@pytest.mark.parametrize("sampler", few([Ancestral(), DDIM(0.0), DDIM(1.0)], [Ancestral()]), ids=str)
def test_moments_approach_those_of_the_data(sampler):
    process = make_process(var="FIXED_SMALL")
    mean, variance = moments(sampler, process, GaussianData(process, 0.3, 0.5))
    assert abs(mean - 0.3) < 2e-3
    assert abs(variance - 0.25) < 5e-3


@pytest.mark.parametrize("index", [0, 1, 7, 19])
def test_ddim_with_eta_1_is_ancestral_sampling_with_small_variance(index):
    process = make_process(respacing="20", var="FIXED_SMALL")
    data = GaussianData(process)
    assert affine_step(DDIM(1.0), process, data, index) == pytest.approx(
        affine_step(Ancestral(), process, data, index), abs=1e-12
    )


def test_every_loop_yields_the_steps_that_end_in_its_image():
    process = make_process(respacing="10")
    for name in ("p_sample", "ddim_sample", "plms_sample"):
        th.manual_seed(6)
        image = getattr(process, f"{name}_loop")(GaussianData(process), SHAPE, device="cpu")
        th.manual_seed(6)
        steps = list(getattr(process, f"{name}_loop_progressive")(GaussianData(process), SHAPE, device="cpu"))
        assert len(steps) == 10
        assert th.equal(image, steps[-1]["sample"])


@pytest.mark.slow
def test_ddim_reverse_undoes_ddim():
    process = make_process(5040, "ddim504")
    data = GaussianData(process)
    x = x_start = noise_like() * 0.5 + 0.3
    for index in range(process.num_timesteps - 1):
        x = process.ddim_reverse_sample(data, x, th.tensor([index] * 2), clip_denoised=False)["sample"]
    for index in reversed(range(1, process.num_timesteps)):
        x = process.ddim_sample(data, x, th.tensor([index] * 2), clip_denoised=False)["sample"]
    assert (x - x_start).abs().max() < 0.02


@pytest.mark.parametrize("mean", ["START_X", "PREVIOUS_X", "VELOCITY"])
@pytest.mark.parametrize("name", few(NAMES))
def test_what_the_network_predicts_does_not_matter(name, mean):
    results = []
    for kind in ("EPSILON", mean):
        process = make_process(respacing="ddim10", mean=kind)
        th.manual_seed(3)
        options = {"noise": noise_like(), "device": "cpu", "clip_denoised": False}
        results.append(process.sample_loop(make_sampler(name), GaussianData(process), SHAPE, **options))
    assert th.allclose(*results, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_network_calls(name):
    process = make_process(respacing="ddim10")
    data = GaussianData(process)
    process.sample_loop(make_sampler(name), data, SHAPE, device="cpu")
    more = {"plms": 11, "heun": 19, "dpm2": 19, "dpm++2s": 19, "dpm3": 28}
    assert data.calls == more.get(name, 10) == network_calls(process, make_sampler(name))


@pytest.mark.parametrize("name", NAMES)
def test_single_step_process(name):
    process = make_process(respacing="1")
    out = process.sample_loop(make_sampler(name), GaussianData(process), SHAPE, noise=noise_like(), device="cpu")
    assert th.isfinite(out).all()


EVERY_SAMPLER = [
    *[make_sampler(name) for name in NAMES],
    *[DDIM(eta) for eta in (0.5, 1.0, 2.0)],
    *[EulerAncestral(3.0), Euler(churn=5.0), Euler(churn=100.0), Heun(churn=5.0), Heun(churn=100.0)],
    *[make_sampler(name, eta=eta) for name in ("dpm++2m_sde", "dpm++3m_sde", "sa") for eta in (0.0, 5.0)],
    *[PLMS(1), PLMS(4), DEIS(4), LMS(1), UniPC(3), SASolver(3)],
]
KINDS = [*product(("EPSILON", "START_X", "VELOCITY"), (False,)), *product(("START_X", "VELOCITY"), (True,))]


@pytest.mark.parametrize("turn", few(range(2), [0]))
def test_every_sampler_is_finite_in_few_steps(turn):
    """In float32, whose rounding shows next to where there is no signal or no noise; grids and numbers take turns."""
    broken, noise, grids = [], noise_like((2, 1)).float(), ("", *GRIDS)
    for number, (schedule, (mean, zero_terminal_snr)) in enumerate(product(SCHEDULES, KINDS)):
        grid = f"{grids[(2 * number + turn) % len(grids)]}{(2, 3, 1, 4)[(number + turn) % 4]}"
        process = make_process(1000, grid, name=schedule, mean=mean, zero_terminal_snr=zero_terminal_snr)
        for sampler in EVERY_SAMPLER:
            network = lambda x, timesteps: x * 0.9 if mean == "EPSILON" else x * 0 + 0.5  # noqa: B023, E731
            out = process.sample_loop(sampler, network, noise.shape, noise=noise, device="cpu")
            if not th.isfinite(out).all():
                broken.append((sampler, schedule, mean, zero_terminal_snr, grid))
    assert broken == []


@pytest.mark.parametrize("eta", [1.0, 1.5, 100.0])
def test_no_more_noise_is_added_than_there_is(eta):
    """All of it at most: what is left of the step is then the prediction of x_0. Rounding does not break that."""
    x, noise = noise_like().float(), noise_like(seed=1).float()
    for grid, zero_terminal_snr in product(("ddim25", "logsnr20", *(f"trailing{n}" for n in range(5, 25))), (0, 1)):
        process = make_process(1000, grid, mean="VELOCITY", zero_terminal_snr=bool(zero_terminal_snr))
        predict = process.predictor(GaussianData(process))
        for index in (0, 1, process.num_timesteps - 1):
            t = th.tensor([index] * 2)
            output, _ = DDIM(eta).step(process, predict, x, t, None, lambda: noise)
            assert th.isfinite(output["sample"]).all()
            if eta == 100.0 and index:
                level = process.at(t - 1, x)
                expected = level.alpha * output["pred_xstart"] + level.sigma * noise
                assert th.allclose(output["sample"].double(), expected, atol=2e-3)


def test_steps_are_lazy_and_taken_one_at_a_time():
    process = make_process(respacing="ddim10")
    data = GaussianData(process)
    steps = process.p_sample_loop_progressive(data, SHAPE, device="cpu")
    assert data.calls == 0
    for expected in (1, 2, 3):
        next(steps)
        assert data.calls == expected


def test_the_loop_does_not_change_the_consumers_grad_mode():
    process = make_process(respacing="ddim10")
    for output in process.ddim_sample_loop_progressive(GaussianData(process), SHAPE, device="cpu"):
        assert th.is_grad_enabled()
        assert not output["sample"].requires_grad


@pytest.mark.parametrize("name", few(NAMES))
def test_a_step_of_any_sampler_keeps_its_graph(name):
    """Also the last one, and also with a memory: with derivatives that are finite and right."""
    process = make_process(respacing="ddim10")
    predict = process.predictor(GaussianData(process), clip_denoised=False)
    sampler, state = make_sampler(name, **({"eta": 0.0} if name in ("ddim",) else {})), None
    for index in (7, 6, 5, 1, 0):
        x, t = noise_like().requires_grad_(), th.tensor([index] * 2)
        output, after = sampler.step(process, predict, x, t, state, lambda: noise_like(seed=1))
        (grad,) = th.autograd.grad(output["sample"].sum(), x, retain_graph=True)
        moved, _ = sampler.step(process, predict, x + 1e-4, t, state, lambda: noise_like(seed=1))
        assert th.allclose(grad, (moved["sample"] - output["sample"]) / 1e-4, atol=1e-6)
        state = None if after is None else tuple(value.detach() for value in after)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_step_may_be_at_different_t(name):
    process = make_process(respacing="10")
    predict = process.predictor(GaussianData(process), clip_denoised=False)
    x, noise, sampler = noise_like((3, 3, 4, 4)), noise_like((3, 3, 4, 4), 1), make_sampler(name)

    def step(rows, t, state=None):
        return sampler.step(process, predict, x[rows], th.tensor(t), state, lambda: noise[rows])

    together, state = step(slice(0, 3), [8, 4, 1])
    both, _ = step(slice(0, 3), [7, 3, 0], state)
    for row, t in enumerate([8, 4, 1]):
        part = slice(row, row + 1)
        alone, state = step(part, [t])
        assert th.allclose(together["sample"][part], alone["sample"], atol=1e-12)
        after, _ = step(part, [t - 1], state)
        assert th.allclose(both["sample"][part], after["sample"], atol=1e-12)


@pytest.mark.parametrize("mean", few(["START_X", "VELOCITY"], ["VELOCITY"]))
@pytest.mark.parametrize("name", few(NAMES))
def test_from_pure_noise(name, mean):
    """Where alpha_bar ends at 0 every sampler still finds the way: the exact flow begins with x_T itself."""
    sampler = make_sampler(name, **({"eta": 0.0} if name in ("dpm++2m_sde", "dpm++3m_sde", "sa") else {}))
    process = make_process(1000, "trailing200", mean=mean, zero_terminal_snr=True, var="FIXED_SMALL")
    data, noise = GaussianData(process), noise_like()
    out = process.sample_loop(sampler, data, SHAPE, noise=noise, device="cpu", clip_denoised=False)
    assert th.isfinite(out).all()
    if name not in ("ddpm", "euler_ancestral"):
        assert (out - data.flow(noise, 0.0, 1.0)).abs().max() < 0.06
    assert data.calls == network_calls(process, sampler)


@pytest.mark.parametrize("name", few(NAMES))
def test_images_in_float32_are_those_in_float64(name):
    process, images = make_process(respacing="logsnr30"), []
    for dtype in (th.float32, th.float64):
        generators = [th.Generator().manual_seed(seed) for seed in (1, 2)]
        options = {"noise": noise_like().to(dtype), "device": "cpu", "generator": generators}
        sampler = make_sampler(name, **({"eta": 0.0} if name in RANDOM and name != "ddpm" else {}))
        if name != "ddpm":
            images.append(process.sample_loop(sampler, GaussianData(process), SHAPE, **options).double())
    assert name == "ddpm" or th.allclose(*images, atol=2e-4)


@pytest.mark.parametrize("name", few(NAMES))
def test_steps_by_hand_are_the_loops(name):
    """The state is a value: a step can be taken twice, and gives the same."""
    process = make_process(respacing="10")
    data, sampler, x, state = GaussianData(process), make_sampler(name), noise_like(), None
    predict = process.predictor(data)
    for index in reversed(range(10)):
        kept = None if state is None else [value.clone() for value in state]
        t, noise = th.tensor([index] * 2), noise_like(seed=index)
        twice = [sampler.step(process, predict, x, t, state, lambda noise=noise: noise) for _ in range(2)]
        assert th.equal(twice[0][0]["sample"], twice[1][0]["sample"])
        assert kept is None or all(map(th.equal, kept, state))
        output, state = twice[0]
        x = output["sample"]
    numbers = iter(reversed(range(10)))
    original, process.predictor = process.predictor, lambda *_, **__: predict
    loop = process.sample_loop_progressive(_Scripted(sampler, numbers), data, SHAPE, noise=noise_like(), device="cpu")
    assert th.equal(x, list(loop)[-1]["sample"])
    process.predictor = original


class _Scripted(Sampler):
    """A sampler whose draws are given."""

    def __init__(self, sampler, numbers):
        self.sampler, self.numbers = sampler, numbers

    def step(self, process, predict, x, t, state, draw):
        number = next(self.numbers)
        return self.sampler.step(process, predict, x, t, state, lambda: noise_like(seed=number))


def test_a_step_called_alone_keeps_its_graph():
    process = make_process(respacing="ddim10")
    x = noise_like().requires_grad_()
    for step in (process.p_sample, process.ddim_sample, process.plms_sample):
        (grad,) = th.autograd.grad(step(GaussianData(process), x, th.tensor([5, 5]))["sample"].sum(), x)
        assert grad.abs().sum() > 0


def test_plms_state_is_a_value():
    """Steps by hand with old_out give the loop's images, and leave what they are given as it was."""
    process = make_process(respacing="ddim10")
    data, x, out, kept = GaussianData(process), noise_like(), None, []
    for index in reversed(range(10)):
        before = None if out is None else list(out["old_eps"])
        new = process.plms_sample(data, x, th.tensor([index] * 2), order=3, old_out=out)
        if out is not None:
            assert len(out["old_eps"]) == len(before)
            assert all(a is b for a, b in zip(out["old_eps"], before, strict=True))
        out, x = new, new["sample"]
        kept.append(out)
    assert th.equal(x, process.plms_sample_loop(data, SHAPE, noise=noise_like(), device="cpu", order=3))
    assert [len(o["old_eps"]) for o in kept[:4]] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *[("dpmpp_2m", "dpm++2m"), ("sample_dpmpp_2m_sde", "dpm++2m_sde"), ("dpmpp_3m_sde", "dpm++3m_sde")],
        *[("sample_dpm_2", "dpm2"), ("k_euler_ancestral", "euler_ancestral"), ("sample_heun", "heun")],
        *[("DPM++ 2M", "dpm++2m"), ("DPM++ 2M SDE", "dpm++2m_sde"), ("Euler a", "euler_ancestral"), ("UniPC", "unipc")],
        *[("DPMSolverMultistepScheduler", "dpm++2m"), ("PNDMScheduler", "plms"), ("KDPM2DiscreteScheduler", "dpm2")],
        *[("EulerAncestralDiscreteScheduler", "euler_ancestral"), ("UniPCMultistepScheduler", "unipc")],
        *[("LMSDiscreteScheduler", "lms"), ("DEISMultistepScheduler", "deis"), ("SASolverScheduler", "sa")],
        *[(name, name) for name in SAMPLERS],
    ],
)
def test_other_libraries_names_lead_to_ours(theirs, ours):
    assert make_sampler(theirs) == SAMPLERS[ours]()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dpm++", r"did you mean dpm\+\+2m\?"),
        ("unipq", "sampler 'unipq' is unknown: use one of ddpm, .*; did you mean unipc"),
        ("DPM++ 2M Karras", "; karras is a grid of steps: use dpm\\+\\+2m on the grid 'karras20'"),
        ("", "sampler '' is unknown"),
    ],
)
def test_an_unknown_name_is_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_sampler(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_a_sampler_wherever_one_is_taken(name):
    process, images = make_process(respacing="5"), []
    for sampler in (name, make_sampler(name)):
        th.manual_seed(1)
        images.append(process.sample_loop(sampler, GaussianData(process), SHAPE, device="cpu"))
        assert network_calls(process, sampler) == network_calls(process, SAMPLERS[name]())
    assert th.equal(*images)


class Stepping:
    """It has a step, and does not say what else a loop asks."""

    step = DDIM.step


@pytest.mark.parametrize("sampler", [DDIM, None, 7, Stepping()])
def test_what_is_no_sampler_is_refused(sampler):
    process = make_process(respacing="5")
    with pytest.raises(TypeError, match="a sampler must be a name, or a Sampler"):
        process.sample_loop(sampler, GaussianData(process), SHAPE, device="cpu")


@pytest.mark.parametrize("name", few(NAMES))
def test_one_generator_per_image_makes_images_independent_of_their_batch(name):
    process = make_process(respacing="10")

    def run(seeds):
        generators = [th.Generator().manual_seed(seed) for seed in seeds]
        shape = (len(seeds), *SHAPE[1:])
        return process.sample_loop(make_sampler(name), GaussianData(process), shape, device="cpu", generator=generators)

    before = th.get_rng_state()
    together, alone = run([1, 2, 3]), run([2])
    assert th.allclose(together[1:2], alone, atol=1e-6)
    assert th.equal(th.get_rng_state(), before)


def test_one_generator_is_the_global_one_in_disguise():
    process = make_process(respacing="10")
    th.manual_seed(5)
    expected = process.p_sample_loop(GaussianData(process), SHAPE, device="cpu")
    again = process.p_sample_loop(GaussianData(process), SHAPE, device="cpu", generator=th.Generator().manual_seed(5))
    assert th.equal(expected, again)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_noise_follows_the_dtype_of_the_images(dtype):
    """A step draws like x, alone and in the loop."""
    process, noise = make_process(respacing="10"), noise_like().to(dtype)
    th.manual_seed(4)
    expected = noise
    for index in reversed(range(10)):
        expected = process.p_sample(GaussianData(process), expected, th.tensor([index] * 2))["sample"]
    th.manual_seed(4)
    image = process.p_sample_loop(GaussianData(process), SHAPE, noise=noise, device="cpu")
    assert image.dtype == dtype
    assert th.equal(image, expected)


@pytest.mark.parametrize("name", NAMES)
def test_skipping_every_step_returns_the_image(name):
    process = make_process(respacing="10")
    image = noise_like()
    out = process.sample_loop(
        make_sampler(name),
        GaussianData(process),
        SHAPE,
        noise=noise_like(seed=1),
        device="cpu",
        skip_timesteps=10,
        init_image=image,
    )
    assert th.equal(out, image)


def test_skipping_starts_from_the_noised_image():
    process = make_process(respacing="10")
    image, noise, seen = noise_like(), noise_like(seed=1), []

    def spy(x, timesteps):
        seen.append((x, int(timesteps[0])))
        return GaussianData(process)(x, timesteps)

    process.ddim_sample_loop(spy, SHAPE, noise=noise, device="cpu", skip_timesteps=4, init_image=image)
    assert len(seen) == 6
    assert seen[0][1] == process.timestep_map[5]
    assert th.equal(seen[0][0], process.q_sample(image, th.tensor([5, 5]), noise))


@pytest.mark.parametrize("skip", [4, 10])
def test_one_image_starts_all_samples(skip):
    process = make_process(respacing="10")
    image = noise_like()[:1]
    noise = noise_like(seed=1)

    def sample(start):
        return process.ddim_sample_loop(
            GaussianData(process), SHAPE, noise=noise, device="cpu", skip_timesteps=skip, init_image=start
        )

    assert th.equal(sample(image), sample(image.expand(SHAPE)))


class Labelled(GaussianData):
    num_classes = 5

    def __call__(self, x, timesteps, y=None):
        self.seen = [*getattr(self, "seen", []), y]
        return super().__call__(x, timesteps)


def test_random_classes_leave_the_callers_labels_alone():
    process = make_process(respacing="10")
    data, kwargs = Labelled(process), {"y": th.tensor([0, 4])}
    process.p_sample_loop(data, SHAPE, device="cpu", model_kwargs=kwargs, randomize_class=True)
    assert len({tuple(y.tolist()) for y in data.seen}) > 1
    assert all(int(y.min()) >= 0 and int(y.max()) < 5 for y in data.seen)
    assert kwargs["y"].tolist() == [0, 4]


@pytest.mark.parametrize("kwargs", [None, {}])
def test_random_classes_change_nothing_where_there_are_no_labels(kwargs):
    """Notebooks ask for them whatever the model is; nothing is drawn then."""
    process, images = make_process(respacing="10"), []
    for randomize in (False, True):
        th.manual_seed(9)
        options = {"device": "cpu", "model_kwargs": kwargs, "randomize_class": randomize}
        images.append(process.p_sample_loop(GaussianData(process), SHAPE, **options))
    assert th.equal(*images)


def test_random_classes_need_a_number_of_classes():
    process = make_process(respacing="10")
    with pytest.raises(ValueError, match="class-conditional"):
        kwargs = {"y": th.tensor([0, 4])}
        process.p_sample_loop(GaussianData(process), SHAPE, device="cpu", model_kwargs=kwargs, randomize_class=True)


def test_labels_out_of_range_are_refused_before_the_network_sees_them():
    process = make_process(respacing="10")
    data = Labelled(process)
    with pytest.raises(ValueError, match=r"class 5 does not exist: the classes are 0 \.\. 4"):
        process.p_sample_loop(data, SHAPE, device="cpu", model_kwargs={"y": th.tensor([1, 5])})
    assert data.calls == 0


def test_progress_bar_counts_the_steps(capsys):
    process = make_process(respacing="10")
    process.p_sample_loop(GaussianData(process), SHAPE, device="cpu", progress=True)
    assert "10/10" in capsys.readouterr().err


def test_make_sampler_names_what_is_allowed():
    assert make_sampler("ddim", eta=0.5) == DDIM(0.5)
    with pytest.raises(ValueError, match=r"use one of ddpm, ddim, .*; did you mean plms"):
        make_sampler("plmss")
    process = make_process(respacing="10")
    with pytest.raises(ValueError, match="but only the deterministic path, eta = 0"):
        process.ddim_reverse_sample(GaussianData(process), noise_like(), th.tensor([1, 1]), eta=0.5)
    with pytest.raises(ValueError, match="no option eta: it is an option of ddim"):
        make_sampler("ddpm", eta=0.5)
    for name, most in (("plms", 4), ("deis", 4), ("lms", 4), ("unipc", 3), ("sa", 3)):
        with pytest.raises(ValueError, match=f"order 5 of .* is unknown: use 1, 2.* or {most}"):
            make_sampler(name, order=5)
    for name, option in (("ddim", "eta"), ("dpm++2m_sde", "eta"), ("sa", "eta"), ("heun", "churn")):
        with pytest.raises(ValueError, match=f"{option} -0.5 is not a number from 0 on"):
            make_sampler(name, **{option: -0.5})
    with pytest.raises(ValueError, match=r"the sampler dpm\+\+2m has no option churn: it is an option of heun, euler"):
        make_sampler("dpm++2m", churn=1.0)


def drawing(x, timesteps, **kwargs):
    return 0.1 * th.randn_like(x)


def by_hand(process, data, noise_first, step):
    """The loop in ten lines: noise and gradient drawn in the given order."""
    x = th.randn(SHAPE)
    for index in reversed(range(process.num_timesteps)):
        t = th.tensor([index] * 2)
        out = process.p_mean_variance(data, x, t)
        draws = [th.randn_like(x), th.randn_like(x)]
        noise, gradient = (draws[0], 0.1 * draws[1]) if noise_first else (draws[1], 0.1 * draws[0])
        x = step(process, out, x, t, noise, gradient)
    return x


def ancestral(process, out, x, t, noise, gradient):
    return out["mean"] + out["variance"] * gradient + (t[0] > 0) * th.exp(out["log_variance"] / 2) * noise


def ddim_half(process, out, x, t, noise, gradient):
    index = int(t[0])
    now, before = process.alphas_cumprod[index], process.alphas_cumprod_prev[index]
    eps = (x - now**0.5 * out["pred_xstart"]) / (1 - now) ** 0.5 - (1 - now) ** 0.5 * gradient
    xstart = (x - (1 - now) ** 0.5 * eps) / now**0.5
    sigma = 0.5 * ((1 - before) / (1 - now) * (1 - now / before)) ** 0.5
    return before**0.5 * xstart + (1 - before - sigma**2) ** 0.5 * eps + (index > 0) * sigma * noise


@pytest.mark.parametrize(
    ("sampler", "noise_first", "step"),
    [(Ancestral(), True, ancestral), (DDIM(0.5), False, ddim_half)],
    ids=["ddpm", "ddim"],
)
def test_a_cond_fn_that_draws_gets_its_turn_in_the_public_order(sampler, noise_first, step):
    process = make_process(respacing="10")
    data = GaussianData(process)
    th.manual_seed(8)
    expected = by_hand(process, data, noise_first, step)
    th.manual_seed(8)
    out = process.sample_loop(sampler, data, SHAPE, device="cpu", cond_fn=drawing, clip_guided=False)
    assert th.allclose(out, expected, atol=2e-5)
