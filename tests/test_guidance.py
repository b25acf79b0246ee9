"""Guidance: both rules against Bayes' rule on Gaussian data, and the functions that make a cond_fn."""

from __future__ import annotations

import pytest
import torch as th
import torch.nn.functional as F
from oracle import GaussianData, affine_step, make_process, moments

from guided_diffusion.guidance import classifier_guidance, without_labels
from guided_diffusion.samplers import DDIM, PLMS, SAMPLERS, Ancestral, make_sampler

SHAPE = (2, 3, 4, 4)


class Observed:
    """The likelihood of an observation x_0 + N(0, noise^2) = seen, as it depends on x_t: its score is known exactly."""

    def __init__(self, process, data, seen=1.0, noise=0.7):
        self.process, self.data, self.seen, self.noise = process, data, seen, noise

    def posterior(self):
        precision = 1 / self.data.std**2 + 1 / self.noise**2
        mean = (self.data.mean / self.data.std**2 + self.seen / self.noise**2) / precision
        return mean, 1 / precision

    def __call__(self, x, timesteps, **kwargs):
        alpha_bar = th.tensor([self.data.levels[int(t)] for t in timesteps], dtype=x.dtype)
        alpha_bar = alpha_bar.view(-1, *[1] * (x.ndim - 1))
        total = alpha_bar * self.data.std**2 + 1 - alpha_bar
        x_start = self.data.mean + alpha_bar.sqrt() * self.data.std**2 * (x - alpha_bar.sqrt() * self.data.mean) / total
        variance = self.data.std**2 * (1 - alpha_bar) / total + self.noise**2
        slope = alpha_bar.sqrt() * self.data.std**2 / total
        return slope * (self.seen - x_start) / variance


def guided_moments(sampler, process):
    data = GaussianData(process, 0.3, 0.5)
    likelihood = Observed(process, data)
    plain, process.predictor = process.predictor, None
    process.predictor = lambda model, **kw: plain(model, **{**kw, "cond_fn": likelihood})
    return moments(sampler, process, data), likelihood.posterior()


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(0.0), DDIM(1.0)], ids=str)
def test_guidance_by_a_likelihood_samples_the_posterior(sampler):
    """Both rules are exact in the limit of small steps: the samples are those of the data given the observation."""
    (mean, variance), (true_mean, true_variance) = guided_moments(sampler, make_process(4000, var="FIXED_SMALL"))
    assert mean == pytest.approx(true_mean, abs=3e-3)
    assert variance == pytest.approx(true_variance, abs=3e-3)


def test_multistep_guidance_samples_the_posterior_with_few_steps():
    process = make_process(5000, "ddim250")
    data = GaussianData(process, 0.3, 0.5)
    likelihood = Observed(process, data)
    noise = th.tensor([-1.0, 0.0, 1.0], dtype=th.float64).view(3, 1)
    out = process.sample_loop(
        PLMS(2), data, noise.shape, noise=noise, device="cpu", clip_denoised=False, cond_fn=likelihood
    )
    mean, variance = likelihood.posterior()
    assert float(out[1]) == pytest.approx(mean, abs=0.01)
    assert float(out[2] - out[1]) == pytest.approx(variance**0.5, abs=0.01)


def zero(x, *args, **kwargs):
    return th.zeros_like(x)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("with_grad", [False, True])
