"""Scores of generated images from their features and those of real ones: pure functions of numpy arrays.

Distances are computed block by block, so that memory does not grow with N squared. The file works by itself, without
the rest of this project.

N images, D features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

EPS = float(np.finfo(np.float64).eps)
ROWS = 1024  # images that a covariance grows by at a time
BLOCK = 1000  # images on each side of a block of distances; a power of two would be slow, as rows share cache lines
PUBLISHED_BLOCK = 10_000  # of the published evaluator, which falls back to float32 in blocks that overflow float16
DTYPES = ("float32", "float16")


def _matrix(values: npt.ArrayLike, name: str, first: int = 0) -> Array:
    """The values, checked to be finite numbers [rows, columns]; an error counts rows from `first`."""
    array = np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
        raise ValueError(f"{name} are {array.dtype} {list(array.shape)}: give real numbers [images, columns]")
    for start in range(0, len(array), ROWS):
        finite = (np.abs(array[start : start + ROWS]) <= np.finfo(np.float32).max).all(axis=1)
        if not finite.all():
            row = first + start + int(finite.argmin())
            raise ValueError(f"row {row} of {name} is not finite in float32: look at its image, and at the network")
    return array


def _two_sets(reference: npt.ArrayLike, samples: npt.ArrayLike, least: int) -> tuple[Array, Array]:
    """The features of both, checked to be of one network and of at least `least` images."""
    first, second = _matrix(reference, "the reference's features"), _matrix(samples, "the samples' features")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features {first.shape} and {second.shape} are of two networks: take one for both")
    if min(len(first), len(second)) < least:
        raise ValueError(f"{len(first)} and {len(second)} images are too few: take {least} or more of each")
    return first, second


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [D] and unbiased covariance [D, D] of features; `+` gives those of two sets together.

    :param n: images; 0 where that is unknown, as with a file of mean and covariance alone. One image has covariance 0.
    """

    n: int
    mean: npt.NDArray[np.float64]
    cov: npt.NDArray[np.float64]

    def __add__(self, other: Statistics) -> Statistics:
        """Chan, Golub & LeVeque 1983."""
        if not (self.n and other.n):
            raise ValueError("statistics of an unknown number of images do not add up")
        n, shift = self.n + other.n, other.mean - self.mean
        cov = (self.n - 1) / (n - 1) * self.cov
        cov += (other.n - 1) / (n - 1) * other.cov
        cov += np.outer(self.n / n * other.n / (n - 1) * shift, shift)
        return Statistics(n, self.mean + other.n / n * shift, cov)


class RunningStatistics:
    """Statistics of features that come in batches; bit for bit the same for batches of any sizes."""

    def __init__(self) -> None:
        self.n = 0
        self._total: Statistics | None = None  # of whole blocks of ROWS images
        self._rest = np.empty((0, 0))

    def add(self, features: npt.ArrayLike) -> None:
        """Take the next features [N, D].

        :raises ValueError: naming the row, counted over all batches, that is not finite.
        """
        if not len(np.asarray(features)):
            return
        batch = _matrix(features, "the features", self.n)
        rows = np.concatenate([self._rest, batch]) if self.n else batch
        self.n += len(batch)
        whole = len(rows) - len(rows) % ROWS
        for block in _cuts(0, whole, ROWS):
            self._total = self._with(rows[block])
        self._rest = rows[whole:].copy()

    def _with(self, rows: Array) -> Statistics:
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        centred = rows - mean
        latest = Statistics(len(rows), mean, centred.T @ centred / max(len(rows) - 1, 1))
        return latest if self._total is None else self._total + latest

    def result(self) -> Statistics:
        """Statistics of all features so far."""
        if not self.n:
            raise ValueError("there are no features")
        return self._with(self._rest) if self._total is None or len(self._rest) else self._total


def statistics(features: Array | Iterable[Array]) -> Statistics:
    """`RunningStatistics` of features [N, D] or of batches of them."""
    running = RunningStatistics()
    for batch in [features] if isinstance(features, np.ndarray) else features:
        running.add(batch)
    return running.result()


def _factor(covariance: Array) -> Array:
    """A [D, r] with A A^T = `covariance`, r its rank."""
    try:
        return np.asarray(np.linalg.cholesky(covariance))
    except np.linalg.LinAlgError:
        variances, axes = np.linalg.eigh(covariance)
    if variances[0] < -1e-5 * abs(variances[-1]):
        raise ValueError(f"a covariance has the eigenvalue {variances[0]:.3g}, less than 0: compute it again")
    kept = variances > len(variances) * EPS * variances[-1]
    return np.asarray(axes[:, kept] * np.sqrt(variances[kept]))


