"""Features of every kind of network: what they are, that they do not depend on the batch, and what is refused."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from refusals import sentence_of

from guided_diffusion import logger
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.config import ClassifierConfig, UNetConfig
from guided_diffusion.data.crops import center_crop_arr
from guided_diffusion.evaluation.features import EXTRACTORS, fitted
from guided_diffusion.evaluation.inception import InceptionNetwork
from guided_diffusion.runtime.files import write_json
from guided_diffusion.script_util import build_classifier, build_unet
from guided_diffusion.training import checkpoints

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)


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


def save_run(folder: Path, config: Any, network: th.nn.Module) -> Path:
    """A folder as training writes it, the network's weights drawn anew so that none are zero."""
    folder.mkdir()
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for parameter in network.parameters():
            parameter.copy_(th.randn(parameter.shape, generator=generator) * 0.1)
    write_json(str(folder / "config.json"), {"flags": vars(config)})
    checkpoints.save(str(folder / "model000010.pt"), network.state_dict())
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
    extractor = extractor_named(f"classifier:{folder}")
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
    of_folder, of_file = (extractor_named(f"classifier:{path}") for path in (f"{folder}/", folder / "model000010.pt"))
    assert of_folder.name == "emoji8 classifier"
    assert of_file.name == "model000010 classifier"
    assert of_folder.identity == of_file.identity
    rounded = extractor_named(f"classifier:{folder}", precision="bf16")
    assert rounded.identity != of_folder.identity
    difference = np.abs(rounded(IMAGES).pool - of_folder(IMAGES).pool).max()
    assert 0 < difference < 0.1
    network.out[3].bias.data[0] += 1e-3
    (folder / "model000010.pt").unlink()
    checkpoints.save(str(folder / "model000010.pt"), network.state_dict())
    folder.rename(tmp_path / "classifier")
    other = extractor_named(f"classifier:{tmp_path}/classifier")
    assert other.identity != of_folder.identity
    assert other.name == "classifier"


def test_images_of_another_size_are_cropped_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = classifier_run(tmp_path / "small")
    extractor = extractor_named(f"classifier:{folder}")
    wide = RNG.integers(0, 256, (2, 20, 33, 3)).astype(np.uint8)
    cropped = np.stack([center_crop_arr(Image.fromarray(image), 8) for image in wide])
    logger.configure(dir=str(tmp_path / "log"), format_strs=["stdout"])
    np.testing.assert_array_equal(extractor(wide).pool, extractor(cropped).pool)
    extractor(wide[:1])
    said = "images of 20x33 are scaled and cropped to 8x8, as in the training of the small classifier"
    assert capsys.readouterr().out.count(said) == 1
    check_batches(extractor, wide)


def test_colours_are_fitted_as_in_training() -> None:
    grey = fitted(IMAGES, (8, 8), 1)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in IMAGES])
    np.testing.assert_array_equal(grey[..., 0], expected)
    coloured = fitted(grey, (8, 8), 3)
    np.testing.assert_array_equal(coloured, grey.repeat(3, axis=-1))
    assert fitted(IMAGES, (8, 8), 3) is IMAGES


def test_a_grey_classifier_takes_coloured_images(tmp_path: Path) -> None:
    folder, network = classifier_run(tmp_path / "grey", image_channels=1, image_size=8)
    found = extractor_named(f"classifier:{folder}")(IMAGES[..., :1].repeat(3, axis=-1))
    with th.no_grad():
        expected = network(planes(IMAGES[..., :1]), th.zeros(3)).softmax(1)
    assert found.probs is not None
    th.testing.assert_close(th.from_numpy(found.probs), expected)


def test_the_identity_of_a_classifier_stays_what_references_have_recorded(tmp_path: Path) -> None:
    """Of a network whose weights are all zero."""
    folder, network = classifier_run(tmp_path / "emoji8")
    (folder / "model000010.pt").unlink()
    zeros = {name: th.zeros_like(value) for name, value in network.state_dict().items()}
    checkpoints.save(str(folder / "model000010.pt"), zeros)
    assert extractor_named(f"classifier:{folder}").identity == "classifier 448252946f862c81 1"


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    config = UNetConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1", attention_resolutions="8")
    folder = save_run(tmp_path / "unet", config, build_unet(config, learn_sigma=False))
    told = sentence_of(extractor_named, f"classifier:{folder}")
    assert "--features classifier" in told
    assert "is a diffusion model: give the checkpoint of a classifier there" in told
    assert "does not exist" in sentence_of(extractor_named, f"classifier:{tmp_path}/nowhere")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04")
    assert "cannot be read as a checkpoint" in sentence_of(extractor_named, f"classifier:{tmp_path}/torn.pt")


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


