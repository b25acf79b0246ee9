"""What guidance gains and costs: a grid of samplers, steps and scales, sampled, measured and drawn.

Every cell of the grid has a folder of its own. What is there already is neither sampled nor measured again, so that a
sweep that was killed goes on when it is run again, and comes to the same table.
"""

from __future__ import annotations

if __name__ == "__main__":  # python evaluations/sweep.py
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from guided_diffusion.commands.sweep import main

    main()
    raise SystemExit

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

from evaluations.evaluator import Side, evaluate, prepare
from evaluations.features import Extractor
from evaluations.figures import require
from evaluations.npz import open_images
from evaluations.plots import draw_sweep
from evaluations.scores import METRICS, Options, rehearse
from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoint import save_json
from guided_diffusion.cli import COMMANDS, Flags
from guided_diffusion.commands import _common as common, _guidance as guidance
from guided_diffusion.commands._evaluation import extractor_of
from guided_diffusion.commands.classifier_sample import check_agreement
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, RunConfig, UNetConfig
from guided_diffusion.evaluation_config import ExtractorConfig, SweepConfig
from guided_diffusion.guidance import without_labels
from guided_diffusion.loop import network_calls
from guided_diffusion.npz import fingerprint, replacing
from guided_diffusion.script_util import build_diffusion
from guided_diffusion.untrusted import parse_json, read_file

TABLE, RESULTS, PICTURE, CELL = "results.csv", "results.json", "sweep.png", "result.json"
KINDS = {
    "classifier": ("classifier_sample", "classifier_scale", 0.0, "classifier scale"),
    "cfg": ("image_sample", "cfg_scale", 1.0, "classifier-free scale"),
}


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


@dataclass(frozen=True)
class Networks:
    """What samples are made with, loaded once.

    :param classifier: None where a model guides itself.
    """

    model: common.Restored
    classifier: common.Restored | None

    def labels(self, flags: Flags) -> dict[str, Any]:
        """The labels of a job."""
        of, section = (self.classifier, ClassifierConfig) if self.classifier else (self.model, UNetConfig)
        return common.labels_of(flags, of.classes or self.model.classes, of.flags.part(section).num_classes)


def run(flags: Flags) -> None:
    """Fill the grid, and write the table and the picture.

    :raises ValueError: naming the flag that is wrong.
    """
    require()
    config = flags.part(SweepConfig)
    cells = list(_cells(config))
    base = _sampling_flags(flags, config)
    for cell in cells:  # before anything is loaded
        _check(_flags_of(cell, base, config))
    common.start(flags)
    source, extractor = open_images(config.reference), extractor_of(flags)
    networks = _restore(base, config)
    chosen = [METRICS[name] for name in config.metrics.split(",")]
    needs = {field for metric in chosen for field in metric.needs}
    batch_size = flags.part(ExtractorConfig).eval_batch_size
    reference = prepare(source, extractor, needs=needs, progress=True, batch_size=batch_size)
    for line in (*reference.notes, *reference.warnings):
        logger.log(line)
    dist_util.decide(lambda: rehearse(reference.features, chosen, Options(dtype=config.distances)))
    sweep = _Sweep(flags, config, networks, extractor, reference)
    rows = []
    for number, cell in enumerate(cells, start=1):
        rows.append(sweep.row(cell))
        numbers = ", ".join(f"{name} {rows[-1][name]:.4g}" for name in sweep.labels(rows))
        logger.log(f"cell {number} of {len(cells)}: {cell}: {numbers}")
        dist_util.decide(lambda: sweep.write(rows))
    dist_util.decide(lambda: sweep.draw(rows))


def _cells(config: SweepConfig) -> Iterator[Cell]:
    """The cells, scale by scale within each number of steps of each sampler."""
    steps, scales = map(int, config.steps.split(",")), map(float, config.scales.split(","))
    for sampler, count, scale in product(dict.fromkeys(config.samplers.split(",")), [*steps], [*scales]):
        yield Cell(sampler, count, scale)


# ---- flags


def _sampling_flags(flags: Flags, config: SweepConfig) -> Flags:
    """The command line of the sampling command, without what differs between cells.

    :raises ValueError: if something is missing or without effect.
    """
    if not config.reference:
        raise ValueError("--reference is missing: give an npz, folder or zip of real images")
    if config.guidance == "cfg" and config.classifier_path:
        raise ValueError("--classifier_path has no effect with --guidance cfg: leave one of them out")
    command = KINDS[config.guidance][0]
    own = {spec.name for spec in fields(SweepConfig)}
    given = {name: value for name, value in flags.given.items() if name not in own}
    given |= {name: value for name, value in asdict(config).items() if name not in ("samplers", "steps", "scales")}
    known = COMMANDS[command].flags()
    return Flags(command, {name: value for name, value in given.items() if name in known})


def _flags_of(cell: Cell, base: Flags, config: SweepConfig) -> Flags:
    """The command line of a cell, over what the model's checkpoint says."""
    _, name, neutral, _ = KINDS[config.guidance]
    given = {**base.given, "sampler": cell.sampler, "steps": cell.steps, name: cell.scale}
    if cell.scale == neutral:  # where nothing guides, nothing says how
        for flag in ("guidance_interval", "clip_guided"):
            given.pop(flag, None)
    return Flags(base.command, given, base.saved)


