"""All of a run that its checkpoints hold, to files and back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th

from .. import dist_util, logger
from ..fp16_util import MixedPrecisionTrainer, unflatten_optimizer_state
from ..resample import ScheduleSampler
from ..runtime.errors import UserError
from . import lora
from .checkpoints import Checkpoint
from .weights import load


def rng_state(device: th.device) -> dict[str, Any]:
    """The states of the global generators of torch, numpy and random, and of a GPU, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    numbers = [str(name), th.from_numpy(np.asarray(keys, np.int64)), *rest]
    gpu = {"cuda": th.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": th.get_rng_state(), "numpy": numbers, "python": random.getstate(), **gpu}


def set_rng_state(state: dict[str, Any], device: th.device) -> None:
    """Set the global generators to a state of `rng_state`."""
    th.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        th.cuda.set_rng_state(state["cuda"], device)


def load_weights(model: th.nn.Module, files: Checkpoint, flags: Mapping[str, Any]) -> None:
    """Load the weights to go on from, those below adapters and the adapters apart.

    :param flags: that the network was built from, for messages.
    """
    source = Checkpoint(files.step, path=files.model)
    if not lora.adapters(model):
        model.load_state_dict(source.fitting(model, flags))
        return
    state = load(files.state) if files.state else {}
    if "lora" not in state:
        raise UserError(
            f"{files.model} is no checkpoint of a run with adapters that can go on (those of loraNNNNNN.pt cannot): "
            f"give --init_from {files.model} to start one, or leave out --lora_rank"
        )
    if state["lora_scale"] != lora.scale_of(model):
        raise UserError(
            f"the adapters of {files.lora} are scaled by {state['lora_scale']:g}: leave --lora_alpha as it was"
        )
    expected = {name: value for name, value in lora.plain_names(model.state_dict()).items() if not lora.is_part(name)}
    weights = {**source.fitting(expected, flags), **state["base"], **state["lora"]["model"]}
    model.load_state_dict(lora.layered(model, weights))


@dataclass
class RunState:
    """The parts of a training run that change with its steps.

    :param ema_rate: rates of the moving averages in `ema_params`, one list of tensors each, in parameter order.
    :param lr: the learning rate before warm-up and annealing; None takes the optimizer file's.
    :param global_batch: images per step, of all ranks.
    """

    trainer: MixedPrecisionTrainer
    opt: th.optim.Optimizer
    ema_rate: Sequence[float]
    ema_params: list[list[th.Tensor]]
    schedule_sampler: ScheduleSampler
    data: Any
    lr: float | None
    global_batch: int
    _saved: dict[str, Any] = field(default_factory=dict)  # the state file that is resumed from
    _report: list[str] = field(default_factory=list)  # what was restored

    # ---- to files

    def parts(self, step: int) -> dict[str, Any]:
        """The content of each file of a checkpoint, by the name before the step, in the order of writing.

        The weights come last: without them no reader takes a checkpoint for complete. Every rank must call it, and rank
        0, which writes, has them.
        """
        model, masters = self.trainer.model, list[th.Tensor](self.trainer.master_params)
        weights, *averages = [self._weights(values) for values in (masters, *self.ema_params)]
        rest, opt = self._rest(step), self.trainer.state_for_files(self.opt)
        if dist_util.rank() > 0:
            return {}
        averaged = dict(zip(map(str, self.ema_rate), averages, strict=True))
        adapters = {}
        if lora.adapters(model):
            parts = {name: lora.split(model, state) for name, state in {"model": weights, **averaged}.items()}
            rest |= {"base": lora.base(model, weights), "lora": parts, "lora_scale": lora.scale_of(model)}
            adapters["lora"] = lora.content(model, averaged[max(averaged, key=float)] if averaged else weights)
        emas = {f"ema_{rate}_": lora.merged(model, state) for rate, state in averaged.items()}
        return {"state": rest, **emas, "opt": opt, **adapters, "model": lora.merged(model, weights)}

    def _weights(self, masters: list[th.Tensor]) -> dict[str, th.Tensor]:
        return {name: value.detach() for name, value in self.trainer.weights_for_files(masters).items()}

    def _rest(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "lr": self.lr,
            "global_batch": self.global_batch,
            "precision": self.trainer.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
            "data": self.data.state_dict() if hasattr(self.data, "state_dict") else {},
            "rng": dist_util.gather_objects(rng_state(self._device)),
        }

    @property
    def _device(self) -> th.device:
        return self.trainer.master_params[0].device

    # ---- back

    def open(self, files: Checkpoint) -> int:
        """Begin to take up a checkpoint; returns its step. `average`, `load_optimizer` and `close` follow."""
        if files.step is None:
            logger.warn(
                f"the step of {files.model} is unknown, as its name has no number: counting from 0, and the optimizer "
                "and the moving averages start anew"
            )
        self._saved = load(files.state) if files.state else {}
        self._report = [f"weights from {files.model or 'elsewhere'}"]
        return int(self._saved.get("step", files.step or 0))

    def average(self, rate: float, path: str | None) -> list[th.Tensor]:
        """The moving average of a file, one tensor per master; without a file the weights are its start."""
        if not path:
            self._report.append(f"EMA {rate} NOT restored, it starts from the weights")
            return [master.detach().clone() for master in self.trainer.master_params]
        model, weights = self.trainer.model, load(path)
        if lora.adapters(model):
            parts = self._saved["lora"].get(str(rate), {})
            weights = lora.layered(model, {**weights, **self._saved["base"], **parts})
        self._report.append(f"EMA {rate} restored")
        return list(self.trainer.state_dict_to_master_params(weights))

    def load_optimizer(self, path: str) -> None:
        """Take up the optimizer's moments from a file, '' for none."""
        if not path:
            self._report.append("optimizer NOT restored, it starts anew")
            return
        saved = load(path)
        # Rates and decay are this run's: only the moments are taken from the file.
        state = self.trainer.state_from_files(unflatten_optimizer_state(saved["state"], self.trainer.model))
        self.opt.load_state_dict({"state": state, "param_groups": self.opt.state_dict()["param_groups"]})
        group = saved["param_groups"][0]
        before = {"lr": self._saved.get("lr", group["lr"]), "weight_decay": group.get("weight_decay", 0.0)}
        self.lr = before["lr"] if self.lr is None else self.lr  # older runs kept no more than the last step's
        now = {"lr": self.lr, "weight_decay": self.opt.param_groups[0]["weight_decay"]}
        other = [f"{name} {now[name]:g} instead of its {before[name]:g}" for name in now if now[name] != before[name]]
        self._report.append("optimizer restored" + (f" with {' and '.join(other)}" if other else ""))

    def close(self, step: int) -> float | None:
        """Take up everything else but the weights, log what was restored, and return the learning rate."""
        logger.log(f"resuming at step {step}: {'; '.join([*self._report, *self._restore_rest(self._saved)])}")
        batch = self._saved.get("global_batch", self.global_batch)
        if batch != self.global_batch:
            logger.warn(
                f"the global batch is {self.global_batch} instead of {batch}: the images go on where they were, with "
                "other timesteps and noise"
            )
        return self.lr

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
        if "rng" in state:
            saved, ranks = state["rng"], dist_util.world_size()
            states = [saved] if isinstance(saved, dict) else list(saved)  # older runs kept those of rank 0
            if len(states) == ranks:
                set_rng_state(states[dist_util.rank()], self._device)
                yield "generators restored"
            else:
                yield "global generators NOT restored, as the number of ranks is another one"
                logger.warn(
                    f"the number of ranks is {ranks} instead of {len(states)}: with the same global batch, images, "
                    "timesteps, noise and dropped labels stay the same and sums are rounded otherwise, but dropout "
                    "masks differ"
                )
