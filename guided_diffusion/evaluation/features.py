"""Networks whose features are compared: Inception, classifiers of this project, DINOv2 and CLIP.

A new kind is a function (path, device, precision) -> `NetworkExtractor` and its entry in `EXTRACTORS`; classifiers are
read by the commands. In Python, any callable with the attributes of `Extractor` is one.

Shapes: N images, H W pixels, C channels, D features, S spatial features, K classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from .. import logger
from ..config import ClassifierConfig
from ..data.crops import center_crop_arr
from ..runtime import files
from ..runtime.errors import WHY, as_user_error, nearest, printable, quoted, refuse
from ..runtime.npz import fingerprint
from ..runtime.options import parse_size
from ..runtime.pictures import Pixels, levels, to_unit
from ..runtime.pretrained import OPTIONS, open_folder, read_network
from ..runtime.seeds import to_device
from .metrics import frechet_distance, statistics
from .weights import find_inception, load_inception

VERSION = 1  # of the preparation of images for the networks; features of other versions are computed again
DTYPES = {"fp32": th.float32, "fp16": th.float16, "bf16": th.bfloat16}
MODES = {1: "L", 3: "RGB"}  # PIL's names by number of channels

Images = NDArray[np.uint8]
Numbers = NDArray[np.float32]


class Features(NamedTuple):
    """Features of images, from which the metrics are computed."""

    pool: Numbers  # [N, D]
    spatial: Numbers | None = None  # [N, S]
    probs: Numbers | None = None  # [N, K], each row sums to 1


class Extractor(Protocol):
    """A callable that computes features of images."""

    name: str  # part of the labels of scores, e.g. FD (emoji32 classifier)
    published: bool  # whether scores may have the published names: FID, sFID, Inception Score
    identity: str  # differs where features do by more than rounding: weights, precision, preparation of images

    def __call__(self, images: Images) -> Features:
        """Features of images [N, H, W, C] of 0 .. 255; each depends on the other images only by rounding."""


Outputs = tuple[th.Tensor, th.Tensor | None, th.Tensor | None]  # pool, spatial and logits, on any device


@dataclass(eq=False)
class NetworkExtractor:
    """An `Extractor` made of a function that runs a network; there are no gradients."""

    name: str
    identity: str
    run: Callable[[Images], Outputs]
    published: bool = False
    differentiable: Callable[[th.Tensor], th.Tensor] | None = None  # pool [N, D] of images [N, C, H, W] in [-1, 1]

    def __call__(self, images: Images) -> Features:
        """Features of images, which must be uint8 [N, H, W, C], grey or RGB."""
        fit = images.ndim == 4 and images.dtype == np.uint8 and images.shape[-1] in MODES and all(images.shape)
        given = f"{images.dtype} {list(images.shape)}"
        refuse((not fit, f"features are made of uint8 [N, H, W, C] with C 1 or 3, got {given}"))
        with th.no_grad():
            pool, spatial, logits = self.run(images)
        probs = None if logits is None else logits.float().softmax(dim=1)
        return Features(_numbers(pool), *(None if x is None else _numbers(x) for x in (spatial, probs)))


def _numbers(values: th.Tensor) -> Numbers:
    return np.ascontiguousarray(values.float().cpu().numpy())


def _planes(images: Images, device: th.device) -> th.Tensor:
    return to_device(th.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), device)


def _rgb(images: Images) -> Images:
    return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _stem(path: str) -> str:
    """The name of a folder, or of a file without its extension."""
    name = os.path.basename(os.path.normpath(path))
    return printable(name if os.path.isdir(path) else os.path.splitext(name)[0])


def _inception(path: str, device: th.device, precision: str) -> NetworkExtractor:
    """The Inception of the published evaluator, whose score is of the softmax of the logits without bias."""
    network = load_inception(path, dtype=DTYPES[precision]).to(device)

    def run(images: Images) -> Outputs:
        out = network(_planes(_rgb(images), device))
        return out.pool, out.spatial, out.logits_unbiased

    identity = f"inception {fingerprint(network.state_dict())} {precision} {VERSION}"

    def differentiable(images: th.Tensor) -> th.Tensor:
        pool: th.Tensor = network(levels(images).expand(-1, 3, -1, -1)).pool
        return pool

    network.eval().requires_grad_(False)
    return NetworkExtractor("Inception", identity, run, published=True, differentiable=differentiable)


# the layer whose input is the feature vector [N, D], the last one in which space is gone, by classifier_pool; spatial
# and spatial_v2 pool the means over space of all feature maps
HEADS = {"adaptive": "out.3", "attention": "out.2.c_proj", "spatial": "out.0", "spatial_v2": "out.0"}


def classifier_extractor(
    network: Any, config: ClassifierConfig, path: str, device: th.device, facts: Mapping[str, Any]
) -> NetworkExtractor:
    """A classifier of noisy images at t = 0: the input of its head, and its classes.

    Images of another size are scaled and cropped as those of its training were.

    :param path: of its run or checkpoint, which gives the name.
    :param facts: everything that the features depend on, for the identity.
    """
    others = config.image_channels not in MODES
    refuse((others, f"--features classifier:{path} is no classifier of grey or RGB images: give one of these"))
    name = _stem(path) if _stem(path).endswith("classifier") else f"{_stem(path)} classifier"
    size, warned = parse_size(config.image_size), False
    head_inputs: list[th.Tensor] = []
    head = network.get_submodule(HEADS[network.pool])
    head.register_forward_pre_hook(lambda _, inputs: head_inputs.append(inputs[0]))

    def run(images: Images) -> Outputs:
        nonlocal warned
        if images.shape[1:3] != size and not warned:
            given, needed = ("x".join(map(str, sides)) for sides in (images.shape[1:3], size))
            logger.warn(f"images of {given} are scaled and cropped to {needed}, as in the training of the {name}")
            warned = True
        x = to_unit(_planes(fitted(images, size, config.image_channels), device))
        pooled, logits = outputs(x)
        return pooled, None, logits

    def outputs(x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        head_inputs.clear()
        logits = network(x, th.zeros(len(x), device=device))
        pooled = head_inputs.pop()
        pooled = pooled[:, :, 0] if pooled.ndim == 3 else pooled  # of an attention pool, whose first token is the mean
        return pooled.flatten(1), logits

    def differentiable(images: th.Tensor) -> th.Tensor:
        return outputs(F.interpolate(images, size, mode="bilinear", antialias=True))[0]

    identity = f"classifier {_digest(sorted(facts.items()))} {VERSION}"
    return NetworkExtractor(name, identity, run, differentiable=differentiable)


def fitted(images: Images, size: tuple[int, int], channels: int) -> Images:
    """Images of any height, width and colour as a network was trained on them, [N, H, W, C] -> [N, *size, channels]."""
    if images.shape[1:] == (*size, channels):
        return images
    pictures = [Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]) for image in images]
    rows = [center_crop_arr(picture.convert(MODES[channels]), size) for picture in pictures]
    return np.stack(rows).reshape(len(images), *size, channels)


# title, values that model_type may have in the folder's config.json, class of transformers that reads it, and the field
# of its output with the features [N, D]: the normalised class token, or the embedding that is compared with texts
PRETRAINED = {
    "dinov2": ("DINOv2", ("dinov2", "dinov2_with_registers"), "AutoModel", "pooler_output"),
    "clip": ("CLIP", ("clip", "clip_vision_model"), "CLIPVisionModelWithProjection", "image_embeds"),
}


def _pretrained(kind: str, folder: str, device: th.device, precision: str) -> NetworkExtractor:
    """A network of transformers; images are scaled, cropped and normalised as the folder's preprocessor_config says."""
    title, _, _, output = PRETRAINED[kind]
    with as_user_error(
        f"--features {kind}:{folder} cannot be used: {WHY}; give a folder with config.json, "
        "preprocessor_config.json and model.safetensors"
    ):  # transformers raises all kinds of them on a damaged folder
        network, processor = _from_folder(kind, folder)
    settings = processor.to_dict()
    identity = f"{kind} {fingerprint(network.state_dict())} {_digest(sorted(settings.items()))} {precision} {VERSION}"
    network.to(device)
    numbers = {name: th.tensor(settings[name]).view(-1, 1, 1).to(device) for name in ("image_mean", "image_std")}

    def run(images: Images) -> Outputs:
        x = processor(list(_rgb(images)), return_tensors="pt")["pixel_values"].to(device)
        with th.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            return getattr(network(x), output), None, None

    def differentiable(images: th.Tensor) -> th.Tensor:
        pool: th.Tensor = getattr(network(_prepared(images, {**settings, **numbers})), output)
        return pool

    name = _stem(folder)
    return NetworkExtractor(
        name if kind in name.lower() else f"{title} {name}", identity, run, differentiable=differentiable
    )


