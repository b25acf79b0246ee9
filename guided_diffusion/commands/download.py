"""Fetch a file that evaluation needs, such as the weights of the Inception network."""

from __future__ import annotations

from .entry import entry
from .flags import Flags


def download(flags: Flags) -> None:
    """Fetch what is asked for; of several processes one does, and the others wait.

    :raises ValueError: if there is no such thing.
    """
    from ..evaluation.downloads import SOURCES, fetch
    from ..runtime.options import nearest
    from .sections import DownloadConfig

    config = flags.part(DownloadConfig)
    if config.name not in SOURCES:
        hint = nearest(config.name, SOURCES) or f": name one of {', '.join(SOURCES)}"
        raise ValueError(f"{config.name!r} is nothing that can be fetched{hint}")
    fetch(SOURCES[config.name], config.out)


main = entry("download", download)
