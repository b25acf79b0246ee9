"""Saving that cannot tear: what is complete, what cut, altered and interrupted sets come to, and full disks."""

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch as th

from guided_diffusion import logger
from guided_diffusion.data.items import ignore_signals
from guided_diffusion.runtime import atomic
from guided_diffusion.runtime.atomic import replacing
from guided_diffusion.runtime.npz import save_npz
from guided_diffusion.training import checkpoints, interruption, manifests
from guided_diffusion.training.saving import Saver, map_tensors, snapshot
from guided_diffusion.training.weights import Hashed

DAMAGED = "the checkpoint of step 6 is passed over: its manifest is damaged, or not one of format 1 for this step"
KINDS = ("state", "ema_0.25_", "opt", "model")


class State:
    """What a run has to save: a tensor that tells its step."""

    def __init__(self):
        self.weights = th.arange(1000.0)

    def parts(self, step):
        return {kind: {"kind": kind, "values": [self.weights]} for kind in KINDS}


@pytest.fixture
def run(tmp_path):
    """A folder with the sets of steps 2, 4 and 6."""
    folder = tmp_path / "run"
    logger.configure(dir=str(tmp_path / "log"), format_strs=["log"])
    for step in (2, 4, 6):
        Saver().save(State(), str(folder), step)
    return folder


def newest(folder, **options):
    entry, faults = checkpoints.newest(str(folder), **options)
    return (entry.step if entry else None), faults


def contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_names_every_file_with_its_size_and_checksum(run):
    said = json.loads((run / "set000004.json").read_text())
    assert (said["format"], said["step"]) == (1, 4)
    assert list(said["files"]) == [f"{kind}000004.pt" for kind in KINDS]
    sums = subprocess.run(["sha256sum", *said["files"]], cwd=run, capture_output=True, text=True, check=True).stdout
    for line, (name, entry) in zip(sums.splitlines(), said["files"].items(), strict=True):
        assert line.split() == [entry["sha256"], name]
        assert (run / name).stat().st_size == entry["bytes"]
    assert newest(run, checksums=True) == (6, [])
    assert checkpoints.find_set(str(run / "set000004.json")).model == str(run / "model000004.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_at_any_tenth_is_never_taken_for_whole(run, kind):
    path = run / f"{kind}000006.pt"
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        step, (fault,) = newest(run)
        assert step == 4
        assert fault == (
            f"the checkpoint of step 6 is passed over: {path.name} has {len(whole) * tenth // 10} bytes instead of "
            f"{len(whole)}"
        )
        with pytest.raises(ValueError, match=r"belongs to a damaged checkpoint, .* bytes instead of"):
            checkpoints.find_set(str(run / "model000006.pt"))
    path.write_bytes(whole)
    assert newest(run) == (6, [])


def test_sampling_takes_weights_from_a_folder_that_have_their_size(run):
    assert checkpoints.open_checkpoint(str(run)).path.endswith("ema_0.25_000006.pt")
    (run / "ema_0.25_000006.pt").write_bytes(b"cut")
    assert checkpoints.open_checkpoint(str(run)).path.endswith("ema_0.25_000004.pt")
    os.remove(run / "ema_0.25_000004.pt")
    assert checkpoints.open_checkpoint(str(run)).path.endswith("ema_0.25_000002.pt")


def test_a_changed_byte_is_found_by_who_resumes(run):
    path = run / "opt000006.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert newest(run) == (6, [])  # by sizes
    assert newest(run, checksums=True)[0] == 4
    files, faults = checkpoints.choose(str(run))
    assert (files.step, files.model) == (4, str(run / "model000004.pt"))
    assert faults == ["the checkpoint of step 6 is passed over: opt000006.pt was altered: its checksum is another one"]
    with pytest.raises(ValueError, match=r"damaged checkpoint, opt000006.pt was altered"):
        checkpoints.choose(str(run / "model000006.pt"))


def test_a_missing_file_makes_a_folder_pass_a_set_over_and_a_named_file_go_on(run):
    os.remove(run / "opt000006.pt")
    assert newest(run) == (4, ["the checkpoint of step 6 is passed over: opt000006.pt is missing"])
    assert checkpoints.find_set(str(run / "model000006.pt"), checksums=True).opt == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"step": 4},
        {"step": None},
        {"files": {}},
        {"files": ["model000006.pt"]},
        {"files": {"model000006.pt": None}},
        {"files": {"model000006.pt": {"bytes": True, "sha256": ""}}},
        {"files": {"model000006.pt": {"bytes": 1, "sha256": 3}}},
        {"files": {"opt000006.pt": {"bytes": 1, "sha256": ""}}},
        {"files": {"../model000006.pt": {"bytes": 1, "sha256": ""}}},
    ],
)
def test_a_manifest_that_says_something_else_counts_for_nothing(run, changes):
    edit(run / "set000006.json", **changes)
    assert newest(run) == (4, [DAMAGED])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"files": ' + b"[" * 100000, b"3"])
