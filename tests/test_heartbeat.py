"""The watch that ranks keep over each other, with several ranks in one process and others made of bare sockets."""

import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from guided_diffusion import heartbeat
from guided_diffusion.heartbeat import Address, begin, stall_timeout

PATIENCE = 20  # seconds in which anything that is to happen has happened


def eventually(condition):
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


@pytest.fixture
def job(monkeypatch):
    """A job whose ranks `join`, allowed to be silent for half a second; `ends` fills with (rank, sentence, code)."""
    monkeypatch.setenv(heartbeat.VARIABLE, "0.5")
    told, ends, watches, sockets = [], [], [], []

    def share(text):
        told[:] = told or [text]
        return told[0]

    def join(rank, size):
        watch = begin(
            rank, size, host="127.0.0.1", share=share, end=lambda sentence, code: ends.append((rank, sentence, code))
        )
        watches.append(watch)
        return watch

    def bare(*lines):
        """A connection to rank 0 that says these lines, {} standing for the word that ranks know, and no more."""
        address = Address(*json.loads(told[0]))
        connection = socket.create_connection((address.host, address.port))
        sockets.append(connection)
        connection.sendall("".join(line.replace("{}", address.word) + "\n" for line in lines).encode())
        return connection

    yield SimpleNamespace(join=join, bare=bare, ends=ends, told=told)
    for watch in [watch for watch in watches if watch is not None]:
        watch.leave()
    for connection in sockets:
        connection.close()


def test_ranks_that_are_heard_are_left_alone_however_little_they_do(job):
    for rank in range(3):
        job.join(rank, 3).enter("the same")
    time.sleep(1.25)
    assert job.ends == []


def test_a_rank_that_falls_silent_is_named_to_all_others(job):
    job.join(0, 3)
    job.join(1, 3)
    job.bare("{} 2", "at 0 ")
    eventually(lambda: len(job.ends) == 2)
    for rank, sentence, code in job.ends:
        assert rank in (0, 1)
        assert sentence.startswith("rank 2 has been silent for 1 s, more than GUIDED_DIFFUSION_STALL_TIMEOUT allows")
        assert "--resume_checkpoint auto" in sentence
        assert code == 1


def test_a_rank_that_never_connects_is_silent_too(job):
    job.join(0, 2)
    eventually(lambda: job.ends)
    assert job.ends[0][1].startswith("rank 1 has been silent")


def test_a_silent_rank_0_is_named_by_the_others(job):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        job.told.append(json.dumps(Address("127.0.0.1", mute.getsockname()[1], "word", 1.0)))
        job.join(1, 2)
        eventually(lambda: job.ends)
    assert job.ends[0][:2] == (1, job.ends[0][1])
    assert job.ends[0][1].startswith("rank 0 has been silent")


def test_a_connection_that_ends_without_a_word_is_a_rank_that_was_killed(job):
    job.join(0, 3)
    job.join(1, 3)
    job.bare("{} 2", "at 1 something").close()
    eventually(lambda: len(job.ends) == 2)
    assert {sentence.partition(":")[0] for _, sentence, _ in job.ends} == {
        "rank 2 has ended without a word, as when it is killed"
    }


def test_a_rank_that_leaves_is_missed_by_nobody_and_known_to_have_left(job):
    first, _, third = (job.join(rank, 3) for rank in range(3))
    third.leave()
    eventually(lambda: first.gone == [2])
    time.sleep(0.75)
    assert job.ends == []


def test_a_rank_that_joins_while_another_fails_is_told_why(job, monkeypatch):
    waiting = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: waiting.append(thread))
        job.join(0, 4)
    job.bare("{} 1", "failed 7 the reason")
    job.join(2, 4)
    job.join(3, 4)
    waiting[0].start()
    eventually(lambda: len(job.ends) == 3)
    assert sorted(job.ends) == [(rank, "rank 1 has failed (the reason), and all end with it", 7) for rank in (0, 2, 3)]


