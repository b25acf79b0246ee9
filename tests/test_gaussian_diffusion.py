"""The process against its definition, and its losses against the exact network."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch as th
from oracle import GaussianData, make_process

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    _extract_into_tensor,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)

SHAPE = (4, 3, 4, 4)
T_ALL = th.tensor([0, 1, 50, 99])


def noise_like(seed=0):
    return th.randn(SHAPE, generator=th.Generator().manual_seed(seed), dtype=th.float64)


# ---- schedules


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
    process = make_noisy(betas)
    assert all(np.isfinite(v).all() for v in vars(process).values() if isinstance(v, np.ndarray))


def make_noisy(betas, **kwargs):
    types = {
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_LARGE,
        "loss_type": LossType.MSE,
    }
    return GaussianDiffusion(betas=betas, **{**types, **kwargs})


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [30, 1000])
def test_schedules_only_add_noise(name, steps):
    process = make_process(steps, name=name)
    assert (np.diff(process.alphas_cumprod) < 0).all()
    assert process.alphas_cumprod[0] > 0.9
    assert process.alphas_cumprod[-1] < 1e-3


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
    with pytest.raises(ValueError, match="use linear or cosine; did you mean cosine"):
        get_named_beta_schedule("cosin", 10)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.2], [[0.1], [0.2]], [0.1, math.nan]])
def test_betas_must_be_a_row_of_numbers_between_0_and_1(betas):
    with pytest.raises(ValueError, match="betas must be a row of numbers"):
        make_noisy(betas)


# ---- moments


def test_forward_process_is_a_chain_of_its_steps():
    """q(x_t | x_0) equals t + 1 steps of N(sqrt(1 - beta) x, beta)."""
    process = make_process(100)
    x = noise_like()
    scale, variance = 1.0, 0.0
    for t, beta in enumerate(process.betas):
        scale, variance = scale * math.sqrt(1 - beta), variance * (1 - beta) + beta
        mean, var, log_var = process.q_mean_variance(x, th.full((4,), t))
        assert th.allclose(mean, scale * x)
        assert th.allclose(var, th.full_like(x, variance))
        assert th.allclose(log_var, th.full_like(x, math.log(variance)))


def test_q_sample_is_mean_plus_deviation_times_noise():
    process = make_process(100)
    x, noise = noise_like(), noise_like(1)
    mean, variance, _ = process.q_mean_variance(x, T_ALL)
    assert th.allclose(process.q_sample(x, T_ALL, noise), mean + variance.sqrt() * noise)
    th.manual_seed(4)
    drawn = process.q_sample(x, T_ALL)
    th.manual_seed(4)
    assert th.equal(drawn, process.q_sample(x, T_ALL, th.randn_like(x)))
    with pytest.raises(ValueError, match="does not fit x_start"):
        process.q_sample(x, T_ALL, noise[:2])


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) from the product of two Gaussians."""
    process = make_process(100)
    x_start, x = noise_like(), noise_like(1)
    mean, variance, log_variance = process.q_posterior_mean_variance(x_start, x, T_ALL)
    for row, t in enumerate(T_ALL.tolist()):
        beta, before = process.betas[t], process.alphas_cumprod_prev[t]
        if t == 0:
            assert th.allclose(mean[row], x_start[row])
            assert log_variance[row].flatten()[0] == pytest.approx(math.log(process.posterior_variance[1]))
            continue
        precision = (1 - beta) / beta + 1 / (1 - before)
        expected = (math.sqrt(1 - beta) / beta * x[row] + math.sqrt(before) / (1 - before) * x_start[row]) / precision
        assert th.allclose(mean[row], expected)
        assert th.allclose(variance[row], th.tensor(1 / precision, dtype=th.float64))
        assert th.allclose(log_variance[row].exp(), variance[row])


def test_predictions_turn_into_each_other():
    process = make_process(100)
    x, eps = noise_like(), noise_like(1)
    x_start = process._predict_xstart_from_eps(x, T_ALL, eps)
    assert th.allclose(process._predict_eps_from_xstart(x, T_ALL, x_start), eps)
    mean = process.q_posterior_mean_variance(x_start, x, T_ALL)[0]
    assert th.allclose(process._predict_xstart_from_xprev(x, T_ALL, mean), x_start)
    assert th.allclose(process.q_sample(x_start, T_ALL, eps), x)


