"""Compare samples with real images, as the published numbers do: Inception Score, FID, sFID, precision, recall."""

from __future__ import annotations

from ..config import RangeConfig
from ..runtime.errors import refuse
from ..runtime.options import parse_range
from .entry import entry
from .flags import Flags
from .sections import ExtractorConfig
from .tool_sections import EvaluatorConfig


def compare(flags: Flags) -> None:
    """Print the origin of the features, warnings, and the scores."""
    from .. import dist_util, logger
    from ..evaluation.evaluator import evaluate
    from ..evaluation.images import FileImages, open_images
    from ..evaluation.neighbours import K, draw_neighbours
    from ..evaluation.scores import Options
    from ..runtime.files import write_json
    from . import evaluation as common

    config, span = flags.part(EvaluatorConfig), parse_range(flags.part(RangeConfig).data_range)
    common.start(flags)
    for path in filter(None, (config.json, config.neighbours)):
        common.check_writable(path)
    reference, samples = (
        open_images(path, config.image_size or None, span) for path in (config.reference, config.samples)
    )
    few = config.neighbours and min(reference.count, samples.count) < K
    refuse((few, f"--neighbours needs {K} images or more on either side: give images, or leave it out"))
    idle = config.image_size and not any(isinstance(images, FileImages) for images in (reference, samples))
    refuse((idle, f"--image_size {config.image_size} has no effect, as no folder or zip is given: leave it out"))
    report = evaluate(
        reference,
        samples,
        common.extractor_of(flags),
        metrics=config.metrics,
        options=Options(dtype=config.distances, seed=config.seed),
        needs=["pool"] if config.neighbours else (),
        batch_size=flags.part(ExtractorConfig).eval_batch_size,
        cache=config.cache,
        progress=True,
    )
    facts, lines = dict(report.facts), list[str]()
    if config.neighbours:
        facts["neighbours"], line = dist_util.decide(lambda: draw_neighbours(config.neighbours, *report.sides))
        lines = [line]
    if dist_util.rank() == 0 and config.json:
        write_json(config.json, facts)
    warnings = (f"warning: {text}" for text in report.warnings)
    for line in (*report.notes, *warnings, *report.omitted, *lines, *report.lines()):
        logger.log(line)


main = entry("evaluator", compare)
