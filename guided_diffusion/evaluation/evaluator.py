"""The comparison of samples with real images: scores, where their features come from, and warnings.

Shapes: N images, D pooled features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .. import dist_util
from ..runtime.errors import UserError, check_choice, refuse
from .features import Extractor
from .images import ImageSet, Opened, open_images, read_statistics, request_of
from .metrics import Statistics
from .references import FIELDS, feature_set
from .scores import DEFAULT_METRICS, METRICS, WORDS, FeatureSet, Metric, Options, needs_of

FEW = 2048  # images; a warning is given for fewer, whatever the network


@dataclass(frozen=True)
class Side:
    """The reference or the samples.

    :param features: of its images, on rank 0; the statistics may be those that were stored beside them.
    :param notes: sentences about the origin of the features.
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
    :param omitted: sentences about the scores that cannot be computed.
    :param facts: everything, as JSON values.
    :param sides: the reference and the samples.
    """

    results: Mapping[str, float]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    omitted: tuple[str, ...]
    facts: Mapping[str, Any] = field(repr=False)
    sides: tuple[Side, ...] = field(default=(), repr=False)

    def lines(self) -> list[str]:
        """The scores as the original prints them."""
        return [f"{name}: {value!r}" for name, value in self.results.items()]


def evaluate(
    reference: Opened | Side,
    samples: Opened,
    extractor: Extractor,
    *,
    metrics: str | Sequence[str] = DEFAULT_METRICS,
    options: Options | None = None,
    needs: Collection[str] = (),
    **making: Any,
) -> Report:
    """The scores of samples against a reference; collective, and the same report on every rank.

    :param reference: a path, or the result of `prepare` where many samples are compared with one reference.
    :param metrics: names of `METRICS`, or one text of them with commas.
    :param needs: fields of `FeatureSet` that the report's sides are to have beside those that the metrics take.
    :param making: options of `feature_set`: batch_size, cache, progress.
    """
    samples = open_images(samples)
    names = metrics.split(",") if isinstance(metrics, str) else metrics
    for name in names:
        check_choice("a metric", name, METRICS)
    chosen = [METRICS[name] for name in METRICS if name in names]
    of_images = "and samples must be images: give the images"
    refuse((not samples.count, f"{samples.path} holds statistics and no images, {of_images}"))
    samples.share_scan()  # errors come before the reference's features, which take their time
    if not isinstance(reference, Side):
        reference = prepare(reference, extractor, needs={*needs_of(chosen), *needs}, **making)
    fields = {*(metric.field for metric in chosen), *needs}
    other = prepare(samples, extractor, needs=fields, stored=False, **making)
    report = dist_util.decide(lambda: _report(reference, other, extractor, chosen, options or Options()))
    return replace(report, sides=(reference, other))


def prepare(
    images: Opened, extractor: Extractor, *, needs: Collection[str] = tuple(FIELDS), stored: bool = True, **making: Any
) -> Side:
    """One side of a comparison; collective.

    :param needs: the fields of `FeatureSet` to provide.
    :param stored: take mean and covariance from the file if it holds them, as the original does.
    :param making: options of `feature_set`.
    """
    images = open_images(images)
    statistics, record = read_statistics(images)
    held = {f"{kind}_statistics": values for kind, values in statistics.items()}
    used: dict[str, Any] = {name: values for name, values in held.items() if stored and name in needs}
    warnings = _check_network(images, extractor, record) if used else []
    missing = [name for name in FIELDS if name in needs and name not in used] if images.count else []
    features = feature_set(images, extractor, needs=missing, **making) if missing else FeatureSet(images.count)
    notes = [*images.notes, *_origins(images, used, missing, features)]
    if held and not stored:
        notes.append(f"{images.path}: the mean and covariance in the file are not used: those of samples are computed")
    warnings += images.warnings() if images.scan else []
    return Side(images, replace(features, **used), tuple(notes), tuple(warnings))


def _check_network(images: ImageSet, extractor: Extractor, record: Mapping[str, Any]) -> list[str]:
    """Refuse stored statistics of another network, and warn of those of the same one in another precision.

    :param record: {} in files of the original, whose statistics are those of Inception.
    """
    if record["identity"] == extractor.identity if record else extractor.published:
        return []
    network = record.get("extractor", "Inception")
    if extractor.published and network == extractor.name:
        return [f"{images.path}: its statistics were made with other weights of {network} or in another precision"]
    raise UserError(
        f"{images.path} holds the statistics of the features of {network}, and the samples' are those of "
        f"{extractor.name}{' with other weights' if network == extractor.name else ''}: give the images themselves as "
        "the reference, or make one by make_reference with the same --features"
    )


def _origins(
    images: ImageSet, used: Mapping[str, Statistics], missing: Sequence[str], features: FeatureSet
) -> Iterator[str]:
    for name, statistics in used.items():
        count = f"{statistics.n} images" if statistics.n else "an unknown number of images"
        yield f"{images.path}: {WORDS[name]} from the file, of {count}"
    given = [name for name in missing if getattr(features, name) is not None]
    for origin, kept in (("kept from an earlier run", True), ("computed now", False)):
        if words := [WORDS[name] for name in given if (name in features.kept) == kept]:
            yield f"{images.path}: {', '.join(words)} of {images.count} images, {origin}"


def _report(
    reference: Side, samples: Side, extractor: Extractor, metrics: Sequence[Metric], options: Options
) -> Report:
    results: dict[str, float] = {}
    omitted: list[str] = []
    for metric in metrics:
        if sentence := metric.lacks(reference.features, samples.features):
            omitted.append(sentence)
        else:
            values = metric.compute(reference.features, samples.features, options)
            results |= dict(
                zip(metric.labels_for(extractor.name, extractor.published), map(float, values), strict=True)
            )
    refuse((not results, f"nothing can be computed: {'; '.join(omitted)}"))
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


def _few(side: Side) -> Iterator[str]:
    """A warning if mean and covariance are of too few images."""
    statistics, pool = side.features.pool_statistics, side.features.pool
    n = statistics.n if statistics is not None else side.features.n
    columns = len(statistics.mean) if statistics is not None else 0 if pool is None else pool.shape[1]
    limit = max(FEW, columns)
    if 0 < n < limit:
        singular = f" (of {columns} features, so that their covariance is singular)" if n < columns else ""
        yield (
            f"{side.images.path}: {n} images{singular} are fewer than {limit}: distances come out too large, and "
            "compare with those of as many images alone"
        )


def _sizes(reference: Side, samples: Side) -> Iterator[str]:
    """A warning if the images differ in height, width or channels."""
    first, second = reference.images.shape, samples.images.shape
    if first and second and first != second:
        shapes = ["x".join(map(str, shape)) for shape in (first, second)]
        both = f"the images of the reference are {shapes[0]} and those of the samples {shapes[1]}"
        yield f"{both}: scaling enters the scores"


def _facts(side: Side) -> dict[str, Any]:
    images, labels, features = side.images, side.images.labels, side.features
    statistics = {"pool_statistics": features.pool_statistics, "spatial_statistics": features.spatial_statistics}
    return {
        "path": images.path,
        "images": images.count,
        "shape": images.shape,
        "dtype": str(images.dtype),
        "sha256": images.scanned.digest if images.scan else "",
        "labels": 0 if labels is None else len(labels),
        "classes": 0 if labels is None else len(np.unique(labels)),
        "statistics": {name: {"n": x.n, "features": len(x.mean)} for name, x in statistics.items() if x is not None},
    }
