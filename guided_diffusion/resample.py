"""Distributions over the timesteps of training.

Shapes: T steps of the process, N images of a batch. Weights make the expected loss the same as under uniform steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
import torch.distributed as dist  # noqa: F401

from . import dist_util
from .runtime.errors import check_choice, refuse
from .runtime.seeds import to_device

Array = npt.NDArray[np.float64]


def create_named_schedule_sampler(name: str, diffusion: Any) -> ScheduleSampler:
    """The distribution called "uniform" or "loss-second-moment"."""
    check_choice("schedule_sampler", name, SCHEDULE_SAMPLERS)
    sampler: ScheduleSampler = SCHEDULE_SAMPLERS[name](diffusion)
    return sampler


class ScheduleSampler(ABC):
    """A distribution over t, which may follow the losses."""

    @abstractmethod
    def weights(self) -> Array:
        """How likely each step is [T], up to a factor; all positive."""

    def sample(
        self, batch_size: int, device: th.device | str, *, rng: np.random.Generator | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """Steps t [N] int64 and their importance weights [N] float32, 1 / (T p_t).

        :param rng: source of randomness; numpy's global one when absent.
        """
        p = self.weights() / np.sum(self.weights())
        choice = np.random.choice if rng is None else rng.choice
        t = choice(len(p), size=(batch_size,), p=p)
        weights = 1 / (len(p) * p[t])
        return to_device(th.from_numpy(t).long(), device), to_device(th.from_numpy(weights).float(), device)

    def state_dict(self) -> dict[str, Any]:
        """The losses seen so far, as tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        assert not state


class UniformSampler(ScheduleSampler):
    """Every step equally likely."""

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> Array:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A distribution that follows the losses of all ranks."""

    def update_with_local_losses(self, local_ts: th.Tensor, local_losses: th.Tensor) -> None:
        """Take in this rank's losses [n] at steps [n]; every rank calls it, n may differ, and all learn the same."""
        table = th.stack([local_ts.float(), local_losses.detach().float()], dim=1)  # holds every t below 2^24
        ts, losses = th.cat(dist_util.gather(table)).T.tolist()
        self.update_with_all_losses([int(t) for t in ts], losses)

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take in losses at steps `ts`, the same on every rank and in the same order."""


class LossSecondMomentResampler(LossAwareSampler):
    """Steps in proportion to the root mean square of their last losses (Nichol & Dhariwal 2021, sec. 3.3).

    :param history_per_term: how many losses are kept per step; uniform until each step has so many.
    :param uniform_prob: share of the distribution that stays uniform.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion, self.history_per_term, self.uniform_prob = diffusion, history_per_term, uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term])  # newest last
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self) -> Array:
        if not self._warmed_up():
            return np.ones(len(self._loss_counts))
        moments = np.sqrt((self._loss_history**2).mean(axis=1))
        weights: Array = moments / moments.sum() * (1 - self.uniform_prob) + self.uniform_prob / len(moments)
        return weights

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            if not math.isfinite(loss):
                continue  # one of them would be the whole of the distribution
            if self._loss_counts[t] < self.history_per_term:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1
            else:
                self._loss_history[t] = np.append(self._loss_history[t, 1:], loss)

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": th.from_numpy(self._loss_history.copy()), "counts": th.from_numpy(self._loss_counts.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        got, expected = tuple(state["losses"].shape), self._loss_history.shape
        refuse((got != expected, f"a history of shape {got} does not fit {expected} (steps, losses per step)"))
        self._loss_history, self._loss_counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


SCHEDULE_SAMPLERS: dict[str, Any] = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
