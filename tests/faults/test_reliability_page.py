"""Every test that docs/reliability.md names is there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def named() -> list[tuple[str, str, bool]]:
    """(file, function, whether the page calls it slow) of every test on the page; `::test` is of the file before."""
    found, file = [], ""
    for path, function, slow in re.findall(r"`([\w/.]*)::(\w+)`( \(slow\))?", PAGE):
        file = path or file
        found.append((file, function, bool(slow)))
    return found


@functools.cache
def functions(file: str) -> dict[str, bool]:
    """The tests of a file: name -> whether it is slow."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: "pytest.mark.slow" in map(ast.unparse, node.decorator_list) for node in defined}


def test_every_promise_has_a_test_that_exists() -> None:
    assert len(named()) > 50
    for file, function, slow in named():
        assert functions(file).get(function) == slow, f"{file}::{function} is not there, or slow and not called so"


def test_every_row_of_a_promise_names_one() -> None:
    promises = PAGE[PAGE.index("## The promises") : PAGE.index("## What resuming")]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 30
    assert [row for row in rows if "::test_" not in row] == []
