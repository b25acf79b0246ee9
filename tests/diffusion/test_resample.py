"""Distributions over timesteps: unbiased, and following the losses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th

from guided_diffusion.resample import (
    LossAwareSampler,
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from guided_diffusion.training.noise import draw_for_training

PROCESS = SimpleNamespace(num_timesteps=6)


def warm(history=3):
    sampler = LossSecondMomentResampler(PROCESS, history_per_term=history)
    sampler.update_with_all_losses(list(range(6)) * history, [float(t + 1) for t in range(6)] * history)
    return sampler


def test_uniform_weights_are_one():
    t, weights = UniformSampler(PROCESS).sample(1000, "cpu")
    assert t.dtype == th.int64
    assert set(t.tolist()) == set(range(6))
    assert th.equal(weights, th.ones(1000))


def test_importance_weights_make_the_mean_loss_unbiased():
    sampler = warm()
    p = sampler.weights() / sampler.weights().sum()
    t, weights = sampler.sample(200_000, "cpu", rng=np.random.default_rng(0))
    counts = np.bincount(t.numpy(), minlength=6) / len(t)
    assert np.allclose(counts, p, atol=0.01)
    assert np.allclose([float((t == i).float().mean() * weights[t == i].mean()) for i in range(6)], 1 / 6, atol=0.01)


def test_weights_are_root_mean_squares_of_the_last_losses():
    sampler = warm(history=3)
    expected = np.arange(1, 7) / 21 * 0.999 + 0.001 / 6
    assert np.allclose(sampler.weights(), expected)
    sampler.update_with_all_losses([2, 2, 2], [3.0, 6.0, 6.0])
    rms = np.array([1, 2, np.sqrt((9 + 36 + 36) / 3), 4, 5, 6])
    assert np.allclose(sampler.weights(), rms / rms.sum() * 0.999 + 0.001 / 6)


def test_uniform_until_every_step_has_its_history():
    sampler = LossSecondMomentResampler(PROCESS, history_per_term=2)
    sampler.update_with_all_losses([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4], [9.0] * 11)
    assert (sampler.weights() == 1).all()
    sampler.update_with_all_losses([5], [1.0])
    assert sampler.weights()[5] < sampler.weights()[0]


def test_local_losses_reach_the_history_without_a_group():
    sampler = LossSecondMomentResampler(PROCESS, history_per_term=1)
    sampler.update_with_local_losses(th.arange(6), th.arange(1.0, 7.0, requires_grad=True))
    assert np.allclose(sampler.weights(), warm(1).weights())


def test_state_goes_round():
    old, new = warm(), LossSecondMomentResampler(PROCESS, history_per_term=3)
    new.load_state_dict(old.state_dict())
    assert (new.weights() == old.weights()).all()
    new.update_with_all_losses([0], [100.0])
    assert (new.weights() != old.weights()).any()
    with pytest.raises(ValueError, match="does not fit"):
        LossSecondMomentResampler(PROCESS).load_state_dict(old.state_dict())
    assert UniformSampler(PROCESS).state_dict() == {}


def test_a_generator_makes_the_draw_repeatable_and_leaves_the_global_one_alone():
    before = np.random.get_state()[1].copy()
    draws = [UniformSampler(PROCESS).sample(50, "cpu", rng=np.random.default_rng(7))[0] for _ in range(2)]
    assert th.equal(*draws)
    assert (np.random.get_state()[1] == before).all()


def test_names():
    assert isinstance(create_named_schedule_sampler("uniform", PROCESS), UniformSampler)
    with pytest.raises(ValueError, match="one of uniform, loss-second-moment, got 'unifrom'; did you mean uniform"):
        create_named_schedule_sampler("unifrom", PROCESS)


def test_samplers_have_the_originals_attributes():
    assert UniformSampler(PROCESS)._weights.tolist() == [1] * 6
    sampler = LossSecondMomentResampler(PROCESS, history_per_term=2, uniform_prob=0.1)
    assert (sampler.diffusion, sampler.history_per_term, sampler.uniform_prob) == (PROCESS, 2, 0.1)
    sampler.update_with_all_losses([1, 1, 1], [3.0, 4.0, 5.0])
    assert sampler._loss_history[1].tolist() == [4, 5]
    assert sampler._loss_counts.tolist() == [0, 2, 0, 0, 0, 0]
    assert not sampler._warmed_up()
    assert warm()._warmed_up()


class Last(LossAwareSampler):
    """No more than the originals ask of a subclass, and the originals' signature of `sample`."""

    losses = np.ones(6)

    def weights(self):
        return self.losses

    def update_with_all_losses(self, ts, losses):
        self.losses = self.losses.copy()
        self.losses[ts] = losses

    def sample(self, batch_size, device):
        return super().sample(batch_size, device)


def test_a_sampler_of_somebody_elses_draws_and_learns():
    sampler = Last()
    sampler.update_with_local_losses(th.tensor([0, 2, 3, 4, 5]), th.zeros(5))
    draw = draw_for_training(th.zeros(4, 1), sampler, 0, 0, th.device("cpu"))
    assert draw.t.tolist() == [1] * 4
    assert draw.weights.tolist() == pytest.approx([1 / 6] * 4)
