"""Key-value logging: one row of named numbers per dump, and lines of text, to any number of writers.

``OPENAI_LOGDIR`` names the folder and ``OPENAI_LOG_FORMAT`` the writers of rank 0 (default "stdout,log,csv");
``OPENAI_LOG_FORMAT_MPI`` those of every other rank (default "log", which writes log-rankNNN.txt).
"""

import os
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, ClassVar, ParamSpec, TypeVar

from tqdm.auto import tqdm

from .runtime import files, launchers
from .runtime.atomic import explained
from .runtime.log_writers import (
    CSVOutputFormat as CSVOutputFormat,
    HumanOutputFormat as HumanOutputFormat,
    JSONOutputFormat as JSONOutputFormat,
    KeyValues,
    KVWriter as KVWriter,
    SeqWriter as SeqWriter,
    TensorBoardOutputFormat as TensorBoardOutputFormat,
    WandbOutputFormat as WandbOutputFormat,
    make_output_format as make_output_format,
)

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50

P = ParamSpec("P")
R = TypeVar("R")
ValueCounts = dict[str, tuple[Any, float]]  # name -> (mean, how many values it is the mean of)
Comm = Any  # an mpi4py communicator, of which `rank` and `gather` are used


class _Currents(type):
    """CURRENT of `Logger`: a thread that has set one has it to itself, the others share that of the main thread."""

    _shared: "Logger | None" = None
    _own = threading.local()

    @property
    def CURRENT(cls) -> "Logger | None":
        return getattr(cls._own, "logger", None) or cls._shared

    @CURRENT.setter
    def CURRENT(cls, logger: "Logger | None") -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main:
            cls._own.logger = logger
        if in_main or cls._shared is None:
            _Currents._shared = logger


class Logger(metaclass=_Currents):
    """Collects values until they are dumped as one row; the methods are those of the functions below.

    CURRENT is what the functions of this module write to, in each thread its own where it was set there; DEFAULT is
    what `reset` goes back to.
    """

    DEFAULT: ClassVar["Logger | None"] = None

    def __init__(self, dir: str, output_formats: Sequence[Any], comm: Comm | None = None) -> None:
        self.name2val: defaultdict[str, Any] = defaultdict(float)
        self.name2cnt: defaultdict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm
        self.unnamed = False  # whether the folder is a temporary one that nobody asked for

    def logkv(self, key: str, val: Any) -> None:
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        count = self.name2cnt[key]
        self.name2val[key] = self.name2val[key] * count / (count + 1) + val / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        """Writes the row, forgets it, and returns it; with a communicator, the row of means over all ranks."""
        row = dict(self.name2val)
        if self.comm is not None:
            row = mpi_weighted_mean(self.comm, {name: (row[name], self.name2cnt.get(name, 1)) for name in row})
            if self.comm.rank != 0:
                row["dummy"] = 1  # ranks above 0 have nothing to say, and empty rows warn
        for writer in self.output_formats:
            if isinstance(writer, KVWriter):
                writer.writekvs(row)
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def rewind(self, step: int) -> None:
        for writer in self.output_formats:
            if isinstance(writer, KVWriter):
                writer.rewind(step)

    def log(self, *args: object, level: int = INFO) -> None:
        for writer in self.output_formats if level >= self.level else ():
            if isinstance(writer, SeqWriter):
                writer.writeseq(map(str, args))

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Comm | None) -> None:
        self.comm = comm

    def get_dir(self) -> str:
        return self.dir

    def close(self) -> None:
        """Close the files of all writers."""
        for writer in self.output_formats:
            writer.close()


def mpi_weighted_mean(comm: Comm, local_name2valcount: ValueCounts) -> dict[str, float]:
    """The mean over ranks of each value, weighted by its count, on rank 0; an empty dict on the others.

    Collective. What is no number is left out, with a line on stderr.
    """
    gathered = comm.gather(local_name2valcount)
    if comm.rank != 0 or gathered is None:
        return {}
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    for name, (value, count) in (item for row in gathered for item in row.items()):
        try:
            sums[name] += float(value) * count
            counts[name] += count
        except (TypeError, ValueError):
            print(f"WARNING: no mean of {name} over ranks: {value!r} is not a number", file=sys.stderr)
    return {name: sums[name] / counts[name] for name in counts}


def get_current() -> Logger:
    """The logger that the functions of this module write to; the first call makes it if nobody configured one."""
    if Logger.CURRENT is None:
        configure()
        Logger.DEFAULT = Logger.CURRENT
    assert Logger.CURRENT is not None
    return Logger.CURRENT


