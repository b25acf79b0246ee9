"""Features of every kind of network: what they are, that they do not depend on the batch, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from evaluations import vit
from evaluations.features import EXTRACTORS, Fitted, make_extractor
from evaluations.inception import InceptionNetwork
from evaluations.vit import CLIP, DINOV2, prepare, read_vit
from guided_diffusion import checkpoint, dist_util, logger
from guided_diffusion.config import ClassifierConfig, UNetConfig
from guided_diffusion.crops import center_crop_arr
from guided_diffusion.script_util import build_classifier, build_unet

GOLDEN = Path(__file__).parent / "golden" / "vit.npz"
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)


def sentence_of(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args, **options)
    assert dist_util._is_users_mistake(caught.value), "raised by other code than this project's"
    text = str(caught.value)
    assert text.isprintable(), text
    return text


def planes(images: NDArray[np.uint8]) -> th.Tensor:
    return th.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1


def check_batches(extractor: Any, images: NDArray[np.uint8]) -> None:
    """The features of an image are those that it has alone."""
    together = extractor(images)
    alone = [extractor(images[row : row + 1]) for row in range(len(images))]
    for number, values in enumerate(together):
        if values is not None:
            rows = np.concatenate([features[number] for features in alone])
            assert rows.dtype == values.dtype == np.float32
            np.testing.assert_allclose(rows, values, rtol=1e-4, atol=1e-5)


# ---- classifiers of this project


def save_run(folder: Path, config: Any, network: th.nn.Module) -> Path:
    """A folder as training writes it, the network's weights drawn anew so that none are zero."""
    folder.mkdir()
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for parameter in network.parameters():
            parameter.copy_(th.randn(parameter.shape, generator=generator) * 0.1)
    checkpoint.save_json(str(folder / "config.json"), {"flags": vars(config)})
    checkpoint.save(str(folder / "model000010.pt"), network.state_dict())
    return folder


def classifier_run(folder: Path, **options: Any) -> tuple[Path, Any]:
    known = {"width": 64, "depth": 1, "channel_mult": "1,1", "attention_resolutions": "4", "pool": "adaptive"}
    sizes = {name: options.pop(name) for name in ("image_size", "image_channels") if name in options}
    values = {f"classifier_{name}": value for name, value in {**known, **options}.items()}
    config = ClassifierConfig(**{"image_size": 8, "num_classes": 5, **sizes, **values})
    network = build_classifier(config).eval()
    return save_run(folder, config, network), network


def encoded(network: Any, x: th.Tensor) -> list[th.Tensor]:
    return list(network._encode(x, network._embed(x, th.zeros(len(x)), None)))


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_a_classifiers_features_are_what_its_head_begins_with(tmp_path: Path, pool: str) -> None:
    folder, network = classifier_run(tmp_path / "emoji8", pool=pool)
    extractor = make_extractor(f"classifier:{folder}")
    assert (extractor.name, extractor.published) == ("emoji8 classifier", False)
    found = extractor(IMAGES)
    assert found.spatial is None
    assert found.probs is not None
    pooled = th.from_numpy(found.pool)
    x, out = planes(IMAGES), network.out
    with th.no_grad():
        maps = encoded(network, x)
        if pool == "adaptive":
            th.testing.assert_close(pooled, F.silu(out[0](maps[-1])).mean((2, 3)))
            logits = pooled @ out[3].weight[:, :, 0, 0].T + out[3].bias
        elif pool == "attention":
            assert pooled.shape == (3, 64)
            logits = pooled @ out[2].c_proj.weight[:, :, 0].T + out[2].c_proj.bias
        else:
            th.testing.assert_close(pooled, th.cat([h.mean((2, 3)) for h in maps], dim=1))
            logits = out(pooled)
        th.testing.assert_close(logits, network(x, th.zeros(3)))
        th.testing.assert_close(th.from_numpy(found.probs), logits.softmax(1))
    check_batches(extractor, IMAGES)


