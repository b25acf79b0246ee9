"""The commands that sample and measure, from checkpoint folders to files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from few import few
from PIL import Image
from ranks import Nursery
from runs import (
    CLASSIFIER,
    GUIDED,
    NAMES,
    PROCESS,
    SAMPLING,
    SCRIPTS,
    UNCONDITIONAL,
    UNET,
    UPSAMPLER,
    WEAK,
    Main,
    Runs,
    by_hand,
    saved_by,
    scrambled,
    write_run,
)

from guided_diffusion import dist_util, logger
from guided_diffusion.commands import (
    classifier_sample,
    flags as cli,
    image_nll,
    image_sample,
    sampling,
    super_res_sample,
)
from guided_diffusion.commands.common import Plan, Restored, restore
from guided_diffusion.commands.editing import adds_noise
from guided_diffusion.commands.sampling import labels_of
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, SuperResConfig
from guided_diffusion.data.init_images import InitImages
from guided_diffusion.runtime.files import write_json
from guided_diffusion.runtime.seeds import image_generator
from guided_diffusion.sampling.editing import invert, slerp
from guided_diffusion.sampling.guidance import (
    autoguidance,
    classifier_free,
    classifier_guidance,
    dynamic_thresholding,
    interval,
    without_labels,
)
from guided_diffusion.sampling.loop import network_calls
from guided_diffusion.sampling.samplers import SAMPLERS, make_sampler
from guided_diffusion.script_util import build_classifier, build_diffusion, build_upsampler
from guided_diffusion.training import checkpoints


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    kinds: dict[str, Any] = {"unet": UNET, "unconditional": UNCONDITIONAL, "guided": GUIDED, "weak": WEAK}
    return Runs(tmp_path_factory.mktemp("runs"), **kinds, classifier=CLASSIFIER, upsampler=UPSAMPLER)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images with labels, as a first stage of sampling leaves them."""
    path = tmp_path_factory.mktemp("base") / "samples_5x4x4x3.npz"
    rng = np.random.default_rng(0)
    np.savez(path, rng.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8), np.array([2, 0, 1, 1, 2]))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(5):
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{NAMES[index % 3]}_{index}.png")
    return folder


def test_a_run_folder_is_all_that_sampling_needs(runs: Runs, tmp_path: Path) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--classes", "owl,0", "--save_images"]
    saved = saved_by(image_sample.main, tmp_path, *argv)
    assert saved["arr_1"].tolist() == [2, 0, 2, 0, 2]
    np.testing.assert_array_equal(saved["arr_0"][:2], by_hand(runs.process, runs.unet, [2, 0], 2))
    assert sorted(os.listdir(tmp_path / "images"))[:2] == ["000000_y2.png", "000001_y0.png"]
    log = (tmp_path / "log.txt").read_text()
    assert str(tmp_path) in log.splitlines()[0]
    assert str(tmp_path / "samples_5x8x8x3.npz") in log.splitlines()[-1]
    for words in ("Ancestral()", "4 of 40 steps", "cosine schedule", "predicts eps with a learned variance", "seed 0"):
        assert words in log


def test_labels_are_random_balanced_or_listed(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING]
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    listed = ["--classes", f"@{tmp_path / 'classes.txt'}"]
    rules = {"plain": [], "random": ["--class_sampling=random"], "balanced": ["--class_sampling=balanced"]}
    rules |= {"list": [*listed, "--class_sampling=list"]}
    saved = {name: saved_by(image_sample.main, tmp_path / name, *argv, *words) for name, words in rules.items()}
    assert saved["balanced"]["arr_1"].tolist() == [0, 1, 2, 0, 1]
    for one, other in (("plain", "random"), ("balanced", "list")):
        for array in ("arr_0", "arr_1"):
            np.testing.assert_array_equal(saved[one][array], saved[other][array])
    for words, message in (
        (["--class_sampling=list"], "--class_sampling list has no effect without --classes: give both"),
        (
            ["--class_sampling=balanced", *listed],
            "--class_sampling balanced and --classes exclude each other: give one",
        ),
    ):
        assert message in refused(image_sample.main, [*argv, *words, "--log_dir", str(tmp_path / "out")], capsys)


def test_an_unconditional_model_saves_no_labels(runs: Runs, tmp_path: Path) -> None:
    saved = saved_by(image_sample.main, tmp_path, "--model_path", runs["unconditional"], *SAMPLING)
    assert set(saved) == {"arr_0"}
    np.testing.assert_array_equal(saved["arr_0"][:2], by_hand(runs.process, runs.unconditional, None, 2))


def test_without_a_config_the_weights_say_what_they_can(runs: Runs, tmp_path: Path) -> None:
    lone = tmp_path / "lone.pt"
    shutil.copy(os.path.join(runs["unet"], "ema_0.5_000100.pt"), lone)
    untold = ["--image_size", "8", "--num_heads", "2", "--diffusion_steps", "40", "--noise_schedule", "cosine"]
    saved = saved_by(
        image_sample.main, tmp_path / "out", "--model_path", str(lone), *SAMPLING, "--classes", "2", *untold
    )
    np.testing.assert_array_equal(saved["arr_0"][:2], by_hand(runs.process, runs.unet, [2, 2], 2))


def test_precisions_are_those_of_the_network(runs: Runs, tmp_path: Path) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--classes", "1"]
    full, *half = (
        saved_by(image_sample.main, tmp_path / str(number), *argv, *more)["arr_0"].astype(int)
        for number, more in enumerate(([], ["--precision", "bf16"], ["--precision", "fp16"], ["--use_fp16", "True"]))
    )
    bf16, fp16, alias = half
    np.testing.assert_array_equal(fp16, alias)
    for rounded in half:
        assert (rounded != full).any()
    assert np.abs(fp16 - full).mean() < np.abs(bf16 - full).mean() < 8


@pytest.mark.parametrize(
    ("rate", "warmed_up", "named", "kind", "words"),
    [
        ("0.9999", False, False, "model", "was trained for 100: it is not taken, unless it is given by its name"),
        ("0.9999", False, True, "ema_0.9999_", "was trained for 100: if its samples are noise, try"),
        ("0.9999", True, False, "ema_0.9999_", ""),
        ("0.5", False, False, "ema_0.5_", ""),
    ],
)
def test_a_folder_is_sampled_from_by_an_average_that_is_no_longer_than_its_run(
    runs: Runs, tmp_path: Path, rate: str, warmed_up: bool, named: bool, kind: str, words: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["unet"], run)
    os.rename(run / "ema_0.5_000100.pt", run / f"ema_{rate}_000100.pt")
    shutil.copy(run / f"ema_{rate}_000100.pt", run / "model000100.pt")
    config = json.loads((run / "config.json").read_text())
    config["flags"]["ema_warmup"] = warmed_up
    (run / "config.json").write_text(json.dumps(config))
    path = run / f"ema_{rate}_000100.pt" if named else run
    image_sample.main(["--model_path", str(path), *SAMPLING, "--log_dir", str(tmp_path / "samples")])
    said = (tmp_path / "samples" / "log.txt").read_text()
    assert f"model_path: {run / kind}000100.pt\n" in said
    assert ("averages over about" in said) == bool(words)
    assert words in said


