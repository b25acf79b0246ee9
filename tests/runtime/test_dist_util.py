"""Ranks: real processes under mpiexec, torchrun and srun's variables; and what a single process does without any.

The ways in which a rank ends badly are tried with srun's variables (`ranks`), as such ranks start in no time; what the
other launchers make of it, with one of them.
"""

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest
import torch as th
import torch.distributed as dist
from few import few
from ranks import Nursery, free_port

from guided_diffusion import dist_util
from guided_diffusion.runtime import launchers

LAUNCHERS = {
    "mpiexec": [str(Path(sysconfig.get_path("scripts"), "mpiexec")), "-n", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
SECONDS = 150  # a job that has not ended by then hangs

COLLECTIVES = """
    import os, sys, tempfile
    import torch as th
    import torch.distributed as dist
    from guided_diffusion import dist_util, logger

    DTYPES = [th.float64, th.float16, th.bfloat16, th.int64, th.uint8, th.bool, th.complex64]

    def work(folder):
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        dist_util.setup_dist(device="cpu")
        dist_util.setup_dist(device="cpu")  # a second call changes nothing
        rank = dist_util.rank()
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before == "0,7"
        assert (rank, dist_util.world_size()) == (dist.get_rank(), 2)
        assert dist_util.local_rank() == rank
        assert dist_util.dev() == th.device("cpu")

        for dtype in DTYPES:
            mine = th.arange(6 * (rank + 1)).reshape(-1, 3).to(dtype)
            first, second = dist_util.gather(mine)
            assert first.dtype == dtype and first.shape == (2, 3) and second.shape == (4, 3)
            assert th.equal(first, second[:2]) and th.equal(mine, [first, second][rank])
        empty, full = dist_util.gather(th.ones(rank, 2, requires_grad=True))
        assert empty.shape == (0, 2) and full.tolist() == [[1, 1]] and not full.requires_grad
        assert [len(part) for part in dist_util.gather(th.ones(0))] == [0, 0]
        assert th.stack(dist_util.gather(th.tensor(rank * 2.0))).tolist() == [0, 2]

        th.manual_seed(rank)
        layers = th.nn.Sequential(th.nn.Conv2d(3, 5, 3), th.nn.BatchNorm2d(5), th.nn.Linear(7, 2).half())
        layers.to(memory_format=th.channels_last)
        values = [*layers.parameters(), *layers.buffers()]
        memory = [value.data_ptr() for value in values]
        dist_util.sync_params(iter(values))
        assert [value.data_ptr() for value in values] == memory
        assert all(value.grad_fn is None for value in values)
        th.manual_seed(0)
        expected = th.nn.Sequential(th.nn.Conv2d(3, 5, 3), th.nn.BatchNorm2d(5), th.nn.Linear(7, 2).half())
        assert all(map(th.equal, values, [*expected.parameters(), *expected.buffers()]))

        assert dist_util.broadcast_object({"from": rank, "list": [rank]}) == {"from": 0, "list": [0]}
        assert dist_util.gather_objects({"from": rank}) == [{"from": 0}, {"from": 1}]
        dist_util.barrier()

        parts = [th.empty(2) for _ in range(2)]
        dist.all_gather(parts, th.full([2], float(rank)))
        assert th.stack(parts).tolist() == [[0, 0], [1, 1]]

        logger.configure()
        folders = [None, None]
        dist.all_gather_object(folders, logger.get_dir())
        assert folders[0] == folders[1] and os.path.dirname(folders[0]) == tempfile.gettempdir()
        logger.log(f"hello from {rank}")
        open(os.path.join(folder, f"{rank}"), "w").write(logger.get_dir())

    dist_util.run(work, sys.argv[1])
    assert not dist.is_initialized()
"""

FAILURES = """
    import os, signal, sys, time
    import torch as th
    from guided_diffusion import dist_util

    LOST = int(os.environ.get("LOST", "1"))

    def fail(how):
        if how == "raise":
            raise RuntimeError("the reason")
        if how == "mistake":
            dist_util.load_state_dict("no-such-file.pt")
        if how == "exit":
            sys.exit(3)
        if how == "quiet exit":
            sys.exit()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)

    def work(how):
        if how == "early" and os.environ.get("RANK", os.environ.get("PMI_RANK")) == "1":
            raise RuntimeError("the reason")
        dist_util.setup_dist(device="cpu", timeout=float(os.environ.get("TIMEOUT", "10")))
        open(f"process-{os.getpid()}", "w").close()
        dist_util.barrier()
        if dist_util.rank() == LOST:
            fail(how)
        dist_util.barrier()
        time.sleep(300)

    dist_util.run(work, sys.argv[1])
"""


def written(tmp_path: Path, code: str) -> Path:
    """`code` as a script."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(code))
    return script


def launch(tmp_path: Path, launcher: Nursery | list[str], code: str, *args: object, ranks: int = 2, **environment: str):
    """Runs `code` as a script in an empty folder, and waits for its end; a nursery stands for srun."""
    script = written(tmp_path, code)
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = {"TMPDIR": str(temporary), **environment}
    if isinstance(launcher, Nursery):
        options = {"ranks": ranks, "cwd": tmp_path, "timeout": SECONDS, "OPENAI_LOGDIR": ""}
        return launcher.run([script, *args], **options, **environment)
    variables = {**os.environ, **environment}
    del variables["OPENAI_LOGDIR"]
    return subprocess.run(
        [*launcher, str(script), *map(str, args)],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@contextlib.contextmanager
def started(tmp_path: Path, launcher: Nursery, code: str, *args: object, **environment: str):
    """The same job while it runs; at the end of the block all of it is killed."""
    argv = [str(written(tmp_path, code)), *map(str, args)]
    job = launcher.start(argv, cwd=tmp_path, **environment)
    try:
        yield job
    finally:
        for pid in processes(tmp_path):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        job.kill()
        job.wait(SECONDS)


def processes(folder: Path) -> list[int]:
    """The ranks that have begun in a folder."""
    return [int(path.name.partition("-")[2]) for path in folder.glob("process-*")]


def survivors(folder: Path):
    """A function that lists which of a job's two ranks run, a stopped one left out; waits until both have begun."""
    end = time.monotonic() + SECONDS
    while len(processes(folder)) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    return lambda: [pid for pid in processes(folder) if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZTX"
    except OSError:
        return False


def assert_gone(folder: Path) -> None:
    """None of the processes is left, stopped ones included; to be killed they may take a moment."""
    end = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in processes(folder)):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("launcher", few(["mpiexec", "torchrun", "srun"], ["mpiexec", "srun"]))
def test_two_ranks_exchange_and_log_to_one_folder(tmp_path, launcher, ranks):
    job = launch(tmp_path, LAUNCHERS.get(launcher, ranks), COLLECTIVES, tmp_path, CUDA_VISIBLE_DEVICES="0,7")
    assert job.returncode == 0, job.stdout + job.stderr
    folder = Path((tmp_path / "0").read_text())
    assert folder == Path((tmp_path / "1").read_text())
    assert folder.parent == tmp_path / "temporary"
    assert sorted(path.name for path in folder.iterdir()) == ["log-rank001.txt", "log.txt", "progress.csv"]
    assert (folder / "log.txt").read_text() == f"Logging to {folder}\nhello from 0\n"
    assert (folder / "log-rank001.txt").read_text() == f"Logging to {folder}\nhello from 1\n"
    assert job.stdout.count("hello") == 1


@pytest.mark.parametrize(
    ("launcher", "how", "code", "message"),
    [
        ("srun", "raise", 1, "RuntimeError: the reason"),
        ("srun", "mistake", 2, "rank 1 of 2: error: 'no-such-file.pt' cannot be used (No such"),
        ("srun", "exit", 3, "rank 1 of 2: exit: 3"),
        ("srun", "quiet exit", 1, "rank 0 of 2: error: a collective failed"),
        pytest.param("mpiexec", "exit", 3, "rank 1 of 2: exit: 3", marks=pytest.mark.slow),
        pytest.param("mpiexec", "early", 1, "rank 1 of 2: failed", marks=pytest.mark.slow),
        pytest.param("torchrun", "exit", 1, "rank 1 of 2: exit: 3", marks=pytest.mark.slow),
    ],
)
def test_one_rank_that_ends_badly_ends_the_job(tmp_path, ranks, launcher, how, code, message):
    job = launch(tmp_path, LAUNCHERS.get(launcher, ranks), FAILURES, how)
    assert message in job.stderr
    assert job.returncode == code


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_rank_that_is_killed_ends_the_job(tmp_path, launcher):
    """Which of the launcher and the other rank notices first, and so what is printed, is open."""
    assert launch(tmp_path, LAUNCHERS[launcher], FAILURES, "kill").returncode != 0


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_where_the_launcher_does_not_notice(tmp_path, ranks, lost):
    job = launch(tmp_path, ranks, FAILURES, "kill", LOST=str(lost))
    assert job.returncode != 0
    assert f"rank {1 - lost} of 2: error: a collective failed (" in job.stderr
    assert "Traceback" not in job.stderr


def test_a_rank_waits_for_one_that_stops_until_the_time_out_of_a_collective(tmp_path, ranks):
    with started(tmp_path, ranks, FAILURES, "stop", TIMEOUT="0.05") as job:
        running = survivors(tmp_path)
        end = time.monotonic() + SECONDS
        while running():
            assert time.monotonic() < end
            time.sleep(0.05)
        said = job.errors.read_text()
    assert "rank 0 of 2: error: a collective failed (" in said
    assert "--dist_timeout" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "lost"),
    [("mpiexec", 1), ("mpiexec", 0), ("torchrun", 1)],  # torchrun itself waits 30 s before it kills what is stopped
)
def test_a_rank_that_stops_ends_the_job_after_the_time_out_of_a_collective(tmp_path, launcher, lost):
    job = launch(tmp_path, LAUNCHERS[launcher], FAILURES, "stop", LOST=str(lost), TIMEOUT="0.05")
    assert job.returncode != 0
    assert f"rank {1 - lost} of 2: error: a collective failed (" in job.stderr
    assert "--dist_timeout" in job.stderr
    assert len(processes(tmp_path)) == 2
    assert_gone(tmp_path)


