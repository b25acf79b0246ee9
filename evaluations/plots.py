"""Curves: metrics over the training, and over the scale of guidance.

Rows of a table are mappings from column to value; the columns of metrics bear their labels ("FID", "FD (emoji32
classifier)", "Precision", ...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from evaluations.figures import HIGHER, LINES, MARKERS, SERIES, Draw, Row, arrow, base, best, has, legend, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAIRS = (("Precision", "Recall"), ("Density", "Coverage"))
ACROSS = 3  # panels beside each other
ERROR = " standard error"  # of the label before it: drawn as bars, not as a curve of their own

# ---- a metric over the training


def draw_progress(rows: Sequence[Row], labels: Sequence[str], path: str) -> None:
    """A panel for each metric over the step, the best of each marked; precision and recall share one.

    :param rows: each with "step" and the metrics measured there.
    """
    panels = _grouped(labels)

    def fill(figure: Figure) -> None:
        for axis, group in zip(_axes(figure, len(panels)), panels, strict=True):
            for index, label in enumerate(group):
                _curve(axis, rows, label, index, alone=len(group) == 1)
            _finish_progress(axis, group)

    write(path, *_size(len(panels), 4.6, 3.4), fill)


def _size(panels: int, width: float, height: float) -> tuple[float, float]:
    """Of a picture with panels of a size, in rows of at most `ACROSS`."""
    return min(panels, ACROSS) * width, -(-panels // ACROSS) * height


def _axes(figure: Figure, panels: int) -> list[Axes]:
    """The panels, row by row."""
    rows = -(-panels // ACROSS)
    grid = list(figure.subplots(rows, min(panels, ACROSS), squeeze=False).flat)
    for empty in grid[panels:]:
        empty.set_axis_off()
    return grid[:panels]


def _grouped(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Labels by panel, in order; pairs together, and no panel for what is drawn as bars."""
    groups: list[tuple[str, ...]] = []
    for label in labels:
        group = next((pair for pair in PAIRS if label in pair), (label,))
        if ERROR not in label and group not in groups:
            groups.append(group)
    return groups


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


def _errors(rows: Sequence[Row], label: str) -> list[float] | None:
    """The standard error in each row; None where there are none."""
    name = label.replace(base(label), base(label) + ERROR, 1)
    return [row.get(name, math.nan) for row in rows] if any(has(row, name) for row in rows) else None


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


@dataclass
class _Series:
    """The rows of one sampler and number of steps, in the order of their scales."""

    sampler: str
    steps: int
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.sampler}, {self.steps} steps"

    def look(self, samplers: Sequence[str], steps: Sequence[int]) -> dict[str, Any]:
        """A colour and a marker for each sampler, a line for each number of steps; the most steps are drawn solid."""
        colour, line = samplers.index(self.sampler), sorted(steps, reverse=True).index(self.steps)
        return {
            "color": SERIES[colour % len(SERIES)],
            "marker": MARKERS[colour % len(MARKERS)],
            "linestyle": LINES[line % len(LINES)],
            "markerfacecolor": SERIES[colour % len(SERIES)] if line == 0 else "white",
        }


def draw_sweep(rows: Sequence[Row], labels: Sequence[str], path: str, *, scale: str = "guidance scale") -> None:
    """The metrics over the scale of guidance, and recall over precision, a line for each sampler and number of steps.

    As figures 4 and 5 of Dhariwal & Nichol 2021.

    :param rows: each with "sampler", "steps", "scale" and the metrics.
    :param scale: what the scale is called.
    """
    lines = _series(rows)
    looks = _looks(lines)
    panels: list[Draw] = []
    for group in _grouped(labels):
        if len(group) == 1:
            panels.append(_over_scale(lines, looks, group[0], scale))
        else:
            panels.append(_against(lines, looks, group, scale))

    def fill(figure: Figure) -> None:
        for axis, draw in zip(_axes(figure, len(panels)), panels, strict=True):
            draw(axis)
        legend(figure, _line_legend(lines, looks), min(4, len(lines)))

    write(path, *_size(len(panels), 4.8, 4.3), fill)


def _series(rows: Sequence[Row]) -> list[_Series]:
    found: dict[tuple[str, int], _Series] = {}
    for row in rows:
        key = str(row["sampler"]), int(row["steps"])
        found.setdefault(key, _Series(*key)).rows.append(row)
    for line in found.values():
        line.rows.sort(key=lambda row: float(row["scale"]))
    return list(found.values())


def _looks(lines: Sequence[_Series]) -> list[dict[str, Any]]:
    samplers, steps = (list(dict.fromkeys(values)) for values in ([s.sampler for s in lines], [s.steps for s in lines]))
    return [line.look(samplers, steps) for line in lines]  # type: ignore[arg-type]


def _over_scale(lines: Sequence[_Series], looks: Sequence[Any], label: str, scale: str) -> Draw:
    def draw(axis: Axes) -> None:
        for line, look in zip(lines, looks, strict=True):
            there = [row for row in line.rows if has(row, label)]
            bars = _errors(there, label)
            axis.errorbar([r["scale"] for r in there], [r[label] for r in there], yerr=bars, capsize=2, **look)
        _scale_axis(axis, sorted({float(row["scale"]) for line in lines for row in line.rows}))
        axis.set_xlabel(scale)
        axis.set_ylabel(arrow(label))

    return draw


def _scale_axis(axis: Axes, scales: Sequence[float]) -> None:
    """Ticks at the scales themselves; linear up to the least of them and logarithmic above where they span much."""
    positive = [value for value in scales if value > 0]
    if positive and positive[-1] > 8 * positive[0]:
        axis.set_xscale("symlog", linthresh=positive[0], linscale=0.6)
    axis.set_xticks(scales, [f"{value:g}" for value in scales])
    axis.minorticks_off()


def _against(lines: Sequence[_Series], looks: Sequence[Any], group: Sequence[str], scale: str) -> Draw:
    """The second of two metrics over the first; points grow with the scale, and the ends of each line tell theirs."""
    across, up = group

    def draw(axis: Axes) -> None:
        for line, look in zip(lines, looks, strict=True):
            there = [row for row in line.rows if has(row, across) and has(row, up)]
            places = np.array([(row[across], row[up]) for row in there]).reshape(-1, 2)
            axis.plot(places[:, 0], places[:, 1], color=look["color"], linestyle=look["linestyle"], linewidth=1.2)
            sizes = 16 * 1.6 ** np.arange(len(there))
            own = {"marker": look["marker"], "edgecolors": look["color"], "facecolors": look["markerfacecolor"]}
            axis.scatter(places[:, 0], places[:, 1], s=sizes.clip(max=160), zorder=3, **own)
            _name_ends(axis, [f"{float(row['scale']):g}" for row in there], places, look["color"])
        axis.margins(0.12)
        axis.set_xlabel(arrow(across))
        axis.set_ylabel(arrow(up))
        axis.set_title(f"points grow with the {scale}")

    return draw


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


def _line_legend(lines: Sequence[_Series], looks: Sequence[Any]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=line.name, **look) for line, look in zip(lines, looks, strict=True)]