def test_a_classifier_is_named_by_its_folder_or_file_and_known_by_its_weights(tmp_path: Path) -> None:
    folder, network = classifier_run(tmp_path / "emoji8")
    of_folder, of_file = (make_extractor(f"classifier:{path}") for path in (f"{folder}/", folder / "model000010.pt"))
    assert of_folder.name == "emoji8 classifier"
    assert of_file.name == "model000010 classifier"
    assert of_folder.identity == of_file.identity
    rounded = make_extractor(f"classifier:{folder}", precision="bf16")
    assert rounded.identity != of_folder.identity
    difference = np.abs(rounded(IMAGES).pool - of_folder(IMAGES).pool).max()
    assert 0 < difference < 0.1
    network.out[3].bias.data[0] += 1e-3
    (folder / "model000010.pt").unlink()
    checkpoint.save(str(folder / "model000010.pt"), network.state_dict())
    folder.rename(tmp_path / "classifier")
    other = make_extractor(f"classifier:{tmp_path}/classifier")
    assert other.identity != of_folder.identity
    assert other.name == "classifier"


def test_images_of_another_size_are_cropped_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = classifier_run(tmp_path / "small")
    extractor = make_extractor(f"classifier:{folder}")
    wide = RNG.integers(0, 256, (2, 20, 33, 3)).astype(np.uint8)
    cropped = np.stack([center_crop_arr(Image.fromarray(image), 8) for image in wide])
    logger.configure(dir=str(tmp_path / "log"), format_strs=["stdout"])
    np.testing.assert_array_equal(extractor(wide).pool, extractor(cropped).pool)
    extractor(wide[:1])
    said = "images of 20x33 are scaled and cropped to 8x8, as in the training of the small classifier"
    assert capsys.readouterr().out.count(said) == 1
    check_batches(extractor, wide)


def test_colours_are_fitted_as_in_training() -> None:
    grey = Fitted((8, 8), 1, "grey")(IMAGES)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in IMAGES])
    np.testing.assert_array_equal(grey[..., 0], expected)
    coloured = Fitted((8, 8), 3, "coloured")(grey)
    np.testing.assert_array_equal(coloured, grey.repeat(3, axis=-1))
    assert Fitted((8, 8), 3, "coloured")(IMAGES) is IMAGES


def test_a_grey_classifier_takes_coloured_images(tmp_path: Path) -> None:
    folder, network = classifier_run(tmp_path / "grey", image_channels=1, image_size=8)
    found = make_extractor(f"classifier:{folder}")(IMAGES[..., :1].repeat(3, axis=-1))
    with th.no_grad():
        expected = network(planes(IMAGES[..., :1]), th.zeros(3)).softmax(1)
    assert found.probs is not None
    th.testing.assert_close(th.from_numpy(found.probs), expected)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    config = UNetConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1", attention_resolutions="8")
    folder = save_run(tmp_path / "unet", config, build_unet(config, learn_sigma=False))
    told = sentence_of(make_extractor, f"classifier:{folder}")
    assert "--features classifier" in told
    assert "give the checkpoint of a classifier" in told
    assert "does not exist" in sentence_of(make_extractor, f"classifier:{tmp_path}/nowhere")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04")
    assert "cannot be read as a checkpoint" in sentence_of(make_extractor, f"classifier:{tmp_path}/torn.pt")


# ---- Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, InceptionNetwork]:
    network, generator = InceptionNetwork(), th.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            spread = th.randn(tensor.shape, generator=generator)
            fan = tensor[0].numel() if tensor.ndim > 1 else 200
            tensor.copy_(spread * (2 / fan) ** 0.5 + name.endswith(("bn.running_var", "bn.weight")))
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path, network


def test_inception_gives_what_the_published_evaluator_compares(inception: tuple[Path, InceptionNetwork]) -> None:
    path, network = inception
    extractor = make_extractor("inception", weights=str(path))
    assert (extractor.name, extractor.published) == ("Inception", True)
    found = extractor(IMAGES[:2])
    with th.no_grad():
        expected = network(th.from_numpy(IMAGES[:2]).movedim(-1, 1))
    assert found.spatial is not None
    assert found.probs is not None
    np.testing.assert_array_equal(found.pool, expected.pool.numpy())
    np.testing.assert_array_equal(found.spatial, expected.spatial.numpy())
    np.testing.assert_array_equal(found.probs, expected.logits_unbiased.softmax(1).numpy())
    assert not np.allclose(found.probs, expected.logits.softmax(1).numpy(), rtol=1e-3)
    np.testing.assert_allclose(extractor(IMAGES[1:2]).pool, found.pool[1:], rtol=1e-4, atol=1e-5)
    rounded = make_extractor("inception", weights=str(path), precision="bf16")
    assert rounded.identity != extractor.identity
    grey = rounded(IMAGES[:1, ..., :1]).pool
    np.testing.assert_array_equal(grey, rounded(IMAGES[:1, ..., :1].repeat(3, axis=-1)).pool)


