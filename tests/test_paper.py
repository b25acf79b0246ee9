"""The page of the paper's claims: which settings there are, and what is written of those that are measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of models/paper.py."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "models")])
    return runpy.run_path(str(ROOT / "models" / "paper.py"))


def test_a_claim_is_written_as_far_as_it_is_measured(
    paper: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [key for key, _ in paper["settings"](2)]
    assert len(keys) == len(set(keys)) == 2 * sum(map(len, paper["CLAIMS"].values()))
    scores = {"n": 9, "fd": 4.0, "precision": 0.5, "recall": 0.25, "score": 3.0, "accuracy": 0.75}
    measured = {key: scores for key in keys if key.startswith(("scale, conditional|0|", "guidance|none|0"))}
    space = paper["write_page"].__globals__
    for name, content in (("RESULTS", json.dumps(measured)), ("PAGE", space["PAGE"].read_text())):
        monkeypatch.setitem(space, name, tmp_path / name)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(space["pages"], "DOCS", tmp_path)
    paper["write_page"]()
    text = (tmp_path / "PAGE").read_text()
    assert "| 0 | 4.00 ± 0.00 | 0.500 ± 0.000 | 0.250 ± 0.000 | 3.00 ± 0.00 | 75.0% ± 0.0% | 2 |" in text
    assert "| none | 4.00 | 0.500 | 0.250 | 3.00 | 75.0% | 1 |" in text
    assert text.partition("<!-- trainings -->")[0].count("Not measured yet") == len(paper["CLAIMS"]) - 2
    with Image.open(tmp_path / "paper.png") as picture:
        assert picture.width > picture.height


@pytest.mark.parametrize("name", ["paper.py", "trainings.py"])
def test_the_committed_page_is_what_the_committed_results_give(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "models"), *sys.path])
    module = runpy.run_path(str(ROOT / "models" / name))
    space = module["write_page"].__globals__
    text = space["PAGE"].read_text()
    monkeypatch.setitem(space, "PAGE", tmp_path / "page")
    monkeypatch.setattr(space["pages"], "DOCS", tmp_path)
    (tmp_path / "page").write_text(text)
    module["write_page"]()
    assert (tmp_path / "page").read_text() == text
