"""What all pictures of evaluations share: their look, and how they are written. The first one imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from guided_diffusion.npz import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Draw = Callable[["Axes"], None]

# colour-blind safe (Okabe & Ito 2008)
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = "#0072b2 #e69f00 #009e73 #d55e00 #cc79a7 #56b4e9 #000000".split()
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS, LINES = "o^sDvPX", ("-", "--", ":", "-.")
GREY, PALE = "#5f5f5f", "#d9d9d9"
HIGHER = ("Inception Score", "Classifier Score", "Precision", "Recall", "Density", "Coverage")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ececec",
    "axes.axisbelow": True,
    "figure.dpi": 150.0,
}


def require() -> None:
    """Refuse to go on where no picture can be drawn.

    :raises ValueError: saying what to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            'pictures of evaluations need matplotlib, which is missing: run `pip install "guided-diffusion[eval]"`'
        ) from error


def base(label: str) -> str:
    """A label without the network that is named behind it."""
    return label.partition(" (")[0]


def is_better(label: str, value: float, other: float) -> bool:
    """Whether one value of a metric is better than another."""
    return value > other if base(label) in HIGHER else value < other


def best(rows: Sequence[Row], label: str) -> Row | None:
    """The first row with the best value of a metric; None where none has one."""
    found: Row | None = None
    for row in rows:
        if has(row, label) and (found is None or is_better(label, row[label], found[label])):
            found = row
    return found


def has(row: Row, label: str) -> bool:
    """Whether a row has a number there."""
    return isinstance(row.get(label), int | float) and not math.isnan(row[label])


def write(path: str, width: float, height: float, fill: Callable[[Figure], None]) -> None:
    """Write a picture as PNG; the same numbers give the same bytes."""
    require()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        fill(figure)
        with replacing(path) as file:
            figure.savefig(file, format="png", metadata={"Software": None})


def legend(figure: Figure, entries: Sequence[Any], columns: int) -> None:
    """A legend below the panels, never over them."""
    figure.legend(handles=list(entries), loc="outside lower center", ncols=columns)


def arrow(label: str) -> str:
    """A label, and which way is good."""
    return f"{label} ({'higher' if base(label) in HIGHER else 'lower'} is better)"
