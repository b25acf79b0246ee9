"""Conditioning images: the network that sees them, their pairs with images, and the way through train and sample."""

from __future__ import annotations

import json
import random
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from few import few
from PIL import Image
from runs import PROCESS, SAMPLING, scrambled, write_run
from test_docs import ROOT, run as run_code, snippets

from guided_diffusion.commands import classifier_sample, flags as cli, image_nll, image_sample, image_train
from guided_diffusion.commands.common import restore
from guided_diffusion.commands.conditioning import drawn
from guided_diffusion.config import ClassifierConfig, UNetConfig
from guided_diffusion.data.conditioning import CondKind, Pairing, cond_kind
from guided_diffusion.data.crops import center_crop_arr, random_crop_arr
from guided_diffusion.data.sources import UnreadableImage, find_images, read_ids
from guided_diffusion.image_datasets import ImageDataset, ImageStream, load_data
from guided_diffusion.runtime.npz import save_npz
from guided_diffusion.runtime.seeds import image_generator
from guided_diffusion.sampling.guidance import classifier_free
from guided_diffusion.sampling.samplers import make_sampler
from guided_diffusion.script_util import build_classifier, build_unet
from guided_diffusion.training import finetuning

SIDE = 8
NETWORK: dict[str, Any] = {
    "image_size": SIDE,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "4",
    "num_classes": 3,
}
KINDS = {"image": CondKind("image", 3), "mask": CondKind("mask", 1), "classes": CondKind("classes", 5)}
SIZES = [(20, 31), (40, 17), (12, 12), (9, 30)]


def config(**flags: Any) -> UNetConfig:
    return UNetConfig(**{**NETWORK, **flags})


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write_pairs(root: Path, kind: str, count: int = 6) -> tuple[Path, Path]:
    """A folder of pictures and one of what belongs to them: told from the same pixels, where that can be."""
    for index in range(count):
        image = picture(*SIZES[index % len(SIZES)], index)
        cond = {
            "image": image,
            "mask": np.where(image[..., 0] > 100, 255, 0).astype(np.uint8),
            "classes": (image[..., 0] // 60).astype(np.uint8),
        }[kind]
        for folder, array, suffix in (("images", image, "bmp"), ("conds", cond, "png")):
            path = root / folder / "ab"[index % 2] / f"{'cat dog owl'.split()[index % 3]}_{index}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return root / "images", root / "conds"


@pytest.fixture(scope="module", params=KINDS)
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CondKind, Path, Path]:
    return KINDS[request.param], *write_pairs(tmp_path_factory.mktemp(request.param), request.param)


def opened(images: Path, pairing: Pairing | None, **options: Any) -> ImageStream:
    keywords = {"batch_size": 2, "image_size": SIDE, "log": lambda _: None, "seed": 5, **options}
    return load_data(data_dir=str(images), pairing=pairing, **keywords)


def test_flags_that_contradict_each_other_are_refused() -> None:
    assert cond_kind("", 0, 3) is None
    assert cond_kind("image", 0, 4) == CondKind("image", 4)
    assert cond_kind("image", 1, 3) == CondKind("image", 1)
    assert cond_kind("mask", 0, 3) == cond_kind("mask", 1, 3) == CondKind("mask", 1)
    for words, told in (
        (("", 3, 3), "no effect without cond_type"),
        (("classes", 0, 3), "number of classes"),
        (("mask", 3, 3), "contradicts cond_type mask"),
        (("maks", 0, 3), "did you mean mask"),
    ):
        with pytest.raises(ValueError, match=told):
            cond_kind(*words)


def test_conditioning_is_further_inputs_of_the_first_convolution_and_nothing_else() -> None:
    plain, seen = build_unet(config(), False), build_unet(config(cond_type="classes", cond_channels=5), False)
    assert type(plain).__name__ == "UNetModel"
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (plain, seen)]
    assert shapes[1] == shapes[0] | {"input_blocks.0.0.weight": (32, 8, 3, 3)}
    assert list(shapes[0]) == list(shapes[1])


