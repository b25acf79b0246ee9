"""Enlarge images with an upsampler and save them in an npz, in the order in which they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from guided_diffusion import cli
from guided_diffusion.commands._entry import entry
from guided_diffusion.config import SampleConfig, SuperResConfig, UpsampleConfig, parse_size

if TYPE_CHECKING:
    import numpy as np

    from guided_diffusion.npz import Npz


def sample(flags: cli.Flags) -> None:
    """Enlarge as the flags say.

    :raises ValueError: naming the flag that is wrong.
    """
    import torch as th

    from guided_diffusion.commands import _common as common, _guidance as guidance
    from guided_diffusion.guidance import without_labels
    from guided_diffusion.npz import fingerprint

    sampler = common.sampler_of(flags)
    flags = common.on_its_grid(flags, sampler)
    guidance.check(flags)
    common.start(flags)
    model = common.restore_upsampler(flags)
    flags = model.flags
    config = flags.part(SuperResConfig)
    base = read_base(flags)
    labels = labels_of(flags, base, model.classes)

    def low_res(indices: Sequence[int]) -> dict[str, th.Tensor]:
        return {"low_res": th.from_numpy(base["arr_0"][list(indices)]).movedim(-1, 1) / 127.5 - 1}

    shape, guided = (config.image_channels, *parse_size(config.large_size)), guidance.guided(model)
    request = {**model.identity, **guided.request, "base_samples": fingerprint(base)}
    size = {"num_samples": len(base["arr_0"]), "conditioning": low_res}
    job = common.job_of(flags, sampler, shape, request, **size, **labels)
    network = guided.network if config.class_cond else without_labels(guided.network)
    common.sample_and_say(flags, model.process, network, job, **guided.options)


def read_base(flags: cli.Flags) -> dict[str, np.ndarray]:
    """The small images arr_0 [N, h, w, C] of --base_samples, as many as are wanted, and their labels arr_1 if any.

    Nothing else of the file is read, and nothing before its header fits.

    :raises ValueError: if there are fewer than asked for, or they do not fit the upsampler.
    """
    import blobfile as bf

    from guided_diffusion.npz import Npz

    path = flags.part(UpsampleConfig).base_samples
    if not path or not bf.exists(path):
        raise ValueError(f"--base_samples {path!r} does not exist: give the npz of the images to enlarge")
    try:
        with Npz(path) as base:
            count = _count(flags, path, base)
            names = [name for name in ("arr_0", "arr_1") if name in base]
            return {name: next(base.chunks(name, count)) for name in names}
    except ValueError as error:
        told = str(error)
        raise error if told.startswith("--") else ValueError(f"--base_samples: {told}") from error


def _count(flags: cli.Flags, path: str, base: Npz) -> int:
    """How many images to read, once the headers fit."""
    config = flags.part(SuperResConfig)
    images = base.header("arr_0")
    expected = (*parse_size(config.small_size), config.image_channels)
    if images.dtype != "uint8" or images.shape[1:] != expected or images.shape[0] == 0:
        raise ValueError(
            f"--base_samples {path} holds arr_0 {images.shape} of {images.dtype}, and small_size {config.small_size} "
            f"with {config.image_channels} channels needs uint8 images {expected}"
        )
    labels = base.header("arr_1") if "arr_1" in base else None
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"--base_samples {path} holds labels arr_1 {labels.shape} of {labels.dtype}: give one integer for each of "
            f"the {images.shape[0]} images, or none"
        )
    if flags.given.get("num_samples", 0) > images.shape[0]:
        given = flags.given["num_samples"]
        raise ValueError(f"--num_samples {given} is more than the {images.shape[0]} images of {path}")
    return min(images.shape[0], flags.part(SampleConfig).num_samples)


def labels_of(flags: cli.Flags, base: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    """The labels of the job: the images' own, else those of --classes.

    :raises ValueError: if the upsampler needs labels and there are none, or they are given twice.
    """
    from guided_diffusion.commands import _common as common

    config, text = flags.part(SuperResConfig), flags.part(SampleConfig).classes
    if text and ("arr_1" in base or not config.class_cond):
        why = "the images have labels of their own" if config.class_cond else "the upsampler is unconditional"
        raise ValueError(f"--classes {text} has no effect, as {why}: leave it out")
    if "arr_1" in base:
        return {"labels": base["arr_1"].tolist(), "class_names": names}
    if config.class_cond and not text:
        raise ValueError("the upsampler is class-conditional and the images have no labels (arr_1): give --classes")
    return common.labels_of(flags, names, config.num_classes) if text else {}


main = entry("super_res_sample", sample)
