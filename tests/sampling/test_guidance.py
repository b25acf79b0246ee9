"""Guidance: both rules against Bayes' rule on Gaussian data with every sampler, and the makers of guides.

Guided networks are asked for what they are asked, how often and in which batches; where nothing is to be guided, the
images are those without guidance bit for bit.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from few import FEW, few
from oracle import GaussianData, make_process
from torch.overrides import TorchFunctionMode

import mixture
from guided_diffusion.sample_util import evaluating
from guided_diffusion.sampling.guidance import (
    autoguidance,
    classifier_free,
    classifier_guidance,
    clip_guidance,
    combine,
    dps,
    dynamic_thresholding,
    interval,
    loss_guidance,
    random_cutouts,
    without_labels,
)
from guided_diffusion.sampling.samplers import DDIM, SAMPLERS, Ancestral, make_sampler

SHAPE = (2, 3, 4, 4)
NAMES = sorted(set(SAMPLERS) - {"ddim_reverse"})  # from noise to images
RANDOM = ("ddpm", "dpm++2m_sde", "dpm++3m_sde", "sa", "euler_ancestral")
LABELS = th.tensor([2, 0])


def noise_like(shape=SHAPE, seed=0):
    return th.randn(shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def sample(process, sampler, model, **options):
    """One run from the same noise; draws are the same every time."""
    th.manual_seed(1)
    sampler = make_sampler(sampler) if isinstance(sampler, str) else sampler
    given = {"noise": noise_like(), "device": "cpu", "clip_denoised": False, **options}
    return process.sample_loop(sampler, model, SHAPE, **given)


def by_steps(process, name, predict):
    """The same run by hand, step by step, with predictions of one's own."""
    th.manual_seed(1)
    sampler, x, state = make_sampler(name), noise_like(), None
    for index in reversed(range(process.num_timesteps)):
        t = th.tensor([index] * 2)
        output, state = sampler.step(process, predict, x, t, state, lambda x=x: th.randn_like(x))
        x = output["sample"]
    return x


class Observed:
    """The likelihood of an observation x_0 + N(0, noise^2) = seen, as it depends on x_t: its score is known exactly."""

    def __init__(self, process, data, seen=1.0, noise=0.7):
        self.process, self.data, self.seen, self.noise = process, data, seen, noise

    def posterior(self):
        precision = 1 / self.data.std**2 + 1 / self.noise**2
        mean = (self.data.mean / self.data.std**2 + self.seen / self.noise**2) / precision
        return mean, 1 / precision

    def __call__(self, x, timesteps, **kwargs):
        alpha_bar = self.process.level(timesteps.double()).exp().view(-1, *[1] * (x.ndim - 1))
        total = alpha_bar * self.data.std**2 + 1 - alpha_bar
        x_start = self.data.mean + alpha_bar.sqrt() * self.data.std**2 * (x - alpha_bar.sqrt() * self.data.mean) / total
        variance = self.data.std**2 * (1 - alpha_bar) / total + self.noise**2
        slope = alpha_bar.sqrt() * self.data.std**2 / total
        return slope * (self.seen - x_start) / variance


def noised(moments, alpha_bar):
    """Mean and variance of N(mean, variance) data at a noise level."""
    return alpha_bar**0.5 * moments[0], alpha_bar * moments[1] + 1 - alpha_bar


def guided_moments(sampler, process, likelihood, last):
    """Mean and variance after the step at index `last`, from data that are noised without a remainder.

    Everything is affine in the draws, so row k of the batch has the k-th of them at 1 and the others at 0.
    """
    rows = 2 + 2 * process.num_timesteps
    mean, variance = noised(likelihood.posterior(), process.alphas_cumprod[-1])
    x, state, count = th.full((rows, 1), mean, dtype=th.float64), None, 1
    x[1] += variance**0.5

    def draw():
        nonlocal count
        count += 1
        return (th.arange(rows) == count).double()[:, None]

    predict = process.predictor(likelihood.data, clip_denoised=False, cond_fn=likelihood)
    with process.tables_kept({}):
        for index in reversed(range(last, process.num_timesteps)):
            output, state = sampler.step(process, predict, x, th.full((rows,), index), state, draw)
            x = output["sample"]
    assert count < rows
    return float(x[0]), float(((x - x[0]) ** 2).sum())


POSTERIOR = [(name, {}) for name in NAMES] + [
    ("ddim", {"eta": 1.0}),
    ("euler", {"churn": 5.0}),
    ("heun", {"churn": 10.0}),
]


