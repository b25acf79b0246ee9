"""--dry_run: how large the network of a training is, and what a step costs, counted without values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import dist_util, logger
from ..config import ClassifierConfig, DiffusionConfig, RunConfig, SuperResConfig, TrainConfig
from ..data.upsampling import check_sizes
from ..networks.context import SCRATCH_DIM
from ..runtime.options import parse_profiles, parse_rates
from ..script_util import build_diffusion, build_network, in_its_space
from . import conditioning, finetuning, latent_space, training
from .common import image_shape, log_to_screen, precision_of
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
    """The cost of a step of n images, on a network on the meta device."""
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
    """Print what the training of these flags would take; nothing is read but the config and the autoencoder of it."""
    flags = training.resolved(flags)
    dist_util.setup_dist(device=flags.part(RunConfig).device)
    log_to_screen()
    flags, choices = training.with_precision(flags)
    for line in choices:
        logger.log(line)
    flags, _ = latent_space.opened(flags, flags.values["resume_checkpoint"] or flags.values["init_from"])
    config = flags.part(finetuning.KINDS[flags.command][1])
    with META:
        network = build_network(config, flags.part(DiffusionConfig).learn_sigma)
    finetuning.choose_trained(flags, network)
    training.recompute(flags, network)
    network.convert_to(precision_of(flags.values)[0], META)
    with META:
        cost = count(network, loss_of(flags, config), flags.part(TrainConfig).batch_size)
    if flags.values.get("context") == "text":
        logger.log(f"without its text encoder, whose vectors have {config.context_dim or SCRATCH_DIM} numbers")
    report(flags.part(TrainConfig), cost)


def loss_of(flags: Flags, config: Any) -> Loss:
    """The loss of a network on images of its size."""
    upsampler, config = isinstance(config, SuperResConfig), in_its_space(config)
    shape = image_shape(config.image_channels, config.large_size if upsampler else config.image_size, config.dims)
    process = build_diffusion(flags.part(DiffusionConfig))
    kind = conditioning.kind_of(flags) if flags.values.get("cond_type") else None

    def loss(network: Any, n: int) -> th.Tensor:
        x, t = th.randn(n, *shape), th.zeros(n, dtype=th.long)
        if isinstance(config, ClassifierConfig):
            return F.cross_entropy(network(x, t.float()), t)
        beside = {"y": t} if config.class_cond else {}
        if config.context == "text":
            beside["context"] = th.randn(n, config.max_tokens, config.context_dim or SCRATCH_DIM)
        beside |= {"vector": th.randn(n, config.vector_dim)} if getattr(config, "vector_dim", 0) else {}
        beside |= {"cond_image": th.randn(n, kind.channels, *shape[1:])} if kind else {}
        if upsampler:
            small = check_sizes(config.large_size, config.small_size)
            beside["low_res"] = th.randn(n, config.image_channels, *small)
            beside |= {"low_res_level": th.rand(n)} if config.cond_aug else {}
        return process.training_losses(network, x, t, model_kwargs=beside, noise=th.randn_like(x))["loss"].mean()

    return loss


def report(config: TrainConfig, cost: Cost) -> None:
    """Log the lines of a dry run."""
    total, batch = sum(cost.parts.values()), config.batch_size
    averages = len(parse_rates(config.ema_rate)) + len(parse_profiles(config.ema_profiles))
    trained = "all" if cost.trained == total else f"{cost.trained:,}"
    logger.log(f"dry run: nothing is trained and nothing is written\nparameters: {total:,}, {trained} of them trained")
    for name, number in cost.parts.items():
        logger.log(f"  {name:<16} {number:>15,}")
    for name, each in (("a forward pass", cost.forward), ("a training step", cost.step)):
        logger.log(f"arithmetic of {name}: {_flops(each)} an image, {_flops(each * batch)} a batch of {batch}")
    lasting = 4 * (total * (1 + averages) + ADAM_MOMENTS * cost.trained)
    logger.log(
        f"weights, AdamW's state and {averages} averages: {lasting / 2**20:,.0f} MiB; gradients, activations, and "
        "copies of the weights in 16 bits come on top"
    )


def _flops(count: float) -> str:
    return f"{count / 1e9:.4g} GFLOP" if count < 1e12 else f"{count / 1e12:.4g} TFLOP"
