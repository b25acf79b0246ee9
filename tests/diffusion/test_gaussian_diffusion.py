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
    get_named_beta_schedule,
)
from guided_diffusion.sampling.schedules import rescale_zero_terminal_snr

SHAPE = (4, 3, 4, 4)
T_ALL = th.tensor([0, 1, 50, 99])


def noise_like(seed=0):
    return th.randn(SHAPE, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def make_noisy(betas, **kwargs):
    types = {
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_LARGE,
        "loss_type": LossType.MSE,
    }
    return GaussianDiffusion(betas=betas, **{**types, **kwargs})


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.2], [[0.1], [0.2]], [0.1, math.nan]])
def test_betas_must_be_a_row_of_numbers_between_0_and_1(betas):
    with pytest.raises(ValueError, match="betas must be a row of numbers"):
        make_noisy(betas)


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


@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "PREVIOUS_X", "VELOCITY"])
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


def test_mse_of_the_exact_network_is_the_noise_that_cannot_be_known():
    """E (eps - E[eps | x_t])^2 = 1 - (1 - alpha_bar) / total, to the accuracy of the sample."""
    process = make_process(100)
    data = GaussianData(process)
    x = data.mean + data.std * th.randn(4, 50_000, dtype=th.float64)
    mse = process.training_losses(data, x, T_ALL)["mse"]
    alpha_bar = process.alphas_cumprod[T_ALL.numpy()]
    expected = alpha_bar * data.std**2 / (alpha_bar * data.std**2 + 1 - alpha_bar)
    assert mse.tolist() == pytest.approx(expected.tolist(), rel=0.05)


def answers(process, x, noise):
    """What a network that knows x_0 and the noise says, by what it predicts."""
    x_t = process.q_sample(x, T_ALL, noise)
    level = process.at(T_ALL, x)
    return {
        "EPSILON": noise,
        "START_X": x,
        "PREVIOUS_X": process.q_posterior_mean_variance(x, x_t, T_ALL)[0],
        "VELOCITY": level.alpha * noise - level.sigma * x,
    }


@pytest.mark.parametrize("mean", list(ModelMeanType.__members__))
def test_perfect_knowledge_has_no_loss(mean):
    process = make_process(100, mean=mean)
    x, noise = noise_like(), noise_like(1)
    answer = answers(process, x, noise)[mean]
    losses = process.training_losses(lambda x, t: answer, x, T_ALL, noise=noise)
    assert losses["loss"].abs().max() < 1e-20


@pytest.mark.parametrize("mean", list(ModelMeanType.__members__))
@pytest.mark.parametrize("gamma", [5.0, 0.3])
def test_min_snr_weighs_what_is_predicted_as_x_0(mean, gamma):
    """min(SNR, gamma) times the squared error of x_0 (Hang et al. 2023), whatever the network predicts."""
    process = make_process(100, mean=mean)
    weighted = make_noisy(
        process.betas, model_mean_type=ModelMeanType[mean], loss_weight="min_snr", min_snr_gamma=gamma
    )
    x, noise, answer = noise_like(), noise_like(1), noise_like(2)
    losses = weighted.training_losses(lambda x, t: answer, x, T_ALL, noise=noise)
    x_t = process.q_sample(x, T_ALL, noise)
    guess = process.p_mean_variance(lambda x, t: answer, x_t, T_ALL, clip_denoised=False)["pred_xstart"]
    alpha_bar = process.alphas_cumprod[T_ALL.numpy()]
    expected = np.minimum(alpha_bar / (1 - alpha_bar), gamma) * ((guess - x) ** 2).flatten(1).mean(dim=1).numpy()
    assert losses["loss"].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    plain = process.training_losses(lambda x, t: answer, x, T_ALL, noise=noise)
    assert th.equal(losses["mse"], plain["loss"])


@pytest.mark.parametrize("mean", ["START_X", "VELOCITY"])
@pytest.mark.parametrize("gamma", [5.0, 0.3])
def test_min_snr_trains_the_step_without_signal(mean, gamma):
    """Where the SNR is 0 sampling starts: the step counts as at an SNR of 1, and the others are as published."""
    betas = rescale_zero_terminal_snr(get_named_beta_schedule("linear", 50))
    options = {"model_mean_type": ModelMeanType[mean], "min_snr_gamma": gamma}
    process, t = make_noisy(betas, loss_weight="min_snr", **options), th.tensor([49, 48, 20, 0])
    x, noise = noise_like(), noise_like(1)
    losses = process.training_losses(lambda x_t, t: noise_like(2), x, t, noise=noise)
    snr = process.alphas_cumprod[t.numpy()] / (1 - process.alphas_cumprod[t.numpy()])
    expected = np.minimum(np.where(snr == 0, 1, snr), gamma) / (snr + 1 if mean == "VELOCITY" else 1)
    assert snr[0] == 0
    assert (losses["loss"] / losses["mse"]).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_impossible_weights_are_refused():
    betas = get_named_beta_schedule("cosine", 50)
    for options, message in (
        ({"loss_weight": "snr"}, "loss_weight 'snr' is unknown: use min_snr"),
        ({"loss_weight": "min_snr", "min_snr_gamma": 0.0}, "min_snr_gamma 0.0 is not above 0"),
        ({"loss_weight": "min_snr", "loss_type": LossType.RESCALED_KL}, "use_kl has none"),
    ):
        with pytest.raises(ValueError, match=message):
            make_noisy(betas, **options)


