"""The flags of the tools for npz files. As in config.py, a field is a flag, and nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import CLASS_RULES, LABEL_COLUMN, flag, local_flag, path_flag, size_flag
from .data_config import RangeConfig

TOOLS = ("to-png", "from-images")


@dataclass(frozen=True, kw_only=True)
class NpzToolConfig:
    """What to do."""

    tool: str = flag("", f"one of {', '.join(TOOLS)}; TOOL --help lists its flags", choices=TOOLS, positional=True)


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
    image_size: int | str = flag("", "scale and crop to 64, or HEIGHTxWIDTH; '': as they are", convert=size_flag)
    image_channels: int = flag(0, "channels: 1, 3 or 4; 0: what to-png wrote down, else 3", at_least=0, at_most=4)
    class_from: str = flag("", "where labels come from; '' is auto where that finds any", choices=("", *CLASS_RULES))
    label_column: str = flag("", LABEL_COLUMN)
    classes: str = path_flag("classes.json with the ids of the classes; '': that in SOURCE, else by their names")