@pytest.mark.slow
def test_two_ranks_write_the_file_of_one(runs: Runs, tmp_path: Path, ranks: Nursery) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING]
    image_sample.main([*argv, "--log_dir", str(tmp_path / "one")])
    script = [str(SCRIPTS / "image_sample.py"), *argv, "--log_dir", str(tmp_path / "two"), "--device", "cpu"]
    result = ranks.run(script)
    assert result.returncode == 0, result.stderr
    name = "samples_5x8x8x3.npz"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not (tmp_path / "two" / "shards").exists()
    assert "8/8 [" in result.stderr  # rank 0 has two of the three batches, and shows them alone
    assert "4/4 [" not in result.stderr


def test_a_second_call_neither_samples_again_nor_mixes_requests(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--log_dir", str(tmp_path)]
    image_sample.main(argv)
    content = (tmp_path / "samples_5x8x8x3.npz").read_bytes()
    image_sample.main(argv)
    assert "nothing to sample" in capsys.readouterr().out
    for more, message in (
        (["--seed", "7"], "seed was 0 and is 7"),
        (["--noise_schedule", "linear"], "noise_schedule was cosine and is linear"),
        (["--precision", "bf16"], "model_path precision was fp32 and is bf16"),
        (["--model_path", runs["unconditional"]], "class_cond was True and is False"),
    ):
        assert message in refused(image_sample.main, [*argv, *more], capsys)
    assert (tmp_path / "samples_5x8x8x3.npz").read_bytes() == content


def on_grid(grid: str, **flags: Any) -> Any:
    """The process of the tests on another grid."""
    return build_diffusion(DiffusionConfig(**{**asdict(PROCESS), "timestep_respacing": grid, **flags}))


@pytest.mark.parametrize(
    "name", few((name for name, kind in SAMPLERS.items() if not kind.ascending), ["ddim", "heun", "dpm++2m_sde"])
)
def test_every_sampler_takes_steps_on_its_own_grid(runs: Runs, tmp_path: Path, name: str) -> None:
    argv = ["--num_samples", "2", "--batch_size", "2", "--classes", "1", "--sampler", name, "--steps", "5"]
    saved = saved_by(image_sample.main, tmp_path, "--model_path", runs["unet"], *argv)
    sampler = make_sampler(name)
    grid = f"{sampler.grid}5"
    process = on_grid(grid)
    assert process.num_timesteps == 5
    np.testing.assert_array_equal(saved["arr_0"], by_hand(process, runs.unet, [1, 1], 2, sampler=sampler))
    words = f"5 of 40 steps (grid {grid}), {network_calls(process, sampler)} evaluations of the network per batch"
    assert words in (tmp_path / "log.txt").read_text()


LINEAR = DiffusionConfig(**{**asdict(PROCESS), "noise_schedule": "linear"})
AWAY = "--model_path UNET --autoguide_scale 2 --autoguide_path"
BOTH = "--model_path GUIDED --classifier_path CLASSIFIER --classifier_scale 3 --cfg_scale 2"


def limited(network: Any, guide: Any, low: float, high: float) -> dict[str, Any]:
    return {"network": interval(network, low, high), "cond_fn": interval(guide, low, high)}


def both(runs: Runs) -> dict[str, Any]:
    return {"network": classifier_free(runs.guided, 2.0), "cond_fn": classifier_guidance(runs.classifier, 3.0)}


# words of a command line -> what the loop is given, and what it must not have been given
OF_THE_LOOP: dict[str, Callable[[Runs], tuple[dict[str, Any], dict[str, Any] | None]]] = {
    "--model_path UNET --noise_schedule linear": lambda runs: ({"process": build_diffusion(LINEAR)}, {}),
    "--model_path UNET --use_ddim True": lambda runs: ({"sampler": make_sampler("ddim")}, {}),
    "--model_path UNET --sampler ddim --eta 0.7": lambda runs: ({"sampler": make_sampler("ddim", eta=0.7)}, {}),
    "--model_path UNET --sampler ddim --use_ddim True": lambda runs: ({"sampler": make_sampler("ddim")}, {}),
    "--model_path UNET --sampler plms": lambda runs: ({"sampler": make_sampler("plms")}, {}),
    "--model_path UNET --sampler plms --order 3 --use_ddim False": lambda runs: (
        {"sampler": make_sampler("plms", order=3)},
        {"sampler": make_sampler("plms")},
    ),
    "--model_path UNET --clip_denoised False": lambda runs: ({"clip_denoised": False}, {}),
    "--model_path UNET --sampler heun --churn 3 --timestep_respacing quad4": lambda runs: (
        {"sampler": make_sampler("heun", churn=3.0), "process": on_grid("quad4")},
        {"sampler": make_sampler("heun"), "process": on_grid("quad4")},
    ),
    "--model_path UNET --sampler deis --order 2 --steps 4": lambda runs: (
        {"sampler": make_sampler("deis", order=2), "process": on_grid("logsnr4")},
        {"sampler": make_sampler("deis", order=2)},
    ),
    "--model_path UNET --sampler sa --order 3 --eta 0.5 --timestep_respacing list:0,10.5,39": lambda runs: (
        {"sampler": make_sampler("sa", order=3, eta=0.5), "process": on_grid("list:0,10.5,39")},
        {"sampler": make_sampler("sa", order=3), "process": on_grid("list:0,10.5,39")},
    ),
    "--model_path UNET --dynamic_threshold 0.8": lambda runs: ({"denoised_fn": dynamic_thresholding(0.8)}, {}),
    "--model_path GUIDED --cfg_scale 0": lambda runs: ({"labels": [3, 3]}, {}),
    "--model_path GUIDED --cfg_scale 3": lambda runs: ({"network": classifier_free(runs.guided, 3.0)}, {}),
    "--model_path GUIDED --cfg_scale 3 --cfg_rescale 0.7": lambda runs: (
        {"network": classifier_free(runs.guided, 3.0, rescale=0.7)},
        {"network": classifier_free(runs.guided, 3.0)},
    ),
    # the weaker model is what its own config says, not the command line
    f"{AWAY} WEAK --num_res_blocks 1": lambda runs: ({"network": autoguidance(runs.unet, runs.weak, 2.0)}, {}),
    f"{AWAY} UNCONDITIONAL": lambda runs: (
        {"network": autoguidance(runs.unet, without_labels(runs.unconditional), 2.0)},
        {},
    ),
    f"{AWAY} WEAK --model_path GUIDED --cfg_scale 3 --guidance_interval 5,30": lambda runs: (
        {"network": interval(autoguidance(classifier_free(runs.guided, 3.0), runs.weak, 2.0), 5, 30)},
        {"network": autoguidance(classifier_free(runs.guided, 3.0), runs.weak, 2.0)},
    ),
    BOTH: lambda runs: (both(runs), {"network": classifier_free(runs.guided, 2.0)}),
    # timesteps of the interval are those of training, whatever the networks are fed
    f"{BOTH} --guidance_interval 10,30": lambda runs: (limited(*both(runs).values(), 10, 30), both(runs)),
    f"{BOTH} --guidance_interval 10,30 --rescale_timesteps True": lambda runs: (
        {**limited(*both(runs).values(), 250, 750), "process": on_grid("4", rescale_timesteps=True)},
        {**both(runs), "process": on_grid("4", rescale_timesteps=True)},
    ),
}


# what others of these hold too
OF_OTHERS = (
    "linear",
    "--use_ddim True",
    "--eta 0.7",
    "--sampler plms",
    "--cfg_scale 0",
    "--cfg_scale 3",
    "UNCONDITIONAL",
)
TOGETHER = [words for words in OF_THE_LOOP if not words.endswith((*OF_OTHERS, "10,30")) and "deis" not in words]


@pytest.mark.parametrize("words", few(OF_THE_LOOP, TOGETHER))
def test_samples_are_those_of_the_loop(runs: Runs, tmp_path: Path, words: str) -> None:
    argv = [getattr(runs, word.lower()) and runs[word.lower()] if word.isupper() else word for word in words.split()]
    usual = SAMPLING[2 : 6 if not {"--steps", "--timestep_respacing"} & set(argv) else 4]
    argv = ["--num_samples", "2", *usual, "--classes", "1,2", *argv]
    main = classifier_sample.main if "--classifier_path" in argv else image_sample.main
    saved = saved_by(main, tmp_path, *argv)["arr_0"]
    network = runs.guided if "GUIDED" in words else runs.unet

    def by_the_loop(options: dict[str, Any]) -> np.ndarray:
        given = {"process": runs.process, "network": network, "labels": [1, 2], **options}
        return by_hand(given.pop("process"), given.pop("network"), given.pop("labels"), 2, **given)

    same, other = OF_THE_LOOP[words](runs)
    np.testing.assert_array_equal(saved, by_the_loop(same))
    assert other is None or (saved != by_the_loop(other)).any()


def test_at_scale_1_nothing_guides(runs: Runs, tmp_path: Path) -> None:
    argv = ["--model_path", runs["guided"], *SAMPLING, "--classes", "1", "--log_dir"]
    image_sample.main([*argv, str(tmp_path / "plain")])
    image_sample.main([*argv, str(tmp_path / "one"), "--cfg_scale", "1"])
    for name in ("samples_5x8x8x3.npz", "request.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize(
    ("model", "weak", "message"),
    [
        ("unconditional", "unet", "the model has class_cond False and the weaker model True"),
        ("unet", "classifier", "ema_0.5_000100.pt is a classifier"),
        ("unet", "upsampler", "ema_0.5_000100.pt is an upsampler: give the checkpoint of a diffusion model there"),
    ],
)
def test_a_weaker_model_of_another_kind_is_refused(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, weak: str, message: str
) -> None:
    argv = ["--model_path", runs[model], *SAMPLING, "--autoguide_path", runs[weak], "--autoguide_scale", "2"]
    assert message in refused(image_sample.main, [*argv, "--log_dir", str(tmp_path)], capsys)


@pytest.mark.slow
def test_a_weaker_model_without_a_config_is_told_by_the_command_line(runs: Runs, tmp_path: Path) -> None:
    lone = tmp_path / "lone.pt"
    shutil.copy(os.path.join(runs["weak"], "ema_0.5_000100.pt"), lone)
    argv = ["--model_path", runs["unet"], *SAMPLING, "--classes", "1", "--autoguide_scale", "2", "--image_size", "8"]
    argv += ["--num_heads", "2", "--diffusion_steps", "40", "--noise_schedule", "cosine"]
    saved = saved_by(image_sample.main, tmp_path / "out", *argv, "--autoguide_path", str(lone))
    network = autoguidance(runs.unet, runs.weak, 2.0)
    np.testing.assert_array_equal(saved["arr_0"][:2], by_hand(runs.process, network, [1, 1], 2))


def test_samplers_that_add_noise_are_told_from_those_that_do_not() -> None:
    noisy = {"ddpm", "dpm++2m_sde", "dpm++3m_sde", "euler_ancestral", "sa"}
    assert {name for name in SAMPLERS if adds_noise(make_sampler(name))} == noisy
    for name, options, expected in (
        ("ddim", {"eta": 0.5}, True),
        ("heun", {"churn": 1.0}, True),
        ("sa", {"eta": 0.0}, False),
    ):
        assert adds_noise(make_sampler(name, **options)) == expected


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mask that keeps all, one that keeps none, and one that keeps the left half."""
    folder = tmp_path_factory.mktemp("masks")
    for name, columns in (("all", 8), ("none", 0), ("half", 4)):
        pixels = np.zeros((8, 8), np.uint8)
        pixels[:, :columns] = 255
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def images_of(pictures: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(pictures.iterdir())])


def test_images_are_started_from_in_turn(runs: Runs, pictures: Path, tmp_path: Path) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--classes", "1", "--init_image", str(pictures)]
    saved = saved_by(image_sample.main, tmp_path, *argv, "--num_samples", "7", "--batch_size", "7", "--strength", "0.7")
    images = InitImages(str(pictures), 8, 3).rows(range(7))["init_image"]
    assert th.equal(images[:2], images[5:])
    expected = by_hand(runs.process, runs.unet, [1] * 7, 7, init_image=images, strength=0.7)
    np.testing.assert_array_equal(saved["arr_0"], expected)


def test_a_strength_of_its_own(runs: Runs, pictures: Path, tmp_path: Path, masks: Path) -> None:
    """0.6 from an image, all the way where a mask keeps what is to be kept."""
    argv = ["--model_path", runs["unet"], *SAMPLING, "--classes", "1", "--init_image", str(pictures / "cat_0.png")]
    half = ["--mask", str(masks / "half.png")]
    for number, (more, strength) in enumerate((([], "0.6"), (half, "1"))):
        own = saved_by(image_sample.main, tmp_path / f"a{number}", *argv, *more)
        given = saved_by(image_sample.main, tmp_path / f"b{number}", *argv, *more, "--strength", strength)
        np.testing.assert_array_equal(own["arr_0"], given["arr_0"])
        names = [tmp_path / f"{kind}{number}" / "request.json" for kind in "ab"]
        assert names[0].read_bytes() == names[1].read_bytes()


def test_what_masks_keep_is_kept_byte_for_byte(runs: Runs, pictures: Path, masks: Path, tmp_path: Path) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--classes", "1", "--init_image", str(pictures)]
    originals = images_of(pictures)
    whole = saved_by(image_sample.main, tmp_path / "all", *argv, "--mask", str(masks / "all.png"))
    np.testing.assert_array_equal(whole["arr_0"], originals)
    inverted = saved_by(
        image_sample.main, tmp_path / "swapped", *argv, "--mask", str(masks / "none.png"), "--mask_invert"
    )
    np.testing.assert_array_equal(inverted["arr_0"], originals)
    half = saved_by(image_sample.main, tmp_path / "half", *argv, "--mask", str(masks / "half.png"))
    np.testing.assert_array_equal(half["arr_0"][:, :, :4], originals[:, :, :4])
    assert (half["arr_0"][:, :, 4:] != originals[:, :, 4:]).mean() > 0.9
    none = saved_by(image_sample.main, tmp_path / "none", *argv, "--mask", str(masks / "none.png"))
    plain = saved_by(image_sample.main, tmp_path / "plain", *argv, "--strength", "1")
    np.testing.assert_array_equal(none["arr_0"], plain["arr_0"])


def test_painting_resamples_as_the_loop_does(runs: Runs, pictures: Path, masks: Path, tmp_path: Path) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--classes", "1", "--init_image", str(pictures)]
    argv += ["--mask", str(masks / "half.png"), "--resample", "2", "--resample_jump", "3"]
    saved = saved_by(image_sample.main, tmp_path, *argv)
    rows = InitImages(str(pictures), 8, 3, masks=str(masks / "half.png")).rows([0, 1])
    expected = by_hand(runs.process, runs.unet, [1, 1], 2, resample=2, jump=3, **rows)
    np.testing.assert_array_equal(saved["arr_0"][:2], expected)
    assert "8 evaluations of the network per batch" in (tmp_path / "log.txt").read_text()


def test_inverted_images_are_sampled_under_another_class(runs: Runs, pictures: Path, tmp_path: Path) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--init_image", str(pictures), "--use_ddim"]
    argv += ["--invert", "--init_classes", "0,1", "--classes", "owl"]
    saved = saved_by(image_sample.main, tmp_path, *argv)
    images = InitImages(str(pictures), 8, 3).rows([0, 1])["init_image"]
    noise = invert(runs.process, runs.unet, images, model_kwargs={"y": th.tensor([0, 1])})
    expected = by_hand(runs.process, runs.unet, [2, 2], 2, sampler=make_sampler("ddim"), start=noise)
    np.testing.assert_array_equal(saved["arr_0"][:2], expected)
    assert "8 evaluations of the network per batch" in (tmp_path / "log.txt").read_text()


def test_part_of_the_way_to_noise_and_back_with_a_mask(runs: Runs, pictures: Path, masks: Path, tmp_path: Path) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--init_image", str(pictures), "--sampler", "dpm++2m"]
    argv += ["--invert", "--classes", "owl", "--strength", "0.7", "--mask", str(masks / "half.png")]
    saved = saved_by(image_sample.main, tmp_path, *argv)
    rows = InitImages(str(pictures), 8, 3, masks=str(masks / "half.png")).rows([0, 1])
    labels = th.tensor([2, 2])
    noise = invert(runs.process, runs.unet, rows["init_image"], model_kwargs={"y": labels}, strength=0.7)
    loop: dict[str, Any] = {"sampler": make_sampler("dpm++2m"), "start": noise, "strength": 0.7, **rows}
    np.testing.assert_array_equal(saved["arr_0"][:2], by_hand(runs.process, runs.unet, [2, 2], 2, **loop))


def test_interpolation_goes_from_one_image_to_the_other(runs: Runs, pictures: Path, tmp_path: Path) -> None:
    ends = [str(pictures / name) for name in ("cat_0.png", "dog_1.png")]
    argv = ["--model_path", runs["unet"], *SAMPLING, "--use_ddim", "--init_image", ends[0], "--interpolate", ends[1]]
    saved = saved_by(image_sample.main, tmp_path, *argv, "--classes", "cat,cat,cat,dog,dog", "--batch_size", "5")
    images = th.cat([InitImages(end, 8, 3).rows([0])["init_image"] for end in ends])
    noise = invert(runs.process, runs.unet, images, model_kwargs={"y": th.tensor([0, 1])})
    between = slerp(noise[0], noise[1], th.linspace(0, 1, 5))
    th.testing.assert_close(between[[0, 4]], noise)
    sampler = make_sampler("ddim")
    expected = by_hand(runs.process, runs.unet, [0, 0, 0, 1, 1], 5, sampler=sampler, start=between)
    assert np.abs(saved["arr_0"].astype(int) - expected).max() <= 1
    assert len({image.tobytes() for image in saved["arr_0"]}) == 5


def test_interpolation_takes_one_image_at_either_end(
    runs: Runs, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(pictures / "cat_0.png")
    argv = ["--model_path", runs["unet"], *SAMPLING, "--use_ddim", "--classes", "0", "--log_dir", str(tmp_path)]
    for ends, name in (((str(pictures), one), "init_image"), ((one, str(pictures)), "interpolate")):
        words = [*argv, "--init_image", ends[0], "--interpolate", ends[1]]
        assert f"--{name} holds 5 images, and --interpolate goes" in refused(image_sample.main, words, capsys)


def test_a_guided_model_may_start_from_images_too(runs: Runs, pictures: Path, masks: Path, tmp_path: Path) -> None:
    argv = ["--model_path", runs["unconditional"], "--classifier_path", runs["classifier"], *SAMPLING]
    argv += ["--classes", "dog", "--init_image", str(pictures), "--mask", str(masks / "half.png")]
    saved = saved_by(classifier_sample.main, tmp_path, *argv)
    rows = InitImages(str(pictures), 8, 3, masks=str(masks / "half.png")).rows([0, 1])
    guide = classifier_guidance(runs.classifier, 1.0)
    network = without_labels(runs.unconditional)
    expected = by_hand(runs.process, network, [1, 1], 2, cond_fn=guide, **rows)
    np.testing.assert_array_equal(saved["arr_0"][:2], expected)


@pytest.mark.slow
def test_two_ranks_guide_paint_and_film_as_one(
    runs: Runs, pictures: Path, masks: Path, tmp_path: Path, ranks: Nursery
) -> None:
    argv = ["--model_path", runs["guided"], *SAMPLING, "--cfg_scale", "2", "--init_image", str(pictures)]
    named = tmp_path / "masks"  # a mask for each image, by its name
    named.mkdir()
    for image, mask in zip(sorted(pictures.iterdir()), ("all", "half", "none", "all", "half"), strict=True):
        shutil.copy(masks / f"{mask}.png", named / image.name)
    argv += ["--mask", str(named), "--resample", "2", "--resample_jump", "2", "--save_intermediate", "2"]
    argv += ["--guidance_interval", "5,30", "--device", "cpu"]
    image_sample.main([*argv, "--log_dir", str(tmp_path / "one")])
    result = ranks.run([SCRIPTS / "image_sample.py", *argv, "--log_dir", tmp_path / "two"])
    assert result.returncode == 0, result.stderr
    for name in ("samples_5x8x8x3.npz", "film.png", "film.gif", "request.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_requests_know_guidance_and_images(
    runs: Runs, pictures: Path, masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = ["--init_image", str(pictures / "cat_0.png")]
    half = ["--mask", str(masks / "half.png")]
    argv = ["--model_path", runs["guided"], *SAMPLING, "--log_dir", str(tmp_path), "--cfg_scale", "2"]
    image_sample.main([*argv, *image, *half])
    for more, message in (
        ([*image, *half, "--cfg_scale", "3"], "cfg_scale was 2.0 and is 3.0"),
        ([*image, *half, "--cfg_rescale", "0.5"], "cfg_rescale was 0.0 and is 0.5"),
        ([*image, *half, "--guidance_interval", "5,30"], "guidance_interval was '' and is [5.0, 30.0]"),
        ([*image, *half, "--dynamic_threshold", "0.9"], "dynamic_threshold was 0.0 and is 0.9"),
        ([*image, *half, "--mask_invert"], "init_image was "),
        ([*image, *half, "--strength", "0.5"], "strength was 1.0 and is 0.5"),
        ([*image, *half, "--resample", "2"], "resample was 1 and is 2"),
        (["--init_image", str(pictures / "dog_1.png"), *half], "init_image was "),
        ([], "init_image was "),
        ([*image, "--invert", "--use_ddim"], "sampler was Ancestral() and is DDIM(eta=0.0)"),
    ):
        assert message in refused(image_sample.main, [*argv, *more], capsys)


@pytest.mark.parametrize("sampler", few(["ddpm", "ddim"], ["ddim"]))
def test_scale_0_is_the_unguided_run(runs: Runs, tmp_path: Path, sampler: str) -> None:
    argv = ["--model_path", runs["unet"], *SAMPLING, "--sampler", sampler]
    plain = saved_by(image_sample.main, tmp_path / "plain", *argv)
    guide = ["--classifier_path", runs["classifier"], "--classifier_scale", "0"]
    guided = saved_by(classifier_sample.main, tmp_path / "guided", *argv, *guide)
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(plain[name], guided[name])


@pytest.mark.parametrize(
    ("name", "kind", "words", "clipped"),
    few(
        [
            ("unet", "ddpm", "--timestep_respacing 4", None),
            ("unconditional", "ddim", "--timestep_respacing 4", False),  # as the originals have it
            ("unet", "plms", "--timestep_respacing ddim4", False),
            ("unet", "ddim", "--steps 4", True),
            ("unet", "plms", "--timestep_respacing logsnr4", True),
            ("unet", "ddim", "--timestep_respacing 4 --clip_guided True", True),
            ("unet", "dpm++2m", "--timestep_respacing 4", True),
            ("unet", "dpm++2m", "--steps 4 --clip_guided False", False),
        ],
        lambda row: row[1] in ("ddpm", "ddim"),
    ),
)
def test_guidance_is_that_of_the_loop(
    runs: Runs, tmp_path: Path, name: str, kind: str, words: str, clipped: bool | None
) -> None:
    argv = ["--model_path", runs[name], "--classifier_path", runs["classifier"], "--classes", "dog,owl"]
    argv += [*words.split(), "--classifier_scale", "30", "--sampler", kind, "--num_samples", "2", "--batch_size", "2"]
    saved = saved_by(classifier_sample.main, tmp_path, *argv)
    network = runs.unet if name == "unet" else without_labels(runs.unconditional)
    guide, sampler = classifier_guidance(runs.classifier, 30.0), make_sampler(kind)
    grid = words.split()[1] if "--timestep" in words else f"{sampler.grid}4"

    def expected(**options: Any) -> np.ndarray:
        return by_hand(on_grid(grid), network, [1, 2], 2, sampler=sampler, **options)

    np.testing.assert_array_equal(saved["arr_0"], expected(cond_fn=guide, clip_guided=clipped))
    assert saved["arr_1"].tolist() == [1, 2]
    assert (saved["arr_0"] != expected()).any()
    assert clipped is None or (saved["arr_0"] != expected(cond_fn=guide, clip_guided=not clipped)).any()


def altered(runs: Runs, folder: Path, **flags: Any) -> str:
    """The classifier's folder with other flags in its config."""
    shutil.copytree(runs["classifier"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["flags"] |= flags
    (folder / "config.json").write_text(json.dumps(config))
    if "num_classes" in flags:
        network = build_classifier(ClassifierConfig(**{**asdict(CLASSIFIER), **flags}))
        checkpoints.save(str(folder / "ema_0.5_000100.pt"), network.state_dict())
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"noise_schedule": "linear"}, "the model has noise_schedule cosine and the classifier linear"),
        ({"diffusion_steps": 50}, "the model has diffusion_steps 40 and the classifier 50"),
        ({"num_classes": 4}, "the model has num_classes 3 and the classifier 4"),
        ({"classifier_width": 64}, "the checkpoint has classifier_width 32, you gave 64"),
    ],
)
def test_a_classifier_of_another_kind_is_refused(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], message: str
) -> None:
    folder = altered(runs, tmp_path / "classifier", **flags)
    argv = ["--model_path", runs["unet"], "--classifier_path", folder, *SAMPLING, "--log_dir", str(tmp_path / "out")]
    assert message in refused(classifier_sample.main, argv, capsys)