def test_a_manifest_of_rubbish_counts_for_nothing(run, content):
    (run / "set000006.json").write_bytes(content)
    assert newest(run) == (4, [DAMAGED])


def test_a_set_whose_manifest_was_not_written_yet_is_passed_over(run):
    os.remove(run / "set000006.json")
    assert newest(run) == (4, ["the checkpoint of step 6 is passed over: it was not finished: it has no manifest"])


def test_older_runs_without_manifests_resume_and_their_cut_files_do_not(run):
    for step in (2, 4, 6):
        os.remove(run / f"set{step:06d}.json")
    assert newest(run) == (6, [])
    Saver().save(State(), str(run), 8)
    assert newest(run) == (8, [])
    os.remove(run / "model000008.pt")
    assert newest(run)[0] == 6
    path = run / "opt000006.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert newest(run)[0] == 4
    assert newest(run)[1][-1] == "the checkpoint of step 6 is passed over: opt000006.pt is cut short"


def test_a_folder_of_weights_alone_is_a_set_and_a_torn_first_set_is_none(run, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model000006.pt").write_bytes((run / "model000006.pt").read_bytes())
    assert newest(tmp_path / "weights") == (6, [])
    torn = tmp_path / "torn"
    torn.mkdir()
    for number, kind in enumerate(KINDS[:-1], 1):  # as a process killed after each of its files leaves them
        (torn / f"{kind}000002.pt").write_bytes((run / f"{kind}000002.pt").read_bytes())
        assert newest(torn)[0] is None
        assert len(os.listdir(torn)) == number
    with pytest.raises(ValueError, match=r"no complete checkpoint, the checkpoint of step 2 is passed over: it has no"):
        checkpoints.choose(str(torn))
    files, faults = checkpoints.choose(str(torn), auto=True)
    assert files is None
    assert len(faults) == 1
    assert checkpoints.choose("", auto=True) == (None, [])
    assert checkpoints.choose(str(tmp_path / "nowhere"), auto=True) == (None, [])


class Killed(BaseException):
    pass


def kill_after(monkeypatch, replacements):
    """The process ends at a rename: before it, after so many others."""
    real, done = os.replace, []

    def replace(*paths):
        if len(done) == replacements:
            raise Killed
        done.append(paths)
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("replacements", range(5))
def test_a_save_that_ends_anywhere_leaves_the_sets_before_and_is_made_again(run, monkeypatch, replacements):
    before = contents(run)
    with monkeypatch.context() as patch:
        kill_after(patch, replacements)
        with pytest.raises(Killed):
            Saver().save(State(), str(run), 8)
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + replacements
    assert newest(run, checksums=True)[0] == 6
    (run / "ema_0.5_000008.pt").write_bytes(b"of a run with other averages")
    Saver().save(State(), str(run), 8)
    assert newest(run, checksums=True) == (8, [])
    assert sorted(checkpoints.sets_in(str(run))[8].emas) == ["0.25"]


@pytest.mark.parametrize("removals", range(5))
def test_removing_old_sets_may_end_anywhere(run, monkeypatch, removals):
    """What is left of a set is whole by its files, or no set at all; the next time removes it."""
    real, done = os.remove, []

    def remove(path):
        if len(done) == removals:
            raise Killed
        done.append(path)
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", remove)
        with pytest.raises(Killed):
            checkpoints.keep_last(str(run), 2)
    entry, sets = checkpoints.sets_in(str(run))[2], checkpoints.sets_in(str(run))
    assert bool(checkpoints.fault(entry, sets)) == (removals >= 2)
    checkpoints.keep_last(str(run), 2)
    assert list(checkpoints.sets_in(str(run))) == [4, 6]
    assert len(os.listdir(run)) == 10


def test_only_complete_sets_count_for_keep_last(run):
    """Two are to stay, and the newest is damaged: the two before it stay, and it too, as nothing newer replaces it."""
    path = run / "model000006.pt"
    path.write_bytes(path.read_bytes()[:-1])
    for count in (0, 2):  # 0 keeps all
        checkpoints.keep_last(str(run), count)
        assert list(checkpoints.sets_in(str(run))) == [2, 4, 6]
    Saver(keep_last=2).save(State(), str(run), 8)
    assert list(checkpoints.sets_in(str(run))) == [4, 8]  # the damaged one goes when a newer one is complete


def test_multiples_of_keep_every_stay(run):
    Saver(keep_last=1, keep_every=4).save(State(), str(run), 7)
    assert list(checkpoints.sets_in(str(run))) == [4, 7]


def test_temporary_files_of_killed_processes_are_removed_and_others_are_not(run):
    for name in ("model000008.pt.part-123", "set000008.json.part-1", "notes.part-1", "model000009.pt"):
        (run / name).write_bytes(b"half")
    Saver().save(State(), str(run), 8)
    names = os.listdir(run)
    assert [name for name in names if ".part-" in name] == ["notes.part-1"]
    assert "model000009.pt" in names


def test_what_was_resumed_from_is_never_written_again(run):
    before = contents(run)
    saver, state = Saver(), State()
    saver.source = str(run / "model000006.pt")
    state.weights += 1
    saver.save(state, str(run), 6)
    assert contents(run) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_a_disk_that_takes_no_more_is_named_and_nothing_is_lost(run, monkeypatch, number, operation):
    before = contents(run)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    class Full(io.FileIO):
        def write(self, data):
            fail()

    with monkeypatch.context() as patch:
        if operation == "write":
            patch.setattr(atomic, "_Raw", type("_Raw", (atomic._Raw, Full), {}))
        else:
            patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=rf"state000008.pt cannot be written \({os.strerror(number)}\): ") as caught:
            Saver().save(State(), str(run), 8)
        with pytest.raises(OSError, match="cannot be written"):
            save_npz(str(run / "samples.npz"), th.zeros(3).numpy())
    assert caught.value.errno == number
    assert contents(run) == before


