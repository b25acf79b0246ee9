"""What the commands that evaluate share: ranks, where lines go, the network."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from .. import dist_util, logger
from ..cli import Flags
from ..evaluation_config import ExtractorConfig, PlaceConfig

if TYPE_CHECKING:
    from evaluations.features import Extractor


def start(flags: Flags) -> None:
    """Join the other ranks; rank 0 says what there is to say, and keeps it in log.txt where --log_dir is given."""
    place = flags.part(PlaceConfig)
    dist_util.setup_dist(device=place.device, timeout=place.dist_timeout)
    first = dist_util.rank() == 0
    if place.log_dir:
        logger.configure(dir=place.log_dir, format_strs=["stdout", "log"] if first else [])
    else:
        console = [logger.HumanOutputFormat(sys.stdout)] if first else []
        logger.Logger.CURRENT = logger.Logger(dir="", output_formats=console)


def extractor_of(flags: Flags) -> Extractor:
    """The network that makes the features."""
    from evaluations.features import make_extractor

    config = flags.part(ExtractorConfig)
    return make_extractor(
        config.features, weights=config.inception_weights, device=dist_util.dev(), precision=config.eval_precision
    )


def check_writable(path: str) -> None:
    """Find out before hours of work whether a file can be written at their end.

    :raises ValueError: if it cannot.
    """
    folder = os.path.dirname(path) or "."
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: give a file in a folder that may be written to")
