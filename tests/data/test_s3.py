"""Buckets of S3: what is read there is what is read from a folder, and refusals are one sentence."""

from __future__ import annotations

import importlib.util
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from buckets import KEY, REGION, Store, served_store

from guided_diffusion import dist_util
from guided_diffusion.data import sources
from guided_diffusion.data.fetching import fetch
from guided_diffusion.data.sources import find_images
from guided_diffusion.evaluation.images import open_images
from guided_diffusion.image_datasets import ImageStream, load_data
from guided_diffusion.runtime import files, remote
from guided_diffusion.runtime.npz import Npz, save_npz
from guided_diffusion.training import checkpoints
from shards import picture, samples, write_shards, write_tar

pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Store, str]]:
    with served_store() as store:
        yield store


@pytest.fixture
def store(server: tuple[Store, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store that all of S3 is asked for at, with credentials and a cache of its own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    variables = {
        "AWS_ENDPOINT_URL": server[1],
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "GUIDED_DIFFUSION_CACHE": str(tmp_path / "cache"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sources, "_tars", {})
    server[0].__init__()  # type: ignore[misc]
    remote._clients.clear()
    yield server[0]
    remote._clients.clear()


def opened(data_dir: str, **options: Any) -> ImageStream:
    defaults: dict[str, Any] = {"image_size": 4, "batch_size": 4, "class_cond": True, "log": lambda line: None}
    return load_data(data_dir=data_dir, **{**defaults, "shard_cache_gb": 0, **options})


def assert_same(first: ImageStream, second: ImageStream) -> None:
    for _ in range(4):
        (images, cond), (others, same) = next(first), next(second)
        assert th.equal(images, others)
        assert th.equal(cond["y"], same["y"])
    first.close()
    second.close()


def test_names_sizes_and_parts(store: Store) -> None:
    content = os.urandom(3 * remote.LEAST)
    for name in ("a b+c.bin", "ä/1", "ä/2", "x/y/1", "x/", "z1", "z2", "z3", "empty"):
        store.put(f"s3://data/run/{name}", content if name.startswith("a") else b"")
    path = "s3://data/run/a b+c.bin"
    names = ["a b+c.bin", "empty", "x", "z1", "z2", "z3", "ä"]
    assert files.folders_and_files("s3://data/run") == [(name, name in "xä") for name in names]
    assert files.names_in("s3://data/run/") == names
    assert files.names_in("s3://data") == files.names_in("s3://data/") == ["run"]
    for name, exists, isdir in (("", 1, 1), ("ru", 0, 0), ("run", 1, 1), ("run/x/", 1, 1), ("run/z1", 1, 0)):
        assert (files.exists(f"s3://data/{name}"), files.isdir(f"s3://data/{name}")) == (exists, isdir), name
    status = files.stat(path)
    assert (status.size, status.mtime) == (len(content), store.buckets["data"]["run/a b+c.bin"][1])
    store.put("s3://data/run/z1", b"another")
    assert files.stat("s3://data/run/z1").version != files.stat("s3://data/run/z2").version
    assert files.read_part(path, 5, 7) == content[5:12]
    assert files.read_part(path, len(content) - 3, 7) == content[-3:]
    assert files.read_part(path, len(content), 7) == b""
    assert files.read_file(path) == content
    assert files.read_file("s3://data/run/empty") == b""
    with files.open_blob(path) as file:
        assert file.seek(-9, os.SEEK_END) == len(content) - 9
        assert file.read() == content[-9:]
        file.seek(1)
        assert file.read(len(content)) == content[1:]
    for missing in ("s3://data/run/none", "s3://data/run"):
        with pytest.raises(FileNotFoundError, match=f"{missing} is (not there|a folder)"):
            files.stat(missing)


def test_a_picture_is_one_request_and_a_member_of_a_zip_a_small_one(store: Store, tmp_path: Path) -> None:
    store.put("s3://data/1.png", picture(1))
    assert files.read_file("s3://data/1.png") == picture(1)
    assert store.asked == [("GET", "data/1.png", f"bytes=0-{remote.AHEAD - 1}")]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(2):
            archive.writestr(f"{number}.npy", os.urandom(10 * remote.LEAST))
    store.put("s3://data/a.zip", (tmp_path / "a.zip").read_bytes())
    with files.open_archive("s3://data/a.zip") as archive:
        del store.asked[:]
        with archive.open("0.npy") as member:
            member.read(9)
    assert [wanted for _, _, wanted in store.asked] == [f"bytes=0-{remote.LEAST - 1}"]


def test_all_kinds_of_data_give_the_batches_of_a_folder(store: Store, tmp_path: Path) -> None:
    """And so do workers that are forked when the connections are open."""
    pixels, ids = np.arange(12 * 48, dtype=np.uint8).reshape(12, 4, 4, 3), np.arange(12) % 3
    save_npz(str(tmp_path / "a.npz"), pixels, ids)
    folder = tmp_path / "folder"
    for number in range(12):
        (folder / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{number % 3}" / f"{number} +ä.png").write_bytes(picture(number))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    store.put_folder("s3://data/in", tmp_path)
    for name, workers in {"folder": 0, "a.zip": 1, "a.npz": 0}.items():
        there = opened(f"s3://data/in/{name}", seed=3, num_workers=workers)
        assert_same(opened(f"{tmp_path}/{name}", seed=3), there)
    local, there = (open_images(f"{place}/a.zip", 4) for place in (tmp_path, "s3://data/in"))
    assert (np.concatenate([*there.batches(5)]) == np.concatenate([*local.batches(5)])).all()


def test_tars_are_indexed_copied_and_resumed(store: Store, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "shards")
    store.put_folder("s3://data/shards", tmp_path / "shards")
    place = "s3://data/shards/train-{00..02}.tar"
    local, there = opened(pattern, seed=1), opened(place, seed=1)
    assert len(list((tmp_path / "cache" / "shards").glob("*.index"))) == 6  # three of them of the local tars
    for _ in range(5):
        assert th.equal(next(local)[0], next(there)[0])
    resumed = opened(place, seed=1, num_workers=1)
    resumed.load_state_dict(there.state_dict())
    assert_same(local, resumed)
    source = find_images("s3://data/shards/train-01.tar")
    assert sources.read_bytes(source.path("005.png")) == picture(5)
    [tar] = [tar for tar in sources._tars.values() if tar.path == "s3://data/shards/train-01.tar"]
    assert fetch((tar.path, tar.copy, tar.size), set(), 1e9)
    del store.asked[:]
    assert sources.read_bytes(source.path("006.png")) == picture(6)
    assert store.asked == []
    os.remove(tar.copy)
    write_tar(tmp_path / "other.tar", samples(range(3, 5)))
    store.put(tar.path, (tmp_path / "other.tar").read_bytes())
    with pytest.raises(ValueError, match=r"train-01.tar (was cut|has changed) since its index was made"):
        sources.read_bytes(source.path("006.png"))


def test_checkpoints_are_read_and_written(store: Store, tmp_path: Path) -> None:
    store.buckets["data"] = {}
    with files.writing("s3://data/run/model000001.pt") as file:
        th.save({"a": th.arange(3.0)}, file)
    assert store.asked == [("PUT", "data/run/model000001.pt", "")]
    files.write_json("s3://data/run/config.json", {"flags": {"seed": 3}})
    checkpoints.save("s3://data/run/a.safetensors", {"a": th.arange(3.0)})
    for name in ("run/model000001.pt", "run/a.safetensors"):
        assert checkpoints.load(f"s3://data/{name}")["a"].tolist() == [0, 1, 2]
    assert dist_util.load_state_dict("s3://data/run/model000001.pt")["a"].tolist() == [0, 1, 2]
    for name in ("run", "run/model000001.pt"):
        assert checkpoints.open_checkpoint(f"s3://data/{name}").path == "s3://data/run/model000001.pt"
        assert checkpoints.config_beside(f"s3://data/{name}") == {"seed": 3}
    save_npz(str(tmp_path / "a.npz"), np.zeros((2, 4, 4, 3), np.uint8))
    store.put("s3://data/a.npz", (tmp_path / "a.npz").read_bytes())
    with Npz("s3://data/a.npz") as archive:
        assert archive.names() == ["arr_0"]
    with pytest.raises(RuntimeError, match="in the middle"), files.writing("s3://data/run/b.pt") as file:
        file.write(b"half")
        raise RuntimeError("in the middle")
    assert "run/b.pt" not in store.buckets["data"]
    files.remove("s3://data/run/a.safetensors")
    assert files.names_in("s3://data/run") == ["config.json", "model000001.pt"]


REFUSED = {
    "bucket": "s3://nobody/a.tar is not there: there is no bucket 'nobody'",
    "credentials": "s3://data/a.tar is not public, and there are no credentials: set AWS_ACCESS_KEY_ID",
    "key": "s3://data/a.tar is refused to these credentials (403): take others (AWS_PROFILE), or have them allowed",
    "region": f"s3://data/a.tar is in another region: set AWS_DEFAULT_REGION={REGION}",
    "name": "s3://data_!/a.tar cannot be reached (Invalid bucket name",
    "address": "S3 cannot be asked (Invalid endpoint: nowhere): set AWS_ENDPOINT_URL to http://HOST:PORT",
    "network": "s3://data/a.tar cannot be reached (Could not connect to the endpoint URL",
    "busy": "s3://data/a.tar cannot be reached (An error occurred (503) when calling the HeadObject operation",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_bucket_that_cannot_be_read_is_given_up_in_one_sentence(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    store.put("s3://data/a.tar", write_tar(tmp_path / "a.tar", samples(range(2))).read_bytes())
    path = {"bucket": "s3://nobody/a.tar", "name": "s3://data_!/a.tar"}.get(fault, "s3://data/a.tar")
    monkeypatch.setattr("time.sleep", lambda _: None)
    if fault == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    elif fault == "key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOTHER")
    elif fault in ("address", "network"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "nowhere" if fault == "address" else "http://127.0.0.1:9")
    store.faults += {"region": [301] * 9, "busy": [503] * remote.ATTEMPTS}.get(fault, [])
    with pytest.raises(OSError, match=re.escape(REFUSED[fault])) as caught:
        find_images(path)
    assert "\n" not in str(caught.value)
    if fault == "busy":
        assert len(store.asked) == remote.ATTEMPTS


def test_a_public_bucket_needs_no_credentials(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("s3://data/1.png", picture(1))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    store.public = True
    assert files.read_file("s3://data/1.png") == picture(1)


def test_answers_that_break_off_are_asked_for_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("s3://data/1.png", picture(1))
    monkeypatch.setattr("time.sleep", lambda _: None)
    store.faults += [503, "cut", "cut"]
    assert files.read_part("s3://data/1.png", 0, 999) == picture(1)
    assert len(store.asked) == 4
    store.faults += ["cut"] * remote.ATTEMPTS
    with pytest.raises(OSError, match=r"1.png cannot be reached \(.*at most 9 attempts"):
        files.read_part("s3://data/1.png", 0, 999)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape('run `pip install "guided-diffusion[s3]"`')):
        files.resolve("s3:/data/x")
    assert files.resolve("gs://data/x") == "gs://data/x"
