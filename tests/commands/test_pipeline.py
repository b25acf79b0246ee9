"""`load`: a model as one object, which samples what the scripts sample, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image
from runs import CLASSIFIER, NAMES, SAMPLING, UNCONDITIONAL, UNET, UPSAMPLER, Runs, saved_by

import guided_diffusion
from guided_diffusion import dist_util, load, logger
from guided_diffusion.commands import classifier_sample, image_nll, image_sample, pipeline, super_res_sample
from guided_diffusion.commands.pipeline import Model, Samples
from guided_diffusion.runtime.errors import UserError

OPTIONS: dict[str, Any] = {"num_samples": 5, "batch_size": 2, "timestep_respacing": "4"}  # as SAMPLING


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    return Runs(root, unet=UNET, plain=UNCONDITIONAL, upsampler=UPSAMPLER, classifier=CLASSIFIER)


@pytest.fixture(scope="module")
def model(runs: Runs) -> Model:
    return load(runs["unet"], classifier=runs["classifier"], upsampler=runs["upsampler"])


def pictures(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def files_of(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*"))


def test_the_images_are_those_of_image_sample(model: Model, runs: Runs, tmp_path: Path) -> None:
    words = ["--classes", "owl,cat", "--sampler", "dpm++2m", "--seed", "3"]
    saved = saved_by(image_sample.main, tmp_path, "--model_path", runs["unet"], *SAMPLING, *words)
    made = model.sample(classes=["owl", "cat"], sampler="dpm++2m", seed=3, **OPTIONS)
    np.testing.assert_array_equal(made.images, saved["arr_0"])
    np.testing.assert_array_equal(made.labels, saved["arr_1"])
    made.save(tmp_path / "again.npz")
    (path,) = tmp_path.glob("samples_*.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    made.save(tmp_path / "grid.png")
    assert np.array_equal(Image.open(tmp_path / "grid.png"), Image.open(tmp_path / "samples.png"))


@pytest.mark.slow
def test_guided_they_are_those_of_classifier_sample_with_random_classes_too(
    model: Model, runs: Runs, tmp_path: Path
) -> None:
    words = ["--model_path", runs["unet"], "--classifier_path", runs["classifier"], "--classifier_scale", "7"]
    saved = saved_by(classifier_sample.main, tmp_path, *words, *SAMPLING)
    made = model.sample(classifier_scale=7.0, **OPTIONS)
    np.testing.assert_array_equal(made.images, saved["arr_0"])
    np.testing.assert_array_equal(made.labels, saved["arr_1"])
    assert not np.array_equal(made.images, model.sample(**OPTIONS).images)


def test_images_to_start_from_are_given_as_they_are(model: Model, runs: Runs, tmp_path: Path) -> None:
    image, mask = pictures(1)[0], np.arange(64).reshape(8, 8) < 32
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--init_image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"), "--classes", "1"]
    saved = saved_by(image_sample.main, tmp_path / "log", "--model_path", runs["unet"], *SAMPLING, *words)
    for init_image, given in (
        (image, mask),
        (Image.fromarray(image), Image.fromarray(mask)),
        (tmp_path / "image.png", str(tmp_path / "mask.png")),
        (th.from_numpy(image).movedim(2, 0) / 127.5 - 1 + 1e-6, mask),
    ):
        made = model.sample(init_image=init_image, mask=given, classes=1, **OPTIONS)
        np.testing.assert_array_equal(made.images, saved["arr_0"])


def test_images_are_enlarged_as_by_super_res_sample(model: Model, runs: Runs, tmp_path: Path) -> None:
    small = Samples(pictures(3, 4), np.array([2, 0, 1]))
    small.save(tmp_path / "small.npz")
    words = ["--model_path", runs["upsampler"], "--base_samples", str(tmp_path / "small.npz"), "--seed", "9"]
    grid = ["--timestep_respacing", "4", "--batch_size", "16"]
    saved = saved_by(super_res_sample.main, tmp_path / "log", *words, *grid)
    for upsampler in (model, load(runs["upsampler"])):
        made = upsampler.upsample(small, seed=9, timestep_respacing="4", batch_size=16)
        np.testing.assert_array_equal(made.images, saved["arr_0"])
        np.testing.assert_array_equal(made.labels, [2, 0, 1])


def test_bits_per_dimension_are_those_of_image_nll(model: Model, runs: Runs, tmp_path: Path) -> None:
    images, labels = pictures(3), [1, 2, 0]
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=labels)
    words = ["--model_path", runs["unet"], "--data_dir", str(tmp_path / "images.npz"), "--timestep_respacing", "4"]
    image_nll.main([*words, "--batch_size", "2", "--log_dir", str(tmp_path / "log")])
    bits = model.bits_per_dim(images, labels, timestep_respacing="4", batch_size=2)
    np.testing.assert_array_equal(bits, np.load(tmp_path / "log" / "bpd.npz")["arr_0"])


def test_noise_of_images_leads_back_to_them(model: Model, runs: Runs, tmp_path: Path) -> None:
    images = pictures(2)
    noise = model.invert(images, classes=["dog"], timestep_respacing="4")
    np.savez(tmp_path / "images.npz", arr_0=images)
    words = ["--init_image", str(tmp_path / "images.npz"), "--invert", "True", "--sampler", "ddim", "--classes", "dog"]
    numbers = ["--num_samples", "2", "--batch_size", "2", "--timestep_respacing", "4"]
    saved = saved_by(image_sample.main, tmp_path / "log", "--model_path", runs["unet"], *words, *numbers)
    made = model.sample(start=noise, sampler="ddim", classes="dog", timestep_respacing="4", num_samples=2)
    np.testing.assert_array_equal(made.images, saved["arr_0"])


def test_a_cond_fn_of_ones_own_is_added_to_the_classifier(model: Model) -> None:
    def push(x: th.Tensor, t: th.Tensor, **_: Any) -> th.Tensor:
        return th.full_like(x, 0.5)

    plain, pushed = model.sample(**OPTIONS), model.sample(cond_fn=push, **OPTIONS)
    guided = model.sample(classifier_scale=7.0, **OPTIONS)
    both = model.sample(cond_fn=push, classifier_scale=7.0, **OPTIONS)
    assert pushed.images.mean() > plain.images.mean()
    assert not np.array_equal(both.images, guided.images)
    assert not np.array_equal(both.images, pushed.images)


def test_what_it_knows(model: Model, runs: Runs) -> None:
    assert model.classes == NAMES
    assert model.config["num_channels"] == 32
    assert model.diffusion.num_timesteps == 40
    assert not model.network.training
    assert isinstance(model.classifier, th.nn.Module)
    assert load(runs["plain"]).classifier is None
    assert load(runs["plain"]).sample(timestep_respacing="2").labels is None
    assert model.to("cpu") is model
    assert len(model.sample(classes=["cat", 2], steps=2)) == 2
    assert load(Path(runs["unet"]) / "ema_0.5_000100.pt", timestep_respacing="2").diffusion.num_timesteps == 2


def test_nothing_is_written_joined_or_printed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = dist_util.dev()
    model.sample(init_image=pictures(1), steps=2)
    model.bits_per_dim(pictures(1), [0], timestep_respacing="2")
    assert files_of(tmp_path) == []
    assert not th.distributed.is_initialized()
    assert logger.Logger.CURRENT is None
    assert dist_util.dev() == before
    assert capsys.readouterr() == ("", "")


def test_the_log_is_shown_when_asked_for_and_warnings_always(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(runs["unet"], verbose=True).sample(steps=2)
    assert "sampling 1 images 8x8" in capsys.readouterr().out
    monkeypatch.setattr(pipeline, "MANY", 4)
    with pytest.warns(UserWarning, match=r"\d evaluations .* sampler='dpm\+\+2m', steps=20 take 20"):
        load(runs["unet"]).sample()
    with pytest.warns(UserWarning, match="of one colour"):
        load(runs["unet"]).sample(steps=2, cond_fn=lambda x, t, **_: th.full_like(x, 1e4))


def test_results_show_themselves(tmp_path: Path) -> None:
    made = Samples(pictures(4), np.array([0, 1, 0, 1]), NAMES, [0, 1])
    assert Image.open(io.BytesIO(made._repr_png_())).size == made.grid().size
    assert [picture.size for picture in made.pil()] == [(8, 8)] * 4
    assert Samples(pictures(2)[..., :1]).pil()[0].mode == "L"
    made.save(tmp_path / "each")
    assert sorted(os.listdir(tmp_path / "each")) == ["000000_y0.png", "000001_y1.png", "000002_y0.png", "000003_y1.png"]
    np.testing.assert_array_equal(Image.open(tmp_path / "each" / "000003_y1.png"), made.images[3])


def test_the_package_imports_nothing_until_it_is_asked() -> None:
    assert {"load", "make_sampler", "classifier_guidance"} <= set(dir(guided_diffusion))
    assert all(callable(getattr(guided_diffusion, name)) for name in guided_diffusion.PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        guided_diffusion.lod  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_smaples": 2}, "'num_smaples' is no option; did you mean num_samples?"),
        ({"guidance_scale": 2}, "'guidance_scale' is no option; did you mean classifier_scale?"),
        ({"cond_fm": None}, "did you mean cond_fn?"),
        ({"steps": 0.5}, "steps: '0.5' is not of type int"),
        ({"sampler": "dpm"}, "dpm"),
        ({"classes": "cta"}, "class 'cta' is unknown; did you mean cat?"),
        ({"classes": ["owl", 3]}, "class 3 does not exist: the classes are 0 .. 2"),
        ({"mask": np.ones((8, 8))}, "mask float64 [8, 8] is no image"),
        ({"init_image": "gone.png"}, "init_image 'gone.png' does not exist"),
        ({"mask": np.ones((8, 8), bool)}, "--mask has no effect without --init_image"),
        ({"log_dir": "x"}, "log_dir is no option here: use .save(PATH) of the samples"),
        ({"precision": "bf16"}, "precision is no option here: use load(..., precision=...)"),
        ({"start": th.zeros(2, 3, 8, 8), "num_samples": 3}, "start is noise of 2 images: give num_samples"),
    ],
)
def test_a_mistake_is_a_sentence(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        model.sample(**options)
    assert message in str(caught.value)


def test_networks_are_given_where_they_belong(model: Model, runs: Runs, tmp_path: Path) -> None:
    th.save({"layers.0.weight": th.zeros(3)}, tmp_path / "other.pt")
    plain = load(runs["plain"])
    for call, message in (
        (lambda: load(runs["classifier"]), "is a classifier, which guides others: give it as classifier="),
        (lambda: load(runs["upsampler"]).sample(), "is an upsampler: give .upsample(IMAGES)"),
        (lambda: load(runs["upsampler"]).bits_per_dim(pictures(1)), "is an upsampler, of which bits per dimension"),
        (lambda: plain.sample(prompt="a cat"), "--prompt has no effect without --context"),
        (lambda: plain.sample(classes=["cat"]), "--classes has no effect without --class_cond"),
        (lambda: plain.sample(cfg_scale=2.0), "--cfg_scale has no effect without --class_cond or --vector_columns or"),
        (lambda: plain.upsample(pictures(1)), "has no upsampler: give load(..., upsampler=PATH)"),
        (lambda: plain.sample(classifier_scale=1.0), "needs a classifier: give load(..., classifier=PATH)"),
        (lambda: load(runs["unet"], classifier=runs["plain"]).classifier, "is a diffusion model"),
        (lambda: load(tmp_path / "other.pt"), "other.pt"),
        (lambda: load(runs["unet"], stesp=3), "did you mean steps?"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert message in str(caught.value)
