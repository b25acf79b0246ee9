"""Inversion against the exact flow of Gaussian data, there and back again, and great circles between noises."""

from __future__ import annotations

import functools
import math

import pytest
import torch as th
from few import few
from oracle import GaussianData, make_process

from guided_diffusion.sampling.editing import invert, slerp
from guided_diffusion.sampling.loop import network_calls
from guided_diffusion.sampling.samplers import DDIM, SAMPLERS, DDIMReverse, make_sampler

SHAPE = (2, 3, 4, 4)
DETERMINISTIC = sorted(set(SAMPLERS) - {"ddim_reverse", "ddpm", "dpm++2m_sde", "dpm++3m_sde", "sa", "euler_ancestral"})
EXACT = {"device": "cpu", "clip_denoised": False}


def noise_like(shape=SHAPE, seed=0):
    return th.randn(shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


IMAGES = 0.3 + 0.5 * noise_like(seed=9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("mean", ["EPSILON", "VELOCITY"])
def test_inversion_follows_the_flow(schedule, mean):
    """Of the first order in the step: four times the steps, a quarter of the error."""
    errors = []
    for steps in (40, 160):
        process = make_process(1000, f"logsnr{steps}", name=schedule, mean=mean)
        data = GaussianData(process)
        exact = data.flow(IMAGES, process.alphas_cumprod[0], process.alphas_cumprod[-1])
        errors.append(float((invert(process, data, IMAGES, **EXACT) - exact).abs().max()))
    assert errors[1] < errors[0] / 3.4
    assert errors[1] < 0.06


@functools.cache
def inverted(steps):
    """A process of so many steps, its best network, and the noise of the images."""
    process = make_process(1000, f"logsnr{steps}")
    data = GaussianData(process)
    return process, data, invert(process, data, IMAGES, **EXACT)


@pytest.mark.parametrize("name", few(DETERMINISTIC))
def test_there_and_back_again(name):
    """By any sampler without randomness; the error falls with the number of steps."""
    errors = []
    for steps in (25, 100):
        process, data, noise = inverted(steps)
        back = process.sample_loop(make_sampler(name), data, SHAPE, start=noise, **EXACT)
        errors.append(float((back - IMAGES).abs().max()))
    assert errors[1] < max(errors[0] / 2, 0.02)
    assert errors[1] < 0.15
    assert errors[0] > 1e-6


@pytest.mark.parametrize(
    "options", [{"strength": 0.6}, {"skip_timesteps": 80}, {"strength": 1.0}, {"skip_timesteps": 198}]
)
def test_part_of_the_way(options):
    """The level at which the way ends is the one at which the way back starts."""
    process = make_process(1000, "logsnr200")
    data = GaussianData(process)
    noise, there = invert(process, data, IMAGES, **options, **EXACT), data.calls
    assert there == network_calls(process, DDIMReverse(), **options)
    last = there  # one call per level, from t = 0
    exact = data.flow(IMAGES, process.alphas_cumprod[0], process.alphas_cumprod[last])
    assert (noise - exact).abs().max() < 0.05
    data.calls = 0
    back = process.sample_loop(DDIM(), data, SHAPE, start=noise, **options, **EXACT)
    assert data.calls == there + 1
    assert (back - IMAGES).abs().max() < 0.06


def test_inversion_by_strength_is_inversion_by_skipping():
    process = make_process(1000, "linspace51")  # every 19.98
    by_strength, by_steps = (
        invert(process, GaussianData(process), IMAGES, **options, **EXACT)
        for options in ({"strength": 0.5}, {"skip_timesteps": 25})
    )
    assert th.equal(by_strength, by_steps)


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"skip_timesteps": 50}, {"skip_timesteps": 49}])
def test_no_way_at_all_leaves_the_images(options):
    process = make_process(1000, "linspace50")
    data = GaussianData(process)
    assert th.equal(invert(process, data, IMAGES, **options, **EXACT), IMAGES)
    assert data.calls == 0


class Classes(th.nn.Module):
    """The perfect network for classes N(means[y], 0.3^2)."""

    num_classes, means = 2, (-0.4, 0.4)

    def __init__(self, process):
        super().__init__()
        self.scale = th.nn.Parameter(th.ones((), dtype=th.float64))
        self.data = [GaussianData(process, mean, 0.3) for mean in self.means]

    def forward(self, x, timesteps, y):
        both = th.stack([data(x, timesteps) for data in self.data])
        return both[y, th.arange(len(x))] * self.scale


