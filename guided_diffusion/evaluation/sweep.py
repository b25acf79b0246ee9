"""A grid of samplers, steps and scales of guidance: sampled, measured and drawn.

Every cell of the grid has a folder of its own. Its samples are a restartable job and its metrics a file with their
request, so that a sweep that was killed goes on when it is run again, and comes to the same table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import dist_util, logger
from ..runtime.atomic import replacing
from ..runtime.files import parse_json, read_file, write_json
from ..runtime.log_writers import csv_text
from ..runtime.npz import fingerprint
from .evaluator import Side, evaluate
from .features import Extractor
from .images import read_statistics
from .plots import draw_sweep
from .scores import METRICS, Options, rehearse

TABLE, RESULTS, PICTURE, CELL = "results.csv", "results.json", "sweep.png", "result.json"
COLUMNS = ("sampler", "steps", "scale", "evaluations", "samples")  # of the table, before those of the metrics

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One sampler in one number of steps at one scale."""

    sampler: str
    steps: int
    scale: float

    @property
    def folder(self) -> str:
        """Its name in the folder of the sweep."""
        return f"{self.sampler}_{self.steps}_scale_{self.scale:g}"

    def __str__(self) -> str:
        return f"{self.sampler}, {self.steps} steps, scale {self.scale:g}"


# (cell, its folder) -> the path of its samples, and how often the network is evaluated for a batch of them
Sample = Callable[[Cell, str], tuple[str, int]]


@dataclass(frozen=True)
class Measure:
    """How samples are compared with a reference."""

    reference: Side
    extractor: Extractor
    metrics: Sequence[str]
    options: Options
    batch_size: int


def run_sweep(
    cells: Sequence[Cell],
    sample: Sample,
    measure: Measure,
    *,
    folder: str,
    num_samples: int,
    facts: Mapping[str, Any],
    scale: str,
) -> None:
    """Sample and measure every cell, write the table after each and the picture after all; collective.

    :param facts: written to results.json beside the table.
    :param scale: the name of the scale in the picture.
    """
    metrics = [METRICS[name] for name in measure.metrics]
    dist_util.decide(lambda: rehearse(measure.reference.features, metrics, measure.options))
    request = dist_util.decide(lambda: _request(measure))
    rows: list[Row] = []
    for number, cell in enumerate(cells, start=1):
        cell_folder = os.path.join(folder, cell.folder)
        samples, calls = sample(cell, cell_folder)
        results = _measured(samples, os.path.join(cell_folder, CELL), measure, request, warn=number == 1)
        rows.append({**asdict(cell), "evaluations": calls, "samples": num_samples, **results})
        logger.log(f"cell {number} of {len(cells)}: {cell}: {', '.join(f'{k} {v:.4g}' for k, v in results.items())}")
        dist_util.decide(lambda: _write(rows, folder, facts))
    labels = [name for name in rows[0] if name not in COLUMNS]
    dist_util.decide(lambda: draw_sweep(rows, labels, os.path.join(folder, PICTURE), scale=scale))
    logger.log(f"sweep complete: {os.path.join(folder, TABLE)}, {RESULTS} and {PICTURE}")


def _request(measure: Measure) -> dict[str, Any]:
    """What the metrics depend on besides the samples."""
    images = measure.reference.images
    if images.count:
        digest = images.scanned.digest
    else:
        known, _ = read_statistics(images)
        digest = fingerprint({f"{kind} {p}": getattr(of, p) for kind, of in known.items() for p in ("mean", "cov")})
    return {
        "reference": digest,
        "features": measure.extractor.identity,
        "metrics": ",".join(measure.metrics),
        "options": asdict(measure.options),
    }


def _measured(samples: str, path: str, measure: Measure, request: Row, *, warn: bool) -> dict[str, float]:
    """The metrics of samples, from a file where it keeps them for the same request, else written there."""
    if kept := dist_util.decide(lambda: _kept(path, request)):
        return kept
    options: dict[str, Any] = {"batch_size": measure.batch_size, "cache": False, "options": measure.options}
    report = evaluate(measure.reference, samples, measure.extractor, metrics=measure.metrics, **options)
    for line in (*report.warnings, *report.omitted) if warn else ():
        logger.warn(line)
    dist_util.decide(lambda: write_json(path, {"request": request, "results": dict(report.results)}))
    return dict(report.results)


def _kept(path: str, request: Row) -> dict[str, float]:
    try:
        result = parse_json(read_file(path))
        return dict(result["results"]) if result["request"] == request else {}
    except (OSError, ValueError, TypeError, KeyError):  # it is missing, or no result
        return {}


def _write(rows: Sequence[Row], folder: str, facts: Mapping[str, Any]) -> None:
    """The table so far, as CSV and as JSON."""
    with replacing(os.path.join(folder, TABLE)) as file:
        file.write(csv_text([rows[0], *([row[name] for name in rows[0]] for row in rows)]).encode())
    write_json(os.path.join(folder, RESULTS), {**facts, "rows": list(rows)})