@pytest.mark.parametrize("sizes", [{"image_size": 16}, {"image_size": "8x16"}, {"large_size": 16, "small_size": 8}])
def test_at_another_size_attention_stays_where_it_was(runs: Runs, sizes: dict[str, Any]) -> None:
    """Its resolution is another one then, which the weights tell; one that is given has the last word."""
    upsampler = "large_size" in sizes
    name, command = ("upsampler", "super_res_sample") if upsampler else ("unet", "image_sample")
    flags = {"model_path": runs[name], **sizes}
    model = restore(cli.Flags(command, flags))
    assert model.flags.values["attention_resolutions"] == "8"
    own = getattr(runs, name).state_dict()
    assert all(th.equal(value, own[key]) for key, value in model.network.state_dict().items())
    with pytest.raises(ValueError, match="attention_resolutions"):
        restore(cli.Flags(command, {**flags, "attention_resolutions": "4"}))


def test_classifiers_of_other_classes_or_sizes_are_refused(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = altered(runs, tmp_path / "names")
    table = {"classes": ["cat", "dog", "yak"], "class_from": "folder", "counts": [1, 1, 1]}
    write_json(f"{names}/classes.json", table)
    bigger = ClassifierConfig(**{**asdict(CLASSIFIER), "image_size": 16})
    network = build_classifier(ClassifierConfig(**{**asdict(bigger), "classifier_attention_resolutions": "8"}))
    checkpoints.save(str(tmp_path / "bigger" / "model000010.pt"), network.state_dict())
    for folder, message in (
        (names, "the model has classes ['cat', 'dog', 'owl'] and the classifier ['cat', 'dog', 'yak']"),
        (str(tmp_path / "bigger"), "the model has image_size 8 and the classifier 16"),
    ):
        argv = ["--model_path", runs["unet"], "--classifier_path", folder, "--log_dir", str(tmp_path / "out")]
        assert message in refused(classifier_sample.main, [*argv, *SAMPLING], capsys)


def test_enlarged_images_keep_order_and_labels(runs: Runs, base: Path, tmp_path: Path, ranks: Nursery) -> None:
    argv = ["--model_path", runs["upsampler"], "--base_samples", str(base), "--batch_size", "2"]
    argv += ["--timestep_respacing", "4", "--use_ddim", "True"]
    saved = saved_by(super_res_sample.main, tmp_path / "one", *argv)
    with np.load(base) as small:
        images, labels = small["arr_0"], small["arr_1"].tolist()
    assert saved["arr_1"].tolist() == labels
    low_res = th.from_numpy(images).movedim(-1, 1) / 127.5 - 1
    expected = by_hand(runs.process, runs.upsampler, labels, 5, sampler=make_sampler("ddim"), more={"low_res": low_res})
    assert np.abs(saved["arr_0"].astype(int) - expected).max() <= 1
    assert "5 images 8x8" in (tmp_path / "one" / "log.txt").read_text()

    script = [SCRIPTS / "super_res_sample.py", *argv, "--log_dir", tmp_path / "two", "--device", "cpu"]
    result = ranks.run(script)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "two" / "samples_5x8x8x3.npz") as two:
        np.testing.assert_array_equal(two["arr_0"], saved["arr_0"])