def _square(factor: Array, covariance: Array) -> Array:
    """A^T `covariance` A of a lower triangle A, on and below the diagonal; zeros are not multiplied."""
    right, square, cuts = np.empty_like(factor), np.zeros_like(factor), _cuts(0, len(factor), 256)
    for cut in cuts:
        right[:, cut] = covariance[:, cut.start :] @ factor[cut.start :, cut]
    for cut in cuts:
        square[cut, : cut.stop] = factor[cut.start :, cut].T @ right[cut.start :, : cut.stop]
    return square


def _trace_of_root(first: Array, second: Array) -> float:
    """Tr (S T)^1/2 of covariances S = A A^T and T = B B^T: the sum of the singular values of A^T B.

    The eigenvalues of A^T T A, their squares, are faster, but have only half the digits of small ones.
    """
    try:
        squares = np.linalg.eigvalsh(_square(np.linalg.cholesky(first), second).T, "U")
    except np.linalg.LinAlgError:
        squares = np.zeros(1)
    noise = math.sqrt(len(squares)) * EPS * squares[-1]
    if squares[0] > 0 and (noise / np.sqrt(squares)).sum() < 1e-10 * np.sqrt(squares).sum():
        return float(np.sqrt(squares).sum())
    return float(np.linalg.svd(_factor(first).T @ _factor(second), compute_uv=False).sum())


def frechet_distance(mu1: npt.ArrayLike, sigma1: npt.ArrayLike, mu2: npt.ArrayLike, sigma2: npt.ArrayLike) -> float:
    """Squared Wasserstein-2 distance of Gaussians, also singular ones (Dowson & Landau 1982); the FID of features.

    :raises ValueError: unless means are [D] and covariances [D, D], finite and symmetric.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(values, np.float64) for values in (mu1, mu2, sigma1, sigma2))
    for name, values, sides in (("mu1", mu1, 1), ("mu2", mu2, 1), ("sigma1", sigma1, 2), ("sigma2", sigma2, 2)):
        if not values.size or values.shape != (mu1.size,) * sides:
            shapes = [list(each.shape) for each in (mu1, sigma1, mu2, sigma2)]
            raise ValueError(f"mu1, sigma1, mu2, sigma2 have shapes {shapes}: give [D], [D, D], [D], [D, D] of one D")
        with np.errstate(invalid="ignore"):
            skew = np.abs(values - values.T).max()
        if not skew <= 1e-5 * np.abs(values).max():  # nan is not
            raise ValueError(f"{name} is not finite or not symmetric: compute it again from finite features")
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * _trace_of_root(sigma1, sigma2)
    return max(float(distance), 0.0)


def inception_score(probs: npt.ArrayLike, split_size: int = 5000) -> float:
    """exp of the mean KL divergence of each image's classes from those of all (Salimans et al. 2016), mean over splits.

    :param probs: [N, K], each row a distribution.
    :param split_size: images per split, in their order; the last split may be smaller.
    """
    rows, scores = _matrix(probs, "the class probabilities"), []
    if rows.min() < 0 or np.abs(rows.sum(axis=1, dtype=np.float64) - 1).max() > 1e-2:
        raise ValueError("the class probabilities do not sum to 1: give the softmax of the logits")
    for split in _cuts(0, len(rows), split_size):
        p = rows[split].astype(np.float64)
        gain = np.log(p, out=np.zeros_like(p), where=p > 0)
        marginal = p.mean(axis=0)
        gain -= np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        scores.append(math.exp(np.einsum("nk,nk->", p, gain) / len(p)))
    return float(np.mean(scores))


class _Single:
    """Distances in float32, of features minus their mean, which would cost digits."""

    def __init__(self, centre: Array | float = 0.0) -> None:
        self.centre = np.float32(centre)

    def rows(self, features: Array) -> Array:
        """The factors of the products, float32."""
        return np.subtract(features, self.centre, dtype=np.float32, casting="same_kind")

    def norms(self, rows: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            norms: Array = np.einsum("nd,nd->n", rows, rows)
        if not norms.max() <= np.finfo(np.float32).max / 4:
            raise ValueError("the features are too large for distances in float32: divide all by their largest")
        return norms

    def rounded(self, values: Array) -> Array:
        """The values in the precision that is kept, changed in place."""
        return values


class _Half(_Single):
    """Distances in float16 as TensorFlow computes them on a CPU: all is rounded but the sums of matrix products."""

    lanes, strands, most = 8, 4, 1600  # terms added at a time, in turn, and in one sum; longer sums are cut in two

    def rows(self, features: Array) -> Array:
        return self.rounded(features.astype(np.float32))

    def norms(self, rows: Array) -> Array:
        return self._sums(self.rounded(rows * rows))

    def _sums(self, terms: Array) -> Array:
        """Sums of rows, added up in TensorFlow's order."""
        d = terms.shape[1]
        if d > self.most:
            half = math.ceil(d / 2 / self.lanes) * self.lanes
            return self.rounded(self._sums(terms[:, :half]) + self._sums(terms[:, half:]))
        even = d - d % (self.lanes * self.strands)
        strands = self._added(terms[:, :even].reshape(len(terms), -1, self.strands, self.lanes))
        whole = d - d % self.lanes
        rest = terms[:, even:whole].reshape(len(terms), -1, self.lanes)
        lanes = self._added(np.concatenate([strands, rest], axis=1))
        return self.rounded(self.rounded(lanes.sum(axis=1)) + self._added(terms[:, whole:]))

    def _added(self, terms: Array) -> Array:
        """Sums over axis 1, one term after the other."""
        total = np.zeros_like(terms, shape=(len(terms), *terms.shape[2:]))
        for index in range(terms.shape[1]):
            total = self.rounded(total + terms[:, index])
        return total

    def rounded(self, values: Array) -> Array:
        """To the nearest float16, in place, without its upper limit.

        Adding and subtracting a power of two that is 2^13 times as large leaves as many digits as float16 has.
        """
        flat = values.reshape(-1)
        for start in range(0, flat.size, 1 << 15):  # pieces that fit into the processor's cache
            part = flat[start : start + (1 << 15)]
            power = (part.view(np.uint32) & 0x7F800000).view(np.float32)
            large = np.maximum(power, 2.0**-14, out=power)  # below that, float16 is evenly spaced
            large *= 1.5 * 2**13
            part += large
            part -= large
        return values


