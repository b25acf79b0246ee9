"""The loop around the steps: masks and what is kept, resampling, where to start, callbacks, the number of calls."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch as th
from few import few
from oracle import GaussianData, make_process

from guided_diffusion.sampling.guidance import combine, loss_guidance
from guided_diffusion.sampling.loop import network_calls, sample_loop
from guided_diffusion.sampling.samplers import DDIM, PLMS, SAMPLERS, Ancestral, DDIMReverse, make_sampler
from guided_diffusion.sampling.steps import Sampler

SHAPE = (2, 3, 4, 4)
NAMES = sorted(set(SAMPLERS) - {"ddim_reverse"})  # from noise to images
LEFT = (th.arange(4) < 2).double().expand(1, 1, 4, 4)  # keeps the left half


def noise_like(shape=SHAPE, seed=0):
    return th.randn(shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


IMAGE = 0.5 * noise_like(seed=9)


class Spy(GaussianData):
    """The perfect network, which remembers what it is asked."""

    def __init__(self, process, **data):
        super().__init__(process, **data)
        self.seen, self.asked = [], []

    def __call__(self, x, timesteps, y=None):
        self.seen.append(x)
        self.asked.append(float(timesteps[0]))
        return super().__call__(x, timesteps)


def draw_seeds(generator):
    """What a mask draws, once: a seed from every source of noise."""
    sources = generator if isinstance(generator, list) else [generator]
    return [int(th.randint(2**63 - 1, (), generator=source)) for source in sources]


def run(process, sampler, model=None, shape=SHAPE, *, seeds_drawn=False, **options):
    """One run from the same x_T with the same draws, but for those of a mask's seeds where `seeds_drawn`."""
    th.manual_seed(1)
    if seeds_drawn:
        draw_seeds(options.get("generator"))
    sampler = make_sampler(sampler) if isinstance(sampler, str) else sampler
    given = {"device": "cpu", "clip_denoised": False, **options}
    if not {"noise", "start"} & set(given):
        given["noise"] = noise_like(shape)
    return process.sample_loop(sampler, model or GaussianData(process), shape, **given)


