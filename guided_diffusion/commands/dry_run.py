"""--dry_run: how large the network of a training is, and what a step costs, counted without values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import dist_util, logger
from ..config import ClassifierConfig, DiffusionConfig, RunConfig, SuperResConfig, TrainConfig
from ..runtime.options import parse_rates, parse_size
from ..script_util import build_diffusion, build_network
from . import conditioning, finetuning, performance, training
from .common import image_shape
from .flags import Flags

ADAM_MOMENTS = 2
META = th.device("meta")
Loss = Callable[[Any, int], th.Tensor]  # (network, n) -> the mean loss of n images


@dataclass(frozen=True)
class Cost:
    """Parameters of each part of a network, how many are trained, and floating-point operations per image.

    :param forward: of a forward pass; `step` those of forward and backward pass.
    """

    parts: dict[str, int]
    trained: int
    forward: float
    step: float


def count(network: nn.Module, loss: Loss, n: int) -> Cost:
    """What a step of n images costs, on a network on the meta device."""
    with FlopCounterMode(display=False) as counter:
        mean = loss(network, n)
        forward = counter.get_total_flops()
        mean.backward()
    return Cost(
        parts={name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()},
        trained=sum(p.numel() for p in network.parameters() if p.requires_grad),
        forward=forward / n,
        step=counter.get_total_flops() / n,
    )


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
        config = flags.part(finetuning.KINDS[flags.command][1])
        with META:
            network = build_network(config, flags.part(DiffusionConfig).learn_sigma)
        finetuning.choose_trained(flags, network)
        performance.recompute(flags, network)
        network.convert_to(performance.precision_of(flags), META)
        with META:
            cost = count(network, loss_of(flags, config), flags.part(TrainConfig).batch_size)
        for line in report(flags, cost):
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


def loss_of(flags: Flags, config: Any) -> Loss:
    """The loss of a network on images of its size."""
    upsampler = isinstance(config, SuperResConfig)
    shape = image_shape(config.image_channels, config.large_size if upsampler else config.image_size, config.dims)
    process = build_diffusion(flags.part(DiffusionConfig))
    kind = conditioning.kind_of(flags) if flags.values.get("cond_type") else None

    def beside(n: int) -> dict[str, th.Tensor]:
        keywords = {"cond_image": th.randn(n, kind.channels, *shape[1:])} if kind else {}
        if upsampler:
            keywords["low_res"] = th.randn(n, config.image_channels, *parse_size(config.small_size))
            keywords |= {"low_res_level": th.rand(n)} if config.cond_aug else {}
        return keywords | ({"y": th.zeros(n, dtype=th.long)} if config.class_cond else {})

    def loss(network: Any, n: int) -> th.Tensor:
        x, t = th.randn(n, *shape), th.zeros(n, dtype=th.long)
        if isinstance(config, ClassifierConfig):
            return F.cross_entropy(network(x, t.float()), t)
        return process.training_losses(network, x, t, model_kwargs=beside(n), noise=th.randn_like(x))["loss"].mean()

    return loss


def report(flags: Flags, cost: Cost) -> Iterator[str]:
    """The lines of a dry run."""
    config, total = flags.part(TrainConfig), sum(cost.parts.values())
    batch = config.batch_size
    some = "all" if cost.trained == total else f"{cost.trained:,}"
    yield f"dry run: nothing is trained and nothing is written\nparameters: {total:,}, {some} of them trained"
    yield from (f"  {name:<16} {number:>15,}" for name, number in cost.parts.items())
    for name, each in (("a forward pass", cost.forward), ("a training step", cost.step)):
        yield f"arithmetic of {name}: {_flops(each)} an image, {_flops(each * batch)} a batch of {batch}"
    averages = len(parse_rates(config.ema_rate))
    lasting = 4 * (total * (1 + averages) + ADAM_MOMENTS * cost.trained)
    size = f"{lasting / 2**20:,.0f} MiB" if lasting < 2**30 else f"{lasting / 2**30:,.2f} GiB"
    yield (
        f"weights, AdamW's state and {averages} averages: {size}; gradients, activations, and copies of the weights in "
        "16 bits come on top"
    )


def _flops(count: float) -> str:
    return f"{count / 1e9:.4g} GFLOP" if count < 1e12 else f"{count / 1e12:.4g} TFLOP"
