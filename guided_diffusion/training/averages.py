"""Averages of weights by power functions of time, and any other such average made afterwards (Karras et al. 2024, 3).

After t updates a profile of exponent gamma weighs the weights of update s by about s^gamma, whatever t is. Its width is
the deviation of s over t, a number from 0 (the last weights alone) to 1 / sqrt(12) (all alike).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th

from ..fp16_util import MixedPrecisionTrainer
from ..nn import update_ema
from ..runtime.errors import UserError, refuse
from ..runtime.options import WIDEST_PROFILE as WIDEST
from .weights import load, shapes

TOLERANCE = 0.1  # distance of a profile from the one asked for, over the norm of that

Stored = tuple[int, float]  # updates and width of an average in a file


def exponent(width: float) -> float:
    """gamma of a width: the root of width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1."""
    inverse = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def momentum(width: float, updates: int) -> float:
    """The share that an average keeps at update 1, 2, ...

    After t of them update s has (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1), the integral of the power function.
    """
    return float((1 - 1 / updates) ** (exponent(width) + 1))


class PowerAverages:
    """The averages of a run with these widths, of the values that its trainer has.

    :param values: one list of tensors per width, one tensor per master.
    """

    def __init__(self, widths: Sequence[float], trainer: MixedPrecisionTrainer) -> None:
        self.widths, self._trainer = widths, trainer
        self.values = [[param.detach().clone() for param in trainer.master_params] for _ in widths]

    def load(self, read: Callable[[float], list[th.Tensor]]) -> None:
        """Take the values that `read` has of each width."""
        self.values = [read(width) for width in self.widths]

    def update(self, updates: int) -> None:
        """Follow the masters, after so many updates."""
        for width, values in zip(self.widths, self.values, strict=True):
            update_ema(self._trainer.trained(values), self._trainer.trained(), rate=momentum(width, updates))


def _products(one: Any, other: Any) -> Any:
    """The integral of the product of two profiles, given as (updates, exponent)."""
    (t, a), (u, b) = one, other
    logs = (a + b + 1) * np.log(np.minimum(t, u)) - (a + 1) * np.log(t) - (b + 1) * np.log(u)
    return (a + 1) * (b + 1) / (a + b + 1) * np.exp(logs)


def shares(stored: Sequence[Stored], step: int, width: float) -> tuple[list[float], float]:
    """The share of each stored average in the one of a width after `step` updates, and how far it is from that.

    The shares are those whose sum is 1 and whose profile is nearest in the mean square.
    """
    steps, exponents = (np.array(column, float) for column in zip(*[(t, exponent(w)) for t, w in stored], strict=True))
    ours, target = (steps, exponents), (float(step), exponent(width))
    norms, norm = np.sqrt(_products(ours, ours)), np.sqrt(_products(target, target))
    gram = _products((steps[:, None], exponents[:, None]), ours) / norms[:, None] / norms
    hits = _products(ours, target) / norms / norm
    border = (norm / norms)[:, None]  # of the sum, with the unknowns in units of the norms
    system = np.block([[gram, border], [border.T, np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(hits, 1.0), rcond=1e-12)[0][:-1]
    distance = float(np.sqrt(max(0.0, 1 - 2 * hits @ solution + solution @ gram @ solution)))
    return list(map(float, solution * norm / norms)), distance


def spans(stored: Sequence[Stored], step: int) -> str:
    """The widths that stored averages make well enough, in 280ths: "0.04 to 0.123", perhaps several such parts."""
    widths = sorted({*(i / 1000 for i in range(1, round(WIDEST * 1000) + 1)), *(w for t, w in stored if t == step)})
    parts: list[list[float]] = [[]]
    for width in widths:
        if shares(stored, step, width)[1] <= TOLERANCE:
            parts[-1].append(width)
        elif parts[-1]:
            parts.append([])
    return ", ".join(f"{part[0]:g} to {part[-1]:g}" for part in parts if part)


def checked_shares(stored: Sequence[Stored], step: int, width: float) -> tuple[list[float], float]:
    """As `shares`.

    :raises UserError: for a profile that the stored averages do not make.
    """
    result = shares(stored, step, width) if 0 < width <= WIDEST else ([], 1.0)
    if result[1] > TOLERANCE:
        raise UserError(
            f"profile {width:g} is outside of what the averages up to step {step} make, {spans(stored, step)}: give "
            "one of these, or train with other --ema_profiles or more checkpoints"
        )
    return result


def weighted(parts: Sequence[tuple[float, str]]) -> dict[str, th.Tensor]:
    """The sum of the weights in files, by share and path; in float64 until the end."""
    total: dict[str, th.Tensor] = {}
    for share, path in parts:
        weights = load(path)
        unlike = total and shapes(weights) != shapes(total)
        refuse((unlike, f"{path} is of another network than the averages beside it: move it out of the folder"))
        for name, value in weights.items():
            exact = value.is_floating_point()
            total[name] = total.get(name, 0) + share * value.double() if exact else value
    return {name: value.float() if value.is_floating_point() else value for name, value in total.items()}
