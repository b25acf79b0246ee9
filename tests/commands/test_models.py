"""Models by name: the table agrees with the published networks, and commands and `load` take its flags."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from runs import CLASSIFIER, NETWORK, UNET, Runs

from guided_diffusion import load
from guided_diffusion.commands import classifier_sample, flags as cli, image_sample, models, presets
from guided_diffusion.commands.sampling import labels_of
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.options import defaults

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "checkpoints.json").read_text())
TEXT_LATENT = json.loads((Path(__file__).parents[1] / "golden" / "text_latent.json").read_text())
FILES = {name: preset for name, preset in presets.all_presets().items() if preset.file}
THEIRS = {name: preset for name, preset in FILES.items() if preset.origin == "guided-diffusion"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a folder of bundled models, both empty."""
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(presets, "BUNDLED", tmp_path / "models")
    (tmp_path / "cache").mkdir()
    return tmp_path


@pytest.fixture
def bundled(place: Path) -> Path:
    """A model with its classifier, as models/ holds them."""
    Runs(place, unet=UNET, classifier=CLASSIFIER)
    shutil.copytree(place / "unet", place / "models" / "emoji32")
    shutil.copytree(place / "classifier", place / "models" / "emoji32" / "classifier")
    return place / "models" / "emoji32"


def error_of(command: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_the_table_is_of_the_published_networks() -> None:
    assert {preset.file.removesuffix(".pt") for preset in THEIRS.values()} == set(PUBLISHED)
    for preset in THEIRS.values():
        published = PUBLISHED[preset.file.removesuffix(".pt")]
        sections = [section for section in cli.SAVED if preset.flags.keys() <= defaults(section).keys() | PROCESS]
        known = {name: value for section in sections for name, value in defaults(section).items()} | PROCESS
        theirs = {name: value for name, value in published["flags"].items() if name != "use_fp16"}
        assert {name: {**known, **preset.flags}[name] for name in theirs} == theirs
        assert preset.parameters == published["parameters"]
        for name in (preset.classifier, preset.upsampler):
            assert not name or name in FILES


PROCESS = defaults(cli.c.DiffusionConfig)
OTHERS = {
    "ldm-imagenet256": "cin256-v2",
    "ldm-text256": "txt2img-1p4B",
    "ldm-celebahq256": "celebahq-vq4",
    "ldm-ffhq256": "celebahq-vq4",
    "ldm-churches256": "lsun-churches-kl8",
    "stable-diffusion-1.4": "stable-diffusion-v1",
}


def test_the_table_has_the_networks_of_glide_and_latent_diffusion() -> None:
    names = {f"glide-{name}": "glide" for name in TEXT_LATENT["glide"]} | dict.fromkeys(OTHERS, "latent_unets")
    assert set(names) == set(FILES) - set(THEIRS)
    for name, part in names.items():
        published = TEXT_LATENT[part][OTHERS.get(name, name.removeprefix("glide-"))]
        assert FILES[name].parameters == published["parameters"]
        assert not FILES[name].flags  # the file tells them
        assert FILES[name].source.urls[0].startswith("https://")
        assert (FILES[name].upsampler or "glide-upsample") in FILES
    assert len({preset.file for preset in FILES.values()}) == len(FILES)


def test_flags_of_every_model_fit_the_commands_that_take_it(place: Path) -> None:
    for preset in FILES.values():
        Path(preset.place).write_bytes(b"0")
        os.truncate(preset.place, preset.bytes or preset.least)  # a hole
    for name, preset in FILES.items():
        commands = {presets.DIFFUSION: ("image_sample", "image_nll"), presets.UPSAMPLER: ("super_res_sample",)}
        for command in commands.get(preset.kind, ()):
            flags = cli.parse(command, ["--preset", name])
            assert flags.values["model_path"] == preset.place
            if not preset.cfg_scale:
                flags.check()
            elif command == "image_sample":  # whose file says that it knows texts or classes
                assert flags.values["cfg_scale"] == preset.cfg_scale
                assert cli.parse(command, ["--preset", name, "--cfg_scale", "2"]).values["cfg_scale"] == 2
        if preset.classifier:
            values = cli.parse("classifier_sample", ["--preset", name, "--num_channels", "64"]).values
            assert values["classifier_path"] == FILES[preset.classifier].place
            assert values["classifier_depth"] == FILES[preset.classifier].flags["classifier_depth"]
            assert values["classifier_scale"] == preset.classifier_scale
            assert values["num_channels"] == 64


def test_classes_of_imagenet_have_their_names() -> None:
    names = presets.class_names("imagenet256")
    assert len(set(names)) == 1000
    assert [names[label] for label in (0, 207, 360, 388, 949)] == [
        "tench",
        "golden retriever",
        "otter",
        "giant panda",
        "strawberry",
    ]
    assert presets.class_names("lsun-cat") == presets.class_names("") == []

    def ids(text: str) -> Any:
        return labels_of(cli.parse("image_sample", ["--class_cond", "True", "--classes", text]), names, 1000)["labels"]

    assert ids("golden retriever,giant panda,3") == [207, 388, 3]
    with pytest.raises(UserError, match="class 'golden retreiver' is unknown; did you mean golden retriever"):
        ids("golden retreiver")


def test_models_that_are_not_here_are_answered_by_what_to_do(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--preset", "imagenet64"], "fetch it with 'guided-diffusion models download imagenet64' (1.2 GB)"),
        (["--preset", "imagnet64"], "there is no model 'imagnet64'; did you mean imagenet64?"),
        (["--preset", "imagenet64-256"], "the model imagenet64-256 is an upsampler: use super_res_sample"),
        (["--preset", "emoji32"], "comes with a checkout of the repository, not with the package"),
    ):
        assert message in error_of(image_sample, words, capsys)
    for name, message in (
        ("64x64_diffusion", "models download imagenet64' (1.2 GB), or put it there"),
        ("imagnet64", "'imagnet64' is no file, no folder, and no model that has a name; did you mean imagenet64?"),
        ("emoji32", "run this in a checkout, or give the path of its folder"),
    ):
        with pytest.raises(UserError) as caught:
            load(name)
        assert message in str(caught.value)


def test_a_file_of_another_project_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = FILES["imagenet64-classifier"]
    th.save({"layer.weight": th.zeros(3)}, preset.place)
    error = error_of(models, ["verify", "imagenet64-classifier"], capsys)
    assert "is not 64x64_classifier.pt, it has" in error
    th.save({"layer.weight": th.zeros(3)}, FILES["imagenet64"].place)
    cut = r"64x64_diffusion\.pt, it has \d+ bytes.*: remove it, and fetch it again with .* models download imagenet64'"
    with pytest.raises(UserError, match=cut):
        load("imagenet64", device="cpu")
    with pytest.raises(UserError, match=cut):
        presets.given("imagenet64", "image_sample", {"model_path"}, {})


def test_a_bundled_model_is_taken_by_its_name(bundled: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bundled, place / "models" / "mine")
    for name in ("emoji32", "mine"):
        model = load(name)
        made = model.sample(classes=["owl", "cat"], classifier_scale=2.0, steps=2, batch_size=2)
        words = ["--preset", name, "--num_samples", "2", "--batch_size", "2", "--classes", "owl,cat", "--steps", "2"]
        classifier_sample.main([*words, "--classifier_scale", "2", "--log_dir", str(place / f"log-{name}")])
        (path,) = (place / f"log-{name}").glob("samples_*.npz")
        np.testing.assert_array_equal(made.images, np.load(path)["arr_0"])
    models.main(["list"])
    assert "mine " in capsys.readouterr().out
    models.main(["verify", "mine"])
    assert "parameters, which fit its network; bundled" in capsys.readouterr().out
    models.main(["download", "mine"])
    assert "it comes with the checkout" in capsys.readouterr().out


def test_flags_of_a_named_model_go_with_a_path_too(place: Path) -> None:
    runs = Runs(place, unet=UNET)
    (place / "unet" / "config.json").unlink()
    options = {**NETWORK, "image_size": 8, "preset": "imagenet64", "num_res_blocks": 1, "num_head_channels": -1}
    more = {
        "use_new_attention_order": False,
        "resblock_updown": False,
        "dropout": 0.0,
        "diffusion_steps": 40,
        "attention_resolutions": "4",
    }
    model = load(Path(runs["unet"]) / "ema_0.5_000100.pt", **{**options, **more})
    assert model.config["noise_schedule"] == "cosine"
    assert model.config["num_channels"] == 32


def test_what_is_known_of_a_model_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.main(["list"])
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in FILES)
    models.main(["show", "imagenet256"])
    shown = capsys.readouterr().out
    for name, facts in {
        "glide-base": ["dec-2021/base.pt", "upsampler:        glide-upsample", "tokenizer.json", "at least 770061452"],
        "emoji32": [
            "parameters:       2857958",
            "Twemoji, CC-BY",
            "sampler:          dpm++2m",
            "models/NAME/README.md",
        ],
        "imagenet256-uncond": ["fid 12.0, sfid 10.4", "sampler:          ddpm"],
        "ldm-churches256": ["latent-diffusion/lsun_churches.zip", "fid 4.02, precision 0.64", "CompVis"],
        "stable-diffusion-1.4": ["sha256:           fe4efff1e174c627", "RAIL-M", "cfg_scale:        7.5"],
    }.items():
        models.main(["show", name])
        told = capsys.readouterr().out
        assert [fact for fact in facts if fact not in told] == []
    for fact in (
        "256x256_diffusion.pt",
        "553838086",
        "fid 4.59, sfid 5.25, precision 0.82",
        "MIT",
        "--num_channels 256",
        "research",
    ):
        assert fact in shown
    models.main(["show", "imagenet256-uncond"])
    assert "2211383297" in capsys.readouterr().out
    for words, message in (
        (["show"], "show needs the name of a model: list names them"),
        (["list", "imagenet64"], "list takes no name: write show NAME"),
        (["show", "imagenet65"], "did you mean imagenet64?"),
        (["list", "--out", "x"], "--out has no effect without the action download"),
        (["remove"], "'remove' is none of list, show, download, verify"),
    ):
        assert message in error_of(models, words, capsys)
