"""Step grids, and the process made of a subset of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
from oracle import GaussianData, make_process

from guided_diffusion.respace import SpacedDiffusion, space_timesteps


@pytest.mark.parametrize(
    ("steps", "grid", "expected"),
    [
        (10, "ddim5", {0, 2, 4, 6, 8}),
        (10, "ddim10", set(range(10))),
        (10, "ddim1", {0}),
        (300, "1", {0}),
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
    assert grid[0] == 0
    assert count == 1 or grid[-1] == 999


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
    ],
)
def test_impossible_grids_are_refused_in_a_sentence(steps, grid, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(steps, grid)


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


def test_steps_outside_the_process_are_refused():
    kwargs = {k: getattr(make_process(), k) for k in ("betas", "model_mean_type", "model_var_type", "loss_type")}
    with pytest.raises(ValueError, match=r"use_timesteps must lie in 0 .. 999"):
        SpacedDiffusion(use_timesteps=[5, 1000], **kwargs)
