"""What the commands do about conditioning images: from flags to pairs of files, and to what samples are made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch as th

from ..config import CondDataConfig, CondTrainConfig, TrainConfig, UNetConfig
from ..data.conditioning import CondImages, CondKind, CondSource, Pairing, cond_kind
from ..data.labels import read_labels
from ..data.sources import ImageSource
from ..runtime.options import defaults, parse_range
from ..runtime.pictures import DRAWN_CHANNELS, Pixels, to_uint8
from .common import Restored
from .flags import Flags
from .sections import CondSampleConfig, EditConfig, SampleConfig


def kind_of(flags: Flags) -> CondKind | None:
    """What the conditioning images of the flags' network are."""
    config = flags.part(UNetConfig)
    span = parse_range(flags.values.get("data_range", ""))
    return cond_kind(config.cond_type, config.cond_channels, config.image_channels, span)


# ---- training and measuring


def with_null_cond(flags: Flags) -> Flags:
    """The flags with the null conditioning image that --cond_dropout makes."""
    if not flags.values.get("cond_dropout"):
        return flags
    return Flags(flags.command, {**flags.given, "null_cond": True}, flags.saved)


def check(flags: Flags) -> None:
    """:raises ValueError: for flags without effect, or with too little to have one."""
    if "cond_dir" not in flags.values:
        return
    kind, values = kind_of(flags), flags.values
    names = [name for name in (*defaults(CondTrainConfig), "null_cond") if name in values]
    useless = [name for name in names if name in flags.changed]
    if kind is None and useless:
        raise ValueError(f"--{useless[0]} has no effect without --cond_type: give both or none")
    if kind is not None and not values["cond_dir"]:
        raise ValueError(f"--cond_type {kind.name} needs the conditioning images: give --cond_dir")
    validation = values.get("val_data_dir", ""), values.get("val_cond_dir", "")
    if kind is not None and any(validation) and not all(validation):
        raise ValueError("--val_data_dir and --val_cond_dir go together with --cond_type: give both or none")


def stream_options(flags: Flags) -> dict[str, Any]:
    """Options of `training.open_streams` for the conditioning images."""
    kind, config = kind_of(flags), flags.part(CondTrainConfig)
    if kind is None:
        return {}
    own = Pairing(config.cond_dir, kind, config.skip_unpaired, config.cond_dropout)
    other = replace(own, folder=config.val_cond_dir, dropout=0.0) if flags.part(TrainConfig).val_data_dir else None
    return {"pairing": own, "validation": {"pairing": other}}


def pairing_of(flags: Flags) -> Pairing | None:
    """The pairs of a data set that is measured."""
    kind, config = kind_of(flags), flags.part(CondDataConfig)
    return None if kind is None else Pairing(config.cond_dir, kind, config.skip_unpaired)


def drawn(kind: CondKind, cond_image: th.Tensor) -> Pixels | None:
    """Conditioning images [N, K, H, W] as pictures, None where these cannot show them."""
    if kind.name == "image":
        return to_uint8(cond_image) if kind.channels in DRAWN_CHANNELS else None
    shades = th.linspace(-1, 1, kind.channels + 1)[1:].to(cond_image)  # black is none of the classes
    return to_uint8((cond_image * (shades + 1).view(-1, 1, 1)).sum(dim=1, keepdim=True) - 1)


# ---- sampling


@dataclass(frozen=True)
class Condition:
    """What the conditioning images add to a job.

    :param job: options of it; its labels among them.
    :param request: what the result depends on, for `Job.request`.
    """

    job: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


def check_sampling(flags: Flags) -> None:
    """:raises ValueError: for flags without effect."""
    for name, needed in (("cond_class_from", "cond_images"), ("label_column", "cond_class_from")):
        if name in flags.changed and not flags.values[needed]:
            raise ValueError(f"--{name} has no effect without --{needed}: give both or none")
    if flags.values["cond_class_from"] and flags.part(SampleConfig).classes:
        raise ValueError("--cond_class_from and --classes both say the classes: give one of the two")


def condition(model: Restored, labels: dict[str, Any], names: list[str]) -> Condition:
    """What --cond_images asks for.

    :param labels: of the job, as `common.labels_of` gives them; the images' own take their place.
    :param names: of the classes by id, [] where they are not known.
    :raises ValueError: if the images do not fit the network.
    """
    kind, path = kind_of(model.flags), model.flags.part(CondSampleConfig).cond_images
    if kind is None:
        if path:
            raise ValueError(f"--cond_images {path} has no effect: {model.path} was trained without --cond_type")
        return Condition(labels)
    if not path:
        raise ValueError(f"{model.path} was trained with conditioning images ({kind.name}): give --cond_images")
    _check_editing(model.flags)
    options, rule = model.flags.part(SampleConfig), model.flags.part(CondSampleConfig).cond_class_from
    if rule and not labels:
        raise ValueError(f"--cond_class_from {rule} has no effect on an unconditional model: leave it out")
    source = CondSource(
        kind,
        model.flags.part(UNetConfig).image_size,
        options.num_samples,
        all="num_samples" in model.flags.changed,
        label=_by_files(model.flags, names) if rule else None,
    )
    images = source.open(path)
    return Condition({**_labels(images, labels, options), **_job(images)}, images.request())


def _job(images: CondImages) -> dict[str, Any]:
    return {"num_samples": images.count, "names": images.names, "conditioning": images.conditioning}


def _labels(images: CondImages, labels: dict[str, Any], options: SampleConfig) -> dict[str, Any]:
    """The images' own labels, unless the model wants none or --classes says others."""
    own = images.labels if labels and not options.classes else None
    return labels if own is None else {"labels": own, "class_names": labels["class_names"]}


def _by_files(flags: Flags, names: list[str]) -> Callable[[ImageSource], Sequence[int]]:
    config, count = flags.part(CondSampleConfig), len(names) or flags.part(UNetConfig).num_classes
    return lambda listing: (
        read_labels(listing, config.cond_class_from, names or None, count, label_column=config.label_column).ids
    )


def _check_editing(flags: Flags) -> None:
    config = flags.part(EditConfig)
    for name, given in (("invert", config.invert), ("interpolate", config.interpolate)):
        if given:
            raise ValueError(f"--{name} knows no conditioning images, which this model needs: leave it out")
