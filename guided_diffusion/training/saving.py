"""The checkpoints of a run: all that they hold, to files and back, and writing them while training goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch as th
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .. import dist_util, logger
from ..fp16_util import Groups, get_param_groups_and_shapes, laid_out_as, unflatten_master_params
from ..networks.architecture import Weights
from ..runtime import files
from ..runtime.errors import UserError, refuse
from ..runtime.seeds import rng_state, set_rng_state
from . import checkpoints, lora, manifests
from .sharded_files import read, write
from .weights import Entry, load

if TYPE_CHECKING:
    from ..train_util import TrainLoop
    from .sharding import ShardedTrainer


def parse_resume_step_from_filename(filename: str) -> int:
    """The number of updates in a name such as model070000.pt or ema_0.9999_070000.pt; 0 where it has none."""
    return checkpoints.step_of(filename) or 0


def get_blob_logdir() -> str:
    """Where checkpoints go: the folder of the logs. Replace it to keep them elsewhere, e.g. in a bucket."""
    return logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """None; replace it to go on from a checkpoint where none was given, as when runs are restarted by themselves."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The moving average of a rate that lies beside a model of that step, or None."""
    sets = checkpoints.sets_in(os.path.dirname(main_checkpoint) or ".") if main_checkpoint else {}
    averages = sets[step].emas.items() if step in sets else ()
    return next((path for text, path in averages if float(text) == float(rate)), None)


def load_weights(model: th.nn.Module, files: checkpoints.Checkpoint, flags: Mapping[str, Any]) -> None:
    """Load the weights to go on from, those below adapters and the adapters apart.

    :param flags: that the network was built from, for messages.
    """
    source = checkpoints.Checkpoint(files.step, path=files.model)
    if files.shards == files.model:
        source.picked = Weights(read(files.model, "model".__eq__)["model"], {}, "")
    if not lora.adapters(model):
        model.load_state_dict(source.fitting(model, flags))
        return
    state = read_state(files)
    bare = "lora" not in state
    start, scale = f"give --init_from {files.model} to start one", state.get("lora_scale", 1.0)
    scaled = f"the adapters of {files.lora} are scaled by {scale:g}"
    refuse(
        (bare, f"{files.model} is no checkpoint of a run with adapters: {start}, or leave out --lora_rank"),
        (scale != lora.scale_of(model), f"{scaled}: leave --lora_alpha as it was"),
    )
    expected = {name: value for name, value in lora.plain_names(model.state_dict()).items() if not lora.is_part(name)}
    weights = {**source.fitting(expected, flags), **state["base"], **state["lora"]["model"]}
    model.load_state_dict(lora.layered(model, weights))


def read_state(files: checkpoints.Checkpoint) -> dict[str, Any]:
    """The state file of a checkpoint, {} without one, with the adapters that older runs kept in a file of their own."""
    state: dict[str, Any] = load(files.state) if files.state else {}
    if state and "lora" not in state and files.lora.endswith(".pt"):
        packs = lora.older_packs(load(files.lora))
        state |= {"lora": {key: pack.weights for key, pack in packs.items()}, "lora_scale": packs["model"].scale}
    return state


def unflatten_optimizer_state(state: Mapping[int, Mapping[str, Any]], model: th.nn.Module) -> dict[int, dict[str, Any]]:
    """Adam's state with one entry per parameter, in parameter order and with the parameters' strides.

    :param state: the same, or that of the two flat masters of an older fp16 run, which is recognised by its sizes.
    """
    named = list(model.named_parameters())
    groups = get_param_groups_and_shapes(named)
    sizes = {index: entry["exp_avg"].numel() for index, entry in state.items() if "exp_avg" in entry}
    if all(index < len(named) and size == named[index][1].numel() for index, size in sizes.items()):
        result: dict[int, dict[str, Any]] = {index: dict(entry) for index, entry in state.items()}
    elif sizes == {i: sum(param.numel() for _, param in group) for i, (group, _) in enumerate(groups)}:
        result = _unflattened(state, groups, [name for name, _ in named])
    else:
        raise UserError("the optimizer state is not that of this model: resume with the flags of the run that wrote it")
    for index, entry in result.items():
        param = named[index][1]
        moments = {key: value for key, value in entry.items() if getattr(value, "shape", None) == param.shape}
        entry.update({key: laid_out_as(value, param) for key, value in moments.items()})
    return result


