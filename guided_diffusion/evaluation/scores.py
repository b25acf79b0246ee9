"""The table of metrics: the features that each needs of the reference and of the samples, and its labels.

N images, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .metrics import Statistics, density_coverage, frechet_distance, inception_score, kernel_distance, precision_recall


@dataclass(frozen=True)
class Options:
    """Parameters of the metrics; the defaults are the published evaluator's, or else the papers'.

    :param subset_size: of KID, at most half of the fewer images, so that subsets differ: its expectation does not
        depend on it.
    """

    k: int = 3
    dtype: str = "float16"
    split_size: int = 5000
    density_k: int = 5
    subsets: int = 100
    subset_size: int = 1000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of n images; None for those that are not known.

    :param origin: the file that they were read from; '' if they were computed.
    """

    n: int
    pool: npt.NDArray[np.float32] | None = None  # [N, D]
    pool_statistics: Statistics | None = None
    spatial_statistics: Statistics | None = None
    probs: npt.NDArray[np.float32] | None = None  # [N, K]
    origin: str = ""


WHAT = {
    "pool": "the features of the {} images",
    "pool_statistics": "the statistics of the {} features",
    "spatial_statistics": "the statistics of the {} spatial features",
    "probs": "the class probabilities of the {} images",
}


@dataclass(frozen=True)
class Metric:
    """One or more numbers that are computed together.

    :param labels: the name of each number.
    :param needs: fields that the reference must have.
    :param needs_samples: fields that the samples must have.
    :param function: (reference, samples, options) -> one number for each label.
    """

    labels: tuple[str, ...]
    needs: tuple[str, ...]
    needs_samples: tuple[str, ...]
    function: Callable[[Any, Any, Options], tuple[float, ...]]

    def lacks(self, reference: FeatureSet, samples: FeatureSet) -> str:
        """A sentence about a field that is needed and missing; '' if there is none."""
        told = {"reference": ("reference's", "this reference holds"), "samples": ("samples'", "these samples hold")}
        for side, given, needs in (("reference", reference, self.needs), ("samples", samples, self.needs_samples)):
            missing = [name for name in needs if getattr(given, name) is None]
            if missing:
                owner, holds = told[side]
                held = "statistics alone" if given.pool is None and given.probs is None else "none"
                verb = "needs" if len(self.labels) == 1 else "need"
                return f"{' and '.join(self.labels)} {verb} {WHAT[missing[0]].format(owner)}, and {holds} {held}"
        return ""

    def compute(self, reference: FeatureSet, samples: FeatureSet, options: Options) -> tuple[float, ...]:
        """One number for each label.

        :raises ValueError: with the sentence of `lacks`; or for too few images.
        """
        if sentence := self.lacks(reference, samples):
            raise ValueError(sentence)
        return self.function(reference, samples, options)


def _inception(reference: Any, samples: Any, options: Options) -> tuple[float, ...]:
    return (inception_score(samples.probs, options.split_size),)


def _frechet(field: str) -> Callable[[Any, Any, Options], tuple[float, ...]]:
    def distance(reference: Any, samples: Any, options: Options) -> tuple[float, ...]:
        first, second = getattr(reference, field), getattr(samples, field)
        if 1 in (first.n, second.n):
            raise ValueError("one image has no covariance: take 2 images or more")
        return (frechet_distance(first.mean, first.cov, second.mean, second.cov),)

    return distance


def _manifolds(reference: Any, samples: Any, options: Options) -> tuple[float, ...]:
    return precision_recall(reference.pool, samples.pool, options.k, options.dtype)


def _kernel(reference: Any, samples: Any, options: Options) -> tuple[float, ...]:
    fewer = min(len(reference.pool), len(samples.pool))
    if fewer < 4:
        raise ValueError(f"KID needs 4 images of each, to draw subsets of 2 of them, and there are {fewer}: take more")
    size = min(options.subset_size, fewer // 2)
    return kernel_distance(reference.pool, samples.pool, subsets=options.subsets, subset_size=size, seed=options.seed)


def _density(reference: Any, samples: Any, options: Options) -> tuple[float, ...]:
    return density_coverage(reference.pool, samples.pool, options.density_k)


METRICS = {  # in the order in which they are printed
    "is": Metric(("Inception Score",), (), ("probs",), _inception),
    "fid": Metric(("FID",), ("pool_statistics",), ("pool_statistics",), _frechet("pool_statistics")),
    "sfid": Metric(("sFID",), ("spatial_statistics",), ("spatial_statistics",), _frechet("spatial_statistics")),
    "pr": Metric(("Precision", "Recall"), ("pool",), ("pool",), _manifolds),
    "kid": Metric(("KID", "KID standard error"), ("pool",), ("pool",), _kernel),
    "dc": Metric(("Density", "Coverage"), ("pool",), ("pool",), _density),
}
DEFAULT_METRICS = ("is", "fid", "sfid", "pr")  # the published evaluator's
REHEARSED = 64  # images


def rehearse(reference: FeatureSet, metrics: Iterable[Metric], options: Options) -> None:
    """Compare a few images of a reference with themselves, to find out early whether it can be used.

    :raises ValueError: if no samples could be compared with it, as with too few images.
    """
    few = reference if reference.pool is None else replace(reference, pool=reference.pool[:REHEARSED])
    for metric in metrics:
        if not metric.lacks(few, few):
            metric.compute(few, few, options)
