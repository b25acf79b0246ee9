"""Tars of images: the same batches as from a folder, wherever they lie, and what is wrong with them in one sentence."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch as th

from guided_diffusion.data import sources, tars
from guided_diffusion.data.captions import read_captions
from guided_diffusion.data.fetching import fetch
from guided_diffusion.data.labels import read_labels
from guided_diffusion.data.sources import find_images, read_bytes
from guided_diffusion.evaluation.images import open_images
from guided_diffusion.image_datasets import ImageStream, load_data
from guided_diffusion.runtime import files
from guided_diffusion.runtime.errors import UserError
from served import served
from shards import picture, samples, write_shards, write_tar


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and tars that are opened anew."""
    monkeypatch.setattr(sources, "_tars", {})
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(data_dir: Any, **options: Any) -> ImageStream:
    defaults: dict[str, Any] = {"image_size": 4, "batch_size": 4, "class_cond": True, "log": lambda line: None}
    return load_data(data_dir=str(data_dir), **{**defaults, **options})


def greys(stream: ImageStream, batches: int = 4) -> list[list[int]]:
    """The grey of each picture of some batches, which is its number."""
    return [[round((image.mean().item() + 1) * 127.5) for image in next(stream)[0]] for _ in range(batches)]


def unpacked(pattern: str, folder: Path) -> Path:
    """A folder of folders with what is in the tars."""
    for path in sorted(Path(pattern).parent.glob("*.tar")):
        with tarfile.open(path) as archive:
            archive.extractall(folder / path.name, filter="data")
    return folder


def test_tars_give_the_batches_of_a_folder(tmp_path: Path) -> None:
    """The order, labels and augmentation of training, whether local or on a server, by a pattern, list or folder."""
    pattern = write_shards(tmp_path / "shards")
    options: dict[str, Any] = {"random_crop": True, "random_flip": True, "seed": 3, "class_from": "cls"}
    expected = [next(opened(unpacked(pattern, tmp_path / "folder"), **options)) for _ in range(1)]
    (tmp_path / "list.txt").write_text("# shards\nshards/train-{00..01}.tar\n\nshards/train-02.tar\n")
    with served(tmp_path) as (address, _):
        for place in (pattern, tmp_path / "list.txt", tmp_path / "shards", f"{address}/shards/train-{{00..02}}.tar"):
            for workers in (0, 2) if str(place).startswith("http") else (0,):
                stream = opened(place, num_workers=workers, **options)
                for images, cond in expected:
                    others, same = next(stream)
                    assert th.equal(images, others)
                    assert th.equal(cond["y"], same["y"])
                stream.close()


def test_labels_and_captions_lie_beside_the_images(tmp_path: Path) -> None:
    source = find_images(write_shards(tmp_path / "shards", 2, 3))
    labels = read_labels(source)
    assert (labels.ids, labels.class_from) == ([0, 1, 2, 0, 1, 2], "cls")
    assert read_labels(source, "json").ids == labels.ids
    assert read_labels(source, "json", label_column="caption").classes[0] == "a blue picture"
    assert read_captions(source).texts == read_captions(source, "caption").texts
    assert read_captions(source).texts[1] == ["a green picture"]
    assert source.skipped() == "skipped 0"
    named = write_tar(tmp_path / "named.tar", [(f"{name}_1.png", picture(1)) for name in ("dog", "cat")])
    assert read_labels(find_images(named)).classes == ["cat", "dog"]
    folders = write_tar(tmp_path / "folders.tar", [(f"{name}/1.png", picture(1)) for name in ("dog", "cat")])
    assert read_labels(find_images(folders)).classes == ["cat", "dog"]
    write_tar(tmp_path / "bare.tar", [("1.png", picture(1)), ("1.cls", b"0"), ("2.png", picture(2))])
    with pytest.raises(ValueError, match=r"'bare.tar/2.png' has no label: give it 'bare.tar/2.cls'|'2.png' has no"):
        read_labels(find_images(tmp_path / "bare.tar"))