@pytest.mark.slow
def test_upsamplers_are_guided_by_weaker_ones_and_by_their_null_class(runs: Runs, base: Path, tmp_path: Path) -> None:
    config = SuperResConfig(**{**asdict(UPSAMPLER), "null_class": True})
    weak = scrambled(build_upsampler(config, True))
    folder = write_run(tmp_path / "weak", "super_res_train", weak, config, PROCESS)
    argv = ["--base_samples", str(base), *SAMPLING, "--batch_size", "5"]
    with np.load(base) as small:
        images, labels = th.from_numpy(small["arr_0"]).movedim(-1, 1) / 127.5 - 1, small["arr_1"].tolist()
    away = ["--model_path", runs["upsampler"], "--autoguide_path", str(folder), "--autoguide_scale", "2"]
    free = ["--model_path", str(folder), "--cfg_scale", "2"]
    networks = autoguidance(runs.upsampler, weak, 2.0), classifier_free(weak, 2.0)
    for number, (words, network) in enumerate(zip((away, free), networks, strict=True)):
        saved = saved_by(super_res_sample.main, tmp_path / str(number), *argv, *words)
        expected = by_hand(runs.process, network, labels, 5, more={"low_res": images})
        np.testing.assert_array_equal(saved["arr_0"], expected)


