"""What every test starts from: one thread, fixed seeds, a fresh logger, no process group, no launcher's variables."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it
os.environ.pop("PYTHONUNBUFFERED", None)  # with it a line of one rank may stand within that of another

import gc
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch as th
from ranks import Nursery

th.set_num_threads(1)
gc.disable()  # until all is collected, see below

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = (
    "MPI_",
    "PMI_",
    "PMIX_",
    "OMPI_",
    "SLURM_",
    "TORCHELASTIC_",
    "OPENAI_",
    "DIFFUSION_",
    "GUIDED_DIFFUSION_",
)


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: the garbage collector need not look at a million objects time and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def clean_state(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees what another left in the generators, the environment, the logger or torch.distributed."""
    for name in list(os.environ):
        if name in LAUNCHER_VARIABLES or name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path_factory.getbasetemp() / "default-log"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # for the scripts that tests start
    random.seed(0)
    np.random.seed(0)
    th.manual_seed(0)
    default_dtype = th.get_default_dtype()
    yield
    th.set_default_dtype(default_dtype)
    close_logger()
    leave_group()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts ranks without the seconds in which torch is imported."""
    nursery = Nursery(tmp_path_factory.mktemp("ranks"))
    yield nursery
    nursery.close()


def close_logger() -> None:
    """Forgets the current and the default logger of this process, where one was made."""
    logger = sys.modules.get("guided_diffusion.logger")
    if logger is None:
        return
    for current in {logger.Logger.CURRENT, logger.Logger.DEFAULT} - {None}:
        current.close()
    logger.Logger.CURRENT = logger.Logger.DEFAULT = None


def leave_group() -> None:
    """Leaves the group of this process, if it is in one."""
    dist_util = sys.modules.get("guided_diffusion.dist_util")
    if dist_util is None:
        return
    if th.distributed.is_initialized() and dist_util.world_size() == 1:
        group = th.distributed.group.WORLD
        if group._get_sequence_number_for_group() == 0:  # no exchange, and so no thread to wait for as `leave` does
            th.distributed.destroy_process_group()
    dist_util.leave()