def test_a_set_that_could_not_be_written_does_not_keep_the_next_one_from_being_written(run, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        saver.save(State(), str(run), 8)
        assert saver._pending.exception() is not None
    with pytest.raises(OSError, match=r"state000008.pt cannot be written"):
        saver.save(State(), str(run), 10)
    saver.wait()
    assert newest(run, checksums=True) == (10, [])


def test_a_real_limit_of_file_size_is_one_sentence_too(run, tmp_path, ranks):
    """RLIMIT_FSIZE, in a process of its own; torch's writer in C++ is in the middle of a file then."""
    program = tmp_path / "program.py"
    program.write_text(
        "import resource, sys, torch\n"
        "from guided_diffusion import dist_util\n"
        "from guided_diffusion.training import checkpoints\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "value = {'weights': torch.ones(100_000)}\n"
        "dist_util.run(lambda: checkpoints.save(sys.argv[1], value))\n"
    )
    path = run / "model000006.pt"
    before = contents(run)
    done = ranks.run([program, path], ranks=1)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {path} cannot be written (File too large): make room there, or choose another folder"
    ]
    assert contents(run) == before


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run/model000001.pt cannot be written \((Not a directory|File exists)\)"):
        checkpoints.save(str(tmp_path / "file" / "run" / "model000001.pt"), {})


