"""The command line of every script in datasets/, made of its name and its reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from guided_diffusion.commands import flags as cli
from guided_diffusion.commands.entry import Main, entry
from guided_diffusion.runtime.errors import UserError

from .config import DATASETS

if TYPE_CHECKING:
    from .images import Source

cli.OTHERS.update(DATASETS)


def converter(name: str, read: Callable[[Any], Source]) -> Main:
    """The `main(argv=None)` of a script.

    :param name: in `DATASETS`.
    :param read: the flags of the script's section -> the images of the data set.
    """

    def work(flags: cli.Flags) -> None:
        from .writer import check_paths, convert

        config = flags.part(DATASETS[name].sections[0])
        try:
            check_paths(config.source, config.out)  # before the script looks for its files there
            convert(read(config), config, name)
        except ValueError as error:
            raise UserError(str(error)) from error

    return entry(name, work)
