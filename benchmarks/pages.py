"""Tables in Markdown, and where they go in a page of docs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
SPEED = DOCS / "benchmarks.md"


def lines(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is words, and whose other columns are numbers."""
    return lines([columns, ["---", *["--:"] * (len(columns) - 1)], *([str(cell) for cell in row] for row in rows)])


def replaced(text: str, key: str, block: str) -> str:
    """The text with a block between the markers of a key.

    :raises ValueError: if it does not have both.
    """
    start, end = f"<!-- {key} -->\n", f"<!-- end of {key} -->"
    if start not in text or end not in text:
        raise ValueError(f"the text has no place for {key}: write {start.strip()!r} and {end.strip()!r}")
    before, rest = text.split(start, 1)
    return before + start + block + "\n" + end + rest.split(end, 1)[1]


def write(page: Path, key: str, block: str) -> None:
    """Put a block between the markers of a key in a page."""
    page.write_text(replaced(page.read_text(encoding="utf-8"), key, block), encoding="utf-8")
