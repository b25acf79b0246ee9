"""Upsamplers: small images and the noise on them, where images to enlarge come from, and what becomes of them."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from PIL import Image
from ranks import Nursery
from runs import (
    CLASSIFIER,
    NAMES as CLASSES,
    PROCESS,
    SAMPLING,
    SCRIPTS,
    UPSAMPLER,
    Runs,
    by_hand,
    saved_by,
    scrambled,
    write_run,
)

from guided_diffusion.commands import flags as cli, sampling, super_res_sample, super_res_train
from guided_diffusion.commands.common import restore
from guided_diffusion.config import SuperResConfig
from guided_diffusion.data.sources import Selection
from guided_diffusion.data.upsampling import SAMPLING_NOISE, BaseImages, SmallVersions, picture_names, read_base
from guided_diffusion.image_datasets import load_superres_data
from guided_diffusion.networks.architecture import architecture
from guided_diffusion.runtime.seeds import image_generator
from guided_diffusion.sampling.guidance import classifier_guidance, without_labels
from guided_diffusion.sampling.samplers import make_sampler
from guided_diffusion.script_util import build_classifier, build_diffusion, build_upsampler

PLAIN = SuperResConfig(**{**asdict(UPSAMPLER), "class_cond": False})
AUGMENTED = SuperResConfig(**{**asdict(PLAIN), "cond_aug": 0.5})
SMALL = ((4, 4, 3), Selection(100))
COUNT = 10


def pixels(count: int = COUNT, size: tuple[int, int] = (4, 4), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.uint8)


def as_input(images: np.ndarray) -> th.Tensor:
    return th.from_numpy(images).movedim(-1, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small pictures in folders, whose order is that of their paths; the names tell their classes."""
    root = tmp_path_factory.mktemp("small")
    for index, image in enumerate(pixels()):
        (root / "ab"[index // 5]).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / "ab"[index // 5] / f"{CLASSES[index % 3]}_{index}.png")
    return root


def in_order(root: Path) -> list[Path]:
    return sorted((path for path in root.rglob("*.png")), key=lambda path: path.relative_to(root).parts)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(
        tmp_path_factory.mktemp("models"), plain=PLAIN, labelled=UPSAMPLER, augmented=AUGMENTED, classifier=CLASSIFIER
    )


def test_noise_keeps_variance_and_leaves_what_its_level_says() -> None:
    images = th.randn(400, 3, 8, 8)
    out = SmallVersions((4, 4), cond_aug=0.8)(images, range(400))
    clean, levels = F.interpolate(images, (4, 4), mode="area"), out["low_res_level"]
    assert 0 <= levels.min() < 0.02
    assert 0.78 < levels.max() <= 0.8
    assert levels.mean() == pytest.approx(0.4, abs=0.05)
    shaped = levels.view(-1, 1, 1, 1)
    noise = ((out["low_res"] - (1 - shaped**2).sqrt() * clean) / shaped)[levels > 0.1]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert set(SmallVersions((4, 4))(images, range(400))) == {"low_res"}


def test_noise_is_that_of_an_images_place_for_any_batch_and_rank(folder: Path) -> None:
    options: dict[str, Any] = {"num_workers": 0, "random_flip": False, "log": lambda _: None, "seed": 3}

    def take(batch: int, steps: int, **more: Any) -> list[dict[str, th.Tensor]]:
        stream = load_superres_data(str(folder), batch, 4, 2, cond_aug=0.5, **{**options, **more})
        return [next(stream)[1] for _ in range(steps)]

    whole = {name: th.cat([cond[name] for cond in take(4, 3)]) for name in ("low_res", "low_res_level")}
    ranks = [take(2, 3, rank=rank, world_size=2) for rank in range(2)]
    for name, value in whole.items():
        assert th.equal(th.cat([ranks[rank][step][name] for step in range(3) for rank in range(2)]), value)
        assert th.equal(th.cat([cond[name] for cond in take(3, 4)]), value)
    assert len(whole["low_res_level"].unique()) == 12
    stream = load_superres_data(str(folder), 4, 4, 2, cond_aug=0.5, **options)
    stream.load_state_dict({"images": 8})
    assert th.equal(next(stream)[1]["low_res"], whole["low_res"][8:])


def test_levels_are_new_parameters_at_the_end_that_begin_at_nothing() -> None:
    th.manual_seed(0)
    plain = build_upsampler(PLAIN, True)
    th.manual_seed(0)
    aware = build_upsampler(AUGMENTED, True)
    names, more = list(plain.state_dict()), list(aware.state_dict())
    assert more[: len(names)] == names
    assert {name.split(".")[0] for name in more[len(names) :]} == {"low_res_embed"}
    assert architecture(aware.state_dict(), 8)["cond_aug"] == 1.0
    assert "cond_aug" not in architecture(plain.state_dict(), 8)
    x, low, t = th.randn(2, 3, 8, 8), th.randn(2, 3, 4, 4), th.tensor([3.0, 9.0])
    for network in (plain, aware):
        th.manual_seed(1)
        for parameter in network.out.parameters():
            th.nn.init.normal_(parameter)
    assert th.equal(aware(x, t, low, low_res_level=th.tensor([0.3, 0.9])), plain(x, t, low))
    scrambled(aware)
    told = [aware(x, t, low, low_res_level=th.full((2,), level)) for level in (0.0, 0.3)]
    assert th.equal(told[0], aware(x, t, low))
    assert not th.allclose(told[0], told[1])
    with pytest.raises(ValueError, match="low_res_level was given to an upsampler without cond_aug"):
        plain(x, t, low, low_res_level=th.zeros(2))


def test_an_upsampler_is_trained_on_noise_and_sampled_with_it(folder: Path, tmp_path: Path) -> None:
    sizes = ["--large_size", "4", "--small_size", "2", "--num_channels", "32", "--num_res_blocks", "1"]
    network = ["--channel_mult", "1,1", "--attention_resolutions", "", "--diffusion_steps", "40", "--cond_aug", "0.5"]
    places = ["--data_dir", str(folder), "--log_dir", str(tmp_path / "run"), "--num_workers", "0"]
    steps = ["--batch_size", "4", "--max_steps", "4", "--sample_interval", "4", "--val_data_dir", str(folder)]
    super_res_train.main([*sizes, *network, *places, *steps, "--val_interval", "4", "--lr", "1e-2"])
    restored = restore(cli.parse("super_res_sample", ["--model_path", str(tmp_path / "run")])).network
    assert restored.low_res_embed[2].weight.abs().sum() > 0
    base = tmp_path / "base.npz"
    np.savez(base, pixels(3, (2, 2)))
    argv = ["--model_path", str(tmp_path / "run"), "--base_samples", str(base), "--steps", "2"]
    saved = saved_by(super_res_sample.main, tmp_path / "out", *argv, "--cond_aug_level", "0.5")
    assert saved["arr_0"].shape == (3, 4, 4, 3)


def test_noise_in_sampling_is_that_of_seed_and_index(models: Runs, tmp_path: Path) -> None:
    base = tmp_path / "base.npz"
    np.savez(base, pixels(3))
    argv = ["--model_path", models["augmented"], "--base_samples", str(base), "--timestep_respacing", "4"]
    for level in (0.0, 0.25):
        saved = saved_by(super_res_sample.main, tmp_path / str(level), *argv, "--cond_aug_level", str(level))
        low_res, more = as_input(pixels(3)), {}
        if level:
            noise = [th.randn(3, 4, 4, generator=image_generator(SAMPLING_NOISE, index)) for index in range(3)]
            low_res = (1 - level**2) ** 0.5 * low_res + level * th.stack(noise)
            more = {"low_res_level": th.full((3,), level)}
        padded = {name: th.cat([value, *[value[-1:]] * 13]) for name, value in {"low_res": low_res, **more}.items()}
        expected = by_hand(models.process, models.augmented, None, 16, more=padded)[:3]
        np.testing.assert_array_equal(saved["arr_0"], expected)


def test_levels_that_were_not_trained_are_refused(models: Runs, folder: Path, tmp_path: Path) -> None:
    for name, level, message in (
        ("plain", "0.1", "--cond_aug_level has no effect without --cond_aug, and the checkpoint is without"),
        ("augmented", "0.6", "--cond_aug_level 0.6 is above 0.5, the greatest level of the training"),
    ):
        words = ["--model_path", models[name], "--base_samples", str(folder), "--cond_aug_level", level]
        refused([*words, "--log_dir", str(tmp_path)], message)


def refused(words: list[str], message: str) -> None:
    """That enlarging answers so."""
    flags = cli.parse("super_res_sample", words)
    with pytest.raises(ValueError, match=re.escape(message)):
        sampling.enlarge(flags)


def test_every_source_gives_the_same_images(folder: Path, tmp_path: Path) -> None:
    paths = in_order(folder)
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    names = [path.relative_to(folder).as_posix() for path in paths]
    with zipfile.ZipFile(tmp_path / "small.zip", "w") as archive:
        for path in reversed(paths):
            archive.write(path, path.relative_to(folder).as_posix())
    run = tmp_path / "run"
    run.mkdir()
    np.savez(run / "samples_10x4x4x3.npz", images)
    Image.new("RGB", (40, 40)).save(run / "samples.png")
    (run / "request.json").write_text("{}")
    (run / "names.json").write_text(json.dumps({"file": "samples_10x4x4x3.npz", "names": names}))
    for path in (folder, tmp_path / "small.zip", run, run / "samples_10x4x4x3.npz"):
        base = read_base(str(path), *SMALL)
        np.testing.assert_array_equal(base.pixels, images)
        assert base.names == names
        assert base.labels is None
        few = read_base(str(path), (4, 4, 3), Selection(3))
        assert (len(few), few.names, few.left_out, base.left_out) == (3, names[:3], 7, 0)
        with pytest.raises(ValueError, match="--num_samples 11 is more than the 10 images of"):
            read_base(str(path), (4, 4, 3), Selection(11, all=True))
    np.testing.assert_array_equal(read_base(f"{tmp_path}/small.zip/b", *SMALL).pixels, images[5:])
    one = read_base(str(paths[2]), *SMALL)
    np.testing.assert_array_equal(one.pixels, images[2:3])
    assert one.names == [paths[2].name]


def test_labels_that_no_tensor_can_hold_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 3), np.uint8), np.array([1, 2**64 - 1], np.uint64))
    with pytest.raises(ValueError, match=r"a\.npz holds labels arr_1 .* of uint64: give one class id"):
        read_base(str(tmp_path / "a.npz"), *SMALL)