def test_a_refused_rename_leaves_the_old_file(run, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    before = contents(run)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"model000006.pt cannot be written \(Permission denied\)"):
        checkpoints.save(str(run / "model000006.pt"), {})
    monkeypatch.setattr(os, "open", refuse)  # a folder that cannot be synchronised is none of the user's business
    monkeypatch.undo()
    assert contents(run) == before


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_a_run(run, monkeypatch, tmp_path):
    def refuse(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    monkeypatch.setattr("os.remove", refuse)
    Saver(keep_last=1).save(State(), str(run), 8)
    monkeypatch.undo()
    assert newest(run) == (8, [])
    assert "an older checkpoint could not be removed: " in (tmp_path / "log" / "log.txt").read_text()


def test_an_error_of_the_writers_own_is_not_taken_for_the_disks(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(FileNotFoundError, match="nowhere"), replacing(str(path)) as file:
        file.write(Path("nowhere").read_bytes())
    assert os.listdir(tmp_path) == []


class Bucket:
    """An object store behind blobfile's functions: an object appears when it is closed, never after an error."""

    def __init__(self, monkeypatch):
        self.objects, self.order = {}, []
        bucket = self

        class Blob(io.BytesIO):
            def __init__(self, path, mode, streaming=None, partial_writes_on_exc=True):
                super().__init__(b"" if "w" in mode else bucket.objects[path])
                self.path, self.mode, self.partial = path, mode, partial_writes_on_exc

            def __exit__(self, kind, error, tb):
                if "w" in self.mode and (error is None or self.partial):
                    bucket.objects[self.path] = self.getvalue()
                    bucket.order.append(self.path)
                self.close()

        class Stat:
            def __init__(self, path):
                self.size, self.mtime, self.version = len(bucket.objects[path]), bucket.order.index(path), None

        def listdir(folder):
            return [name.removeprefix(f"{folder}/") for name in self.objects]

        replaced = {
            "BlobFile": Blob,
            "stat": Stat,
            "exists": lambda path: path in self.objects,
            "isdir": lambda path: any(name.startswith(f"{path}/") for name in self.objects),
            "listdir": listdir,
            "remove": self.objects.pop,
            "join": lambda *parts: "/".join(parts),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(f"blobfile.{name}", value)


def test_a_bucket_gets_the_files_and_then_their_manifest(monkeypatch):
    bucket, folder = Bucket(monkeypatch), "gs://bucket/run"
    logger.configure(dir="", format_strs=[])
    for step in (1, 2, 3):
        saver = Saver(keep_last=2, asynchronous=step == 2)
        saver.save(State(), folder, step)
        saver.wait()
    assert bucket.order[-5:] == [
        f"{folder}/{name}" for name in (*(f"{kind}000003.pt" for kind in KINDS), "set000003.json")
    ]
    assert list(checkpoints.sets_in(folder)) == [2, 3]
    assert newest(folder, checksums=True) == (3, [])
    bucket.objects[f"{folder}/model000003.pt"] = bucket.objects[f"{folder}/model000003.pt"][:-1]
    assert newest(folder)[0] == 2


def test_an_upload_that_fails_shows_nothing(monkeypatch):
    bucket, folder = Bucket(monkeypatch), "gs://bucket/run"
    logger.configure(dir="", format_strs=[])
    Saver().save(State(), folder, 1)
    real = Hashed.write

    def fail(self, data):
        if "opt000002.pt" in str(self._file.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Hashed, "write", fail)
    with pytest.raises(OSError, match=r"opt000002.pt cannot be written \(No space left on device\)"):
        Saver().save(State(), folder, 2)
    assert newest(folder, checksums=True)[0] == 1
    assert not any("opt000002" in name or "set000002" in name for name in bucket.objects)


def test_a_thread_writes_the_bits_of_the_moment_of_saving(run, tmp_path, monkeypatch):
    """Training goes on changing the weights; the next save waits for the thread."""
    gate, real, writing = threading.Event(), checkpoints.save, []

    def slow(path, value):
        writing.append(threading.current_thread() is threading.main_thread())
        assert gate.wait(30)
        return real(path, value)

    monkeypatch.setattr(checkpoints, "save", slow)
    folder, state = tmp_path / "async", State()
    with Saver(asynchronous=True) as saver:
        saver.save(state, str(folder), 2)
        state.weights += 1
        saver.poll()
        assert newest(folder) == (None, [])
        assert "async/" not in (tmp_path / "log" / "log.txt").read_text()
        gate.set()
        saver.save(state, str(folder), 4)
        assert newest(folder)[0] in (2, 4)
        state.weights += 1
    assert not any(writing)
    assert newest(folder, checksums=True) == (4, [])
    for step in (2, 4):
        assert th.equal(
            checkpoints.load(str(folder / f"model{step:06d}.pt"))["values"][0], th.arange(1000.0) + step / 2 - 1
        )
        assert f"async/set{step:06d}.json" in (tmp_path / "log" / "log.txt").read_text()
    for name in ("model000002.pt", "state000002.pt", "set000002.json"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()  # as without a thread


def test_an_error_in_the_thread_is_raised_at_the_next_chance(run, monkeypatch, tmp_path):
    def full(path, value):
        raise OSError("the disk is full")

    def pending(saver):
        saver.save(State(), str(run), 8)
        while not saver._pending.done():
            time.sleep(0.01)
        return saver

    monkeypatch.setattr(checkpoints, "save", full)
    for action in ("poll", "wait"):
        with pytest.raises(OSError, match="the disk is full"):
            getattr(pending(Saver(asynchronous=True)), action)()
    with pytest.raises(OSError, match="the disk is full"):
        pending(Saver(asynchronous=True)).save(State(), str(run), 10)
    with pytest.raises(OSError, match="the disk is full"), Saver(asynchronous=True) as saver:
        pending(saver)
    with pytest.raises(KeyboardInterrupt), Saver(asynchronous=True) as saver:
        pending(saver)
        raise KeyboardInterrupt  # what ends the run is told, and the other in the log
    assert "the last checkpoint was not written: the disk is full" in (tmp_path / "log" / "log.txt").read_text()
    assert newest(run)[0] == 6


def test_an_error_elsewhere_lets_the_thread_finish(run):
    with pytest.raises(ValueError, match="elsewhere"), Saver(asynchronous=True) as saver:
        saver.save(State(), str(run), 8)
        raise ValueError("elsewhere")
    assert newest(run, checksums=True) == (8, [])


def test_a_snapshot_is_a_contiguous_copy():
    columns = th.randn(3, 4).t()
    values = {"a": [th.ones(3), (columns, 7, "text")], "b": th.tensor(2.0, requires_grad=True)}
    copied = snapshot(values)
    assert copied["a"][1][1:] == (7, "text")
    assert th.equal(copied["a"][1][0], columns)
    assert copied["a"][1][0].is_contiguous()  # as in a file
    assert not copied["b"].requires_grad
    values["a"][0].add_(1)
    assert th.equal(copied["a"][0], th.ones(3))
    assert map_tensors(values, lambda tensor: tensor.numel()) == {"a": [3, (12, 7, "text")], "b": 1}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_every_signal_is_noted_once_and_ends_with_its_code(tmp_path, name):
    logger.configure(dir=str(tmp_path), format_strs=[])
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with interruption.Interruption() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as a launcher passes on what the terminal has sent already
        assert stop.requested(2)
        with pytest.raises(SystemExit) as caught:
            stop.end()
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_processes_that_decode_images_go_on_when_a_launcher_signals_all_processes():
    loader = th.utils.data.DataLoader(range(100), num_workers=1, worker_init_fn=ignore_signals)
    batches = iter(loader)
    assert next(batches).tolist() == [0]
    (worker,) = multiprocessing.active_children()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM"):
        os.kill(worker.pid, getattr(signal, name))
    assert [int(batch) for batch in batches] == list(range(1, 100))
    del batches
    worker.join(20)
    assert worker.exitcode == 0


def test_a_second_signal_acts_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "ECHO", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin with SIGINT ignored
    try:
        with pytest.raises(KeyboardInterrupt), interruption.Interruption():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ranks_ask_each_other_by_the_clock_and_at_the_same_steps(monkeypatch):
    """Two ranks, the other one twice as slow: both count the steps until the next question from the slower pace."""
    now, asked = [0.0], []

    def gather(said):
        asked.append(step)
        return [said, said * th.tensor([[0.0, 2.0]])]

    monkeypatch.setattr("guided_diffusion.dist_util.world_size", lambda: 2)
    monkeypatch.setattr("guided_diffusion.dist_util.gather", gather)
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    stop = interruption.Interruption()
    for step in range(1, 40):
        now[0] += 0.125
        if step == 15:
            stop.signum = signal.SIGTERM
        if stop.requested(step):
            break
    assert asked == [1, 9, 17]
    assert (step, stop.signum) == (17, signal.SIGTERM)


def test_a_pipe_in_place_of_a_manifest_is_a_fault_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "set000004.json")
    assert "regular file" in manifests.manifest_fault(str(tmp_path / "set000004.json"), checksums=True)