@pytest.mark.slow
def test_inception_gives_what_the_published_evaluator_compares(inception: tuple[Path, InceptionNetwork]) -> None:
    path, network = inception
    extractor = extractor_named(f"inception:{path}")
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
    rounded = extractor_named("inception", weights=str(path), precision="bf16")
    assert rounded.identity != extractor.identity
    grey = rounded(IMAGES[:1, ..., :1]).pool
    np.testing.assert_array_equal(grey, rounded(IMAGES[:1, ..., :1].repeat(3, axis=-1)).pool)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    "size": {"shortest_edge": 30},
    "resample": 3,
    "crop_size": {"height": 28, "width": 28},
    "rescale_factor": 1 / 255,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}


def tiny(kind: str) -> Any:
    """A small network with random weights."""
    import transformers as hf

    th.manual_seed(0)
    if kind == "dinov2":
        return hf.Dinov2Model(hf.Dinov2Config(**SMALL))
    if kind == "dinov2_with_registers":
        return hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=2))
    vision = {**SMALL, "intermediate_size": 64}
    if kind == "clip":
        return hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=24))
    return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**vision, projection_dim=24))


def saved(kind: str, folder: Path, **preprocessing: Any) -> Any:
    network = tiny(kind).eval()
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSING, **preprocessing}))
    return network


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the network for anything fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("something connects to the internet")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    ("kind", "flag", "folder", "name"),
    [
        ("dinov2", "dinov2", "small", "DINOv2 small"),
        ("dinov2_with_registers", "dinov2", "dinov2-small-registers", "dinov2-small-registers"),
        ("clip", "clip", "small", "CLIP small"),
        ("clip_vision_model", "clip", "CLIP-vision", "CLIP-vision"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_features_are_those_of_transformers(tmp_path: Path, kind: str, flag: str, folder: str, name: str) -> None:
    network = saved(kind, tmp_path / folder)
    extractor = extractor_named(f"{flag}:{tmp_path / folder}")
    assert (extractor.name, extractor.published) == (name, False)
    wide = RNG.integers(0, 256, (3, 40, 60, 3)).astype(np.uint8)
    found = extractor(wide)
    assert (found.spatial, found.probs) == (None, None)
    scaled = [Image.fromarray(image).resize((45, 30), Image.Resampling.BICUBIC) for image in wide]
    pixels = np.stack([np.asarray(image)[1:29, 8:36] for image in scaled])
    x = (th.from_numpy(pixels) / 255 - th.tensor([0.4, 0.5, 0.6])) / th.tensor([0.2, 0.25, 0.3])
    with th.no_grad():
        if flag == "dinov2":
            expected = network(x.movedim(-1, 1)).pooler_output
        elif kind == "clip":
            expected = network.visual_projection(network.vision_model(x.movedim(-1, 1)).pooler_output)
        else:
            expected = network(x.movedim(-1, 1)).image_embeds
    np.testing.assert_allclose(found.pool, expected.numpy(), rtol=1e-4, atol=1e-4)
    x = th.from_numpy(wide).movedim(-1, 1) / 127.5 - 1
    near = extractor.differentiable(x.requires_grad_())
    assert np.abs(near.detach().numpy() - found.pool).max() < 0.05 * np.abs(found.pool).max()  # pixels are not rounded
    assert th.autograd.grad(near.sum(), x)[0].isfinite().all()
    check_batches(extractor, wide)
    grey = extractor(wide[..., :1])
    np.testing.assert_array_equal(grey.pool, extractor(wide[..., :1].repeat(3, axis=-1)).pool)


def test_transformers_are_known_by_weights_preprocessing_and_precision(tmp_path: Path) -> None:
    saved("dinov2", tmp_path / "a")
    saved("dinov2", tmp_path / "b")
    saved("dinov2", tmp_path / "c", image_mean=[0.4, 0.5, 0.7])
    first, same, other = (extractor_named(f"dinov2:{tmp_path / name}") for name in "abc")
    rounded = extractor_named(f"dinov2:{tmp_path / 'a'}", precision="bf16")
    assert first.identity == same.identity
    assert len({first.identity, other.identity, rounded.identity}) == 3
    assert 0 < np.abs(rounded(IMAGES).pool - first(IMAGES).pool).max() < 0.1


@pytest.mark.usefixtures("offline")
def test_folders_that_transformers_cannot_use_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dino, clip, empty = tmp_path / "dino", tmp_path / "clip", tmp_path / "empty"
    saved("dinov2", dino)
    saved("clip", clip)
    empty.mkdir()
    told = {
        f"dinov2:{tmp_path}/nowhere": "give a folder with config.json, preprocessor_config.json and model.safetensors",
        "clip:openai/clip-vit-base-patch32": "give a folder with config.json",
        f"dinov2:{dino / 'model.safetensors'}": "give a folder with config.json",
        f"dinov2:{clip}": "its config.json is of a model_type 'clip', not DINOv2",
        f"clip:{dino}": "its config.json is of a model_type 'dinov2', not CLIP",
        f"clip:{empty}": "config.json",
    }
    for kind, words in told.items():
        message = sentence_of(extractor_named, kind)
        assert message.startswith(f"--features {kind} cannot be used: ")
        assert words in message
    weights = safetensors.torch.load_file(dino / "model.safetensors")
    fewer = {name: value for name, value in weights.items() if name != "layernorm.weight"}
    for changed in (fewer, {**weights, "layernorm.weight": th.zeros(3)}):
        safetensors.torch.save_file(changed, dino / "model.safetensors", {"format": "pt"})
        told_missing = "1 of its tensors are missing or of another shape, the first is layernorm.weight"
        assert told_missing in sentence_of(extractor_named, f"dinov2:{dino}")
    (dino / "model.safetensors").write_bytes(b"cut short")
    assert "cannot be used" in sentence_of(extractor_named, f"dinov2:{dino}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        message = sentence_of(extractor_named, f"clip:{clip}")
    assert 'transformers is missing: run `pip install "guided-diffusion[eval]"`' in message


class Attack:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_code_in_a_folder_never_runs(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    code = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoImageProcessor": "own.Processor"}
    for changed in (config, {**config, "model_type": "own"}):
        (tmp_path / "config.json").write_text(json.dumps({**changed, "auto_map": code}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSING, "auto_map": code}))
        if changed is config:
            extractor_named(f"dinov2:{tmp_path}")
        else:
            sentence_of(extractor_named, f"dinov2:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    (tmp_path / "model.safetensors").unlink()
    th.save({"layernorm.weight": Attack(tmp_path / "mark")}, tmp_path / "pytorch_model.bin")
    sentence_of(extractor_named, f"dinov2:{tmp_path}")
    assert not (tmp_path / "mark").exists()


def test_kinds_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path))
    for kind, message in (
        ("incepton", "did you mean inception?"),
        ("xyz:file", "give inception, or dinov2, clip, classifier and :PATH"),
        ("clip", "--features clip needs a path: write clip:PATH"),
        ("inception:file", "'file' does not exist"),
        ("inception", "scripts/download.py inception"),
    ):
        assert message in sentence_of(extractor_named, kind)
    for kind in ("clip:file", "inception:file"):
        assert "is not used by" in sentence_of(extractor_named, kind, weights="w.pth")
    assert next(iter(EXTRACTORS)) == "inception"


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    folder, _ = classifier_run(tmp_path / "small")
    extractor = extractor_named(f"classifier:{folder}")
    for images in (IMAGES[0], IMAGES.astype(np.float32), IMAGES[:0], IMAGES[..., :2]):
        assert "features are made of uint8 [N, H, W, C]" in sentence_of(extractor, images)


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path) -> None:
    """Lines go to the test's own folder."""
    logger.configure(dir=str(tmp_path / "log"), format_strs=["stdout"])
