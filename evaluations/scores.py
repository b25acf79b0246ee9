"""The scores by name: what each needs to know of images, and how its numbers are called.

N images, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluations.metrics import (
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


@dataclass(frozen=True)
class Options:
    """What the metrics leave open; the defaults are the published evaluator's, or else the papers'.

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
    """What is known of n images; None where something is not."""

    n: int
    pool: npt.NDArray[np.float32] | None = None  # [N, D]
    pool_statistics: Statistics | None = None
    spatial_statistics: Statistics | None = None
    probs: npt.NDArray[np.float32] | None = None  # [N, K]


WHAT = {
    "pool": "the features of the {} images",
    "pool_statistics": "the statistics of the {} features",
    "spatial_statistics": "the statistics of the {} spatial features",
    "probs": "the class probabilities of the {} images",
}


@dataclass(frozen=True)
class Metric:
    """Numbers that belong together.

    :param labels: what each number is called.
    :param needs: fields that the reference must have; `needs_samples`, those that the samples must have.
    :param function: (reference, samples, options) -> one number for each label, once all is there.
    """

    labels: tuple[str, ...]
    needs: tuple[str, ...]
    needs_samples: tuple[str, ...]
    function: Callable[[Any, Any, Options], tuple[float, ...]]

    def lacks(self, reference: FeatureSet, samples: FeatureSet) -> str:
        """A sentence about what is needed and not there; '' if all is."""
        for who, given, needs in (("reference", reference, self.needs), ("samples", samples, self.needs_samples)):
            for field in needs:
                if getattr(given, field) is None:
                    what = WHAT[field].format(f"{who}'s" if who == "reference" else f"{who}'")
                    return (
                        f"{' and '.join(self.labels)} need{'s' * (len(self.labels) == 1)} {what}, {_held(who, given)}"
                    )
        return ""

    def compute(self, reference: FeatureSet, samples: FeatureSet, options: Options) -> tuple[float, ...]:
        """One number for each label.

        :raises ValueError: with the sentence of `lacks`; or for too few images.
        """
        if sentence := self.lacks(reference, samples):
            raise ValueError(sentence)
        return self.function(reference, samples, options)


def _held(who: str, given: FeatureSet) -> str:
    this = "and this reference holds" if who == "reference" else "and these samples hold"
    return f"{this} {'statistics alone' if given.pool is None and given.probs is None else 'none'}"


def _inception(reference: FeatureSet, samples: Any, options: Options) -> tuple[float, ...]:
    return (inception_score(samples.probs, options.split_size),)


def _frechet(first: Statistics, second: Statistics) -> tuple[float, ...]:
    if 1 in (first.n, second.n):
        raise ValueError("one image has no covariance: take 2 images or more")
    return (frechet_distance(first.mean, first.cov, second.mean, second.cov),)


def _pool_frechet(reference: Any, samples: Any, options: Options) -> tuple[float, ...]:
    return _frechet(reference.pool_statistics, samples.pool_statistics)


def _spatial_frechet(reference: Any, samples: Any, options: Options) -> tuple[float, ...]:
    return _frechet(reference.spatial_statistics, samples.spatial_statistics)


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
    "fid": Metric(("FID",), ("pool_statistics",), ("pool_statistics",), _pool_frechet),
    "sfid": Metric(("sFID",), ("spatial_statistics",), ("spatial_statistics",), _spatial_frechet),
    "pr": Metric(("Precision", "Recall"), ("pool",), ("pool",), _manifolds),
    "kid": Metric(("KID", "KID standard error"), ("pool",), ("pool",), _kernel),
    "dc": Metric(("Density", "Coverage"), ("pool",), ("pool",), _density),
}
DEFAULT_METRICS = ("is", "fid", "sfid", "pr")  # the published evaluator's
REHEARSED = 64  # images, by which is seen whether a reference can be used


def rehearse(reference: FeatureSet, metrics: Iterable[Metric], options: Options) -> None:
    """Compare a few images of a reference with themselves.

    :raises ValueError: if no samples could be compared with it, as with too few images.
    """
    few = reference if reference.pool is None else replace(reference, pool=reference.pool[:REHEARSED])
    for metric in metrics:
        if not metric.lacks(few, few):
            metric.compute(few, few, options)
