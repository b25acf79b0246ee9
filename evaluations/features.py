"""Networks whose features of images are compared, behind one small protocol.

A new kind is a function (path, device, precision) -> `NetworkExtractor`, and its entry in `EXTRACTORS`.

Shapes: N images, H W pixels, C channels, D features, S spatial features, K classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from numpy.typing import NDArray
from PIL import Image

from evaluations.programs import load_exported, load_torchscript
from evaluations.vit import CLIP, DINOV2, Family, prepare, read_vit
from evaluations.weights import TORCHSCRIPT, find_inception, kind_of, load_inception
from guided_diffusion import checkpoint, logger, untrusted
from guided_diffusion.cli import Flags
from guided_diffusion.config import PRECISIONS, ClassifierConfig, nearest, parse_size
from guided_diffusion.crops import center_crop_arr
from guided_diffusion.npz import fingerprint
from guided_diffusion.seeds import to_device

VERSION = 1  # of what is done to images before a network sees them: features of other versions are not taken again
DTYPES = {"fp32": th.float32, "fp16": th.float16, "bf16": th.bfloat16}
MODES = {1: "L", 3: "RGB"}  # PIL's names by number of channels

Images = NDArray[np.uint8]
Numbers = NDArray[np.float32]


class Features(NamedTuple):
    """What the metrics are made of."""

    pool: Numbers  # [N, D]
    spatial: Numbers | None = None  # [N, S]
    probs: Numbers | None = None  # [N, K], each row sums to 1


class Extractor(Protocol):
    """What makes features of images."""

    @property
    def name(self) -> str:
        """As it stands in the name of a number, e.g. FD (emoji32 classifier)."""

    @property
    def published(self) -> bool:
        """Whether the numbers may be called what the published ones are: FID, sFID, Inception Score."""

    @property
    def identity(self) -> str:
        """Differs where features differ by more than rounding: weights, precision, what is done to the images."""

    def __call__(self, images: Images) -> Features:
        """Features of images [N, H, W, C] of 0 .. 255; they depend on the other images in rounding alone."""


class Outputs(NamedTuple):
    """What a network gives, as tensors of any floating type on any device."""

    pool: th.Tensor
    spatial: th.Tensor | None = None
    logits: th.Tensor | None = None


@dataclass(frozen=True, eq=False)
class NetworkExtractor:
    """An `Extractor` made of a function that runs a network without a graph."""

    name: str
    identity: str
    run: Callable[[Images], Outputs]
    published: bool = False

    def __call__(self, images: Images) -> Features:
        """As the protocol has it.

        :raises ValueError: if these are no images, or the network cannot take them.
        """
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in MODES or not all(images.shape):
            raise ValueError(
                f"images of shape {images.shape} and type {images.dtype}: features are made of uint8 [N, H, W, C] "
                "with C 1 or 3"
            )
        with th.no_grad():
            out = self.run(images)
        probs = None if out.logits is None else out.logits.float().softmax(dim=1)
        return Features(_numbers(out.pool), *(None if x is None else _numbers(x) for x in (out.spatial, probs)))


def _numbers(values: th.Tensor) -> Numbers:
    return np.ascontiguousarray(values.float().cpu().numpy())


def _planes(images: Images, device: th.device) -> th.Tensor:
    """[N, H, W, C] -> [N, C, H, W]."""
    return to_device(th.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), device)


def _colours(images: Images) -> Images:
    """Grey images in three channels."""
    return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


def _identity(kind: str, precision: str, state: Mapping[str, th.Tensor]) -> str:
    return f"{kind} {fingerprint(state)} {precision} {VERSION}"


def _base(path: str) -> str:
    """The name of a folder, or of a file without its extension."""
    name = os.path.basename(os.path.normpath(path))
    return untrusted.printable(name if os.path.isdir(path) else os.path.splitext(name)[0])


# ---- the published one


def _inception(path: str, device: th.device, precision: str) -> NetworkExtractor:
    """The Inception of the published evaluator; what its score is made of is the softmax of logits without bias."""
    network = load_inception(path, dtype=DTYPES[precision]).to(device)

    def run(images: Images) -> Outputs:
        out = network(_planes(_colours(images), device))
        return Outputs(out.pool, out.spatial, out.logits_unbiased)

    identity = _identity("inception", precision, network.state_dict())
    return NetworkExtractor("Inception", identity, run, published=True)


# ---- a classifier of this project


def _classifier(path: str, device: th.device, precision: str) -> NetworkExtractor:
    """A classifier of noisy images at t = 0: what its head begins with, and its classes.

    Images of another size are scaled and cropped as those of its training were.
    """
    from guided_diffusion.commands._common import restore_classifier

    source = "features classifier"
    flags = Flags("classifier_sample", {source: path, "classifier_precision": precision})
    restored = restore_classifier(flags, source)
    config, network = restored.flags.part(ClassifierConfig), restored.network.to(device)
    if config.dims != 2 or config.image_channels not in MODES:
        what = f"{config.image_channels} channels in {config.dims} dimensions"
        raise ValueError(f"--{source} {path} is of images of {what}: features are made of grey or coloured pictures")
    name = _base(path) if _base(path).endswith("classifier") else f"{_base(path)} classifier"
    fitted = Fitted(parse_size(config.image_size), config.image_channels, name)
    seen: list[th.Tensor] = []
    head_of(network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def run(images: Images) -> Outputs:
        seen.clear()
        x = _planes(fitted(images), device).float() / 127.5 - 1
        logits = network(x, th.zeros(len(x), device=device))
        return Outputs(seen.pop().flatten(1), None, logits)

    described = hashlib.sha256(repr(sorted(restored.identity.items())).encode()).hexdigest()[:16]
    return NetworkExtractor(name, f"classifier {described} {VERSION}", run)


def head_of(network: Any) -> th.nn.Module:
    """The layer whose input is the feature vector [N, D] of a classifier: the last one in which space is gone.

    adaptive: the mean over space of the normalised feature map; attention: what the mean has attended to; spatial and
    spatial_v2: the means over space of all feature maps.
    """
    places = {"adaptive": "out.3", "attention": "out.2.c_proj", "spatial": "out.0", "spatial_v2": "out.0"}
    layer: th.nn.Module = network.get_submodule(places[network.pool])
    return layer


class Fitted:
    """Makes images of any size and colour what a network was trained on, and says so once.

    :param size: height and width.
    """

    def __init__(self, size: tuple[int, int], channels: int, name: str) -> None:
        self.size, self.channels, self.name = size, channels, name
        self._said = False

    def __call__(self, images: Images) -> Images:
        """[N, H, W, C] of any size -> of the network's."""
        if images.shape[1:] == (*self.size, self.channels):
            return images
        if images.shape[1:3] != self.size and not self._said:
            self._said = True
            there, here = ("x".join(map(str, sides)) for sides in (images.shape[1:3], self.size))
            logger.warn(f"images of {there} are scaled and cropped to {here}, as in the training of the {self.name}")
        rows = [center_crop_arr(self._picture(image), self.size) for image in images]
        return np.stack(rows).reshape(len(images), *self.size, self.channels)

    def _picture(self, image: Images) -> Image.Image:
        return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).convert(MODES[self.channels])


