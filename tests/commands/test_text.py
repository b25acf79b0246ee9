"""The commands with text: captions in training, prompts in sampling, guidance by CLIP."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from PIL import Image
from ranks import Nursery
from runs import SCRIPTS, by_hand, saved_by
from text_encoders import save_clip, save_encoder

from guided_diffusion import load
from guided_diffusion.commands import (
    cascade_sample,
    convert,
    evaluation,
    flags as cli,
    image_nll,
    image_sample,
    image_train,
    previews,
    super_res_sample,
    super_res_train,
    sweep,
    training,
)
from guided_diffusion.commands.common import restore
from guided_diffusion.commands.flag_files import flags_in
from guided_diffusion.commands.tool_sections import SweepConfig
from guided_diffusion.evaluation.features import make_extractor
from guided_diffusion.evaluation.images import open_images
from guided_diffusion.networks.architecture import architecture
from guided_diffusion.networks.compiling import compile_network
from guided_diffusion.networks.context import clip_embedding, train_tokenizer
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.guidance import autoguidance, classifier_free
from guided_diffusion.sampling.samplers import make_sampler
from guided_diffusion.training.checkpoints import config_beside

TEXTS = ["a red cat", "a blue dog", "two red dogs", "rain and snow"]
TINY: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": 4,
    "num_heads": 2,
    "diffusion_steps": 40,
    "num_workers": 0,
    "log_interval": 1,
    "ema_rate": 0.5,
    "batch_size": 4,
    "lr": 1e-2,
}
TEXT = {
    "context": "text",
    "context_dim": 16,
    "text_depth": 1,
    "vocab_size": 270,
    "max_tokens": 16,
    "context_pooled": True,
}
BASE = {**TINY, **TEXT, "image_size": 8, "caption_dropout": 0.3}
SAMPLING = {"num_samples": 5, "batch_size": 2, "timestep_respacing": 3}


def words(**flags: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def refused(capsys: pytest.CaptureFixture[str], main: Any, **flags: Any) -> str:
    """The sentence that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words(**flags))
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert len(errors.strip().splitlines()) == 1
    return errors


