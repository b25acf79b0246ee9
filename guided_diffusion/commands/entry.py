"""The `main` of every command, which parses the flags before it imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .flags import Flags, parse

Main = Callable[..., None]


def entry(name: str, work: Callable[[Flags], object]) -> Main:
    """The `main(argv=None)` of a command: parse the command line, then work under the guard of all commands.

    With --dry_run, only the size of the work is printed.
    """

    def main(argv: Sequence[str] | None = None) -> None:
        flags = parse(name, argv)
        from .. import dist_util

        if flags.values.get("dry_run"):
            from .dry_run import rehearse

            dist_util.run(rehearse, flags)
        else:
            dist_util.run(work, flags)

    main.__doc__ = f"Run ``{name}`` with a command line."
    return main
