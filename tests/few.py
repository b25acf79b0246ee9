"""Tables of which the fast tests take a few rows, and `make test-slow` all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest

# One sampler of each kind: drawing or not, with memory or not, of one call or several, on either grid.
FEW = ("ddpm", "ddim", "heun", "unipc", "dpm++2m", "dpm++2m_sde")


def few(rows: Iterable[Any], fast: Collection[Any] | Callable[[Any], bool] = FEW) -> list[Any]:
    """The rows for `parametrize`, slow but for those that `fast` holds, or says yes to; a row of several values is a
    tuple, and found by its first value too."""
    taken = fast if callable(fast) else lambda row: row in fast or (isinstance(row, tuple) and row[0] in fast)
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=[] if taken(row) else pytest.mark.slow)
        for row in rows
    ]