@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "PREVIOUS_X"])
def test_reverse_moments_of_the_exact_network(mean):
    process = make_process(100, mean=mean, var="FIXED_SMALL")
    data, x = GaussianData(process), noise_like()
    out = process.p_mean_variance(data, x, T_ALL, clip_denoised=False)
    process.model_mean_type = ModelMeanType.START_X
    exact = data(x, T_ALL)
    assert th.allclose(out["pred_xstart"], exact)
    assert th.allclose(out["mean"], process.q_posterior_mean_variance(exact, x, T_ALL)[0])


def test_denoised_fn_comes_before_clipping():
    process = make_process(100)
    data, x = GaussianData(process), 3 * noise_like()
    out = process.p_mean_variance(data, x, T_ALL, denoised_fn=lambda v: 5 * v)
    assert out["pred_xstart"].abs().max() == 1


@pytest.mark.parametrize("var", ["LEARNED", "LEARNED_RANGE"])
def test_learned_variance(var):
    process = make_process(100, var=var)
    x = noise_like()
    for value, name in ((-1.0, "small"), (1.0, "large")):
        out = process.p_mean_variance(lambda x, t, v=value: th.cat([x, th.full_like(x, v)], 1), x, T_ALL)
        if var == "LEARNED":
            expected = th.full_like(x, value)
        else:
            table = np.log(process.betas) if name == "large" else process.posterior_log_variance_clipped
            expected = th.from_numpy(table)[T_ALL].view(4, 1, 1, 1).expand_as(x)
        assert th.allclose(out["log_variance"], expected)
        assert th.allclose(out["variance"], expected.exp())


@pytest.mark.parametrize(("var", "channels"), [("LEARNED_RANGE", 3), ("FIXED_LARGE", 6)])
def test_a_network_with_other_channels_is_refused(var, channels):
    process = make_process(100, var=var)
    with pytest.raises(ValueError, match="does learn_sigma fit"):
        process.p_mean_variance(lambda x, t: th.zeros(4, channels, 4, 4), noise_like(), T_ALL)


# ---- losses


def test_mse_of_the_exact_network_is_the_noise_that_cannot_be_known():
    """E (eps - E[eps | x_t])^2 = 1 - (1 - alpha_bar) / total, to the accuracy of the sample."""
    process = make_process(100)
    data = GaussianData(process)
    x = data.mean + data.std * th.randn(4, 50_000, dtype=th.float64)
    mse = process.training_losses(data, x, T_ALL)["mse"]
    alpha_bar = process.alphas_cumprod[T_ALL.numpy()]
    expected = alpha_bar * data.std**2 / (alpha_bar * data.std**2 + 1 - alpha_bar)
    assert mse.tolist() == pytest.approx(expected.tolist(), rel=0.05)


@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "PREVIOUS_X"])
def test_perfect_knowledge_has_no_loss(mean):
    process = make_process(100, mean=mean)
    x, noise = noise_like(), noise_like(1)
    x_t = process.q_sample(x, T_ALL, noise)
    answer = {"EPSILON": noise, "START_X": x, "PREVIOUS_X": process.q_posterior_mean_variance(x, x_t, T_ALL)[0]}[mean]
    losses = process.training_losses(lambda x, t: answer, x, T_ALL, noise=noise)
    assert losses["loss"].abs().max() < 1e-20


def learned(scale, loss="MSE"):
    process = make_process(100, var="LEARNED_RANGE")
    process.loss_type = LossType[loss]
    weights = th.tensor(scale, dtype=th.float64, requires_grad=True)

    def model(x, t):
        return th.cat([weights[0] * x, weights[1] * th.tanh(x)], 1)

    return process, model, weights


def test_the_bound_trains_the_variance_and_not_the_mean():
    process, model, weights = learned([0.5, 0.3])
    x, noise = noise_like().clamp(-1, 1), noise_like(1)
    losses = process.training_losses(model, x, T_ALL, noise=noise)
    (vb,) = th.autograd.grad(losses["vb"].sum(), weights, retain_graph=True)
    (mse,) = th.autograd.grad(losses["mse"].sum(), weights)
    assert vb[0] == 0
    assert vb[1] != 0
    assert mse[0] != 0
    assert mse[1] == 0
    assert th.allclose(losses["loss"], losses["mse"] + losses["vb"])


def test_rescaled_losses_differ_by_their_factor():
    x, noise = noise_like().clamp(-1, 1), noise_like(1)
    out = {}
    for loss in ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL"):
        process, model, _ = learned([0.5, 0.3], loss)
        out[loss] = process.training_losses(model, x, T_ALL, noise=noise)
    assert th.allclose(out["RESCALED_MSE"]["vb"], out["MSE"]["vb"] * 100 / 1000)
    assert th.allclose(out["RESCALED_KL"]["loss"], out["KL"]["loss"] * 100)
    assert set(out["KL"]) == {"loss"}
    assert LossType.KL.is_vb()
    assert not LossType.MSE.is_vb()


