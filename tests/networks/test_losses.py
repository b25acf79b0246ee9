"""Divergences and likelihoods against their definitions."""

from __future__ import annotations

import math

import pytest
import torch as th

from guided_diffusion.losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl


def test_kl_is_that_of_torch_distributions():
    a, b, c, d = th.randn(4, 50, dtype=th.float64)
    expected = th.distributions.kl_divergence(
        th.distributions.Normal(a, (b / 2).exp()), th.distributions.Normal(c, (d / 2).exp())
    )
    assert th.allclose(normal_kl(a, b, c, d), expected)


def test_kl_is_zero_for_equals_positive_else_and_takes_numbers():
    mean, log_variance = th.randn(2, 50, dtype=th.float64)
    assert normal_kl(mean, log_variance, mean, log_variance).abs().max() < 1e-15
    assert (normal_kl(mean, log_variance, 0.0, 0.0) > 0).all()
    assert th.allclose(
        normal_kl(0.0, 0.0, mean, log_variance), normal_kl(th.zeros(50).double(), th.zeros(50), mean, log_variance)
    )
    with pytest.raises(ValueError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 1.0, 1.0)


def test_cdf_is_near_the_error_function():
    x = th.linspace(-6, 6, 1001, dtype=th.float64)
    exact = (1 + th.erf(x / math.sqrt(2))) / 2
    assert (approx_standard_normal_cdf(x) - exact).abs().max() < 5e-4


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, -3.0), (0.9, -1.0), (-1.3, 0.5), (0.1, 3.0)])
def test_probabilities_of_all_levels_sum_to_one(mean, log_scale):
    levels = th.linspace(-1, 1, 256, dtype=th.float64)
    one = th.ones_like(levels)
    log_p = discretized_gaussian_log_likelihood(levels, means=mean * one, log_scales=log_scale * one)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_a_fine_scale_puts_everything_into_one_level():
    levels = th.linspace(-1, 1, 256, dtype=th.float64)
    log_p = discretized_gaussian_log_likelihood(levels, means=levels, log_scales=th.full_like(levels, -9.0))
    assert log_p.abs().max() < 1e-9
    other = discretized_gaussian_log_likelihood(levels, means=levels.flip(0), log_scales=th.full_like(levels, -9.0))
    assert other.max() == pytest.approx(math.log(1e-12))
