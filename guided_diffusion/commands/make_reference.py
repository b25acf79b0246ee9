"""Write the reference that samples are compared with: statistics of all images, and some of the images."""

from __future__ import annotations

from ..config import RangeConfig
from ..runtime.errors import refuse
from ..runtime.options import parse_range
from .entry import entry
from .flags import Flags
from .sections import ExtractorConfig
from .tool_sections import ReferenceConfig


def make(flags: Flags) -> None:
    """Write the reference that the flags describe."""
    from .. import logger
    from ..evaluation.images import open_images
    from ..evaluation.references import write_reference
    from . import evaluation as common

    config = flags.part(ReferenceConfig)
    refuse((not config.out.endswith(".npz"), f"{config.out!r} is not the name of an npz: give one that ends in .npz"))
    common.start(flags)
    common.check_writable(config.out)
    source = open_images(config.data_dir, config.image_size, parse_range(flags.part(RangeConfig).data_range))
    extractor = common.extractor_of(flags) if config.statistics else None
    size, count, batch_size = config.image_size, config.num_samples, flags.part(ExtractorConfig).eval_batch_size
    lines = write_reference(source, config.out, extractor, size=size, num_samples=count, batch_size=batch_size)
    for line in lines:
        logger.log(line)


main = entry("make_reference", make)