def _cuts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


Tile = tuple[slice, slice, Array]  # rows of one set, rows of the other, and squared distances between them


def _tiles(x: Array, y: Array, dtype: str, block: int) -> Iterator[Tile]:
    """All squared distances from rows of x to rows of y, which may be overwritten.

    If x and y are one array, each product gives two distances.
    """
    if dtype not in DTYPES:
        raise ValueError(f"the dtype of distances must be one of {', '.join(DTYPES)}, got {dtype!r}")
    single = _Single(x.mean(axis=0, dtype=np.float64))
    for a in _cuts(0, len(x), PUBLISHED_BLOCK):
        for b in _cuts(0, len(y), PUBLISHED_BLOCK):
            if x is y and b.start < a.start:
                continue
            half = dtype == "float16" and _fit_half(x, y, a, b, block)
            for rows, columns, distances in _tiles_of(_Half() if half else single, x, y, a, b, block):
                yield rows, columns, np.maximum(distances, 0, out=distances)


def _fit_half(x: Array, y: Array, a: slice, b: slice, block: int) -> bool:
    """Whether float16 can hold all distances of a block and the doubled products that they are computed from."""
    most = float(np.finfo(np.float16).max)
    cuts = [(x, cut) for cut in _cuts(a.start, a.stop, block)] + [(y, cut) for cut in _cuts(b.start, b.stop, block)]
    with np.errstate(over="ignore"):
        norm = max(float(np.square(features[cut], dtype=np.float32).sum(axis=1).max()) for features, cut in cuts)
    if 2 * norm > most:
        return False
    return 4.1 * norm < most or all(d.max() <= most for *_, d in _tiles_of(_Half(), x, y, a, b, block))


def _tiles_of(kind: _Single, x: Array, y: Array, a: slice, b: slice, block: int) -> Iterator[Tile]:
    """Distances between rows a of x and rows b of y; rounding may leave some below 0."""
    cuts = _cuts(b.start, b.stop, block)
    norms = [kind.norms(kind.rows(y[columns])) for columns in cuts]
    for rows in _cuts(a.start, a.stop, block):
        left = kind.rows(x[rows])
        norm = kind.norms(left)
        for columns, other in zip(cuts, norms, strict=True):
            if x is y and columns.start < rows.start:
                continue
            right = left if x is y and columns == rows else kind.rows(y[columns])
            products = kind.rounded(left @ right.T)
            products *= 2
            if x is y and columns != rows:
                yield columns, rows, _distances(kind, products.T.copy(), other, norm)
            yield rows, columns, _distances(kind, products, norm, other)


def _distances(kind: _Single, products: Array, u: Array, v: Array) -> Array:
    """u - products + v in that order, written over the products."""
    np.subtract(u[:, None], products, out=products)
    kind.rounded(products)
    products += v
    return kind.rounded(products)