def test_mpiexec_without_mpi4py_is_refused_with_the_command_that_helps(tmp_path, ranks):
    code = "import os, sys; sys.modules['mpi4py'] = None; del os.environ['SLURM_NTASKS']\n" + textwrap.dedent(FAILURES)
    job = launch(tmp_path, ranks, code, "raise", ranks=1, PMI_RANK="0", PMI_SIZE="2")
    assert job.returncode == 2
    assert job.stderr.startswith("rank 0 of 2: error: mpiexec started 2 ranks, but mpi4py does not work here")
    assert "`pip install mpi4py mpich`" in job.stderr
    assert job.stderr.count("\n") == 1


def test_mpi4py_without_an_mpi_library_counts_as_missing(monkeypatch, tmp_path):
    package = tmp_path / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(ValueError, match=r"cannot load MPI library.*pip install mpi4py mpich"):
        dist_util.setup_dist()
    assert not dist.is_initialized()


def test_ranks_that_never_arrive_are_named_instead_of_waited_for(monkeypatch):
    monkeypatch.setattr(dist_util, "JOIN_TIMEOUT", dist_util.timedelta(seconds=1))
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TimeoutError, match="rank 0: srun announced 2 ranks, but not all of them arrived within 1 s"):
        dist_util.setup_dist(device="cpu")
    assert not dist.is_initialized()


