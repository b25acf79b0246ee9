"""Pictures of metrics: over the training, and over the scale of guidance. Only drawing imports matplotlib.

Rows of a table are mappings from column to value; the columns of metrics bear their labels ("FID", "FD (emoji32
classifier)", "Precision", ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..runtime.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

SERIES = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000".split()  # colour-blind safe (Okabe & Ito 2008)
MARKERS, LINES = "o^sDvPX", ("-", "--", ":", "-.")
HIGHER = ("Inception Score", "Classifier Score", "Precision", "Recall", "Density", "Coverage")
PAIRS = (("Precision", "Recall"), ("Density", "Coverage"))
ACROSS = 3  # panels beside each other
ERROR = " standard error"  # of the label before it: drawn as bars, not as a curve of their own
STYLE: dict[str, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 10),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "grid.color": "#ececec",
    "figure.dpi": 150.0,
    "backend": "agg",
}


def require() -> None:
    """:raises ValueError: if matplotlib is missing, saying what to install."""
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
    """Whether a row has a number in a column."""
    return isinstance(row.get(label), int | float) and not math.isnan(row[label])


def _draw(
    path: str,
    groups: Sequence[Sequence[str]],
    size: tuple[float, float],
    panel: Callable[[Axes, Sequence[str]], None],
    legend: Sequence[_Line] = (),
) -> None:
    """Write a PNG with a panel of a size for each group of labels; the same numbers give the same bytes."""
    require()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns, rows = min(len(groups), ACROSS), -(-len(groups) // ACROSS)
    style: Any = {**matplotlib.rcParamsDefault, **STYLE}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, group in zip(axes, groups, strict=False):
            panel(axis, group)
        for axis in axes[len(groups) :]:
            axis.set_axis_off()
        if legend:  # below the panels, never over them
            handles = [Line2D([], [], label=line.label, **line.look) for line in legend]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(legend)))
        with replacing(path) as file:
            figure.savefig(file, format="png", metadata={"Software": None})


def _groups(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Labels by panel, in order; pairs together, and no panel for what is drawn as bars."""
    groups: list[tuple[str, ...]] = []
    for label in labels:
        group = next((pair for pair in PAIRS if label in pair), (label,))
        if ERROR not in label and group not in groups:
            groups.append(group)
    return groups


def _errors(rows: Sequence[Row], label: str) -> list[float] | None:
    """The standard error in each row; None where there are none."""
    name = label.replace(base(label), base(label) + ERROR, 1)
    return [row.get(name, math.nan) for row in rows] if any(has(row, name) for row in rows) else None


def arrow(label: str) -> str:
    """A label, and which direction is better."""
    return f"{label} ({'higher' if base(label) in HIGHER else 'lower'} is better)"


# ---- a metric over the training


def draw_progress(rows: Sequence[Row], labels: Sequence[str], path: str) -> None:
    """A panel for each metric over the step, the best of each marked; precision and recall share one.

    :param rows: each with "step" and the metrics measured there.
    """

    def panel(axis: Axes, group: Sequence[str]) -> None:
        for index, label in enumerate(group):
            _curve(axis, rows, label, index, alone=len(group) == 1)
        _finish_progress(axis, group)

    _draw(path, _groups(labels), (4.6, 3.4), panel)


def _curve(axis: Axes, rows: Sequence[Row], label: str, index: int, *, alone: bool) -> None:
    """One metric, its best value ringed and written beside it or, where the panel has several, into the legend."""
    there = [row for row in rows if has(row, label)]
    steps, values = ([row[name] for row in there] for name in ("step", label))
    bars = _errors(there, label)
    look: dict[str, Any] = {"color": SERIES[index], "marker": MARKERS[index], "linestyle": LINES[index]}
    top = best(there, label)
    named = label if top is None else f"{label}, best {top[label]:.3g}"
    axis.errorbar(steps, values, yerr=bars, label=named, capsize=2, **look)
    if top is not None:
        axis.plot(top["step"], top[label], MARKERS[index], ms=12, mfc="none", mec=SERIES[index], mew=1.2)
    if top is not None and alone:
        axis.annotate(
            f"{top[label]:.4g}",
            (top["step"], top[label]),
            xytext=(0, 11 if base(label) in HIGHER else -12),
            textcoords="offset points",
            ha="center",
            va="bottom" if base(label) in HIGHER else "top",
            color=SERIES[index],
        )


