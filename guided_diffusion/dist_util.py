"""One to many processes ("ranks") that work on the same thing: what they exchange, and how they end together.

torchrun, mpiexec, srun and a plain ``python`` start the same scripts. Every function here also works in a process that
never called `setup_dist`: it is then rank 0 of 1.
"""

import io
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, TypeVarTuple, cast

import blobfile as bf  # noqa: F401 - what a star import of the original's gives
import torch as th
import torch.distributed as dist

from . import logger
from .runtime import files, launchers
from .runtime.errors import UserError, refuse, sentence as sentence_of
from .runtime.launchers import Place

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

JOIN_TIMEOUT = timedelta(minutes=5)  # for all ranks to have started
COLLECTIVE_TIMEOUT = 10.0  # minutes for the slowest rank to reach a collective: rank 0 may be merging files
GPUS_PER_NODE, SETUP_RETRY_COUNT = 8, 3  # names of the originals, without effect

_joining = threading.Lock()  # commands may run in threads of one process
_device: th.device | None = None


def setup_dist(*, device: str = "", timeout: float = COLLECTIVE_TIMEOUT) -> None:
    """Joins the other ranks; afterwards torch.distributed is initialised, in a single process too (without a port).

    Where a group exists already, only the device is set.

    :param device: where this rank computes: "cpu", "cuda" (each rank its own), "cuda:1" or "mps"; default: cuda where
        torch sees one, else cpu. CUDA_VISIBLE_DEVICES is respected and never written.
    :param timeout: minutes after which a collective that a rank has not reached fails on the others.
    :raises ValueError: if there is no such device, two ranks share a GPU, or the ranks have different kinds of device.
    :raises TimeoutError: if some rank does not arrive.
    """
    global _device
    with _joining:
        _device = _choose_device(device)
        if _initialized():
            return
        if (place := launchers.place()).size == 1:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            _join(place, _device, timedelta(minutes=timeout))
            logger.share_dir(broadcast_object(logger.new_dir()))


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _choose_device(name: str) -> th.device:
    try:
        device = th.device(name or ("cuda" if th.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = th.device("meta")  # as unsupported as a name that torch does not know
    count = th.cuda.device_count()
    usable = {"cpu": True, "cuda": (device.index or 0) < count, "mps": th.backends.mps.is_available()}
    if not usable.get(device.type):
        gpus = f"torch sees {count} GPUs" + " within CUDA_VISIBLE_DEVICES" * ("CUDA_VISIBLE_DEVICES" in os.environ)
        raise UserError(f"device {name!r} cannot be used, {gpus}: give cpu, cuda, cuda:N or mps, or leave it out")
    return th.device("cuda", local_rank() % count) if device == th.device("cuda") else device


def _join(place: Place, device: th.device, timeout: timedelta) -> None:
    try:
        store, description = _meet(place), device.type
        if device.type == "cuda":
            gpu = getattr(th.cuda.get_device_properties(device), "uuid", device.index)
            description = f"{device.type} {gpu} of {socket.gethostname()}"
        store.set(f"rank{place.rank}", description)
        descriptions = [store.get(f"rank{rank}").decode() for rank in range(place.size)]
    except dist.DistError as error:
        raise TimeoutError(
            f"rank {place.rank}: {place.launcher} announced {place.size} ranks, but not all of them arrived within "
            f"{JOIN_TIMEOUT.total_seconds():.0f} s ({str(error).splitlines()[0]}): look for the rank that failed"
        ) from error
    _refuse_unequal(descriptions)
    if device.type == "cuda":
        th.cuda.set_device(device)
    # collectives of tensors where they are: gloo for the CPU's, nccl (where torch has it) for the GPU's
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)


def _meet(place: Place) -> dist.Store:
    """A store that all ranks reach; rank 0 holds its port from here on, so that no other job can take it."""
    if place.launcher != "mpiexec":
        url = f"tcp://{launchers.meeting_point(place)}"
        store, _, _ = next(dist.rendezvous(url, place.rank, place.size, timeout=JOIN_TIMEOUT))
        # torchrun's store survives its restarts of the ranks, with all that they wrote
        return dist.PrefixStore(f"guided_diffusion{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", store)
    if place.rank > 0:
        host, port = launchers.mpi_broadcast(None)
        return dist.TCPStore(host, port, place.size, False, timeout=JOIN_TIMEOUT)
    store = dist.TCPStore("localhost", 0, place.size, True, timeout=JOIN_TIMEOUT, wait_for_workers=False)
    launchers.mpi_broadcast((launchers.own_host(place), store.port))
    return store


def _refuse_unequal(descriptions: list[str]) -> None:
    """Fails on every rank alike, by the descriptions of all ranks' devices, before the first collective would hang."""
    kinds = {text.split()[0] for text in descriptions}
    shown = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(descriptions))
    refuse((len(kinds) > 1, f"the ranks have different kinds of device ({shown}): give all of them the same --device"))
    for rank, text in enumerate(descriptions):
        first, remedy = descriptions.index(text), "start at most one rank per visible GPU, or give --device cpu"
        refuse((first != rank and text != "cpu", f"ranks {first} and {rank} share one GPU ({text}): {remedy}"))


def dev() -> th.device:
    """The device of this rank, as `setup_dist` chose it."""
    return _choose_device("") if _device is None else _device


@contextmanager
def computing_on(device: str = "") -> Iterator[None]:
    """Inside the block `dev()` is this device; '' leaves it as it is."""
    global _device
    before = _device
    _device = _choose_device(device) if device else dev()
    try:
        yield
    finally:
        _device = before


