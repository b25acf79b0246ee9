"""Research code replaces methods and arrays of the process: what it put there is what runs, as in the originals."""

from __future__ import annotations

import runpy
import sys
import types
import warnings
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch as th
from few import few
from oracle import GaussianData, make_process

from guided_diffusion.diffusion.forward_process import DERIVED
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion, _WrappedModel, respaced, space_timesteps
from guided_diffusion.sampling.guidance import ThroughDenoiser
from guided_diffusion.sampling.samplers import SAMPLERS, make_sampler

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (2, 3, 4, 4)
IMAGES = th.linspace(-1, 1, 96).view(SHAPE)
LABELS = {"y": th.tensor([1, 2])}


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """What tests/golden/overrides_probe.py finds here."""
    path = tmp_path_factory.mktemp("overrides") / "ours.npz"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["overrides_probe.py", str(path)])
        patch.setattr(np, "int", int, raising=False)  # which the probe would leave behind
        runpy.run_path(str(GOLDEN / "overrides_probe.py"))
    with np.load(path) as found:
        return dict(found)


@pytest.mark.parametrize(
    ("section", "count"), [("arrays", 2), ("instance", 18), ("subclass", 6), ("uninitialised", 1), ("wrapped", 4)]
)
def test_overrides_do_what_they_do_in_the_originals(probed, section, count):
    with np.load(GOLDEN / "overrides.npz") as recorded:
        expected = {name: recorded[name] for name in recorded.files if name.split("/")[0] == section}
    assert len(expected) == count
    for name, value in expected.items():
        assert np.abs(probed[name] - value).max() <= 1e-4 * max(1e-6, np.abs(value).max()), name


class Network(th.nn.Module):
    """A network that remembers what it was fed."""

    def __init__(self, channels=3):
        super().__init__()
        self.weight, self.channels, self.seen = th.nn.Parameter(th.ones(1)), channels, []

    def forward(self, x, timesteps, y=None):
        self.seen.append(timesteps.tolist())
        shift = timesteps.float().view(-1, 1, 1, 1) / 300 + (0 if y is None else y.view(-1, 1, 1, 1) / 10)
        out = th.tanh(x * 0.8 * self.weight + shift)
        return out if self.channels == 3 else th.cat([out, out * 0.3 - 0.5], dim=1)


def cond_fn(x, timesteps, y=None):
    return 0.1 * th.sin(x) + timesteps.float().view(-1, 1, 1, 1) / 1e3


def through(x, t, out, y=None):
    return th.autograd.grad((out["pred_xstart"] ** 2).sum() * -0.05, x)[0]


def make(cls=SpacedDiffusion, *, steps=60, grid="6", mean="EPSILON", var="FIXED_LARGE", loss="MSE", rescale=False):
    given = {
        "betas": get_named_beta_schedule("linear", steps),
        "model_mean_type": ModelMeanType[mean],
        "model_var_type": ModelVarType[var],
        "loss_type": LossType[loss],
        "rescale_timesteps": rescale,
    }
    return cls(**given) if grid is None else cls(use_timesteps=space_timesteps(steps, grid), **given)


PROCESSES = {
    "eps": {},
    "held apart": {"grid": "ddim12", "mean": "START_X"},
    "learned range": {"var": "LEARNED_RANGE", "rescale": True, "loss": "RESCALED_MSE"},
    "learned, bound": {"var": "LEARNED", "loss": "RESCALED_KL"},
    "mean": {"mean": "PREVIOUS_X", "var": "FIXED_SMALL", "grid": "3,4", "loss": "KL"},
}
NETWORKS = {name: 6 if "LEARNED" in given.get("var", "") else 3 for name, given in PROCESSES.items()}


def sampled(process, kind, channels=3, **options):
    """Samples of a loop and what the network was fed on the way."""
    th.manual_seed(0)
    network = Network(channels)
    loop = getattr(process, f"{kind}_sample_loop")
    return loop(network, SHAPE, device="cpu", **{"model_kwargs": dict(LABELS), **options}), th.tensor(network.seen)