def test_unequal_devices_and_shared_gpus_are_refused():
    dist_util._refuse_unequal(["cpu", "cpu", "cpu"])
    dist_util._refuse_unequal(["cuda GPU-1 of a", "cuda GPU-2 of a", "cuda GPU-1 of b"])
    with pytest.raises(ValueError, match="rank 0: cuda GPU-1 of a, rank 1: cpu"):
        dist_util._refuse_unequal(["cuda GPU-1 of a", "cpu"])
    with pytest.raises(ValueError, match=r"ranks 0 and 2 share one GPU \(cuda GPU-1 of a\)"):
        dist_util._refuse_unequal(["cuda GPU-1 of a", "cuda GPU-2 of a", "cuda GPU-1 of a"])
    with pytest.raises(ValueError, match=r"ranks 0 and 1 share one GPU \(mps\)"):
        dist_util._refuse_unequal(["mps", "mps"])


RESTARTED = '''
    """The training command; in its first life rank 1 is killed in the middle of a step."""
    import os, signal, sys
    from guided_diffusion import dist_util, train_util
    from guided_diffusion.commands import image_train

    class Mortal(train_util.TrainLoop):
        def run_step(self, batch, cond):
            if self.updates == 4 and dist_util.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            super().run_step(batch, cond)

    train_util.TrainLoop = Mortal
    image_train.main(sys.argv[1:])
'''
TINY = "--image_size=8 --num_channels=32 --num_res_blocks=1 --channel_mult=1 --attention_resolutions= --dropout=0.1"
STEPS = "--diffusion_steps=40 --num_workers=0 --batch_size=2 --max_steps=6 --save_interval=3 --log_interval=1 --lr=1e-3"


