"""Sampling with fewer steps than training: which steps to take, and the process made of them.

Grids with a name are rows of real timesteps tau, 0 .. T-1 of training, of which a network is fed any; those of the
originals are sets of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise, repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
import torch.nn.functional as F

from .diffusion.forward_process import Tables, table_of
from .diffusion.methods import Model
from .gaussian_diffusion import GaussianDiffusion, Losses
from .runtime.errors import UserError, as_user_error, refuse
from .runtime.seeds import to_device
from .sampling.prediction import CondFn, MeanVariance
from .sampling.schedules import Array, NoiseLevels

Grid = str | Sequence[float]
WRITE = "write '250', '10,15,20', 'ddim25', 'list:0,5,9', or trailing, linspace, quad, logsnr or karras as in 'quad25'"
RHO = 7.0  # Karras et al. 2022, eq. 5
NEARLY_NOISE, FEW = -5.1, 1 / 20  # lambda just below the end of the linear schedule, and the share of steps beyond it
MAX_STEPS = 10**6


def space_timesteps(
    num_timesteps: int, section_counts: Grid, *, alphas_cumprod: npt.ArrayLike | None = None
) -> set[int] | list[float]:
    """The steps of a process of `num_timesteps` to keep: a set of integers, or real timesteps in rising order.

    :param section_counts: "ddimN", N steps at an integer stride from 0 (Song et al. 2021); or how many steps to take
        from each of equally long sections, as whole numbers or "10,15,20", the first one nearest to the image; or the
        name of a grid in `GRIDS` with its number of steps, "logsnr20"; or the timesteps themselves, "list:0,10.5,999"
        or a sequence with fractions. A single step in all is T-1, where sampling starts.
    :param alphas_cumprod: of the process [T], which "logsnrN" and "karrasN" need.
    """
    if not isinstance(section_counts, str):
        if any(isinstance(value, float) for value in section_counts):
            return _explicit(num_timesteps, section_counts)
        return _sections(num_timesteps, [int(count) for count in section_counts])
    if section_counts.startswith("ddim"):
        return _even_stride(num_timesteps, _count(section_counts.removeprefix("ddim"), section_counts))
    if section_counts.startswith("list:"):
        return _explicit(num_timesteps, _numbers(section_counts))
    name = section_counts.rstrip("0123456789")
    if name in GRIDS:
        return _named(num_timesteps, name, section_counts, alphas_cumprod)
    return _sections(num_timesteps, [_count(text, section_counts) for text in section_counts.split(",")])


def _count(text: str, whole: str) -> int:
    refuse((not text.strip().isdigit(), f"timestep_respacing {whole!r} is not a grid: {WRITE}"))
    return int(text)


def _numbers(text: str) -> list[float]:
    fault = f"timestep_respacing {text!r} is not a list of timesteps: write 'list:0,10.5,999'"
    with as_user_error(fault, ValueError):
        return [float(word) for word in text.removeprefix("list:").split(",")]


def _sections(num_timesteps: int, counts: Sequence[int]) -> set[int]:
    if list(counts) == [1]:
        return {num_timesteps - 1}
    length, longer = divmod(num_timesteps, len(counts))
    steps: set[int] = set()
    start = 0
    for index, count in enumerate(counts):
        size = length + (index < longer)
        if not 1 <= count <= size:
            raise UserError(f"timestep_respacing cannot take {count} steps from a section of {size}: use 1 to {size}")
        # the stride is added up, not multiplied, so that rounding at halves falls as it always has
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        steps |= {start + round(offset) for offset in accumulate(repeat(stride, count - 1), initial=0.0)}
        start += size
    return steps


def _even_stride(num_timesteps: int, count: int) -> set[int]:
    if count == 1:
        return {num_timesteps - 1}
    if not 1 <= count <= num_timesteps:
        raise UserError(f"timestep_respacing ddim{count} does not fit {num_timesteps} steps: use 1 to {num_timesteps}")
    grids = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps, 0, -1)}
    if count in grids:
        return set(range(0, num_timesteps, grids[count]))
    near = sorted(sorted(grids, key=lambda number: abs(number - count))[:2])
    raise UserError(
        f"no integer stride takes exactly {count} of {num_timesteps} steps: "
        f"use ddim{' or ddim'.join(map(str, near))}, or '{count}'"
    )


def _explicit(num_timesteps: int, steps: Sequence[float]) -> list[float]:
    words = ", ".join(f"{step:g}" for step in steps[:12]) + (", ..." if len(steps) > 12 else "")
    rising = bool(steps) and all(earlier < later for earlier, later in pairwise(steps))
    outside = not all(0 <= step <= num_timesteps - 1 for step in steps)
    refuse(
        (not rising, f"timesteps {words} are not in rising order, each once: write them like 0,250,500.5,999"),
        (outside, f"timesteps {words} are not all in 0 .. {num_timesteps - 1}, those of the training"),
    )
    return [float(step) for step in steps]


def _in_roots(start: float, end: float, count: int) -> Array:
    """From one lambda to another, evenly in (sigma / alpha)^(1 / 7)."""
    lam: Array = -RHO * np.log(np.linspace(np.exp(-start / RHO), np.exp(-end / RHO), count))
    return lam


def _by_level(last: int, count: int, levels: NoiseLevels, spaced: Callable[[float, float, int], Array]) -> Array:
    """0 .. T-1, spaced in lambda down to NEARLY_NOISE.

    Some schedules go much further down, where next to nothing happens: one step in twenty goes there, evenly in lambda.
    """
    top = levels.lam[-1]
    few = max(1, round(count * FEW)) if top < NEARLY_NOISE and count > 2 else 0
    lam = spaced(levels.lam[0], NEARLY_NOISE if few else top, count - few)
    lam = np.append(lam, np.linspace(NEARLY_NOISE, top, few + 1)[1:]) if few else lam
    inner = levels.tau(F.logsigmoid(2 * th.from_numpy(lam))).numpy()[1:-1]
    return np.concatenate([[0], inner, [last]])


GRIDS: dict[str, Callable[[int, int, Any], Any]] = {  # (T-1, number of steps, noise levels or None) -> timesteps
    # from T-1 down at a stride of T / N, so that it ends one stride above -1 (Lin et al. 2024)
    "trailing": lambda last, count, _: np.arange(1, count + 1) * ((last + 1) / count) - 1,
    # evenly from 0 to T-1
    "linspace": lambda last, count, _: np.linspace(0, last, count),
    # evenly in sqrt(tau) from 0 to T-1: denser near the image (Song et al. 2021, app. D.3, who end at 0.8 T)
    "quad": lambda last, count, _: np.append(np.linspace(0, math.sqrt(last), count)[:-1] ** 2, last),
    # evenly in the log-SNR (Lu et al. 2022, DPM-Solver, sec. 4), but for what is nearly pure noise
    "logsnr": lambda last, count, levels: _by_level(last, count, levels, np.linspace),
    # evenly in (sigma / alpha)^(1 / 7) (Karras et al. 2022, eq. 5), but for what is nearly pure noise
    "karras": lambda last, count, levels: _by_level(last, count, levels, _in_roots),
}
IN_LEVELS = ("logsnr", "karras")


def _named(num_timesteps: int, name: str, text: str, alphas_cumprod: npt.ArrayLike | None) -> list[float]:
    """The grid `name` with as many steps as `text` says; a single step is T-1."""
    count, whole = _count(text.removeprefix(name), text), f"timestep_respacing {text!r}"
    refuse(
        (count < 1, f"{whole} has no steps: write {name}1 or more"),
        (count > MAX_STEPS, f"{whole} has too many steps: write {name}{MAX_STEPS} or less"),
        (name in IN_LEVELS and alphas_cumprod is None, f"{whole} depends on the noise schedule: give alphas_cumprod"),
    )
    levels = None if alphas_cumprod is None else NoiseLevels(alphas_cumprod)
    steps = [num_timesteps - 1.0] if count == 1 else GRIDS[name](num_timesteps - 1, count, levels).round(9).tolist()
    if not all(earlier < later for earlier, later in pairwise(steps)) or steps[0] < 0:
        raise UserError(f"{whole} does not fit {num_timesteps} steps: use {name}{num_timesteps} or less")
    return [float(step) for step in steps]


class SpacedDiffusion(GaussianDiffusion):
    """A process that takes some of the steps of a longer one: new betas with the same alpha_bar at the steps kept.

    :param use_timesteps: the steps to keep, of the process described by `kwargs`; real ones as a list in rising order.
    :param kwargs: as for `GaussianDiffusion`.
    """

    def __init__(self, use_timesteps: Iterable[float], **kwargs: Any) -> None:
        given = list(use_timesteps)
        real = any(step != int(step) for step in given)
        kept: list[float] = given if real else sorted({int(step) for step in given})
        self.use_timesteps = set(kept)
        alphas_cumprod: Array = np.cumprod(1 - np.array(kwargs["betas"], np.float64), dtype=np.float64)
        inside = bool(kept) and 0 <= min(kept) <= max(kept) < len(alphas_cumprod)
        refuse((not inside, f"use_timesteps must lie in 0 .. {len(alphas_cumprod) - 1}, and are {kept}"))
        self.timestep_map, self.original_num_steps = kept, len(alphas_cumprod)
        self.original_alphas_cumprod = alphas_cumprod
        levels = np.append(1.0, _alpha_bar(kept, alphas_cumprod))
        super().__init__(**{**kwargs, "betas": 1 - levels[1:] / levels[:-1]})

    # as in `GaussianDiffusion`, for a network or cond_fn that is fed timesteps of training

    def p_mean_variance(self, model: Model, *args: Any, **kwargs: Any) -> MeanVariance:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Model, *args: Any, **kwargs: Any) -> Losses:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: CondFn, *args: Any, **kwargs: Any) -> th.Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: CondFn, *args: Any, **kwargs: Any) -> MeanVariance:
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model: Any) -> _WrappedModel:
        if isinstance(model, _WrappedModel):
            return model
        wrapped = _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)
        wrapped.tables = self._tables
        return wrapped

    def _scale_timesteps(self, t: th.Tensor) -> th.Tensor:
        return t  # what `_wrap_model` makes of a network maps and rescales it


class _WrappedModel:
    """A network or cond_fn that is called with t and fed the timestep of training; a real t is one already."""

    tables: Tables | None = None  # of the process, which keeps the map in them

    def __init__(
        self, model: Any, timestep_map: Sequence[float], rescale_timesteps: bool, original_num_steps: int
    ) -> None:
        self.model, self.timestep_map = model, timestep_map
        self.rescale_timesteps, self.original_num_steps = rescale_timesteps, original_num_steps

    def __call__(self, x: th.Tensor, ts: th.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not ts.is_floating_point():
            ts = self._map(ts.device, ts.dtype, th.float64 if x.dtype == th.float64 else th.float32)[ts]
        if self.rescale_timesteps:
            ts = (ts if ts.is_floating_point() else ts.float()) * (1000.0 / self.original_num_steps)
        return self.model(x, ts, *args, **kwargs)

    def _map(self, device: th.device, whole: th.dtype, real: th.dtype) -> th.Tensor:
        """The timestep map on a device, `real` where timesteps are fractions."""

        def upload() -> th.Tensor:
            dtype = whole if all(step == int(step) for step in self.timestep_map) else real
            return to_device(th.tensor(self.timestep_map, dtype=dtype), device)

        return table_of(self.tables, ("map", device, whole, real), [self.timestep_map], upload)


def _alpha_bar(tau: Sequence[float], alphas_cumprod: Array) -> Array:
    """alpha_bar at timesteps in rising order; exact, and 0 where it is 0, at integers."""
    steps = np.array(_explicit(len(alphas_cumprod), tau))
    between: Array = NoiseLevels(alphas_cumprod).level(th.from_numpy(steps)).exp().numpy()
    return np.where(steps % 1 == 0, alphas_cumprod[steps.astype(int)], between)


def respaced(process: GaussianDiffusion, grid: Grid) -> SpacedDiffusion:
    """The process that a network was trained with, on another grid of its steps.

    It is of the same class, where that is a `SpacedDiffusion`; methods replaced on the instance stay behind.

    :param grid: as for `space_timesteps`.
    """
    kind = type(process) if isinstance(process, SpacedDiffusion) else SpacedDiffusion
    other, alphas_cumprod = kind.__new__(kind), process.original_alphas_cumprod
    vars(other).update(
        {name: value for name, value in vars(process).items() if not callable(getattr(kind, name, None))}
    )
    levels = np.append(1.0, alphas_cumprod)
    steps = space_timesteps(len(alphas_cumprod), grid, alphas_cumprod=alphas_cumprod)
    kept = "model_mean_type model_var_type loss_type rescale_timesteps loss_weight min_snr_gamma"
    options = {name: getattr(process, name) for name in kept.split()}
    SpacedDiffusion.__init__(other, steps, betas=1 - levels[1:] / levels[:-1], **options)
    return other
