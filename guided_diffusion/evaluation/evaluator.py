"""Samples compared with real images: the scores, where their features come from, and warnings.

Shapes: N images, D pooled features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .. import dist_util
from .feature_sets import COLUMNS, FIELDS, feature_set
from .features import Extractor, make_extractor
from .images import ImageSet, Opened, open_images, request_of
from .metrics import Statistics
from .references import read_statistics
from .scores import DEFAULT_METRICS, METRICS, FeatureSet, Metric, Options

FEW = 2048  # images, fewer than which are warned of, whatever the network
# names of the numbers when another network than the published one made the features
OTHER_NAMES = {
    "Inception Score": "Classifier Score",
    "FID": "FD",
    "sFID": "sFD",
    "KID": "KD",
    "KID standard error": "KD standard error",
}
WORDS = {
    "pool": "features of single images",
    "pool_statistics": "mean and covariance of features",
    "spatial_statistics": "mean and covariance of spatial features",
    "probs": "classes of single images",
}


@dataclass(frozen=True)
class Side:
    """The reference or the samples.

    :param features: of its images, on rank 0; the statistics may be those that were stored beside them.
    :param notes: sentences that say which features come from where.
    :param warnings: sentences about what is unusual.
    """

    images: ImageSet
    features: FeatureSet
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The results of a comparison.

    :param results: the scores by name, in the order in which they are printed.
    :param omitted: sentences that say which scores are missing, and why.
    :param facts: all of it, as JSON values.
    """

    results: Mapping[str, float]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    omitted: tuple[str, ...]
    facts: Mapping[str, Any] = field(repr=False)

    def lines(self) -> list[str]:
        """The scores as the original prints them."""
        return [f"{name}: {value!r}" for name, value in self.results.items()]


def evaluate(
    reference: Opened | Side,
    samples: Opened | Side,
    extractor: str | Extractor,
    *,
    metrics: str | Sequence[str] = DEFAULT_METRICS,
    options: Options | None = None,
    **making: Any,
) -> Report:
    """Compare samples with a reference; collective, and the same report on every rank.

    :param reference: a path, or what `prepare` made of one, so that many samples are compared with it.
    :param extractor: one, or its name as `make_extractor` has it, e.g. "classifier:PATH".
    :param metrics: names of `METRICS`, or a text of them with commas.
    :param making: options of `feature_set`: batch_size, cache, progress.
    :raises ValueError: if an image cannot be read, the reference is another network's, or no score can be computed.
    """
    extractor = make_extractor(extractor, device=dist_util.dev())
    metrics = metrics.split(",") if isinstance(metrics, str) else metrics
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"a metric must be one of {', '.join(METRICS)}, got {name!r}")
    chosen = {name: METRICS[name] for name in METRICS if name in metrics}
    needs = {name for metric in chosen.values() for name in metric.needs}
    needs_samples = {name for metric in chosen.values() for name in metric.needs_samples}
    if not isinstance(samples, Side):
        samples = open_images(samples)
        _scan_samples(samples)  # before the reference's features, which take their time
    one = prepare(reference, extractor, needs=needs, **making)
    other = prepare(samples, extractor, needs=needs_samples, stored=False, **making)
    return dist_util.decide(lambda: _report(one, other, extractor, chosen, options or Options()))


def prepare(
    images: Opened | Side,
    extractor: str | Extractor,
    *,
    needs: Collection[str] = FIELDS,
    stored: bool = True,
    **making: Any,
) -> Side:
    """One side of a comparison; collective.

    :param needs: the fields of its features that are wanted.
    :param stored: take mean and covariance from the file where they are stored in it, as the original does.
    :param making: options of `feature_set`.
    :raises ValueError: if an image cannot be read, or the statistics are those of another network.
    """
    if isinstance(images, Side):
        return images
    images, extractor = open_images(images), make_extractor(extractor, device=dist_util.dev())
    if not stored:
        _scan_samples(images)
    statistics, record = read_statistics(images)
    found = {f"{kind}_statistics": values for kind, values in statistics.items()}
    used: dict[str, Any] = {name: values for name, values in found.items() if stored and name in needs}
    warnings = _check_network(images, extractor, used, record) if used else []
    missing = [name for name in FIELDS if name in set(needs) - set(used)] if images.count else []
    features = FeatureSet(images.count)
    if missing:
        features = feature_set(images, extractor, needs=missing, **making)
    notes = [*images.notes, *_origins(images, used, missing, features)]
    if found and not stored:
        notes.append(f"{images.path}: the mean and covariance in the file are not used: those of samples are computed")
    warnings += images.warnings() if images.scan else []
    return Side(images, replace(features, **used), tuple(notes), tuple(warnings))


def _scan_samples(images: ImageSet) -> None:
    """:raises ValueError: if they cannot be evaluated; collective."""
    if not images.count:
        raise ValueError(f"{images.path} holds statistics and no images, and samples must be images: give the images")
    images.share_scan()


