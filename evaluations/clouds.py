"""The picture of two sets of images as clouds of features, one over the other.

Shapes: N images, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from evaluations.figures import BLACK, BLUE, GREY, PALE, RED, Draw, base, legend, write
from evaluations.metrics import manifold_radii, statistics
from evaluations.scores import FeatureSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

DRAWN, MANIFOLD, NEIGHBOURS = 800, 10_000, 3  # points of a cloud, points of a manifold, the k of its radii
LABEL = 16  # letters of a metric's name for which there is room without more
CELLS = 96  # of a density, along one side
SHARES = (0.5, 0.8, 0.95)  # of the images, inside the outlines of a density


def draw_comparison(reference: FeatureSet, samples: FeatureSet, results: Mapping[str, float], path: str) -> None:
    """Features of both on the first two principal components of the reference's, and the numbers.

    Left, samples over the density of the reference, those outside of its manifold (Kynkaanniemi et al. 2019) marked:
    what precision counts. Right, the reference over the density of the samples: what recall counts. A reference of
    statistics alone is drawn as the Gaussian that they describe.

    :param results: value of each metric by label.
    :raises ValueError: if the samples have no features, or the reference neither features nor statistics.
    """
    if samples.pool is None or (reference.pool is None and reference.pool_statistics is None):
        raise ValueError("the picture compares features, and there are none: leave it out, or give images")
    axes = _principal(reference)
    panels, bounds = [*_panels(reference, samples, axes, results)], _bounds(reference, samples, axes)
    known = f"{reference.n:,} reference images" if reference.n else "statistics of the reference"
    lines = [f"{samples.n:,} samples", known]
    more = 0.5 * any(len(base(label)) > LABEL for label in results)

    def fill(figure: Figure) -> None:
        ratios = [*[1.0] * len(panels), 0.5 + more / 4.1]
        grid: Any = figure.subplots(1, len(panels) + 1, width_ratios=ratios)
        for axis, draw in zip(grid, panels, strict=False):
            draw(axis)
            _finish_cloud(axis, axes, bounds)
        _write_table(grid[-1], lines, results)
        legend(figure, _cloud_legend(len(panels) == 2), 4)

    write(path, 4.1 * len(panels) + 2.1 + more, 4.7, fill)


@dataclass(frozen=True)
class _Components:
    """The plane that clouds are drawn on: mean [D], directions [2, D], their shares of the variance."""

    mean: Array
    directions: Array
    shares: tuple[float, float]

    def of(self, pool: Array) -> Array:
        """[N, 2] of features [N, D]."""
        projected: Array = (pool.astype(np.float64) - self.mean) @ self.directions.T
        return projected


def _principal(reference: FeatureSet) -> _Components:
    known = reference.pool_statistics or statistics(_some(reference.pool, MANIFOLD))
    values, vectors = np.linalg.eigh(known.cov)
    directions = vectors[:, ::-1][:, :2].T
    largest = np.abs(directions).argmax(axis=1)
    signs = np.sign(directions[np.arange(len(directions)), largest])  # else they are the linear algebra library's
    total = max(float(values.sum()), np.finfo(float).tiny)
    return _Components(known.mean, directions * signs[:, None], (values[-1] / total, values[-2] / total))


def _some(pool: Array | None, most: int) -> Array:
    """At most so many rows, evenly over all."""
    assert pool is not None
    return pool if len(pool) <= most else pool[np.arange(most) * len(pool) // most]


def _panels(
    reference: FeatureSet, samples: FeatureSet, axes: _Components, results: Mapping[str, float]
) -> Iterator[Draw]:
    if reference.pool is None:
        assert samples.pool is not None
        assert reference.pool_statistics is not None
        yield _over_gaussian(axes.of(_some(samples.pool, DRAWN)), axes, reference.pool_statistics.cov)
        return
    for one, other, title, label in (
        (samples.pool, reference.pool, "samples over the reference", "Precision"),
        (reference.pool, samples.pool, "reference over the samples", "Recall"),
    ):
        said = f"\n{label} {results[label]:.3f}" if label in results else ""
        yield _over_density(one, other, axes, f"{title}{said}")


def _over_density(points: Array | None, others: Array | None, axes: _Components, title: str) -> Draw:
    """Points marked by whether they lie in the manifold of the others, over the density of these."""
    drawn, manifold = _some(points, DRAWN), _some(others, MANIFOLD)
    place, inside = axes.of(drawn), _inside(drawn, manifold)
    middle = axes.of(manifold)

    def draw(axis: Axes) -> None:
        _density(axis, middle)
        for chosen, colour, marker in ((inside, BLUE, "o"), (~inside, RED, "X")):
            look: dict[str, Any] = {"s": 11 if marker == "o" else 16, "alpha": 0.7, "linewidths": 0, "c": colour}
            axis.scatter(place[chosen, 0], place[chosen, 1], marker=marker, zorder=3, **look)
        axis.set_title(title if "\n" in title else f"{title}\n{inside.mean():.0%} of them in its manifold")

    return draw


def _over_gaussian(place: Array, axes: _Components, cov: Array) -> Draw:
    """Points over the ellipses of one and two standard deviations of a Gaussian."""
    spread = axes.directions @ cov @ axes.directions.T
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = np.linalg.cholesky(spread + 1e-12 * np.eye(2)) @ np.stack([np.cos(angle), np.sin(angle)])

    def draw(axis: Axes) -> None:
        for radius in (1, 2):
            axis.fill(*(radius * circle), facecolor=PALE, alpha=0.6, edgecolor=GREY, linewidth=0.8)
        axis.scatter(place[:, 0], place[:, 1], s=11, alpha=0.7, linewidths=0, c=BLUE, zorder=3)
        axis.set_title("samples over the reference's Gaussian\n(1 and 2 standard deviations)")

    return draw


def _inside(points: Array, manifold: Array) -> Array:
    """Whether each of points [M, D] lies within the k-th neighbour's distance of one of the manifold's [N, D]."""
    radii = manifold_radii(manifold, min(NEIGHBOURS, len(manifold) - 1))  # squared
    own, theirs = points.astype(np.float64), manifold.astype(np.float64)
    lengths = (theirs**2).sum(axis=1)
    rows = [
        (((block**2).sum(axis=1)[:, None] + lengths - 2 * block @ theirs.T) <= radii).any(axis=1)
        for block in np.array_split(own, max(1, len(own) // 256))
    ]
    return np.concatenate(rows)


def _density(axis: Axes, place: Array) -> None:
    """Outlines that hold shares of the points [N, 2], from a smoothed histogram."""
    low, high = place.min(axis=0), place.max(axis=0)
    margin = 0.25 * (high - low) + 1e-9
    edges = [np.linspace(a, b, CELLS + 1) for a, b in zip(low - margin, high + margin, strict=True)]
    counts, _, _ = np.histogram2d(place[:, 0], place[:, 1], bins=edges)
    for side in (0, 1):
        cell = edges[side][1] - edges[side][0]
        width = max(
            place[:, side].std() * len(place) ** (-1 / 6) / cell / 2, 1.0
        )  # half of Scott's rule: there are clusters
        window = np.exp(-0.5 * (np.arange(1 - CELLS // 2, CELLS // 2) / width) ** 2)
        counts = np.apply_along_axis(np.convolve, side, counts, window / window.sum(), "same")
    ordered = np.sort(counts.ravel())[::-1]
    held = np.cumsum(ordered) / ordered.sum()
    levels = sorted({float(ordered[np.searchsorted(held, share)]) for share in SHARES})
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    shades = ["#ececec", "#d6d6d6", "#bdbdbd"][-len(levels) :]
    axis.contourf(*middles, counts.T, levels=[*levels, np.inf], colors=shades, zorder=1)
    axis.contour(*middles, counts.T, levels=levels, colors=BLACK, linewidths=0.7, zorder=4)  # over the points


def _bounds(reference: FeatureSet, samples: FeatureSet, axes: _Components) -> Array:
    """[low or high, component] of what both panels show: all but the farthest 1 in 200 of either set, and a margin."""
    pools = [axes.of(_some(pool, MANIFOLD)) for pool in (reference.pool, samples.pool) if pool is not None]
    if reference.pool is None and reference.pool_statistics is not None:
        reach = 2.1 * np.sqrt(np.diag(axes.directions @ reference.pool_statistics.cov @ axes.directions.T))
        pools.append(np.stack([-reach, reach]))
    ends = np.stack([np.quantile(place, (0.005, 0.995), axis=0) for place in pools])
    low, high = ends[:, 0].min(axis=0), ends[:, 1].max(axis=0)
    margin = 0.12 * (high - low) + 1e-9
    return np.stack([low - margin, high + margin])


def _finish_cloud(axis: Axes, axes: _Components, bounds: Array) -> None:
    first, second = (f"{share:.0%} of the variance" for share in axes.shares)
    axis.set_xlabel(f"first principal component ({first})")
    axis.set_ylabel(f"second ({second})")
    axis.set_xlim(*bounds[:, 0])
    axis.set_ylim(*bounds[:, 1])
    axis.tick_params(length=0, labelbottom=False, labelleft=False)


def _cloud_legend(marked: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    look: dict[str, Any] = {"linestyle": "none"}
    backdrop = Patch(facecolor=PALE, edgecolor=GREY, linewidth=0.6)
    if not marked:
        backdrop.set_label("reference")
        return [Line2D([], [], color=BLUE, marker="o", label="samples", **look), backdrop]
    backdrop.set_label(f"the other set: {', '.join(f'{share:.0%}' for share in SHARES)} of it inside each outline")
    return [
        Line2D([], [], color=BLUE, marker="o", label="in the other's manifold", **look),
        Line2D([], [], color=RED, marker="X", label="outside", **look),
        backdrop,
    ]


def _write_table(axis: Axes, lines: Sequence[str], results: Mapping[str, float]) -> None:
    """Lines of text, then names at the left and values at the right; the network that many are of is named once."""
    networks = dict.fromkeys(label.removeprefix(base(label)).strip(" ()") for label in results)
    named = [f"features: {name}" for name in networks if name]
    axis.set_axis_off()
    place = 0.97
    for line in (*lines, *named, ""):
        axis.text(0.0, place, line, transform=axis.transAxes, va="top", color=GREY)
        place -= 0.065
    for label, value in results.items():
        axis.text(0.0, place, base(label), transform=axis.transAxes, va="top")
        axis.text(1.0, place, f"{value:.4g}", transform=axis.transAxes, va="top", ha="right", weight="bold")
        place -= 0.075