def rank() -> int:
    """The number of this process among all, 0 .. world_size() - 1."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """How many processes take part."""
    return dist.get_world_size() if _initialized() else 1


def local_rank() -> int:
    """The number of this process among those on the same machine."""
    return launchers.place().local_rank


def barrier() -> None:
    """Waits until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_object(obj: T) -> T:
    """Rank 0's object, on every rank; collective. Anything that pickles."""
    if world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def decide(work: Callable[[], T]) -> T:
    """The result of work that rank 0 does, on every rank; collective. An error of rank 0 is one on every rank.

    :raises UserError: if rank 0 raised a ValueError or an OSError.
    """
    answer: tuple[T | None, str] = (None, "")
    if rank() == 0:
        try:
            answer = (work(), "")
        except (ValueError, OSError) as error:
            answer = (None, str(error))
    result, sentence = broadcast_object(answer)
    refuse((sentence, sentence))
    return cast(T, result)


def gather_objects(obj: T) -> list[T]:
    """The objects of all ranks by rank, on every rank; collective. Anything that pickles."""
    objects = [obj] * world_size()
    if world_size() > 1:
        dist.all_gather_object(objects, obj)
    return objects


def gather(tensor: th.Tensor) -> list[th.Tensor]:
    """The tensors of all ranks by rank, on every rank; collective. They may differ in size along dim 0 only."""
    if world_size() == 1:
        return [tensor]
    if tensor.dim() == 0:
        return [part[0] for part in gather(tensor[None])]
    lengths = [int(length) for length in _gather_equal(th.tensor([len(tensor)], device=tensor.device))]
    padding = tensor.new_zeros(max(lengths) - len(tensor), *tensor.shape[1:])
    parts = _gather_equal(th.cat([tensor.detach(), padding]))
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def _gather_equal(tensor: th.Tensor) -> list[th.Tensor]:
    parts = [th.empty_like(tensor) for _ in range(world_size())]
    # as bytes, which every backend can send, whatever the dtype
    *theirs, ours = (part.view(-1).view(th.uint8) for part in (*parts, tensor))
    dist.all_gather(theirs, ours)
    return parts


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Overwrites parameters or buffers with rank 0's, in place and without a graph; collective."""
    if world_size() == 1:
        return
    with th.no_grad():
        for tensor in params:
            values = tensor.reshape(-1)  # a copy where the memory is in another order
            dist.broadcast(values, 0)
            tensor.copy_(values.view_as(tensor))


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """What `torch.save` wrote to a local or remote file; not collective, each caller reads the file itself.

    Only tensors and plain values are read (``weights_only=True``) unless told otherwise.

    :param kwargs: for `torch.load`.
    """
    kwargs.setdefault("weights_only", True)
    path = files.resolve(path)
    if files.is_remote(path):
        with files.open_blob(path) as file:
            return th.load(io.BytesIO(file.read()), **kwargs)
    return th.load(path, **kwargs)


def leave() -> None:
    """Leaves the group, if there is one: collectives that others still wait in fail at once."""
    if _initialized():
        # Destroying the group waits, with the interpreter locked, for gloo's threads; these need the interpreter to let
        # go of the last collective's tensors. Seen to hang about once in thirty runs without this moment for them.
        time.sleep(0.1 if world_size() == 1 else 0.2)
        dist.destroy_process_group()


def run(main: Callable[[*Ts], object], *args: *Ts) -> None:
    """Calls ``main(*args)`` as the whole of a command: when one rank fails, all end.

    A `UserError` or OSError is one line "error: ...", exit code 2, without a traceback (unless
    GUIDED_DIFFUSION_DEBUG=1). Too little memory is one line too, with code 1; anything else keeps its traceback and
    ends with code 1. With several ranks the message names the rank, and `sys.exit` or an interrupt on one rank ends the
    others too.
    """
    try:
        launchers.place()  # under mpiexec all ranks join MPI here: only then can one of them end the job
        main(*args)
        barrier()
    except BaseException as error:
        _report(error)
        raise
    finally:
        if world_size() > 1:
            leave()  # a rank that ends early must not keep the others waiting


def _report(error: BaseException) -> None:
    """Prints what went wrong; ends the process where Python's own way would print or wait otherwise."""
    place = launchers.announced_place()
    ranks = max(place.size, world_size())
    code, sentence = exit_of(error)
    if ranks > 1 and code != 0:
        message = sentence or "".join(["failed\n", *traceback.format_exception(error)])
        sys.stderr.write(f"rank {place.rank} of {ranks}: {message}\n")  # at once: other ranks write there too
        launchers.end_job(code)
    if code == 2 and ranks == 1:
        logger.discard()
    if sentence and not isinstance(error, SystemExit):
        print(sentence, file=sys.stderr)
        raise SystemExit(code) from error


def exit_of(error: BaseException) -> tuple[int, str]:
    """The exit code of a command that an error ends, and the line in place of its traceback; '' where it needs that."""
    debug = os.environ.get("GUIDED_DIFFUSION_DEBUG") == "1"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return code, "" if debug else f"exit: {error.code}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "" if debug else "interrupted"  # what a shell reports for Ctrl-C
    code, sentence, text = 1, "", str(error)
    if isinstance(error, UserError | OSError):
        code, sentence = 2, sentence_of(error)
    elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in text):
        cause = text.partition("\n")[0].partition("] ")[2].partition(". ")[0] or text
        sentence = f"a collective failed ({cause}): another rank has ended, or is slower than --dist_timeout allows"
    elif is_out_of_memory(error):
        detail = text.partition("\n")[0] or type(error).__name__
        sentence = f"out of memory ({detail}): take a smaller --batch_size or, in training, --microbatch"
    return code, f"error: {sentence}" if sentence and not debug else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for in vain, which torch has no class of its own for on a CPU."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError | th.cuda.OutOfMemoryError)