def weights(folder: Path, name: str) -> dict[str, th.Tensor]:
    state: dict[str, th.Tensor] = th.load(folder / name, weights_only=True)
    return state


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    return list(first) == list(second) and all(th.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def pictures(root: Path) -> str:
    """Eight pictures with a caption or two each."""
    folder = root / "pictures"
    folder.mkdir()
    captions: dict[str, Any] = {}
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        name = f"{'ab'[index % 2]}_{index}.png"
        Image.fromarray(pixels).save(folder / name)
        captions[name] = [TEXTS[index % 4], "it snows"] if index < 2 else TEXTS[index % 4]
    (folder / "captions.json").write_text(json.dumps(captions))
    return str(folder)


@pytest.fixture(scope="module")
def frozen(root: Path) -> str:
    """A folder of BERT."""
    return save_encoder("bert", root / "bert")


@pytest.fixture(scope="module")
def run(root: Path, pictures: str) -> str:
    """A run of a network whose text encoder is trained along."""
    image_train.main(words(**BASE, data_dir=pictures, max_steps=3, log_dir=root / "run"))
    return str(root / "run")


@pytest.fixture(scope="module")
def frozen_run(root: Path, pictures: str, frozen: str) -> str:
    """A run of a network of a frozen text encoder."""
    flags = {name: value for name, value in BASE.items() if name not in ("context_dim", "text_depth", "vocab_size")}
    folder = root / "frozen"
    image_train.main(words(**flags, text_encoder=frozen, data_dir=pictures, max_steps=3, log_dir=folder))
    return str(folder)


@pytest.mark.parametrize("kind", ["run", "frozen_run"])
def test_a_run_of_captions_goes_on_bit_for_bit(
    kind: str, request: pytest.FixtureRequest, pictures: str, tmp_path: Path
) -> None:
    whole = Path(request.getfixturevalue(kind))
    flags = config_beside(str(whole))
    known = {name: flags[name] for name in (*BASE, "text_encoder") if kind == "run" or name not in TEXT}
    known |= {} if kind == "run" else {"context": "text", "max_tokens": 16, "context_pooled": True}
    for steps in (2, 3):
        argv = words(**known, data_dir=pictures, max_steps=steps, log_dir=tmp_path, resume_checkpoint="auto")
        image_train.main(argv)
    for name in ("model000003.pt", "ema_0.5_000003.pt"):
        assert same(weights(whole, name), weights(tmp_path, name))
    assert (tmp_path / "tokenizer.json").exists() == (kind == "run")
    assert any(name.startswith("context_encoder.") for name in weights(whole, name)) == (kind == "run")
    assert config_beside(str(tmp_path))["text_fingerprint"] == flags["text_fingerprint"] != ""
    assert flags["null_text"]


def test_the_config_describes_the_encoder(run: str, frozen_run: str, frozen: str) -> None:
    ours, theirs = config_beside(run), config_beside(frozen_run)
    assert (ours["text_encoder"], ours["context_dim"]) == ("scratch", 16)
    assert (theirs["text_encoder"], theirs["context_dim"]) == (frozen, 8)
    assert re.fullmatch("[0-9a-f]{16}", theirs["text_fingerprint"])


def test_a_run_and_its_text_encoder_move_together(frozen_run: str, frozen: str, tmp_path: Path) -> None:
    there, back = tmp_path / "there", os.path.relpath(frozen, frozen_run)
    assert json.loads((Path(frozen_run) / "config.json").read_text())["flags"]["text_encoder"] == back
    shutil.copytree(frozen_run, there / "runs" / "mine")
    shutil.copytree(frozen, there / "runs" / "mine" / back)
    os.rename(there, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "runs" / "mine"
    assert config_beside(str(moved))["text_encoder"] == os.path.normpath(moved / back)
    convert.main([str(moved), str(tmp_path / "elsewhere" / "one.safetensors")])
    one = load(tmp_path / "elsewhere" / "one.safetensors", device="cpu")
    assert one.config["text_encoder"] == os.path.normpath(moved / back)
    made = [model.sample(prompt="rain", timestep_respacing="2").images for model in (one, load(frozen_run))]
    np.testing.assert_array_equal(*made)
    assert flags_in(str(moved / "config.json"))[0]["text_encoder"] == os.path.normpath(moved / back)


def shown_texts(network: Any, call: Any) -> list[str]:
    """The texts of the tokens that a network first sees in a call."""
    seen: list[th.Tensor] = []
    handle = network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["tokens"]), with_kwargs=True)
    call()
    handle.remove()
    return [network.context_encoder.tokenizer.decode(row.tolist()).strip() for row in seen[0]]


def test_previews_validation_and_evaluation_know_the_captions(
    pictures: str,
    root: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "val").mkdir()
    for number in range(2):
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "val" / f"{number}.png")
        (tmp_path / "val" / f"{number}.txt").write_text("a blue cat\nsnow")
    flags = {**BASE, "caption_dropout": 0.9, "data_dir": pictures, "max_steps": 2, "log_dir": tmp_path / "run"}
    flags |= {"val_data_dir": tmp_path / "val", "val_interval": 1, "sample_interval": 2}
    clip = save_clip(root / "clip")
    evaluating = {"eval_interval": 2, "eval_samples": 12, "eval_steps": 1, "features": f"clip:{clip}"}
    image_train.main(words(**flags, **evaluating))
    table = (tmp_path / "run" / "progress.csv").read_text().splitlines()[0]
    assert "val_loss" in table
    assert "eval_fd_clip" in table
    assert (tmp_path / "run" / "previews" / "images.png").exists()

    run = training.begin(cli.parse("image_train", words(**{**flags, "log_dir": tmp_path / "again"})))
    draw = previews.of_samples(run)
    assert shown_texts(run.network, lambda: draw(run.network, 1)) == ["a blue cat"] * 16
    assert run.validation is not None
    _, cond = next(run.validation)
    assert cond["context_mask"].sum(1).min() > 2  # no caption is dropped there
    job = evaluation.evaluation_job(run.flags.with_values(eval_samples=8), make_sampler("ddim"), run.stream)
    assert job.conditioning is not None
    tokens = job.conditioning(range(8))["tokens"]
    texts = [run.network.context_encoder.tokenizer.decode(row.tolist()).strip() for row in tokens]
    assert sorted(texts) == sorted(TEXTS * 2)
    run.stream.close()


