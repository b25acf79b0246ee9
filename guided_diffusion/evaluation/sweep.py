"""A grid of samplers, steps and scales of guidance: sampled, measured and drawn.

Every cell of the grid has a folder of its own. What is there already is neither sampled nor measured again, so that a
sweep that was killed goes on when it is run again, and comes to the same table.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import dist_util, logger
from ..runtime.files import parse_json, read_file, replacing, write_json
from ..runtime.npz import fingerprint
from .evaluator import Side, evaluate
from .features import Extractor
from .plots import draw_sweep
from .references import read_statistics
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
    :raises ValueError: if the reference cannot be used.
    """
    dist_util.decide(measure.rehearse)
    rows: list[Row] = []
    for number, cell in enumerate(cells, start=1):
        path, calls = sample(cell, os.path.join(folder, cell.folder))
        results = measure(path, os.path.join(folder, cell.folder))
        rows.append({**asdict(cell), "evaluations": calls, "samples": num_samples, **results})
        logger.log(f"cell {number} of {len(cells)}: {cell}: {', '.join(f'{k} {v:.4g}' for k, v in results.items())}")
        dist_util.decide(lambda: _write(rows, folder, facts))
    labels = [name for name in rows[0] if name not in COLUMNS]
    dist_util.decide(lambda: draw_sweep(rows, labels, os.path.join(folder, PICTURE), scale=scale))
    logger.log(f"sweep complete: {os.path.join(folder, TABLE)}, {RESULTS} and {PICTURE}")


def _write(rows: Sequence[Row], folder: str, facts: Mapping[str, Any]) -> None:
    """The table so far, as CSV and as JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(os.path.join(folder, TABLE)) as file:
        file.write(text.getvalue().encode())
    write_json(os.path.join(folder, RESULTS), {**facts, "rows": list(rows)})


class Measure:
    """(path of samples, folder) -> their metrics, kept in the folder; collective."""

    def __init__(
        self, reference: Side, extractor: Extractor, metrics: Sequence[str], options: Options, *, batch_size: int
    ) -> None:
        self._reference, self._extractor, self._metrics = reference, extractor, metrics
        self._options, self._batch_size, self._warned = options, batch_size, False

    def rehearse(self) -> None:
        """:raises ValueError: if no samples could be compared with the reference."""
        rehearse(self._reference.features, [METRICS[name] for name in self._metrics], self._options)

    def __call__(self, samples: str, folder: str) -> dict[str, float]:
        path, request = os.path.join(folder, CELL), dist_util.decide(self._request)
        kept = dist_util.decide(lambda: _kept(path, request))
        if kept is not None:
            return kept
        making: dict[str, Any] = {"batch_size": self._batch_size, "cache": False}
        report = evaluate(
            self._reference, samples, self._extractor, metrics=self._metrics, options=self._options, **making
        )
        for line in (*report.warnings, *report.omitted) if not self._warned else ():
            logger.warn(line)
        self._warned = True
        results = dict(report.results)
        dist_util.decide(lambda: write_json(path, {"request": request, "results": results}))
        return results

    def _request(self) -> dict[str, Any]:
        """What the numbers depend on besides the samples."""
        return {
            "reference": _digest(self._reference),
            "features": self._extractor.identity,
            "metrics": ",".join(self._metrics),
            "options": asdict(self._options),
        }


def _digest(reference: Side) -> str:
    """What stands for the content of a reference."""
    if reference.images.count:
        return reference.images.scanned.digest
    known, _ = read_statistics(reference.images)
    return fingerprint({f"{name} {part}": getattr(of, part) for name, of in known.items() for part in ("mean", "cov")})


def _kept(path: str, request: Mapping[str, Any]) -> dict[str, float] | None:
    """The metrics of a cell that was measured before in the same way; None if it was not."""
    try:
        found = parse_json(read_file(path))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("request") == request
    return dict(found["results"]) if same and isinstance(found.get("results"), dict) else None