def _from_folder(kind: str, folder: str) -> tuple[Any, Any]:
    """The network and its image processor."""
    title, model_types, loader, _ = PRETRAINED[kind]
    library, config = open_folder(folder, "eval")
    other = config.model_type not in model_types
    refuse((other, f"its config.json is of a model_type {quoted(config.model_type)}, not {title}"))
    if config.model_type == "clip":  # of images and texts together
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil", **OPTIONS)
    return read_network(library, loader, folder, config), processor


def _prepared(images: th.Tensor, settings: Mapping[str, Any]) -> th.Tensor:
    """Images [N, C, H, W] in [-1, 1] as an image processor makes them, differentiable; grey ones become RGB.

    :param settings: of the processor, with its means and deviations as tensors [3, 1, 1].
    """
    size, crop = settings["size"], settings.get("crop_size") if settings.get("do_center_crop") else None
    height, width = images.shape[2:]
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(height, width)
        sides = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        sides = size["height"], size["width"]
    x = F.interpolate(images.expand(-1, 3, -1, -1), sides, mode="bicubic", antialias=True)
    if crop:
        top, left = (sides[0] - crop["height"]) // 2, (sides[1] - crop["width"]) // 2
        x = x[:, :, top : top + crop["height"], left : left + crop["width"]]
    prepared: th.Tensor = ((x + 1) / 2 - settings["image_mean"]) / settings["image_std"]
    return prepared


