"""The mixtures that samplers are measured on: their closed forms against derivatives, integrals and each other."""

import math

import pytest
import torch as th
from oracle import GaussianData, make_process

import mixture
from guided_diffusion.sampling.guidance import classifier_guidance

LEVELS = [-1e-4, -0.5, -5.0, -12.0]
PROBLEMS = {"ring": mixture.ring(), "images": mixture.images(8)}


def noised(data, level, count=6):
    generator = th.Generator().manual_seed(1)
    x, component = data.sample(count, generator)
    noise = th.randn(x.shape, generator=generator, dtype=th.float64)
    return math.exp(level / 2) * x + math.sqrt(-math.expm1(level)) * noise, data.classes[component]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_eps_is_the_score(name, level):
    data = PROBLEMS[name]
    x = noised(data, level)[0].requires_grad_()
    (score,) = th.autograd.grad(data.log_likelihood(x, level).sum(), x)
    alpha, sigma = math.exp(level / 2), math.sqrt(-math.expm1(level))
    assert th.allclose((x - alpha * data.denoise(x, level)) / sigma, -sigma * score, atol=1e-9)


@pytest.mark.parametrize("level", [-0.5, -20.0])
def test_the_density_integrates_to_one(level):
    axis = th.linspace(-6, 6, 481, dtype=th.float64)
    points = th.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    total = PROBLEMS["ring"].log_likelihood(points, level).exp().sum() * (12 / 480) ** 2
    assert float(total) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_samples_have_the_moments_of_the_components(name):
    data = PROBLEMS[name]
    x, component = data.sample(20000, th.Generator().manual_seed(2))
    z = (x.flatten(1) - data.means[component]) / data.variances[component].sqrt()
    assert abs(float(z.mean())) < 0.02
    assert float(z.square().mean()) == pytest.approx(1, abs=0.02)
    assert component.bincount(minlength=8).double() == pytest.approx(th.full((8,), 2500.0).double(), abs=200)


def test_one_component_is_gaussian_data():
    process = make_process(name="cosine")
    data = mixture.Mixture(th.full((1, 3, 2, 2), 0.3), 0.5)
    x, timesteps = th.randn(2, 3, 2, 2, dtype=th.float64), th.tensor([700.25, 700.25])
    ours, theirs = mixture.Oracle(process, data)(x, timesteps), GaussianData(process)(x, timesteps)
    assert th.allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize("timestep", [3, 400.5, 999])
@pytest.mark.parametrize("name", PROBLEMS)
def test_guidance_is_the_gradient_of_the_classifier(name, timestep):
    process = make_process()
    oracle = mixture.Oracle(process, PROBLEMS[name])
    timesteps = th.full((6,), timestep)
    x, y = noised(oracle.data, oracle.level(timesteps))
    expected = classifier_guidance(oracle.classifier, 2.0)(x, timesteps, y=y)
    assert th.allclose(oracle.guidance(2.0)(x, timesteps, y=y), expected, atol=1e-5 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("level", LEVELS)
def test_guidance_of_scale_1_leaves_the_class_alone(level):
    data = PROBLEMS["ring"]
    x, y = noised(data, level)
    for row, label in zip(x, y, strict=True):
        guided = data.denoise_guided(row[None], level, label.view(1), 1.0)
        assert th.allclose(guided, data.of_class(int(label)).denoise(row[None], level), atol=1e-9)
