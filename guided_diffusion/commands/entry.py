"""The `main` of every command, which parses the flags before it imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from .flags import Flags, parse

Main = Callable[..., None]


def entry(name: str, work: Callable[[Flags], object] | str) -> Main:
    """The `main(argv=None)` of a command: parse the command line, then work under the guard of all commands.

    :param work: a function, or "MODULE.FUNCTION" of this package, imported when the command line is parsed. With
        --dry_run, only the size of the work is printed.
    """

    def main(argv: Sequence[str] | None = None) -> None:
        flags = parse(name, argv)
        from .. import dist_util

        function: Any = "dry_run.rehearse" if flags.values.get("dry_run") else work
        if isinstance(function, str):
            module, _, function_name = function.partition(".")
            function = getattr(import_module(f".{module}", __package__), function_name)
        dist_util.run(function, flags)

    main.__doc__ = f"Run ``{name}`` with a command line."
    return main