def test_an_index_is_made_once_and_anew_for_another_tar(tmp_path: Path, cache_folder: Path) -> None:
    pattern = write_shards(tmp_path / "shards", 2)
    find_images(pattern)
    kept = {path: path.stat().st_mtime_ns for path in cache_folder.glob("shards/*.index")}
    assert len(kept) == 2
    find_images(pattern)
    assert {path: path.stat().st_mtime_ns for path in cache_folder.glob("shards/*.index")} == kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:-40])  # what a full disk leaves
    assert len(find_images(pattern)) == 10
    write_tar(tmp_path / "shards" / "train-01.tar", samples(range(5, 12)))
    assert len(find_images(pattern)) == 12


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_all_kinds_of_names_are_read(tmp_path: Path, kind: int) -> None:
    long = "/".join(["folder" * 8] * (4 if kind == tarfile.USTAR_FORMAT else 30))
    names = ["./a.png", f"{long}/1.png", "ä/世.png", "b.c.png", "-.png"]
    path = write_tar(tmp_path / "a.tar", [(name, picture(n)) for n, name in enumerate(names)], format=kind)
    source = find_images(path)
    fewer = [name.removeprefix("./") for name in names if len(name) <= 1000]
    assert sorted(source.images) == sorted(fewer)
    assert len(source.refused) == len(names) - len(fewer)
    for name in fewer:
        assert read_bytes(source.path(name)) == picture(names.index(name if name != "a.png" else "./a.png"))


FAULTS = {
    "cut": "train-01.tar' is not a readable tar (it ends early or is damaged",
    "packed": "train-01.tar' is not a readable tar (it is no tar",
    "no tar": "train-01.tar' is not a readable tar (it is no tar",
    "missing": "train-01.tar",
    "twice": "train-01.tar' is named twice",
    "other": "'{0}/train-01.txt' is neither a tar nor a zip",
    "backwards": "counts from 2 to 0: write the smaller number first",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_that_cannot_be_used_is_named(tmp_path: Path, fault: str) -> None:
    place, path = write_shards(tmp_path, 2), tmp_path / "train-01.tar"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif fault == "packed":
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif fault == "no tar":
        path.write_bytes(b"no tar" * 999)
    elif fault == "missing":
        path.unlink()
    elif fault == "backwards":
        place = f"{tmp_path}/train-{{2..0}}.tar"
    else:
        (tmp_path / "list.txt").write_text("train-01.t" + ("ar\n" + "train-{00..01}.tar" if fault == "twice" else "xt"))
        place = f"{tmp_path}/list.txt"
    with pytest.raises((ValueError, OSError), match=re.escape(FAULTS[fault].format(tmp_path))) as caught:
        find_images(place)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_there_twice_is_read_once(tmp_path: Path) -> None:
    source = find_images(write_tar(tmp_path / "a.tar", [("1.png", picture(1)), ("1.png", picture(2))]))
    assert source.images == ["1.png"]
    assert source.refused == [("1.png", "a duplicate of an earlier name")]
    assert read_bytes(source.path("1.png")) == picture(1)


@pytest.mark.parametrize("where", ["disk", "server"])
def test_a_shard_that_changes_while_it_is_read_is_told(tmp_path: Path, where: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.png", picture(1)), ("2.png", picture(2))])
    status = path.stat()
    with served(tmp_path) as (address, _):
        source = find_images(path if where == "disk" else f"{address}/a.tar")
        write_tar(path, [("1.pnf", picture(1)), ("2.png", picture(2))])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (where == "disk")))
        with pytest.raises(ValueError, match=r"a.tar has changed since its index was made: start again"):
            read_bytes(source.path("1.png"))
        if where == "server":
            assert read_bytes(source.path("2.png")) == picture(2)
            path.write_bytes(path.read_bytes()[:550])
            with pytest.raises(ValueError, match=r"a.tar was cut since its index was made"):
                read_bytes(source.path("1.png"))