Maker = Callable[[str, th.device, str], Extractor]  # (path, device, precision)
EXTRACTORS: dict[str, Maker] = {"inception": _inception, **{kind: partial(_pretrained, kind) for kind in PRETRAINED}}


def make_extractor(
    kind: str,
    *,
    weights: str = "",
    device: th.device | str = "cpu",
    precision: str = "fp32",
    makers: Mapping[str, Maker] = EXTRACTORS,
) -> Extractor:
    """The extractor of --features.

    :param kind: "inception", or the name of another of the `makers` and a path, e.g. "dinov2:dinov2-base".
    :param weights: the file of Inception, as `find_inception` has it.
    :param precision: fp32, fp16 or bf16 for the network's convolutions or matrices.
    """
    name, _, path = kind.partition(":")
    hint = nearest(name, makers) or f": give inception, or {', '.join(list(makers)[1:])} and :PATH"
    unused = weights and kind != "inception"
    refuse(
        (name not in makers, f"--features {quoted(kind)} is unknown{hint}"),
        (unused, f"--inception_weights {weights} is not used by --features {kind}: leave one of them out"),
        (name != "inception" and not path, f"--features {name} needs a path: write {name}:PATH"),
    )
    if name == "inception":
        path = find_inception(path or weights)
    return makers[name](files.resolve(path), th.device(device), precision)


RECONSTRUCTIONS = 64  # images per pass of the network


def frechet(extractor: Extractor) -> Callable[[Pixels, Pixels], tuple[str, float]]:
    """The function of (images, reconstructions) uint8 [N, H, W, C] that gives the name and the value of their distance.

    The name is fid for the published network's features, else fd.
    """

    def distance(images: Pixels, made: Pixels) -> tuple[str, float]:
        both = [
            statistics(
                extractor(rows[start : start + RECONSTRUCTIONS]).pool for start in range(0, len(rows), RECONSTRUCTIONS)
            )
            for rows in (images, made)
        ]
        value = frechet_distance(both[0].mean, both[0].cov, both[1].mean, both[1].cov)
        return ("fid" if extractor.published else "fd"), value

    return distance
