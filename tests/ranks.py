"""Ranks that need not import torch first: a process that has done so is forked for each.

They are processes of their own with the variables that srun gives, and meet over sockets; importing torch would take
them longer than their work. mpiexec and torchrun start theirs anew in runtime/test_dist_util.py,
evaluation/test_evaluator.py and faults/.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


def free_port() -> str:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@dataclass(frozen=True)
class Job:
    """Several ranks, and the process `pid` that started them and ends with the worst of their exit codes."""

    nursery: Nursery
    pid: int
    output: Path
    errors: Path

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """The end of it; what is left after so many seconds is killed, and an error."""
        code = self.nursery.ask(wait=self.pid, timeout=timeout)
        if code is None:
            self.kill()
            self.nursery.ask(wait=self.pid, timeout=timeout)
            raise TimeoutError(f"{self.errors.read_text(errors='replace')[-3000:]}")
        output, errors = (path.read_text(errors="replace") for path in (self.output, self.errors))
        return subprocess.CompletedProcess([], code, output, errors)

    def kill(self) -> None:
        """SIGKILL to all of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Nursery:
    """The process that is forked; it is started when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process: subprocess.Popen[str] | None = None

    def start(self, argv: list[Any], *, ranks: int = 2, cwd: Path | None = None, **variables: str) -> Job:
        """Let each rank run the script ``argv[0]``, with the environment of this process and `variables`."""
        self.count += 1
        output, errors = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        environment = {**os.environ, "SLURM_NTASKS": str(ranks), "MASTER_PORT": free_port(), **variables}
        pid = self.ask(
            argv=[str(word) for word in argv],
            ranks=ranks,
            cwd=str(cwd or self.folder),
            files=[str(output), str(errors)],
            environment=environment,
        )
        return Job(self, pid, output, errors)

    def run(self, argv: list[Any], *, timeout: float = 100, **options: Any) -> subprocess.CompletedProcess[str]:
        """The same to its end."""
        return self.start(argv, **options).wait(timeout)

    def ask(self, **request: Any) -> Any:
        """What the process answers."""
        if self.process is None:
            argv, pipe = [sys.executable, __file__], subprocess.PIPE
            self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate(timeout=20)


def serve() -> list[str]:
    """Answer requests; returns, in each rank, its command line."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = waited_for(request["wait"], request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                start_ranks(request)
                return list(request["argv"])
        print(json.dumps(answer), flush=True)
    os._exit(0)


def waited_for(pid: int, timeout: float) -> int | None:
    """An exit code, as a shell counts; None after so many seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return abs(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    return None


def start_ranks(request: dict[str, Any]) -> None:
    """Be the launcher, which ends with its ranks; returns in each rank."""
    os.setsid()
    for number, name in enumerate([os.devnull, *request["files"]]):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # it is another one
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.environ.update({"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
            return
        pids.append(pid)
    os._exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids))


def run_script(argv: list[str]) -> int:
    """Be ``python SCRIPT ...``; returns its exit code."""
    sys.argv[:] = argv
    sys.path[:1] = [str(Path(argv[0]).parent), sys.path[0]]  # and what tests share, for programs that import one
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End as Python does, but for freeing every object that torch made, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    # What others wrote and takes long to import. The package itself is imported by each rank, which may alter it.
    import blobfile  # noqa: F401
    import numpy as np
    import PIL.Image  # noqa: F401
    import torch._dynamo
    import torch.distributed  # noqa: F401 - and the line before, which is what the first optimizer imports
    import tqdm  # noqa: F401

    argv = serve()
    np.random.seed()  # each rank its own, as `random` does by itself
    leave(run_script(argv))
