"""Diffusion in the space of an autoencoder: from flags to it, and to jobs that decode."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch as th

from .. import dist_util, logger
from ..networks.first_stage import FirstStage
from ..runtime import files
from ..runtime.errors import refuse
from ..runtime.npz import fingerprint
from ..runtime.options import defaults
from ..runtime.seeds import to_device
from ..training import checkpoints
from ..training.checkpoints import Checkpoint
from ..training.first_stage import load_autoencoder
from .flags import COMMANDS, Flags
from .sections import LatentConfig, LatentTrainConfig

if TYPE_CHECKING:
    from ..data.init_images import InitImages

ON_PIXELS = {**defaults(LatentConfig), "latent_factor": 1, "latent_channels": 0}  # what older configs do not say
COPY = "autoencoder.pt"  # in a run's folder


def opened(flags: Flags, beside: str = "") -> tuple[Flags, FirstStage | None]:
    """The flags with what the autoencoder that they name says of latents, and the autoencoder.

    :param beside: the checkpoint, or the folder, that the flags were saved with, for messages.
    """
    values = flags.values
    path = values.get("autoencoder_path", "")
    unnamed, lost = not path and values.get("latent_channels"), path and "autoencoder_path" not in flags.given
    gone = f"the autoencoder of {beside} is not at {path}, where it was in training"
    refuse(
        (unnamed, "the network works on latents, and no autoencoder is named: give --autoencoder_path"),
        (lost and not files.exists(path), f"{gone}: give its place by --autoencoder_path"),
    )
    if not path:
        return flags, None
    stage = _open(path, flags)
    known = values["autoencoder_id"]
    given = f"--image_channels {values['image_channels']}"
    unlike = f"{path} is of images with {stage.image_channels} channels, and {given}"
    other = f"{path} is another autoencoder (fingerprint {stage.fingerprint}) than that of the training ({known})"
    refuse(
        (known and known != stage.fingerprint, f"{other}: give its place by --autoencoder_path"),
        (stage.image_channels != values["image_channels"], f"{unlike}: give another, or the channels"),
    )
    logger.log(
        f"autoencoder: {path}, {stage.channels} channels, {stage.factor} pixels along the side of a number, latents "
        f"times {stage.scale_factor:.6g}"
    )
    facts = {
        "autoencoder_id": stage.fingerprint,
        "scale_factor": stage.scale_factor,
        "latent_factor": stage.factor,
        "latent_channels": stage.channels,
    }
    for name, value in facts.items():
        said = flags.given.get(name, value)
        refuse((said != value, f"--{name} {said} is not the autoencoder's, {value}: leave it out"))
    return Flags(flags.command, flags.given, {**flags.saved, **facts}), stage


def _open(path: str, flags: Flags) -> FirstStage:
    path = checkpoints.open_checkpoint(path, "--autoencoder_path").path  # of a run that may go on: this very file
    network, scale = load_autoencoder(path)
    mark = fingerprint(network.state_dict())
    scale, tile = flags.values["scale_factor"] or scale, flags.values.get("decode_tile", 0)
    return FirstStage(network.to(dist_util.dev()), scale, mark, path, tile)


def of_sampling(flags: Flags, checkpoint: Checkpoint) -> tuple[Flags, FirstStage | None]:
    """`opened` for a network that is sampled from."""
    config, given = checkpoint.flags, "autoencoder_path" in flags.given
    if "autoencoder_path" not in COMMANDS[flags.command].flags():
        on_pixels = f"and {flags.command} measures and makes pixels alone: give another model"
        latents = flags.values.get("latent_channels")
        refuse((latents, f"{checkpoint.path} works on the latents of an autoencoder, {on_pixels}"))
        return flags, None
    idle = given and config and not config.get("latent_channels")
    refuse((idle, f"{checkpoint.path} works on pixels, and --autoencoder_path has no effect: leave it out"))
    if given and not config:  # the weights show the channels of the latents as those of images
        saved = {name: value for name, value in flags.saved.items() if name != "image_channels"}
        flags = Flags(flags.command, flags.given, saved)
    paints = f"{checkpoint.path} sees images beside its latents, as for inpainting, which no command gives it"
    remedy = "build it in Python, and give them as cond_image"
    refuse((flags.values.get("cond_type") and flags.values.get("latent_channels"), f"{paints}: {remedy}"))
    flags, stage = opened(flags, checkpoint.path)
    for name in ("clip_denoised", "dynamic_threshold", "clip_guided") if stage else ():
        clips = flags.given.get(name) not in (None, False, 0.0, "False")
        refuse((clips, f"--{name} has no effect on latents, which do not end at -1 and 1: leave it out"))
    return flags, stage


def of_training(flags: Flags) -> tuple[Flags, FirstStage | None]:
    """`opened` for a run that begins, goes on, or starts from another network; its path is that from the run's folder.

    Where --copy_autoencoder asks for it, that is where a copy of it is written.
    """
    source = flags.values["resume_checkpoint"] or flags.values["init_from"]
    flags, stage = opened(flags, source)
    if stage is None:
        return flags, None
    folder, path = logger.get_dir(), stage.path
    if flags.part(LatentTrainConfig).copy_autoencoder:
        path = files.join(folder, COPY)
        if dist_util.rank() == 0 and os.path.realpath(path) != os.path.realpath(stage.path):
            checkpoints.save(path, stage.network.state_dict())
    path = path if files.is_remote(path) else os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return flags.with_values(autoencoder_path=path), stage


def decoded(stage: FirstStage | None, shape: Sequence[int]) -> dict[str, Any]:
    """Fields of a `Job` whose loop makes latents of images of a shape (C, H, W)."""
    if stage is None:
        return {}
    return {"latent_shape": stage.latent_shape(shape), "decode": lambda latents, _: stage.decode(latents)}


def starts(stage: FirstStage | None, images: InitImages) -> Callable[[Sequence[int]], dict[str, th.Tensor]]:
    """`InitImages.rows`, with an autoencoder as latents, whose numbers are kept as far as all of their pixels are."""

    def rows(indices: Sequence[int]) -> dict[str, th.Tensor]:
        assert stage is not None
        rows = images.rows(indices)
        latents = {"init_image": stage.encode(to_device(rows["init_image"], dist_util.dev()))}
        return latents | {"mask": stage.kept(rows["mask"])} if "mask" in rows else latents

    return rows if stage else images.rows


def pasted(stage: FirstStage, images: InitImages) -> Callable[[th.Tensor, Sequence[int]], th.Tensor]:
    """Makes images of latents, in which the pixels that a mask keeps are exactly those of the images."""

    def decode(latents: th.Tensor, indices: Sequence[int]) -> th.Tensor:
        made = stage.decode(latents)
        rows = {name: to_device(x, made.device) for name, x in images.rows(indices[: len(made)]).items()}
        return th.lerp(made, rows["init_image"], rows["mask"].to(made)) if images.masks else made

    return decode