def _finish_progress(axis: Axes, group: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("training step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axis.margins(x=0.08, y=0.22)
    axis.ticklabel_format(useOffset=False)
    axis.set_title(arrow(" and ".join(group)) if len(group) == 1 else f"{' and '.join(group)} (higher is better)")
    if len(group) > 1:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(group))


# ---- the trade-off of guidance


@dataclass(frozen=True)
class _Line:
    """The rows of one sampler and number of steps, in the order of their scales, and how matplotlib draws them."""

    label: str
    look: Mapping[str, Any]
    rows: Sequence[Row]


def _lines(rows: Sequence[Row]) -> list[_Line]:
    """A colour and a marker for each sampler, a line for each number of steps; the most steps are drawn solid."""
    keys = [(str(row["sampler"]), int(row["steps"])) for row in rows]
    samplers, counts = list(dict.fromkeys(name for name, _ in keys)), sorted({n for _, n in keys}, reverse=True)
    lines = []
    for key in dict.fromkeys(keys):
        colour, line = samplers.index(key[0]), counts.index(key[1])
        look = {
            "color": SERIES[colour % len(SERIES)],
            "marker": MARKERS[colour % len(MARKERS)],
            "linestyle": LINES[line % len(LINES)],
            "markerfacecolor": SERIES[colour % len(SERIES)] if line == 0 else "white",
        }
        chosen = [row for row, of in zip(rows, keys, strict=True) if of == key]
        lines.append(_Line(f"{key[0]}, {key[1]} steps", look, sorted(chosen, key=lambda row: float(row["scale"]))))
    return lines


def draw_sweep(rows: Sequence[Row], labels: Sequence[str], path: str, *, scale: str = "guidance scale") -> None:
    """The metrics over the scale of guidance, and recall over precision, a line for each sampler and number of steps.

    As figures 4 and 5 of Dhariwal & Nichol 2021.

    :param rows: each with "sampler", "steps", "scale" and the metrics.
    :param scale: what the scale is called.
    """
    lines = _lines(rows)

    def panel(axis: Axes, group: Sequence[str]) -> None:
        if len(group) == 1:
            _over_scale(axis, lines, group[0])
            axis.set_xlabel(scale)
        else:
            _against(axis, lines, *group)
            axis.set_title(f"points grow with the {scale}")

    _draw(path, _groups(labels), (4.8, 4.3), panel, lines)


def _over_scale(axis: Axes, lines: Sequence[_Line], label: str) -> None:
    for line in lines:
        there = [row for row in line.rows if has(row, label)]
        scales, values = ([row[name] for row in there] for name in ("scale", label))
        axis.errorbar(scales, values, yerr=_errors(there, label), capsize=2, **line.look)
    _scale_axis(axis, sorted({float(row["scale"]) for line in lines for row in line.rows}))
    axis.set_ylabel(arrow(label))


def _scale_axis(axis: Axes, scales: Sequence[float]) -> None:
    """Ticks at the scales themselves; linear up to the least of them and logarithmic above where they span much."""
    positive = [value for value in scales if value > 0]
    if positive and positive[-1] > 8 * positive[0]:
        axis.set_xscale("symlog", linthresh=positive[0], linscale=0.6)
    axis.set_xticks(scales, [f"{value:g}" for value in scales])
    axis.minorticks_off()


def _against(axis: Axes, lines: Sequence[_Line], across: str, up: str) -> None:
    """The second of two metrics over the first; points grow with the scale, and the ends of each line tell theirs."""
    for line in lines:
        there = [row for row in line.rows if has(row, across) and has(row, up)]
        places = np.array([(row[across], row[up]) for row in there]).reshape(-1, 2)
        colour, marker, style, face = (line.look[key] for key in ("color", "marker", "linestyle", "markerfacecolor"))
        axis.plot(places[:, 0], places[:, 1], color=colour, linestyle=style, linewidth=1.2)
        sizes = (16 * 1.6 ** np.arange(len(there))).clip(max=160)
        axis.scatter(places[:, 0], places[:, 1], s=sizes, zorder=3, marker=marker, edgecolors=colour, facecolors=face)
        _name_ends(axis, [f"{float(row['scale']):g}" for row in there], places, colour)
    axis.margins(0.12)
    axis.set_xlabel(arrow(across))
    axis.set_ylabel(arrow(up))


def _name_ends(axis: Axes, names: Sequence[str], places: npt.NDArray[Any], colour: str) -> None:
    """Names at the two ends of a line, on the side away from its next point."""
    from matplotlib.patheffects import withStroke

    spread = np.ptp(places, axis=0) + 1e-9 if len(places) else 1.0
    for end, next_one in ((0, 1), (-1, -2)) if len(places) > 1 else ():
        away = (places[end] - places[next_one]) / spread
        away = 13 * away / max(float(np.hypot(*away)), 1e-9)
        halo = [withStroke(linewidth=2.5, foreground="white")]
        look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "path_effects": halo}
        axis.annotate(names[end], places[end], xytext=away, color=colour, fontsize=9, zorder=4, **look)