def _check_network(
    images: ImageSet, extractor: Extractor, used: Mapping[str, Statistics], record: Mapping[str, Any]
) -> list[str]:
    """Refuse stored statistics of another network; a warning where it is the same one in another precision.

    :param record: {} in files of the original, whose statistics are those of Inception.
    """
    same = record["identity"] == extractor.identity if record else extractor.published
    if extractor.published:
        _check_columns(images, extractor, used)
    if same:
        return []
    theirs = record.get("extractor", "Inception")
    if extractor.published and theirs == extractor.name:
        return [
            f"{images.path}: its statistics were made with other weights of {theirs} or in another precision: "
            "make it again with these, if the last digits matter"
        ]
    raise ValueError(
        f"{images.path} holds the statistics of the features of {theirs}, and the samples' are those of "
        f"{extractor.name}{' with other weights' if theirs == extractor.name else ''}: give the images themselves as "
        "the reference, or make one by make_reference with the same --features"
    )


def _check_columns(images: ImageSet, extractor: Extractor, used: Mapping[str, Statistics]) -> None:
    """Refuse statistics of more or fewer features than there will be, before those of the samples are made."""
    tried = extractor(np.full((1, 32, 32, 3), 128, np.uint8))
    for name, found in used.items():
        values, stored = getattr(tried, COLUMNS[name]), len(found.mean)
        if values is not None and values.shape[1] != stored:
            raise ValueError(
                f"{images.path} holds {WORDS[name].replace('of', f'of {stored}', 1)}, and {extractor.name} gives "
                f"{values.shape[1]}: they are another network's; give the images themselves as the reference"
            )


def _origins(
    images: ImageSet, used: Mapping[str, Statistics], missing: Sequence[str], features: FeatureSet
) -> Iterator[str]:
    """Which features come from where."""
    for name, found in used.items():
        of = f"{found.n} images" if found.n else "a number of images that it does not say"
        yield f"{images.path}: {WORDS[name]} from the file, of {of}"
    there = [WORDS[name] for name in missing if getattr(features, name) is not None]
    if there:
        where = f"kept from before in {features.origin}" if features.origin else "computed here"
        yield f"{images.path}: {', '.join(there)} of {images.count} images, {where}"


# ---- comparing


def _report(
    reference: Side, samples: Side, extractor: Extractor, metrics: Mapping[str, Metric], options: Options
) -> Report:
    results: dict[str, float] = {}
    omitted: list[str] = []
    for metric in metrics.values():
        lacks = metric.lacks(reference.features, samples.features)
        if lacks:
            absent = any(getattr(samples.features, name) is None for name in metric.needs_samples)
            omitted.append(lacks + f": {extractor.name} gives none" * absent)
        else:
            values = metric.compute(reference.features, samples.features, options)
            results |= zip(_names(metric, extractor), map(float, values), strict=True)
    if not results:
        raise ValueError(f"nothing can be computed: {'; '.join(omitted)}")
    notes = (*reference.notes, *samples.notes)
    warnings = (*reference.warnings, *samples.warnings, *_few(reference), *_few(samples), *_sizes(reference, samples))
    facts = {
        "metrics": results,
        "extractor": {"name": extractor.name, "identity": extractor.identity, "published": extractor.published},
        "options": asdict(options),
        "reference": _facts(reference),
        "samples": {**_facts(samples), "run": request_of(samples.images.path)},
        "notes": list(notes),
        "warnings": list(warnings),
        "omitted": omitted,
    }
    return Report(results, notes, warnings, tuple(omitted), facts)


def _names(metric: Metric, extractor: Extractor) -> list[str]:
    """The labels of a metric, where another network is used by names that say so."""
    if extractor.published:
        return list(metric.labels)
    return [f"{OTHER_NAMES[label]} ({extractor.name})" if label in OTHER_NAMES else label for label in metric.labels]


def _few(side: Side) -> Iterator[str]:
    """A warning where mean and covariance are of too few images."""
    found, pool = side.features.pool_statistics, side.features.pool
    n = found.n if found is not None else side.features.n
    columns = len(found.mean) if found is not None else 0 if pool is None else pool.shape[1]
    limits = [text for limit, text in ((FEW, str(FEW)), (columns, f"the {columns} features")) if n < limit]
    if n and limits:
        singular = ", so that their covariance is singular" if n < columns else ""
        yield (
            f"{side.images.path}: {n} images are fewer than {' and '.join(limits)}{singular}: distances come out too "
            "large, and compare with those of as many images alone"
        )


def _sizes(reference: Side, samples: Side) -> Iterator[str]:
    """A warning where the images differ in height, width or channels."""
    shapes = [reference.images.shape, samples.images.shape]
    if None not in shapes and shapes[0] != shapes[1]:
        one, other = ("x".join(map(str, shape or ())) for shape in shapes)
        yield (
            f"the images of the reference are {one} and those of the samples {other} (height, width, channels): the "
            "network sees both at its own size, and tells the scaling apart too"
        )


def _facts(side: Side) -> dict[str, Any]:
    images, labels = side.images, side.images.labels
    return {
        "path": images.path,
        "images": images.count,
        "shape": images.shape,
        "dtype": str(images.dtype),
        "sha256": images.scanned.digest if images.scan else "",
        "labels": 0 if labels is None else len(labels),
        "classes": 0 if labels is None else len(np.unique(labels)),
        "statistics": {
            name: {"n": found.n, "features": len(found.mean)}
            for name in ("pool_statistics", "spatial_statistics")
            if (found := getattr(side.features, name)) is not None
        },
    }