def losses(folder: Path) -> list[float]:
    with open(folder / "progress.csv", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_ranks_that_hold_parts_learn_from_captions_as_whole_ones(pictures: str, tmp_path: Path, ranks: Nursery) -> None:
    for name, more in (("whole", {}), ("parts", {"fsdp": True})):
        flags = {**BASE, "batch_size": 2, "data_dir": pictures, "max_steps": 2, "device": "cpu", **more}
        result = ranks.run([SCRIPTS / "image_train.py", *words(**flags, log_dir=tmp_path / name)])
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    one, two = (weights(tmp_path / name, "model000002.pt") for name in ("whole", "parts"))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}


@pytest.mark.slow
def test_a_network_of_text_is_compiled(run: str, pictures: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compile_network", partial(compile_network, backend="aot_eager"))
        image_train.main(words(**BASE, data_dir=pictures, max_steps=3, compile=True, log_dir=tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(Path(run)), rel=1e-4)


def test_an_upsampler_trains_on_captions(pictures: str, tmp_path: Path) -> None:
    flags = {**TINY, **TEXT, "large_size": 8, "small_size": 4, "sample_interval": 1, "max_steps": 1}
    flags["cond_aug"] = 0.2
    super_res_train.main(words(**flags, data_dir=pictures, val_data_dir=pictures, val_interval=1, log_dir=tmp_path))
    assert any("context_encoder" in name for name in weights(tmp_path, "model000001.pt"))
    assert (tmp_path / "previews" / "000001.png").exists()


def test_classes_can_be_the_context(pictures: str, tmp_path: Path) -> None:
    flags = {**TINY, "image_size": 8, "context": "classes", "context_dim": 8, "class_cond": True, "num_classes": 2}
    image_train.main(words(**flags, class_dropout=0.2, data_dir=pictures, max_steps=1, log_dir=tmp_path / "run"))
    state = weights(tmp_path / "run", "model000001.pt")
    assert state["context_encoder.embedding.weight"].shape == (3, 8)
    argv = words(**SAMPLING, model_path=tmp_path / "run", classes="b,a", cfg_scale=2)
    assert saved_by(image_sample.main, tmp_path / "out", *argv)["arr_1"].tolist() == [1, 0, 1, 0, 1]


def test_a_run_that_starts_from_another_has_its_tokenizer(run: str, pictures: str, tmp_path: Path) -> None:
    flags = {**TINY, "init_from": run, "data_dir": pictures, "max_steps": 1, "log_dir": tmp_path / "next"}
    image_train.main(words(**{**flags, "lr": 0}))
    assert (tmp_path / "next" / "tokenizer.json").read_bytes() == (Path(run) / "tokenizer.json").read_bytes()
    assert same(weights(tmp_path / "next", "model000001.pt"), weights(Path(run), "ema_0.5_000003.pt"))


def test_a_dry_run_counts_the_attention_to_text(capsys: pytest.CaptureFixture[str]) -> None:
    image_train.main([*words(**BASE), "--dry_run"])
    told = capsys.readouterr().out
    assert "without its text encoder, whose vectors have 16 numbers" in told
    assert "GFLOP an image" in told


@pytest.fixture(scope="module")
def prompts(root: Path) -> str:
    """A file of two prompts."""
    (root / "prompts.txt").write_text("a red cat\n\n  two   blue dogs! \n")
    return str(root / "prompts.txt")


@pytest.fixture(scope="module")
def made(run: str, prompts: str, root: Path) -> Path:
    """What sampling for two prompts in turn leaves."""
    flags = {**SAMPLING, "model_path": run, "prompts": prompts, "cfg_scale": 2, "save_images": True}
    image_sample.main(words(**flags, log_dir=root / "made"))
    return root / "made"


TURNS = ["a red cat", "two blue dogs!"]


def images(folder: Path) -> np.ndarray:
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as saved:
        pixels: np.ndarray = saved["arr_0"]
        return pixels


def test_prompts_are_kept_with_the_images(made: Path) -> None:
    with np.load(made / "samples_5x8x8x3.npz") as saved:
        assert saved["prompts"].tolist() == [TURNS[index % 2] for index in range(5)]
        assert saved["prompts"].dtype.kind == "U"
        assert saved.files == ["arr_0", "prompts"]
        pixels = saved["arr_0"]
    assert open_images(str(made)).count == 5
    assert sorted(path.name for path in (made / "images").iterdir())[:2] == [
        "000000_a-red-cat.png",
        "000001_two-blue-dogs.png",
    ]
    with Image.open(made / "images" / "000001_two-blue-dogs.png") as picture:
        assert picture.info["prompt"] == TURNS[1]
        assert (np.asarray(picture) == pixels[1]).all()
    request = json.loads((made / "request.json").read_text())
    assert request["prompts"] == TURNS
    assert "text_encoder" not in request
    with Image.open(made / "samples.png") as grid:
        assert grid.width > 3 * 64  # the prompts stand beside the rows


def test_an_image_is_that_of_its_prompt_whatever_is_in_its_batch(made: Path, run: str, tmp_path: Path) -> None:
    flags = {**SAMPLING, "model_path": run, "cfg_scale": 2}
    for number, prompt in enumerate(TURNS):
        alone = saved_by(image_sample.main, tmp_path / str(number), *words(**flags, prompt=prompt))["arr_0"]
        assert (alone[number::2] == images(made)[number::2]).all()
        assert (alone[1 - number :: 2] != images(made)[1 - number :: 2]).any()
    wider = saved_by(image_sample.main, tmp_path / "3", *words(**{**flags, "batch_size": 3}, prompt=TURNS[0]))["arr_0"]
    assert np.abs(wider[::2].astype(int) - images(made)[::2]).max() <= 1


def test_two_ranks_and_a_restart_make_the_images_of_one(
    made: Path, run: str, prompts: str, tmp_path: Path, ranks: Nursery, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**SAMPLING, "model_path": run, "prompts": prompts, "cfg_scale": 2, "log_dir": tmp_path, "device": "cpu"}
    result = ranks.run([SCRIPTS / "image_sample.py", *words(**flags, save_images=True)])
    assert result.returncode == 0, result.stderr
    name = "samples_5x8x8x3.npz"
    assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "images")) == sorted(os.listdir(made / "images"))
    before = os.stat(tmp_path / name).st_mtime_ns
    image_sample.main(words(**flags))
    assert os.stat(tmp_path / name).st_mtime_ns == before
    told = refused(capsys, image_sample.main, **{**flags, "prompts": ""}, prompt=TURNS[0])
    assert "holds the samples of another request (prompts was" in told


