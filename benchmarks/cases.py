"""What is measured: three models, their networks in our form, in the plain one and in that of diffusers, and inputs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch as th
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.commands import demo, flags as cli
from guided_diffusion.commands.flags import Flags
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, UNetConfig
from guided_diffusion.script_util import attention_rates, build_classifier, build_diffusion, build_unet
from plain import Plain

Network = Any


@dataclass(frozen=True)
class Case:
    """A model and the batch that it is given."""

    name: str
    flags: str
    batch: int
    classifier: str = ""

    @property
    def unet(self) -> UNetConfig:
        """What the U-Net is."""
        return self._parsed.part(UNetConfig)

    @property
    def size(self) -> int:
        """Side of the images."""
        return int(self.unet.image_size)

    @property
    def learn_sigma(self) -> bool:
        """Whether the U-Net has twice the channels."""
        return self._parsed.part(DiffusionConfig).learn_sigma

    def with_batch(self, batch: int) -> Case:
        """The same with other batches."""
        return replace(self, batch=batch)

    @property
    def _parsed(self) -> Flags:
        return cli.parse("image_train", ["--data_dir", "-", *self.flags.split()])

    def make_unet(self) -> Network:
        """The U-Net in float32, the same in every process."""
        return _filled(lambda: build_unet(self.unet, self.learn_sigma))

    def make_classifier(self) -> Network:
        """The classifier in float32, the same in every process."""
        words = ["--data_dir", "-", "--image_size", str(self.size), *self.classifier.split()]
        config = cli.parse("classifier_train", words).part(ClassifierConfig)
        return _filled(lambda: build_classifier(config))

    def make_process(self, grid: str = "") -> Any:
        """The diffusion process, on a grid of steps."""
        words = ["--data_dir", "-", *self.flags.split()]
        flags = cli.parse("image_train", [*words, *(["--timestep_respacing", grid] if grid else [])])
        return build_diffusion(flags.part(DiffusionConfig))

    def inputs(self, device: th.device) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Images [N, 3, H, W], timesteps [N] and labels [N]."""
        generator = th.Generator().manual_seed(1)
        images = th.randn(self.batch, 3, self.size, self.size, generator=generator)
        timesteps = th.arange(self.batch) * 1000 // self.batch
        labels = th.arange(self.batch) % self.unet.num_classes
        return images.to(device), timesteps.to(device), labels.to(device)

    def diffusers_unet(self) -> Network:
        """A UNet2DModel of the same widths, blocks and attention; it is called as ours."""
        from diffusers.models.unets.unet_2d import UNet2DModel

        widths = tuple(int(word) * self.unet.num_channels for word in self.unet.channel_mult.split(","))
        rates = attention_rates(self.unet.attention_resolutions, (self.size, self.size), len(widths))
        attends = [2**level in rates for level in range(len(widths))]
        kind = "resnet" if self.unet.resblock_updown else "conv"
        without = ("Resnet{}sampleBlock2D" if self.unet.resblock_updown else "{}Block2D").format
        down, up = (
            [f"Attn{way}Block2D" if here else without(word) for here in attends]
            for way, word in (("Down", "Down"), ("Up", "Up"))
        )
        th.manual_seed(0)
        return Theirs(
            UNet2DModel(
                sample_size=self.size,
                out_channels=6 if self.learn_sigma else 3,
                down_block_types=tuple(down),
                up_block_types=tuple(reversed(up)),
                block_out_channels=widths,
                layers_per_block=self.unet.num_res_blocks,
                downsample_type=kind,
                upsample_type=kind,
                attention_head_dim=self.unet.num_head_channels,
                resnet_time_scale_shift="scale_shift" if self.unet.use_scale_shift_norm else "default",
                num_class_embeds=self.unet.num_classes if self.unet.class_cond else None,
            )
        )


class Theirs(th.nn.Module):
    """A UNet2DModel that takes and returns what ours does, in float32 as ours."""

    def __init__(self, network: th.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """As our U-Nets."""
        dtype = next(self.network.parameters()).dtype
        out: th.Tensor = self.network(x.to(dtype), timesteps, y, return_dict=False)[0]
        return out.to(x.dtype)


def _filled(build: Callable[[], Network]) -> Network:
    """A network none of whose parameters is zero: what starts at zero would hide what comes before it."""
    th.manual_seed(0)
    network = build()
    with th.no_grad():
        for param in network.parameters():
            if not param.any():
                param.normal_(std=0.02)
    return network


def diffusers_flag(parser: argparse.ArgumentParser) -> None:
    """A flag that leaves diffusers out."""
    parser.add_argument(
        "--diffusers", action=argparse.BooleanOptionalAction, default=True, help="measure its U-Net as well (yes)"
    )


def ours(network: Network, precision: str) -> Network:
    """Our network, converted."""
    network.convert_to(precision)
    return network


def plain(network: Network, precision: str) -> Network:
    """The plain form of our network."""
    return Plain(network, precision)


def theirs(network: Network, precision: str) -> Network:
    """A network of diffusers: in half precision channels-last, as its documents advise."""
    if precision == "fp32":
        return network
    return network.to({"bf16": th.bfloat16, "fp16": th.float16}[precision], memory_format=th.channels_last)


def count_flops(network: Network, *inputs: th.Tensor, backward: str = "") -> int:
    """Operations of a pass of a plain network, in which nothing is fused and so nothing is missed.

    :param backward: "weights" or "image", the gradients that are computed too; '' for none.
    """
    image, *rest = inputs
    network.requires_grad_(backward == "weights")
    with FlopCounterMode(display=False) as counter, th.set_grad_enabled(bool(backward)):
        out = network(image.clone().requires_grad_(backward == "image"), *rest)
        if backward:
            out.square().mean().backward()
    return int(counter.get_total_flops())


_ADM = "--class_cond True --learn_sigma True --attention_resolutions 32,16,8 --num_head_channels 64 "
_ADM += "--resblock_updown True --use_scale_shift_norm True "
IMAGES64 = Case(
    "64x64",
    _ADM + "--image_size 64 --num_channels 128 --num_res_blocks 2 --channel_mult 1,2,3,4 --noise_schedule cosine",
    batch=4,
    classifier="--classifier_width 128 --classifier_depth 2",
)
EMOJI32 = Case(
    "emoji32",
    f"{demo.IMAGES} {demo.DIFFUSION}",
    batch=demo.BATCH["image_train"],
    classifier=f"{demo.IMAGES} {demo.CLASSIFIER} 350",
)
ADM256 = Case(
    "256x256",
    _ADM + "--image_size 256 --num_channels 256 --num_res_blocks 2 --channel_mult 1,1,2,2,4,4",
    batch=8,
    classifier="--classifier_width 128 --classifier_depth 2",
)
TINY = Case(
    "tiny",
    _ADM.replace("32,16,8", "4").replace("head_channels 64", "head_channels 32")
    + "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_classes 9",
    batch=2,
    classifier="--classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1,2 "
    "--classifier_attention_resolutions 4 --num_classes 9",
)
