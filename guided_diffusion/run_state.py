"""All of a run that its checkpoints hold, to files and back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from guided_diffusion import checkpoint, dist_util, logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer, unflatten_optimizer_state
from guided_diffusion.resample import ScheduleSampler


def rng_state() -> dict[str, Any]:
    """The states of the global generators of torch, numpy and random, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": th.get_rng_state(),
        "numpy": [str(name), th.from_numpy(np.asarray(keys, np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the global generators where `rng_state` found them."""
    th.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


@dataclass
class RunState:
    """The parts of a training run that change with its steps.

    :param ema_rate: rates of the moving averages in `ema_params`, one list of tensors each, in parameter order.
    :param lr: the learning rate before warm-up and annealing; None takes the optimizer file's.
    """

    trainer: MixedPrecisionTrainer
    opt: th.optim.Optimizer
    ema_rate: Sequence[float]
    ema_params: list[list[th.Tensor]]
    schedule_sampler: ScheduleSampler
    data: Any
    lr: float | None

    # ---- to files

    def save(self, folder: str, step: int) -> None:
        """Write the set of a step; its last file, the state, makes it complete. For rank 0 alone."""

        def write(name: str, value: Any) -> None:
            path = str(bf.join(folder, f"{name}{step:06d}.pt"))
            checkpoint.save(path, value)
            logger.log(f"saved {path}")

        write("model", self._weights(self.trainer.master_params))
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            write(f"ema_{rate}_", self._weights(params))
        write("opt", self.opt.state_dict())
        write("state", self._rest(step))

    def _weights(self, masters: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        return {name: value.detach() for name, value in self.trainer.master_params_to_state_dict(masters).items()}

    def _rest(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "lr": self.lr,
            "precision": self.trainer.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
            "data": self.data.state_dict() if hasattr(self.data, "state_dict") else {},
            "rng": rng_state(),
        }

    # ---- back

    def restore(self, files: checkpoint.CheckpointSet) -> int:
        """Take up everything of a set but the weights, say what was there and what not, and return the step."""
        if files.step is None:
            logger.warn(
                f"the step of {files.model} is unknown, as its name has no number: counting from 0, and the optimizer "
                "and the moving averages start anew"
            )
        state = checkpoint.load(files.state) if files.state else {}
        step = int(state.get("step", files.step or 0))
        parts = [*self._restore_emas(files), *self._restore_optimizer(files.opt, state), *self._restore_rest(state)]
        logger.log(f"resuming at step {step}: weights from {files.model}; {'; '.join(parts)}")
        return step

    def _restore_emas(self, files: checkpoint.CheckpointSet) -> Iterator[str]:
        paths = {float(text): path for text, path in files.emas.items()}
        for index, rate in enumerate(self.ema_rate):
            if rate not in paths:
                yield f"EMA {rate} NOT restored, it starts from the weights"
                continue
            device = self.ema_params[index][0].device
            weights = checkpoint.load(paths[rate], map_location=device)
            self.ema_params[index] = list(self.trainer.state_dict_to_master_params(weights))
            yield f"EMA {rate} restored"

    def _restore_optimizer(self, path: str, run: dict[str, Any]) -> Iterator[str]:
        if not path:
            yield "optimizer NOT restored, it starts anew"
            return
        saved = checkpoint.load(path)
        # Rates and decay are this run's: only the moments are taken from the file.
        state = unflatten_optimizer_state(saved["state"], self.trainer.model)
        self.opt.load_state_dict({"state": state, "param_groups": self.opt.state_dict()["param_groups"]})
        there = run.get("lr", saved["param_groups"][0]["lr"])  # older runs kept no more than the last step's
        self.lr = there if self.lr is None else self.lr
        yield "optimizer restored" + ("" if self.lr == there else f" with lr {self.lr:g} instead of its {there:g}")

    def _restore_rest(self, state: dict[str, Any]) -> Iterator[str]:
        if state.get("precision"):
            self.trainer.load_state_dict(state["precision"])
            yield f"loss scale 2^{self.trainer.lg_loss_scale:.6g} restored"
        if state.get("schedule_sampler") and self.schedule_sampler.state_dict():
            self.schedule_sampler.load_state_dict(state["schedule_sampler"])
            yield "loss history restored"
        if state.get("data") and hasattr(self.data, "load_state_dict"):
            self.data.load_state_dict(state["data"])
            yield "data position restored"
        else:
            yield "data position NOT restored, the data start anew"
        if state and dist_util.world_size() == 1:
            set_rng_state(state["rng"])
