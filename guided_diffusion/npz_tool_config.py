"""The flags of the tools for npz files. As in config.py, a field is a flag, and nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from . import paths
from .config import CLASS_RULES, LABEL_COLUMN, flag, local_flag, path_flag, size_flag
from .data_config import RangeConfig

TOOLS = ("to-png", "from-images", "info", "merge", "grid")


def size_or_none(text: str) -> int | str:
    """A size, or 0."""
    return 0 if text == "0" else size_flag(text)


@dataclass(frozen=True, kw_only=True)
class NpzToolConfig:
    """What to do."""

    tool: str = flag("", "one of " + ", ".join(TOOLS) + "; TOOL --help lists its flags", choices=TOOLS, positional=True)


@dataclass(frozen=True, kw_only=True)
class ToPngConfig:
    """From an npz to a folder."""

    file: str = path_flag("npz of images (arr_0) and, if any, labels (arr_1)", positional=True)
    out: str = local_flag("folder of PNG files that is made", positional=True)
    classes: str = path_flag("classes.json with the names of the classes; '' calls them by their numbers")


@dataclass(frozen=True, kw_only=True)
class FromImagesConfig(RangeConfig):
    """From images to an npz."""

    source: str = path_flag("folder or zip of images", positional=True)
    out: str = local_flag("npz that is made", positional=True)
    image_size: int | str = flag(
        0, "scale and crop to this as in training: 64, or HEIGHTxWIDTH; 0: as they are", convert=size_or_none
    )
    image_channels: int = flag(0, "channels: 1, 3 or 4; 0: what to-png wrote down, else 3", at_least=0, at_most=4)
    class_from: str = flag("", "where labels come from; '' is auto where that finds any", choices=("", *CLASS_RULES))
    label_column: str = flag("", LABEL_COLUMN)
    classes: str = path_flag(
        "classes.json with the ids of the classes; '': that in SOURCE, else in order of their names"
    )


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """What is in an npz."""

    file: str = path_flag("npz", positional=True)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Several npz files to one."""

    files: tuple[str, ...] = flag(
        (), "npz files of images of one shape, with labels or without", positional=True, convert=paths.resolve
    )
    out: str = local_flag("npz that is made", positional=True)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The first images as one picture."""

    file: str = path_flag("npz of images", positional=True)
    out: str = local_flag("PNG that is made", positional=True)
    rows: int = flag(0, "0: as many as there are images for, in a square at most 10", at_least=1, at_most=1000)
    columns: int = flag(0, "0: as many as make a square, at most 10", at_least=1, at_most=1000)