def manifold_radii(features: npt.ArrayLike, k: int = 3, *, dtype: str = "float32", block: int = BLOCK) -> Array:
    """Squared distance [N] of each image from its k-th nearest neighbour other than itself.

    :param dtype: of the distances; float16 rounds as the published evaluator does.
    """
    rows = _matrix(features, "the features")
    if not 1 <= k < len(rows):
        raise ValueError(f"k must be at least 1 and less than the {len(rows)} images, got {k}: take more images")
    nearest = np.full((len(rows), k + 1), np.inf, np.float32)
    for tile, _, distances in _tiles(rows, rows, dtype, block):
        nearest[tile] = _smallest(np.hstack([nearest[tile], _smallest(distances, k)]), k)
    return nearest[:, k]


def nearest_neighbours(
    samples: npt.ArrayLike, reference: npt.ArrayLike, k: int = 3, *, block: int = BLOCK
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Distance [N, k] of each sample from its nearest images of the reference, the nearest first, and their indices."""
    real, made = _two_sets(reference, samples, k)
    near, which = np.full((len(made), k), np.inf, np.float32), np.zeros((len(made), k), np.int64)
    for rows, columns, distances in _tiles(made, real, "float32", block):
        both = np.hstack([near[rows], distances])
        indices = np.hstack([which[rows], np.broadcast_to(np.arange(columns.start, columns.stop), distances.shape)])
        first = np.argpartition(both, k - 1, axis=1)[:, :k]
        near[rows], which[rows] = np.take_along_axis(both, first, axis=1), np.take_along_axis(indices, first, axis=1)
    order = np.argsort(near, axis=1, kind="stable")
    return np.sqrt(np.take_along_axis(near, order, axis=1)), np.take_along_axis(which, order, axis=1)


def _smallest(distances: Array, k: int) -> Array:
    """The k + 1 smallest of each row, the largest of them last."""
    if distances.shape[1] > k:
        distances.partition(k, axis=1)
    return distances[:, : k + 1]


def precision_recall(
    reference: npt.ArrayLike, samples: npt.ArrayLike, k: int = 3, dtype: str = "float32", *, block: int = BLOCK
) -> tuple[float, float]:
    """The share of each set that lies in the other's manifold (Kynkaanniemi et al. 2019), the samples' first.

    :param dtype: of the distances; the published numbers are those of float16.
    """
    real, made = _two_sets(reference, samples, k + 1)
    real_radii, made_radii = (manifold_radii(features, k, dtype=dtype, block=block) for features in (real, made))
    made_inside, real_inside = np.zeros(len(made), bool), np.zeros(len(real), bool)
    for rows, columns, distances in _tiles(real, made, dtype, block):
        made_inside[columns] |= (distances <= real_radii[rows, None]).any(axis=0)
        real_inside[rows] |= (distances <= made_radii[columns]).any(axis=1)
    return float(made_inside.mean()), float(real_inside.mean())


def density_coverage(
    reference: npt.ArrayLike, samples: npt.ArrayLike, k: int = 5, *, block: int = BLOCK
) -> tuple[float, float]:
    """Samples per ball around a reference image, over k, and the share of balls with a sample (Naeem et al. 2020).

    Equal distributions have a density of 1, which may be exceeded, and a coverage of nearly 1.
    """
    real, made = _two_sets(reference, samples, 1)
    radii, held, covered = manifold_radii(real, k, block=block), 0, np.zeros(len(real), bool)
    for rows, _, distances in _tiles(real, made, "float32", block):
        inside = distances < radii[rows, None]
        held += int(np.count_nonzero(inside))
        covered[rows] |= inside.any(axis=1)
    return held / (k * len(made)), float(covered.mean())


def kernel_distance(
    reference: npt.ArrayLike, samples: npt.ArrayLike, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: the unbiased squared MMD under the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), and its standard error.

    Both are of the mean over random subsets. The order of the images does not matter: they are sorted first.
    """
    real, made = _two_sets(reference, samples, 2)
    fewer = min(len(real), len(made))
    if subsets < 2 or not 2 <= subset_size <= fewer:
        raise ValueError(f"KID needs 2 subsets or more, of 2 to {fewer} images, got {subsets} of {subset_size}")
    orders = [(z, np.lexsort((z[:, 0], z.sum(axis=1, dtype=np.float64)))) for z in (real, made)]
    rng, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        picked = [z[order[rng.choice(len(z), subset_size, replace=False)]] for z, order in orders]
        values.append(_squared_mmd(*(z.astype(np.float64) for z in picked)))
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(subsets))


def _squared_mmd(x: Array, y: Array) -> float:
    """Unbiased, of equally many rows."""
    (n, d), total = x.shape, 0.0
    for a, b, pairs in ((x, x, n * (n - 1)), (y, y, n * (n - 1)), (x, y, n * n / -2)):
        kernel = a @ b.T / d + 1
        kernel *= kernel * kernel
        total += (kernel.sum() - (np.trace(kernel) if a is b else 0)) / pairs
    return float(total)