# ---- vision transformers


def fill(name: str, shape: tuple[int, ...]) -> th.Tensor:
    """Weights that depend on name and shape alone; the golden numbers were made with these."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        ones = ("norm1.weight", "norm2.weight", "norm.weight", "ln_1.weight", "ln_2.weight", "ln_pre.weight")
        return th.from_numpy(values * 0.2 + (name.endswith((*ones, "ln_post.weight")) or "gamma" in name)).float()
    token = any(word in name for word in ("position", "pos_embed", "token"))
    values *= 0.5 if token else np.prod(shape[1:]) ** -0.5
    return th.from_numpy(values.astype(np.float32))


def dinov2(grid: int = 16, registers: int = 0, width: int = 128) -> dict[str, th.Tensor]:
    """A state dict of facebookresearch/dinov2's layout."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid * grid, width)}
    shapes |= {"mask_token": (1, width), **({"register_tokens": (1, registers, width)} if registers else {})}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
    layers |= {"mlp.fc2": (width, 4 * width), "norm1": (width,), "norm2": (width,)}
    for block in range(2):
        for name, shape in layers.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{block}.ls{number}.gamma": (width,) for number in (1, 2)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {name: fill(name, shape) for name, shape in shapes.items()}


def clip(grid: int = 7, patch: int = 32, width: int = 128, out: int = 24) -> dict[str, th.Tensor]:
    """A state dict of openai/CLIP's layout, with a tensor of the part for text."""
    shapes: dict[str, tuple[int, ...]] = {"class_embedding": (width,), "positional_embedding": (1 + grid**2, width)}
    shapes |= {"conv1.weight": (width, 3, patch, patch), "proj": (width, out)}
    layers = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width), "mlp.c_fc.": (4 * width, width)}
    layers |= {"mlp.c_proj.": (width, 4 * width), "ln_1.": (width,), "ln_2.": (width,)}
    for block in range(2):
        for name, shape in layers.items():
            start = f"transformer.resblocks.{block}.{name}"
            shapes |= {f"{start}weight": shape, f"{start}bias": shape[:1]}
    shapes |= {f"{name}.{kind}": (width,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    state = {f"visual.{name}": fill(f"visual.{name}", shape) for name, shape in shapes.items()}
    return {**state, "token_embedding.weight": th.zeros(9, 4), "logit_scale": th.tensor(1.0)}


@pytest.mark.parametrize(
    ("name", "state", "family"),
    [("dinov2", dinov2(), DINOV2), ("dinov2_registers", dinov2(registers=2), DINOV2), ("clip", clip(), CLIP)],
)
def test_transformers_agree_with_the_recorded_ones(name: str, state: dict[str, th.Tensor], family: vit.Family) -> None:
    """tests/golden/vit.npz was written once by transformers 5.23.0 with torch 2.13: the normalised class token of
    Dinov2Model and Dinov2WithRegistersModel, and image_embeds of CLIPVisionModelWithProjection, two layers of width
    128, with the weights of `fill` under their names."""
    images = th.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with np.load(GOLDEN) as golden, th.no_grad():
        found = read_vit(state, family)(images)
        np.testing.assert_allclose(found.numpy(), golden[name], rtol=1e-4, atol=1e-5)


class QuickGELU(th.nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x / (1 + (-1.702 * x).exp())


def encoder(blocks: list[dict[str, th.Tensor]], activation: Any, eps: float) -> th.nn.Module:
    """torch's own transformer, from (in_proj, out_proj, linear1, linear2, norm1, norm2) of each layer."""
    width = blocks[0]["self_attn.out_proj.weight"].shape[0]
    options = {"norm_first": True, "batch_first": True, "activation": activation, "layer_norm_eps": eps}
    layers = []
    for weights in blocks:
        layer = th.nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, **options)
        layer.load_state_dict(weights)
        layers.append(layer)
    return th.nn.Sequential(*layers).eval()


def renamed(state: dict[str, th.Tensor], start: str, names: dict[str, str]) -> list[dict[str, th.Tensor]]:
    result = []
    for block in range(2):
        own = {name.removeprefix(f"{start}.{block}."): value for name, value in state.items()}
        result.append(
            {f"{new}{kind}": own[f"{old}{kind}"] for old, new in names.items() for kind in ("weight", "bias")}
        )
    return result


def tokens(patches: th.Tensor, cls: th.Tensor, position: th.Tensor) -> th.Tensor:
    rows = patches.flatten(2).mT
    return th.cat([cls.reshape(1, 1, -1).repeat(len(rows), 1, 1), rows], dim=1) + position


def test_dinov2_is_torchs_transformer_with_scaled_branches() -> None:
    state = dinov2(registers=3)
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj.": "self_attn.out_proj.", "mlp.fc1.": "linear1."}
    names |= {"mlp.fc2.": "linear2.", "norm1.": "norm1.", "norm2.": "norm2."}
    blocks = renamed(state, "blocks", names)
    for number, weights in enumerate(blocks):  # the scale of a branch is one of its last layer
        for layer, scale in (("self_attn.out_proj", "ls1"), ("linear2", "ls2")):
            gamma = state[f"blocks.{number}.{scale}.gamma"]
            weights[f"{layer}.weight"] = gamma[:, None] * weights[f"{layer}.weight"]
            weights[f"{layer}.bias"] = gamma * weights[f"{layer}.bias"]
    images = th.randn(2, 3, 224, 224)
    with th.no_grad():
        patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
        x = tokens(patches, state["cls_token"], state["pos_embed"])
        x = th.cat([x[:, :1], state["register_tokens"].repeat(2, 1, 1), x[:, 1:]], dim=1)
        x = encoder(blocks, F.gelu, 1e-6)(x)[:, 0]
        expected = F.layer_norm(x, (128,), state["norm.weight"], state["norm.bias"], 1e-6)
        th.testing.assert_close(read_vit(state, DINOV2)(images), expected, rtol=1e-4, atol=1e-5)


def test_clip_is_torchs_transformer_with_a_norm_before_it() -> None:
    state = {name.removeprefix("visual."): value for name, value in clip(grid=3).items()}
    names = {"attn.in_proj_": "self_attn.in_proj_", "attn.out_proj.": "self_attn.out_proj.", "mlp.c_fc.": "linear1."}
    names |= {"mlp.c_proj.": "linear2.", "ln_1.": "norm1.", "ln_2.": "norm2."}
    images = th.randn(2, 3, 96, 96)  # CLIP's side is that of its position embedding: 3 patches of 32
    with th.no_grad():
        x = tokens(
            F.conv2d(images, state["conv1.weight"], stride=32), state["class_embedding"], state["positional_embedding"]
        )
        x = F.layer_norm(x, (128,), state["ln_pre.weight"], state["ln_pre.bias"])
        x = encoder(renamed(state, "transformer.resblocks", names), QuickGELU(), 1e-5)(x)[:, 0]
        expected = F.layer_norm(x, (128,), state["ln_post.weight"], state["ln_post.bias"]) @ state["proj"]
        network = read_vit(clip(grid=3), CLIP)
        assert network.side == 96
        th.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def cubic(grid: int, side: int, scale: float) -> NDArray[np.float64]:
    """Bicubic interpolation along one axis as a matrix [side, grid] (Keys 1981, A = -0.75, edges repeated)."""
    matrix = np.zeros((side, grid))
    for row in range(side):
        place = (row + 0.5) / scale - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            d = abs(place - tap)
            near, far = (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3
            matrix[row, min(max(tap, 0), grid - 1)] += near if d <= 1 else far
    return matrix


def test_position_embeddings_are_interpolated_as_dinov2_does() -> None:
    """From 37 x 37 patches to 16 x 16, at a scale of 16.1 / 37."""
    state = dinov2(grid=37)
    network = read_vit(state, DINOV2)
    rows = cubic(37, 16, 16.1 / 37)
    planes = state["pos_embed"][0, 1:].double().numpy().reshape(37, 37, -1)
    expected = np.einsum("ik,jl,klc->ijc", rows, rows, planes).reshape(256, -1)
    np.testing.assert_allclose(network.position[0, 1:].numpy(), expected, atol=1e-5)
    assert th.equal(network.position[:, 0], state["pos_embed"][:, 0])
    smooth = read_vit(dinov2(grid=37, registers=1), DINOV2).position
    assert not np.allclose(smooth[0, 1:].numpy(), expected, atol=1e-2)
    flat = {**dinov2(grid=37, registers=1), "pos_embed": th.full((1, 1370, 128), 0.3)}
    th.testing.assert_close(read_vit(flat, DINOV2).position, th.full((1, 257, 128), 0.3))


def test_images_are_prepared_as_published() -> None:
    exact = RNG.integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    for family in (DINOV2, CLIP):
        back = prepare(exact, 224, family).movedim(1, -1) * th.tensor(family.std) + th.tensor(family.mean)
        np.testing.assert_allclose(back.numpy() * 255, exact, atol=1e-3)
    tall = RNG.integers(0, 256, (1, 448, 300, 3)).astype(np.uint8)
    scaled = Image.fromarray(tall[0]).resize((224, 334), Image.Resampling.BICUBIC)
    expected = prepare(np.asarray(scaled.crop((0, 55, 224, 279)))[None], 224, DINOV2)
    assert th.equal(prepare(tall, 224, DINOV2), expected)


def test_transformers_are_read_from_local_files(tmp_path: Path) -> None:
    th.save(dinov2(registers=1), tmp_path / "vits14_reg.pth")
    extractor = make_extractor(f"dinov2:{tmp_path}/vits14_reg.pth")
    assert (extractor.name, extractor.published) == ("DINOv2 ViT-128/14 with registers", False)
    check_batches(extractor, IMAGES)
    rounded = make_extractor(f"dinov2:{tmp_path}/vits14_reg.pth", precision="bf16")
    assert rounded.identity != extractor.identity
    assert 0 < np.abs(rounded(IMAGES[:1]).pool - extractor(IMAGES[:1]).pool).max() < 0.1
    assert read_vit(dinov2(width=384), DINOV2).title == "DINOv2 ViT-S/14"


class Tower(th.nn.Module):
    """Tensors under the names of a state dict, for a TorchScript archive."""

    def __init__(self, state: dict[str, th.Tensor], start: str = "") -> None:
        super().__init__()
        for name in dict.fromkeys(
            name.removeprefix(start).partition(".")[0] for name in state if name.startswith(start)
        ):
            value = state.get(start + name)
            inner = Tower(state, f"{start}{name}.") if value is None else th.nn.Parameter(value.half())
            setattr(self, name, inner)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x


def test_clip_is_read_from_all_that_it_is_published_as(tmp_path: Path) -> None:
    halved = {name: value.half().float() for name, value in clip(grid=2).items()}
    th.save(halved, tmp_path / "clip.pt")
    safetensors.torch.save_file(halved, tmp_path / "clip.safetensors")
    scripted(Tower(halved), tmp_path / "ViT-B-32.pt")
    found = [make_extractor(f"clip:{tmp_path}/{name}") for name in ("clip.pt", "clip.safetensors", "ViT-B-32.pt")]
    assert {extractor.name for extractor in found} == {"CLIP ViT-128/32"}
    assert len({extractor.identity for extractor in found}) == 1
    check_batches(found[2], IMAGES)


def test_what_is_no_transformer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    good, part = dinov2(), {name: value for name, value in dinov2().items() if "ls1" not in name and "fc2" not in name}
    cases: list[tuple[str, Any, str]] = [
        ("dinov2", clip(), "it has no cls_token, pos_embed, patch_embed.proj.weight, blocks.0.mlp.fc1.weight"),
        ("clip", good, "it has no visual.class_embedding, visual.positional_embedding, visual.conv1.weight"),
        ("dinov2", {**good, "pos_embed": good["pos_embed"][:, :200]}, "of 199 places and 1 is of no square"),
        ("dinov2", dinov2(width=100), "its width, 100, is no multiple of 64"),
        ("dinov2", part, "blocks.0.mlp.fc2.weight is missing"),
        ("dinov2", {**good, "norm.weight": th.zeros(3)}, "norm.weight is [3], not [128]"),
        ("dinov2", {**good, "blocks.7.norm1.weight": th.zeros(128)}, "is missing"),
        ("dinov2", {**good, "head.weight": th.zeros(3)}, "head.weight is not known"),
        ("dinov2", {**good, "pos_embed": th.zeros(())}, "it is no vision transformer of DINOv2"),
        ("dinov2", [good], "something else than a state dict"),
    ]
    for kind, state, message in cases:
        th.save(state, path)
        told = sentence_of(make_extractor, f"{kind}:{path}")
        assert message in told
        assert f"--features {kind}:{path} cannot be used" in told
    path.write_bytes(b"<html>")
    assert "it is a web page" in sentence_of(make_extractor, f"clip:{path}")
    path.write_bytes(pickle.dumps(print))
    assert "cannot be read as a checkpoint" in sentence_of(make_extractor, f"clip:{path}")
    assert "does not exist" in sentence_of(make_extractor, f"clip:{tmp_path}/nowhere.pt")


# ---- programs


class Mean(th.nn.Module):
    """Features that show what the network was given, and logits."""

    def __init__(self, kind: str = "pair") -> None:
        super().__init__()
        self.kind = kind
        self.weight = th.nn.Parameter(th.tensor([[1.0, 2.0, 4.0]]))

    def forward(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return x.mean((2, 3)), x.sum((2, 3)) @ self.weight.T


class Maps(th.nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x * 2


class Wrong(th.nn.Module):
    def forward(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        return x, x, x


class Scalar(th.nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.sum()


class Whole(th.nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.mean((2, 3)).long()


class Named(th.nn.Module):
    def forward(self, x: th.Tensor) -> dict[str, th.Tensor]:
        return {"features": x}


class Saves(th.nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        th.save(x, "/tmp/never-written")
        return x


def scripted(module: th.nn.Module, path: Path) -> str:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        th.jit.script(module).save(str(path))
    return f"torchscript:{path}"


def exported(module: th.nn.Module, path: Path) -> str:
    free = dict.fromkeys((0, 2, 3), th.export.Dim.DYNAMIC)
    th.export.save(th.export.export(module, (th.rand(2, 3, 8, 8),), dynamic_shapes=(free,)), path)
    return f"export:{path}"


@pytest.mark.parametrize("save", [scripted, exported])
def test_programs_get_images_from_minus_one_to_one(tmp_path: Path, save: Callable[[th.nn.Module, Path], str]) -> None:
    extractor = make_extractor(save(Mean(), tmp_path / "mine.pt2"))
    assert (extractor.name, extractor.published) == ("mine", False)
    found, x = extractor(IMAGES), planes(IMAGES)
    np.testing.assert_allclose(found.pool, x.mean((2, 3)).numpy(), atol=1e-5)
    assert found.spatial is None
    assert found.probs is not None
    np.testing.assert_array_equal(found.probs, np.ones((3, 1)))
    check_batches(extractor, IMAGES)
    grey = extractor(RNG.integers(0, 256, (1, 5, 9, 1)).astype(np.uint8)).pool
    assert grey.shape == (1, 3)
    assert grey[0, 0] == grey[0, 1] == grey[0, 2]
    other = make_extractor(save(Maps(), tmp_path / "maps.pt2"))
    np.testing.assert_allclose(other(IMAGES).pool, 2 * found.pool, atol=1e-5)
    assert other(IMAGES).probs is None
    assert other.identity != extractor.identity


def test_what_programs_must_give_is_said(tmp_path: Path) -> None:
    path = tmp_path / "wrong.pt"
    for module, message in (
        (Wrong(), "gives 3 tensors: it must give features [N, D], or a pair"),
        (Scalar(), "gives a tensor [] of torch.float32"),
        (Whole(), "gives a tensor [3, 3] of torch.int64"),
        (Named(), "gives a dict"),
    ):
        extractor = make_extractor(scripted(module, path))
        assert message in sentence_of(extractor, IMAGES)
    with pytest.raises(ValueError, match=r"is not for .*wrong\.pt, which computes in what it was saved in"):
        make_extractor(f"torchscript:{path}", precision="bf16")


def test_a_program_for_one_batch_size_says_so(tmp_path: Path) -> None:
    path = tmp_path / "fixed.pt2"
    th.export.save(th.export.export(Mean(), (th.rand(2, 3, 8, 8),)), path)
    extractor = make_extractor(f"export:{path}")
    assert extractor(IMAGES[:2]).pool.shape == (2, 3)
    assert "a program must be exported for any N" in sentence_of(extractor, IMAGES)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], *more: tuple[str, bytes]) -> None:
    """The archive with changed members, and more."""
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
        top = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*members.items(), *((f"{top}/{name}", content) for name, content in more)]:
            archive.writestr(name, content)


def graph(change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    """What changes the graph of an exported program."""

    def apply(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        value = json.loads(content)
        change(value["graph_module"]["graph"])
        return json.dumps(value).encode()

    return apply


def unchanged(_: str, content: bytes) -> bytes:
    return content


class Attack:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_programs_that_would_do_more_than_compute_are_not_loaded(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert "its code has 'torch.save'" in sentence_of(make_extractor, scripted(Saves(), tmp_path / "saves.pt"))
    attack = io.BytesIO()
    th.save(Attack(mark), attack)

    def targets(value: Any) -> None:
        value["nodes"][0]["target"] = "torch.hub.load"

    def sizes(value: Any) -> None:
        spec = next(iter(value["tensor_values"].values()))["sizes"]
        spec[0] = {"as_expr": {"expr_str": f"open('{mark}', 'w')", "hint": {"as_int": 2}}}

    def pickled(name: str, content: bytes) -> bytes:
        return attack.getvalue() if name.endswith("sample_inputs/model.pt") else content

    def opaque(name: str, content: bytes) -> bytes:
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')

    cases: list[tuple[Callable[[str, bytes], bytes], tuple[tuple[str, bytes], ...], str]] = [
        (graph(targets), (), "the target 'torch.hub.load' is none of the operators"),
        (graph(sizes), (), "is no arithmetic"),
        (pickled, (), "it pickles more than tensors"),
        (opaque, (), "a tensor of another library's type"),
        (unchanged, (("data/constants/opaque_obj_0", pickle.dumps(Attack(mark))),), "it has the member"),
        (unchanged, (("data/aotinductor/model/a.so", b""),), "it has the member"),
    ]
    for change, more, message in cases:
        kind = exported(Mean(), tmp_path / "program.pt2")
        rewritten(tmp_path / "program.pt2", change, *more)
        told = sentence_of(make_extractor, kind)
        assert message in told
        assert "is no exported program" in told
    assert not mark.exists()


def test_damaged_programs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    th.save({}, path)
    whole = path.read_bytes()
    for kind in ("torchscript", "export"):
        assert "does not exist" in sentence_of(make_extractor, f"{kind}:{tmp_path}/nowhere")
        for content in (whole, whole[:100], b"", b"text"):
            path.write_bytes(content)
            assert "that may be run" in sentence_of(make_extractor, f"{kind}:{path}")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/version", b"1")
        archive.writestr("a/versiom", b"2")
    path.write_bytes(path.read_bytes().replace(b"a/versiom", b"a/version"))
    assert "two members of one name" in sentence_of(make_extractor, f"torchscript:{path}")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/0", bytes(2**27))
    assert "unpack to 134217728 bytes" in sentence_of(make_extractor, f"torchscript:{path}")


# ---- names


def test_kinds_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path))
    for kind, message in (
        ("incepton", "did you mean inception?"),
        ("xyz:file", "give inception, or classifier, torchscript, export, dinov2, clip and :PATH"),
        ("clip", "--features clip is without a file: write clip:PATH"),
        ("inception:file", "give it as --inception_weights"),
        ("inception", "scripts/download.py inception"),
    ):
        assert message in sentence_of(make_extractor, kind)
    assert "fp8" in sentence_of(make_extractor, "inception", precision="fp8")
    assert "is not used by" in sentence_of(make_extractor, "clip:file", weights="w.pth")
    assert next(iter(EXTRACTORS)) == "inception"


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    extractor = make_extractor(scripted(Maps(), tmp_path / "maps.pt"))
    for images in (IMAGES[0], IMAGES.astype(np.float32), IMAGES[:0], IMAGES[..., :2]):
        assert "features are made of uint8 [N, H, W, C]" in sentence_of(extractor, images)


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path) -> None:
    """Lines go to the test's own folder."""
    logger.configure(dir=str(tmp_path / "log"), format_strs=["stdout"])