def generators(*seeds):
    return [th.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("name", few(NAMES))
def test_a_mask_of_ones_returns_the_image(name):
    process = make_process(respacing="6")
    for more in ({}, {"resample": 2, "jump": 3}, {"strength": 0.5}, {"clip_denoised": True}):
        out = run(process, name, init_image=IMAGE, mask=th.ones(1, 1, 4, 4), **more)
        assert th.equal(out, IMAGE)


@pytest.mark.parametrize("name", few(NAMES))
def test_a_mask_of_zeros_is_no_mask_bit_for_bit(name):
    """Nor does it draw from anyone's generator."""
    process = make_process(respacing="6")
    for make in (lambda: None, lambda: th.Generator().manual_seed(3), lambda: generators(3, 4)):
        images, states = [], []
        for mask in (None, th.zeros(1, 1, 4, 4)):
            generator = make()
            images.append(run(process, name, init_image=IMAGE, mask=mask, generator=generator))
            sources = [th.default_generator] if generator is None else generator
            states.append([source.get_state() for source in (sources if isinstance(sources, list) else [sources])])
        assert th.equal(*images)
        assert all(map(th.equal, *states))


@pytest.mark.parametrize("name", few(NAMES))
def test_what_is_kept_is_exact_and_the_rest_is_painted(name):
    """And what is kept costs the rest one draw: it is what it would be if the network did not look beyond a pixel."""
    process = make_process(respacing="6")
    for make in (lambda: None, lambda: th.Generator().manual_seed(3), lambda: generators(3, 4)):
        out = run(process, name, init_image=IMAGE, mask=LEFT, generator=make())
        state = th.get_rng_state()
        free = run(process, name, init_image=IMAGE, generator=make(), seeds_drawn=True)
        assert th.equal(th.get_rng_state(), state)
        assert th.equal(out[..., :2], IMAGE[..., :2])
        assert th.equal(out[..., 2:], free[..., 2:])
        assert (out[..., 2:] - IMAGE[..., 2:]).abs().min() > 1e-4


class Watched(Sampler):
    """A sampler whose draws are seen."""

    def __init__(self, sampler):
        self.sampler, self.draws = sampler, []

    def step(self, process, predict, x, t, state, draw):
        def watched():
            self.draws.append(draw())
            return self.draws[-1]

        return self.sampler.step(process, predict, x, t, state, watched)


@pytest.mark.parametrize("make", [lambda: None, lambda: th.Generator().manual_seed(3), lambda: generators(3, 4)])
def test_the_noise_of_what_is_kept_has_generators_of_its_own(make):
    process, samplers = make_process(respacing="6"), [Watched(Ancestral()), Watched(Ancestral())]
    spy = Spy(process)
    for sampler, mask in zip(samplers, (None, LEFT), strict=True):
        run(process, sampler, spy, init_image=IMAGE, mask=mask, generator=make(), seeds_drawn=mask is None)
    drawn, draws = (sampler.draws for sampler in samplers)
    assert len(drawn) == 6
    assert all(map(th.equal, drawn, draws))
    alpha_bar = process.alphas_cumprod[::-1]
    kept = [(x - a**0.5 * IMAGE) / (1 - a) ** 0.5 for x, a in zip(spy.seen[6:], alpha_bar, strict=True)]
    for noise in kept:
        assert not any(th.allclose(noise[..., :2], other[..., :2]) for other in [*draws, *kept] if other is not noise)


def test_equal_masks_in_other_shapes():
    process = make_process(respacing="6")
    expected = run(process, "ddpm", init_image=IMAGE, mask=LEFT)
    for mask in (
        LEFT.expand(2, 1, 4, 4),
        LEFT.expand(1, 3, 4, 4),
        LEFT.expand(SHAPE),
        LEFT[0, 0],
        LEFT.bool(),
        LEFT.half(),
    ):
        assert th.equal(run(process, "ddpm", init_image=IMAGE, mask=mask), expected)


def test_every_image_and_channel_may_have_a_mask_of_its_own():
    process = make_process(respacing="6")
    mask = (noise_like(seed=4) > 0).double()
    out = run(process, "dpm++2m_sde", init_image=IMAGE, mask=mask)
    assert th.equal(out == IMAGE, mask.bool())


def test_one_image_is_kept_in_all_samples():
    process = make_process(respacing="6")
    one = run(process, "ddpm", init_image=IMAGE[:1], mask=LEFT)
    assert th.equal(one, run(process, "ddpm", init_image=IMAGE[:1].expand(SHAPE), mask=LEFT))
    assert th.equal(one[1:, ..., :2], IMAGE[:1, ..., :2])


@pytest.mark.parametrize("name", NAMES)
def test_a_soft_mask_mixes_at_every_level(name):
    """The loop by hand: bit for bit where the mask is 1 or 0, and by shares in between."""
    process, sampler = make_process(respacing="6"), make_sampler(name)
    mask = th.tensor([0.0, 0.25, 0.9, 1.0]).double().expand(1, 1, 4, 4)
    painting = th.Generator().manual_seed(3)
    keeping = th.Generator().manual_seed(*draw_seeds(painting))

    def paste(x, level):
        known = IMAGE
        if level >= 0:
            noise = th.randn(SHAPE, generator=keeping, dtype=th.float64)
            known = process.q_sample(IMAGE, th.tensor([level] * 2), noise)
        return th.lerp(x, known, mask)

    x, state = process.q_sample(IMAGE, th.tensor([5, 5]), noise_like()), None
    x = paste(x, 5)
    predict = process.predictor(GaussianData(process), clip_denoised=False)
    for index in reversed(range(6)):
        draw = lambda: th.randn(SHAPE, generator=painting, dtype=th.float64)  # noqa: E731
        output, state = sampler.step(process, predict, x, th.tensor([index] * 2), state, draw)
        x = paste(output["sample"], index - 1)
    out = run(process, name, init_image=IMAGE, mask=mask, generator=th.Generator().manual_seed(3))
    assert th.allclose(out, x, atol=1e-12)
    assert th.equal(out[..., 0], x[..., 0])
    assert th.equal(out[..., 3], IMAGE[..., 3])
    assert ((out - IMAGE).abs().amax(dim=(0, 1, 2)) > 1e-3).tolist() == [True, True, True, False]


def test_what_is_kept_depends_on_the_seed():
    """Of the global generator too."""
    process, inputs = make_process(respacing="6"), []
    for seed in (1, 2, 1):
        th.manual_seed(seed)
        spy = Spy(process)
        process.ddim_sample_loop(spy, SHAPE, noise=noise_like(), device="cpu", init_image=IMAGE, mask=LEFT)
        inputs.append(spy.seen[0])
    assert th.equal(inputs[0], inputs[2])
    assert not th.isclose(inputs[0], inputs[1])[..., :2].any()


@pytest.mark.parametrize("make", [lambda: None, lambda: th.Generator().manual_seed(3), lambda: generators(3, 4)])
@pytest.mark.parametrize("resample", [1, 2])
def test_every_call_keeps_with_other_noise(make, resample):
    """As it draws other noise, of one generator after another and for each image: also where the sampler draws none."""
    process, generator, painted = make_process(respacing="6"), make(), []
    pair = th.full((2, 1, 4, 4), 0.3).double()
    for _ in range(2):
        out = process.sample_loop(
            "dpm++2m", Pair(process), (2, 1, 1, 2), noise=noise_like((2, 1, 1, 2)), device="cpu",
            clip_denoised=False, init_image=pair[..., :1, :2], mask=LEFT[..., :1, 1:3], resample=resample,
            generator=generator,
        )  # fmt: skip
        painted.extend(out[:, 0, 0, 1].tolist())
    assert len(set(painted)) == 4


def test_what_is_kept_is_kept_in_the_dtype_of_the_samples():
    process = make_process(respacing="6")
    out = run(process, "ddpm", noise=noise_like().float(), init_image=IMAGE, mask=LEFT)
    assert out.dtype == th.float32
    assert th.equal(out[..., :2], IMAGE[..., :2].float())


@pytest.mark.parametrize("name", few(NAMES))
@pytest.mark.parametrize("resample", [1, 2])
def test_masked_images_do_not_depend_on_their_batch(name, resample):
    """With one generator per image, also where one of them keeps nothing."""
    process = make_process(respacing="6")
    images, masks = noise_like((3, 3, 4, 4), 5), th.cat([LEFT, 0 * LEFT, LEFT.flip(-1)])

    def sample(rows):
        shape = (len(rows), *SHAPE[1:])
        more = {"resample": resample, "jump": 3, "generator": generators(*(seed + 7 for seed in rows))}
        noise = noise_like((3, 3, 4, 4), 2)[rows]
        return run(process, name, shape=shape, noise=noise, init_image=images[rows], mask=masks[rows], **more)

    together, pair, alone = sample([0, 1, 2]), sample([2, 1]), sample([1])
    assert th.equal(together[[2, 1]], pair)
    assert th.equal(together[1:2], alone)
    free = (
        sample([1])
        if resample > 1
        else run(
            process,
            name,
            shape=(1, 3, 4, 4),
            noise=noise_like((3, 3, 4, 4), 2)[1:2],
            init_image=images[1:2],
            generator=generators(8),
        )
    )
    assert th.equal(alone, free)


def test_what_is_kept_has_the_noise_of_its_level():
    """Anew in every step: q(x_t | x_0), independent of every other."""
    process, shape = make_process(respacing="6"), (2, 3, 64, 64)
    spy, image = Spy(process), 0.5 * noise_like((2, 3, 64, 64), 9)
    run(process, "ddim", spy, shape, init_image=image, mask=th.ones(1, 1, 64, 64), noise=noise_like(shape))
    noises = [
        (x - alpha_bar**0.5 * image) / (1 - alpha_bar) ** 0.5
        for x, alpha_bar in zip(spy.seen, process.alphas_cumprod[::-1], strict=True)
    ]
    products = th.stack([noise.flatten() for noise in noises])
    covariance = products @ products.T / products.shape[1]
    assert th.allclose(covariance, th.eye(6).double(), atol=0.04)
    assert products.mean().abs() < 0.01


def test_a_mask_goes_together_with_guidance_through_the_network():
    process = make_process(respacing="6")
    loss = loss_guidance(lambda x: -x.flatten(1).sum(1), 3.0)
    for name in NAMES:
        out = run(process, name, init_image=IMAGE, mask=LEFT, cond_fn=combine(loss, lambda x, t: th.zeros_like(x)))
        assert th.equal(out[..., :2], IMAGE[..., :2])
        assert (out[..., 2:] > run(process, name, init_image=IMAGE, mask=LEFT)[..., 2:]).all()
        assert not out.requires_grad


def plain_walk(*stretches):
    return [t for start, end, times in stretches for t in list(range(start, end - 1, -1)) * times]


@pytest.mark.parametrize(
    ("resample", "jump", "walk"),
    [
        (1, 2, plain_walk((6, 0, 1))),
        (3, 1, plain_walk(*[(t, t, 3) for t in reversed(range(7))])),
        (2, 3, plain_walk((6, 4, 2), (3, 1, 2), (0, 0, 2))),
        (3, 4, plain_walk((6, 3, 3), (2, 0, 3))),
        (2, 7, plain_walk((6, 0, 2))),
        (2, 100, plain_walk((6, 0, 2))),
    ],
)
def test_every_stretch_is_taken_as_often_as_asked(resample, jump, walk):
    process = make_process(respacing="7")
    spy, seen = Spy(process), []
    out = run(
        process,
        "ddim",
        spy,
        init_image=IMAGE,
        mask=LEFT,
        resample=resample,
        jump=jump,
        callback=lambda t, _: seen.append(t),
    )
    assert seen == walk
    assert spy.asked == [process.timestep_map[t] for t in walk]
    assert spy.calls == network_calls(process, DDIM(), resample=resample, jump=jump)
    assert th.equal(out[..., :2], IMAGE[..., :2])


def test_a_way_back_is_the_forward_process():
    """x_t is noised to the level at which its stretch began, as by the steps of training in between."""
    process, shape = make_process(1000, "list:0,20,60,120,200,300"), (2, 3, 64, 64)
    spy, samples, image = Spy(process), [], 0.5 * noise_like((2, 3, 64, 64), 9)
    mask = (th.arange(64) < 32).double().expand(1, 1, 64, 64)
    options = {"init_image": image, "mask": mask, "resample": 2, "jump": 2, "noise": noise_like(shape)}
    run(process, "ddim", spy, shape, callback=lambda t, output: samples.append((t, output["sample"])), **options)
    noises = []
    for last, back in ((1, 5), (5, 3), (9, 1)):  # after which call, and to which t
        t, sample = samples[last]
        assert (t, samples[last + 1][0]) == (back - 1, back)
        ratio = float(th.tensor(1 - process.betas[t : back + 1]).prod())
        noises.append((spy.seen[last + 1] - ratio**0.5 * sample) / (1 - ratio) ** 0.5)
        for part in (slice(0, 32), slice(32, 64)):
            noise = noises[-1][..., part]
            assert float(noise.mean()) == pytest.approx(0, abs=0.03)
            assert float(noise.square().mean()) == pytest.approx(1, abs=0.04)
            assert abs(float((noise * sample[..., part]).mean())) < 0.03
    assert abs(float((noises[0] * noises[1]).mean())) < 0.03


class Pair:
    """The perfect network for pairs of pixels N(0, std^2) that are correlated."""

    def __init__(self, process, correlation=0.9, std=0.5):
        self.process, self.correlation = process, correlation
        self.covariance = std**2 * th.tensor([[1.0, correlation], [correlation, 1.0]], dtype=th.float64)

    def __call__(self, x, timesteps):
        level = float(self.process.level(timesteps[:1].double()))
        alpha, variance = math.exp(level / 2), -math.expm1(level)
        noisy = alpha**2 * self.covariance + variance * th.eye(2, dtype=th.float64)
        gain = alpha * self.covariance @ th.linalg.inv(noisy)
        return (x - alpha * (x.flatten(1) @ gain.T).view_as(x)) / variance**0.5


@pytest.mark.parametrize("name", few(NAMES))
def test_resampling_makes_what_is_painted_agree_with_what_is_kept(name):
    """The kept pixel says where its neighbour is: at 0.9 of it, with a variance of 0.19 * 0.25."""
    grid = SAMPLERS[name].grid
    process, shape = make_process(1000, f"{grid}20", var="FIXED_SMALL"), (400, 1, 1, 2)
    image, mask = th.full((1, 1, 1, 2), 0.5).double(), th.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    means = []
    for resample in (1, 5):
        options = {"init_image": image, "mask": mask, "resample": resample, "jump": 2, "noise": noise_like(shape)}
        painted = run(process, name, Pair(process), shape, **options)[..., 1]
        means.append(float(painted.mean()))
        assert float(painted.var()) < 0.25
    assert 0 < means[0] < means[1] < 0.5
    assert 0.45 - means[1] < 0.7 * (0.45 - means[0])


STARTS = product(
    ["ddpm", "plms", "dpm2", "unipc", "sa"],
    ["10", "ddim10", "trailing10", "linspace10", "quad10", "logsnr10", "karras10", "list:0,10.5,500,999"],
)


@pytest.mark.parametrize(("name", "grid"), few(STARTS, lambda row: row[0] == "ddpm" or row[1] == "logsnr10"))
def test_strength_says_how_far_from_the_image_to_start(name, grid):
    """From the noisiest step that is not beyond this share of training, as skip_timesteps counts the steps."""
    process = make_process(1000, grid)
    for strength in (0.3, 0.5, 0.77, 1.0):
        taken = [tau for tau in process.timestep_map if tau <= strength * 999]
        spy, skip = Spy(process), process.num_timesteps - len(taken)
        out = run(process, name, spy, init_image=IMAGE, strength=strength)
        assert spy.asked[0] == pytest.approx(taken[-1])
        start = process.q_sample(IMAGE, th.tensor([len(taken) - 1] * 2), noise_like())
        assert th.equal(spy.seen[0], start)
        assert th.equal(out, run(process, name, init_image=IMAGE, skip_timesteps=skip))
        assert spy.calls == network_calls(process, make_sampler(name), strength=strength)


@pytest.mark.parametrize("name", NAMES)
def test_strength_0_returns_the_image_and_asks_nobody(name):
    process = make_process(respacing="10")
    spy = Spy(process)
    assert th.equal(run(process, name, spy, init_image=IMAGE, strength=0.0), IMAGE)
    assert spy.calls == 0 == network_calls(process, make_sampler(name), strength=0.0)


def test_strength_1_takes_all_steps():
    process = make_process(respacing="10")
    for options in ({"init_image": IMAGE}, {"init_image": IMAGE, "mask": LEFT}):
        assert th.equal(run(process, "ddpm", strength=1.0, **options), run(process, "ddpm", **options))


def test_start_is_x_at_the_first_step():
    process = make_process(respacing="10")
    for more, asked in (({}, 10), ({"skip_timesteps": 4}, 6), ({"strength": 0.5}, 5)):
        spy, x = Spy(process), noise_like(seed=6)
        run(process, "ddpm", spy, start=x, **more)
        assert th.equal(spy.seen[0], x)
        assert len(spy.asked) == asked
    one = run(process, "ddpm", start=x[:1])
    assert th.equal(one, run(process, "ddpm", start=x[:1].expand(SHAPE)))
    assert th.equal(run(process, "ddim", start=x), run(process, "ddim", noise=x))
    assert run(process, "ddpm", start=x.float()).dtype == th.float32
    assert th.equal(run(process, "ddpm", start=x, strength=0.0), x)


def test_start_goes_together_with_what_is_kept():
    process = make_process(respacing="10")
    spy, x = Spy(process), noise_like(seed=6)
    out = run(process, "ddpm", spy, start=x, init_image=IMAGE, mask=LEFT, strength=0.5)
    assert th.equal(spy.seen[0][..., 2:], x[..., 2:])
    assert not th.isclose(spy.seen[0][..., :2], x[..., :2]).any()
    assert th.equal(out[..., :2], IMAGE[..., :2])
    one = run(process, "ddpm", start=x, init_image=IMAGE[:1].float(), mask=LEFT)
    assert th.equal(one[1:, ..., :2], IMAGE[:1, ..., :2].float().double())


@pytest.mark.parametrize("skip", [0, 3, 9, 10])
def test_the_way_to_noise_ends_where_the_way_back_starts(skip):
    process = make_process(respacing="10")
    spy, seen = Spy(process), []
    steps = list(
        sample_loop(
            process, DDIMReverse(), spy, SHAPE, device="cpu", init_image=IMAGE, skip_timesteps=skip,
            callback=lambda t, _: seen.append(t), clip_denoised=False,
        )
    )  # fmt: skip
    assert seen == list(range(max(0, 9 - skip)))
    assert spy.asked == process.timestep_map[: max(0, 9 - skip)]
    assert spy.calls == network_calls(process, DDIMReverse(), skip_timesteps=skip)
    if not seen:
        assert th.equal(steps[-1]["sample"], IMAGE)
    else:
        assert th.equal(spy.seen[0], IMAGE)
        back = th.tensor([9 - skip] * 2)
        predict = process.predictor(GaussianData(process), clip_denoised=False)
        assert float(process.alpha_bar(back, IMAGE)[0]) == process.alphas_cumprod[9 - skip]
        ahead, _ = DDIM().step(process, predict, steps[-1]["sample"], back, None, lambda: th.zeros(()))
        assert (ahead["sample"] - (steps[-2]["sample"] if len(steps) > 1 else IMAGE)).abs().max() < 0.3


def test_the_way_to_noise_where_no_signal_is_left():
    process = make_process(respacing="trailing50", mean="VELOCITY", zero_terminal_snr=True)
    noise = run(process, DDIMReverse(), noise=None, init_image=IMAGE)
    assert th.isfinite(noise).all()
    assert (run(process, "ddim", start=noise) - IMAGE).abs().max() < 0.3


@pytest.mark.parametrize("name", few(NAMES))
def test_a_callback_sees_every_step_in_order(name):
    process = make_process(respacing="6")
    for more in ({}, {"skip_timesteps": 2}, {"mask": LEFT, "resample": 2, "jump": 4}):
        seen = []
        loop = process.sample_loop_progressive(
            make_sampler(name), GaussianData(process), SHAPE, device="cpu", init_image=IMAGE,
            callback=lambda t, output, seen=seen: seen.append((t, output)), **more,
        )  # fmt: skip
        for count, output in enumerate(loop, start=1):
            assert len(seen) == count  # before it is yielded, and none ahead
            assert seen[-1][1] is output
        expected = {0: plain_walk((5, 0, 1)), 1: plain_walk((3, 0, 1)), 3: plain_walk((5, 2, 2), (1, 0, 2))}[len(more)]
        assert [t for t, _ in seen] == expected


def test_a_callback_stops_the_run_by_raising():
    class Enough(Exception):
        pass

    def stop(t, output):
        if t == 4:
            raise Enough

    process = make_process(respacing="10")
    spy = Spy(process)
    with pytest.raises(Enough):
        run(process, "ddpm", spy, callback=stop)
    assert spy.asked == process.timestep_map[:3:-1]


RUNS = {
    "plain": {},
    "skip": {"init_image": IMAGE, "skip_timesteps": 3},
    "all but one": {"init_image": IMAGE, "skip_timesteps": 7},
    "none": {"init_image": IMAGE, "skip_timesteps": 8},
    "strength": {"init_image": IMAGE, "strength": 0.4},
    "resample": {"init_image": IMAGE, "mask": LEFT, "resample": 3, "jump": 3},
    "resample each": {"init_image": IMAGE, "mask": LEFT, "resample": 2, "jump": 1},
    "skip and resample": {"init_image": IMAGE, "mask": LEFT, "resample": 2, "jump": 4, "skip_timesteps": 2},
    "nothing kept": {"init_image": IMAGE, "mask": 0 * LEFT, "resample": 2, "jump": 4},
}


@pytest.mark.parametrize("name", few(NAMES))
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_network_calls_are_those_that_are_made(name, zero_terminal_snr):
    kind = {"mean": "VELOCITY", "zero_terminal_snr": True} if zero_terminal_snr else {}
    process = make_process(1000, "trailing8", **kind)
    for options in RUNS.values():
        data, sampler = GaussianData(process), make_sampler(name)
        out = run(process, sampler, data, **options)
        assert data.calls == network_calls(process, sampler, **options)
        assert th.isfinite(out).all()


@pytest.mark.parametrize(
    "sampler", [PLMS(1), PLMS(4), make_sampler("heun", churn=10.0), make_sampler("euler", churn=10.0)], ids=str
)
def test_network_calls_of_options(sampler):
    process = make_process(respacing="8")
    for options in RUNS.values():
        data = GaussianData(process)
        run(process, sampler, data, **options)
        assert data.calls == network_calls(process, sampler, **options)


@pytest.mark.parametrize(("name", "sampler"), [("p", Ancestral()), ("ddim", DDIM()), ("plms", PLMS(2))])
def test_the_loops_by_name_take_every_option(name, sampler):
    process, surface = make_process(respacing="6"), f"{name}_sample_loop"
    options = {"init_image": IMAGE, "noise": noise_like(), "strength": 0.8, "mask": LEFT, "resample": 2, "jump": 3}
    seen = []
    options |= {"device": "cpu", "callback": lambda t, _: seen.append(t)}
    images = []
    for call in (
        lambda **more: process.sample_loop(sampler, GaussianData(process), SHAPE, **more),
        lambda **more: getattr(process, surface)(GaussianData(process), SHAPE, **more),
        lambda **more: list(getattr(process, f"{surface}_progressive")(GaussianData(process), SHAPE, **more))[-1][
            "sample"
        ],
    ):
        images.append(call(generator=generators(1, 2), **options))
    assert th.equal(images[0], images[1])
    assert th.equal(images[0], images[2])
    assert seen == plain_walk((4, 2, 2), (1, 0, 2)) * 3
    start = getattr(process, surface)(
        GaussianData(process), SHAPE, start=noise_like(), device="cpu", generator=generators(1, 2)
    )
    same = process.sample_loop(
        sampler, GaussianData(process), SHAPE, noise=noise_like(), device="cpu", generator=generators(1, 2)
    )
    assert th.equal(start, same)


@pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop", "plms_sample_loop"])
def test_an_option_that_there_is_not_is_refused(name):
    process = make_process(respacing="6")
    with pytest.raises(TypeError, match="strenght is no option of sampling; did you mean strength"):
        getattr(process, name)(GaussianData(process), SHAPE, device="cpu", init_image=IMAGE, strenght=0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"init_image": IMAGE, "strength": 1.5}, "strength 1.5 is not in 0 .. 1: 0 returns the image"),
        ({"init_image": IMAGE, "strength": -0.1}, "strength -0.1 is not in 0 .. 1"),
        ({"init_image": IMAGE, "strength": math.nan}, "strength nan is not in 0 .. 1"),
        ({"init_image": IMAGE, "strength": 0.5, "skip_timesteps": 2}, "strength and skip_timesteps both say where"),
        ({"strength": 0.5}, "strength has no effect without an init_image: give both or none"),
        ({"mask": LEFT}, "mask has no effect without an init_image: give both or none"),
        ({"init_image": IMAGE, "mask": LEFT[..., :3]}, r"mask of shape \(1, 1, 4, 3\) does not fit the samples"),
        ({"init_image": IMAGE, "mask": LEFT.expand(3, 1, 4, 4)}, r"mask of shape \(3, 1, 4, 4\) does not fit"),
        ({"init_image": IMAGE, "mask": 255 * LEFT}, "mask has values outside of 0 .. 1: 1 keeps the image, 0 paints"),
        ({"init_image": IMAGE, "mask": -LEFT}, "mask has values outside of 0 .. 1"),
        ({"init_image": IMAGE, "mask": LEFT / 0}, "mask has values outside of 0 .. 1"),
        ({"init_image": IMAGE[..., :2], "mask": LEFT}, r"init_image of shape \(2, 3, 4, 2\) does not fit the samples"),
        ({"init_image": IMAGE, "resample": 2}, "resample 2 has no effect without a mask: leave it out"),
        ({"init_image": IMAGE, "jump": 3}, "jump 3 has no effect without a mask: leave it out"),
        ({"clip_guided": True}, "clip_guided has no effect without clip_denoised or denoised_fn"),
        ({"init_image": IMAGE, "mask": LEFT, "resample": 0}, "resample 0 and jump 10 must be 1 or more"),
        ({"init_image": IMAGE, "mask": LEFT, "resample": 2, "jump": 0}, "resample 2 and jump 0 must be 1 or more"),
        ({"start": IMAGE, "noise": IMAGE}, "start and noise both say where x is at the first step"),
        ({"start": IMAGE, "init_image": IMAGE}, "init_image has no effect beside start: leave one of"),
        ({"start": IMAGE[..., :2]}, r"start of shape \(2, 3, 4, 2\) does not fit the samples, \(2, 3, 4, 4\)"),
        ({"start": IMAGE, "mask": LEFT}, "mask has no effect without an init_image"),
        ({"generator": generators(1, 2, 3)}, "3 generators for 2 images: give one, or one per image"),
        ({"generator": generators(1), "init_image": IMAGE, "mask": LEFT}, "1 generators for 2 images"),
        ({"init_image": IMAGE, "skip_timesteps": 7}, "skip_timesteps 7 is not in 0 .. 6"),
        ({"skip_timesteps": -1}, "skip_timesteps -1 is not in 0 .. 6"),
    ],
)  # fmt: skip
def test_options_that_cannot_take_effect_are_refused(options, sentence):
    process = make_process(respacing="6")
    data = GaussianData(process)
    with pytest.raises(ValueError, match=sentence):
        run(process, "ddpm", data, **options)
    assert data.calls == 0