def test_another_label_on_the_way_back_makes_another_class_of_the_image():
    """The exact flow takes an image to where it is in the other class; no device is given, and no graph remains."""
    process = make_process(1000, "logsnr200")
    model, images = Classes(process), -0.4 + 0.3 * noise_like()
    noise = invert(process, model, images, model_kwargs={"y": th.tensor([0, 0])}, clip_denoised=False)
    assert not noise.requires_grad
    kwargs = {"y": th.tensor([0, 1])}
    back = process.sample_loop(DDIM(), model, SHAPE, start=noise, model_kwargs=kwargs, clip_denoised=False)
    assert (back[0] - images[0]).abs().max() < 0.03
    assert (back[1] - (images[1] + 0.8)).abs().max() < 0.05


def test_guidance_does_not_enter():
    process = make_process(respacing="10")

    def cond_fn(*args):
        raise AssertionError("asked")

    expected = invert(process, GaussianData(process), IMAGES, **EXACT)
    assert th.equal(expected, invert(process, GaussianData(process), IMAGES, cond_fn=cond_fn, **EXACT))


def test_an_image_is_inverted_as_it_is_alone():
    process = make_process(respacing="10")
    both = invert(process, GaussianData(process), IMAGES, **EXACT)
    assert th.equal(both[1:], invert(process, GaussianData(process), IMAGES[1:], **EXACT))
    assert invert(process, GaussianData(process), IMAGES.float(), **EXACT).dtype == th.float32


@pytest.mark.parametrize(
    "options",
    [{"noise": IMAGES}, {"mask": th.ones(1, 1, 4, 4)}, {"strength": 0.5, "skip_timesteps": 1}, {"strength": 2.0}],
)
def test_what_makes_no_sense_on_the_way_to_noise_is_refused(options):
    process = make_process(respacing="10")
    with pytest.raises(ValueError, match=r"needs init_image, and no mask or noise|strength"):
        invert(process, GaussianData(process), IMAGES, **options, **EXACT)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("seed", range(20))
def test_a_circle_ends_exactly_where_it_should(dtype, seed):
    start, end = noise_like((2, 3, 4, 4), seed).to(dtype)
    points = slerp(start, end, th.tensor([0.0, 0.3, 1.0]))
    assert points.shape == (3, 3, 4, 4)
    assert points.dtype == dtype
    assert th.equal(points[0], start)
    assert th.equal(points[2], end)


def test_a_circle_keeps_the_norm_and_is_walked_evenly():
    start, end = (noise / noise.norm() for noise in noise_like())
    shares = th.linspace(0, 1, 9).double()
    points = slerp(3 * start, 3 * end, shares)
    assert th.allclose(points.flatten(1).norm(dim=1), th.full((9,), 3.0).double())
    angle = math.acos(float((start * end).sum()))
    turned = th.arccos(((points / 3) * start).flatten(1).sum(1).clamp(-1, 1))
    assert th.allclose(turned, shares * angle, atol=1e-7)


def test_a_quarter_of_a_circle():
    start, end = th.tensor([1.0, 0.0]).double(), th.tensor([0.0, 2.0]).double()
    shares = th.linspace(0, 1, 5).double()
    expected = th.stack([th.cos(shares * math.pi / 2), 2 * th.sin(shares * math.pi / 2)], dim=1)
    assert th.allclose(slerp(start, end, shares), expected)


def test_each_share_has_its_point():
    start, end = noise_like()
    shares = th.tensor([0.7, 0.1, 0.7])
    points = slerp(start, end, shares)
    assert th.equal(points[0], points[2])
    for share, point in zip(shares, points, strict=True):
        assert th.equal(slerp(start, end, share[None])[0], point)
    assert th.allclose(slerp(end, start, 1 - shares), points)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, -2.5, -0.3])
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_parallel_noises_are_joined_by_a_line(factor, dtype):
    """Also those that point away from each other, for which there are many circles."""
    shares = th.linspace(0, 1, 5).to(dtype)
    for start in noise_like((50, 3, 8, 8)).to(dtype):
        points = slerp(start, factor * start, shares)
        expected = start * (1 + shares * (factor - 1)).view(5, 1, 1, 1)
        assert th.allclose(points, expected, atol=1e-5 if dtype == th.float32 else 1e-12)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "unipc"])
def test_the_way_between_two_images_ends_at_both(name):
    process, data, noise = inverted(100)
    between = slerp(noise[0], noise[1], th.linspace(0, 1, 5))
    images = process.sample_loop(make_sampler(name), data, between.shape, start=between, **EXACT)
    assert (images[[0, 4]] - IMAGES).abs().max() < 0.15
    exact = data.flow(between, process.alphas_cumprod[-1], 1.0)
    assert (images - exact).abs().max() < 0.06
