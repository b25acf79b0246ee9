"""What a step draws by key: here, which labels become "no class"."""

import math

import numpy as np
import pytest
import torch as th

from guided_diffusion.draws import LabelDropout, draw_for_training
from guided_diffusion.resample import UniformSampler

MANY = 100_000


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
    class Process:
        num_timesteps = 1000

    t = draw_for_training(th.zeros(MANY, 1), UniformSampler(Process()), 1, 2, th.device("cpu")).t
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
