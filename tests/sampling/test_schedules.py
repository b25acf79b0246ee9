"""Noise schedules, and the levels between their steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th
from oracle import make_process

from guided_diffusion.config import SCHEDULE_NAMES
from guided_diffusion.diffusion.forward_process import ForwardProcess
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.schedules import (
    SCHEDULES,
    NoiseLevels,
    betas_for_alpha_bar,
    get_named_beta_schedule,
    rescale_zero_terminal_snr,
)


@pytest.mark.parametrize("steps", [21, 100, 1000, 4000])
def test_linear_schedule(steps):
    betas = get_named_beta_schedule("linear", steps)
    assert betas[0] == pytest.approx(0.1 / steps)
    assert betas[-1] == pytest.approx(20 / steps)
    assert np.allclose(np.diff(betas, 2), 0, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 10, 20])
def test_short_linear_schedules_are_clamped_with_a_warning(steps):
    with pytest.warns(UserWarning, match="betas above 0.999: they are clamped"):
        betas = get_named_beta_schedule("linear", steps)
    assert betas.max() <= 0.999
    process = ForwardProcess(betas=betas)
    assert all(np.isfinite(v).all() for v in vars(process).values() if isinstance(v, np.ndarray))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("steps", [30, 1000])
def test_schedules_only_add_noise(name, steps):
    process = make_process(steps, name=name)
    assert (np.diff(process.alphas_cumprod) < 0).all()
    assert process.alphas_cumprod[0] > 0.9
    assert process.alphas_cumprod[-1] < 5e-3


def test_cosine_schedule_follows_the_cosine():
    process = make_process(1000, name="cosine")
    time = np.arange(1, 1001) / 1000
    expected = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 / np.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert np.allclose(process.alphas_cumprod[:-1], expected[:-1], atol=1e-12)  # the last beta is clamped


def test_betas_for_alpha_bar_clamps():
    assert betas_for_alpha_bar(4, lambda time: 1 - time, max_beta=0.6).tolist() == pytest.approx(
        [0.25, 1 / 3, 0.5, 0.6]
    )


def test_unknown_schedule():
    with pytest.raises(ValueError, match="scaled_linear, got 'cosin'; did you mean cosine"):
        get_named_beta_schedule("cosin", 10)


def test_flags_name_every_schedule():
    assert tuple(SCHEDULES) == SCHEDULE_NAMES


@pytest.mark.parametrize("steps", [100, 1000])
def test_scaled_linear_schedule_is_linear_in_the_root(steps):
    betas = get_named_beta_schedule("scaled_linear", steps)
    assert np.allclose(np.diff(np.sqrt(betas), 2), 0, atol=1e-12)
    assert betas[[0, -1]] * steps / 1000 == pytest.approx([0.00085, 0.012])


def test_sigmoid_schedule_follows_the_sigmoid():
    """Jabri et al. 2022: symmetric about the middle of the time."""
    alpha_bar = make_process(1000, name="sigmoid").alphas_cumprod
    assert alpha_bar[:-1] + alpha_bar[:-1][::-1] == pytest.approx(np.ones(999), abs=1e-9)
    start, now, end = (1 / (1 + np.exp(-v)) for v in (-3, 6 * np.arange(1, 1000) / 1000 - 3, 3))
    assert alpha_bar[:-1] == pytest.approx((end - now) / (end - start), abs=1e-9)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_rescaling_leaves_no_signal_at_the_end_and_the_beginning_as_it_was(name):
    betas = get_named_beta_schedule(name, 1000)
    rescaled = rescale_zero_terminal_snr(betas)
    before, after = np.cumprod(1 - betas), np.cumprod(1 - rescaled)
    assert rescaled[-1] == 1
    assert after[-1] == 0
    assert after[0] == pytest.approx(before[0])
    assert (np.diff(after) < 0).all()
    signal = np.sqrt(before)  # an affine map of the signal, as in the paper
    assert np.sqrt(after) == pytest.approx((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1]), abs=1e-9)


def test_levels_reach_down_to_no_signal():
    betas = rescale_zero_terminal_snr(get_named_beta_schedule("linear", 100))
    levels = NoiseLevels(np.cumprod(1 - betas))
    tau = th.linspace(97, 99, 9, dtype=th.float64)
    found = levels.level(tau)
    assert th.isfinite(found).all()
    assert (found.diff() < 0).all()
    assert float(found[-1]) < -35
    assert th.allclose(levels.tau(found), tau, atol=1e-6)


def test_a_single_level_is_everywhere():
    levels = NoiseLevels([0.5])
    assert levels.level(th.tensor([0.0, 3.0])).exp().tolist() == pytest.approx([0.5, 0.5])


def test_linear_schedules_may_have_ends_of_their_own():
    betas = get_named_beta_schedule("scaled_linear:0.0015,0.0195", 1000)
    assert np.allclose([betas[0], betas[-1]], [0.0015, 0.0195])
    assert np.allclose(np.diff(np.sqrt(betas), 2), 0, atol=1e-12)
    assert np.array_equal(get_named_beta_schedule("linear:1e-4,0.02", 50), get_named_beta_schedule("linear", 50))
    for name in ("cosine:0.1,0.2", "linear:0.2,0.1", "linear:0.1", "linear:", "linear:a,b"):
        with pytest.raises(UserError, match="write linear:FIRST,LAST"):
            get_named_beta_schedule(name, 1000)
