"""The flags of images and of their labels. As in config.py, a field is a flag, and nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import BAD_IMAGE_RULES, CLASS_RULES, LABEL_COLUMN, flag, path_flag


def parse_range(text: str) -> tuple[float, float] | None:
    """(LOW, HIGH) of "LOW,HIGH"; None of ''.

    :raises ValueError: if it is no range.
    """
    try:
        numbers = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        numbers = [math.nan]
    if text and not (len(numbers) == 2 and -math.inf < numbers[0] < numbers[1] < math.inf):
        raise ValueError(f"data_range {text!r} is no range: write LOW,HIGH, such as 0,4095 or 0,1")
    return (numbers[0], numbers[1]) if text else None


def range_flag(text: str) -> str:
    """The same text, if it is a range or ''."""
    parse_range(text)
    return text


@dataclass(frozen=True, kw_only=True)
class RangeConfig:
    """What the numbers in images mean."""

    data_range: str = flag(
        "",
        "LOW,HIGH: the numbers that are black and white in images, conditioning images too, but not in masks, such as "
        "0,4095 for 12 bits in 16 or 0,1 for floats; '' the whole range of integers, and -1,1 of floats; 8-bit images "
        "keep 0,255 unless it lies within that",
        convert=range_flag,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(RangeConfig):
    """The images to train on."""

    data_dir: str = path_flag("folder or zip of images, searched in depth, or an array of them")
    class_from: str = flag("auto", "where labels come from", choices=CLASS_RULES)
    label_column: str = flag("", LABEL_COLUMN)
    random_crop: bool = flag(False, "crop at random instead of the centre")
    random_flip: bool = flag(True, "mirror half of the images")
    num_workers: int = flag(2, "processes that decode images; 0: the main process does", at_least=0)
    on_bad_image: str = flag(
        "error", "error: an unreadable image ends the run; skip: another one takes its place", choices=BAD_IMAGE_RULES
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierDataConfig(DataConfig):
    """The labelled images to train on."""

    random_crop: bool = flag(True, "crop at random instead of the centre")


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(RangeConfig):
    """The images to measure."""

    data_dir: str = path_flag("folder or zip of images, or an array of them")
    class_from: str = flag("auto", "where labels come from", choices=CLASS_RULES)
    label_column: str = flag("", LABEL_COLUMN)
    model_path: str = path_flag("a checkpoint, or the folder of a run (its newest EMA)")
    num_samples: int = flag(1000, "images to measure", at_least=1)
    batch_size: int = flag(1, "images per pass of the network", at_least=1)
    clip_denoised: bool = flag(True, "clip predictions of x_0 to [-1, 1]")
