"""Pictures of metrics: over the training, and over the scale of guidance. Only drawing imports matplotlib.

Rows of a table are mappings from column to value; the columns of metrics are their labels ("FID", "FD (emoji32
classifier)", "Precision", ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..runtime.atomic import replacing
from ..runtime.errors import as_user_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Line = tuple[dict[str, Any], list[Row]]  # how matplotlib draws it, and the rows of its points

SERIES = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000".split()  # colour-blind safe (Okabe & Ito 2008)
MARKERS, STROKES = "o^sDvPX", ("-", "--", ":", "-.")
HIGHER = ("Inception Score", "Classifier Score", "Precision", "Recall", "Density", "Coverage")
PAIRS = {"Precision": ("Precision", "Recall"), "Density": ("Density", "Coverage")}  # which share a panel
SECONDS = ("Recall", "Coverage")  # of the pairs
ACROSS = 3  # panels beside each other
ERROR = " standard error"  # ends the label of what is drawn as the error bars of another label
STYLE: dict[str, Any] = {"axes.grid": True, "grid.color": "#ececec", "legend.frameon": False, "backend": "agg"}


def require() -> None:
    """Refuse to go on without matplotlib."""
    with as_user_error('pictures need matplotlib: run `pip install "guided-diffusion[eval]"`', ImportError):
        import matplotlib  # noqa: F401


def base(label: str) -> str:
    """A label without the network that is named behind it."""
    return label.partition(" (")[0]


def best(rows: Sequence[Row], label: str) -> Row | None:
    """The first row with the best value of a metric; None if no row has a value."""
    sign = -1 if base(label) in HIGHER else 1
    return min(_with(rows, label), key=lambda row: sign * row[label], default=None)


def _with(rows: Sequence[Row], *labels: str) -> list[Row]:
    """The rows that have a number in each of these columns."""
    return [row for row in rows if not any(math.isnan(row.get(label, math.nan)) for label in labels)]


def _draw(
    path: str, labels: Sequence[str], size: float, panel: Callable[..., None], lines: Sequence[Line] = ()
) -> None:
    """Write a PNG with a panel for each label or pair of labels; the same numbers give the same bytes.

    :param size: of a panel, in inches.
    :param panel: called with the axes and the labels.
    """
    require()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups = [PAIRS.get(label, (label,)) for label in labels if ERROR not in label and label not in SECONDS]
    columns, rows = min(len(groups), ACROSS), -(-len(groups) // ACROSS)
    style: Any = {**matplotlib.rcParamsDefault, **STYLE}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(columns * size, rows * size * 0.85), dpi=150, layout="constrained")
        for number, group in enumerate(groups, start=1):
            panel(figure.add_subplot(rows, columns, number), *group)
        if lines:  # the legend, below the panels
            handles = [Line2D([], [], **look) for look, _ in lines]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(lines)))
        with replacing(path) as file:
            figure.savefig(file, format="png", metadata={"Software": None})


def _curve(axis: Axes, rows: Sequence[Row], x: str, label: str, look: Mapping[str, Any]) -> None:
    """A metric over another column, with error bars if its standard errors are known."""
    rows = _with(rows, label)
    errors = [row.get(label.replace(base(label), base(label) + ERROR, 1), math.nan) for row in rows]
    bars = None if all(map(math.isnan, errors)) else errors
    axis.errorbar([row[x] for row in rows], [row[label] for row in rows], yerr=bars, capsize=2, **look)


def _title(*labels: str) -> str:
    return f"{' and '.join(labels)} ({'higher' if base(labels[0]) in HIGHER else 'lower'} is better)"


def draw_progress(rows: Sequence[Row], labels: Sequence[str], path: str) -> None:
    """A panel for each metric over the step, its best value marked; precision and recall share a panel.

    :param rows: each with "step" and the metrics measured there.
    """

    def panel(axis: Axes, *group: str) -> None:
        for index, label in enumerate(group):
            look: dict[str, Any] = {"color": SERIES[index], "marker": MARKERS[index]}
            top = best(rows, label)
            name = label if top is None else f"{label}, best {top[label]:.3g}"
            _curve(axis, rows, "step", label, {**look, "linestyle": STROKES[index], "label": name})
            if top is not None:
                axis.plot(top["step"], top[label], **look, markersize=12, markerfacecolor="none")
        axis.set_xlabel("training step")
        axis.set_title(_title(*group))
        axis.legend()

    _draw(path, labels, 4.4, panel)


def draw_sweep(rows: Sequence[Row], labels: Sequence[str], path: str, *, scale: str = "guidance scale") -> None:
    """The metrics over the scale of guidance, and recall over precision, a line for each sampler and number of steps.

    As figures 4 and 5 of Dhariwal & Nichol 2021.

    :param rows: each with "sampler", "steps", "scale" and the metrics.
    :param scale: its name.
    """
    lines = _lines(rows)

    def panel(axis: Axes, *group: str) -> None:
        for look, points in lines:
            if len(group) == 2:
                _trade_off(axis, look, _with(points, *group), *group)
            else:
                _curve(axis, points, "scale", group[0], look)
        axis.set_xlabel(_title(group[0]) if len(group) == 2 else scale)
        axis.set_ylabel(_title(group[-1]))

    _draw(path, labels, 4.8, panel, lines)


def _lines(rows: Sequence[Row]) -> list[Line]:
    """A colour and a marker for each sampler, a stroke for each number of steps; the most steps are drawn solid."""
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    counts = sorted({row["steps"] for row in rows}, reverse=True)
    order = sorted(rows, key=lambda row: (samplers.index(row["sampler"]), row["steps"], float(row["scale"])))
    lines: list[Line] = []
    for (sampler, steps), points in groupby(order, key=lambda row: (row["sampler"], row["steps"])):
        index, stroke = samplers.index(sampler), counts.index(steps)
        look = {"label": f"{sampler}, {steps} steps", "color": SERIES[index % len(SERIES)]}
        look |= {"marker": MARKERS[index % len(MARKERS)], "linestyle": STROKES[stroke % len(STROKES)]}
        lines.append((look, list(points)))
    return lines


def _trade_off(axis: Axes, look: Mapping[str, Any], points: Sequence[Row], across: str, up: str) -> None:
    """One metric over another; the scale is written at both ends of the line."""
    axis.plot([row[across] for row in points], [row[up] for row in points], **look)
    for row in points[:: max(len(points) - 1, 1)]:
        where: dict[str, Any] = {"xytext": (6, 6), "textcoords": "offset points"}
        axis.annotate(f"{float(row['scale']):g}", (row[across], row[up]), color=look["color"], **where)