def test_fewer_images_and_labels_from_the_command_line(runs: Runs, base: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "base.npz"
    with np.load(base) as small:
        np.savez(unlabelled, small["arr_0"])
    argv = ["--model_path", runs["upsampler"], "--base_samples", str(unlabelled), *SAMPLING]
    saved = saved_by(super_res_sample.main, tmp_path / "out", *argv, "--num_samples", "3", "--classes", "owl,cat")
    assert saved["arr_0"].shape == (3, 8, 8, 3)
    assert saved["arr_1"].tolist() == [2, 0, 2]


def test_an_upsampler_of_classes_enlarges_without_any(runs: Runs, base: Path, tmp_path: Path, ranks: Nursery) -> None:
    unlabelled = tmp_path / "base.npz"
    with np.load(base) as small:
        images = small["arr_0"]
    np.savez(unlabelled, images)
    argv = ["--model_path", runs["upsampler"], "--randomize_class", "True", "--timestep_respacing", "4"]
    argv += ["--batch_size", "5", "--save_images", "True"]
    saved = saved_by(super_res_sample.main, tmp_path / "none", "--base_samples", str(unlabelled), *argv)
    assert set(saved) == {"arr_0"}
    assert sorted(os.listdir(tmp_path / "none" / "images"))[0] == "000000.png"
    generators = [image_generator(0, index) for index in range(5)]
    labels = [int(th.randint(3, (), generator=generator)) for generator in generators]  # the first draw of each
    low_res = th.from_numpy(images).movedim(-1, 1) / 127.5 - 1
    options = {"more": {"low_res": low_res}, "generator": generators, "randomize_class": True}
    np.testing.assert_array_equal(saved["arr_0"], by_hand(runs.process, runs.upsampler, labels, 5, **options))
    again = saved_by(super_res_sample.main, tmp_path / "own", "--base_samples", str(base), *argv)
    np.testing.assert_array_equal(again["arr_0"], saved["arr_0"])  # whatever labels the images have

    argv[2:4] = ["--class_sampling", "balanced"]
    saved = saved_by(super_res_sample.main, tmp_path / "balanced", "--base_samples", str(unlabelled), *argv)
    assert saved["arr_1"].tolist() == [0, 1, 2, 0, 1]


def test_two_commands_run_in_threads_of_one_process(runs: Runs, tmp_path: Path) -> None:
    def run(seed: int, folder: Path) -> bytes:
        image_sample.main(["--model_path", runs["unet"], *SAMPLING, "--seed", str(seed), "--log_dir", str(folder)])
        return next(folder.glob("*.npz")).read_bytes()

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, (1, 2), (tmp_path / "a", tmp_path / "b")))
    assert together == [run(seed, tmp_path / f"alone{seed}") for seed in (1, 2)]
    for name in ("a", "b"):
        assert f"sampling complete: {tmp_path / name}" in (tmp_path / name / "log.txt").read_text()


