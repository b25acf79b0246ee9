"""The commands with text: captions in training, prompts in sampling, guidance by CLIP."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image
from runs import saved_by
from text_encoders import save_clip, save_encoder

from guided_diffusion.commands import (
    evaluation,
    flags as cli,
    image_sample,
    image_train,
    previews,
    super_res_train,
    training,
)
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
TEXT = {"context": "text", "context_dim": 16, "text_depth": 1, "vocab_size": 270, "max_tokens": 16}
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


# ---- training


@pytest.mark.parametrize("kind", ["run", "frozen_run"])
def test_a_run_of_captions_goes_on_bit_for_bit(
    kind: str, request: pytest.FixtureRequest, pictures: str, tmp_path: Path
) -> None:
    whole = Path(request.getfixturevalue(kind))
    flags = json.loads((whole / "config.json").read_text())["flags"]
    known = {name: flags[name] for name in (*BASE, "text_encoder") if kind == "run" or name not in TEXT}
    known |= {} if kind == "run" else {"context": "text", "max_tokens": 16}
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


def test_an_upsampler_trains_on_captions(pictures: str, tmp_path: Path) -> None:
    flags = {**TINY, **TEXT, "large_size": 8, "small_size": 4, "sample_interval": 1, "max_steps": 1}
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
