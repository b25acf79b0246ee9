"""The launcher of this process, its rank and their number: torchrun, mpiexec, srun, or none (rank 0 of 1).

MPI is asked for rank, size and one broadcast of an address, nothing else; without mpiexec it is never imported.
"""

import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from .errors import WHY, as_user_error, refuse

# The environment variables in which launchers tell each process its place: rank, size, local rank. The first that are
# set decide: torchrun may itself run under srun, and mpiexec inside a Slurm job.
LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Place:
    """The place of a process among all of a job: its rank over all machines, and over those on this one.

    :param launcher: "torchrun", "mpiexec", "srun", or "" for a process without one.
    :param one_machine: all ranks are known to be on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = ""
    one_machine: bool = True


def announced_rank() -> int:
    """The rank that a launcher wrote into the environment; 0 where none did."""
    return next((int(os.environ[rank]) for _, rank, _, _ in LAUNCHERS if os.environ.get(rank)), 0)


def announced_place() -> Place:
    """The place as the environment has it, before MPI is asked."""
    for launcher, *names in LAUNCHERS:
        rank, size, local_rank = (os.environ.get(name) for name in names)
        if rank and size:
            one = Place(int(rank), int(size), int(local_rank or rank), launcher, one_machine=False)
            return one if one.size > 1 else Place()
    return Place()


def place() -> Place:
    """The place of this process; under mpiexec, MPI's own word, and the first call is a collective."""
    announced = announced_place()
    return _join_mpi(announced.size) if announced.launcher == "mpiexec" else announced


def _mpi(size: int) -> Any:
    fault = f"mpiexec started {size} ranks, but mpi4py does not work here ({WHY})"
    remedy = "run `pip install mpi4py mpich`, or start the script with torchrun or as one process"
    with as_user_error(f"{fault}: {remedy}", ImportError, RuntimeError):  # the second where there is no MPI library
        from mpi4py import MPI
    return MPI


@cache
def _join_mpi(size: int) -> Place:
    mpi = _mpi(size)
    world = mpi.COMM_WORLD
    fault = f"mpiexec started {size} ranks, but mpi4py's MPI library sees {world.size}"
    refuse((world.size != size, f"{fault}: use the mpiexec that came with mpi4py's library"))
    machine = world.Split_type(mpi.COMM_TYPE_SHARED)
    return Place(world.rank, world.size, machine.rank, "mpiexec", one_machine=machine.size == world.size)


def mpi_broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank of mpiexec."""
    return _mpi(announced_place().size).COMM_WORLD.bcast(value)


def own_host(place: Place) -> str:
    """The name under which the other ranks find this machine."""
    return os.environ.get("MASTER_ADDR") or ("127.0.0.1" if place.one_machine else socket.gethostname())


def meeting_point(place: Place) -> str:
    """HOST:PORT at which rank 0 of torchrun or srun listens: MASTER_ADDR and MASTER_PORT where they are set."""
    host, port = "127.0.0.1", 29500
    if place.launcher == "srun":
        host = _first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or host)
        step = int(os.environ.get("SLURM_JOB_ID") or 0) + int(os.environ.get("SLURM_STEP_ID") or 0)
        port = 20000 + step % 10000  # every rank derives the same, and jobs on one machine rarely share it
    return f"{os.environ.get('MASTER_ADDR') or host}:{os.environ.get('MASTER_PORT') or port}"


def _first_host(nodes: str) -> str:
    """The first machine of a Slurm list such as ``node[03-05,9],login1``: node03, or the loopback for a lone one."""
    if not re.search(r"[\[,]", nodes):
        return "127.0.0.1"
    return re.sub(r"\[([^],-]+)[^]]*]", r"\1", nodes).split(",")[0]


def end_job(code: int) -> NoReturn:
    """Ends this process at once and with it, by way of its launcher, the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")  # not imported here: a rank that joins alone would wait for the others
    if mpi is not None and announced_place().launcher == "mpiexec":
        time.sleep(0.2)  # for mpiexec to pass on what was printed, before it ends everything
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)