def test_load_samples_and_saves_what_the_script_does(run: str, tmp_path: Path) -> None:
    model = load(run, device="cpu")
    for number, texts in enumerate((["a red cat"], ["a red cat", "two red dogs", "rain"])):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(texts))
        flags = {**SAMPLING, "seed": 2, "negative_prompt": "rain", "cfg_scale": 3}
        argv = words(**flags, model_path=run, prompts=file, save_images=True)
        saved_by(image_sample.main, tmp_path / str(number), *argv)
        made = model.sample(prompt=texts if number else texts[0], **flags)
        made.save(tmp_path / "made.npz")
        made.save(tmp_path / "made.png")
        made.save(tmp_path / f"each{number}")
        (path,) = (tmp_path / str(number)).glob("samples_*.npz")
        assert (tmp_path / "made.npz").read_bytes() == path.read_bytes()
        grids = [np.asarray(Image.open(tmp_path / name)) for name in ("made.png", f"{number}/samples.png")]
        np.testing.assert_array_equal(*grids)
        names = [sorted(os.listdir(tmp_path / folder)) for folder in (f"each{number}", f"{number}/images")]
        assert names[0] == names[1]
    assert len(model.sample(prompt=["a", "b"], timestep_respacing="2")) == 2
    for options, message in (
        ({}, "was trained with captions: give --prompt"),
        ({"prompt": ["a", " "]}, "a text of prompt is empty"),
        ({"prompt": "a", "classes": [0]}, "--classes has no effect without --class_cond"),
    ):
        with pytest.raises(UserError, match=message):
            model.sample(**options)