def _unflattened(
    state: Mapping[int, Mapping[str, Any]], groups: Groups, names: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """The entries of flat masters, cut into those of the parameters."""
    result: dict[int, dict[str, Any]] = {index: {} for index in range(len(names))}
    for which, (group, _) in enumerate(groups):
        size = sum(param.numel() for _, param in group)
        for key, value in state[which].items():
            flat = isinstance(value, th.Tensor) and value.numel() == size
            parts = unflatten_master_params(group, value) if flat else [value] * len(group)
            for (name, _), part in zip(group, parts, strict=True):
                result[names.index(name)][key] = part.clone() if isinstance(part, th.Tensor) else part
    return result


@dataclass
class RunState:
    """The parts of a training run that change with its steps, to files and back."""

    loop: TrainLoop
    _saved: dict[str, Any] = field(default_factory=dict)  # the state file that is resumed from
    _report: list[str] = field(default_factory=list)  # what was restored

    def parts(self, step: int) -> dict[str, Any]:
        """The content of each file of a checkpoint, by the name before the step, in the order of writing.

        The weights come last: without them no reader takes a checkpoint for complete. Every rank must call it, and rank
        0, which writes, has them.
        """
        loop, trainer, model = self.loop, self.loop.mp_trainer, self.loop.model
        weights, *averages = [
            {name: value.detach() for name, value in trainer.weights_for_files(values).items()}
            for values in (list[th.Tensor](trainer.master_params), *loop.ema_params, *loop.powers.values)
        ]
        rest, opt = self._rest(step), trainer.state_for_files(loop.opt)
        if dist_util.rank() > 0:
            return {}
        names = [*(f"ema_{rate}" for rate in loop.ema_rate), *(f"power_{width}" for width in loop.powers.widths)]
        averaged = dict(zip(names, averages, strict=True))
        adapters = {}
        if lora.adapters(model):
            split = {name: lora.split(model, state) for name, state in {"model": weights, **averaged}.items()}
            parts = {name.removeprefix("ema_"): state for name, state in split.items()}
            rest |= {"base": lora.base(model, weights), "lora": parts, "lora_scale": lora.scale_of(model)}
            adapters["lora"] = lora.content(model, averaged[f"ema_{max(loop.ema_rate)}"] if loop.ema_rate else weights)
        emas = {f"{name}_": lora.merged(model, state) for name, state in averaged.items()}
        return {"state": rest, **emas, "opt": opt, **adapters, "model": lora.merged(model, weights)}

    def rows(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same for a folder of parts: the rows of this rank, and what is not split; every rank calls it."""
        loop, trainer = self.loop, cast("ShardedTrainer", self.loop.mp_trainer)
        emas = {f"ema_{rate}": values for rate, values in zip(loop.ema_rate, loop.ema_params, strict=True)}
        emas |= {f"power_{w}": values for w, values in zip(loop.powers.widths, loop.powers.values, strict=True)}
        groups = loop.opt.state_dict()["param_groups"]
        return trainer.rows_for_files({"model": trainer.master_params, **emas}, loop.opt), {
            "state": {**self._rest(step), "param_groups": groups}
        }

    def _rest(self, step: int) -> dict[str, Any]:
        loop = self.loop
        return {
            "step": step,
            "lr": loop.lr,
            "global_batch": loop.global_batch,
            "precision": loop.mp_trainer.state_dict(),
            "schedule_sampler": loop.schedule_sampler.state_dict(),
            "data": loop.data.state_dict() if hasattr(loop.data, "state_dict") else {},
            "rng": dist_util.gather_objects(rng_state(loop.device)),
            **({"extra": {name: part.state_dict() for name, part in loop.extra.items()}} if loop.extra else {}),
        }

    def open(self, files: checkpoints.Checkpoint) -> int:
        """Begin to take up a checkpoint; returns its step. `average`, `load_optimizer` and `close` follow."""
        if files.step is None:
            logger.warn(
                f"the step of {files.model} is unknown, as its name has no number: counting from 0, and the optimizer "
                "and the moving averages start anew"
            )
        self._saved = read_state(files)
        self._report = [f"weights from {files.model or 'elsewhere'}"]
        return int(self._saved.get("step", files.step or 0))

    def average(self, rate: str, path: str | None) -> list[th.Tensor]:
        """The average of a file, one tensor per master; without a file the weights are its start.

        :param rate: of a moving average, or "power_" and the width.
        """
        trainer, model = self.loop.mp_trainer, self.loop.model
        shards, part = self.loop._files.shards, rate if rate.startswith("power") else f"ema_{rate}"
        split = read(shards, part.__eq__) if shards and not path else {}
        if not path and not split:
            self._report.append(f"EMA {rate} NOT restored, it starts from the weights")
            return [master.detach().clone() for master in trainer.master_params]
        weights = split[part] if split else load(str(path))
        if lora.adapters(model):
            parts = self._saved["lora"].get(rate, {})
            weights = lora.layered(model, {**weights, **self._saved["base"], **parts})
        self._report.append(f"EMA {rate} restored")
        return list(trainer.state_dict_to_master_params(weights))

    def load_optimizer(self, path: str) -> None:
        """Take up the optimizer's moments from a file, '' for none, and its learning rate where the loop has none."""
        if not path:
            self._report.append("optimizer NOT restored, it starts anew")
            return
        loop, saved = self.loop, load(path) if path != self.loop._files.shards else self._moments(path)
        # Rates and decay are this run's: only the moments are taken from the file.
        state = loop.mp_trainer.state_from_files(unflatten_optimizer_state(saved["state"], loop.model))
        loop.opt.load_state_dict({"state": state, "param_groups": loop.opt.state_dict()["param_groups"]})
        group = saved["param_groups"][0]
        before = {"lr": self._saved.get("lr", group["lr"]), "weight_decay": group.get("weight_decay", 0.0)}
        loop.lr = before["lr"] if loop.lr is None else loop.lr  # older runs kept no more than the last step's
        now = {"lr": loop.lr, "weight_decay": loop.opt.param_groups[0]["weight_decay"]}
        other = [f"{name} {now[name]:g} instead of its {before[name]:g}" for name in now if now[name] != before[name]]
        self._report.append("optimizer restored" + (f" with {' and '.join(other)}" if other else ""))

    def _moments(self, folder: str) -> dict[str, Any]:
        """The optimizer's part of a folder of parts, as it is in a file."""
        state: dict[int, dict[str, th.Tensor]] = {}
        for name, value in read(folder, "opt".__eq__).get("opt", {}).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        return {"state": state, "param_groups": self._saved["param_groups"]}

    def close(self, step: int) -> None:
        """Take up everything else but the weights, and log what was restored."""
        logger.log(f"resuming at step {step}: {'; '.join([*self._report, *self._restore_rest(self._saved)])}")
        batch = self._saved.get("global_batch", self.loop.global_batch)
        if batch != self.loop.global_batch:
            logger.warn(
                f"the global batch is {self.loop.global_batch} instead of {batch}: the images go on where they were, "
                "with other timesteps and noise"
            )

    def _restore_rest(self, state: dict[str, Any]) -> Iterator[str]:
        loop = self.loop
        if state.get("precision"):
            loop.mp_trainer.load_state_dict(state["precision"])
            yield f"loss scale 2^{loop.mp_trainer.lg_loss_scale:.6g} restored"
        if state.get("schedule_sampler") and loop.schedule_sampler.state_dict():
            loop.schedule_sampler.load_state_dict(state["schedule_sampler"])
            yield "loss history restored"
        if state.get("data") and hasattr(loop.data, "load_state_dict"):
            loop.data.load_state_dict(state["data"])
            yield "data position restored"
        else:
            yield "data position NOT restored, the data start anew"
        for name, part in loop.extra.items():
            if name in state.get("extra", {}):
                part.load_state_dict(state["extra"][name])
                yield f"{name} restored"
        if "rng" in state:
            saved, ranks = state["rng"], dist_util.world_size()
            states = [saved] if isinstance(saved, dict) else list(saved)  # older runs kept those of rank 0
            if len(states) == ranks:
                set_rng_state(states[dist_util.rank()], loop.device)
                yield "generators restored"
            else:
                yield "global generators NOT restored, as the number of ranks is another one"
                logger.warn(
                    f"the number of ranks is {ranks} instead of {len(states)}: with the same global batch, images, "
                    "timesteps, noise and dropped labels stay the same and sums are rounded otherwise, but dropout "
                    "masks differ"
                )


def write_set(
    folder: str, step: int, parts: Mapping[str, Any], entries: Mapping[str, Entry] | None = None
) -> Iterator[str]:
    """Write the files of a step one after the other, their manifest last, and yield the path of each.

    :param parts: the content of each file, by the name before the step; "lora" is a folder, of names and contents.
    :param entries: files of the step that were written before; None: there are none, and what is there goes.
    """
    if entries is None:
        _clear(folder, step)
    written = dict(entries or {})
    for part, value in parts.items():
        name = f"{part}{step:06d}"
        of_folder = part == "lora"
        content = {f"{name}/{file}": item for file, item in value.items()} if of_folder else {f"{name}.pt": value}
        for file, item in content.items():
            written[file] = checkpoints.save(files.join(folder, file), item)
            yield files.join(folder, file)
    yield manifests.write_manifest(folder, step, written)


def _clear(folder: str, step: int) -> None:
    """Remove what a killed process or a damaged disk left of a step: nothing of it mixes with the new files."""
    before = checkpoints.sets_in(folder).get(step)
    if before is not None:
        checkpoints.remove(before)


def map_tensors(value: Any, change: Callable[[th.Tensor], th.Tensor]) -> Any:
    """The same dicts, lists, tuples and plain values with other tensors in them."""
    if isinstance(value, th.Tensor):
        return change(value.detach())
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def snapshot(value: Any) -> Any:
    """The same with contiguous copies of its tensors in CPU memory, page-locked where a GPU writes them."""

    def copy(tensor: th.Tensor) -> th.Tensor:
        buffer = th.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)

    copied = map_tensors(value, copy)
    if th.cuda.is_initialized():
        th.cuda.synchronize()
    return copied


class Saver:
    """Writes the checkpoints of one run; as a context it ends only when everything is written, on every rank.

    :param asynchronous: a save returns when there is a copy of everything in CPU memory, and a thread writes that; the
        next save waits for it, and raises what went wrong.
    :param keep_last: how many complete ones stay in the folder, beside multiples of `keep_every` steps; 0: all.
    """

    def __init__(
        self, *, asynchronous: bool = False, keep_last: int = 0, keep_every: int = 0, kind: str = "gathered"
    ) -> None:
        self.asynchronous, self.keep_last, self.keep_every, self.kind = asynchronous, keep_last, keep_every, kind
        self.source = ""  # the weights that were resumed from: never written again
        self._pending: Future[list[str]] | None = None
        self.best, self._swept = 0, False  # the step whose checkpoint stays whatever `keep_last` says
        self._group: dist.ProcessGroup | None = None  # of the threads of all ranks
        self._mesh: Any = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.wait()
            dist_util.barrier()
            return
        try:
            self.wait()
        except Exception as failure:  # the error that ends the run matters more
            logger.error(f"the last checkpoint was not written: {failure}")

    def save(self, state: RunState, folder: str, step: int) -> None:
        """Write the checkpoint of a step; every rank calls it, rank 0 writes.

        :raises OSError: if it, or the one before, cannot be written.
        """
        path = files.join(folder, f"shards{step:06d}")
        if self.kind == "sharded" and self.source != path:
            fault = f"{folder} is a bucket, to which sharded checkpoints are not written: give a folder"
            refuse((files.is_remote(folder), fault))
            self.wait()
            self._begin_sharded(state, path, step)
            return
        parts = state.parts(step)
        try:
            self.wait()
        finally:  # what was not written before is no reason not to write this
            self._begin(parts, folder, step)

    def _begin_sharded(self, state: RunState, path: str, step: int) -> None:
        """As `_begin`, of the parts that all ranks have."""
        trainer, (rows, rest) = cast("ShardedTrainer", state.loop.mp_trainer), state.rows(step)
        if self._group is None:
            mesh, self._group = trainer.mesh, dist.new_group(backend="gloo")
            self._mesh = init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)
        dist_util.decide(lambda: _clear(os.path.dirname(path), step))
        parts = trainer.split_again(snapshot(rows), self._mesh)
        pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending = pool.submit(self._write_sharded, path, step, parts, snapshot(rest))
        pool.shutdown(wait=False)
        if not self.asynchronous:
            self.wait()

    def _write_sharded(self, path: str, step: int, parts: Mapping[str, Any], rest: Mapping[str, Any]) -> list[str]:
        write(path, parts, self._group)
        if dist_util.rank() > 0:
            return []
        folder, name = os.path.split(path)
        names = [f"{name}/{file}" for file in files.names_in(path)]
        sizes = {name: files.stat(files.join(folder, name)).size for name in names}
        entries: dict[str, Entry] = {name: {"bytes": size, "sha256": ""} for name, size in sizes.items()}
        return [f"saved {path}", *self._write(folder, step, rest, entries)]

    def _begin(self, parts: Mapping[str, Any], folder: str, step: int) -> None:
        """Write a checkpoint, or let the thread begin with it."""
        try:
            if self.source in (files.join(folder, name) for name in (f"model{step:06d}.pt", f"shards{step:06d}")):
                logger.log(f"{self.source} is what this run resumed from, and stays as it is")
            elif dist_util.rank() == 0 and self.asynchronous:
                pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
                self._pending = pool.submit(self._write, folder, step, snapshot(parts))
                pool.shutdown(wait=False)
            elif dist_util.rank() == 0:
                parts = map_tensors(parts, lambda tensor: tensor.cpu().contiguous())
                for line in self._write(folder, step, parts):
                    logger.log(line)
        finally:
            if not self.asynchronous:
                dist_util.barrier()

    def _write(
        self, folder: str, step: int, parts: Mapping[str, Any], entries: Mapping[str, Entry] | None = None
    ) -> list[str]:
        """Write a checkpoint and remove older ones; returns the lines that the main thread logs."""
        if not self._swept:
            checkpoints.sweep(folder)
        self._swept = True
        lines = [f"saved {path}" for path in write_set(folder, step, parts, entries)]
        try:
            checkpoints.keep_last(folder, self.keep_last, self.keep_every, self.best)
        except OSError as error:  # a full folder is no reason to stop
            lines.append(f"an older checkpoint could not be removed: {error}")
        return lines

    def poll(self) -> None:
        """Log what the thread has finished, or raise what went wrong there; returns at once."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """As `poll`, when the thread has finished."""
        pending, self._pending = self._pending, None
        for line in pending.result() if pending else ():
            logger.log(line)