@pytest.mark.parametrize(("name", "options"), few(POSTERIOR, [(name, {}) for name in FEW]), ids=str)
def test_guidance_by_a_likelihood_samples_the_posterior(name, options):
    """Both rules are exact in the limit of small steps: the samples are those of the data given the observation.

    Four times the steps leave a third of the error or less, or next to nothing.
    """
    sampler, errors = make_sampler(name, **options), []
    for steps in (20, 80):
        grid = sampler.grid or "linspace"
        process = make_process(1000, f"{grid}{steps + 1}", var="FIXED_SMALL")
        likelihood, last = Observed(process, GaussianData(process)), steps // 10
        found = guided_moments(sampler, process, likelihood, last)
        expected = noised(likelihood.posterior(), process.alphas_cumprod[last - 1])
        errors.append([abs(a - b) for a, b in zip(found, expected, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert fine < max(coarse / 2.8, 5e-4)
        assert fine < 0.04


@pytest.mark.parametrize("name", few(name for name in NAMES if name not in RANDOM))
def test_guidance_from_pure_noise_samples_the_posterior(name):
    """Where alpha_bar ends at 0 there is nothing to guide in the first step, and everything in the others."""
    process = make_process(1000, "trailing100", mean="VELOCITY", zero_terminal_snr=True)
    likelihood = Observed(process, GaussianData(process))
    probe = th.tensor([-1.0, 0.0, 1.0], dtype=th.float64).view(3, 1)
    options = {"noise": probe, "device": "cpu", "clip_denoised": False, "cond_fn": likelihood}
    below, middle, above = process.sample_loop(make_sampler(name), likelihood.data, probe.shape, **options)
    mean, variance = likelihood.posterior()
    assert float(middle) == pytest.approx(mean, abs=0.04)
    assert float(above - below) / 2 == pytest.approx(variance**0.5, abs=0.04)


@pytest.mark.parametrize("mean", ["START_X", "VELOCITY"])
@pytest.mark.parametrize("name", few(NAMES))
def test_what_the_network_predicts_does_not_matter_to_guidance(name, mean):
    images = []
    for kind in ("EPSILON", mean):
        process = make_process(respacing="6", mean=kind)
        data = GaussianData(process)
        images.append(sample(process, name, data, cond_fn=Observed(process, data)))
    assert th.allclose(*images, atol=1e-9)


def zero(x, *args, **kwargs):
    return th.zeros_like(x)


def nothing(*args, **kwargs):
    return None


@pytest.mark.parametrize("name", few(NAMES))
@pytest.mark.parametrize("with_grad", [False, True])
def test_zero_gradient_is_no_guidance(name, with_grad):
    process = make_process(respacing="6")
    plain = sample(process, name, GaussianData(process))
    guided = sample(process, name, GaussianData(process), cond_fn=zero, cond_fn_with_grad=with_grad)
    assert th.allclose(plain, guided, atol=1e-12)
    single = {"noise": noise_like().float()}
    plain = sample(process, name, GaussianData(process), **single)
    guided = sample(process, name, GaussianData(process), cond_fn=zero, cond_fn_with_grad=with_grad, **single)
    assert th.allclose(plain, guided, atol=1e-5)


@pytest.mark.parametrize("name", few(NAMES))
def test_a_gradient_through_the_denoiser_that_ignores_it_is_the_plain_gradient(name):
    process = make_process(respacing="10")
    plain = sample(process, name, GaussianData(process), cond_fn=lambda x, t: th.sin(x))
    through = sample(process, name, GaussianData(process), cond_fn=lambda x, t, out: th.sin(x), cond_fn_with_grad=True)
    assert th.equal(plain, through)


@pytest.mark.parametrize("name", few(NAMES))
def test_the_denoisers_gradient_is_right(name):
    """d pred_xstart / dx of the exact denoiser is a known number, also between the steps of the process."""
    process = make_process(respacing="10")
    data, seen = GaussianData(process), []

    def cond_fn(x, t, out):
        (grad,) = th.autograd.grad(out["pred_xstart"].sum(), x)
        alpha_bar = float(process.level(out["timesteps"][:1].double()).exp())
        slope = alpha_bar**0.5 * data.std**2 / (alpha_bar * data.std**2 + 1 - alpha_bar)
        assert th.allclose(grad, th.full_like(grad, slope), atol=1e-9)
        seen.append(int(t[0]))
        return th.zeros_like(x)

    sample(process, name, data, cond_fn=cond_fn, cond_fn_with_grad=True)
    assert seen[0] == 9
    assert seen[-1] == 0


@pytest.mark.parametrize("name", few(NAMES))
@pytest.mark.parametrize("through", [False, True])
def test_a_cond_fn_gets_what_the_network_gets(name, through):
    """Mapped, and rescaled; also between the steps."""
    process = make_process(500, "ddim10")
    process.rescale_timesteps = True
    network, guide = [], []

    def model(x, timesteps):
        network.append(timesteps)
        return 0.1 * x

    def cond_fn(x, timesteps, out=None):
        guide.append(timesteps if out is None else out["timesteps"])
        return th.zeros_like(x)

    sample(process, name, model, cond_fn=cond_fn, cond_fn_with_grad=through)
    assert len(network) == len(guide)
    assert all(th.equal(a, b) for a, b in zip(network, guide, strict=True))
    assert network[0].dtype == th.float32
    assert network[0].tolist() == [900.0, 900.0]


def methods_of(process):
    """Name -> step of (network, x, t, guide or None), by hand for every sampler and of the originals' methods."""

    def by_hand(name):
        def step(data, x, t, cond_fn):
            predict = process.predictor(data, clip_denoised=False, cond_fn=cond_fn)
            return make_sampler(name).step(process, predict, x, t, None, lambda: th.randn_like(x))[0]

        return step

    def method(name):
        return lambda data, x, t, cond_fn: getattr(process, name)(data, x, t, clip_denoised=False, cond_fn=cond_fn)

    methods = {name: method(name) for name in ("p_sample", "ddim_sample", "plms_sample")}
    return {**{name: by_hand(name) for name in NAMES}, **methods}


@pytest.mark.parametrize("name", [*NAMES, "p_sample", "ddim_sample", "plms_sample"])
def test_a_guided_step_yields_both_predictions(name):
    process = make_process(respacing="10")
    data, x, t, step = GaussianData(process), noise_like(), th.tensor([5, 5]), methods_of(process)[name]
    output = step(data, x, t, lambda x, timesteps: th.ones_like(x))
    assert th.equal(output["pred_xstart"], process.p_mean_variance(data, x, t, clip_denoised=False)["pred_xstart"])
    assert (output["pred_xstart_guided"] > output["pred_xstart"]).all()
    assert "pred_xstart_guided" not in step(data, x, t, None)
    assert "pred_xstart_guided" not in step(data, x, t, nothing)


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


class Uncertain:
    """The exact classifier of a mixture, with errors of a size that a trained one has, also where there is no signal.

    They do no harm but where x_0 moves by thousands times them.
    """

    def __init__(self, oracle, size=0.05):
        generator = th.Generator().manual_seed(7)
        self.exact = oracle.guidance(1.0)
        self.waves = th.randn(2, 6, generator=generator, dtype=th.float64)
        self.phases, self.size = 6 * th.rand(6, generator=generator, dtype=th.float64), size

    def __call__(self, x, timesteps, y):
        waves = (x.flatten(1) @ self.waves + self.phases + 1.7 * y[:, None]).cos()
        return self.exact(x, timesteps, y) + self.size * (waves @ self.waves.T / 6**0.5).view_as(x)


def distance_from_classes(name, steps, count=400):
    """Distance of samples from each class, guided on a cosine schedule, along 16 directions."""
    data, labels, generator = mixture.ring(), th.arange(count) % 4, th.Generator().manual_seed(5)
    grid = SAMPLERS[name].grid
    process = make_process(1000, f"{grid}{steps}", name="cosine", mean="START_X", var="FIXED_SMALL")
    oracle, noise = mixture.Oracle(process, data), noise_like((count, 2, 1, 1))
    out = process.sample_loop(
        name, oracle, noise.shape, noise=noise, device="cpu", model_kwargs={"y": labels}, cond_fn=Uncertain(oracle)
    )
    directions, total = F.normalize(th.randn(2, 16, dtype=th.float64, generator=generator), dim=0), 0.0
    for label in range(4):
        real = data.of_class(label).sample(4 * count, generator)[0].flatten(1) @ directions
        own = out[labels == label].flatten(1) @ directions
        total += float((own.sort(dim=0).values - real.sort(dim=0).values[8::16]).abs().mean()) / 4
    return total


@pytest.mark.parametrize("name", few(NAMES))
def test_an_uncertain_classifier_guides_every_sampler_from_pure_noise(name):
    """As near to the data as 50 steps of ddpm, which are at 0.03; without clipping dpm++2m is at 0.2, ddim at 0.7."""
    th.manual_seed(1)
    if name != "ddpm":
        assert distance_from_classes(name, 10) < (0.15 if name in RANDOM else 0.065)
        assert distance_from_classes(name, 20) < 0.05
    else:
        assert distance_from_classes(name, 50) < 0.05


def strong(x, timesteps):
    return 50 * th.sin(3 * x)


@pytest.mark.parametrize("name", few(NAMES))
def test_what_is_guided_is_clipped_as_predictions_are(name):
    process, outputs = make_process(1000, "6", name="cosine", mean="START_X"), []
    data = GaussianData(process)
    options = {"cond_fn": strong, "clip_denoised": True}
    images = {
        clip: sample(process, name, data, clip_guided=clip, callback=lambda t, out: outputs.append(out), **options)
        for clip in (None, True, False)
    }
    assert th.equal(images[None], images[True])
    assert th.equal(images[True], images[False]) == (name == "ddpm")  # whose mean is guided
    if name != "ddpm":
        sizes = [float(output["pred_xstart_guided"].abs().max()) for output in outputs]
        assert max(sizes[:12]) == 1
        assert max(sizes[12:]) > 100
        assert float(outputs[0]["guided_outside"].max()) > 0.5
    free = sample(process, name, data, cond_fn=strong, clip_denoised=False)
    assert th.equal(free, sample(process, name, data, cond_fn=strong, clip_denoised=False, clip_guided=False))


@pytest.mark.parametrize(("name", "sampler"), [("p", Ancestral()), ("ddim", DDIM(0.5)), ("plms", make_sampler("plms"))])
def test_the_originals_methods_leave_what_is_guided_as_it_is(name, sampler):
    process = make_process(1000, "6", name="cosine", mean="START_X")
    data, more = GaussianData(process), {"eta": 0.5} if name == "ddim" else {}
    given = {"noise": noise_like(), "device": "cpu", "cond_fn": strong}
    loop, images = getattr(process, f"{name}_sample_loop"), []
    for call in (
        lambda: loop(data, SHAPE, **given, **more),
        lambda: list(getattr(process, f"{name}_sample_loop_progressive")(data, SHAPE, **given, **more))[-1]["sample"],
        lambda: process.sample_loop(sampler, data, SHAPE, clip_guided=False, **given),
        lambda: loop(data, SHAPE, clip_guided=True, **given, **more),
        lambda: process.sample_loop(sampler, data, SHAPE, **given),
    ):
        th.manual_seed(1)
        images.append(call())
    assert th.equal(images[0], images[1])
    assert th.equal(images[0], images[2])
    assert th.equal(images[3], images[4])
    assert th.equal(images[0], images[3]) == (name == "p")
    step = getattr(process, f"{name}_sample")(data, noise_like(), th.tensor([5, 5]), cond_fn=strong)
    assert step["pred_xstart_guided"].abs().max() > 100


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
    """A classifier whose gradient can be written down; remembers which timesteps it was asked at."""

    def __init__(self, classes=4):
        super().__init__()
        self.weight = th.nn.Parameter(th.randn(classes, 3 * 4 * 4, dtype=th.float64))
        self.asked = []

    def forward(self, x, timesteps):
        self.asked.append(float(timesteps[0]))
        return x.flatten(1) @ self.weight.T

    def gradient(self, x, y):
        with th.no_grad():
            probabilities = F.softmax(x.flatten(1) @ self.weight.T, dim=1)
            return (self.weight[y] - probabilities @ self.weight).view_as(x)


def refusing(*args, **kwargs):
    raise AssertionError("asked")


def test_classifier_guidance_is_the_gradient_of_the_log_probability():
    classifier, x, y = Linear(), th.randn(SHAPE, dtype=th.float64), th.tensor([1, 3])
    with th.no_grad():
        gradient = classifier_guidance(classifier, 2.5)(x, th.tensor([0, 0]), y)
    assert th.allclose(gradient, 2.5 * classifier.gradient(x, y), atol=1e-6)
    assert not gradient.requires_grad
    assert classifier.weight.grad is None


def test_a_scale_may_depend_on_the_timesteps():
    """As one number, or as one for every image."""
    process = make_process(respacing="10")
    data, classifier = GaussianData(process), Linear()

    def by_hand(x, timesteps, y):
        return timesteps[0] / 500 * classifier.gradient(x, y)

    def run(cond_fn):
        return sample(process, "ddim", lambda x, t, y: data(x, t), cond_fn=cond_fn, model_kwargs={"y": LABELS})

    expected = run(by_hand)
    for scale in (lambda t: float(t[0]) / 500, lambda t: t / 500, lambda t: t[0] / 500):
        assert th.allclose(run(classifier_guidance(classifier, scale)), expected, atol=1e-5)
    each = run(classifier_guidance(classifier, lambda t: th.tensor([0.0, 3.0])))
    assert th.allclose(each[:1], run(None)[:1], atol=1e-12)
    assert th.equal(each[1:], run(classifier_guidance(classifier, 3.0))[1:])


def guides(scale):
    """Everything that takes a scale, asked once."""
    x, t, y = noise_like(), th.tensor([5, 5]), LABELS
    encoder = lambda x: x.flatten(1)  # noqa: E731
    leaf = x.clone().requires_grad_()
    out = {"pred_xstart": 2 * leaf, "timesteps": t}
    network, weaker = lambda x, t, y: y.view(-1, 1, 1, 1) * x, lambda x, t, y: -x
    return {
        "classifier": lambda: classifier_guidance(Linear(), scale)(x, t, y),
        "loss": lambda: loss_guidance(lambda x: x.square(), scale)(leaf, t, out),
        "clip": lambda: clip_guidance(encoder, th.ones(48), scale=scale)(leaf, t, out),
        "noisy clip": lambda: clip_guidance(encoder, th.ones(48), mode="noisy", scale=scale)(x, t),
        "classifier-free": lambda: classifier_free(network, scale, null_label=3)(x, t, y=y),
        "autoguidance": lambda: autoguidance(network, weaker, scale)(x, t, y=y),
        "interval": lambda: interval(autoguidance(network, weaker, scale), 0, 9)(x, t, y=y),
    }


@pytest.mark.parametrize("name", sorted(guides(1.0)))
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["number", "function", "function for each image"])
def test_a_scale_that_is_no_number_is_refused(name, value, kind):
    scales = {"number": value, "function": lambda t: value, "function for each image": lambda t: th.full((2,), value)}
    with pytest.raises(
        ValueError, match=r"the scale of the guidance is .*(nan|inf).*: give a finite number, 0 for none"
    ):
        guides(scales[kind])[name]()


@pytest.mark.parametrize("name", ["classifier", "loss", "clip", "noisy clip"])
def test_gradients_are_proportional_to_their_scale(name):
    once, twice = guides(1.0)[name](), None
    th.manual_seed(0)
    once = guides(1.0)[name]()
    th.manual_seed(0)
    twice = guides(-2.0)[name]()
    assert once.abs().max() > 1e-3
    assert th.allclose(twice, -2 * once)
    assert guides(0.0)[name]() is None
    assert guides(lambda t: th.zeros(2))[name]() is None


def test_several_classifiers_add_up():
    first, second, x, t = Linear(), Linear(), noise_like(), th.tensor([5, 5])
    both = combine(classifier_guidance(first, 2.0), nothing, classifier_guidance(second, -1.0))
    assert th.allclose(both(x, t, y=LABELS), 2 * first.gradient(x, LABELS) - second.gradient(x, LABELS), atol=1e-5)
    assert combine(nothing, nothing)(x, t, y=LABELS) is None
    assert combine()(x, t) is None


@pytest.mark.parametrize("name", few(NAMES))
def test_guides_of_both_kinds_add_up(name):
    """Two losses share the graph through the network with a classifier that does not need it."""
    process = make_process(respacing="10")
    data, classifier = GaussianData(process), Linear()
    losses = [lambda x: (x - 0.5).square().flatten(1).sum(1), lambda x: x.pow(4).flatten(1).sum(1)]

    def by_hand(x, t, out, y):
        total = 3 * losses[0](out["pred_xstart"]) + 0.5 * losses[1](out["pred_xstart"])
        return 2 * classifier.gradient(x.detach(), y) - th.autograd.grad(total.sum(), x)[0]

    cond_fn = combine(
        loss_guidance(losses[0], 3.0), classifier_guidance(classifier, 2.0), loss_guidance(losses[1], 0.5)
    )
    model, options = lambda x, t, y: data(x, t), {"model_kwargs": {"y": LABELS}}
    expected = sample(process, name, model, cond_fn=by_hand, cond_fn_with_grad=True, **options)
    assert th.allclose(sample(process, name, model, cond_fn=cond_fn, **options), expected, atol=1e-4)
    assert set(classifier.asked) >= set(map(float, process.timestep_map))


def test_an_unconditional_network_under_guidance():
    process = make_process(respacing="10")
    data = GaussianData(process)

    def strict(x, timesteps):
        return data(x, timesteps)

    plain = sample(process, "ddim", data, model_kwargs={"y": LABELS})
    assert th.equal(plain, sample(process, "ddim", without_labels(strict), model_kwargs={"y": LABELS}))


class Classes(th.nn.Module):
    """The perfect network for three classes N(means[y], stds[y]^2) and for no class, whose data are wider.

    Remembers the batches that it was asked for, and the other arguments.
    """

    num_classes, null_label = 3, 3

    def __init__(self, process, shift=0.0):
        super().__init__()
        self.process, self.shift = process, th.nn.Parameter(th.tensor(shift, dtype=th.float64))
        self.means, self.stds = th.tensor([-0.5, 0.2, 0.6, 0.1]).double(), th.tensor([0.3, 0.4, 0.2, 0.9]).double()
        self.dropout, self.batches, self.others, self.asked = th.nn.Dropout(0.0), [], [], []

    def eps(self, x, timesteps, y):
        level = self.process.level(timesteps.double()).view(-1, 1, 1, 1)
        alpha, variance = th.exp(level / 2), -th.expm1(level)
        mean, std = (values[y].view(-1, 1, 1, 1) for values in (self.means + self.shift.detach(), self.stds))
        return variance.sqrt() * (x - alpha * mean) / (alpha**2 * std**2 + variance)

    def forward(self, x, timesteps, y, **others):
        self.batches.append(len(x))
        self.others.append({"y": y, **others})
        self.asked.append(float(timesteps[0]))
        return self.eps(x, timesteps, y)


def run_classes(process, name, model, y=LABELS, **options):
    return sample(process, name, model, model_kwargs={"y": y}, **options)


@pytest.mark.parametrize("name", few(NAMES))
def test_where_nothing_guides_the_images_are_those_of_the_network_bit_for_bit(name):
    """And nothing is asked in vain: no batch is doubled, no classifier and no weaker network called."""
    process = make_process(respacing="6")
    model = Classes(process)
    plain, calls = run_classes(process, name, model), len(model.batches)
    guides = [None, classifier_guidance(refusing, 0.0), classifier_guidance(refusing, lambda t: 0 * t)]
    guides += [interval(classifier_guidance(refusing, 3.0), 1e4, 1e5), combine(nothing, nothing)]
    guides += [
        interval(loss_guidance(refusing), -9, -1),
        loss_guidance(refusing, 0.0),
        clip_guidance(refusing, th.ones(9), scale=0.0),
    ]
    for guide in guides:
        assert th.equal(run_classes(process, name, model, cond_fn=guide), plain)
    networks = [
        classifier_free(model, 1.0),
        classifier_free(model, lambda t: th.ones(2)),
        autoguidance(model, refusing, 1),
    ]
    networks += [
        interval(classifier_free(model, 3.0), 1e4, 1e5),
        interval(autoguidance(model, refusing, 3.0), 1e4, 1e5),
    ]
    networks += [classifier_free(model, 1.0, rescale=0.7)]
    for network in networks:
        assert th.equal(run_classes(process, name, network), plain)
    assert model.batches == [2] * calls * (1 + len(guides) + len(networks))


@pytest.mark.parametrize("name", few(NAMES))
def test_scale_0_is_the_network_without_labels_bit_for_bit(name):
    process = make_process(respacing="10")
    model = Classes(process)
    expected = run_classes(process, name, model, y=th.tensor([3, 3]))
    calls = len(model.batches)
    assert th.equal(run_classes(process, name, classifier_free(model, 0.0)), expected)
    assert model.batches == [2] * 2 * calls
    weaker = Classes(process, shift=0.2)
    expected = run_classes(process, name, weaker)
    assert th.equal(run_classes(process, name, autoguidance(refusing, weaker, 0.0)), expected)


@pytest.mark.parametrize("name", few(NAMES))
def test_classifier_free_guidance_asks_once_for_both(name):
    process = make_process(respacing="10")
    model, plain = Classes(process), Classes(process)
    images = run_classes(process, name, classifier_free(model, 2.5))
    run_classes(process, name, plain)
    assert model.batches == [4] * len(plain.batches)
    assert all(th.equal(other["y"], th.tensor([2, 0, 3, 3])) for other in model.others)

    def by_hand(x, timesteps, y):
        free = model.eps(x, timesteps, th.tensor([3, 3]))
        return free + 2.5 * (model.eps(x, timesteps, y) - free)

    assert th.allclose(images, run_classes(process, name, by_hand), atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5, -1.0, 7.0])
def test_the_formula_of_guided_networks(scale):
    """In the literature's other convention, (1 + w) conditional - w unconditional, w is the scale - 1."""
    process = make_process()
    model, weaker, x, t = Classes(process), Classes(process, shift=0.3), noise_like(), th.tensor([300, 300])
    own, free, weak = model.eps(x, t, LABELS), model.eps(x, t, th.tensor([3, 3])), weaker.eps(x, t, LABELS)
    out = classifier_free(model, scale)(x, t, y=LABELS)
    assert th.allclose(out, free + scale * (own - free), atol=1e-12)
    assert th.allclose(out, scale * own - (scale - 1) * free, atol=1e-12)
    assert th.allclose(autoguidance(model, weaker, scale)(x, t, y=LABELS), weak + scale * (own - weak), atol=1e-12)


def test_a_scale_for_every_image_of_a_guided_network():
    process = make_process()
    model, x, t = Classes(process), noise_like(), th.tensor([300, 700])
    own, free = model.eps(x, t, LABELS), model.eps(x, t, th.tensor([3, 3]))
    out = classifier_free(model, lambda t: t / 100)(x, t, y=LABELS)
    assert th.allclose(out, free + th.tensor([3.0, 7.0]).view(2, 1, 1, 1) * (own - free), atol=1e-5)
    out = interval(classifier_free(model, 3.0), 0, 500)(x, t, y=LABELS)
    assert th.allclose(out, th.cat([(free + 3 * (own - free))[:1], own[1:]]), atol=1e-12)


def test_what_belongs_to_images_is_doubled_and_the_rest_is_not():
    process, x, t = make_process(), noise_like(), th.tensor([300, 300])
    model, low, table = Classes(process), noise_like((2, 3, 2, 2)), th.randn(5, 7)
    given = {"low_res": low, "strength": 0.3, "factor": th.tensor(0.5), "table": table, "name": "a", "none": None}
    kept = {**given, "y": LABELS}
    classifier_free(model, 3.0)(x, t, **kept)
    (seen,) = model.others
    assert th.equal(seen["low_res"], th.cat([low, low]))
    assert {name: seen[name] is given[name] for name in given} == {name: name != "low_res" for name in given}
    assert kept == {**given, "y": LABELS}
    classifier_free(model, 0.0)(x, t, **kept)
    assert model.others[-1]["low_res"] is low


def test_variances_are_those_with_the_label():
    """Of a network that learns its variance, the channels that say so are not guided."""
    process = make_process(respacing="10", var="LEARNED_RANGE")
    model, weaker, x, t = Classes(process), Classes(process, shift=0.3), noise_like(), th.tensor([5, 5])

    def learned(x, timesteps, y):
        return th.cat([model.eps(x, timesteps, y), y.view(-1, 1, 1, 1).expand_as(x) / 3.0], dim=1)

    plain = process.p_mean_variance(learned, x, t, model_kwargs={"y": LABELS})
    small = weaker.eps  # a network with a fixed variance is a weaker one, too
    networks = [classifier_free(learned, 3.0, null_label=3), classifier_free(learned, 3.0, null_label=3, rescale=1.0)]
    for network in (*networks, autoguidance(learned, small, 3.0), autoguidance(learned, learned, 3.0)):
        out = process.p_mean_variance(network, x, t, model_kwargs={"y": LABELS})
        assert th.equal(out["log_variance"], plain["log_variance"])
    out = process.p_mean_variance(
        autoguidance(learned, small, 3.0), x, t, clip_denoised=False, model_kwargs={"y": LABELS}
    )
    eps = process.predict_eps(x, t, out["pred_xstart"])
    tau = process.timesteps(t, x)
    own, weak = model.eps(x, tau, LABELS), weaker.eps(x, tau, LABELS)
    assert th.allclose(eps, weak + 3 * (own - weak), atol=1e-9)


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
def test_rescaling_brings_the_deviation_back(rescale):
    """By as much as is asked for, image by image."""
    process = make_process()
    model, x, t = Classes(process), noise_like((2, 3, 16, 16)), th.tensor([500, 100])
    own, guided = model.eps(x, t, LABELS), classifier_free(model, 6.0)(x, t, y=LABELS)
    deviations = [value.flatten(1).std(dim=1) for value in (own, guided)]
    assert (deviations[1] / deviations[0] - 1).abs().min() > 0.01
    out = classifier_free(model, 6.0, rescale=rescale)(x, t, y=LABELS)
    expected = rescale * deviations[0] + (1 - rescale) * deviations[1]
    assert th.allclose(out.flatten(1).std(dim=1), expected, atol=1e-12)
    assert th.allclose(out / out.flatten(1).std(dim=1).view(-1, 1, 1, 1), guided / deviations[1].view(-1, 1, 1, 1))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 1, 1, 1)])