def test_zero_gradient_is_no_guidance(name, with_grad):
    process = make_process(respacing="10")
    noise = th.randn(SHAPE, dtype=th.float64)
    images = []
    for cond_fn in (None, zero):
        th.manual_seed(1)
        options = {"cond_fn": cond_fn, "cond_fn_with_grad": with_grad, "noise": noise, "device": "cpu"}
        images.append(
            process.sample_loop(make_sampler(name), GaussianData(process), SHAPE, **options, clip_denoised=False)
        )
    assert th.allclose(*images, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_gradient_through_the_denoiser_that_ignores_it_is_the_plain_gradient(name):
    process = make_process(respacing="10")
    noise = th.randn(SHAPE, dtype=th.float64)
    images = []
    for cond_fn, with_grad in ((lambda x, t: th.sin(x), False), (lambda x, t, out: th.sin(x), True)):
        th.manual_seed(1)
        options = {"cond_fn": cond_fn, "cond_fn_with_grad": with_grad, "noise": noise, "device": "cpu"}
        images.append(process.sample_loop(make_sampler(name), GaussianData(process), SHAPE, **options))
    assert th.equal(*images)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_denoisers_gradient_is_right(name):
    """d pred_xstart / dx of the exact denoiser is a known number."""
    process = make_process(respacing="10")
    data, seen = GaussianData(process), []

    def cond_fn(x, t, out):
        (grad,) = th.autograd.grad(out["pred_xstart"].sum(), x)
        alpha_bar = process.alphas_cumprod[int(t[0])]
        slope = alpha_bar**0.5 * data.std**2 / (alpha_bar * data.std**2 + 1 - alpha_bar)
        assert th.allclose(grad, th.full_like(grad, slope), atol=1e-9)
        seen.append(int(t[0]))
        return th.zeros_like(x)

    options = {"cond_fn": cond_fn, "cond_fn_with_grad": True, "device": "cpu", "clip_denoised": False}
    process.sample_loop(make_sampler(name), data, SHAPE, noise=th.randn(SHAPE, dtype=th.float64), **options)
    assert seen[0] == 9
    assert seen[-1] == 0


def test_a_cond_fn_gets_what_the_network_gets():
    process = make_process(respacing="ddim10")
    process.rescale_timesteps = True
    network, guide = [], []

    def model(x, timesteps):
        network.append(timesteps)
        return th.zeros_like(x)

    def cond_fn(x, timesteps):
        guide.append(timesteps)
        return th.zeros_like(x)

    process.p_sample_loop(model, SHAPE, device="cpu", cond_fn=cond_fn)
    assert all(th.equal(a, b) for a, b in zip(network, guide, strict=True))
    assert network[0].dtype == th.float32
    assert network[0].tolist() == [900.0, 900.0]


def test_a_guided_step_yields_both_predictions():
    process = make_process(respacing="10")
    data, x, t = GaussianData(process), th.randn(SHAPE, dtype=th.float64), th.tensor([5, 5])
    own = process.p_mean_variance(data, x, t, clip_denoised=False)
    ascent = lambda x, timesteps: th.ones_like(x)  # noqa: E731
    for step in (process.p_sample, process.ddim_sample, process.plms_sample):
        out = step(data, x, t, clip_denoised=False, cond_fn=ascent)
        assert th.equal(out["pred_xstart"], own["pred_xstart"])
        assert (out["pred_xstart_guided"] > own["pred_xstart"]).all()
        assert "pred_xstart_guided" not in step(data, x, t)


def test_single_steps_through_the_denoiser_are_those_of_the_loops():
    """`*_with_grad` and the cond_fn_with_grad switch are one path."""
    process = make_process(respacing="10")
    data, noise = GaussianData(process), th.randn(SHAPE, dtype=th.float64)

    def cond_fn(x, t, out):
        return th.autograd.grad(-((out["pred_xstart"] - 0.3) ** 2).sum(), x)[0]

    for name, more in (("p_sample", {}), ("ddim_sample", {"eta": 0.5})):
        th.manual_seed(2)
        x = noise
        for index in reversed(range(10)):
            x = getattr(process, f"{name}_with_grad")(data, x, th.tensor([index] * 2), cond_fn=cond_fn, **more)[
                "sample"
            ]
            assert not x.requires_grad
        th.manual_seed(2)
        options = {"noise": noise, "device": "cpu", "cond_fn": cond_fn, "cond_fn_with_grad": True, **more}
        loops = {"p_sample": process.p_sample_loop, "ddim_sample": process.ddim_sample_loop}
        assert th.equal(x, loops[name](data, SHAPE, **options))


def test_public_rules_are_the_rules_of_the_steps():
    process = make_process(respacing="10")
    data, x, t = GaussianData(process), th.randn(SHAPE, dtype=th.float64), th.tensor([5, 5])
    out = process.p_mean_variance(data, x, t)
    gradient = th.randn_like(x)
    mean = process.condition_mean(lambda x, t: gradient, out, x, t)
    assert th.allclose(mean, out["mean"] + out["variance"] * gradient)
    assert th.equal(mean, process.condition_mean_with_grad(lambda x, t, out: gradient, out, x, t))
    score = process.condition_score(lambda x, t: gradient, out, x, t)
    again = process.condition_score_with_grad(lambda x, t, out: gradient, out, x, t)
    assert all(th.equal(score[key], again[key]) for key in ("mean", "pred_xstart"))
    shift = (1 - process.alphas_cumprod[5]) / process.alphas_cumprod[5] ** 0.5 * gradient
    assert th.allclose(score["pred_xstart"], out["pred_xstart"] + shift)


class Linear(th.nn.Module):
    """A classifier whose gradient can be written down."""

    def __init__(self, classes=4):
        super().__init__()
        self.weight = th.nn.Parameter(th.randn(classes, 3 * 4 * 4, dtype=th.float64))

    def forward(self, x, timesteps):
        return x.flatten(1) @ self.weight.T


def test_classifier_guidance_is_the_gradient_of_the_log_probability():
    classifier, x, y = Linear(), th.randn(SHAPE, dtype=th.float64), th.tensor([1, 3])
    with th.no_grad():
        gradient = classifier_guidance(classifier, 2.5)(x, th.tensor([0, 0]), y)
        probabilities = F.softmax(classifier(x, None), dim=1)
        expected = classifier.weight[y] - probabilities @ classifier.weight
    assert th.allclose(gradient, 2.5 * expected.view(SHAPE), atol=1e-6)
    assert not gradient.requires_grad
    assert classifier.weight.grad is None


def test_classifier_guidance_without_labels_is_refused():
    with pytest.raises(ValueError, match="needs labels"):
        classifier_guidance(Linear(), 1.0)(th.randn(SHAPE, dtype=th.float64), th.tensor([0, 0]))


def test_scale_0_does_not_ask_the_classifier():
    def classifier(x, timesteps):
        raise AssertionError("asked")

    assert not classifier_guidance(classifier, 0.0)(th.randn(SHAPE), th.tensor([0, 0]), th.tensor([1, 2])).any()


def test_an_unconditional_network_under_guidance():
    process = make_process(respacing="10")
    data = GaussianData(process)

    def strict(x, timesteps):
        return data(x, timesteps)

    options = {"model_kwargs": {"y": th.tensor([1, 2])}, "device": "cpu", "noise": th.randn(SHAPE, dtype=th.float64)}
    plain = process.ddim_sample_loop(data, SHAPE, **options)
    assert th.equal(plain, process.ddim_sample_loop(without_labels(strict), SHAPE, **options))


def test_affine_probe_sees_guidance_as_a_shift():
    """A constant gradient moves the ancestral mean by variance * gradient and nothing else."""
    process = make_process(respacing="20")
    data = GaussianData(process)
    plain = affine_step(Ancestral(), process, data, 7)
    original, constant = process.predictor, lambda x, t: th.full_like(x, 3.0)
    process.predictor = lambda model, **kw: original(model, **{**kw, "cond_fn": constant})
    guided = affine_step(Ancestral(), process, data, 7)
    assert guided[0] == pytest.approx(plain[0])
    assert guided[1] - plain[1] == pytest.approx(3.0 * process.betas[7])
    assert guided[2] == pytest.approx(plain[2])