def test_a_command_that_fails_leaves_no_temporary_folder_but_one_with_results(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_LOGDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    refused(image_sample.main, ["--model_path", runs["unet"], "--classes", "cow"], capsys)
    assert list(tmp_path.iterdir()) == []
    refused(image_sample.main, ["--model_path", runs["unet"], "--classes", "cow", "--log_dir", f"{tmp_path}/a"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    image_sample.main(["--model_path", runs["unet"], *SAMPLING])
    assert len(list(tmp_path.glob("openai-*/*.npz"))) == 1


@pytest.mark.parametrize(("words", "told"), [([], 1), (["--num_samples", "10000"], 0), (["--batch_size", "1000"], 0)])
def test_a_long_run_that_nobody_asked_for_says_how_to_ask_for_less(
    runs: Runs, tmp_path: Path, words: list[str], told: int
) -> None:
    flags = cli.parse("image_sample", words)
    logger.configure(str(tmp_path), ["log"])
    model = Restored(runs.unet, "", flags, runs.process, [], {})
    sampling.announce(model, sampling.job_of(flags, Plan(runs.unet, job={"shape": (3, 8, 8)})), 40)
    hint = "these are 25000 evaluations: for a first look give --num_samples 16 --samp"
    assert (tmp_path / "log.txt").read_text().count(hint) == told


def refused(main: Main, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command refuses its flags, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    text = capsys.readouterr().err.strip()
    assert "Traceback" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--model_path is missing: give a checkpoint or the folder of a run"),
        ("--model_path nowhere.pt", "--model_path 'nowhere.pt' does not exist"),
        ("--model_path CONFIG", "it is damaged, cut short, or no file of weights; beside it lie ema_0.5_000100.pt"),
        ("--model_path UPSAMPLER", "is an upsampler: give the checkpoint of a diffusion model there"),
        ("--model_path BARE_UPSAMPLER", "is an upsampler: give the checkpoint of a diffusion model there"),
        ("--model_path UNET --autoguide_path nowhere --autoguide_scale 2", "--autoguide_path 'nowhere'"),
        ("--model_path UNET --lora_path nowhere", "--lora_path 'nowhere' does not exist: give a folder"),
        ("--model_path RUNS", "holds no ema_RATE_NNNNNN.pt"),
        ("--model_path UNET --eta 0.5", "the sampler ddpm has no option eta: it is an option of ddim"),
        ("--model_path UNET --use_ddim True --order 2", "the sampler ddim has no option order"),
        ("--model_path UNET --sampler dim", "sampler 'dim' is unknown: use one of ddpm, ddim, "),
        ("--model_path UNET --sampler ddin", "did you mean ddim?"),
        ("--sampler dpm++2m --eta 0.5", "the sampler dpm++2m has no option eta: it is an option of ddim, "),
        ("--sampler dpm++2m --churn 5", "the sampler dpm++2m has no option churn: it is an option of heun, euler"),
        ("--sampler plms --order 7", "order 7"),
        ("--sampler ddim_reverse", "--sampler ddim_reverse turns images to noise: give --invert True"),
        ("--model_path UNET --timestep_respacing karras0", "timestep_respacing 'karras0' has no steps"),
        ("--model_path UNET --timestep_respacing list:3,3,9", "timesteps 3, 3, 9 are not in rising order"),
        ("--model_path UNET --cfg_scale 2", "was trained without --class_dropout"),
        ("--model_path UNCONDITIONAL --cfg_scale 2", "--cfg_scale has no effect without --class_cond"),
        ("--model_path GUIDED --cfg_scale 2 --guidance_interval 1,2", "--guidance_interval 1,2 holds none of the"),
        ("--model_path UNET --init_image IMAGE --strength 0.1 --timestep_respacing trailing4", "--strength 0.1 takes"),
        ("--init_image IMAGE --invert", "--invert needs a sampler that adds no noise, and Ancestral() does"),
        ("--init_image IMAGE --interpolate IMAGE", "--interpolate needs a sampler that adds no noise"),
        ("--model_path UNET --init_image IMAGE --interpolate IMAGE --use_ddim", "--interpolate needs the class of"),
        ("--model_path UNET --init_image nowhere.png", "init_image 'nowhere.png' does not exist"),
        ("--model_path UNET --init_image TORN", "cannot read image"),
        ("--model_path UNET --init_image IMAGE --mask TALL", "the mask tall.png is 12x8 and its image"),
        ("--model_path UNCONDITIONAL --init_image IMAGE --invert --use_ddim --init_classes 1", "--init_classes has no"),
        ("--model_path UNET --classes 7", "class 7 does not exist: the classes are 0 .. 2"),
        ("--model_path UNET --classes ,", "classes ',' names no class"),
        ("--model_path UNET --classes cow", "class 'cow' is unknown; did you mean owl?"),
        ("--model_path UNCONDITIONAL --classes 1", "--classes has no effect without --class_cond, and the checkpoint"),
        ("--model_path UNET --num_channels 64", "the checkpoint has num_channels 32, you gave 64"),
        ("--model_path UNET --class_cond False", "the checkpoint has class_cond True, you gave False"),
        ("--model_path UNET --precision bf16 --use_fp16 True", "precision bf16 contradicts use_fp16"),
        ("--model_path UNET --timestep_respacing 50", "cannot take 50 steps"),
        ("--model_path UNET --image_size 9", "image size 9 is not a multiple of 2"),
        ("--model_path UNET --device abacus", "device 'abacus' cannot be used"),
        ("--model_path UNET --batch_size 0", "0 is below the least value, 1"),
        ("--model_path OPTIMIZER", "holds optimizer state: use"),
        ("--model_path TORN", "cannot be read as a checkpoint"),
    ],
)
def test_mistakes_in_sampling_get_one_sentence(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    weights = os.path.join(runs["unet"], "ema_0.5_000100.pt")
    shutil.copy(weights, tmp_path / "model000100.pt")
    checkpoints.save(str(tmp_path / "opt000100.pt"), {"state": {}, "param_groups": []})
    (tmp_path / "torn.pt").write_bytes(Path(weights).read_bytes()[:-100])
    places = {"RUNS": str(runs.root), "UNET": runs["unet"], "UNCONDITIONAL": runs["unconditional"]}
    shutil.copy(os.path.join(runs["upsampler"], "ema_0.5_000100.pt"), tmp_path / "upsampler.pt")
    places |= {"UPSAMPLER": runs["upsampler"], "BARE_UPSAMPLER": str(tmp_path / "upsampler.pt")}
    places |= {"CONFIG": os.path.join(runs["unet"], "config.json")}
    places |= {"OPTIMIZER": str(tmp_path / "opt000100.pt"), "TORN": str(tmp_path / "torn.pt")}
    places |= {name: runs[name.lower()] for name in ("GUIDED", "WEAK")}
    places |= {name: str(tmp_path / f"{name.lower()}.png") for name in ("IMAGE", "MASK", "TALL")}
    for name, size in (("image", (8, 8)), ("mask", (8, 8)), ("tall", (8, 12))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    argv = [*SAMPLING, *(places.get(word, word) for word in words.split()), "--log_dir", str(tmp_path / "out")]
    assert message in refused(image_sample.main, argv, capsys)
    assert not list(tmp_path.glob("out/*.npz"))
    assert not list(tmp_path.glob("out/request.json"))


def test_impossible_steps_are_refused_before_weights_are_read(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs["unet"], tmp_path / "run")
    (tmp_path / "run" / "ema_0.5_000100.pt").write_bytes(b"torn")
    argv = ["--model_path", str(tmp_path / "run"), "--log_dir", str(tmp_path / "out")]
    for more, message in (
        (["--steps", "50"], "cannot take 50 steps from a section of 40"),
        (["--timestep_respacing", "list:0,40"], "timesteps 0, 40 are not all in 0 .. 39"),
        (["--steps", "4"], "cannot be read as a checkpoint"),
    ):
        assert message in refused(image_sample.main, [*argv, *more], capsys)


def test_mistakes_in_enlarging_get_one_sentence(
    runs: Runs, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.npz").write_text("no npz")
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    small = np.zeros((2, 4, 4, 3), np.uint8)
    labels = {"outside": np.array([0, 3]), "one": np.array([1]), "floats": np.ones(2)}
    for name, arrays in {"bare": [small], "flat": [small[:, :3]], **{k: [small, v] for k, v in labels.items()}}.items():
        np.savez(tmp_path / f"{name}.npz", *arrays)
    argv = ["--model_path", runs["upsampler"], "--timestep_respacing", "2", "--log_dir", str(tmp_path / "out")]
    for words, message in (
        ("", "--base_samples is missing: give small images: an npz"),
        ("--base_samples TMP/text.npz", "is no npz"),
        ("--base_samples TMP/picture.png", "the images have no labels that fit"),
        (f"--base_samples {base} --num_samples 6", "--num_samples 6 is more than the 5 images of"),
        (f"--base_samples {base} --classes 1", "the images have labels of their own"),
        (f"--base_samples {base} --class_sampling random", "--class_sampling random has no effect, as the images have"),
        ("--base_samples TMP/bare.npz", "labels (arr_1): give --classes, or --randomize_class True"),
        ("--base_samples TMP/flat.npz", "are not of small_size 4x4, the first is"),
        ("--base_samples TMP/outside.npz", "class 3 does not exist: the classes are 0 .. 2"),
        ("--base_samples TMP/one.npz", "labels arr_1 (1,) of int64"),
        ("--base_samples TMP/floats.npz", "labels arr_1 (2,) of float64"),
    ):
        given = [*argv, *words.replace("TMP", str(tmp_path)).split()]
        assert message in refused(super_res_sample.main, given, capsys)
    assert not list(tmp_path.glob("out/*.npz"))


def test_mistakes_in_guiding_and_measuring_get_one_sentence(
    runs: Runs, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_path", runs["unet"], "--log_dir", str(tmp_path)]
    assert "--classifier_path is missing" in refused(classifier_sample.main, argv, capsys)
    swapped = ["--model_path", runs["classifier"], "--classifier_path", runs["unet"], "--log_dir", str(tmp_path)]
    assert "ema_0.5_000100.pt is a classifier" in refused(classifier_sample.main, swapped, capsys)
    twice = ["--model_path", runs["unet"], "--classifier_path", runs["unet"], "--log_dir", str(tmp_path)]
    assert "ema_0.5_000100.pt is a diffusion model: give the checkpoint of a classifier there" in refused(
        classifier_sample.main, twice, capsys
    )
    assert "--data_dir is missing: give a folder or a zip" in refused(image_nll.main, argv, capsys)
    shutil.copy(os.path.join(runs["unet"], "ema_0.5_000100.pt"), tmp_path / "unet.pt")
    bare = ["--model_path", str(tmp_path / "unet.pt"), "--log_dir", str(tmp_path)]
    assert "unet.pt is a diffusion model: give the checkpoint of an upsampler" in refused(
        super_res_sample.main, [*bare, "--base_samples", "x.npz"], capsys
    )
    image_nll.main([*argv, "--data_dir", str(pictures), "--timestep_respacing", "2"])
    again = [*argv, "--data_dir", str(pictures), "--timestep_respacing", "4"]
    assert "holds the likelihoods of another request" in refused(image_nll.main, again, capsys)


def test_a_bare_checkpoint_says_what_it_leaves_to_defaults(runs: Runs, tmp_path: Path) -> None:
    weights = str(shutil.copy(os.path.join(runs["unconditional"], "ema_0.5_000100.pt"), tmp_path / "unet.pt"))
    known = ["--image_size", "8", "--noise_schedule", "cosine", "--diffusion_steps", "40"]
    image_sample.main(["--model_path", weights, *known, *SAMPLING, "--log_dir", str(tmp_path / "run")])
    said = (tmp_path / "run" / "log.txt").read_text()
    (line,) = [
        line for line in said.splitlines() if line.startswith(f"no flags of a training beside {weights}: by default ")
    ]
    assert "num_heads 4, num_heads_upsample -1" in line
    assert "predict_xstart False" in line
    assert not any(f"{flag} " in line for flag in ("num_channels", "learn_sigma", *(word[2:] for word in known[::2])))
    image_sample.main(["--model_path", runs["unconditional"], *SAMPLING, "--log_dir", str(tmp_path / "other")])
    assert "by default" not in (tmp_path / "other" / "log.txt").read_text()


def test_a_wrong_flag_is_refused_before_torch_is_imported() -> None:
    code = "import runpy, sys\n"
    for name in ("image_sample", "classifier_sample", "super_res_sample", "image_nll"):
        code += f"sys.argv = ['{name}.py', '--modle_path', 'x']\n"
        code += f"try: runpy.run_path({str(SCRIPTS / name) + '.py'!r}, run_name='__main__')\n"
        code += "except SystemExit as end: assert end.code == 2\n"
    code += "sys.exit(40 + 100 * ('torch' in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 40, result.stderr
    assert result.stderr.count("did you mean --model_path?") == 4


def test_without_a_folder_the_environment_names_it(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "there"))
    image_sample.main(["--model_path", runs["unet"], *SAMPLING, "--num_samples", "1"])
    assert (tmp_path / "there" / "samples_1x8x8x3.npz").exists()
    assert dist_util.world_size() == 1


def test_random_labels_are_drawn_from_the_classes_of_the_training_alone() -> None:
    flags = cli.parse("image_sample", [])
    assert labels_of(flags, ["cat", "dog"], 1000)["num_classes"] == 2
    assert labels_of(flags, [], 1000)["num_classes"] == 1000
    with pytest.raises(ValueError, match=r"class 500 does not exist: the classes are 0 \.\. 1"):
        labels_of(cli.parse("image_sample", ["--classes", "500"]), ["cat", "dog"], 1000)
