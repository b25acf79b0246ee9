"""Writing the checkpoints of a run, at once or while training goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch as th

from .. import dist_util, logger
from ..runtime import paths
from . import checkpoints, manifest
from .run_state import RunState

# ---- the originals' functions, which research code replaces in train_util


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


# ---- writing


def write_set(folder: str, step: int, parts: Mapping[str, Any]) -> Iterator[str]:
    """Write the files of a step one after the other, their manifest last, and yield the path of each.

    :param parts: the content of each file, by the name before the step; "lora" is a folder, of names and contents.
    """
    before = checkpoints.sets_in(folder).get(step)
    if before is not None:  # what a killed process or a damaged disk left: nothing of it mixes with the new files
        checkpoints.remove(before)
    entries = {}
    for part, value in parts.items():
        name = f"{part}{step:06d}"
        files = {f"{name}/{file}": item for file, item in value.items()} if part == "lora" else {f"{name}.pt": value}
        for file, item in files.items():
            entries[file] = checkpoints.save(paths.join(folder, file), item)
            yield paths.join(folder, file)
    yield manifest.write(folder, step, entries)


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
    :param keep_last: how many complete ones stay in the folder; 0: all.
    """

    def __init__(self, *, asynchronous: bool = False, keep_last: int = 0) -> None:
        self.asynchronous, self.keep_last = asynchronous, keep_last
        self.source = ""  # the weights that were resumed from: never written again
        self._pending: Future[list[str]] | None = None
        self._swept = False

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
        parts = state.parts(step)
        try:
            self.wait()
        finally:  # what was not written before is no reason not to write this
            self._begin(parts, folder, step)

    def _begin(self, parts: Mapping[str, Any], folder: str, step: int) -> None:
        """Write a checkpoint, or let the thread begin with it."""
        try:
            if self.source == paths.join(folder, f"model{step:06d}.pt"):
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

    def _write(self, folder: str, step: int, parts: Mapping[str, Any]) -> list[str]:
        """Write a checkpoint and remove older ones; returns the lines that the main thread logs."""
        if not self._swept:
            checkpoints.sweep(folder)
            self._swept = True
        lines = [f"saved {path}" for path in write_set(folder, step, parts)]
        try:
            checkpoints.keep_last(folder, self.keep_last)
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
