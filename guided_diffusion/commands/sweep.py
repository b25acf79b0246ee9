"""Sample at several scales of guidance, measure each, and draw what guidance gains and costs."""

from __future__ import annotations

from .. import cli
from ._entry import entry


def sweep(flags: cli.Flags) -> None:
    """Fill the grid that the flags describe.

    :raises ValueError: naming the flag that is wrong.
    """
    from evaluations.sweep import run

    run(flags)


main = entry("sweep", sweep)
