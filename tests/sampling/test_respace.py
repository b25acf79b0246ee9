"""Step grids, and the process made of a subset of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
from oracle import GaussianData, make_process

from guided_diffusion.respace import GRIDS, SpacedDiffusion, respaced, space_timesteps
from guided_diffusion.sampling.samplers import DDIM, Ancestral


@pytest.mark.parametrize(
    ("steps", "grid", "expected"),
    [
        (10, "ddim5", {0, 2, 4, 6, 8}),
        (10, "ddim10", set(range(10))),
        (10, "ddim1", {9}),  # where sampling starts
        (300, "1", {299}),
        (300, [1], {299}),
        (300, "10,1,1", {0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 100, 200}),
        (10, "2", {0, 9}),
        (11, "5", {0, 2, 5, 8, 10}),  # 2.5 is rounded to even, as ever
        (12, "2,3", {0, 5, 6, 8, 11}),
        (7, "3,3", {0, 2, 3, 4, 5, 6}),  # the first section is the longer one
        (7, [1, 1], {0, 4}),
    ],
)
def test_grids(steps, grid, expected):
    assert space_timesteps(steps, grid) == expected


@pytest.mark.parametrize("count", [1, 3, 10, 100, 999, 1000])
def test_one_section_reaches_from_end_to_end(count):
    grid = sorted(space_timesteps(1000, str(count)))
    assert len(grid) == count
    assert grid[-1] == 999
    assert count == 1 or grid[0] == 0


@pytest.mark.parametrize(
    ("steps", "grid", "message"),
    [
        (1000, "ddim300", "no integer stride takes exactly 300 of 1000 steps: use ddim250 or ddim334"),
        (1000, "ddim3000", "ddim3000 does not fit 1000 steps: use 1 to 1000"),
        (1000, "ddimx", "'ddimx' is not a grid"),
        (1000, "fast27", "'fast27' is not a grid"),
        (1000, "-5", "'-5' is not a grid"),
        (1000, "1001", "cannot take 1001 steps from a section of 1000: use 1 to 1000"),
        (10, "6,6", "cannot take 6 steps from a section of 5"),
        (10, "0,5", "cannot take 0 steps"),
        (1000, "list:10,5", "timesteps 10, 5 are not in rising order, each once"),
        (1000, [0.0, 5.5, 5.5], "timesteps 0, 5.5, 5.5 are not in rising order, each once"),
        (1000, "list:0,1000", r"are not all in 0 .. 999"),
        (1000, "list:-1,5", r"are not all in 0 .. 999"),
        (1000, "list:0,nan", "not in rising order"),
        (1000, "list:0,x", "'list:0,x' is not a list of timesteps: write 'list:0,10.5,999'"),
        (1000, "list:", "'list:' is not a list of timesteps"),
        (1000, "logsnr0", "'logsnr0' has no steps: write logsnr1 or more"),
        (1000, "logsnr10", "'logsnr10' depends on the noise schedule: give alphas_cumprod"),
        (1000, "karras10", "'karras10' depends on the noise schedule: give alphas_cumprod"),
        (1000, "trailing", "'trailing' is not a grid"),
        (1000, "trailing2000", "does not fit 1000 steps: use trailing1000 or less"),
        (1000, "trailing1000001", "has too many steps: write trailing1000000 or less"),
        (1000, "trailing5.5", "is not a grid"),
    ],
)
def test_impossible_grids_are_refused_in_a_sentence(steps, grid, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(steps, grid)


@pytest.mark.parametrize(
    ("kept", "message"), [([5, 1000], r"use_timesteps must lie in 0 .. 999"), ([10.5, 3.0], "not in rising order")]
)
def test_steps_that_a_process_does_not_have_are_refused(kept, message):
    kwargs = {k: getattr(make_process(), k) for k in ("betas", "model_mean_type", "model_var_type", "loss_type")}
    with pytest.raises(ValueError, match=message):
        SpacedDiffusion(use_timesteps=kept, **kwargs)


def test_all_steps_is_the_identity():
    whole = make_process(200)
    spaced = SpacedDiffusion(
        use_timesteps=range(200),
        betas=whole.betas,
        model_mean_type=whole.model_mean_type,
        model_var_type=whole.model_var_type,
        loss_type=whole.loss_type,
    )
    assert np.allclose(spaced.betas, whole.betas, rtol=1e-12)
    assert spaced.timestep_map == whole.timestep_map == list(range(200))
    t = th.tensor([0, 7, 199])
    assert th.equal(spaced._scale_timesteps(t), t)


@pytest.mark.parametrize("grid", ["ddim25", "10,15,20", "50"])
def test_noise_levels_are_kept(grid):
    whole, spaced = make_process(), make_process(respacing=grid)
    assert np.allclose(spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timestep_map], rtol=1e-12)
    assert spaced.use_timesteps == set(spaced.timestep_map)
    assert spaced.original_num_steps == 1000


@pytest.mark.parametrize(("rescale", "fed"), [(False, [0, 300, 600]), (True, [0.0, 75.0, 150.0])])
def test_the_network_is_fed_what_it_was_trained_with(rescale, fed):
    process = make_process(4000, "ddim40", name="cosine")
    process.rescale_timesteps = rescale
    seen = []

    def model(x, timesteps):
        seen.append(timesteps)
        return th.zeros_like(x)

    x, t = th.randn(3, 1, 2, 2), th.tensor([0, 3, 6])
    process.p_mean_variance(model, x, t)
    process.training_losses(model, x, t)
    assert [s.tolist() for s in seen] == [fed, fed]
    assert seen[0].dtype == (th.float32 if rescale else th.int64)


def test_respaced_steps_predict_as_the_whole_process_does():
    whole, spaced = make_process(), make_process(respacing="ddim25")
    x = th.randn(2, 3, 4, 4, dtype=th.float64)
    few = spaced.p_mean_variance(GaussianData(spaced), x, th.tensor([3, 20]))
    many = whole.p_mean_variance(GaussianData(whole), x, th.tensor([120, 800]))
    assert th.allclose(few["pred_xstart"], many["pred_xstart"], atol=1e-10)


LEVELS = make_process(1000).alphas_cumprod


def grid_of(text, steps=1000):
    return space_timesteps(steps, text, alphas_cumprod=LEVELS[:steps])


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 333, 1000])
def test_named_grids_rise_to_the_last_step(name, count):
    grid = grid_of(f"{name}{count}")
    assert len(grid) == count
    assert all(isinstance(tau, float) for tau in grid)
    assert (np.diff(grid) > 0).all()
    assert grid[-1] == 999
    assert count == 1 or grid[0] == (0 if name != "trailing" else pytest.approx(1000 / count - 1))


def test_grids_are_even_in_what_they_are_named_after():
    def evenness(values):
        return np.ptp(np.diff(values)) / np.abs(np.diff(values)).mean()

    lam = make_process(1000).level(np.array(grid_of("logsnr20"))).numpy()
    snr = lam - np.log(-np.expm1(lam))
    assert evenness(snr) < 1e-9
    level = make_process(1000).level(np.array(grid_of("karras20"))).numpy()
    assert evenness((-np.expm1(level) / np.exp(level)) ** (1 / 14)) < 1e-9
    assert evenness(np.sqrt(grid_of("quad20"))) < 1e-9
    assert evenness(grid_of("linspace20")) < 1e-9
    assert grid_of("trailing4") == [249.0, 499.0, 749.0, 999.0]


def test_more_real_steps_than_training_had():
    assert len(grid_of("linspace50", steps=20)) == 50
    assert len(grid_of("logsnr50", steps=20)) == 50


def test_explicit_steps():
    assert space_timesteps(1000, "list:0,10.5,999") == [0.0, 10.5, 999.0]
    assert space_timesteps(1000, [0.0, 10.5, 999.0]) == [0.0, 10.5, 999.0]
    assert space_timesteps(1000, [10, 15]) != [10.0, 15.0]  # whole numbers are counts, as ever


@pytest.mark.parametrize("name", ["logsnr", "karras"])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_grids_by_level_begin_without_signal(name, count):
    process = make_process(100, f"{name}{count}", mean="VELOCITY", zero_terminal_snr=True)
    assert process.alphas_cumprod[-1] == 0
    assert process.timestep_map[-1] == 99
    assert process.timestep_map[0] == 0
    assert count == 2 or 90 < process.timestep_map[-2] < 99


@pytest.mark.parametrize("name", ["logsnr", "karras"])
def test_grids_by_level_hurry_through_what_is_nearly_noise(name):
    """The cosine schedule ends at lambda = -9.9; from there to -5.1 goes one step in twenty, at least one."""
    for count, few in ((3, 1), (20, 1), (40, 2), (200, 10)):
        level = make_process(1000, f"{name}{count}", name="cosine").level
        lam = np.array([float(level(tau)) for tau in make_process(1000, f"{name}{count}", name="cosine").timestep_map])
        lam = (lam - np.log(-np.expm1(lam))) / 2
        assert (lam < -5.1 - 1e-6).sum() == few
        assert np.isclose(lam, -5.1).sum() == 1


def test_the_network_is_fed_real_timesteps():
    process = make_process(100, "list:0,10.5,99")
    process.rescale_timesteps = True
    assert process.timestep_map == [0, 10.5, 99]
    index = th.tensor([0, 1, 2])
    assert process.timesteps(index, th.zeros(3, 1, dtype=th.float64)).tolist() == [0.0, 105.0, 990.0]
    assert process.timesteps(index, th.zeros(3, 1)).dtype == th.float32
    assert make_process(100, "list:0,10,99").timesteps(index, th.zeros(3, 1)).dtype == th.int64
    assert process.alphas_cumprod[1] == pytest.approx(float(make_process(100).level(10.5).exp()))


@pytest.mark.parametrize("grid", ["trailing25", "logsnr25", "list:0,300.5,700,999"])
def test_every_grid_samples_the_same_distribution(grid):
    """A step of DDIM is exact on data without spread, whatever the grid."""
    process = make_process(1000, grid)
    data, noise = GaussianData(process, 0.3, 1e-6), th.randn(2, 3, 4, 4, dtype=th.float64)
    for sampler in (DDIM(), Ancestral()):
        out = process.sample_loop(sampler, data, noise.shape, noise=noise, device="cpu", clip_denoised=False)
        assert (out - 0.3).abs().max() < 1e-4


@pytest.mark.parametrize("grid", ["10", "ddim25", "logsnr12", "list:0,10.5,99"])
def test_a_process_can_be_put_on_another_grid(grid):
    direct = make_process(100, grid, name="cosine", mean="START_X", var="LEARNED_RANGE")
    for start in ("", "ddim20", "trailing7"):
        found = respaced(make_process(100, start, name="cosine", mean="START_X", var="LEARNED_RANGE"), grid)
        assert found.timestep_map == direct.timestep_map
        assert found.betas == pytest.approx(direct.betas, rel=1e-9)
        assert (found.model_mean_type, found.model_var_type) == (direct.model_mean_type, direct.model_var_type)