def losses(process, channels=3):
    network, t = Network(channels), th.tensor([0, process.num_timesteps - 1])
    out = process.training_losses(network, IMAGES, t, model_kwargs=LABELS, noise=IMAGES.flip(0))
    return *(value for _, value in sorted(out.items())), th.tensor(network.seen)


def bound(process, channels=3):
    th.manual_seed(0)
    out = process.calc_bpd_loop(Network(channels), IMAGES, model_kwargs=LABELS)
    return tuple(value for _, value in sorted(out.items()))


def reversed_step(process, channels=3):
    return (process.ddim_reverse_sample(Network(channels), IMAGES, th.tensor([0, 2]), model_kwargs=LABELS)["sample"],)


WAYS = {
    "p": lambda process, channels=3: sampled(process, "p", channels),
    "p guided": lambda process, channels=3: sampled(process, "p", channels, cond_fn=cond_fn),
    "p through": lambda process, channels=3: sampled(process, "p", channels, cond_fn=through, cond_fn_with_grad=True),
    "p from image": lambda process, channels=3: sampled(process, "p", channels, init_image=IMAGES, skip_timesteps=2),
    "ddim": lambda process, channels=3: sampled(process, "ddim", channels, eta=0.4),
    "ddim guided": lambda process, channels=3: sampled(process, "ddim", channels, cond_fn=cond_fn),
    "ddim through": lambda process, channels=3: sampled(
        process, "ddim", channels, cond_fn=through, cond_fn_with_grad=True
    ),
    "plms guided": lambda process, channels=3: sampled(process, "plms", channels, cond_fn=cond_fn),
    "plms 3": lambda process, channels=3: sampled(process, "plms", channels, order=3),
    "reverse": reversed_step,
    "forward": lambda process, channels=3: process.q_mean_variance(IMAGES, th.tensor([0, 2])),
    "losses": losses,
    "bound": bound,
}


def same(one, other):
    return all(th.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(one, other, strict=True))


# how often each way calls a method, where that is not 0; T is 6
CALLS = {
    "p_sample": {"p": 6, "p guided": 6, "p from image": 4},
    "p_sample_with_grad": {"p through": 6},
    "ddim_sample": {"ddim": 6, "ddim guided": 6},
    "ddim_sample_with_grad": {"ddim through": 6},
    "plms_sample": {"plms guided": 6, "plms 3": 6},
    "ddim_reverse_sample": {"reverse": 1},
    "p_sample_loop_progressive": {"p": 1, "p guided": 1, "p through": 1, "p from image": 1},
    "ddim_sample_loop_progressive": {"ddim": 1, "ddim guided": 1, "ddim through": 1},
    "plms_sample_loop_progressive": {"plms guided": 1, "plms 3": 1},
    "condition_mean": {"p guided": 6},
    "condition_mean_with_grad": {"p through": 6},
    "condition_score": {"ddim guided": 6, "plms guided": 7},
    "condition_score_with_grad": {"ddim through": 6},
    "p_mean_variance": {
        **{name: 6 for name in WAYS if name not in ("losses", "forward")},
        "p from image": 4,
        "plms guided": 7,
        "plms 3": 7,
        "reverse": 1,
    },
    "training_losses": {"losses": 1},
    "_vb_terms_bpd": {"bound": 6},
    "_prior_bpd": {"bound": 1},
    "q_mean_variance": {"forward": 1, "bound": 1},
    "q_sample": {"p from image": 1, "losses": 1, "bound": 6},
}
# the others: in which ways they run at all
CALLED = {
    "q_posterior_mean_variance": set(WAYS) - {"losses", "forward"},
    "_predict_xstart_from_eps": set(WAYS) - {"losses", "forward"},
    "_predict_eps_from_xstart": {"ddim", "ddim guided", "ddim through", "plms guided", "plms 3", "reverse", "bound"},
    "_scale_timesteps": set(WAYS) - {"forward"},
    "_wrap_model": set(WAYS) - {"forward"},
}


def shrunk(value):
    """The result of a method, with every real number in it changed."""
    if isinstance(value, th.Tensor):
        return value * 0.9 if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: shrunk(part) for name, part in value.items()}
    return tuple(map(shrunk, value)) if isinstance(value, tuple) else value


