"""Enlarge images with an upsampler and save them in an npz, in the order in which they came."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from guided_diffusion import cli
from guided_diffusion.commands._entry import entry
from guided_diffusion.config import SampleConfig, SuperResConfig, UpsampleConfig, parse_size

if TYPE_CHECKING:
    import numpy as np


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

    :raises ValueError: if there are fewer than asked for, or they do not fit the upsampler.
    """
    import blobfile as bf
    import numpy as np

    path, config = flags.part(UpsampleConfig).base_samples, flags.part(SuperResConfig)
    if not path or not bf.exists(path):
        raise ValueError(f"--base_samples {path!r} does not exist: give the npz of the images to enlarge")
    try:
        with bf.BlobFile(path, "rb") as file:
            base = dict(np.load(file))
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"--base_samples {path} is no npz: give one as the sampling scripts write") from error
    images = base.get("arr_0", np.empty(0))
    expected = (*parse_size(config.small_size), config.image_channels)
    if images.dtype != np.uint8 or images.shape[1:] != expected or len(images) == 0:
        raise ValueError(
            f"--base_samples {path} holds arr_0 {images.shape} of {images.dtype}, and small_size {config.small_size} "
            f"with {config.image_channels} channels needs uint8 images {expected}"
        )
    labels = base.get("arr_1", np.zeros(len(images), np.int64))
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"--base_samples {path} holds labels arr_1 {labels.shape} of {labels.dtype}: give one integer for each of "
            f"the {len(images)} images, or none"
        )
    count = min(len(images), flags.part(SampleConfig).num_samples)
    if flags.given.get("num_samples", 0) > len(images):
        raise ValueError(f"--num_samples {flags.given['num_samples']} is more than the {len(images)} images of {path}")
    return {name: base[name][:count] for name in ("arr_0", "arr_1") if name in base}


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