# ---- anybody's


def _program(load: Callable[[str, th.device], Any]) -> Callable[[str, th.device, str], NetworkExtractor]:
    """A module out of an archive: float32 [N, 3, H, W] in [-1, 1] -> features, or (features, logits).

    Features are [N, D], or [N, D, ...] whose mean over all further axes is taken. Images come in the size that they
    have: scaling them is the module's part, and so is taking any N.
    """

    def make(path: str, device: th.device, precision: str) -> NetworkExtractor:
        if precision != "fp32":
            raise ValueError(f"--eval_precision {precision} is not for {path}, which computes in what it was saved in")
        module = load(path, device)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]

        def run(images: Images) -> Outputs:
            x = _planes(_colours(images), device).float() / 127.5 - 1
            return _given(_called(module, x, path), x, path)

        return NetworkExtractor(_base(path), f"program {digest} {VERSION}", run)

    return make


def _called(module: Any, x: th.Tensor, path: str) -> Any:
    try:
        return module(x)
    except (MemoryError, th.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # its own code may raise anything
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} does not take images [N, C, H, W] of {list(x.shape)} ({untrusted.printable(said[-1])}): give it "
            "images of the size that it was made for; a program must be exported for any N"
        ) from error


def _given(out: Any, x: th.Tensor, path: str) -> Outputs:
    """What a module gave, as features [N, D] and logits [N, K]."""
    parts = list(out) if isinstance(out, tuple | list) else [out]
    faults = [f"a {type(part).__name__}" for part in parts if not isinstance(part, th.Tensor)]
    faults += [f"a tensor {list(part.shape)} of {part.dtype}" for part in parts if not faults and not _is_rows(part, x)]
    if not faults and not 1 <= len(parts) <= 2:
        faults = [f"{len(parts)} tensors"]
    if faults:
        raise ValueError(
            f"{path} gives {faults[0]}: it must give features [N, D], or a pair of them and of logits [N, K]"
        )
    pool, *logits = (part.flatten(2).float().mean(dim=2) if part.ndim > 2 else part for part in parts)
    return Outputs(pool, None, *logits)