def logkv(key: str, val: Any) -> None:
    """Sets a value of the row that `dumpkvs` will write; the last call for a name wins."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """As `logkv`, but the mean of all values given for a name since the last dump."""
    get_current().logkv_mean(key, val)


def logkvs(d: KeyValues) -> None:
    """Sets many values of the row at once."""
    for key, value in d.items():
        logkv(key, value)


def dumpkvs() -> dict[str, Any]:
    """Writes the row, starts a new one, and returns what was written."""
    return get_current().dumpkvs()


def rewind(step: int) -> None:
    """Drops rows of steps after this one, which a resumed run makes again, from progress.csv and progress.json."""
    get_current().rewind(step)


def getkvs() -> dict[str, Any]:
    """The row so far."""
    return get_current().name2val


def log(*args: object, level: int = INFO) -> None:
    """Writes a line of text, its parts joined by spaces, to the console and the log file."""
    get_current().log(*args, level=level)


def debug(*args: object) -> None:
    log(*args, level=DEBUG)


def info(*args: object) -> None:
    log(*args, level=INFO)


def warn(*args: object) -> None:
    log(*args, level=WARN)


def error(*args: object) -> None:
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Lines below this level are no longer written (DEBUG < INFO < WARN < ERROR < DISABLED)."""
    get_current().set_level(level)


def set_comm(comm: Comm | None) -> None:
    """From now on every dump is a collective that averages over the ranks of `comm`."""
    get_current().set_comm(comm)


def get_dir() -> str:
    """The folder of the log files, where a run also puts its checkpoints and samples."""
    return get_current().get_dir()


record_tabular = logkv
dump_tabular = dumpkvs


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Adds the seconds spent inside to the value "wait_SCOPENAME" of this row."""
    start = time.perf_counter()
    try:
        yield
    finally:
        get_current().name2val[f"wait_{scopename}"] += time.perf_counter() - start


def profile(n: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that does for every call of a function what `profile_kv` does for a block."""
    return profile_kv(n)  # a context manager made by contextlib decorates too, anew for each call


_shared_dir: str | None = None

get_rank_without_mpi_import = launchers.announced_rank


def new_dir() -> str:
    """A folder name for a run that was given none: in the temporary folder, named after the time, not made yet."""
    return os.path.join(tempfile.gettempdir(), datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f"))


def share_dir(dir: str) -> None:
    """The folder that `configure` takes where it is given none, so that all ranks of a job take the same."""
    global _shared_dir
    _shared_dir = dir


def progress_bar(*, shown: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr: redrawn all the time on a terminal, every half minute in a file or an mpiexec's pipe.

    :param shown: False for a bar that counts and draws nothing, as on all ranks but one.
    """
    return tqdm(disable=not shown, file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 30.0, **options)


def configure(
    dir: str | None = None, format_strs: Iterable[str] | None = None, comm: Comm | None = None, log_suffix: str = ""
) -> None:
    """Makes a new current logger.

    :param dir: its folder, made where it is missing; default: OPENAI_LOGDIR, else a new temporary folder.
    :param format_strs: the names of its writers; default: from the environment, see the module's first lines.
    :param comm: an mpi4py communicator, over which every dump is averaged; default: this rank's own values.
    :param log_suffix: goes before the extension of the files' names.
    """
    rank = get_rank_without_mpi_import()
    named = dir or os.environ.get("OPENAI_LOGDIR") or _shared_dir
    folder = files.local(named or new_dir())
    with explained(folder):
        os.makedirs(folder, exist_ok=True)
    suffix = log_suffix if rank == 0 else f"{log_suffix}-rank{rank:03d}"
    if format_strs is None:
        of_rank_0 = os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv")
        format_strs = (of_rank_0 if rank == 0 else os.environ.get("OPENAI_LOG_FORMAT_MPI", "log")).split(",")
    writers = [make_output_format(name, folder, suffix) for name in format_strs if name]
    current = Logger.CURRENT = Logger(dir=folder, output_formats=writers, comm=comm)
    current.unnamed = not named
    if writers:
        log(f"Logging to {folder}")


def reset() -> None:
    """Goes back to the default logger."""
    if Logger.CURRENT is not None and Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT
        log("Reset logger")


def discard() -> None:
    """Removes the folder of a run that failed, where it is a temporary one and holds nothing but the log."""
    current = Logger.CURRENT
    if current is None or not current.unnamed or not os.path.isdir(current.dir):
        return
    if set(os.listdir(current.dir)) <= {"log.txt", "progress.csv", "progress.json"}:
        current.close()
        shutil.rmtree(current.dir, ignore_errors=True)
        Logger.CURRENT = None


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Iterable[str] | None = None, comm: Comm | None = None
) -> Iterator[None]:
    """A logger of its own inside the block; afterwards the one before is current again."""
    before = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    inside = get_current()
    try:
        yield
    finally:
        inside.close()
        Logger.CURRENT = before