@pytest.mark.slow
def test_torchrun_starts_a_run_again_and_it_ends_as_if_nothing_had_been(tmp_path, ranks):
    emoji = Path(__file__).parents[2] / "datasets" / "emoji64.zip"
    torchrun = [*LAUNCHERS["torchrun"], "--max-restarts", "1"]
    flags = [*TINY.split(), *STEPS.split(), f"--data_dir={emoji}", "--ema_rate=0.5", "--resume_checkpoint=auto"]
    falling = launch(tmp_path, torchrun, RESTARTED, *flags, f"--log_dir={tmp_path / 'falling'}")
    assert falling.returncode == 0, falling.stdout + falling.stderr
    assert "resuming at step 3" in falling.stdout
    immortal = {"TORCHELASTIC_RESTART_COUNT": "1"}
    unbroken = launch(tmp_path, ranks, RESTARTED, *flags, f"--log_dir={tmp_path / 'unbroken'}", **immortal)
    assert unbroken.returncode == 0, unbroken.stdout + unbroken.stderr
    assert "resuming" not in unbroken.stdout
    for name in ("model", "ema_0.5_", "opt", "state"):
        one, other = ((tmp_path / run / f"{name}000006.pt").read_bytes() for run in ("falling", "unbroken"))
        assert one == other, name
    losses = [[(row["step"], row["loss"]) for row in table(tmp_path / run)] for run in ("falling", "unbroken")]
    assert losses[0] == losses[1]


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, launchers.Place()),
        ({"RANK": "3"}, launchers.Place()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, launchers.Place()),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, launchers.Place()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, launchers.Place(3, 8, 1, "torchrun", False)),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            launchers.Place(3, 8, 1, "mpiexec", False),
        ),
        ({"PMI_RANK": "3", "PMI_SIZE": "8"}, launchers.Place(3, 8, 3, "mpiexec", False)),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
            launchers.Place(3, 8, 1, "srun", False),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, launchers.Place()),
        ({"SLURM_NTASKS": "8"}, launchers.Place()),
    ],
)
def test_the_place_is_what_the_launcher_announced(monkeypatch, variables, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launchers.announced_place() == place


@pytest.mark.parametrize(
    ("variables", "point"),
    [
        ({}, "127.0.0.1:29500"),
        ({"MASTER_ADDR": "head", "MASTER_PORT": "1234"}, "head:1234"),
        ({"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_JOB_NODELIST": "lonely"}, "127.0.0.1:23458"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[03-05,9],login1"}, "node03:20007"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a-1,b-[2,3]"}, "a-1:20007"),
        ({"SLURM_JOB_NODELIST": "r[1-2]n[4,8]", "SLURM_STEP_NODELIST": "r[2,3]n[8-9]"}, "r2n8:20000"),
        ({"SLURM_JOB_NODELIST": "a[1-2]", "MASTER_ADDR": "head"}, "head:20000"),
    ],
)
def test_ranks_meet_where_the_environment_says(monkeypatch, variables, point):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = launchers.Place(0, 2, 0, "srun" if "SLURM_JOB_NODELIST" in variables else "torchrun")
    assert launchers.meeting_point(place) == point