def test_load_turns_images_to_noise_under_their_prompt(run: str, pictures: str, tmp_path: Path) -> None:
    flags = {**SAMPLING, "num_samples": 2, "init_image": pictures, "invert": True, "sampler": "ddim", "prompt": "rain"}
    back = saved_by(image_sample.main, tmp_path, *words(**flags, model_path=run))["arr_0"]
    model = load(run, device="cpu")
    first = sorted(Path(pictures).glob("*.png"))[:2]
    noise = model.invert(
        np.stack([np.asarray(Image.open(path)) for path in first]), prompt="rain", timestep_respacing=3
    )
    made = model.sample(start=noise, prompt="rain", sampler="ddim", timestep_respacing=3, batch_size=2)
    np.testing.assert_array_equal(made.images, back)


@pytest.mark.parametrize(("kind", "negative"), [("run", ""), ("run", "rain"), ("frozen_run", "rain")])
def test_guidance_leads_away_from_the_empty_or_the_negative_prompt(
    kind: str, negative: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(kind)
    flags = {**SAMPLING, "num_samples": 2, "model_path": path, "prompt": TEXTS[1], "cfg_scale": 3}
    argv = words(**flags, negative_prompt=negative)
    samples = saved_by(image_sample.main, tmp_path, *argv)["arr_0"]
    model = restore(cli.parse("image_sample", argv))
    assert model.encoder is not None
    network = classifier_free(model.network, 3, null=model.encoder.conditioning([negative]))
    more = model.encoder.conditioning([TEXTS[1]] * 2)
    assert (samples == by_hand(model.process, network, None, 2, more=more)).all()
    assert (samples != by_hand(model.process, model.network, None, 2, more=more)).any()


def test_a_weaker_network_encodes_the_prompts_itself(run: str, tmp_path: Path) -> None:
    flags = {**SAMPLING, "num_samples": 2, "model_path": f"{run}/model000003.pt", "prompt": TEXTS[1]}
    argv = words(**flags, autoguide_path=f"{run}/ema_0.5_000003.pt", autoguide_scale=3, cfg_scale=2)
    samples = saved_by(image_sample.main, tmp_path, *argv)["arr_0"]
    model = restore(cli.parse("image_sample", argv))
    weak = restore(cli.parse("image_sample", words(**{**flags, "model_path": f"{run}/ema_0.5_000003.pt"})))
    assert model.encoder is not None
    network = classifier_free(model.network, 2, null=model.encoder.keywords([""]))
    network = autoguidance(network, weak.network, 3)
    more = model.encoder.keywords([TEXTS[1]] * 2)
    assert (samples == by_hand(model.process, network, None, 2, more=more)).all()


def test_a_frozen_encoder_may_have_moved(frozen_run: str, frozen: str, tmp_path: Path) -> None:
    flags = {**SAMPLING, "model_path": frozen_run, "prompt": "a red cat", "log_dir": tmp_path / "out"}
    image_sample.main(words(**flags))
    shutil.copytree(frozen, tmp_path / "moved")
    image_sample.main(words(**flags, text_encoder=tmp_path / "moved"))  # the same request, which is finished
    assert "nothing to sample" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_single_file_of_weights_reads_text(ending: str, run: str, made: Path, prompts: str, tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    file = tmp_path / "file" / f"text.{ending}"
    convert.main([run, str(file)])
    assert (tmp_path / "file" / "tokenizer.json").exists() == (ending == "pt")
    flags = {**SAMPLING, "model_path": file, "prompts": prompts, "cfg_scale": 2}
    assert (saved_by(image_sample.main, tmp_path / "out", *words(**flags))["arr_0"] == images(made)).all()


def test_a_text_that_is_too_long_is_cut_with_a_line(run: str, tmp_path: Path) -> None:
    flags = {**SAMPLING, "num_samples": 1, "model_path": run, "log_dir": tmp_path}
    image_sample.main(words(**flags, prompt="a red cat and two blue dogs in the rain"))
    said = (tmp_path / "log.txt").read_text()
    assert re.search(r"has \d+ tokens, and max_tokens is 16: it is cut behind '.*a red cat", said)


def test_editing_takes_prompts(run: str, pictures: str, tmp_path: Path) -> None:
    """An image that is inverted under its prompt comes back, better than under another one."""
    flags = {**SAMPLING, "num_samples": 2, "model_path": run, "init_image": f"{pictures}/a_0.png", "use_ddim": True}
    flags |= {"invert": True, "timestep_respacing": 40, "prompt": "a red cat"}
    original = np.asarray(Image.open(f"{pictures}/a_0.png")).astype(float)
    back = saved_by(image_sample.main, tmp_path / "a", *words(**flags))["arr_0"]
    plain = saved_by(image_sample.main, tmp_path / "b", *words(**{**flags, "invert": False, "strength": 1}))["arr_0"]
    assert np.abs(back - original).mean() < np.abs(plain - original).mean() / 2
    between = {**flags, "invert": False, "interpolate": f"{pictures}/b_1.png"}
    assert saved_by(image_sample.main, tmp_path / "c", *words(**between))["arr_0"].shape == (2, 8, 8, 3)


def test_weights_show_that_they_attend(run: str, tmp_path: Path) -> None:
    read, flags = architecture(weights(Path(run), "model000003.pt"), 8), config_beside(run)
    names = ("context", "context_dim", "context_pooled", "transformer_depth")
    names += ("attention_resolutions", "num_res_blocks", "class_cond")
    assert {name: str(read[name]) for name in names} == {name: str(flags[name]) for name in names}
    argv = words(**SAMPLING, model_path=run, image_size=16, prompt="a cat")  # the levels stay where they are
    assert saved_by(image_sample.main, tmp_path, *argv)["arr_0"].shape == (5, 16, 16, 3)


def test_a_cascade_takes_its_prompts_through_all_stages(run: str, pictures: str, prompts: str, tmp_path: Path) -> None:
    sizes = {"large_size": 16, "small_size": 8, "attention_resolutions": 8}
    upsampler = {**TINY, **sizes, "data_dir": pictures, "max_steps": 1}
    super_res_train.main(words(**upsampler, log_dir=tmp_path / "plain"))
    super_res_train.main(words(**upsampler, **TEXT, cond_aug=0.2, log_dir=tmp_path / "text"))
    argv = words(num_samples=3, batch_size=2, prompts=prompts, log_dir=tmp_path / "out", save_images=True)
    paths = [run, str(tmp_path / "plain"), str(tmp_path / "text")]
    stages = [f"--{name}.model_path={path}" for name, path in zip(("base", "up1", "up2"), paths, strict=True)]
    steps = ["--base.steps=2", "--up1.steps=1", "--up2.steps=1", "--base.cfg_scale=2"]
    with pytest.raises(SystemExit):  # up2 enlarges other images
        cascade_sample.main([*argv, *stages, *steps])
    stages[1] = stages[1].replace("plain", "text")
    cascade_sample.main([*argv, *stages[:2], *steps[:2]])
    for name in ("base/samples_3x8x8x3.npz", "up1/samples_3x16x16x3.npz"):
        with np.load(tmp_path / "out" / name) as saved:
            assert saved["prompts"].tolist() == [*TURNS, TURNS[0]]
    assert (tmp_path / "out" / "up1" / "images" / "000001_two-blue-dogs.png").exists()

    # an upsampler without text hands the prompts on, and one with text takes others where they are given
    enlarging = {**SAMPLING, "num_samples": 3, "base_samples": tmp_path / "out" / "base", "timestep_respacing": 1}
    plain = saved_by(super_res_sample.main, tmp_path / "a", *words(**enlarging, model_path=tmp_path / "plain"))
    assert plain["prompts"].tolist() == [*TURNS, TURNS[0]]
    flags = {**enlarging, "model_path": tmp_path / "text"}
    others = saved_by(super_res_sample.main, tmp_path / "b", *words(**flags, prompt="rain"))
    assert others["prompts"].tolist() == ["rain"] * 3
    assert (others["arr_0"] != images(tmp_path / "out" / "up1")).any()


@pytest.mark.parametrize("seen", ["x_0", "x_t"])
def test_clip_leads_samples_to_a_text(seen: str, run: str, root: Path, tmp_path: Path) -> None:
    clip = save_clip(root / f"clip {seen}")
    flags = {**SAMPLING, "num_samples": 4, "model_path": run, "prompt": "a red cat"}
    guiding = {"clip_path": clip, "clip_on": seen}
    target = F.normalize(clip_embedding(clip, "a red cat"), dim=0).numpy()
    extractor = make_extractor(f"clip:{clip}")
    near = []
    for number, scale in enumerate((0, 200, -200)):
        samples = saved_by(image_sample.main, tmp_path / str(number), *words(**flags, **guiding, clip_scale=scale))
        near.append(float((extractor(samples["arr_0"]).pool @ target).mean()))
    assert near[2] < near[0] < near[1]
    plain = saved_by(image_sample.main, tmp_path / "plain", *words(**flags))["arr_0"]
    assert (plain == images(tmp_path / "0")).all()
    request = json.loads((tmp_path / "1" / "request.json").read_text())
    assert (request["clip_prompt"], request["clip_on"], request["clip_scale"]) == ("a red cat", seen, 200)


def test_mistakes_of_training_are_a_sentence(
    pictures: str, frozen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, tmp_path / "some")
    captions = json.loads((tmp_path / "some" / "captions.json").read_text())
    captions.popitem()
    (tmp_path / "some" / "captions.json").write_text(json.dumps(captions))
    flags = {**BASE, "data_dir": pictures, "max_steps": 1, "log_dir": tmp_path / "run"}
    of_folder = {name: value for name, value in flags.items() if name not in ("text_depth", "vocab_size")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**flags, "data_dir": tmp_path / "some"}, "1 of 8 images have no caption in captions.json"),
        ({**of_folder, "text_encoder": tmp_path / "none"}, "cannot be used: there is no such folder"),
        ({**of_folder, "text_encoder": frozen}, "gives vectors of 8 numbers, and context_dim is 16"),
        ({**flags, "caption_column": "titel"}, "caption_column 'titel' is none of its columns"),
        ({**TINY, "image_size": 8, "context": "classes", "data_dir": pictures}, "context classes needs labels"),
    ]
    for given, sentence in cases:
        assert sentence in refused(capsys, image_train.main, **given)
    image_train.main(words(**{**flags, "data_dir": tmp_path / "some", "batch_size": 7}, skip_uncaptioned=True))


