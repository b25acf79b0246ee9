"""Vision transformers (Dosovitskiy et al. 2021) as DINOv2 and CLIP publish them, read off their state dicts.

CLIP is OpenAI's. Networks that open_clip has trained may have the same names and another activation, which leaves no
trace in a state dict: export those as programs.

Shapes: N images, S side in pixels, L tokens, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from guided_diffusion import untrusted

HEAD = 64  # channels of an attention head, in every published network of the two families
SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g"}  # by width
SHOWN = 3

State = Mapping[str, th.Tensor]


@dataclass(frozen=True)
class Family:
    """What the networks of one publication have in common.

    :param prefix: of the names of the tensors.
    :param renamed: patterns of what follows it -> our names, in this order.
    :param fast: GELU as x sigmoid(1.702 x).
    :param side: pixels that images are scaled and cropped to; 0: those that the position embedding is for.
    :param mean: of the colours in [0, 1], and their standard deviation.
    """

    name: str
    prefix: str
    renamed: Mapping[str, str]
    eps: float
    fast: bool
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DINOV2 = Family(  # Oquab et al. 2023, Darcet et al. 2023: the names of facebookresearch/dinov2
    name="DINOv2",
    prefix="",
    renamed={
        "^cls_token$": "cls",
        "^pos_embed$": "position",
        "^register_tokens$": "registers",
        r"^patch_embed\.proj\.": "patch.",
        r"\.attn\.qkv\.": ".qkv.",
        r"\.attn\.proj\.": ".mixed.",
        r"\.mlp\.fc1\.": ".widened.",
        r"\.mlp\.fc2\.": ".narrowed.",
        r"\.ls([12])\.gamma$": r".scale\1",
        r"^norm\.": "after.",
    },
    eps=1e-6,
    fast=False,
    side=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
CLIP = Family(  # Radford et al. 2021: the names of openai/CLIP
    name="CLIP",
    prefix="visual.",
    renamed={
        "^class_embedding$": "cls",
        "^positional_embedding$": "position",
        r"^conv1\.": "patch.",
        r"^ln_pre\.": "before.",
        r"^ln_post\.": "after.",
        r"^transformer\.resblocks\.": "blocks.",
        r"\.ln_([12])\.": r".norm\1.",
        r"\.attn\.in_proj_": ".qkv.",
        r"\.attn\.out_proj\.": ".mixed.",
        r"\.mlp\.c_fc\.": ".widened.",
        r"\.mlp\.c_proj\.": ".narrowed.",
        "^proj$": "projection",
    },
    eps=1e-5,
    fast=True,
    side=0,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


class Block(nn.Module):
    """Attention, then a network of two layers, each beside a way around it."""

    def __init__(self, width: int, hidden: int, eps: float, fast: bool) -> None:
        super().__init__()
        self.fast = fast
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widened, self.narrowed = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale1, self.scale2 = nn.Parameter(th.ones(width)), nn.Parameter(th.ones(width))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[N, L, D] -> [N, L, D]."""
        x = x + self.scale1 * self._attend(self.norm1(x))
        h = self.widened(self.norm2(x))
        h = h * th.sigmoid(1.702 * h) if self.fast else F.gelu(h)
        out: th.Tensor = x + self.scale2 * self.narrowed(h)
        return out

    def _attend(self, x: th.Tensor) -> th.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        out: th.Tensor = self.mixed(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return out


class VisionTransformer(nn.Module):
    """A network of the shapes of `state`, whose names are ours; it holds no weights until they are loaded."""

    def __init__(self, state: State, family: Family, side: int) -> None:
        super().__init__()
        width, patch = state["position"].shape[-1], state["patch.weight"].shape[-1]
        self.family, self.side, self.patch_side = family, side, patch
        self.patch = nn.Conv2d(3, width, patch, patch, bias="patch.bias" in state)
        self.cls = nn.Parameter(th.zeros(1, 1, width))
        self.position = nn.Parameter(th.zeros(1, 1 + (side // patch) ** 2, width))
        self.registers = _optional(state, "registers")
        self.projection = _optional(state, "projection")
        self.before = nn.LayerNorm(width, family.eps) if "before.weight" in state else nn.Identity()
        hidden = state["blocks.0.widened.weight"].shape[0]
        self.blocks = nn.ModuleList(Block(width, hidden, family.eps, family.fast) for _ in range(_depth(state)))
        self.after = nn.LayerNorm(width, family.eps)

    @property
    def title(self) -> str:
        """What its publication calls it, e.g. DINOv2 ViT-S/14."""
        width = self.cls.shape[-1]
        more = "" if self.registers is None else " with registers"
        return f"{self.family.name} ViT-{SIZES.get(width, width)}/{self.patch_side}{more}"

    def forward(self, images: th.Tensor) -> th.Tensor:
        """What the class token has become, [N, 3, S, S] -> [N, D] or, for CLIP, the embedding [N, E].

        :param images: as `prepare` makes them.
        """
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = th.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        if self.registers is not None:
            x = th.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        out: th.Tensor = self.after(x[:, 0])
        return out if self.projection is None else out @ self.projection


def _optional(state: State, name: str) -> nn.Parameter | None:
    return nn.Parameter(th.zeros(state[name].shape)) if name in state else None


def _depth(state: State) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


# ---- reading


def read_vit(state: State, family: Family) -> VisionTransformer:
    """The network of a published state dict; tensors of other parts, such as CLIP's of text, are passed over.

    :raises ValueError: saying what is missing or has an odd shape.
    """
    ours = {_renamed(name, family): value.float() for name, value in state.items() if name.startswith(family.prefix)}
    absent = [name for name in ("cls", "position", "patch.weight", "blocks.0.widened.weight") if name not in ours]
    if absent:
        told = ", ".join(_published(name, family) for name in absent)
        raise ValueError(f"it has no {told}: it is no vision transformer of {family.name}")
    try:
        return _filled(_complete(ours, family), family)
    except (RuntimeError, IndexError) as error:  # shapes that do not go together
        raise ValueError(f"it is no vision transformer of {family.name} ({untrusted.reason(error)})") from error


def _renamed(name: str, family: Family) -> str:
    name = name.removeprefix(family.prefix)
    for pattern, word in family.renamed.items():
        name = re.sub(pattern, word, name)
    return name


def _published(name: str, family: Family) -> str:
    """What a state dict calls one of the tensors that every network has."""
    words = {word: re.sub(r"[\^$\\]", "", pattern) for pattern, word in family.renamed.items()}
    for word, theirs in sorted(words.items(), key=lambda pair: len(pair[0])):
        name = name.replace(word, theirs) if word in name else name
    return f"{family.prefix}{name}"


def _complete(ours: dict[str, th.Tensor], family: Family) -> dict[str, th.Tensor]:
    """The tensors in our shapes, the position embedding for the side that images are scaled to."""
    width = ours["position"].shape[-1]
    if width % HEAD or not width:
        raise ValueError(f"its width, {width}, is no multiple of {HEAD}, the channels of a head")
    ours = {name: value for name, value in ours.items() if name != "mask_token"}  # only training has masks
    ours["cls"], ours["position"] = ours["cls"].reshape(1, 1, -1), ours["position"].reshape(1, -1, width)
    patch, length = ours["patch.weight"].shape[-1], ours["position"].shape[1] - 1
    grid = math.isqrt(max(length, 0))
    if grid < 1 or grid**2 != length or patch < 1:
        raise ValueError(f"its position embedding of {length} places and 1 is of no square of patches")
    side = family.side // patch if family.side else grid
    ours["position"] = _resized(ours["position"], grid, side, smooth="registers" in ours)
    ones = {f"blocks.{block}.scale{number}": th.ones(width) for block in range(_depth(ours)) for number in (1, 2)}
    return {**ones, **ours}


def _resized(position: th.Tensor, grid: int, side: int, *, smooth: bool) -> th.Tensor:
    """A position embedding [1, 1 + grid^2, D] for side^2 patches, as DINOv2's own code has it.

    :param smooth: as the networks with registers were made; the others' code scales by side + 0.1, where it guarded
        against rounding, and so looks at slightly other places.
    """
    if grid == side:
        return position
    planes = position[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    scale = None if smooth else ((side + 0.1) / grid,) * 2
    size = (side, side) if smooth else None
    planes = F.interpolate(planes, size=size, scale_factor=scale, mode="bicubic", antialias=smooth)
    return th.cat([position[:, :1], planes.flatten(2).transpose(1, 2)], dim=1)


def _filled(ours: dict[str, th.Tensor], family: Family) -> VisionTransformer:
    patch = ours["patch.weight"].shape[-1]
    side = math.isqrt(ours["position"].shape[1] - 1) * patch
    with th.device("meta"):  # shapes may claim anything: memory is taken for what fits the weights alone
        network = VisionTransformer(ours, family, side)
    own = network.state_dict()
    faults = [f"{_published(name, family)} is missing" for name in own if name not in ours]
    faults += [f"{untrusted.printable(name)} is not known" for name in ours if name not in own]
    both = [name for name in own if name in ours and own[name].shape != ours[name].shape]
    faults += [f"{_published(name, family)} is {list(ours[name].shape)}, not {list(own[name].shape)}" for name in both]
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError(f"it is no vision transformer of {family.name}: {', '.join(faults[:SHOWN])}{more}")
    network.load_state_dict(ours, assign=True)
    return network.requires_grad_(False).eval()


# ---- images


def prepare(images: NDArray[np.uint8], side: int, family: Family) -> th.Tensor:
    """Images as the network was trained on them, [N, H, W, 3] in 0 .. 255 -> [N, 3, side, side] of unit variance.

    The shorter edge is scaled to `side`, by PIL's bicubic filter, which smooths what it makes smaller; then the middle
    is cut out.
    """
    pixels = np.stack([_square(image, side) for image in images])
    scaled = th.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (th.tensor(values).view(3, 1, 1) for values in (family.mean, family.std))
    return (scaled - mean) / std


def _square(image: NDArray[np.uint8], side: int) -> NDArray[Any]:
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = Image.fromarray(image)
    if short != side:
        size = (side * width // short, side * height // short)
        scaled = scaled.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in scaled.size)
    return np.asarray(scaled)[top : top + side, left : left + side]
