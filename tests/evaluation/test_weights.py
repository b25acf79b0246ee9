"""The weights of Inception: where they are found, what is read, what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch as th
from refusals import sentence_of

from guided_diffusion.config import ClassifierConfig
from guided_diffusion.evaluation import weights
from guided_diffusion.evaluation.inception import InceptionNetwork
from guided_diffusion.evaluation.weights import SOURCES
from guided_diffusion.script_util import build_classifier


def test_addresses_are_encrypted_and_checksums_whole() -> None:
    for source in SOURCES.values():
        assert all(url.startswith("https://") for url in source.urls)
        assert len(source.sha256) == 64
    name, _, _ = SOURCES["inception"].file.partition(".")
    assert SOURCES["inception"].sha256.startswith(name.split("-")[-1])


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


@pytest.mark.slow
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