@pytest.mark.parametrize("rule", ["error", "skip"])
@pytest.mark.parametrize("change", ["other", "cut", "gone"])
def test_a_tar_that_changes_ends_the_run_whatever_is_done_with_bad_images(
    tmp_path: Path, change: str, rule: str
) -> None:
    write_shards(tmp_path, 2)
    options: dict[str, Any] = {"batch_size": 1, "image_size": 8, "log": lambda line: None}
    images = load_data(data_dir=f"{tmp_path}/train-{{00..01}}.tar", on_bad_image=rule, **options)
    path = tmp_path / "train-01.tar"
    size = path.stat().st_size
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -tars.BLOCK if change == "cut" else None] + b"more" * (change == "other"))
    faults = {
        "other": "has changed since its index was made: start again",
        "cut": f"was cut since its index was made, when it had {size} bytes: copy it again",
        "gone": "is gone since its index was made: put it back",
    }
    with pytest.raises(UserError) as caught:
        for _ in range(20):
            next(images)
    assert str(caught.value) == f"{path} {faults[change]}"


def test_servers_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, 2)
    with (
        served(tmp_path, ranges=False) as (address, _),
        pytest.raises(OSError, match=r"gives no parts of files \(HTTP"),
    ):
        find_images(f"{address}/train-{{00..01}}.tar")
    with served(tmp_path) as (address, _), pytest.raises(OSError, match=r"train-02.tar is not there: the server"):
        find_images(f"{address}/train-{{00..02}}.tar")


