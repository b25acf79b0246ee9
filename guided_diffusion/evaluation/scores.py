"""The table of metrics: the features that each is computed from, and the labels of its numbers.

A new metric is a function of the reference's and the samples' features and its entry in `METRICS`.

N images, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.errors import WHY, as_user_error, refuse
from .metrics import Statistics, density_coverage, frechet_distance, inception_score, kernel_distance, precision_recall


@dataclass(frozen=True)
class Options:
    """Parameters of the metrics; the defaults are the published evaluator's, or else the papers'.

    :param subset_size: of KID, whose expectation does not depend on it; at most half of the images are taken, so that
        subsets differ.
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
    """Features of n images; a field is None where it is unknown.

    :param n: 0 for statistics without images.
    :param kept: names of the fields that an earlier run computed.
    """

    n: int
    pool: npt.NDArray[np.float32] | None = None  # [N, D]
    pool_statistics: Statistics | None = None
    spatial_statistics: Statistics | None = None
    probs: npt.NDArray[np.float32] | None = None  # [N, K]
    kept: tuple[str, ...] = ()


# arrays of a reference beside its images: means and covariances of features
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
RECORD = "record"  # the array that says what the statistics are of, bytes of JSON
WORDS = {
    "pool": "features of single images",
    "pool_statistics": "mean and covariance of features",
    "spatial_statistics": "mean and covariance of spatial features",
    "probs": "class probabilities of single images",
}
# labels where the features are not those of the published network
OTHER_LABELS = {
    "Inception Score": "Classifier Score",
    "FID": "FD",
    "sFID": "sFD",
    "KID": "KD",
    "KID standard error": "KD standard error",
}


@dataclass(frozen=True)
class Metric:
    """One or more numbers that are computed together.

    :param labels: the name of each number.
    :param field: the field of `FeatureSet` that they are computed from.
    :param function: (field of the reference, field of the samples, options) -> one number for each label.
    :param compares: False for a metric of the samples alone.
    """

    labels: tuple[str, ...]
    field: str
    function: Callable[[Any, Any, Options], tuple[float, ...]]
    compares: bool = True

    def labels_for(self, network: str, published: bool) -> list[str]:
        """The labels, which name the network unless it is the published one."""
        renamed = {} if published else OTHER_LABELS
        return [f"{renamed[name]} ({network})" if name in renamed else name for name in self.labels]

    def lacks(self, reference: FeatureSet, samples: FeatureSet) -> str:
        """A sentence about features that are missing; '' if there are all."""
        for side, features in (("reference", reference), ("samples", samples))[not self.compares :]:
            if getattr(features, self.field) is None:
                verb, has = "needs" if len(self.labels) == 1 else "need", "has" if side == "reference" else "have"
                reason = "the network gives none" if features.n else "there are statistics alone"
                return f"{' and '.join(self.labels)} {verb} {WORDS[self.field]}, and the {side} {has} none: {reason}"
        return ""

    @as_user_error(WHY, ValueError)
    def compute(self, reference: FeatureSet, samples: FeatureSet, options: Options) -> tuple[float, ...]:
        """One number for each label; an error has the sentence of `lacks`."""
        refuse((lack := self.lacks(reference, samples), lack))
        return self.function(getattr(reference, self.field), getattr(samples, self.field), options)


def _frechet(reference: Statistics, samples: Statistics, _: Options) -> tuple[float, ...]:
    refuse((1 in (reference.n, samples.n), "one image has no covariance: take 2 images or more"))
    return (frechet_distance(reference.mean, reference.cov, samples.mean, samples.cov),)


def _kernel(reference: Any, samples: Any, options: Options) -> tuple[float, ...]:
    size = min(options.subset_size, len(reference) // 2, len(samples) // 2)
    refuse((size < 2, "KID needs 4 images of each, to draw subsets of 2 of them: take more"))
    return kernel_distance(reference, samples, subsets=options.subsets, subset_size=size, seed=options.seed)


METRICS = {  # in the order in which they are printed
    "is": Metric(("Inception Score",), "probs", lambda _, x, o: (inception_score(x, o.split_size),), compares=False),
    "fid": Metric(("FID",), "pool_statistics", _frechet),
    "sfid": Metric(("sFID",), "spatial_statistics", _frechet),
    "pr": Metric(("Precision", "Recall"), "pool", lambda r, x, o: precision_recall(r, x, o.k, o.dtype)),
    "kid": Metric(("KID", "KID standard error"), "pool", _kernel),
    "dc": Metric(("Density", "Coverage"), "pool", lambda r, x, o: density_coverage(r, x, o.density_k)),
}
DEFAULT_METRICS = ("is", "fid", "sfid", "pr")  # the published evaluator's
REHEARSED = 64  # images


def needs_of(metrics: Iterable[Metric]) -> set[str]:
    """The fields that a reference must have for these metrics."""
    return {metric.field for metric in metrics if metric.compares}


def rehearse(reference: FeatureSet, metrics: Iterable[Metric], options: Options) -> None:
    """Compare a few images of a reference with themselves, to find out early whether it can be used."""
    few = reference if reference.pool is None else replace(reference, pool=reference.pool[:REHEARSED])
    for metric in metrics:
        if not metric.lacks(few, few):
            metric.compute(few, few, options)
