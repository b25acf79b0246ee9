"""What a network sees beside the noise: from flags to conditioning images, and to the small images of an upsampler."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch as th

from .. import logger
from ..config import RangeConfig, RunConfig, SuperResConfig, UNetConfig
from ..data.conditioning import CondKind, Pairing, cond_kind, open_cond_images
from ..data.labels import read_labels
from ..data.sources import ImageSource, Selection
from ..data.upsampling import BaseImages, read_base as read
from ..networks.tiling import MOST_OVERLAP, tiled
from ..runtime.errors import WHY, as_user_error, refuse
from ..runtime.options import parse_range, parse_size
from ..runtime.pictures import DRAWN_CHANNELS, Pixels, to_uint8
from .flags import Flags
from .sections import CondDataConfig, CondSampleConfig, GuidanceConfig, SampleConfig, UpsampleConfig

if TYPE_CHECKING:
    from .common import Plan, Restored


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
    lacking = not config.cond_dir or (flags.values.get("val_data_dir") and not flags.values["val_cond_dir"])
    folders = "--cond_dir, and --val_cond_dir with --val_data_dir"
    refuse((lacking, f"--cond_type {kind.name} needs the conditioning images: give {folders}"))
    return Pairing(config.cond_dir, kind, config.skip_unpaired, flags.values.get("cond_dropout", 0.0))


def drawn(kind: CondKind, cond_image: th.Tensor) -> Pixels | None:
    """Conditioning images [N, K, H, W] as pictures, None where these cannot show them."""
    if kind.name == "image":
        return to_uint8(cond_image) if kind.channels in DRAWN_CHANNELS else None
    shades = th.linspace(-1, 1, kind.channels + 1)[1:].to(cond_image)  # black is for places without a class
    return to_uint8((cond_image * (shades + 1).view(-1, 1, 1)).sum(dim=1, keepdim=True) - 1)


def extend(plan: Plan, model: Restored) -> None:
    """Make a sample for each of --cond_images, where the network sees conditioning images."""
    flags = model.flags
    kind, config, network = kind_of(flags), flags.part(CondSampleConfig), flags.part(UNetConfig)
    if kind is None:
        return
    trained = f"{model.path} was trained with conditioning images ({kind.name})"
    refuse((not config.cond_images, f"{trained}: give --cond_images"))
    sampling = flags.part(SampleConfig)
    selection = Selection(sampling.num_samples, all="num_samples" in flags.changed)
    images = open_cond_images(config.cond_images, kind, network.image_size, selection)
    if images.labels is not None and "labels" in plan.job and not (sampling.classes or sampling.class_sampling):
        plan.job |= {"labels": images.labels, "num_classes": 0}
    plan.job |= {"num_samples": len(images.source), "names": images.names, "conditioning": images.conditioning}
    plan.request |= images.request()


def level_of(flags: Flags) -> float:
    """The noise to put on the small images, at most that of the training."""
    level, trained = flags.part(UpsampleConfig).cond_aug_level, flags.part(SuperResConfig).cond_aug
    refuse((level > trained, f"--cond_aug_level {level} is above {trained}, the greatest level of the training"))
    return level


def check_labels(flags: Flags, labelled: bool) -> None:
    """Refuse labels that are missing or given twice.

    :param labelled: the images have labels of their own.
    """
    options = flags.part(SampleConfig)
    text = f"classes {options.classes}" if options.classes else f"class_sampling {options.class_sampling}"
    given = bool(options.classes or options.class_sampling)
    other = ", or --randomize_class True" * flags.part(SuperResConfig).class_cond
    kind = "is class-conditional" if flags.part(SuperResConfig).class_cond else "is guided by a classifier"
    lacking = _wants_labels(flags) and not (labelled or options.chooses_labels)
    refuse(
        (given and labelled, f"--{text} has no effect, as the images have labels of their own: leave it out"),
        (lacking, f"the upsampler {kind} and the images have no labels (arr_1): give --classes{other}"),
    )


def _wants_labels(flags: Flags) -> bool:
    guided = flags.part(GuidanceConfig)
    return flags.part(SuperResConfig).class_cond or bool(guided.classifier_path and guided.classifier_scale)


def read_base(flags: Flags, names: Sequence[str] = ()) -> BaseImages:
    """The images of --base_samples, as many as are wanted, and their labels if any.

    Files of a folder or zip tell their classes where the network wants labels and --classes gives none.

    :param names: of the classes by id, [] where they are not known.
    """
    config, options, source = flags.part(SuperResConfig), flags.part(SampleConfig), flags.part(UpsampleConfig)

    def label(listing: ImageSource) -> list[int]:
        with as_user_error(f"the images have no labels that fit ({WHY}); or give --classes", ValueError):
            count, column = len(names) or config.num_classes, source.label_column
            return read_labels(listing, source.class_from, names or None, count, label_column=column).ids

    by_files = (_wants_labels(flags) and not options.chooses_labels) or source.class_from != "auto"
    selection = Selection(options.num_samples, all="num_samples" in flags.changed, label=label if by_files else None)
    shape = (*((0, 0) if source.tile_overlap else parse_size(config.small_size)), config.image_channels)
    base = read(source.base_samples, shape, selection, parse_range(flags.part(RangeConfig).data_range))
    if "num_samples" in flags.given and len(base) < options.num_samples:
        logger.warn(f"{len(base)} images are there, not {options.num_samples}: each is enlarged once")
    if base.left_out and not selection.all:
        logger.warn(f"the first {len(base)} images are enlarged and {base.left_out} more are not: give --num_samples")
    return base


def _enlarged(plan: Plan, flags: Flags, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the large images; where there are tiles, the network of the plan takes them."""
    config, overlap = flags.part(SuperResConfig), flags.part(UpsampleConfig).tile_overlap
    small, large = parse_size(config.small_size), parse_size(config.large_size)
    if not overlap:
        return (config.image_channels, *large)
    scale, shown = large[0] // small[0], f"{size[0]}x{size[1]}"
    uneven = large != (scale * small[0], scale * small[1])
    less = size[0] < small[0] or size[1] < small[1]
    refuse(
        (uneven, f"--tile_overlap needs a large_size that is a multiple of {small}"),
        (less, f"images of {shown} are smaller than a tile of {small}: enlarge them"),
        (overlap > MOST_OVERLAP, f"--tile_overlap {overlap} is above {MOST_OVERLAP}: usual is 0.25"),
    )
    plan.network = tiled(plan.network, small, scale, overlap)
    plan.request["tile_overlap"] = overlap
    return config.image_channels, scale * size[0], scale * size[1]


def enlarge(plan: Plan, flags: Flags, names: Sequence[str]) -> list[str]:
    """Make a sample for each of --base_samples, with its label if it has one; returns their prompts, [] without.

    :param names: of the classes by id, [] where they are not known.
    """
    level, base = level_of(flags), read_base(flags, names)
    check_labels(flags, base.labels is not None)
    plan.request |= {**base.request(), **({"cond_aug_level": level} if level else {})}
    plan.job |= {"num_samples": len(base), "names": base.names}
    plan.job["shape"] = _enlarged(plan, flags, base.pixels.shape[1:3])
    plan.job["conditioning"] = partial(base.conditioning, level=level, seed=flags.part(RunConfig).seed)
    if base.labels is not None and not flags.part(SampleConfig).randomize_class:
        plan.job |= {"labels": base.labels, "class_names": names}
    return base.prompts
