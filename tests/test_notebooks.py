"""The notebooks run from top to bottom, and are committed with outputs that are small and of no machine."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
LARGEST = 2_000_000  # bytes of all of them
LOCAL = re.compile(r"/(?:home|root|tmp|work|Users|private|mnt)/|[A-Z]:\\\\")


def cells(path: Path) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert notebook["metadata"].keys() <= {"kernelspec", "language_info"}
    found: list[dict[str, Any]] = notebook["cells"]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_was_executed_in_order_without_errors_and_shows_pictures(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_names_no_place_of_one_machine(path: Path) -> None:
    for cell in cells(path):
        texts = ["".join(cell["source"])]
        for output in cell.get("outputs", []):
            texts += ["".join(output.get("text", "")), "".join(output.get("data", {}).get("text/plain", ""))]
            png = base64.b64decode(output.get("data", {}).get("image/png", ""))
            assert b"tEXt" not in png  # versions and the like, which differ from machine to machine
        assert [text for text in texts if LOCAL.search(text)] == []
        assert cell["metadata"] == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_links_of_a_notebook_lead_to_files(path: Path) -> None:
    texts = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (FOLDER / link.partition("#")[0]).exists()] == []


def test_the_notebooks_are_small_and_listed() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < LARGEST
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((\w+)\.ipynb\)", page)) == set(NAMES)
    assert len(NAMES) == 7


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make notebooks` runs it; an error of a cell is raised, and shows as many pictures as are committed."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    from execute import execute

    def pictures(found: list[Any]) -> int:
        return sum("image/png" in output.get("data", {}) for cell in found for output in cell.get("outputs", []))

    assert pictures(execute(path).cells) == pictures(cells(path))