def _check(flags: Flags) -> None:
    common.on_its_grid(flags, common.sampler_of(flags))
    guidance.check(flags)


# ---- networks


def _restore(base: Flags, config: SweepConfig) -> Networks:
    """The networks, where they go together.

    :raises ValueError: if they do not, or cannot be guided so.
    """
    model = common.restore_unet(base)
    unet = model.flags.part(UNetConfig)
    if config.classes and not unet.class_cond and config.guidance == "cfg":
        raise ValueError(f"--classes {config.classes} has no effect on an unconditional model: leave it out")
    if config.guidance == "cfg":
        return Networks(model, None)
    classifier = common.restore_classifier(model.flags)
    check_agreement(model, classifier)
    return Networks(model, classifier)


# ---- cells


class _Sweep:
    """Samples and measures cells, and writes what comes out."""

    def __init__(
        self, flags: Flags, config: SweepConfig, networks: Networks, extractor: Extractor, reference: Side
    ) -> None:
        self.config, self.networks, self.extractor, self.reference = config, networks, extractor, reference
        self.seed, self.folder = flags.part(RunConfig).seed, logger.get_dir()
        self._batch_size = flags.part(ExtractorConfig).eval_batch_size
        self._options, self._said = Options(dtype=config.distances), False

    def row(self, cell: Cell) -> dict[str, Any]:
        """The line of the table for a cell: what it is, and its metrics; collective."""
        folder = os.path.join(self.folder, cell.folder)
        samples, calls = self._sample(cell, folder)
        request = self._request()
        kept = dist_util.decide(lambda: _kept(os.path.join(folder, CELL), request))
        if kept is None:
            kept = dict(self._measure(samples))
            dist_util.decide(lambda: save_json(os.path.join(folder, CELL), {"request": request, "results": kept}))
        own = {"sampler": cell.sampler, "steps": cell.steps, "scale": cell.scale}
        return {**own, "evaluations": calls, "samples": self.config.num_samples, **kept}

    def _sample(self, cell: Cell, folder: str) -> tuple[str, int]:
        """The samples of a cell, and how often the network is asked for a batch of them."""
        model, classifier = self.networks.model, self.networks.classifier
        flags = _flags_of(cell, model.flags, self.config)
        sampler = common.sampler_of(flags)
        flags = common.on_its_grid(flags, sampler)
        model = replace(model, flags=flags, process=build_diffusion(flags.part(DiffusionConfig)))
        guided, unet = guidance.guided(model, classifier), flags.part(UNetConfig)
        labelled = unet.class_cond or classifier is not None
        labels = self.networks.labels(flags) if labelled else {}
        network = without_labels(guided.network) if classifier and not unet.class_cond else guided.network
        shape = common.image_shape(unet.image_channels, unet.image_size, unet.dims)
        request = {**guided.request, **model.identity}
        job = common.job_of(flags, sampler, shape, request, out_dir=folder, **labels)
        calls = network_calls(model.process, sampler, **guided.options)
        return common.sample_and_say(flags, model.process, network, job, **guided.options), calls

    def _measure(self, samples: str) -> Mapping[str, float]:
        report = evaluate(
            self.reference,
            samples,
            self.extractor,
            metrics=self.config.metrics.split(","),
            options=self._options,
            batch_size=self._batch_size,
            cache=False,
        )
        for line in (*report.warnings, *report.omitted) if not self._said else ():
            logger.warn(line)
        self._said = True
        return report.results

    def _request(self) -> dict[str, Any]:
        """What the numbers of a cell depend on besides its samples."""
        return {
            "reference": dist_util.decide(lambda: _digest(self.reference)),
            "features": self.extractor.identity,
            "metrics": self.config.metrics,
            "options": asdict(self._options),
        }

    def labels(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The columns of metrics."""
        return [name for name in rows[0] if name not in ("sampler", "steps", "scale", "evaluations", "samples")]

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The table so far, as CSV and as JSON."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(os.path.join(self.folder, TABLE)) as file:
            file.write(text.getvalue().encode())
        facts = {"guidance": self.config.guidance, "seed": self.seed, **self._facts()}
        save_json(os.path.join(self.folder, RESULTS), {**facts, "rows": list(rows)})

    def _facts(self) -> dict[str, Any]:
        of = {"reference": self.reference.source.path, "reference_images": self.reference.source.count}
        classifier = self.networks.classifier
        paths = {"model": self.networks.model.path, "classifier": classifier.path if classifier else ""}
        return {**of, "features": self.extractor.name, **paths}

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The picture of the whole table."""
        path = os.path.join(self.folder, PICTURE)
        draw_sweep(rows, self.labels(rows), path, scale=KINDS[self.config.guidance][3])
        logger.log(f"sweep complete: {os.path.join(self.folder, TABLE)}, {RESULTS} and {PICTURE}")


def _digest(reference: Side) -> str:
    """What stands for the content of a reference."""
    if reference.source.count:
        return reference.source.digest()
    known = reference.source.statistics()
    return fingerprint({f"{name} {part}": getattr(of, part) for name, of in known.items() for part in ("mean", "cov")})


def _kept(path: str, request: Mapping[str, Any]) -> dict[str, float] | None:
    """The metrics of a cell that was measured before in the same way; None if it was not."""
    if not os.path.exists(path):
        return None
    try:
        found = parse_json(read_file(path))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("request") == request
    return dict(found["results"]) if same and isinstance(found.get("results"), dict) else None
