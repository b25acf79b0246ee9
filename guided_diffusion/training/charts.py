"""Line charts as SVG inside a page, without JavaScript, in the colours of the page, with a tooltip per stretch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 210, 48, 12, 10, 24  # of a chart and its margins
STRETCHES = 120  # of the steps: a line has one point in each
MARKED = 24  # points of a line, up to which each is marked
LOG_FROM = 8.0  # ratio of the largest to the smallest value from which an axis is logarithmic

Points = Sequence[tuple[float, float]]  # (step, value)
Curves = Sequence[tuple[str, Points]]  # by name

CHART_STYLE = """
figure.card{display:flex;flex-direction:column}
svg{width:100%;height:auto;display:block;margin-top:auto}
svg text{fill:var(--soft);font-size:11.5px}
.grid{stroke:var(--line)}
.curve{fill:none;stroke-width:1.8;stroke-linejoin:round}
.band{stroke:none;opacity:.18}
.hover{fill:transparent}
.hover:hover{fill:var(--ink);opacity:.12}
.k{display:inline-block;width:.8em;height:.8em;border-radius:3px;margin-right:.35em}
""" + "".join(f".c{i}{{stroke:var(--c{i})}}.b{i},.k{i}{{fill:var(--c{i});background:var(--c{i})}}\n" for i in range(5))


class _Point(NamedTuple):
    """The mean of the values of a stretch, between the least and the greatest."""

    x: float
    y: float
    low: float
    high: float


class _Axis(NamedTuple):
    """Values from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers on the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                ticks = [factor * 10.0**exponent for exponent in decades for factor in factors]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= 6:
                    return ticks
            return ticks[:: math.ceil(len(ticks) / 6)]
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: 0.0312, 1.5e-5, 12k, 1.2M."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1000 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def chart(title: str, curves: Curves, *, scale: str = "auto", note: str = "") -> str:
    """A chart of some curves as an HTML figure, '' if there is nothing to draw.

    :param scale: of the values: "linear", "zero" (linear and with 0), or "auto", logarithmic where they are far apart.
    """
    drawn = [(name, sorted(point for point in points if all(map(math.isfinite, point)))) for name, points in curves]
    steps = sorted({x for _, points in drawn for x, _ in points})
    if not steps:
        return ""
    across = _Axis(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1, LEFT, WIDTH - RIGHT)
    count = min(STRETCHES, len(steps))
    thinned = [_thinned(points, across, count) for _, points in drawn]
    up = _upward([point for line in thinned for point in line.values()], scale)
    parts = [_grid(across, up), *(_line(line, index % 5, across, up) for index, line in enumerate(thinned))]
    parts += _tooltips([name for name, _ in drawn], thinned, across, count)
    last = [(name, points[-1][1]) for name, points in curves if points]
    keys = "".join(
        f'<span><i class="k k{i % 5}"></i>{escape(name)} <b>{short(y)}</b></span>' for i, (name, y) in enumerate(last)
    )
    size, about = f"0 0 {WIDTH} {HEIGHT}", f"<p>{escape(note)}</p>" if note else ""
    picture = f'<svg viewBox="{size}" role="img" aria-label="{escape(title)} over the step">{"".join(parts)}</svg>'
    return f'<figure class="card"><h3>{escape(title)}</h3>{about}<div class="keys">{keys}</div>{picture}</figure>'


def _thinned(points: Points, across: _Axis, count: int) -> dict[int, _Point]:
    """One point for each stretch of the axis that holds some."""
    result, span = {}, across.high - across.low
    for index, group in groupby(points, lambda point: min(int((point[0] - across.low) / span * count), count - 1)):
        xs, ys = zip(*group, strict=True)
        result[index] = _Point(sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys))
    return result


def _upward(points: Sequence[_Point], scale: str) -> _Axis:
    low, high = min(point.low for point in points), max(point.high for point in points)
    log = scale == "auto" and low > 0 and high > low * LOG_FROM
    if scale == "zero":
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    room = 0.0 if log else (high - low) / 20
    return _Axis(low if scale == "zero" and not low else low - room, high + room, HEIGHT - BOTTOM, TOP, log)


def _grid(across: _Axis, up: _Axis) -> str:
    lines = []
    for tick in up.ticks():
        y = up.at(tick)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in across.ticks():
        anchor = "end" if across.at(tick) > WIDTH - RIGHT - 16 else "middle"
        lines.append(f'<text x="{across.at(tick):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{short(tick)}</text>')
    return "".join(lines)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _line(line: dict[int, _Point], colour: int, across: _Axis, up: _Axis) -> str:
    """A curve; behind it the range of the values of each stretch, or on it its points where these are few."""
    points = list(line.values())
    parts = (
        [f'<path class="curve c{colour}" d="{_path((across.at(p.x), up.at(p.y)) for p in points)}"/>'] if points else []
    )
    if any(point.low < point.high for point in points):
        edge = [(across.at(p.x), up.at(p.high)) for p in points]
        edge += [(across.at(p.x), up.at(p.low)) for p in reversed(points)]
        parts.insert(0, f'<path class="band b{colour}" d="{_path(edge)}Z"/>')
    if len(points) <= MARKED:
        place = [(across.at(point.x), up.at(point.y)) for point in points]
        parts += [f'<circle class="b{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in place]
    return "".join(parts)


def _tooltips(names: Sequence[str], lines: Sequence[dict[int, _Point]], across: _Axis, count: int) -> list[str]:
    """A strip over each stretch that says its values when the pointer rests on it."""
    width, parts = (across.end - across.start) / count, []
    for index in sorted({index for line in lines for index in line}):
        values = [(name, line[index]) for name, line in zip(names, lines, strict=True) if index in line]
        text = "\n".join([f"step {values[0][1].x:,.0f}", *(f"{name}: {point.y:.4g}" for name, point in values)])
        place = f'x="{across.start + width * index:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        parts.append(f'<rect class="hover" {place}><title>{escape(text)}</title></rect>')
    return parts