def test_a_network_that_does_not_look_is_the_plain_one() -> None:
    plain = scrambled(build_unet(config(), False))
    seen = build_unet(config(cond_type="image"), False).eval()
    state = plain.state_dict()
    first = state["input_blocks.0.0.weight"]
    seen.load_state_dict({**state, "input_blocks.0.0.weight": th.cat([first, th.zeros_like(first)], dim=1)})
    x, t = th.randn(2, 3, SIDE, SIDE), th.tensor([3, 30])
    cond = th.randn(2, 3, SIDE, SIDE)
    assert th.allclose(seen(x, t, cond_image=cond), plain(x, t), atol=1e-6)
    looking = scrambled(build_unet(config(cond_type="image"), False))
    assert not th.allclose(looking(x, t, cond_image=cond), looking(x, t, cond_image=-cond), atol=1e-3)


@pytest.mark.parametrize("flags", [{}, {"cond_channels": 1}])
def test_fine_tuning_from_a_plain_network_starts_where_it_ended(flags: dict[str, Any], tmp_path: Path) -> None:
    plain = scrambled(build_unet(config(), True))
    write_run(tmp_path / "plain", "image_train", plain, config(), PROCESS)
    seen = build_unet(config(cond_type="image", **flags), True).eval()
    finetuning.initialise(seen, finetuning.open_source(str(tmp_path / "plain")), mismatch="inflate")
    x, t = th.randn(2, 3, SIDE, SIDE), th.tensor([3, 30])
    cond = th.randn(2, flags.get("cond_channels", 3), SIDE, SIDE)
    assert th.allclose(seen(x, t, cond_image=cond), plain(x, t), atol=1e-5)


