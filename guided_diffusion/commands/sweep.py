"""Sample at several scales of guidance, measure each, and draw what guidance gains and costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import product
from typing import TYPE_CHECKING, Any

from ..config import RangeConfig
from ..runtime.errors import refuse
from ..runtime.options import parse_range
from .entry import entry
from .flags import COMMANDS, SAVED_NAMES, Flags
from .sections import ExtractorConfig
from .tool_sections import SweepConfig

if TYPE_CHECKING:
    from ..evaluation.sweep import Cell

# the command that samples, its flag of the scale, the scale at which nothing guides, and the scale's name
KINDS = {
    "classifier": ("classifier_sample", "classifier_scale", 0.0, "classifier scale"),
    "cfg": ("image_sample", "cfg_scale", 1.0, "classifier-free scale"),
}
OF_A_CELL = ("samplers", "steps", "scales", "guidance_interval")


def sweep(flags: Flags) -> None:
    """Fill the grid that the flags describe."""
    from .. import logger
    from ..evaluation.evaluator import prepare
    from ..evaluation.images import open_images
    from ..evaluation.plots import require
    from ..evaluation.scores import METRICS, Options, needs_of
    from ..evaluation.sweep import Measure, run_sweep
    from . import common, sampling
    from .evaluation import extractor_of

    require()
    config, batch_size = flags.part(SweepConfig), flags.part(ExtractorConfig).eval_batch_size
    cells, base = list(cells_of(config)), sampling_flags(flags, config)
    for cell in cells:  # before anything is loaded
        cell_flags = base.with_values(**values_of(cell, config))
        cell_flags.check(pending=SAVED_NAMES)
        common.sampler_of(cell_flags)
    common.start(flags)
    span = parse_range(flags.part(RangeConfig).data_range)
    images, extractor = open_images(config.reference, None, span), extractor_of(flags)
    model = common.restore(base)
    classifier = sampling.restore_guide(model) if config.guidance == "classifier" else None
    metrics = config.metrics.split(",")
    needs = needs_of(METRICS[name] for name in metrics)
    reference = prepare(images, extractor, needs=needs, progress=True, batch_size=batch_size)
    for line in (*reference.notes, *reference.warnings):
        logger.log(line)

    def sample(cell: Cell, folder: str) -> tuple[str, int]:
        return sampling.draw(model.with_flags(**values_of(cell, config)), classifier, out_dir=folder)

    facts = {
        "guidance": config.guidance,
        "seed": flags.values["seed"],
        "reference": images.path,
        "reference_images": images.count,
        "features": extractor.name,
        "model": model.path,
        "classifier": classifier.path if classifier else "",
    }
    measure = Measure(reference, extractor, metrics, Options(dtype=config.distances), batch_size)
    options: dict[str, Any] = {"folder": logger.get_dir(), "num_samples": config.num_samples, "facts": facts}
    run_sweep(cells, sample, measure, scale=KINDS[config.guidance][3], **options)


def cells_of(config: SweepConfig) -> Iterator[Cell]:
    """The cells, scale by scale within each number of steps of each sampler."""
    from ..evaluation.sweep import Cell

    steps, scales = map(int, config.steps.split(",")), map(float, config.scales.split(","))
    for sampler, count, scale in product(dict.fromkeys(config.samplers.split(",")), [*steps], [*scales]):
        yield Cell(sampler, count, scale)


def sampling_flags(flags: Flags, config: SweepConfig) -> Flags:
    """The command line of the sampling command, without what differs between cells."""
    no_classifier = config.guidance == "classifier" and not config.classifier_path
    refuse(
        (not config.reference, "--reference is missing: give an npz, folder or zip of real images"),
        (no_classifier, "--classifier_path is missing: give a checkpoint or the folder of a run"),
    )
    command = KINDS[config.guidance][0]
    of_the_sweep = {spec.name for spec in fields(SweepConfig)}
    given = {name: value for name, value in flags.given.items() if name not in of_the_sweep}
    given |= {name: value for name, value in asdict(config).items() if name not in OF_A_CELL}
    known = COMMANDS[command].flags()
    return Flags(command, {name: value for name, value in given.items() if name in known})


def values_of(cell: Cell, config: SweepConfig) -> dict[str, Any]:
    """The flags of a cell."""
    _, name, neutral, _ = KINDS[config.guidance]
    silent = {"guidance_interval": "", "negative_prompt": ""}  # they have no effect where nothing guides
    more = silent if cell.scale == neutral else {"guidance_interval": config.guidance_interval}
    return {"sampler": cell.sampler, "steps": cell.steps, name: cell.scale, **more}


main = entry("sweep", sweep)
