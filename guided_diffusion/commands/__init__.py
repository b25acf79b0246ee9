"""The console command ``guided-diffusion COMMAND [flags]``: each module here is one command, and so is each script."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..runtime.errors import nearest
from .flags import COMMANDS


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [
        f"  {name:<{width}}  {command.about.partition('. ')[0].rstrip('.')}." for name, command in COMMANDS.items()
    ]
    first, last = "usage: guided-diffusion COMMAND [--FLAG VALUE ...]", "COMMAND --help lists its flags"
    return "\n".join([first, "", *lines, "", last])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names with the words after it."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        import_module(f".{name}", __name__).main(rest)
    elif name in ("-h", "--help", "--version"):
        print(f"guided-diffusion {__version__}" if name == "--version" else usage())
    else:
        hint = nearest(name, COMMANDS) or f": use one of {', '.join(COMMANDS)}"
        print(f"guided-diffusion: error: unknown command {name}{hint}", file=sys.stderr)
        raise SystemExit(2)
