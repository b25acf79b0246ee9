"""Restartable jobs: folders claimed for a request; shards made once, whole, and merged to the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.jobs import RestartableJob
from guided_diffusion.runtime.npz import save_npz

ROWS, WIDTH = 7, 60_000  # more than is read along with a header


class Squares(RestartableJob):
    """Rows [WIDTH] of numbers, and their indices."""

    size = ROWS
    arrays = property(lambda _: [((WIDTH,), np.uint8), ((), np.int64)])
    what = "squares"

    def make(self, rank: int = 0, world_size: int = 1) -> list[str]:
        """Make the batches of a rank; returns the lines of the log."""
        lines: list[str] = []
        for batch in self.missing(rank, world_size, log=lines.append):
            rows = np.asarray(self.rows(batch))
            save_npz(self.shard(batch), (np.arange(WIDTH) + rows[:, None] ** 2).astype(np.uint8), rows)
        return lines

    def merge(self) -> bytes:
        """The bytes of the result."""
        save_npz(self.file("squares.npz"), *self.merged())
        return Path(self.file("squares.npz")).read_bytes()


@pytest.fixture
def job(tmp_path: Path) -> Squares:
    return Squares(out_dir=str(tmp_path / "run"), batch_size=3, request_defaults={"newer": False})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of one process without a break."""
    one = Squares(out_dir=str(tmp_path_factory.mktemp("whole")), batch_size=3)
    assert one.make() == []
    with np.load(one.file("squares.npz") if one.merge() else "") as saved:
        assert saved["arr_1"].tolist() == list(range(ROWS))
        assert saved["arr_0"][:, 1].tolist() == [1 + row**2 for row in range(ROWS)]
    return one.merge()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_make_the_file_of_one_process(job: Squares, whole: bytes, world_size: int) -> None:
    for rank in reversed(range(world_size)):
        job.make(rank, world_size)
    assert job.merge() == whole


def test_a_lost_shard_is_made_again_and_no_other(job: Squares, whole: bytes) -> None:
    job.make()
    kept = [os.stat(job.shard(batch)).st_mtime_ns for batch in (0, 2)]
    os.remove(job.shard(1))
    assert job.make() == ["going on where an earlier run stopped: 2 of 3 batches are there"]
    assert [os.stat(job.shard(batch)).st_mtime_ns for batch in (0, 2)] == kept
    assert job.merge() == whole


def cut(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-700])


def empty(path: str) -> None:
    Path(path).write_bytes(b"")


def shorten(path: str) -> None:
    save_npz(path, np.zeros((2, WIDTH), np.uint8), np.zeros(2, np.int64))


def without_indices(path: str) -> None:
    with np.load(path) as saved:
        images = saved["arr_0"]
    save_npz(path, images)


@pytest.mark.parametrize("damage", [cut, empty, shorten, without_indices, os.remove])
def test_a_damaged_shard_counts_as_missing(job: Squares, whole: bytes, damage: Callable[[str], None]) -> None:
    job.make()
    damage(job.shard(1))
    with pytest.raises(UserError, match=r"1 of 3 batches are missing in .*, the first is 1: all ranks must write to"):
        job.merge()
    job.make()
    assert job.merge() == whole


def test_altered_bits_are_seen_when_a_shard_is_read(job: Squares, whole: bytes) -> None:
    job.make()
    content = bytearray(Path(job.shard(1)).read_bytes())
    content[100_000] ^= 1  # among the numbers: the checksum tells
    Path(job.shard(1)).write_bytes(content)
    message = r"000001\.npz was damaged after it was written .*: it is removed, run the same command again"
    with pytest.raises(UserError, match=message):
        job.merge()
    assert not os.path.exists(job.file("squares.npz"))
    job.make()
    assert job.merge() == whole


def test_what_killed_runs_left_half_written_is_removed(job: Squares) -> None:
    others = {"notes.part-1", "squares.npz.bak", "squares.npz"}
    job.make()
    job.merge()
    for name in ("squares.npz.part-12", "request.json.part-345", *others):
        Path(job.file(name)).write_bytes(b"half")
    job.tidy("squares.npz")
    assert set(os.listdir(job.out_dir)) == others


@pytest.mark.parametrize(
    ("earlier", "request_now", "message"),
    [
        ({"seed": 1, "labels": [0]}, {"seed": 1, "labels": (0,)}, ""),  # as JSON values
        ({"seed": 1}, {"seed": 1, "newer": False}, ""),  # a flag that is newer than the folder
        ({"seed": 1}, {"seed": 1, "newer": True}, "newer was False and is True"),
        ({"seed": 1}, {"seed": 1, "fingerprint": "abc"}, "fingerprint was None and is abc"),
        ({"newer": False}, {}, "newer was False and is None"),
        ({}, {str(number): number for number in range(6)}, "3 was None and is 3, and 2 more"),
    ],
)
def test_a_folder_goes_on_with_its_own_request_alone(
    job: Squares, earlier: dict[str, Any], request_now: dict[str, Any], message: str
) -> None:
    assert job.claim(earlier, ["squares.npz"]) is False
    Path(job.file("squares.npz")).write_bytes(b"")
    if message:
        with pytest.raises(UserError, match=f"run holds the squares of another request .*{message}"):
            job.claim(request_now, ["squares.npz"])
    else:
        assert job.claim(request_now, ["squares.npz"]) is True


def test_files_of_unknown_origin_are_left_alone(job: Squares) -> None:
    os.makedirs(job.out_dir)
    Path(job.file("squares.npz")).write_bytes(b"precious")
    with pytest.raises(UserError, match=r"squares\.npz exists and no request\.json says what it is"):
        job.claim({"seed": 1}, ["squares.png", "squares.npz"])
    assert os.listdir(job.out_dir) == ["squares.npz"]


@pytest.mark.parametrize("content", [b"[]", b"3", b"{", b"[" * 100_000, b"", b"\xff"], ids=range(6))
def test_a_request_that_is_none_is_named(job: Squares, content: bytes) -> None:
    os.makedirs(job.out_dir)
    Path(job.file("request.json")).write_bytes(content)
    with pytest.raises(UserError, match=r"request\.json does not say whose squares lie there"):
        job.claim({"seed": 1}, [])
