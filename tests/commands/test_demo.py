"""The demonstration with few images and steps: what it prints, draws and writes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from guided_diffusion.commands import demo
from guided_diffusion.networks.context import MINILM


def test_the_demo_samples_measures_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SHOWN", 1)
    monkeypatch.setitem(demo.SAMPLING, "steps", 3)
    demo.main(["--log_dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == [*demo.SETTINGS]
    results = json.loads((tmp_path / "results.json").read_text())["samples"]
    page = (tmp_path / "index.html").read_text()
    for title, values in results.items():
        assert 0 <= values["accuracy"] <= 1
        assert f"{values['fd']:.2f}" in page
        assert title in page
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 4 * 64
    assert (tmp_path / "film.png").exists()
    drawn = {"demo.png", "film.png", "enlarged.png"} | ({"texts.png"} if find_spec(MINILM) else set())
    assert {path.name for path in tmp_path.glob("*.png") if f'src="{path.name}"' in page} == drawn


def test_without_the_bundled_pictures_a_sentence_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an environment with nothing but the installed package."""
    monkeypatch.setattr(demo, "PICTURES", tmp_path / "datasets" / "emoji64.zip")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        demo.main(["--train=True"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "emoji64.zip does not exist: the pictures come with a checkout" in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_demo_ends_with_a_command_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--data_dir", "absent", "--batch_size", "none", "--log_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        demo.launch("Training", "image_train", *words)
    assert ended.value.code == 2
    assert any("error: " in line and "--batch_size" in line for line in capfd.readouterr().err.splitlines())


@pytest.mark.slow
def test_the_demos_once_samples_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, fewer = demo.launch, {"600": "3", "300": "2", "250": "2"}
    monkeypatch.setattr(demo, "launch", lambda title, *words: real(title, *[fewer.get(word, word) for word in words]))
    monkeypatch.setattr(demo, "SHOWN", 1)
    monkeypatch.setitem(demo.SAMPLING, "steps", 3)
    demo.main(["--train=True", f"--log_dir={tmp_path}"])
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("unguided ")]
    assert set(json.loads((tmp_path / "results.json").read_text())["samples"]) == set(demo.SETTINGS)
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) > 9 * 32
    assert "this training" in (tmp_path / "index.html").read_text()
    networks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model*.pt")}
    assert {path.name for path in networks} == {"model000003.pt", "model000002.pt"}
    demo.main(["--train=True", f"--log_dir={tmp_path}"])
    assert networks == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model*.pt")}