def test_an_index_beside_the_tar_saves_reading_it(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one of another tar of that name is not believed, nor a path that leads out of it."""
    path = write_tar(tmp_path / "a.tar", samples(range(4)))
    find_images(path)
    [kept] = cache_folder.glob("shards/*.index")
    (tmp_path / "a.tar.index").write_bytes(kept.read_bytes())
    write_tar(tmp_path / "b.tar", samples(range(9)))
    (tmp_path / "b.tar.index").write_bytes(kept.read_bytes())
    with served(tmp_path) as (address, asked):
        assert len(find_images(f"{address}/a.tar")) == 4
        assert [asked_for for asked_for in asked if asked_for[0] == "a.tar"] == [("a.tar", "bytes=0-0")] * 2
        assert len(find_images(f"{address}/b.tar")) == 9
    monkeypatch.setattr(tars, "path_fault", lambda name, archive: "")
    write_tar(tmp_path / "c.tar", [("../1.png", picture(1)), ("2.png", picture(2))])
    find_images(tmp_path / "c.tar")
    monkeypatch.undo()
    [kept] = [path for path in (tmp_path / "cache").glob("shards/*.index") if b"../1.png" in path.read_bytes()]
    (tmp_path / "c.tar.index").write_bytes(kept.read_bytes())
    kept.unlink()
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    source = find_images(tmp_path / "c.tar")
    assert source.images == ["2.png"]
    assert source.refused == [("../1.png", "a path that leads out of the tar")]


def test_shards_are_copied_before_their_turn(tmp_path: Path, cache_folder: Path) -> None:
    """The batches stay the same; copies are at most so many bytes; the process ends with the stream."""
    pattern = write_shards(tmp_path / "shards", 6, 4)
    size = (tmp_path / "shards" / "train-00.tar").stat().st_size
    expected = opened(pattern, shuffle="shards:2")
    with served(tmp_path / "shards") as (address, asked):
        place = f"{address}/train-{{00..05}}.tar"
        stream = opened(place, shuffle="shards:2", shard_cache_gb=4.5 * size / 1e9)
        fetcher = stream.fetcher
        assert fetcher is not None
        for step in range(13):
            if step:  # now the images of this step lie here
                del asked[:]
            (images, cond), (others, same) = next(expected), next(stream)
            assert th.equal(images, others)
            assert th.equal(cond["y"], same["y"])
            wait_for(lambda: {copy for _, copy, _ in fetcher._plan} <= copies(cache_folder))
            assert not step or all(wanted.startswith("bytes=0-") for _, wanted in asked)
            assert len(copies(cache_folder)) == 4
        process = fetcher._process
        stream.close()
        assert process is not None
        assert process.poll() is not None


def copies(cache_folder: Path) -> set[str]:
    return set(map(str, cache_folder.glob("shards/*.tar")))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_cannot_be_copied_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And old copies make room, but not those that are needed."""
    path, folder = write_tar(tmp_path / "a.tar", samples(range(3))), tmp_path / "copies"
    size = path.stat().st_size
    folder.mkdir()
    for number, name in enumerate(("old.tar", "needed.tar", "new.tar")):
        (folder / name).write_bytes(bytes(size))
        os.utime(folder / name, (number, number))
    with served(tmp_path) as (address, _):
        for name, length, whole in (("b.tar", size, False), ("a.tar", 9, False), ("a.tar", size, True)):
            place = (f"{address}/{name}", str(folder / "copy.tar"), length)
            assert fetch(place, {str(folder / "needed.tar")}, 3.5 * size) == whole
    assert (folder / "copy.tar").read_bytes() == path.read_bytes()
    assert sorted(os.listdir(folder)) == ["copy.tar", "needed.tar", "new.tar"]
    said = capfd.readouterr().err.splitlines()
    assert "b.tar is not kept on this machine, and read where it lies" in said[0]
    assert f"it has {size} bytes, and had 9" in said[1]


def test_processes_make_an_index_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = str(write_tar(tmp_path / "a.tar", samples(range(3)))), []
    write = tars.write_index

    def slow(*words: Any) -> None:
        made.append(words[0])
        time.sleep(0.2)
        write(*words)

    monkeypatch.setattr(tars, "write_index", slow)
    with ThreadPoolExecutor(4) as pool:
        assert {len(list(tar.members())) for tar in pool.map(tars.Tar, [path] * 4)} == {12}
    assert len(made) == 1


def test_shards_leave_no_file_open(tmp_path: Path) -> None:
    """There may be more of them than a process may open files."""
    before = len(os.listdir("/proc/self/fd"))
    opened = [tars.Tar(str(write_tar(tmp_path / f"{number}.tar", samples(range(1))))) for number in range(9)]
    assert [list(tar.members()) for tar in opened]
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_that_parse_python_do_not_spoil_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11.7 gives a SystemError, now and then, where several threads parse at the same time."""
    read, failed = np.lib.format.read_array_header_1_0, []

    def first_fails(file: IO[bytes]) -> Any:
        found = read(file)
        if not failed:
            failed.append(found)
            raise SystemError("AST constructor recursion depth mismatch (before=18, after=15)")
        return found

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", first_fails)
    np.save(file := io.BytesIO(), np.arange(5))
    assert (files.read_array(file.getvalue()) == np.arange(5)).all()
    assert failed


def test_an_evaluation_reads_shards_once(tmp_path: Path) -> None:
    """And the files that keep features are told apart by sizes and dates."""
    pattern = write_shards(tmp_path / "shards", 2)
    local = open_images(pattern, 8)
    with served(tmp_path / "shards") as (address, asked):
        images = open_images(f"{address}/train-{{00..01}}.tar", 8)
        digest = images.scanned.digest
        before = len(asked)
        for here, there in zip(local.batches(4), images.batches(4), strict=True):
            assert (here == there).all()
        assert len(asked) - before == images.count == 10
    write_tar(tmp_path / "shards" / "train-01.tar", samples(range(6, 11)))
    with served(tmp_path / "shards") as (address, _):
        assert open_images(f"{address}/train-{{00..01}}.tar", 8).scanned.digest != digest
    assert open_images(pattern, 8).scanned.digest != local.scanned.digest
