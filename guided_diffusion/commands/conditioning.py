"""What the commands do about conditioning images: from flags to pairs of files, and to what samples are made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch as th

from ..config import CondDataConfig, UNetConfig
from ..data.conditioning import CondKind, Pairing, cond_kind, open_cond_images
from ..data.labels import read_labels
from ..data.sources import ImageSource, Selection
from ..runtime.errors import UserError
from ..runtime.options import parse_range
from ..runtime.pictures import DRAWN_CHANNELS, Pixels, to_uint8
from .common import Plan, Restored
from .flags import Flags
from .sections import CondSampleConfig, SampleConfig


def kind_of(flags: Flags) -> CondKind | None:
    """The kind of conditioning images of the flags' network."""
    config = flags.part(UNetConfig)
    span = parse_range(flags.values.get("data_range", ""))
    return cond_kind(config.cond_type, config.cond_channels, config.image_channels, span)


def pairing_of(flags: Flags) -> Pairing | None:
    """The pairs of a data set; None where the network sees no conditioning images."""
    kind, config = kind_of(flags), flags.part(CondDataConfig)
    if kind is None:
        return None
    if not config.cond_dir or (flags.values.get("val_data_dir") and not flags.values["val_cond_dir"]):
        folders = "--cond_dir, and --val_cond_dir with --val_data_dir"
        raise UserError(f"--cond_type {kind.name} needs the conditioning images: give {folders}")
    return Pairing(config.cond_dir, kind, config.skip_unpaired, flags.values.get("cond_dropout", 0.0))


def validation_pairing(flags: Flags) -> Pairing | None:
    """The pairs of the validation images."""
    pairing = pairing_of(flags)
    return pairing and replace(pairing, folder=flags.values["val_cond_dir"], dropout=0.0)


def drawn(kind: CondKind, cond_image: th.Tensor) -> Pixels | None:
    """Conditioning images [N, K, H, W] as pictures, None where these cannot show them."""
    if kind.name == "image":
        return to_uint8(cond_image) if kind.channels in DRAWN_CHANNELS else None
    shades = th.linspace(-1, 1, kind.channels + 1)[1:].to(cond_image)  # black is for places without a class
    return to_uint8((cond_image * (shades + 1).view(-1, 1, 1)).sum(dim=1, keepdim=True) - 1)


def extend(plan: Plan, model: Restored, names: list[str]) -> None:
    """Make a sample for each of --cond_images, where the network sees conditioning images.

    :param names: of the classes by id, [] where they are not known.
    """
    kind, config, network = kind_of(model.flags), model.flags.part(CondSampleConfig), model.flags.part(UNetConfig)
    if kind is None:
        return
    if not config.cond_images:
        raise UserError(f"{model.path} was trained with conditioning images ({kind.name}): give --cond_images")

    def label(source: ImageSource) -> Sequence[int]:
        count, column = len(names) or network.num_classes, config.label_column
        return read_labels(source, config.cond_class_from, names or None, count, label_column=column).ids

    sampling, all_of_them = model.flags.part(SampleConfig), "num_samples" in model.flags.changed
    selection = Selection(sampling.num_samples, all=all_of_them, label=label if config.cond_class_from else None)
    images = open_cond_images(config.cond_images, kind, network.image_size, selection)
    if images.source.array and config.cond_class_from not in ("", "auto"):
        raise UserError(f"--cond_class_from {config.cond_class_from} has no effect on an array of images: leave it out")
    labels: Any = images.labels if "labels" in plan.job and not sampling.classes else None
    if labels is not None:
        plan.job |= {"labels": labels, "num_classes": 0}
    plan.job |= {"num_samples": len(images.source), "names": images.names, "conditioning": images.conditioning}
    plan.request |= images.request()