# ---- likelihood


def test_bits_per_dimension_add_up():
    process = make_process(100, var="FIXED_SMALL")
    data = GaussianData(process)
    x = (noise_like() * data.std + data.mean).clamp(-1, 1)
    out = process.calc_bpd_loop(data, x, clip_denoised=False)
    assert out["vb"].shape == out["mse"].shape == out["xstart_mse"].shape == (4, 100)
    assert th.allclose(out["total_bpd"], out["vb"].sum(1) + out["prior_bpd"])
    # KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2
    prior = process.alphas_cumprod[-1] * (x**2).mean((1, 2, 3)) - process.alphas_cumprod[-1]
    prior = (prior - math.log(1 - process.alphas_cumprod[-1])) / 2 / math.log(2)
    assert th.allclose(out["prior_bpd"], prior)


def test_the_bound_of_the_best_network_is_the_entropy_of_the_data():
    """With the best mean and variance in every step the bound of Gaussian data is its entropy.

    At 8 bits that is log2(127.5 std sqrt(2 pi e)); Gaussian steps lose nothing on Gaussian data.
    """
    process = make_process(1000, var="LEARNED")
    data = GaussianData(process, 0.0, 0.2)
    alpha_bar = process.alphas_cumprod
    unknown = data.std**2 * (1 - alpha_bar) / (alpha_bar * data.std**2 + 1 - alpha_bar)
    best = th.from_numpy(np.log(process.posterior_variance + process.posterior_mean_coef1**2 * unknown))

    def model(x, t):
        return th.cat([data(x, t), best[t].view(-1, 1).expand_as(x)], 1)

    x = ((th.randn(2, 8000, dtype=th.float64) * 0.2).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    bits = float(process.calc_bpd_loop(model, x, clip_denoised=False)["total_bpd"].mean())
    assert bits == pytest.approx(math.log2(127.5 * 0.2 * math.sqrt(2 * math.pi * math.e)), abs=0.03)


# ---- tables


def test_tables_keep_the_precision_of_what_they_multiply():
    process = make_process(100)
    for dtype in (th.float32, th.float64):
        assert process.q_sample(noise_like().to(dtype), T_ALL, noise_like(1).to(dtype)).dtype == dtype
    assert process.q_sample(noise_like().bfloat16(), T_ALL, noise_like(1).bfloat16()).dtype == th.float32


def test_public_arrays_are_float64():
    process = make_process(100, "25")
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod",
                 "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
                 "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
                 "posterior_mean_coef1", "posterior_mean_coef2"):  # fmt: skip
        array = getattr(process, name)
        assert array.dtype == np.float64
        assert array.shape == (25,)


def test_extract_into_tensor():
    out = _extract_into_tensor(np.array([0.5, 1.5, 2.5]), th.tensor([2, 0]), (2, 3, 4))
    assert out.dtype == th.float32
    assert out.shape == (2, 3, 4)
    assert out[:, 0, 0].tolist() == [2.5, 0.5]


def test_a_process_can_be_pickled():
    process = make_process(100, "25")
    process.q_sample(noise_like(), T_ALL // 4)
    again = pickle.loads(pickle.dumps(process))
    assert (again.betas == process.betas).all()


def wrapped(process):
    """What k-diffusion's wrapper for these models needs: alphas_cumprod and a model of (x, timesteps)."""
    sigmas = th.from_numpy(((1 - process.alphas_cumprod) / process.alphas_cumprod) ** 0.5)

    def denoise(model, x, index):
        sigma = sigmas[index]
        scaled = x / (sigma**2 + 1) ** 0.5
        return x - sigma * model(scaled, th.full((len(x),), index))

    return sigmas, denoise


def test_an_outside_sampler_works_on_the_public_attributes():
    """Euler's method in sigma is DDIM: both give the same image."""
    process = make_process(1000)
    data, noise = GaussianData(process), noise_like()
    sigmas, denoise = wrapped(process)
    x = noise * (sigmas[-1] ** 2 + 1) ** 0.5
    for index in reversed(range(1000)):
        after = sigmas[index - 1] if index else 0.0
        x = x + (after - sigmas[index]) * (x - denoise(data, x, index)) / sigmas[index]
    ours = process.ddim_sample_loop(data, SHAPE, noise=noise, device="cpu", clip_denoised=False)
    assert th.allclose(x, ours, atol=1e-9)
