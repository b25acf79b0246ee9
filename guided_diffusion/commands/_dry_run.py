"""What --dry_run says of a training: how large the network is, what a step costs, and what memory it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
import torch.nn.functional as F

from .. import dist_util, logger
from ..cli import Flags
from ..config import (
    ClassifierConfig,
    DiffusionConfig,
    RunConfig,
    SuperResConfig,
    TrainConfig,
    UNetConfig,
    parse_rates,
    parse_size,
)
from ..footprint import Footprint, Loss, measure
from ..gaussian_diffusion import GaussianDiffusion
from ..performance_config import TrainSpeedConfig
from ..script_util import build_classifier, build_diffusion, build_unet, build_upsampler
from . import (
    _conditioning as conditioning,
    _finetuning as finetuning,
    _performance as performance,
    _training as training,
)
from ._common import image_shape

SEEN = 2  # microbatches of a step that are looked at: the gradients of the first are there in the second
Keywords = Callable[[int], dict[str, th.Tensor]]


def rehearse(flags: Flags) -> None:
    """Say what the training of these flags would take; nothing is read but the config that it goes on from.

    :raises ValueError: as the training itself would, but for what only weights or data show.
    """
    flags = training.resolved(flags)
    dist_util.setup_dist(device=flags.part(RunConfig).device)
    with _on_screen_alone():
        flags, choices = performance.with_precision(flags)
        for line in choices:
            logger.log(line)
        network, loss = PLANS[flags.command](flags)
        finetuning.choose_trained(flags, network)
        performance.recompute(flags, network)
        name = "precision" if "precision" in flags.values else "classifier_precision"
        precision = performance.settled(name, flags.values)[0]
        network.convert_to(precision, dist_util.dev())
        averages = len(parse_rates(flags.part(TrainConfig).ema_rate))
        sizes = _microbatches(flags)
        found = measure(network, loss, sizes[:SEEN], dist_util.dev(), averages)
        for line in report(flags, found, precision, sizes[0]):
            logger.log(line)


@contextmanager
def _on_screen_alone() -> Iterator[None]:
    """What is logged inside makes no folder and no file; rank 0 shows it."""
    before = logger.Logger.CURRENT
    writers = [logger.HumanOutputFormat(sys.stdout)] if dist_util.rank() == 0 else []
    logger.Logger.CURRENT = logger.Logger(dir="", output_formats=writers)
    try:
        yield
    finally:
        logger.Logger.CURRENT = before


def _microbatches(flags: Flags) -> list[int]:
    """How many images go through the network at a time, in one step; with auto all of them."""
    config = flags.part(TrainConfig)
    size = config.microbatch if isinstance(config.microbatch, int) and config.microbatch > 0 else config.batch_size
    return [min(size, config.batch_size - start) for start in range(0, config.batch_size, size)]


# ---- what is trained, by command


def _images(flags: Flags) -> tuple[Any, Loss]:
    config, kind = flags.part(UNetConfig), conditioning.kind_of(flags)
    shape = image_shape(config.image_channels, config.image_size, config.dims)

    def beside(n: int) -> dict[str, th.Tensor]:
        return {"cond_image": th.randn(n, kind.channels, *shape[1:])} if kind else {}

    with th.device("meta"):
        network = build_unet(config, flags.part(DiffusionConfig).learn_sigma)
    return network, _denoising(build_diffusion(flags.part(DiffusionConfig)), shape, config.class_cond, beside)


def _upsampling(flags: Flags) -> tuple[Any, Loss]:
    config = flags.part(SuperResConfig)
    shape, small = ((config.image_channels, *parse_size(size)) for size in (config.large_size, config.small_size))

    def beside(n: int) -> dict[str, th.Tensor]:
        level = {"low_res_level": th.rand(n)} if config.cond_aug else {}
        return {"low_res": th.randn(n, *small), **level}

    with th.device("meta"):
        network = build_upsampler(config, flags.part(DiffusionConfig).learn_sigma)
    return network, _denoising(build_diffusion(flags.part(DiffusionConfig)), shape, config.class_cond, beside)


def _denoising(process: GaussianDiffusion, shape: tuple[int, ...], labelled: bool, beside: Keywords) -> Loss:
    """The loss of a network that removes noise from images of a shape.

    :param beside: how many images -> what it is given beside them and their labels.
    """

    def loss(network: Any, n: int) -> th.Tensor:
        device = next(network.parameters()).device
        x, t = th.randn(n, *shape, device=device), th.zeros(n, dtype=th.long, device=device)
        keywords = {name: value.to(device) for name, value in beside(n).items()} | ({"y": t} if labelled else {})
        return process.training_losses(network, x, t, model_kwargs=keywords, noise=th.randn_like(x))["loss"].mean()

    return loss


def _classes(flags: Flags) -> tuple[Any, Loss]:
    config = flags.part(ClassifierConfig)
    shape = image_shape(config.image_channels, config.image_size, config.dims)

    def loss(network: Any, n: int) -> th.Tensor:
        device = next(network.parameters()).device
        logits = network(th.randn(n, *shape, device=device), th.zeros(n, device=device))
        return F.cross_entropy(logits, th.zeros(n, dtype=th.long, device=device))

    with th.device("meta"):
        return build_classifier(config), loss


PLANS: dict[str, Callable[[Flags], tuple[Any, Loss]]] = {
    "image_train": _images,
    "super_res_train": _upsampling,
    "classifier_train": _classes,
}


# ---- what is said


def report(flags: Flags, found: Footprint, precision: str, microbatch: int) -> Iterator[str]:
    """The lines of a dry run."""
    total, batch, ranks = sum(found.parts.values()), flags.part(TrainConfig).batch_size, dist_util.world_size()
    some = "all" if found.trained == total else f"{found.trained:,}"
    yield f"dry run: nothing is trained and nothing is written\nparameters: {total:,}, {some} of them trained"
    yield from (f"  {name:<16} {count:>15,}" for name, count in found.parts.items())
    for name, each in (("a forward pass", found.forward), ("a training step", found.step)):
        yield f"arithmetic of {name}: {_flops(each)} an image, {_flops(each * batch)} a batch of {batch}"
    shared = f", on each of {ranks} ranks" if ranks > 1 else ""
    yield f"memory of a step in {precision} on {dist_util.dev().type}{shared}, in microbatches of {microbatch}:"
    copies = total * 4 + found.optimizer + found.averages  # which one rank gathers, even of what is split
    if flags.part(TrainSpeedConfig).fsdp:
        found = found.spread(ranks)
    rows = {
        "weights": found.weights,
        "fp32 masters of them": found.masters,
        "AdamW's state": found.optimizer,
        "averages": found.averages,
        "activations and gradients at their peak": max(found.activations, found.gradients),
        "together (1.15 to 1.3 times as much was measured)": found.peak,
    }
    yield from (f"  {name:<50} {_bytes(size):>10}" for name, size in rows.items() if size)
    if flags.part(TrainConfig).async_save:
        yield f"  {'while a checkpoint is written, on the CPU':<50} {_bytes(copies):>10}"


def _flops(count: float) -> str:
    return f"{count / 1e9:.4g} GFLOP" if count < 1e12 else f"{count / 1e12:.4g} TFLOP"


def _bytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