def test_an_error_of_one_rank_ends_the_others_with_its_code_and_its_words(job):
    watches = [job.join(rank, 3) for rank in range(3)]
    watches[1].say_failed(7, "RuntimeError: the reason\nof it")
    eventually(lambda: len(job.ends) == 2)
    sentence = "rank 1 has failed (RuntimeError: the reason of it), and all end with it"
    assert sorted(job.ends) == [(0, sentence, 7), (2, sentence, 7)]


def test_ranks_in_different_exchanges_are_told_apart(job):
    watches = [job.join(rank, 3) for rank in range(3)]
    for watch in watches:
        watch.enter("gather")
    for watch, what in zip(watches, ("barrier", "barrier", "gather of float32 [n, 3]"), strict=True):
        watch.enter(what)
    eventually(lambda: len(job.ends) == 3)
    for _, sentence, _ in job.ends:
        assert " is in barrier where rank 2 is in gather of float32 [n, 3] (exchange 2 of each)" in sentence


def test_a_rank_that_is_ahead_is_not_in_a_different_exchange(job):
    watches = [job.join(rank, 2) for rank in range(2)]
    watches[0].enter("gather")
    watches[1].enter("gather")
    watches[0].enter("barrier")
    time.sleep(0.75)
    assert job.ends == []


def test_strangers_at_the_port_are_turned_away(job):
    watches = [job.join(rank, 2) for rank in range(2)]
    job.bare("GET / HTTP/1.1", "", "").close()
    job.bare("wrong-word 1", "failed 1 nothing")
    job.bare("{} 7", "failed 1 nothing")
    job.bare("{} one", "failed 1 nothing")
    job.bare().sendall(b"\xff" * 100_000)
    job.bare().close()
    time.sleep(0.75)
    assert job.ends == []
    watches[1].say_failed(1, "still heard")
    eventually(lambda: job.ends)
    assert "still heard" in job.ends[0][1]


def test_time_in_which_a_rank_was_stopped_itself_is_nobodys_silence(job, monkeypatch):
    """As after a laptop's sleep: an hour has passed between two looks at the clock."""
    clock, hour = time.monotonic, [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock() + hour[0])
    for rank in range(2):
        job.join(rank, 2)
    time.sleep(0.25)
    hour[0] = 3600.0
    time.sleep(0.75)
    assert job.ends == []


def test_a_process_whose_launcher_has_ended_ends(job, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    job.join(0, 2)
    job.join(1, 2)
    monkeypatch.setattr(heartbeat.os, "getppid", lambda: -1)
    eventually(lambda: job.ends)
    assert "what started this rank (process " in job.ends[0][1]


def test_a_process_that_a_shell_started_may_outlive_it(job, monkeypatch):
    job.join(0, 2)
    job.join(1, 2)
    monkeypatch.setattr(heartbeat.os, "getppid", lambda: -1)
    time.sleep(1.25)
    assert job.ends == []


def test_the_environment_of_rank_0_decides_for_all(job, monkeypatch):
    monkeypatch.setenv(heartbeat.VARIABLE, "0")
    assert job.join(0, 2) is None
    monkeypatch.setenv(heartbeat.VARIABLE, "5")
    assert job.join(1, 2) is None
    monkeypatch.delenv(heartbeat.VARIABLE)
    assert stall_timeout() == 25
    for text in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv(heartbeat.VARIABLE, text)
        with pytest.raises(ValueError, match=f"GUIDED_DIFFUSION_STALL_TIMEOUT '{text}' is no number of seconds"):
            stall_timeout()


def test_a_rank_that_cannot_reach_rank_0_says_where(job):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    job.told.append(json.dumps(Address("127.0.0.1", port, "word", 1.0)))
    with pytest.raises(TimeoutError, match=rf"rank 1 cannot reach rank 0 at 127.0.0.1:{port}.*STALL_TIMEOUT=0"):
        job.join(1, 2)