def test_what_is_no_conditioning_image_is_refused() -> None:
    model = build_unet(config(cond_type="mask"), False)
    x, t = th.zeros(2, 3, SIDE, SIDE), th.zeros(2)
    with pytest.raises(ValueError, match=r"cond_image must be of shape .* got none"):
        model(x, t)
    for shape in ((2, 3, SIDE, SIDE), (1, 1, SIDE, SIDE), (2, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"must be of shape \(2, 1, 8, 8\)"):
            model(x, t, cond_image=th.zeros(shape))


def test_nearest_pixels_are_those_at_the_same_place() -> None:
    """Each row and column of the result is the source's at its middle, however often it would have been halved."""
    height, width = 67, 130
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    for size in ((8, 8), (16, 8), (100, 100)):
        where = np.stack([rows, columns], -1).astype(np.float32)
        found = center_crop_arr(where, size, nearest=True)
        assert found.shape == (*size, 2)
        assert (found == np.rint(found)).all()
        smooth = center_crop_arr(where, size)
        # not off by more than half of what a pixel of the result covers
        covered = max(1.0, height / size[0] / 2 + 1)
        assert np.abs(found - smooth)[2:-2, 2:-2].max() <= covered


def test_masks_and_maps_keep_their_values(pairs: tuple[CondKind, Path, Path]) -> None:
    kind, _, conds = pairs
    for path in sorted(conds.rglob("*.png")):
        seen = kind.load(str(path), SIDE)
        assert seen.shape == (kind.channels, SIDE, SIDE)
        assert seen.dtype == np.float32
        if kind.name == "image":
            crop = center_crop_arr(Image.open(path), SIDE).astype(np.float32) / 127.5 - 1
            assert np.array_equal(seen, crop.transpose(2, 0, 1))
        else:
            assert set(np.unique(seen)) <= {0.0, 1.0}
        if kind.name == "classes":
            assert np.array_equal(seen.sum(axis=0), np.ones((SIDE, SIDE)))
            whole = np.asarray(Image.open(path)).astype(np.float32)[..., None]
            assert np.array_equal(seen.argmax(axis=0), center_crop_arr(whole, SIDE, nearest=True)[..., 0])


def test_maps_are_numbers_in_whatever_file(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 200, (6, 9)).astype(np.uint8)
    grey = Image.fromarray(ids)
    coloured = Image.new("P", (9, 6))
    coloured.putdata(ids.ravel().tolist())
    coloured.putpalette([(7 * value) % 256 for value in range(768)])
    grey.save(tmp_path / "grey.png")
    coloured.save(tmp_path / "palette.png")
    Image.fromarray(ids.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    np.save(tmp_path / "array.npy", ids.astype(np.int64))
    for name, factor in (("grey.png", 1), ("palette.png", 1), ("deep.png", 300), ("array.npy", 1)):
        assert np.array_equal(read_ids(str(tmp_path / name))[..., 0], ids.astype(np.float32) * factor)
    grey.save(tmp_path / "lossy.jpg")
    grey.convert("RGB").save(tmp_path / "colours.png")
    np.save(tmp_path / "floats.npy", ids / 2)
    for name, told in (("lossy.jpg", "JPEG"), ("colours.png", "mode RGB"), ("floats.npy", "float64")):
        with pytest.raises(UnreadableImage, match=told):
            read_ids(str(tmp_path / name))


def test_what_cannot_be_meant_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "dark.png")
    Image.fromarray(np.full((4, 4), 5, np.uint8)).save(tmp_path / "five.png")
    Image.fromarray(np.array([[0, 255], [4, 4]], np.uint8)).save(tmp_path / "void.png")
    with pytest.raises(UnreadableImage, match=r"dark.png.*16 values from 0 to 15, all on one side of 127.5"):
        KINDS["mask"].read(str(tmp_path / "dark.png"))
    with pytest.raises(UnreadableImage, match=r"five.png.*class 5 in a map.*0 .. 4, and 255 for none"):
        KINDS["classes"].read(str(tmp_path / "five.png"))
    void = KINDS["classes"].load(str(tmp_path / "void.png"), 2)
    assert void.sum(axis=0).tolist() == [[1, 0], [1, 1]]
    assert KINDS["mask"].load(str(tmp_path / "void.png"), 2)[0].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("random_crop", [False, True])
def test_the_same_crop_and_flip_as_the_image(tmp_path: Path, random_crop: bool) -> None:
    """Where the conditioning image is the image itself, the network sees the same numbers, whatever was drawn."""
    images, conds = write_pairs(tmp_path, "image")
    flips = set()
    for deterministic in (True, False):
        options: dict[str, Any] = {"random_crop": random_crop, "deterministic": deterministic}
        stream = opened(images, Pairing(str(conds), KINDS["image"]), **options)
        plain = opened(images, None, **options)
        for _ in range(12):
            (batch, cond), (alone, nothing) = next(stream), next(plain)
            assert th.equal(cond["cond_image"], batch)
            assert th.equal(batch, alone)  # and the images are those of a data set without
            assert nothing == {}
            flips.add(batch.sum(dim=(1, 2)).argmax().item())
    assert len(flips) > 1


@pytest.mark.parametrize("kind", ["mask", "classes"])
def test_masks_and_maps_lie_where_the_image_lies(tmp_path: Path, kind: str) -> None:
    """As the image under nearest pixels by the same draws: (seed, epoch, index)."""
    images, conds = write_pairs(tmp_path, kind)
    stream = opened(images, Pairing(str(conds), KINDS[kind]), random_crop=True, deterministic=True)
    listing = find_images(str(images))
    for batch in range(9):
        _, cond = next(stream)
        for row in range(2):
            epoch, index = divmod(2 * batch + row, 6)
            draws = random.Random(f"5/{epoch}/{index}")
            whole = np.asarray(Image.open(listing.path(listing.images[index]))).astype(np.float32)
            crop = random_crop_arr(whole, SIDE, rng=draws, nearest=True)
            crop = crop[:, ::-1] if draws.random() < 0.5 else crop
            expected = (
                (crop[..., 0] > 100)[None] if kind == "mask" else np.arange(5)[:, None, None] == crop[..., 0] // 60
            )
            assert np.array_equal(cond["cond_image"][row], expected)


def test_pairs_do_not_depend_on_ranks_workers_or_zips(tmp_path: Path) -> None:
    images, conds = write_pairs(tmp_path, "mask")
    for folder in (images, conds):
        with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
            for path in folder.rglob("*.*"):
                archive.write(path, path.relative_to(folder))

    def take(suffix: str = "", **options: Any) -> list[th.Tensor]:
        pairing = Pairing(f"{conds}{suffix}", KINDS["mask"], dropout=0.5)
        stream = opened(Path(f"{images}{suffix}"), pairing, random_crop=True, **options)
        return [next(stream)[1]["cond_image"] for _ in range(6)]

    whole = th.cat(take())
    assert th.equal(th.cat(take(".zip", num_workers=1)), whole)
    ranks = [take(rank=rank, world_size=2, batch_size=1) for rank in range(2)]
    assert th.equal(th.cat([part for pair in zip(*ranks, strict=True) for part in pair]), whole)
    dropped = (whole == 0).flatten(1).all(dim=1)
    assert 0 < dropped.sum() < len(whole)


def test_dropping_makes_zeros_at_its_rate_and_changes_nothing_else(tmp_path: Path) -> None:
    images, conds = write_pairs(tmp_path, "classes")

    def items(dropout: float) -> list[tuple[Any, Any]]:
        partners = Pairing(str(conds), KINDS["classes"], dropout=dropout).match(
            find_images(str(images)), lambda _: None
        )[1]
        listing = find_images(str(images))
        dataset = ImageDataset(
            SIDE, [listing.path(name) for name in listing.images], random_crop=True, partners=partners
        )
        return [dataset[epoch, index] for epoch in range(40) for index in range(6)]

    kept, some, none = items(0.0), items(0.25), items(1.0)
    dropped = [not cond["cond_image"].any() for _, cond in some]
    assert np.mean(dropped) == pytest.approx(0.25, abs=0.08)
    for index, gone in enumerate(dropped):
        assert np.array_equal(some[index][0], kept[index][0])
        assert gone or np.array_equal(some[index][1]["cond_image"], kept[index][1]["cond_image"])
        assert not none[index][1]["cond_image"].any()


def test_partners_are_found_by_name_and_what_has_none_is_counted(tmp_path: Path) -> None:
    images, conds = write_pairs(tmp_path, "mask")
    (conds / "a" / "cat_0.png").unlink()
    for name in ("x", "y"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(conds / f"{name}.png")
    pairing = Pairing(str(conds), KINDS["mask"])
    with pytest.raises(ValueError, match="1 of 6 images have no conditioning image") as caught:
        opened(images, pairing)
    for word in ("'a/cat_0.bmp'", "2 of 7 conditioning images have no image ('x.png', 'y.png')", "skip_unpaired"):
        assert word in str(caught.value)
    lines: list[str] = []
    stream = opened(images, Pairing(str(conds), KINDS["mask"], skip_unpaired=True), log=lines.append, class_cond=True)
    assert any("left out: 1 of 6 images" in line and "2 of 7" in line for line in lines)
    assert len(stream.dataset) == 5
    assert [Path(path).stem for path in stream.dataset.local_images] == [
        Path(path).stem for path in stream.dataset.partners.paths
    ]
    assert stream.class_table() == [(0, "a", 2), (1, "b", 3)]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(conds / "x.bmp")
    with pytest.raises(ValueError, match=r"'x.bmp' and 'x.png' in .* differ in the extension alone"):
        opened(images, pairing)
    (tmp_path / "other").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "other" / "z.png")
    with pytest.raises(ValueError, match="names must agree"):
        opened(images, Pairing(str(tmp_path / "other"), KINDS["mask"], skip_unpaired=True))


def test_a_partner_that_cannot_be_read_counts_as_its_image(tmp_path: Path) -> None:
    images, conds = write_pairs(tmp_path, "mask")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(conds / "a" / "dog_4.png")
    pairing = Pairing(str(conds), KINDS["mask"])
    with pytest.raises(ValueError, match=r"conds/a/dog_4.png.*it is 4x4 and its image 20x31"):
        next(opened(images, pairing, batch_size=6))
    stream = opened(images, pairing, batch_size=6, on_bad_image="skip")
    next(stream)
    assert list(stream.skipped) == [str(conds / "a" / "dog_4.png")]


def train(folder: Path, kind: str, *words: str, **flags: Any) -> None:
    given = {
        **{name: value for name, value in NETWORK.items() if name != "num_classes"},
        "batch_size": 2,
        "max_steps": 1,
        "num_workers": 0,
        "diffusion_steps": 40,
        "ema_rate": "0.5",
        "cond_type": kind,
        "log_dir": str(folder),
        **flags,
    }
    image_train.main([*[f"--{name}={value}" for name, value in given.items()], *words])


def refusal(capsys: pytest.CaptureFixture[str], main: Any, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def samples_in(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("pairs", few(KINDS, ["mask"]), indirect=True)
def test_from_training_to_samples(pairs: tuple[CondKind, Path, Path], tmp_path: Path) -> None:
    kind, images, conds = pairs
    run = tmp_path / "run"
    flags = {"data_dir": images, "cond_dir": conds, "cond_channels": kind.channels, "cond_dropout": 0.3}
    flags |= {"val_data_dir": images, "val_cond_dir": conds, "val_interval": 1, "sample_interval": 1}
    train(run, kind.name, **flags, class_cond=True, num_classes=3, class_from="filename")
    saved = json.loads((run / "config.json").read_text())["flags"]
    assert (saved["cond_type"], saved["null_cond"], saved["null_class"]) == (kind.name, True, False)
    for name in ("000001.png", "images.png", "cond_images.png"):
        assert (run / "previews" / name).stat().st_size > 0
    train(run, kind.name, resume_checkpoint=run, max_steps=2)  # knows where its conditioning images are

    sampling = ["--model_path", str(run), "--cond_images", str(conds), "--timestep_respacing", "3", "--batch_size", "4"]
    image_sample.main([*sampling, "--log_dir", str(tmp_path / "s"), "--classes", "0,2,1", "--save_images", "True"])
    found = samples_in(tmp_path / "s")
    listing = find_images(str(conds))
    assert found["arr_1"].tolist() == [0, 2, 1] * 2
    assert json.loads((tmp_path / "s" / "names.json").read_text())["names"] == listing.images
    assert (tmp_path / "s" / "images" / "b" / "cat_3.png").exists()

    model = restore(cli.parse("image_sample", sampling))
    rows = []
    for first in (0, 4):
        indices = range(first, first + 4)
        seen = np.stack([kind.load(listing.path(listing.images[min(index, 5)]), SIDE) for index in indices])
        x = model.process.sample_loop(
            make_sampler("ddpm"),
            model.network,
            (4, 3, SIDE, SIDE),
            generator=[image_generator(0, index) for index in indices],
            model_kwargs={
                "cond_image": th.from_numpy(seen),
                "y": th.tensor([[0, 2, 1][index % 3] for index in indices]),
            },
        )
        rows.append(((x + 1) * 127.5).clamp(0, 255).to(th.uint8).movedim(1, -1).numpy())
    assert np.array_equal(found["arr_0"], np.concatenate(rows)[:6])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks with random weights, as training leaves them, and masks for them."""
    root = tmp_path_factory.mktemp("trained")
    write_pairs(root, "mask")
    for name, flags in {
        "plain": {"cond_type": "mask"},
        "labelled": {"cond_type": "mask", "class_cond": True},
        "free": {"cond_type": "mask", "null_cond": True},
        "blind": {"class_cond": True},
    }.items():
        write_run(root / name, "image_train", scrambled(build_unet(config(**flags), True)), config(**flags), PROCESS)
    return root


@pytest.mark.slow
def test_samples_follow_their_conditioning_images_for_any_source(trained: Path, tmp_path: Path) -> None:
    listing = find_images(str(trained / "conds"))
    seen = np.stack([KINDS["mask"].load(listing.path(name), SIDE) for name in listing.images])
    save_npz(str(tmp_path / "masks.npz"), (seen[:, 0] * 255).astype(np.uint8), np.array([2, 1, 0, 2, 1, 0]))
    base = ["--model_path", str(trained / "labelled"), "--timestep_respacing", "3", "--batch_size", "3", "--seed", "4"]

    def sampled(name: str, *words: str) -> dict[str, np.ndarray]:
        image_sample.main([*base, "--log_dir", str(tmp_path / name), *words])
        return samples_in(tmp_path / name)

    arrays = sampled("arrays", "--cond_images", str(tmp_path / "masks.npz"))
    assert arrays["arr_1"].tolist() == [2, 1, 0, 2, 1, 0]
    files = sampled("files", "--cond_images", str(trained / "conds"), "--classes", "2,1,0")
    assert np.array_equal(files["arr_0"], arrays["arr_0"])
    first = sampled("first", "--cond_images", str(trained / "conds"), "--num_samples", "3", "--classes", "2,1,0")
    assert np.array_equal(first["arr_0"], arrays["arr_0"][:3])
    alone = str(trained / "conds" / listing.images[0])
    one = sampled("one", "--cond_images", alone, "--classes", "2", "--batch_size", "3")
    assert np.array_equal(one["arr_0"][0], arrays["arr_0"][0])


def test_another_conditioning_image_is_another_request(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model_path", str(trained / "plain"), "--timestep_respacing", "2", "--log_dir", str(tmp_path / "s")]
    masks = np.zeros((2, SIDE, SIDE, 1), np.uint8)
    for number in range(2):
        masks[number, :4] = 255
        save_npz(str(tmp_path / f"{number}.npz"), masks)
    image_sample.main([*base, "--cond_images", str(tmp_path / "0.npz")])
    before = samples_in(tmp_path / "s")["arr_0"]
    assert "cond_images was" in refusal(capsys, image_sample.main, *base, "--cond_images", str(tmp_path / "1.npz"))
    assert np.array_equal(samples_in(tmp_path / "s")["arr_0"], before)


def test_guidance_hides_the_conditioning_image(trained: Path, tmp_path: Path) -> None:
    words = ["--model_path", str(trained / "free"), "--timestep_respacing", "3", "--batch_size", "6"]
    model = restore(cli.parse("image_sample", words))
    x, t, cond = th.randn(2, 3, SIDE, SIDE), th.tensor([3, 30]), (th.rand(2, 1, SIDE, SIDE) > 0.5).float()
    seen, hidden = (model.network(x, t, cond_image=image) for image in (cond, th.zeros_like(cond)))
    guided = classifier_free(model.network, 3.0)(x, t, cond_image=cond)
    assert th.allclose(guided[:, :3], hidden[:, :3] + 3 * (seen - hidden)[:, :3], atol=1e-5)
    assert th.allclose(classifier_free(model.network, 0.0)(x, t, cond_image=cond), hidden, atol=1e-6)
    with pytest.raises(ValueError, match="needs conditioning images"):
        classifier_free(model.network, 3.0)(x, t)

    image_sample.main(
        [*words, "--cond_images", str(trained / "conds"), "--cfg_scale", "0", "--log_dir", str(tmp_path / "none")]
    )
    found = samples_in(tmp_path / "none")["arr_0"]
    save_npz(str(tmp_path / "black.npz"), np.zeros((6, SIDE, SIDE), np.uint8))
    image_sample.main([*words, "--cond_images", str(tmp_path / "black.npz"), "--log_dir", str(tmp_path / "black")])
    assert np.abs(samples_in(tmp_path / "black")["arr_0"].astype(int) - found).max() <= 1


def test_both_label_and_conditioning_image_are_hidden_where_the_network_knows_both() -> None:
    model = scrambled(build_unet(config(cond_type="mask", null_cond=True, class_cond=True, null_class=True), False))
    x, t, cond, y = th.randn(2, 3, SIDE, SIDE), th.tensor([3, 30]), th.ones(2, 1, SIDE, SIDE), th.tensor([0, 2])
    seen = model(x, t, y, cond_image=cond)
    hidden = model(x, t, th.full_like(y, 3), cond_image=th.zeros_like(cond))
    guided = classifier_free(model, 2.0)(x, t, y=y, cond_image=cond)
    assert th.allclose(guided, 2 * seen - hidden, atol=1e-5)


@pytest.mark.slow
def test_a_classifier_guides_too(trained: Path, tmp_path: Path) -> None:
    settings = ClassifierConfig(
        image_size=SIDE,
        num_classes=3,
        classifier_width=32,
        classifier_depth=1,
        classifier_channel_mult="1,2",
        classifier_attention_resolutions="4",
    )
    write_run(tmp_path / "c", "classifier_train", scrambled(build_classifier(settings)), settings, PROCESS)
    words = ["--classifier_path", str(tmp_path / "c"), "--model_path", str(trained / "plain"), *SAMPLING[2:]]
    words += ["--cond_images", str(trained / "conds"), "--classes", "1", "--num_samples", "3"]
    for scale in ("0", "40"):
        classifier_sample.main([*words, "--classifier_scale", scale, "--log_dir", str(tmp_path / scale)])
    assert not np.array_equal(samples_in(tmp_path / "0")["arr_0"], samples_in(tmp_path / "40")["arr_0"])
    assert samples_in(tmp_path / "40")["arr_1"].tolist() == [1, 1, 1]


def test_likelihoods_are_measured_with_them(trained: Path, tmp_path: Path) -> None:
    words = ["--model_path", str(trained / "plain"), "--data_dir", str(trained / "images"), "--batch_size", "3"]
    words += ["--timestep_respacing", "3", "--log_dir", str(tmp_path / "nll")]
    image_nll.main([*words, "--cond_dir", str(trained / "conds")])
    assert any((tmp_path / "nll").iterdir())


def test_flags_of_no_effect_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, conds = str(trained / "images"), str(trained / "conds")
    data = ["--data_dir", images, "--log_dir", str(tmp_path / "t")]
    for words, told in (
        (["--cond_dir", conds], "--cond_dir has no effect without --cond_type"),
        (["--cond_type", "mask"], "give --cond_dir"),
        (["--cond_type", "mask", "--cond_dir", conds, "--val_data_dir", images], "give --cond_dir, and --val_cond_dir"),
        (["--cond_type", "classes", "--cond_dir", conds], "give cond_channels"),
        (["--cond_type", "maks", "--cond_dir", conds], "did you mean mask?"),
        (["--cond_type", "mask", "--cond_dir", conds, "--cond_dropout", "1.5"], "above the greatest value"),
    ):
        assert told in refusal(capsys, image_train.main, *data, *words)
    assert not list((tmp_path / "t").glob("*.pt"))

    save_npz(str(tmp_path / "deep.npz"), np.zeros((2, SIDE, SIDE, 4), np.uint8))
    save_npz(str(tmp_path / "line.npz"), np.zeros(SIDE, np.float32))
    model = ["--timestep_respacing", "2", "--log_dir", str(tmp_path / "s")]
    for name, words, told in (
        ("plain", [], "give --cond_images"),
        (
            "blind",
            ["--cond_images", conds],
            "no effect without --cond_type, and the checkpoint",
        ),
        ("plain", ["--cond_images", str(tmp_path / "no")], "does not exist"),
        ("plain", ["--cond_images", conds, "--num_samples", "7"], "--num_samples 7 is more than the"),
        ("plain", ["--cond_images", str(tmp_path / "deep.npz")], "(8, 8, 4), where masks are [H, W]"),
        ("plain", ["--cond_images", str(tmp_path / "line.npz")], "an array of shape (8,), where"),
        ("plain", ["--cond_images", conds, "--cfg_scale", "2"], "without --cond_dropout"),
    ):
        assert told in refusal(capsys, image_sample.main, "--model_path", str(trained / name), *model, *words)


def test_samples_in_training_are_for_the_images_whose_labels_they_have(tmp_path: Path) -> None:
    from guided_diffusion.commands.evaluation import evaluation_job

    images, conds = write_pairs(tmp_path, "mask")
    stream = opened(images, Pairing(str(conds), KINDS["mask"]), class_cond=True, class_from="filename")
    words = ["--image_size", "8", "--class_cond", "True", "--cond_type", "mask", "--eval_interval", "1"]
    words += ["--eval_samples", "12", "--cond_dir", "x"]
    job = evaluation_job(cli.parse("image_train", words), make_sampler("ddim"), stream)
    assert job.conditioning is not None
    rows = job.conditioning(range(12))["cond_image"]
    known = [stream.dataset[0, index] for index in range(6)]
    for row, label in zip(rows, job.labels, strict=True):
        owners = [int(cond["y"]) for _, cond in known if np.array_equal(cond["cond_image"], row)]
        assert owners == [label]
    assert len({row.numpy().tobytes() for row in rows}) == 6


def test_the_commands_of_the_page_parse_and_its_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "conditioning.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^    python scripts/(\w+)\.py (.*)$", text, re.MULTILINE)
    assert [name for name, _ in found] == ["image_train", "image_sample", "image_sample"]
    for name, words in found:
        assert cli.parse(name, shlex.split(words)).given
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    with zipfile.ZipFile(tmp_path / "datasets" / "emoji64.zip", "w") as archive:
        for index in range(40):
            Image.fromarray(picture(16, 16, index)).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"food_{'google' if index % 2 else 'twitter'}-{index // 2:04x}.png")
    (code,) = [block for block in snippets("docs/conditioning.md") if "FIND_EDGES" in block]
    run_code(code)
    pairing = Pairing("runs/outlines/train", CondKind("image", 1), skip_unpaired=True)
    stream = opened(Path("datasets/emoji64.zip"), pairing)
    assert len(stream.dataset) == 38
    assert next(stream)[1]["cond_image"].shape == (2, 1, SIDE, SIDE)


def test_every_class_of_a_map_has_a_shade_of_its_own() -> None:
    ids = np.array([[0, 1], [4, 255]])
    seen = th.from_numpy(KINDS["classes"].encode(ids))[None]
    pixels = drawn(KINDS["classes"], seen)
    assert pixels is not None
    assert pixels.shape == (1, 2, 2, 1)
    assert pixels[0, 1, 1, 0] == 0
    assert len(set(pixels.ravel().tolist())) == 4
    mask = drawn(KINDS["mask"], th.tensor([[[[0.0, 1.0]]]]))
    assert mask is not None
    assert mask.ravel().tolist() == [0, 255]
    assert drawn(CondKind("image", 2), th.zeros(1, 2, 2, 2)) is None
