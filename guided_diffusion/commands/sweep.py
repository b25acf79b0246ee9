"""Sample at several scales of guidance, measure each, and draw what guidance gains and costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from ..config import ClassifierConfig, DiffusionConfig, ExtractorConfig, RangeConfig, RunConfig, UNetConfig
from ..runtime.errors import UserError
from ..runtime.options import parse_range
from .entry import entry
from .flags import COMMANDS, Flags
from .sections import SweepConfig

if TYPE_CHECKING:
    from ..evaluation.sweep import Cell
    from .common import Restored

# the command that samples, its flag of the scale, the scale at which nothing guides, and the scale's name
KINDS = {
    "classifier": ("classifier_sample", "classifier_scale", 0.0, "classifier scale"),
    "cfg": ("image_sample", "cfg_scale", 1.0, "classifier-free scale"),
}


def sweep(flags: Flags) -> None:
    """Fill the grid that the flags describe."""
    from .. import logger
    from ..evaluation.evaluator import prepare
    from ..evaluation.images import open_images
    from ..evaluation.plots import require
    from ..evaluation.scores import METRICS, Options
    from ..evaluation.sweep import Measure, run_sweep
    from . import common, guidance
    from .evaluation import extractor_of

    require()
    config, batch_size = flags.part(SweepConfig), flags.part(ExtractorConfig).eval_batch_size
    cells, base = list(cells_of(config)), sampling_flags(flags, config)
    for cell in cells:  # before anything is loaded
        cell_line = cell_flags(cell, base, config)
        common.on_its_grid(cell_line, common.sampler_of(cell_line))
        guidance.check(cell_line)
    common.start(flags)
    span = parse_range(flags.part(RangeConfig).data_range)
    images, extractor = open_images(config.reference, None, span), extractor_of(flags)
    model, classifier = restore(base, config)
    metrics = config.metrics.split(",")
    needs = {field for name in metrics for field in METRICS[name].needs}
    reference = prepare(images, extractor, needs=needs, progress=True, batch_size=batch_size)
    for line in (*reference.notes, *reference.warnings):
        logger.log(line)
    facts = {
        "guidance": config.guidance,
        "seed": flags.part(RunConfig).seed,
        "reference": images.path,
        "reference_images": images.count,
        "features": extractor.name,
        "model": model.path,
        "classifier": classifier.path if classifier else "",
    }
    run_sweep(
        cells,
        lambda cell, folder: sample(cell, folder, model, classifier, config),
        Measure(reference, extractor, metrics, Options(dtype=config.distances), batch_size),
        folder=logger.get_dir(),
        num_samples=config.num_samples,
        facts=facts,
        scale=KINDS[config.guidance][3],
    )


def cells_of(config: SweepConfig) -> Iterator[Cell]:
    """The cells, scale by scale within each number of steps of each sampler."""
    from ..evaluation.sweep import Cell

    steps, scales = map(int, config.steps.split(",")), map(float, config.scales.split(","))
    for sampler, count, scale in product(dict.fromkeys(config.samplers.split(",")), [*steps], [*scales]):
        yield Cell(sampler, count, scale)


def sampling_flags(flags: Flags, config: SweepConfig) -> Flags:
    """The command line of the sampling command, without what differs between cells."""
    if not config.reference:
        raise UserError("--reference is missing: give an npz, folder or zip of real images")
    if config.guidance == "cfg" and config.classifier_path:
        raise UserError("--classifier_path has no effect with --guidance cfg: leave one of them out")
    command = KINDS[config.guidance][0]
    of_the_sweep = {spec.name for spec in fields(SweepConfig)}
    given = {name: value for name, value in flags.given.items() if name not in of_the_sweep}
    given |= {name: value for name, value in asdict(config).items() if name not in ("samplers", "steps", "scales")}
    known = COMMANDS[command].flags()
    return Flags(command, {name: value for name, value in given.items() if name in known})


def cell_flags(cell: Cell, base: Flags, config: SweepConfig) -> Flags:
    """The command line of a cell, over what the model's checkpoint says."""
    _, name, neutral, _ = KINDS[config.guidance]
    given = {**base.given, "sampler": cell.sampler, "steps": cell.steps, name: cell.scale}
    if cell.scale == neutral:  # where nothing guides, no interval says when
        given.pop("guidance_interval", None)
    return Flags(base.command, given, base.saved)


def restore(base: Flags, config: SweepConfig) -> tuple[Restored, Restored | None]:
    """The networks of --model_path and --classifier_path; no classifier where a model guides itself.

    :raises ValueError: if they do not go together, or cannot be guided so.
    """
    from . import common
    from .classifier_sample import check_agreement

    model = common.restore_unet(base)
    if config.guidance == "cfg":
        if config.classes and not model.flags.part(UNetConfig).class_cond:
            raise UserError(f"--classes {config.classes} has no effect on an unconditional model: leave it out")
        return model, None
    classifier = common.restore_classifier(model.flags)
    check_agreement(model, classifier)
    return model, classifier


def sample(
    cell: Cell, folder: str, model: Restored, classifier: Restored | None, config: SweepConfig
) -> tuple[str, int]:
    """The samples of a cell, and how often the network is evaluated for a batch of them."""
    from ..sampling.guidance import without_labels
    from ..sampling.loop import network_calls
    from ..script_util import build_diffusion
    from . import common, guidance

    flags = cell_flags(cell, model.flags, config)
    sampler = common.sampler_of(flags)
    flags = common.on_its_grid(flags, sampler)
    model = replace(model, flags=flags, process=build_diffusion(flags.part(DiffusionConfig)))
    guided, unet = guidance.guided(model, classifier), flags.part(UNetConfig)
    labels: dict[str, Any] = {}
    if classifier is not None:
        num_classes = classifier.flags.part(ClassifierConfig).num_classes
        labels = common.labels_of(flags, classifier.classes or model.classes, num_classes)
    elif unet.class_cond:
        labels = common.labels_of(flags, model.classes, unet.num_classes)
    network = without_labels(guided.network) if classifier and not unet.class_cond else guided.network
    shape = common.image_shape(unet.image_channels, unet.image_size, unet.dims)
    request = {**guided.request, **model.identity}
    job = common.job_of(flags, sampler, shape, request, out_dir=folder, **labels)
    calls = network_calls(model.process, sampler, **guided.options)
    return common.sample_and_say(flags, model.process, network, job, **guided.options), calls


main = entry("sweep", sweep)