def replaced(how, name, calls, monkeypatch, change=shrunk, **given):
    """A process with a method replaced by itself, counted and changed."""

    def count(real, *args, **kwargs):
        calls[name] += 1
        return change(real(*args, **kwargs))

    if how == "instance":
        process = make(**given)
        real = getattr(process, name)
        setattr(process, name, lambda *args, **kwargs: count(real, *args, **kwargs))
        return process
    if how == "bound":
        process = make(**given)
        real = getattr(SpacedDiffusion, name)
        setattr(process, name, types.MethodType(lambda *args, **kwargs: count(real, *args, **kwargs), process))
        return process
    if how == "subclass":

        def method(self, *args, **kwargs):
            return count(getattr(SpacedDiffusion, name), self, *args, **kwargs)

        return make(type("Mine", (SpacedDiffusion,), {name: method}), **given)
    kind = SpacedDiffusion if how == "class" else GaussianDiffusion
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args, **kwargs: count(original, *args, **kwargs))
    return make(**given)


@pytest.mark.parametrize("name", [*CALLS, *CALLED])
def test_a_replaced_method_runs_as_often_as_in_the_originals(name, monkeypatch):
    calls, times = Counter(), {}
    process = replaced("instance", name, calls, monkeypatch, change=lambda value: value)
    for way, run in WAYS.items():
        calls.clear()
        run(process)
        times |= {way: calls[name]} if calls[name] else {}
    if name in CALLS:
        assert times == CALLS[name]
    else:
        assert set(times) == CALLED[name]


# a way to see a change in what a method returns
SEEN = {
    **{name: next(iter(times)) for name, times in CALLS.items() if not name.endswith("progressive")},
    "q_posterior_mean_variance": "p",
    "_predict_xstart_from_eps": "p",
    "_predict_eps_from_xstart": "ddim",
}


STANDING = product(SEEN, ("bound", "subclass", "class", "base class"))
SHOWN = ("p_mean_variance", "condition_score", "_predict_xstart_from_eps")


@pytest.mark.parametrize(("name", "how"), few(STANDING, lambda row: row[1] == "subclass" or row[0] in SHOWN))
def test_what_a_replacement_returns_counts_wherever_it_stands(name, how, monkeypatch):
    run = WAYS[SEEN[name]]
    plain, expected = run(make()), run(replaced("instance", name, Counter(), monkeypatch))
    assert not same(plain, expected)
    assert same(run(replaced(how, name, Counter(), monkeypatch)), expected)


@pytest.mark.parametrize("name", ["p_mean_variance", "condition_score", "_predict_eps_from_xstart"])
@pytest.mark.parametrize("sampler", few(sorted(set(SAMPLERS) - {"ddpm", "ddim_reverse"})))
def test_every_sampler_goes_through_what_was_replaced(sampler, name, monkeypatch):
    calls = Counter()
    process = replaced("subclass", name, calls, monkeypatch, change=lambda value: value)
    options = {"device": "cpu", "cond_fn": cond_fn, "model_kwargs": LABELS}
    process.sample_loop(make_sampler(sampler), Network(), SHAPE, **options)
    assert calls[name] >= 6


class Upstream(SpacedDiffusion):
    """Steps and loops with the parameters that upstream's have, and no others."""

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        return {"sample": out["mean"] * 0.5}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        return {"sample": x * 0.5 + eta}

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
    ):
        yield from super().p_sample_loop_progressive(model, shape, noise, clip_denoised, device=device)


def test_a_replacement_need_not_know_our_keywords():
    process, options = make(Upstream), {"noise": th.ones(SHAPE), "device": "cpu"}
    x, network = th.ones(SHAPE), Network()
    for index in reversed(range(6)):
        x = process.p_mean_variance(network, x, th.full((2,), index))["mean"] * 0.5
    by_name = process.p_sample_loop(network, SHAPE, **options), process.ddim_sample_loop(network, SHAPE, **options)
    by_sampler = [process.sample_loop(make_sampler(name), network, SHAPE, **options) for name in ("ddpm", "ddim")]
    for image, other, expected in zip(by_name, by_sampler, (x, th.full(SHAPE, 0.5**6)), strict=True):
        assert th.allclose(image, expected)
        assert th.equal(image, other)
    assert th.equal(process.ddim_sample_loop(network, SHAPE, eta=1.0, **options), th.full(SHAPE, 2 - 0.5**6))


