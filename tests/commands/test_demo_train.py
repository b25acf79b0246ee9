"""The training demonstration: its parts here, all of it with few steps among the slow tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from guided_diffusion.commands import demo, demo_train
from guided_diffusion.commands.sections import DemoTrainConfig


def test_without_the_bundled_pictures_a_sentence_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an environment with nothing but the installed package."""
    monkeypatch.setattr(demo_train, "PICTURES", tmp_path / "datasets" / "emoji64.zip")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        demo_train.main([])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "emoji64.zip does not exist: the pictures come with a checkout" in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_demo_ends_with_a_command_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--data_dir", "absent", "--batch_size", "none", "--log_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        demo_train.launch("Training", "image_train", *words)
    assert ended.value.code == 2
    assert any("error: " in line and "--batch_size" in line for line in capfd.readouterr().err.splitlines())


@pytest.mark.slow
def test_the_demo_trains_once_samples_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, fewer = demo_train.launch, {"600": "3", "300": "2", "250": "2"}
    monkeypatch.setattr(
        demo_train, "launch", lambda title, *words: real(title, *[fewer.get(word, word) for word in words])
    )
    monkeypatch.setattr(demo, "SHOWN", 1)
    monkeypatch.setitem(demo.SAMPLING, "steps", 3)
    demo_train.show(DemoTrainConfig(log_dir=str(tmp_path)))
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("unguided ")]
    assert set(json.loads((tmp_path / "results.json").read_text())["samples"]) == set(demo.SETTINGS)
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) > 9 * 32
    assert "this training" in (tmp_path / "index.html").read_text()
    networks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model*.pt")}
    assert {path.name for path in networks} == {"model000003.pt", "model000002.pt"}
    demo_train.show(DemoTrainConfig(log_dir=str(tmp_path)))
    assert networks == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model*.pt")}
