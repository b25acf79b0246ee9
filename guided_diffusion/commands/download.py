"""Fetch a file that evaluation needs, such as the weights of the Inception network."""

from __future__ import annotations

from ..runtime.errors import UserError, nearest
from .entry import entry
from .flags import Flags
from .sections import DownloadConfig


def download(flags: Flags) -> None:
    """Fetch the file that the flags name."""
    from ..evaluation.weights import SOURCES, fetch

    config = flags.part(DownloadConfig)
    if config.name not in SOURCES:
        hint = nearest(config.name, SOURCES) or f": name one of {', '.join(SOURCES)}"
        raise UserError(f"{config.name!r} is unknown{hint}")
    fetch(SOURCES[config.name], config.out)


main = entry("download", download)
