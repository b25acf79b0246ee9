"""Images of an npz to PNG files and back: to-png, from-images."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .flags import Flags, parse
from .sections import FromImagesConfig, NpzToolConfig, ToPngConfig


def run(flags: Flags) -> None:
    """Run one of the tools, and print what it wrote."""
    from . import npz_files as files

    if flags.command.endswith("to-png"):
        print(files.to_png(flags.part(ToPngConfig)))
    else:
        print(*files.from_images(flags.part(FromImagesConfig)), sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool that the first word names with the words after it."""
    first, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    tool = parse("npz_tool", [first]).part(NpzToolConfig).tool
    flags = parse(f"npz_tool {tool}", rest, prog=f"npz_tool.py {tool}")
    from .. import dist_util

    dist_util.run(run, flags)
