"""How every script in datasets/ begins: a name and a reader make its command line."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from guided_diffusion.commands import flags as cli
from guided_diffusion.commands.entry import Main, entry

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
        check_paths(config.source, config.out)  # before the script looks for its files there
        try:
            convert(read(config), config, name)
        except (ValueError, OSError) as error:
            if _comes_from(read, error):  # raised here, it is this package's word on a wrong input
                raise type(error)(*error.args, *_file_of(error)) from error
            raise

    return entry(name, work)


def _file_of(error: Exception) -> list[str]:
    """The file that the system says an error is about, which is none of its arguments."""
    return [error.filename] if isinstance(error, OSError) and error.filename is not None else []


def _comes_from(read: Callable[[Any], Source], error: Exception) -> bool:
    """Whether the script itself raised an error, not some library that it called."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals is read.__globals__