def test_without_signal_at_the_end_eps_is_refused():
    betas = rescale_zero_terminal_snr(get_named_beta_schedule("linear", 50))
    with pytest.raises(ValueError, match=r"zero_terminal_snr leaves no signal.*predict_v"):
        make_noisy(betas)
    process = make_noisy(betas, model_mean_type=ModelMeanType.VELOCITY)
    last, x, noise = th.tensor([49] * 4), noise_like(), noise_like(1)
    assert th.equal(process.q_sample(x, last, noise), noise)
    losses = process.training_losses(lambda x_t, t: -x, x, last, noise=noise)
    assert losses["mse"].abs().max() < 1e-20
    out = process.p_mean_variance(lambda x_t, t: -x, noise, last, clip_denoised=False)
    assert th.allclose(out["pred_xstart"], x)
    assert th.allclose(process.predict_eps(noise, last, x), noise)


@pytest.mark.parametrize("respacing", ["", "ddim25", "logsnr12"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_levels_at_real_timesteps(name, respacing):
    """Those of training, whatever the grid: exact at integers, straight in log-SNR between them, and invertible."""
    process, whole = make_process(200, respacing, name=name), make_process(200, name=name)
    tau = th.arange(200, dtype=th.float64)
    assert process.level(tau).exp().numpy() == pytest.approx(whole.alphas_cumprod, rel=1e-12)
    assert float(process.level(37.0)) == pytest.approx(math.log(whole.alphas_cumprod[37]))

    def log_snr(tau):
        level = process.level(tau)
        return level - th.log(-th.expm1(level))

    middle = log_snr(tau[:-1] + 0.25)
    assert th.allclose(middle, 0.75 * log_snr(tau[:-1]) + 0.25 * log_snr(tau[1:]), atol=1e-9)
    real = th.linspace(0, 199, 777, dtype=th.float64)
    assert th.allclose(process.tau(process.level(real)), real, atol=1e-9)
    assert float(process.level(-3.0)) == float(process.level(0.0))
    assert float(process.tau(process.level(th.tensor(500.0)))) == pytest.approx(199.0, abs=1e-3)


def test_coefficients_at_real_timesteps_continue_those_at_integers():
    process, x, noise = make_process(200, "ddim25"), noise_like(), noise_like(1)
    index = th.tensor([0, 3, 11, 24])
    tau = th.tensor([process.timestep_map[i] for i in index], dtype=th.float64)
    for at_index, at_tau in (
        (process.q_sample(x, index, noise), process.q_sample(x, tau, noise)),
        (process.predict_eps(x, index, noise), process.predict_eps(x, tau, noise)),
        (process.predict_xstart(x, index, noise), process.predict_xstart(x, tau, noise)),
        (process.posterior_mean(x, noise, index), process.posterior_mean(x, noise, tau)),
        (process.xstart_of_mean(x, index, noise), process.xstart_of_mean(x, tau, noise)),
        (process.alpha_bar(index, x), process.alpha_bar(tau, x)),
        (process.at(index, x).sigma, process.at(tau, x).sigma),
        (process.timesteps(index, x).double(), process.timesteps(tau, x)),
    ):
        assert th.allclose(at_index, at_tau, atol=1e-9)


@pytest.mark.parametrize("mean", list(ModelMeanType.__members__))
def test_the_network_is_understood_between_the_steps(mean):
    process = make_process(200, "linspace20", mean=mean)
    x, tau = noise_like(), th.tensor([0.5, 20.25, 100.75, 198.5], dtype=th.float64)
    prediction = process.predictor(GaussianData(process), clip_denoised=False)(x, tau)
    level = process.level(tau).view(-1, 1, 1, 1).exp()
    total = level * 0.25 + 1 - level
    exact = 0.3 + level.sqrt() * 0.25 * (x - level.sqrt() * 0.3) / total
    assert th.allclose(prediction.pred_xstart, exact, atol=1e-9)
    assert th.allclose(level.sqrt() * exact + (1 - level).sqrt() * prediction.eps, x, atol=1e-9)


def test_a_guide_between_the_steps_gets_what_the_network_gets():
    process, seen = make_process(200, "ddim25"), []
    tau = th.tensor([9.5, 9.5, 190.0, 190.0], dtype=th.float64)

    def plain(x, timesteps):
        seen.append(timesteps.tolist())
        return th.zeros_like(x)

    def through(x, t, out):
        seen.extend([t.tolist(), out["timesteps"].tolist()])
        return th.zeros_like(x)

    for options in ({"cond_fn": plain}, {"cond_fn": through, "cond_fn_with_grad": True}):
        process.predictor(GaussianData(process), **options)(noise_like(), tau).guided("score")
    assert seen == [tau.tolist(), [1, 1, 24, 24], tau.tolist()]


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


@pytest.mark.slow
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

    x = ((th.randn(2, 4000, dtype=th.float64) * 0.2).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    bits = float(process.calc_bpd_loop(model, x, clip_denoised=False)["total_bpd"].mean())
    assert bits == pytest.approx(math.log2(127.5 * 0.2 * math.sqrt(2 * math.pi * math.e)), abs=0.03)


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
    process = make_process(250)
    data, noise = GaussianData(process), noise_like()
    sigmas, denoise = wrapped(process)
    x = noise * (sigmas[-1] ** 2 + 1) ** 0.5
    for index in reversed(range(250)):
        after = sigmas[index - 1] if index else 0.0
        x = x + (after - sigmas[index]) * (x - denoise(data, x, index)) / sigmas[index]
    ours = process.ddim_sample_loop(data, SHAPE, noise=noise, device="cpu", clip_denoised=False)
    assert th.allclose(x, ours, atol=1e-9)