def test_grey_alpha_and_deep_pictures_become_bytes(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.full((4, 4), 65535, np.uint16))
    np.save(tmp_path / "c.npy", np.full((4, 4, 3), -1, np.float32))
    assert [int(image.mean()) for image in read_base(str(tmp_path), *SMALL).pixels] == [77, 255, 0]
    (tmp_path / "c.npy").unlink()
    grey = read_base(str(tmp_path), (4, 4, 1), Selection(9)).pixels
    assert grey.shape == (2, 4, 4, 1)
    assert [int(image.mean()) for image in grey] == [77, 255]


def test_what_does_not_fit_is_named_and_counted(folder: Path, tmp_path: Path) -> None:
    for path in in_order(folder):
        Image.open(path).resize((5, 4) if path.name.startswith("dog") else (4, 4)).save(tmp_path / path.name)
    with pytest.raises(
        ValueError, match=r"3 of 10 images are not of small_size 4x4, the first is 'dog_1.png' with 4x5"
    ):
        read_base(str(tmp_path), *SMALL)
    (tmp_path / "cat_0.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"--base_samples: cannot read image .*cat_0\.png"):
        read_base(str(tmp_path), *SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images, skipped 0"):
        read_base(str(tmp_path / "empty"), *SMALL)
    with pytest.raises(ValueError, match="--base_samples 'nowhere' does not exist"):
        read_base("nowhere", *SMALL)


@pytest.mark.parametrize(
    "names", ["[]", '["a"]', '["a", "../../b"]', '["a", "/b"]', '["a", 3]', '["a", "C:b"]', '"ab"', "7", "torn"]
)
def test_names_that_are_none_or_lead_elsewhere_are_refused(tmp_path: Path, names: str) -> None:
    np.savez(tmp_path / "b.npz", pixels(2))
    (tmp_path / "names.json").write_text(f'{{"file": "b.npz", "names": {names}}}')
    with pytest.raises(ValueError, match=r"names\.json cannot be used"):
        read_base(str(tmp_path / "b.npz"), *SMALL)
    (tmp_path / "names.json").write_text('{"file": "c.npz", "names": []}')
    assert read_base(str(tmp_path / "b.npz"), *SMALL).names == []


def test_pictures_are_called_like_their_files() -> None:
    assert picture_names(["a/1.jpg", "b/1.webp", "c"]) == ["a/1.png", "b/1.png", "c.png"]
    assert picture_names(["1.jpg", "1.JPEG", "2.x.png"]) == ["1.jpg.png", "1.JPEG.png", "2.x.png.png"]
    assert picture_names(["A.jpg", "a.png"]) == ["A.jpg.png", "a.png.png"]


def test_the_request_tells_images_labels_and_names_apart() -> None:
    bases = [BaseImages(pixels()), BaseImages(pixels(seed=1)), BaseImages(pixels(), [0] * 10)]
    bases += [BaseImages(pixels(), names=["a"] * 10), BaseImages(pixels(), names=["b"] * 10)]
    assert len({json.dumps(base.request()) for base in bases}) == 5


@pytest.mark.slow
def test_three_ranks_enlarge_ten_images_in_order_as_one_does(
    models: Runs, folder: Path, tmp_path: Path, ranks: Nursery
) -> None:
    argv = ["--model_path", models["labelled"], "--base_samples", str(folder), "--batch_size", "4", "--save_images"]
    argv += ["--class_from", "filename"]
    argv += ["--sampler", "dpm++2m", "--steps", "3"]
    saved = saved_by(super_res_sample.main, tmp_path / "one", *argv)
    paths = in_order(folder)
    labels = [CLASSES.index(path.name.split("_")[0]) for path in paths]
    assert saved["arr_1"].tolist() == labels
    low_res = as_input(np.stack([np.asarray(Image.open(path)) for path in paths]))
    process = build_diffusion(type(PROCESS)(**{**asdict(PROCESS), "timestep_respacing": "logsnr3"}))
    sampler = make_sampler("dpm++2m")
    first = by_hand(process, models.labelled, labels[:4], 4, sampler=sampler, more={"low_res": low_res[:4]})
    np.testing.assert_array_equal(saved["arr_0"][:4], first)
    names = [path.relative_to(folder).as_posix() for path in paths]
    said = json.loads((tmp_path / "one" / "names.json").read_text())
    assert said == {"file": "samples_10x8x8x3.npz", "names": names}
    for name, image in zip(names, saved["arr_0"], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one" / "images" / name)), image)

    script = [SCRIPTS / "super_res_sample.py", *argv, "--log_dir", tmp_path / "three", "--device", "cpu"]
    result = ranks.run(script, ranks=3)
    assert result.returncode == 0, result.stderr
    for name in ("samples_10x8x8x3.npz", "names.json", *(f"images/{name}" for name in names)):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize(("small", "large"), [("4x6", "6x10"), ("8x4", "8x12"), (5, 8)])
def test_any_ratio_and_shape(tmp_path: Path, small: Any, large: Any) -> None:
    config = SuperResConfig(**{**asdict(PLAIN), "small_size": small, "large_size": large, "attention_resolutions": ""})
    network = scrambled(build_upsampler(config, True))
    run = write_run(tmp_path / "run", "super_res_train", network, config, PROCESS)
    height, width = (int(side) for side in str(small).split("x")) if "x" in str(small) else (small, small)
    base = pixels(2, (height, width))
    np.savez(tmp_path / "base.npz", base)
    argv = ["--model_path", str(run), "--base_samples", str(tmp_path / "base.npz"), *SAMPLING[2:]]
    saved = saved_by(super_res_sample.main, tmp_path / "out", *argv)
    shape = (3, *(int(side) for side in str(large).split("x"))) if "x" in str(large) else (3, large, large)
    expected = by_hand(build_diffusion(PROCESS), network, None, 2, shape=shape, more={"low_res": as_input(base)})
    np.testing.assert_array_equal(saved["arr_0"], expected)


def test_a_classifier_guides_upsamplers_with_labels_and_without(models: Runs, folder: Path, tmp_path: Path) -> None:
    guide = ["--classifier_path", models["classifier"], "--classifier_scale", "3", "--num_samples", "2"]
    guide += ["--class_from", "filename"]
    paths = in_order(folder)[:2]
    labels = [CLASSES.index(path.name.split("_")[0]) for path in paths]
    low_res = as_input(np.stack([np.asarray(Image.open(path)) for path in paths]))
    cond_fn = classifier_guidance(models.classifier, 3.0)
    for name, network in (("labelled", models.labelled), ("plain", without_labels(models.plain))):
        argv = ["--model_path", models[name], "--base_samples", str(folder), "--batch_size", "2"]
        argv += ["--timestep_respacing", "4", "--use_ddim", "True", *guide]
        saved = saved_by(super_res_sample.main, tmp_path / name, *argv)
        options = {"sampler": make_sampler("ddim"), "cond_fn": cond_fn, "more": {"low_res": low_res}}
        options |= {"clip_guided": False}  # on the originals' grids
        np.testing.assert_array_equal(saved["arr_0"], by_hand(models.process, network, labels, 2, **options))
        assert saved["arr_1"].tolist() == labels


def test_labels_come_from_where_they_are_asked_for(models: Runs, folder: Path, tmp_path: Path) -> None:
    few = ["--base_samples", str(folder), "--num_samples", "3", "--timestep_respacing", "1"]
    plain, labelled = ["--model_path", models["plain"], *few], ["--model_path", models["labelled"], *few]
    assert "arr_1" not in saved_by(super_res_sample.main, tmp_path / "0", *plain)
    told = saved_by(super_res_sample.main, tmp_path / "1", *plain, "--class_from", "filename")
    assert told["arr_1"].tolist() == [0, 0, 1]  # a/cat_0, a/cat_3, a/dog_1
    given = saved_by(super_res_sample.main, tmp_path / "2", *labelled, "--classes", "owl")
    assert given["arr_1"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classifier_path", "PLAIN"], "is an upsampler: give the checkpoint of a classifier"),
        (["--class_from", "csv"], "or give --classes"),
        (["--classes", "owl", "--class_from", "filename"], "as the images have labels of their own"),
    ],
)
def test_mistakes_get_one_sentence(models: Runs, folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    words = [models["plain"] if word == "PLAIN" else word for word in words]
    argv = ["--model_path", models["labelled"], "--base_samples", str(folder), "--timestep_respacing", "1"]
    refused([*argv, *words, "--log_dir", str(tmp_path)], message)
    assert not list(tmp_path.glob("*.npz"))


def test_a_classifier_of_other_images_is_refused(models: Runs, folder: Path, tmp_path: Path) -> None:
    other = type(CLASSIFIER)(**{**asdict(CLASSIFIER), "image_size": 16, "classifier_attention_resolutions": "8"})
    write_run(tmp_path / "other", "classifier_train", scrambled(build_classifier(other)), other, PROCESS)
    argv = ["--model_path", models["labelled"], "--base_samples", str(folder), "--timestep_respacing", "1"]
    words = [*argv, "--classifier_path", str(tmp_path / "other"), "--log_dir", str(tmp_path / "out")]
    refused(words, "the model has image_size 8 and the classifier 16")


def test_other_images_are_another_request(models: Runs, tmp_path: Path) -> None:
    argv = ["--model_path", models["plain"], "--timestep_respacing", "1", "--log_dir", str(tmp_path / "out")]
    for seed in (0, 1):
        np.savez(tmp_path / f"{seed}.npz", pixels(2, seed=seed))
    super_res_sample.main([*argv, "--base_samples", str(tmp_path / "0.npz")])
    refused([*argv, "--base_samples", str(tmp_path / "1.npz")], "base_samples was")