def test_an_even_image_has_no_contrast_to_take_back(shape):
    x, t = noise_like(shape), th.tensor([500, 100])
    network = lambda x, timesteps, y: 0 * x + 0.1 * y.view(-1, 1, 1, 1)  # noqa: E731
    outs = [classifier_free(network, 6.0, null_label=3, rescale=rescale)(x, t, y=LABELS) for rescale in (0.0, 0.7)]
    assert th.equal(*outs)


def unlabelled():
    model = Classes(make_process())
    model.null_label = None
    return model


NEEDS_LABELS = r'guidance needs labels: give model_kwargs=\{"y": labels\}'
T = th.tensor([3, 3])
REFUSED = {
    "classifier, no labels": (lambda: classifier_guidance(Linear(), 1.0)(noise_like(), T), NEEDS_LABELS),
    **{
        f"null class, {scale}, {kwargs}": (
            lambda s=scale, k=kwargs: classifier_free(Classes(make_process()), s)(noise_like(), T, **k),
            f"classifier-free {NEEDS_LABELS}",
        )
        for scale, kwargs in product((0.0, 3.0), ({}, {"y": None}))
    },
    "a network": (lambda: classifier_free(lambda x, t, y: x, 2.0), "trained without labels too: train with class_drop"),
    "no null class": (lambda: classifier_free(unlabelled(), 2.0), "trained without labels too"),
    **{
        f"rescale {value}": (lambda v=value: classifier_free(unlabelled(), 2.0, null_label=1, rescale=v), "in 0 .. 1")
        for value in (-0.1, 1.1, math.nan)
    },
    **{
        f"interval {ends}": (lambda e=ends: interval(zero, *e), "is empty: give the lower end first")
        for ends in ((5, 3), (math.nan, 3), (3, math.nan))
    },
    "mode": (lambda: clip_guidance(zero, th.ones(6), mode="clean"), "mode must be one of noisy, denoised, got 'clean'"),
    "weighting": (lambda: dps(zero, weighting="size"), "weighting must be one of norm, constant, got 'size'"),
    **{
        f"percentile {value}": (lambda v=value: dynamic_thresholding(v), r"is not in \(0, 1\]: usual is 0.995")
        for value in (0.0, -0.1, 1.001, math.nan)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_without_sense_are_refused(case):
    call, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_network_without_a_null_class_takes_one_that_is_given():
    model = unlabelled()
    classifier_free(model, 2.0, null_label=1)(noise_like(), T, y=LABELS)
    assert model.others[-1]["y"].tolist() == [2, 0, 1, 1]


def test_a_guided_network_stands_in_place_of_its_own():
    """It is on a device, knows its classes, and goes into evaluation mode with all of its parts."""
    process = make_process(respacing="10")
    model, weaker = Classes(process), Classes(process, shift=0.3)
    network = autoguidance(interval(classifier_free(model, 3.0), 200, 700), weaker, 2.0)
    assert (network.num_classes, network.null_label) == (3, 3)
    assert set(network.parameters()) == {model.shift, weaker.shift}
    weaker.eval()
    with evaluating(network):
        assert not any(module.training for module in (network, model, weaker, model.dropout))
        image = process.sample_loop(DDIM(), network, SHAPE, model_kwargs={"y": LABELS})  # no device is given
    assert [module.training for module in (network, model, model.dropout, weaker)] == [True, True, True, False]
    assert th.isfinite(image).all()
    with pytest.raises(ValueError, match=r"class 4 does not exist: the classes are 0 \.\. 3"):
        process.sample_loop(DDIM(), network, SHAPE, model_kwargs={"y": th.tensor([0, 4])})
    model.others.clear()
    process.sample_loop(DDIM(), network, SHAPE, model_kwargs={"y": LABELS}, randomize_class=True)
    drawn = {int(label) for other in model.others for label in other["y"][:2]}
    assert drawn == {0, 1, 2}


def test_guided_networks_of_networks_without_classes():
    network = autoguidance(lambda x, t: x, lambda x, t: 0 * x, 2.0)
    assert (network.num_classes, network.null_label) == (None, None)
    assert th.equal(network(noise_like(), th.tensor([1, 1])), 2 * noise_like())


class Questions(TorchFunctionMode):
    """Counts how often a tensor is asked for its value, for which one on a GPU would have to be waited for."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in ("item", "tolist", "__bool__", "__int__", "__float__")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, lambda timesteps: 3.0])
def test_a_scale_that_is_a_number_is_not_asked_of_the_device(scale):
    def network(x, timesteps, y):
        return x * y.view(-1, 1, 1, 1)

    def classifier(x, timesteps):
        return x.flatten(1)[:, :3]

    process = make_process(respacing="10", mean="START_X")
    networks = classifier_free(network, scale, null_label=3, rescale=0.5), autoguidance(network, network, scale)
    guides = classifier_guidance(classifier, scale), loss_guidance(lambda x: x.flatten(1).sum(1), scale)
    for model, guide in product(networks, guides):
        predict = process.predictor(model, cond_fn=guide, model_kwargs={"y": LABELS})
        with Questions() as questions:
            predict(noise_like(), th.tensor([3, 3])).guided("score")
        assert questions.count == 0


@pytest.mark.parametrize("name", few(NAMES))
@pytest.mark.parametrize("through", [False, True])
def test_a_guide_acts_in_its_interval_alone(name, through):
    """As in a run that is guided there and not elsewhere, bit for bit; elsewhere nothing is asked."""
    process = make_process(respacing="8")
    data, asked = GaussianData(process), []

    def loss(x):
        return (x - 0.8).square().flatten(1).sum(1)

    def plain(x, timesteps):
        asked.append(float(timesteps[0]))
        return 2 * th.sin(x)

    def watched(x, t, out):
        asked.append(float(out["timesteps"][0]))
        return loss_guidance(loss, 2.0)(x, t, out)

    watched.through_denoiser = True
    guide = watched if through else plain
    images = sample(process, name, data, cond_fn=interval(guide, 250, 700))
    assert asked
    assert all(250 <= timestep <= 700 for timestep in asked)
    guided, free = (process.predictor(data, clip_denoised=False, cond_fn=cond_fn) for cond_fn in (guide, None))

    def piecewise(x, t):
        return (guided if 250 <= float(process.timesteps(t, x)[0]) <= 700 else free)(x, t)

    assert th.equal(images, by_steps(process, name, piecewise))
    assert not th.equal(images, sample(process, name, data))
    assert th.equal(
        sample(process, name, data, cond_fn=interval(guide, 0, 999)), sample(process, name, data, cond_fn=guide)
    )


@pytest.mark.parametrize("name", few(NAMES))
def test_a_guided_network_acts_in_its_interval_alone(name):
    process = make_process(respacing="8")
    model, weaker = Classes(process), Classes(process, shift=0.3)
    for network, doubled in ((classifier_free(model, 3.1), 4), (autoguidance(model, weaker, 2.1), 2)):
        model.batches, model.asked = [], []
        images = run_classes(process, name, interval(network, 250, 700))
        inside = [250 <= timestep <= 700 for timestep in model.asked]
        assert model.batches == [doubled if here else 2 for here in inside]
        assert len(weaker.asked) == (sum(inside) if doubled == 2 else 0)
        kwargs = {"clip_denoised": False, "model_kwargs": {"y": LABELS}}
        guided, free = (process.predictor(which, **kwargs) for which in (network, model))

        def piecewise(x, t, guided=guided, free=free):
            return (guided if 250 <= float(process.timesteps(t, x)[0]) <= 700 else free)(x, t)

        assert th.equal(images, by_steps(process, name, piecewise))
        everywhere = run_classes(process, name, interval(network, 0, 999))
        assert th.equal(everywhere, run_classes(process, name, network))
        assert not th.equal(everywhere, images)


def test_the_ends_belong_to_an_interval():
    guide, x = interval(lambda x, t: th.ones_like(x), 3, 5), noise_like()
    acting = [guide(x, th.tensor([t, t])) is not None for t in range(8)]
    assert acting == [False] * 3 + [True] * 3 + [False] * 2
    mixed = guide(x, th.tensor([4, 6]))
    assert th.equal(mixed, th.stack([th.ones(3, 4, 4), th.zeros(3, 4, 4)]).double())


def test_an_interval_in_an_interval_is_their_overlap():
    model = Classes(make_process())
    network, x = interval(interval(classifier_free(model, 3.0), 100, 500), 300, 900), noise_like()
    for t in (50, 200, 400, 700, 950):
        model.batches = []
        network(x, th.tensor([t, t]), y=LABELS)
        assert model.batches == [4 if 300 <= t <= 500 else 2]


def test_an_interval_leaves_the_guided_network_as_it_was():
    model = Classes(make_process())
    network = classifier_free(model, 3.0)
    limited, x, t = interval(network, 100, 200), noise_like(), th.tensor([900, 900])
    assert th.equal(limited(x, t, y=LABELS), model(x, t, y=LABELS))
    assert not th.equal(network(x, t, y=LABELS), model(x, t, y=LABELS))


@pytest.mark.parametrize("name", few(NAMES))
def test_everything_together_is_the_formula(name):
    """A classifier in an interval, the null class in another, and a weaker network, in one run."""
    process = make_process(respacing="8")
    model, weaker, classifier = Classes(process), Classes(process, shift=0.3), Linear()
    free = th.tensor([3, 3])

    def network(x, timesteps, y):
        eps, weak = model.eps(x, timesteps, y), weaker.eps(x, timesteps, free)
        if 200 <= float(timesteps[0]) <= 800:
            eps = model.eps(x, timesteps, free) + 2.5 * (eps - model.eps(x, timesteps, free))
        return weak + 1.5 * (eps - weak)

    def cond_fn(x, timesteps, y):
        return 0.2 * classifier.gradient(x, y) if float(timesteps[0]) <= 500 else None

    away = lambda x, timesteps: weaker(x, timesteps, y=free)  # noqa: E731
    guided = autoguidance(interval(classifier_free(model, 2.5), 200, 800), without_labels(away), 1.5)
    guide = interval(classifier_guidance(classifier, 0.2), 0, 500)
    images = run_classes(process, name, guided, cond_fn=guide)
    assert th.allclose(images, run_classes(process, name, network, cond_fn=cond_fn), atol=1e-4)
    assert len(weaker.batches) == len(model.batches)
    assert max(classifier.asked) <= 500


class Conditional(mixture.Oracle):
    """The perfect network for the classes of a mixture, and for no class."""

    num_classes, null_label = 4, 4

    def __call__(self, x, timesteps, y):
        level = self.level(timesteps)
        free = self.data.denoise(x, level)
        own = self.data.denoise(x, level, y.clamp(max=3)).where((y < 4).view(-1, 1, 1, 1), free)
        return (x - math.exp(level / 2) * own) / math.sqrt(-math.expm1(level))


@pytest.mark.parametrize("name", few(NAMES))
def test_classifier_free_guidance_is_guidance_by_the_exact_classifier(name):
    """Of the same scale: the one has Bayes' rule from the network, the other from the classifier (rule "score")."""
    process = make_process(respacing="12")
    data = mixture.ring()
    conditional, free = Conditional(process, data), mixture.Oracle(process, data)
    x, y = noise_like((8, 2, 1, 1)), th.arange(8) % 4
    images = []
    for model, cond_fn in ((classifier_free(conditional, 2.5), None), (free, free.guidance(2.5))):
        th.manual_seed(3)
        options = {"noise": x, "device": "cpu", "clip_denoised": False, "model_kwargs": {"y": y}, "cond_fn": cond_fn}
        sampler = DDIM(1.0) if name == "ddpm" else make_sampler(name)
        images.append(process.sample_loop(sampler, model, x.shape, **options))
    assert th.allclose(*images, atol=1e-6)


def slope_of(process, data, t):
    """d x_0 / d x of the exact denoiser."""
    alpha_bar = process.alphas_cumprod[t]
    return alpha_bar**0.5 * data.std**2 / (alpha_bar * data.std**2 + 1 - alpha_bar)


@pytest.mark.parametrize("t", [0, 4, 9])
def test_the_gradient_of_a_loss_is_the_analytic_one(t):
    process = make_process(respacing="10")
    data, x = GaussianData(process), noise_like()
    gradient, target = [], noise_like(seed=5)
    guide = loss_guidance(lambda xstart: (xstart - target).square().flatten(1).sum(1), lambda t: th.tensor([1.5, 3.0]))

    def watched(x, index, out):
        gradient.append(guide(x, index, out))
        return gradient[-1]

    watched.through_denoiser = True
    predict = process.predictor(data, clip_denoised=False, cond_fn=watched)
    prediction = predict(x, th.tensor([t, t])).guided("score")
    residual = prediction.unguided["pred_xstart"] - target
    scale = th.tensor([1.5, 3.0]).double().view(2, 1, 1, 1)
    expected = -2 * scale * residual * slope_of(process, data, t)
    assert th.allclose(gradient[0], expected, atol=1e-9)
    alpha_bar = process.alphas_cumprod[t]
    moved = prediction.unguided["pred_xstart"] + (1 - alpha_bar) / alpha_bar**0.5 * expected
    assert th.allclose(prediction.pred_xstart, moved, atol=1e-9)
    assert not prediction.pred_xstart.requires_grad


def test_a_loss_may_be_one_number():
    process = make_process(respacing="10")
    data = GaussianData(process)
    one = loss_guidance(lambda x: x.square().sum(), 2.0)
    each = loss_guidance(lambda x: x.square().flatten(1).sum(1), 2.0)
    assert th.allclose(
        sample(process, "ddim", data, cond_fn=one), sample(process, "ddim", data, cond_fn=each), atol=1e-12
    )


def published(process, data, x, noises, residual, zeta, weighting):
    """Algorithm 1 of Chung et al. 2023 as it is written, with a fixed large variance."""
    betas, alpha_bar = process.betas, process.alphas_cumprod
    for i in reversed(range(process.num_timesteps)):
        before, x = (alpha_bar[i - 1] if i else 1.0), x.detach().requires_grad_()
        eps = data(x, th.full((len(x),), process.timestep_map[i]))
        clean = (x - (1 - alpha_bar[i]) ** 0.5 * eps) / alpha_bar[i] ** 0.5
        old, new = (1 - betas[i]) ** 0.5 * (1 - before), before**0.5 * betas[i]
        moved = (old * x + new * clean) / (1 - alpha_bar[i]) + (betas[i] ** 0.5 * noises[i] if i else 0.0)
        squares = residual(clean).flatten(1).square().sum(dim=1)
        slope = th.autograd.grad(squares.sum(), x)[0]
        step = zeta / (squares.sqrt() if weighting == "norm" else th.ones_like(squares))
        x = (moved - step.view(-1, 1, 1, 1) * slope).detach()
    return x


@pytest.mark.parametrize(("weighting", "zeta"), [("norm", 0.5), ("constant", 0.3)])
def test_dps_is_the_published_algorithm(weighting, zeta):
    """On Gaussian data and a linear measurement; which then comes back, and in the pixels, too, that were measured."""
    process = make_process(1000, "40", mean="EPSILON")
    data, keep = GaussianData(process), (th.arange(16) % 2).view(1, 1, 4, 4).double()
    measured = keep * 0.5 * noise_like(seed=7)
    noises = [noise_like(seed=100 + i) for i in range(process.num_timesteps)]

    def residual(xstart):
        return measured - keep * xstart

    draws = iter(reversed(noises))
    scripted = make_sampler("ddpm")
    x, predict = (
        noise_like(),
        process.predictor(data, clip_denoised=False, cond_fn=dps(residual, zeta, weighting=weighting)),
    )
    for index in reversed(range(process.num_timesteps)):
        output, _ = scripted.step(process, predict, x, th.tensor([index] * 2), None, lambda: next(draws))
        x = output["sample"]
    assert th.allclose(x, published(process, data, noise_like(), noises, residual, zeta, weighting), atol=1e-9)
    free = sample(process, "ddpm", data)
    assert (residual(x).flatten(1).norm(dim=1) < 0.3 * residual(free).flatten(1).norm(dim=1)).all()


def test_dps_leaves_alone_what_is_explained():
    process = make_process(respacing="10")
    data = GaussianData(process)
    predict = process.predictor(data, clip_denoised=False, cond_fn=dps(lambda xstart: 0 * xstart))
    out = predict(noise_like(), th.tensor([3, 3])).guided("mean")
    assert th.equal(
        out.out["mean"], process.p_mean_variance(data, noise_like(), th.tensor([3, 3]), clip_denoised=False)["mean"]
    )


class Encoder(th.nn.Module):
    """A small encoder of images of any size."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = th.nn.Conv2d(3, 5, 3, padding=1), th.nn.Linear(20, 6)
        self.double()

    def forward(self, images):
        return self.linear(F.adaptive_avg_pool2d(F.silu(self.conv(images)), 2).flatten(1))


def angle_loss(encoder, images, target):
    """Half the squared angle [N], by the arc cosine."""
    return th.arccos(F.cosine_similarity(encoder(images), target[None], dim=1)).square() / 2


def test_guidance_by_noisy_embeddings_is_the_gradient_of_the_angle():
    encoder, x, target = Encoder(), noise_like(), noise_like((6,), 3)
    with th.no_grad():
        found = clip_guidance(encoder, target, mode="noisy", scale=30.0)(x, th.tensor([3, 3]), y=LABELS)
    leaf = x.clone().requires_grad_()
    (expected,) = th.autograd.grad(-30 * angle_loss(encoder, leaf, target).sum(), leaf)
    assert expected.abs().max() > 0.1
    assert th.allclose(found, expected, atol=1e-5)
    assert encoder.conv.weight.grad is None


def test_guidance_by_denoised_embeddings_goes_through_the_network():
    process = make_process(respacing="10")
    data, encoder, target, t = GaussianData(process), Encoder(), noise_like((6,), 3), th.tensor([5, 5])
    leaf = noise_like().requires_grad_()
    out = process.p_mean_variance(data, leaf, t, clip_denoised=False)
    found = clip_guidance(encoder, target, scale=30.0)(leaf, t, {**out, "timesteps": process.timesteps(t, leaf)})
    (expected,) = th.autograd.grad(-30 * angle_loss(encoder, out["pred_xstart"], target).sum(), leaf)
    assert expected.abs().max() > 0.1
    assert th.allclose(found, expected, atol=1e-5)


def test_several_targets_and_cutouts_are_averaged():
    encoder, x, targets = Encoder(), noise_like(), noise_like((3, 6), 3)

    def cut(images):
        return th.cat([images[..., :3, :3], images[..., 1:, 1:]])

    found = clip_guidance(encoder, targets, mode="noisy", cutouts=cut)(x, th.tensor([3, 3]))
    leaf = x.clone().requires_grad_()
    loss = sum(angle_loss(encoder, part, target).sum() for target in targets for part in cut(leaf).chunk(2)) / 6
    assert th.allclose(found, -th.autograd.grad(loss, leaf)[0], atol=1e-5)


def test_an_image_is_guided_as_it_is_alone():
    encoder, x, target = Encoder(), noise_like(), noise_like((6,), 3)

    def guide(images):
        cutouts = random_cutouts(4, 3, generator=th.Generator().manual_seed(1))
        return clip_guidance(encoder, target, mode="noisy", cutouts=cutouts)(images, th.zeros(len(images)))

    assert th.allclose(guide(x)[1:], guide(x[1:]), atol=1e-7)


@pytest.mark.parametrize(("size", "side"), [(4, 9), (9, 9), (12, 9)])
def test_cutouts(size, side):
    images = noise_like((2, 3, side, 11)).requires_grad_()
    cut = random_cutouts(5, size, generator=th.Generator().manual_seed(1))
    pieces, others = cut(images), cut(images)
    assert pieces.shape == (10, 3, size, size)
    again = random_cutouts(5, size, generator=th.Generator().manual_seed(1))(images)
    assert th.equal(pieces, again)
    assert not th.equal(pieces, others)
    (grad,) = th.autograd.grad(pieces[::2].sum(), images)  # of every other piece: of the first image
    assert grad[0].abs().sum() > 0
    assert not grad[1].any()


def test_cutouts_as_large_as_the_image_are_the_image():
    images = noise_like((2, 3, 8, 8))
    pieces = random_cutouts(3, 8)(images)
    assert th.allclose(pieces, images.repeat(3, 1, 1, 1))


def test_cutouts_lie_anywhere_and_a_power_makes_them_small():
    """Seen from pictures of their own coordinates."""
    axis = th.arange(64.0)
    picture = th.stack([axis.view(64, 1).expand(64, 64), axis.expand(64, 64)])[None]
    spans = {}
    for power in (0.3, 1.0, 4.0):
        pieces = random_cutouts(200, 16, power=power, generator=th.Generator().manual_seed(1))(picture)
        assert pieces.amin() >= 0
        assert pieces.amax() <= 63
        centres = pieces.mean(dim=(2, 3)).mean(dim=0)
        assert th.allclose(centres, th.full((2,), 31.5), atol=3.0)
        assert abs(float(pieces.mean(dim=(2, 3)).T.corrcoef()[0, 1])) < 0.3
        spans[power] = float((pieces.amax(dim=(1, 2, 3)) - pieces.amin(dim=(1, 2, 3))).mean())
    assert spans[0.3] > spans[1.0] > spans[4.0]


def test_cutouts_draw_from_the_global_generator_where_they_have_none_of_their_own():
    images = noise_like((1, 3, 9, 9))
    th.manual_seed(4)
    first = random_cutouts(2, 4)(images)
    th.manual_seed(4)
    assert th.equal(first, random_cutouts(2, 4)(images))
    before = th.get_rng_state()
    random_cutouts(2, 4, generator=th.Generator())(images)
    assert th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize("percentile", [0.1, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_dynamic_thresholding_is_numpys(percentile, dtype):
    """The smallest size that at least so many pixels do not exceed; below 1 it is 1, which leaves the image alone."""
    xstart = (noise_like((3, 3, 64, 64)) * th.tensor([0.2, 1.0, 5.0]).view(3, 1, 1, 1)).to(dtype)
    out = dynamic_thresholding(percentile)(xstart)
    assert out.dtype == dtype
    for image, found in zip(xstart.numpy(), out.numpy(), strict=True):
        limit = max(1.0, np.quantile(np.abs(image), percentile, method="inverted_cdf"))
        np.testing.assert_allclose(found, np.clip(image, -limit, limit) / limit, atol=1e-6)
    assert out.abs().max() <= 1
    assert xstart[0].abs().max() > 1 or th.equal(out[0], xstart[0])


def test_dynamic_thresholding_keeps_the_graph():
    """Of the pixels within the limit, which itself is a constant."""
    xstart = (3 * noise_like()).requires_grad_()
    out = dynamic_thresholding(0.8)(xstart)
    (grad,) = th.autograd.grad(out.sum(), xstart)
    limit = xstart.detach().abs().flatten(1).sort(dim=1).values[:, math.ceil(0.8 * 48) - 1].view(-1, 1, 1, 1)
    size = xstart.detach().abs()
    elsewhere = (size - limit).abs() > 1e-4  # but at the limit itself, which is one of the pixels
    assert elsewhere.flatten(1).sum(1).tolist() == [47, 47]
    assert th.allclose(grad[elsewhere], ((size < limit) / limit)[elsewhere], atol=1e-6)
    assert (grad <= 1 / limit + 1e-6).all()
    assert (grad >= 0).all()


@pytest.mark.parametrize("name", few(NAMES))
def test_clipping_after_dynamic_thresholding_changes_nothing(name):
    """Strong guidance that leaves the range comes back into it."""
    process = make_process(respacing="6")
    data, seen, moved = GaussianData(process), [], []

    def watch(t, output):
        seen.append(output["pred_xstart"])
        moved.append(output.get("pred_xstart_guided", output["pred_xstart"]))

    options = {"denoised_fn": dynamic_thresholding(0.9), "callback": watch}
    guided = {"cond_fn": loss_guidance(lambda x: (x - 2).square().flatten(1).sum(1), 1.0), **options}
    for more in (options, guided):
        both = [sample(process, name, data, clip_denoised=clip, **more) for clip in (False, True)]
        assert th.equal(*both)
    assert all(xstart.abs().max() <= 1 for xstart in seen)
    assert name == "ddpm" or all(xstart.abs().max() <= 1 for xstart in moved)
    plain = sample(process, name, data, clip_denoised=False)
    assert not th.equal(plain, both[0])


def test_public_rules_take_guides_that_ask_for_timesteps():
    process = make_process(respacing="10")
    data, x, t = GaussianData(process), th.randn(SHAPE, dtype=th.float64).requires_grad_(), th.tensor([5, 5])
    guide = loss_guidance(lambda x_0: (x_0**2).flatten(1).sum(dim=1), lambda timesteps: timesteps / 1000)
    out = process.p_mean_variance(data, x, t)
    mean = process.condition_mean_with_grad(guide, out, x, t)
    score = process.condition_score_with_grad(guide, out, x, t)
    assert ((mean - out["mean"]) * out["pred_xstart"] < 0).all()
    assert ((score["pred_xstart"] - out["pred_xstart"]) * out["pred_xstart"] < 0).all()