def test_other_machines_are_told_a_name_they_can_reach(monkeypatch):
    assert launchers.own_host(launchers.Place(one_machine=True)) == "127.0.0.1"
    assert launchers.own_host(launchers.Place(one_machine=False)) == socket.gethostname()
    monkeypatch.setenv("MASTER_ADDR", "head")
    assert launchers.own_host(launchers.Place(one_machine=False)) == "head"


def test_one_process_needs_neither_mpi4py_nor_setup(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    parameter = th.nn.Parameter(th.ones(2))
    for joined in (False, True):
        if joined:
            dist_util.setup_dist(device="cpu")
        assert dist.is_initialized() == joined
        assert (dist_util.rank(), dist_util.world_size(), dist_util.local_rank()) == (0, 1, 0)
        dist_util.barrier()
        dist_util.sync_params([parameter])
        [gathered] = dist_util.gather(parameter)
        assert gathered is parameter
        assert dist_util.broadcast_object(parameter) is parameter
        assert dist_util.gather_objects("mine") == ["mine"]


def test_one_process_has_a_group_for_code_that_asks_for_one():
    dist_util.setup_dist()
    dist_util.setup_dist()
    parts = [th.empty(2)]
    dist.all_gather(parts, th.arange(2.0))
    assert parts[0].tolist() == [0, 1]
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)


def test_the_device_is_the_one_asked_for():
    assert dist_util.dev().type == ("cuda" if th.cuda.is_available() else "cpu")
    dist_util.setup_dist(device="cpu")
    assert dist_util.dev() == th.device("cpu")
    for wanted in ("toaster", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{wanted}' cannot be used, torch sees [0-9]+ GPUs.*: give cpu"):
            dist_util.setup_dist(device=wanted)
    assert dist_util.dev() == th.device("cpu")


def test_a_state_dict_is_read_back_and_nothing_is_run_by_it(tmp_path):
    path = tmp_path / "model000001.pt"
    th.save({"weight": th.arange(3.0), "step": 1}, path)
    state = dist_util.load_state_dict(str(path), map_location="cpu")
    assert state["weight"].tolist() == [0, 1, 2]
    assert state["step"] == 1
    assert dist_util.load_state_dict(path)["step"] == 1
    th.save({"model": th.nn.Linear(1, 1)}, path)
    with pytest.raises(Exception, match="weights_only"):
        dist_util.load_state_dict(path)
    assert dist_util.load_state_dict(path, weights_only=False)["model"].in_features == 1


def test_a_remote_state_dict_comes_through_blobfile(monkeypatch, tmp_path):
    th.save([1, 2], tmp_path / "a.pt")
    bucket = {"gs://bucket/a.pt": tmp_path / "a.pt"}
    monkeypatch.setattr("blobfile.BlobFile", lambda path, mode, streaming: bucket[path].open(mode))
    assert dist_util.load_state_dict("gs://bucket/a.pt") == [1, 2]


def test_a_command_that_succeeds_just_returns():
    done = []
    dist_util.run(lambda *args: done.append(args), 1, "two")
    assert done == [(1, "two")]


def test_a_users_mistake_is_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        dist_util.run(dist_util.load_state_dict, "no/such/file.pt")
    assert end.value.code == 2
    said = "error: 'no/such/file.pt' cannot be used (No such file or directory): look at its path and its permissions\n"
    assert capsys.readouterr().err == said
    with pytest.raises(SystemExit) as end:
        dist_util.run(lambda: dist_util.setup_dist(device="toaster"))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: device 'toaster' cannot be used")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(ValueError, match="invalid literal"):
        dist_util.run(lambda: int("x"))
    with pytest.raises(KeyError):
        dist_util.run(lambda: {}["x"])
    monkeypatch.setenv("GUIDED_DIFFUSION_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        dist_util.run(dist_util.load_state_dict, "no/such/file.pt")
    assert capsys.readouterr().err == ""


def test_exits_and_interrupts_keep_their_codes(capsys):
    def interrupted():
        raise KeyboardInterrupt

    for code in (None, 0, 3, "a message"):
        with pytest.raises(SystemExit) as end:
            dist_util.run(sys.exit, code)
        assert end.value.code == code
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as end:
        dist_util.run(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