@pytest.mark.parametrize(
    "options", [{}, {"init_image": IMAGE, "mask": LEFT}, {"init_image": IMAGE, "noise": IMAGE}, {"start": IMAGE}]
)
def test_the_way_to_noise_needs_an_image_and_nothing_else(options):
    process = make_process(respacing="6")
    with pytest.raises(ValueError, match="ddim_reverse needs init_image, and no mask or noise"):
        process.sample_loop(DDIMReverse(), GaussianData(process), SHAPE, device="cpu", **options)


@pytest.mark.parametrize("name", ["unipc", "sa"])
def test_corrections_keep_what_a_soft_mask_did(name):
    """A solver that takes a step again must not undo what was pasted over its end."""
    process = make_process(1000, "logsnr50")
    data, noise = GaussianData(process), th.randn(64, 1, 4, 4, dtype=th.float64)
    options = {"init_image": th.full((1, 1, 4, 4), 0.8), "mask": th.full((1, 1, 4, 4), 0.1), "device": "cpu"}
    found = []
    for sampler in (make_sampler(name), make_sampler("dpm++2m" if name == "unipc" else "dpm++2m_sde")):
        generator = th.Generator().manual_seed(3)
        out = process.sample_loop(
            sampler, data, noise.shape, noise=noise, clip_denoised=False, generator=generator, **options
        )
        found.append(float(out.mean()))
    assert found[0] == pytest.approx(found[1], abs=0.01)
