"""Images to npz and back: to-png, from-images, info, merge, grid."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from .. import cli
from ..data_config import parse_range
from ..npz_tool_config import (
    FromImagesConfig,
    GridConfig,
    InfoConfig,
    MergeConfig,
    NpzToolConfig,
    ToPngConfig,
)


def to_png(flags: cli.Flags) -> None:
    """An npz as a folder."""
    from .. import npz_tools

    config = flags.part(ToPngConfig)
    print(npz_tools.to_png(config.file, config.out, config.classes))


def from_images(flags: cli.Flags) -> None:
    """A folder or zip as an npz."""
    from .. import npz_tools

    config = flags.part(FromImagesConfig)
    wanted = npz_tools.Wanted(
        config.image_size,
        config.image_channels,
        config.class_from,
        config.classes,
        config.label_column,
        parse_range(config.data_range),
    )
    print(*npz_tools.from_images(config.source, config.out, wanted), sep="\n")


def info(flags: cli.Flags) -> None:
    """What is in an npz."""
    from .. import npz_look

    print(*npz_look.describe(flags.part(InfoConfig).file), sep="\n")


def merge(flags: cli.Flags) -> None:
    """Several npz as one."""
    from .. import npz_tools

    config = flags.part(MergeConfig)
    print(*npz_tools.merge(config.files, config.out), sep="\n")


def grid(flags: cli.Flags) -> None:
    """The first images of an npz as a picture."""
    from .. import npz_look

    config = flags.part(GridConfig)
    print(npz_look.draw(config.file, config.out, config.rows, config.columns))


WORK: dict[str, Callable[[cli.Flags], None]] = {
    "to-png": to_png,
    "from-images": from_images,
    "info": info,
    "merge": merge,
    "grid": grid,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool that the first word names with the words after it."""
    first, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    tool = cli.parse("npz_tool", [first]).part(NpzToolConfig).tool
    flags = cli.parse(f"npz_tool {tool}", rest, prog=f"npz_tool.py {tool}")
    from .. import dist_util

    dist_util.run(WORK[tool], flags)