def test_a_replaced_step_gets_the_noise_of_generators_where_there_are_some():
    class Mine(SpacedDiffusion):
        def p_sample(self, *args, **kwargs):
            self.given = set(kwargs)
            return super().p_sample(*args, **kwargs)

    mine, generators = make(Mine), [th.Generator().manual_seed(seed) for seed in (3, 4)]
    sampled(mine, "p")
    assert mine.given == {"clip_denoised", "denoised_fn", "cond_fn", "model_kwargs"}
    image, _ = sampled(mine, "p", generator=generators)
    assert mine.given == {"clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "draw"}
    again = [th.Generator().manual_seed(seed) for seed in (3, 4)]
    assert th.equal(image, sampled(make(), "p", generator=again)[0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'draw'"):
        make(Upstream).ddim_sample_loop(Network(), SHAPE, device="cpu", generator=th.Generator())


def test_a_replaced_prediction_may_say_less_or_more():
    """DDIM asks for x_0 alone, and what else is there stays out of its way."""

    class Less(SpacedDiffusion):
        def p_mean_variance(self, *args, **kwargs):
            return {
                "pred_xstart": super().p_mean_variance(*args, **kwargs)["pred_xstart"],
                "note": "mine",
                "none": None,
            }

    for options in ({}, {"cond_fn": through, "cond_fn_with_grad": True}):
        assert th.allclose(sampled(make(Less), "ddim", **options)[0], sampled(make(), "ddim", **options)[0])


def test_a_step_that_is_replaced_on_the_way_runs_from_then_on():
    process, network = make(), Network()
    for number, output in enumerate(process.ddim_sample_loop_progressive(network, SHAPE, device="cpu")):
        if number == 2:
            assert output["sample"].any()
            process.ddim_sample = lambda model, x, t, **kwargs: {"sample": th.zeros_like(x)}
    assert not output["sample"].any()


def test_a_network_keyword_may_change_between_steps():
    seen, kwargs = [], {"y": th.tensor([1, 2])}

    def network(x, timesteps, y):
        seen.append(y.tolist())
        return x

    for _ in make().p_sample_loop_progressive(network, SHAPE, device="cpu", model_kwargs=kwargs):
        kwargs["y"] = kwargs["y"] + 1
    assert seen == [[1 + step, 2 + step] for step in range(6)]


@pytest.mark.parametrize("with_grad", [False, True])
def test_a_guide_through_the_denoiser_is_told_what_a_replaced_scaling_feeds(with_grad):
    class Shifted(SpacedDiffusion):
        def _scale_timesteps(self, t):
            return (t - 1).clamp(min=0)

    process, fed, network = make(Shifted), [], Network()

    def guide(x, t, out, **kwargs):
        fed.append(out["timesteps"].tolist())
        return through(x, t, out)

    given = guide if with_grad else ThroughDenoiser(guide)
    process.ddim_sample_loop(network, SHAPE, device="cpu", cond_fn=given, cond_fn_with_grad=with_grad)
    assert fed == network.seen == [[t, t] for t in (47, 35, 24, 12, 0, 0)]


@pytest.mark.parametrize("rescale", [False, True])
def test_a_network_wrapped_by_hand_is_mapped_once(rescale):
    process = make(rescale=rescale)
    fed = [float(step) * (1000 / 60 if rescale else 1) for step in process.timestep_map]
    given = process.timestep_map, process.rescale_timesteps, process.original_num_steps
    for wrap in (lambda model: model, process._wrap_model, lambda model: _WrappedModel(model, *given)):
        network, guide = Network(), Network()
        process.p_sample_loop(wrap(network), SHAPE, device="cpu", model_kwargs={}, cond_fn=wrap(guide))
        assert [row[0] for row in network.seen] == pytest.approx(fed[::-1])
        assert guide.seen == network.seen
        network.seen.clear()
        process.training_losses(wrap(network), IMAGES, th.tensor([1, 5]))
        assert network.seen[0] == pytest.approx([fed[1], fed[5]])
    assert process._wrap_model(process._wrap_model(network)).model is network
    t = th.tensor([1, 5])
    assert process._scale_timesteps(t) is t


def test_a_plain_process_scales_and_wraps_nothing():
    process, network, t = make(GaussianDiffusion, grid=None, rescale=True), Network(), th.tensor([3, 30])
    assert th.allclose(process._scale_timesteps(t), th.tensor([50.0, 500.0]))
    assert process._wrap_model(network) is network
    process._scale_timesteps = lambda t: t + 7
    process.p_sample(network, IMAGES, t, cond_fn=lambda x, timesteps: network(x, timesteps), model_kwargs={})
    process.training_losses(network, IMAGES, t)
    assert network.seen == [[10, 37]] * 3
    process.num_timesteps = 30
    assert make(GaussianDiffusion, grid=None, rescale=True, steps=40)._scale_timesteps(t).tolist() == [75.0, 750.0]


class Copied(GaussianDiffusion):
    """A spaced process as projects keep it in a file of their own, on top of the library's base class."""

    def __init__(self, use_timesteps, **kwargs):
        self.use_timesteps, self.original_num_steps = set(use_timesteps), len(kwargs["betas"])
        self.timestep_map = sorted(self.use_timesteps)
        levels = np.append(1.0, GaussianDiffusion(**kwargs).alphas_cumprod[self.timestep_map])
        super().__init__(**{**kwargs, "betas": 1 - levels[1:] / levels[:-1]})

    class Mapped:
        def __init__(self, function, process):
            self.function, self.process = function, process

        def __call__(self, x, index, **kwargs):
            steps = th.tensor(self.process.timestep_map)[index]
            scale = 1000.0 / self.process.original_num_steps
            return self.function(x, steps.float() * scale if self.process.rescale_timesteps else steps, **kwargs)

    def _wrap_model(self, function):
        return function if isinstance(function, Copied.Mapped) else Copied.Mapped(function, self)

    def _scale_timesteps(self, t):
        return t

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)


@pytest.mark.parametrize("name", few(PROCESSES, ["held apart", "learned range"]))
def test_a_spaced_process_of_ones_own_is_as_ours(name):
    own, ours, channels = make(Copied, **PROCESSES[name]), make(**PROCESSES[name]), NETWORKS[name]
    for way, run in WAYS.items():
        pairs = zip(run(own, channels), run(ours, channels), strict=True)
        assert all(th.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs), way
    for sampler in ("dpm++2m", "euler", "unipc"):
        images = [
            process.sample_loop(make_sampler(sampler), Network(channels), SHAPE, noise=IMAGES, device="cpu")
            for process in (own, ours)
        ]
        assert th.allclose(*images, rtol=1e-5, atol=1e-6), sampler
    assert respaced(own, "3").timestep_map == respaced(ours, "3").timestep_map


ARRAYS = [name for name, value in vars(make()).items() if isinstance(value, np.ndarray)]
ARRAYS.remove("original_alphas_cumprod")
NAMES = [*ARRAYS, "num_timesteps", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps"]
SPACED = ["timestep_map", "use_timesteps", "original_num_steps"]


def everything(process, channels):
    """Results that depend on all arrays."""
    ways = ("p guided", "ddim guided", "plms guided", "reverse", "forward", "losses", "bound")
    options = {"noise": IMAGES, "device": "cpu", "cond_fn": cond_fn, "model_kwargs": LABELS}
    new = process.sample_loop(make_sampler("dpm++2m"), Network(channels), SHAPE, **options)
    return new, *(value for way in ways for value in WAYS[way](process, channels))


@pytest.mark.parametrize("name", few(ARRAYS, ARRAYS[::4]))
def test_arrays_count_as_they_are_at_the_moment(name):
    """Assigned or changed in place after use, as if the process had never had others."""
    differs = False
    for given, channels in (({}, 3), ({"var": "LEARNED_RANGE", "loss": "RESCALED_MSE"}, 6)):
        fresh, used, changed = (make(grid="3", **given) for _ in range(3))
        setattr(fresh, name, getattr(fresh, name) * 0.97)
        expected, before = everything(fresh, channels), everything(used, channels)
        assert same(everything(changed, channels), before)
        setattr(used, name, getattr(used, name) * 0.97)
        getattr(changed, name)[:] *= 0.97
        assert same(everything(used, channels), expected)
        assert same(everything(changed, channels), expected)
        differs = differs or not same(before, expected)
    assert differs


def test_the_map_counts_as_it_is_at_the_moment():
    process, network = make(), Network()

    def fed():
        network.seen.clear()
        process.ddim_sample_loop(network, SHAPE, device="cpu")
        return [row[0] for row in network.seen]

    assert fed() == [59, 47, 35, 24, 12, 0]
    process.timestep_map[0] = 5
    assert fed() == [59, 47, 35, 24, 12, 5]
    process.timestep_map = [1, 2, 3, 4, 5, 6]
    assert fed() == [6, 5, 4, 3, 2, 1]
    process.num_timesteps = 3
    assert fed() == [3, 2, 1]
    process.rescale_timesteps, process.original_num_steps = True, 500
    assert fed() == [6, 4, 2]


@pytest.mark.parametrize("base", [GaussianDiffusion, SpacedDiffusion])
@pytest.mark.parametrize("name", ["eps", "learned range"])
def test_a_process_may_set_the_public_arrays_and_nothing_else(name, base):
    class Bare(base):
        def __init__(self, other):
            names = [*NAMES, *(SPACED if base is SpacedDiffusion else [])]
            vars(self).update({name: getattr(other, name) for name in names})

    given = {**PROCESSES[name], **({"grid": None, "steps": 25} if base is GaussianDiffusion else {})}
    other, channels = make(base, **given), NETWORKS[name]
    assert same(everything(Bare(other), channels), everything(other, channels))


def test_levels_between_steps_follow_arrays_that_were_assigned():
    process, other = make(), make_process(60, "6", name="cosine")
    for name in ARRAYS:
        setattr(process, name, getattr(other, name))
    steps = th.tensor(process.timestep_map, dtype=th.float64)
    assert np.allclose(process.level(steps).exp(), other.alphas_cumprod)
    image = process.sample_loop(make_sampler("dpm2"), GaussianData(process), SHAPE, noise=IMAGES, device="cpu")
    assert image.isfinite().all()


@pytest.mark.parametrize("name", ["sqrt_alphas_cumprod", *DERIVED])
def test_tables_are_kept_for_a_loop_and_while_arrays_are_the_same(name):
    process, given = make(), (name, th.device("cpu"), th.float32)
    assert process._table(*given) is not process._table(*given)
    with process.tables_kept({}):
        table = process._table(*given)
        assert process._table(*given) is table
        for array in ARRAYS:
            setattr(process, array, getattr(process, array) * 0.9)
        assert not th.equal(process._table(*given), table)
    assert process._tables is None


def test_a_loop_follows_what_is_assigned_on_the_way():
    process, network = make(), Network()
    for number, _ in enumerate(process.p_sample_loop_progressive(network, SHAPE, device="cpu")):
        if number == 2:
            process.timestep_map = [7] * 6
    assert [row[0] for row in network.seen] == [59, 47, 35, 7, 7, 7]


def test_another_grid_keeps_the_class_and_what_it_holds():
    class Mine(SpacedDiffusion):
        def p_mean_variance(self, *args, **kwargs):
            return {**super().p_mean_variance(*args, **kwargs), "pred_xstart": self.image}

    process = make(Mine)
    process.image = IMAGES
    process.p_sample = None
    other = respaced(process, "3")
    assert (type(other), other.timestep_map) == (Mine, [0, 30, 59])
    assert th.allclose(sampled(other, "ddim")[0], IMAGES)
    assert callable(other.p_sample)
    assert process.timestep_map == [0, 12, 24, 35, 47, 59]
