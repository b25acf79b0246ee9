"""What a step draws by key: noise of a rank's own images, the same for any number of ranks, and labels to drop."""

import math
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from guided_diffusion.resample import UniformSampler
from guided_diffusion.training.noise import LabelDropout, draw_for_training, draw_for_validation

MANY = 100_000
CPU = th.device("cpu")


class Process:
    num_timesteps = 1000


@contextmanager
def rank_of(rank, world_size):
    """This process as one of many, whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Drawn(TorchFunctionMode):
    """How many normal numbers are drawn, and the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, th.Tensor):
            self.found["largest"] = max(self.found["largest"], result.numel())
            self.found["normal"] += result.numel() * (function.__name__ in ("normal_", "randn"))
        return result


def training(count):
    return draw_for_training(th.zeros(count, 3, 4, 4, dtype=th.uint8), UniformSampler(Process()), 1, 7, CPU)


def validation(count):
    return draw_for_validation(th.zeros(count, 3, 4, 4), 1000, 1, 7, CPU)


@pytest.mark.parametrize("draw", [training, validation])
def test_the_ranks_draw_together_what_one_process_draws(draw):
    whole = draw(8)
    for size in (2, 4, 8):
        parts = []
        for rank in range(size):
            with rank_of(rank, size):
                parts.append(draw(8 // size))
        for own, values in zip(whole, zip(*parts, strict=True), strict=True):
            assert th.equal(own, th.cat(values))


@pytest.mark.parametrize("draw", [training, validation])
def test_a_rank_draws_the_noise_of_its_own_images_alone(draw):
    for size in (1, 64):
        with rank_of(size - 1, size), Drawn() as drawn:
            draw(2)
        assert drawn.found["normal"] == 2 * 48
        assert drawn.found["largest"] <= 2 * 64  # the t of all


def test_the_noise_of_images_and_steps_is_independent():
    sampler, batch = UniformSampler(Process()), th.zeros(2, 1, 100, 100)
    keys = [(0, 0), (0, 1), (1, 0), (0, 1 << 20)]
    noise = [draw_for_training(batch, sampler, *key, CPU).noise for key in keys]
    rows = th.cat([*noise, draw_for_validation(batch, 1000, 0, 0, CPU).noise]).flatten(1)
    assert abs(rows.mean(1)).max() < 5 / 100
    assert abs(rows.std(1) - 1).max() < 5 / 100
    assert abs(th.corrcoef(rows).fill_diagonal_(0)).max() < 5 / 100


def dropped(rate: float, seed: int = 0, index: int = 0, count: int = MANY) -> th.Tensor:
    """Which of so many labels a step drops."""
    return LabelDropout(rate, 7)({"y": th.zeros(count, dtype=th.int64)}, seed, index)["y"] == 7


def correlation(one: th.Tensor, other: th.Tensor) -> float:
    return float(np.corrcoef(one.numpy(), other.numpy())[0, 1])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_labels_are_dropped_at_the_rate_that_was_asked_for(rate: float) -> None:
    sigma = math.sqrt(rate * (1 - rate) / MANY)
    assert abs(dropped(rate).double().mean() - rate) < 4 * sigma


def test_the_ends_of_the_range_are_exact() -> None:
    cond = {"y": th.tensor([3, 1, 2])}
    assert LabelDropout(0.0, None)(cond, 0, 0) is cond
    assert LabelDropout(0.0, 7)(cond, 0, 0) is cond
    assert dropped(1.0).all()


def test_labels_that_stay_are_untouched_and_so_is_the_batch() -> None:
    labels, images = th.arange(1000) % 7, th.randn(2)
    kept = labels.clone()
    out = LabelDropout(0.4, 7)({"y": labels, "low_res": images}, 0, 0)
    assert th.equal(labels, kept)
    assert out["low_res"] is images
    assert th.equal(out["y"], th.where(dropped(0.4, count=1000), 7, labels))
    assert out["y"].dtype == th.int64


def test_the_key_decides_and_other_keys_are_independent() -> None:
    mask = dropped(0.5, 1, 2)
    assert th.equal(mask, dropped(0.5, 1, 2))
    th.randn(3), np.random.rand(3)
    assert th.equal(mask, dropped(0.5, 1, 2))
    for seed, index in ((1, 3), (2, 2), (2, 1), (1 + (1 << 32), 2)):
        assert abs(correlation(mask, dropped(0.5, seed, index))) < 4 / math.sqrt(MANY)


def test_labels_are_dropped_whatever_the_timestep() -> None:
    t = draw_for_training(th.zeros(MANY, 1), UniformSampler(Process()), 1, 2, CPU).t
    assert abs(correlation(dropped(0.5, 1, 2), t)) < 4 / math.sqrt(MANY)


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan])
def test_rates_are_probabilities(rate: float) -> None:
    with pytest.raises(ValueError, match=f"class_dropout {rate} is no probability: give 0 for none, or a number"):
        LabelDropout(rate, 7)


def test_there_must_be_labels_and_a_label_for_none() -> None:
    with pytest.raises(ValueError, match=r"class_dropout 0\.1 needs a network that knows 'no class'"):
        LabelDropout(0.1, None)
    with pytest.raises(ValueError, match=r"class_dropout 0\.1 drops labels and the data have none"):
        LabelDropout(0.1, 7)({}, 0, 0)