def _is_rows(part: th.Tensor, x: th.Tensor) -> bool:
    return part.ndim >= 2 and len(part) == len(x) and part.numel() > 0 and part.is_floating_point()


# ---- vision transformers


def _vit(family: Family, kind: str) -> Callable[[str, th.device, str], NetworkExtractor]:
    """A published network from a local file; images are scaled, cropped and normalised as its publication has it."""

    def make(path: str, device: th.device, precision: str) -> NetworkExtractor:
        try:
            network = read_vit(_state_dict(path), family)
        except ValueError as error:
            raise ValueError(f"--features {kind}:{path} cannot be used: {error}") from error
        identity = _identity(kind, precision, network.state_dict())
        network.to(device)

        def run(images: Images) -> Outputs:
            x = prepare(_colours(images), network.side, family).to(device)
            with th.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                return Outputs(network(x))

        return NetworkExtractor(network.title, identity, run)

    return make


def _state_dict(path: str) -> dict[str, th.Tensor]:
    """Names and tensors of a .pth, .pt or .safetensors, or of a TorchScript archive, as OpenAI publishes CLIP."""
    kind = kind_of(path) if os.path.exists(path) else ""
    if kind == TORCHSCRIPT:
        return dict(load_torchscript(path, th.device("cpu")).state_dict())
    if kind:
        raise ValueError(f"it is {kind}")
    state = checkpoint.load(path)
    if not isinstance(state, dict) or not all(isinstance(value, th.Tensor) for value in state.values()):
        raise ValueError("it holds something else than a state dict, which is names and tensors")
    return state


# ---- by name


EXTRACTORS: dict[str, Callable[[str, th.device, str], NetworkExtractor]] = {
    "inception": _inception,
    "classifier": _classifier,
    "torchscript": _program(load_torchscript),
    "export": _program(load_exported),
    "dinov2": _vit(DINOV2, "dinov2"),
    "clip": _vit(CLIP, "clip"),
}


def make_extractor(
    kind: str, *, weights: str = "", device: th.device | str = "cpu", precision: str = "fp32"
) -> NetworkExtractor:
    """The extractor that --features names.

    :param kind: "inception", or the name of another entry of `EXTRACTORS` and a path, e.g. "dinov2:vits14.pth".
    :param weights: the file of Inception, as `find_inception` has it.
    :param precision: fp32, fp16 or bf16 for the network's convolutions or matrices.
    :raises OSError, ValueError: if there is no such kind or file, or the file is of another network.
    """
    name, colon, path = kind.partition(":")
    if name not in EXTRACTORS:
        hint = nearest(name, EXTRACTORS) or f": give inception, or {', '.join(list(EXTRACTORS)[1:])} and :PATH"
        raise ValueError(f"--features {untrusted.quoted(kind)} is unknown{hint}")
    if precision not in PRECISIONS:
        raise ValueError(f"--eval_precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
    if name == "inception":
        if colon:
            raise ValueError(f"--features {untrusted.quoted(kind)} names a file: give it as --inception_weights")
        path = find_inception(weights)
    elif weights:
        raise ValueError(f"--inception_weights {weights} is not used by --features {kind}: leave one of them out")
    elif not path:
        raise ValueError(f"--features {name} is without a file: write {name}:PATH")
    return EXTRACTORS[name](os.path.expanduser(path), th.device(device), precision)
