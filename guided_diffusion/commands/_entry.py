"""How every command begins: flags first, torch after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guided_diffusion import cli

Main = Callable[..., None]


def entry(name: str, work: Callable[[cli.Flags], object]) -> Main:
    """The `main(argv=None)` of a command: read the command line, then do the work under the guard of all commands."""

    def main(argv: Sequence[str] | None = None) -> None:
        flags = cli.parse(name, argv)
        from guided_diffusion import dist_util

        dist_util.run(work, flags)

    main.__doc__ = f"Run ``{name}`` with a command line."
    return main