def test_mistakes_of_sampling_are_a_sentence(
    run: str, frozen_run: str, pictures: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_train.main(words(**TINY, image_size=8, data_dir=pictures, max_steps=1, log_dir=tmp_path / "plain"))
    shutil.copytree(run, tmp_path / "bare")
    os.remove(tmp_path / "bare" / "tokenizer.json")
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(train_tokenizer(["x y z"], 262))
    save_encoder("t5", tmp_path / "t5")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    flags = {**SAMPLING, "log_dir": tmp_path / "out", "prompt": "a cat"}
    bare = {**SAMPLING, "log_dir": tmp_path / "out"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**flags, "model_path": tmp_path / "plain"}, "--prompt has no effect without --context text, and the check"),
        ({**bare, "model_path": run}, "was trained with captions: give --prompt or --prompts"),
        ({**bare, "model_path": run, "prompts": tmp_path / "empty.txt"}, "empty.txt holds no prompt"),
        ({**bare, "model_path": run, "prompts": tmp_path / "bytes.txt"}, "bytes.txt cannot be read as text"),
        (
            {**bare, "model_path": run, "prompts": tmp_path / "empt.txt"},
            "empt.txt does not exist; did you mean empty.txt?",
        ),
        ({**flags, "model_path": tmp_path / "bare"}, "tokenizer.json is missing, without which"),
        ({**flags, "model_path": tmp_path / "other"}, "text_encoder 'scratch' is not the one that the network was"),
        ({**flags, "model_path": frozen_run, "text_encoder": tmp_path / "t5"}, "is not the one that the network was"),
        (
            {**flags, "model_path": frozen_run, "text_encoder": tmp_path / "no"},
            "cannot be used: there is no such folder",
        ),
        ({**flags, "model_path": run, "clip_path": tmp_path / "no"}, "/no' cannot be used: there is no such folder"),
        ({**flags, "model_path": run, "clip_path": tmp_path / "t5"}, "is of a model_type 't5', not CLIP"),
        ({**bare, "model_path": tmp_path / "plain", "clip_path": root / "bert"}, "give --clip_prompt"),
        ({**bare, "model_path": run, "data_dir": pictures}, "unknown flag --data_dir"),
    ]
    for given, sentence in cases:
        assert sentence in refused(capsys, image_sample.main, **given)
    said = refused(capsys, image_nll.main, model_path=run, data_dir=pictures, log_dir=tmp_path / "out")
    assert "attends to captions, of which bits per dimension are not measured" in said


def test_guidance_needs_a_network_that_knows_the_empty_text(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["flags"]["null_text"] = False
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    flags = {**SAMPLING, "num_samples": 1, "model_path": tmp_path / "run", "prompt": "a cat", "cfg_scale": 2}
    told = refused(capsys, image_sample.main, **flags, log_dir=tmp_path / "a")
    assert "trained without --caption_dropout: train with --caption_dropout 0.1, or give --negative_prompt" in told
    image_sample.main(words(**flags, negative_prompt="rain", log_dir=tmp_path / "b"))


def test_a_sweep_takes_prompts(run: str) -> None:
    argv = words(model_path=run, guidance="cfg", prompt="a cat", negative_prompt="rain", reference="x", scales="1,2")
    flags = cli.parse("sweep", argv)
    config = flags.part(SweepConfig)
    base = sweep.sampling_flags(flags, config)
    negative = [base.with_values(**sweep.values_of(cell, config)).values for cell in sweep.cells_of(config)]
    assert [(v["prompt"], v["negative_prompt"]) for v in negative[:2]] == [("a cat", ""), ("a cat", "rain")]
