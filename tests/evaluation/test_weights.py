"""Files from the network, and the weights of Inception: where they are found, what is read, what is refused."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch as th
from ranks import Nursery

from guided_diffusion import dist_util
from guided_diffusion.commands import download
from guided_diffusion.config import ClassifierConfig
from guided_diffusion.evaluation import weights
from guided_diffusion.evaluation.inception import InceptionNetwork
from guided_diffusion.evaluation.weights import SOURCES, Source, fetch
from guided_diffusion.script_util import build_classifier

ROOT = Path(__file__).parents[2]
CONTENT = np.random.default_rng(0).bytes(700_001)
SHA = hashlib.sha256(CONTENT).hexdigest()


def sentence_of(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args, **options)
    assert dist_util.exit_of(caught.value)[0] == 2, "raised by other code than this project's"
    text = str(caught.value)
    assert text.isprintable()
    return text


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A file of which the first of two mirrors is gone."""
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mirror").write_bytes(CONTENT)
    urls = (tmp_path / "gone").as_uri(), (tmp_path / "mirror").as_uri()
    return Source(urls=urls, file="weights.bin", sha256=SHA, size=len(CONTENT))


# ---- fetching


def test_a_file_is_fetched_once_from_the_first_mirror_that_has_it(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch(source)
    assert path == str(tmp_path / "cache" / "weights.bin")
    assert Path(path).read_bytes() == CONTENT
    shown = capsys.readouterr()
    assert f"{len(CONTENT)} bytes, sha256 as published" in shown.out
    assert "100%" in shown.err
    (tmp_path / "mirror").unlink()
    assert fetch(source) == path
    assert "is there already" in capsys.readouterr().out
    assert os.listdir(tmp_path / "cache") == ["weights.bin"]


def test_a_folder_or_a_file_may_be_named(source: Source, tmp_path: Path) -> None:
    assert fetch(source, str(tmp_path)) == str(tmp_path / "weights.bin")
    assert fetch(source, str(tmp_path / "new" / "other.bin")) == str(tmp_path / "new" / "other.bin")
    assert (tmp_path / "new" / "other.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (CONTENT[:-1] + b"x", "invalid hash value"),
        (CONTENT[:-1], "invalid hash value"),
    ],
)
def test_another_file_is_not_kept_and_a_sentence_says_what_to_do(
    source: Source, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is None:
        (tmp_path / "mirror").unlink()
    else:
        (tmp_path / "mirror").write_bytes(content)
    text = sentence_of(fetch, source)
    assert all(url in text for url in source.urls)
    assert message in text
    assert f"fetch {source.urls[0]} (700001 bytes) on another machine and put it at {tmp_path}/cache/weights" in text
    assert os.listdir(tmp_path / "cache") == []


def test_a_server_that_breaks_off_or_never_answers_is_left_for_the_next(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(weights, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as short:

        def answer() -> None:
            connection, _ = short.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 700001\r\n\r\nPK")

        thread = threading.Thread(target=answer)
        thread.start()
        urls = [f"http://127.0.0.1:{server.getsockname()[1]}/file" for server in (silent, short)]
        fetch(replace(source, urls=(*urls, source.urls[1])))
        thread.join()
    assert (tmp_path / "cache" / "weights.bin").read_bytes() == CONTENT
    assert socket.getdefaulttimeout() is None


def test_another_file_in_its_place_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"mine")
    assert "exists, but is not weights.bin" in sentence_of(fetch, source, str(tmp_path))
    assert (tmp_path / "weights.bin").read_bytes() == b"mine"
    assert fetch(replace(source, sha256=SHA[:8])).endswith("weights.bin")  # the first digits are enough


def test_a_folder_that_cannot_be_made_is_named(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be written (" in sentence_of(fetch, source, str(tmp_path / "file" / "weights.bin"))


def test_addresses_are_encrypted_and_checksums_whole() -> None:
    for source in SOURCES.values():
        assert all(url.startswith("https://") for url in source.urls)
        assert len(source.sha256) == 64
    name, _, _ = SOURCES["inception"].file.partition(".")
    assert SOURCES["inception"].sha256.startswith(name.split("-")[-1])


def test_the_command_says_what_to_do_without_a_network(tmp_path: Path, ranks: Nursery) -> None:
    environment = {"https_proxy": "http://127.0.0.1:1", "GUIDED_DIFFUSION_CACHE": str(tmp_path)}
    done = ranks.run([ROOT / "scripts" / "download.py", "inception"], ranks=1, **environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"fetch {SOURCES['inception'].urls[0]} (95628359 bytes) on another machine and put it at" in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_command_fetches_by_name(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SOURCES, "small", source)
    download.main(["small", "--out", str(tmp_path / "here.bin")])
    assert (tmp_path / "here.bin").read_bytes() == CONTENT
    with pytest.raises(SystemExit) as ended:
        download.main(["inceptoin"])
    assert ended.value.code == 2
    assert "'inceptoin' is unknown; did you mean inception?" in capsys.readouterr().err


# ---- the weights of Inception


@pytest.fixture(scope="module")
def state() -> dict[str, th.Tensor]:
    generator = th.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in InceptionNetwork().state_dict().items()}
    return {name: th.rand(shape, generator=generator) for name, shape in shapes.items() if shape}


def test_weights_are_looked_for_in_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path))
    told = sentence_of(weights.find_inception)
    places = "--inception_weights", "$GUIDED_DIFFUSION_INCEPTION", str(tmp_path), "scripts/download.py inception"
    assert all(place in told for place in places)
    (tmp_path / SOURCES["inception"].file).write_bytes(b"weights")
    assert weights.find_inception() == str(tmp_path / SOURCES["inception"].file)
    (tmp_path / "named.pth").write_bytes(b"weights")
    monkeypatch.setenv("GUIDED_DIFFUSION_INCEPTION", str(tmp_path / "named.pth"))
    assert weights.find_inception() == str(tmp_path / "named.pth")
    assert weights.find_inception(str(tmp_path / SOURCES["inception"].file)).endswith("6726825d.pth")
    monkeypatch.setenv("GUIDED_DIFFUSION_INCEPTION", str(tmp_path / "gone"))
    for call in (lambda: weights.find_inception(), lambda: weights.find_inception(str(tmp_path / "gone"))):
        told = sentence_of(call)
        assert "gone' does not exist" in told
        assert all(place in told for place in places)


def test_state_dicts_are_read_in_three_formats(tmp_path: Path, state: dict[str, th.Tensor]) -> None:
    th.save(state, tmp_path / "new.pth")
    counted = {**state, "Conv2d_1a_3x3.bn.num_batches_tracked": th.tensor(0)}
    th.save(counted, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(counted, tmp_path / "safe.safetensors")
    for name in ("new.pth", "old.pt", "safe.safetensors"):
        network = weights.load_inception(str(tmp_path / name), dtype=th.bfloat16)
        assert network.dtype == th.bfloat16
        found = network.state_dict()
        assert all(th.equal(found[key], value) for key, value in state.items())
        (tmp_path / name).unlink()


def refused(path: Path) -> str:
    text = sentence_of(weights.load_inception, str(path))
    assert str(path) in text
    return text


def test_weights_of_another_network_are_named(tmp_path: Path, state: dict[str, th.Tensor]) -> None:
    path = tmp_path / "other.pth"
    config = {"width": 64, "depth": 1, "channel_mult": "1", "attention_resolutions": "8"}
    classifier = build_classifier(ClassifierConfig(image_size=8, **{f"classifier_{k}": v for k, v in config.items()}))
    kinds: list[tuple[Any, str]] = [
        ({**state, "AuxLogits.fc.bias": th.zeros(1000)}, "AuxLogits.fc.bias is [1000] in place of none"),
        (classifier.state_dict(), "Inception network (Conv2d_1a_3x3.conv.weight is missing"),
        ({"visual.conv1.weight": th.zeros(1)}, "Inception network (Conv2d_1a_3x3.conv.weight is missing"),
        (th.optim.Adam([th.zeros(1, requires_grad=True)]).state_dict(), "it is no state dict"),
        ([1, 2], "it is no state dict"),
        ({**state, "fc.bias": th.zeros(7)}, "fc.bias is [7] in place of [1008]"),
    ]
    for content, message in kinds:
        th.save(content, path)
        assert message in refused(path)


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.pth", b"\n<!DOCTYPE html><html>", "a web page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "the pointer that Git LFS leaves"),
        ("a.pth", b"", "it is an empty file"),
        ("a.pth", b"\x80\x02cos\nsystem\n(S'echo bad'\ntR.", "does not hold the weights of the Inception network ("),
        ("a.pth", b"PK\x03\x04 cut short", "does not hold the weights of the Inception network ("),
        ("a.pb", b"graph", "a TensorFlow graph): give weights-inception-2015-12-05-6726825d.pth as --inception_w"),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in refused(tmp_path / name)
    np.savez(tmp_path / "arrays.npz", arr_0=np.zeros(3))
    assert "an npz" in refused(tmp_path / "arrays.npz")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    assert "it is a TorchScript archive" in refused(tmp_path / "script.pt")
    assert "No such file" in sentence_of(weights.load_inception, str(tmp_path / "gone"))
    assert "it is a folder): give weights-inception" in refused(tmp_path)
