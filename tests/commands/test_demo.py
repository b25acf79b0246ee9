"""The demonstration with few images and steps: what it prints, draws and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from guided_diffusion.commands import demo


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
    assert {name for name in ("demo.png", "film.png") if f'src="{name}"' in page} == {"demo.png", "film.png"}
