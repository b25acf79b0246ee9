"""What the commands do about conditioning images: from flags to pairs of files, and to what samples are made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch as th

from ..config import CondDataConfig, CondTrainConfig, UNetConfig
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
    """What the conditioning images of the flags' network are."""
    config = flags.part(UNetConfig)
    span = parse_range(flags.values.get("data_range", ""))
    return cond_kind(config.cond_type, config.cond_channels, config.image_channels, span)


# ---- training and measuring


def pairing_of(flags: Flags) -> Pairing | None:
    """The pairs of a data set; None where the network sees no conditioning images.

    :raises ValueError: if their folder is missing.
    """
    kind, config = kind_of(flags), flags.part(CondDataConfig)
    if kind is None:
        return None
    if not config.cond_dir or (flags.values.get("val_data_dir") and not flags.values["val_cond_dir"]):
        raise UserError(
            f"--cond_type {kind.name} needs the conditioning images: give --cond_dir, and --val_cond_dir with "
            "--val_data_dir"
        )
    return Pairing(config.cond_dir, kind, config.skip_unpaired, flags.values.get("cond_dropout", 0.0))


def validation_pairing(flags: Flags) -> Pairing | None:
    """The pairs of the validation images."""
    pairing = pairing_of(flags)
    return pairing and replace(pairing, folder=flags.part(CondTrainConfig).val_cond_dir, dropout=0.0)


def drawn(kind: CondKind, cond_image: th.Tensor) -> Pixels | None:
    """Conditioning images [N, K, H, W] as pictures, None where these cannot show them."""
    if kind.name == "image":
        return to_uint8(cond_image) if kind.channels in DRAWN_CHANNELS else None
    shades = th.linspace(-1, 1, kind.channels + 1)[1:].to(cond_image)  # black is none of the classes
    return to_uint8((cond_image * (shades + 1).view(-1, 1, 1)).sum(dim=1, keepdim=True) - 1)


# ---- sampling


def extend(plan: Plan, model: Restored, names: list[str]) -> None:
    """Make a sample for each of --cond_images, where the network sees conditioning images.

    :param names: of the classes by id, [] where they are not known.
    :raises ValueError: if the images do not fit the network.
    """
    kind, config = kind_of(model.flags), model.flags.part(CondSampleConfig)
    if kind is None:
        return
    if not config.cond_images:
        raise UserError(f"{model.path} was trained with conditioning images ({kind.name}): give --cond_images")
    selection = Selection(
        model.flags.part(SampleConfig).num_samples,
        all="num_samples" in model.flags.changed,
        label=_by_files(model.flags, names) if config.cond_class_from else None,
    )
    images = open_cond_images(config.cond_images, kind, model.flags.part(UNetConfig).image_size, selection)
    labels: Any = images.labels if "labels" in plan.job and not model.flags.part(SampleConfig).classes else None
    if labels is not None:
        plan.job |= {"labels": labels, "num_classes": 0}
    plan.job |= {"num_samples": len(images.source), "names": images.names, "conditioning": images.conditioning}
    plan.request |= images.request()


def _by_files(flags: Flags, names: list[str]) -> Callable[[ImageSource], Sequence[int]]:
    config, count = flags.part(CondSampleConfig), len(names) or flags.part(UNetConfig).num_classes
    return lambda listing: (
        read_labels(listing, config.cond_class_from, names or None, count, label_column=config.label_column).ids
    )
