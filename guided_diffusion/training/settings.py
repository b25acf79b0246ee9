"""The settings of a training loop that the originals' loop does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th

from ..fp16_util import INITIAL_LOG_LOSS_SCALE


class Hook(NamedTuple):
    """Calls look(model, updates) with the averaged weights every `interval` updates, on rank 0 or on all ranks."""

    interval: int
    look: Callable[[th.nn.Module, int], object]
    on_all_ranks: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Further keywords of `TrainLoop`.

    :param precision: fp32, fp16 or bf16; '' is what `use_fp16` says.
    :param max_steps: updates after which the run stops; 0: without end.
    :param grad_clip: the largest norm of the gradient that is not scaled down; 0: no clipping.
    :param warmup_steps: updates over which the learning rate rises from 0.
    :param val_data: as `data`; its first `val_batches` batches are measured, always alike, every `val_interval` steps.
    :param keep_last: how many checkpoints stay in the folder; 0: all.
    :param keep_every: those at multiples of so many steps stay besides; 0: none.
    :param config: what is saved as config.json beside the checkpoints.
    :param class_dropout: probability that a label becomes the null_label of the model, never in validation.
    :param max_bad_steps: skipped steps in a row after which the run ends; 0: it never does.
    :param async_save: write checkpoints while training goes on, from a copy in the memory of the CPU.
    :param fsdp: split weights, gradients, optimizer state and averages over the ranks; the model is changed.
    :param checkpoint_format: of `fsdp`: "gathered" to files of whole tensors, or "sharded", a folder to which each rank
        writes its part.
    :param ema_profiles: widths of averages by power functions that are saved too, as text separated by commas.
    :param ema_warmup: the rate after n updates is at most (1 + n) / (10 + n), so that a young average is no noise.
    :param ema_start: up to so many updates averages are the weights themselves, and n counts from there.
    """

    precision: str = ""
    initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE
    max_steps: int = 0
    grad_clip: float = 0.0
    warmup_steps: int = 0
    val_data: Any = None
    val_interval: int = 0
    val_batches: int = 8
    seed: int = 0
    keep_last: int = 0
    keep_every: int = 0
    hooks: Sequence[Hook] = ()
    progress: bool = False
    config: Mapping[str, Any] | None = None
    class_dropout: float = 0.0
    max_bad_steps: int = 50
    async_save: bool = False
    fsdp: bool = False
    ema_warmup: bool = False
    ema_start: int = 0
    ema_profiles: str = ""
    checkpoint_format: str = "gathered"
