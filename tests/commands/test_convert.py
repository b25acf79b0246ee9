"""One file of weights that says by itself what network it is of."""

from __future__ import annotations

import json

import pytest
import torch as th

from guided_diffusion.commands import common, convert
from guided_diffusion.commands.flags import parse
from guided_diffusion.config import UNetConfig
from guided_diffusion.script_util import build_unet
from guided_diffusion.training import checkpoints

SIZES = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": ""}
FLAGS = {**SIZES, "class_cond": True, "num_classes": 2, "learn_sigma": True, "predict_v": True, "ema_warmup": True}


@pytest.fixture
def run(tmp_path):
    """A run whose average differs from its model, with flags that name places."""
    folder = tmp_path / "run"
    folder.mkdir()
    network = build_unet(UNetConfig(**{name: FLAGS[name] for name in (*SIZES, "class_cond", "num_classes")}), True)
    checkpoints.save(str(folder / "model000002.pt"), network.state_dict())
    average = {name: value + 0.01 for name, value in network.state_dict().items()}
    checkpoints.save(str(folder / "ema_0.9_000002.pt"), average)
    places = {"data_dir": "/data/cats", "log_dir": str(folder), "resume_checkpoint": ""}
    (folder / "config.json").write_text(json.dumps({"flags": {**FLAGS, **places}}))
    (folder / "classes.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    return folder


def restored(path):
    return common.restore(parse("image_sample", [f"--model_path={path}", "--device=cpu"]))


@pytest.mark.parametrize("name", ["cat.safetensors", "new.pt"])
def test_the_file_is_the_average_of_the_run_with_its_flags_and_classes(tmp_path, run, name):
    convert.main([str(run), str(tmp_path / name)])
    before, after = restored(run), restored(tmp_path / name)
    for key, value in before.network.state_dict().items():
        assert th.equal(value, after.network.state_dict()[key])
    assert after.flags.values == {**before.flags.values, "model_path": str(tmp_path / name)}
    assert after.classes == ["cat", "dog"]
    assert checkpoints.config_beside(str(tmp_path / name)) == FLAGS  # and no place of the machine that trained it
    model = restored(run / "model000002.pt").network
    convert.main([str(run / "model000002.pt"), str(tmp_path / name)])
    assert th.equal(restored(tmp_path / name).network.out[2].bias, model.out[2].bias)


def test_the_places_of_what_goes_with_the_weights_are_those_from_the_new_folder(tmp_path, run, monkeypatch):
    config = json.loads((run / "config.json").read_text())
    config["flags"] |= {"text_encoder": "../encoder", "autoencoder_path": "first.pt", "context": "text"}
    (run / "config.json").write_text(json.dumps(config))
    for folder in ("encoder", "new"):
        (tmp_path / folder).mkdir()
    (run / "first.pt").touch()
    monkeypatch.chdir(tmp_path)
    convert.main(["run", "new/one.pt"])
    saved = json.loads((tmp_path / "new" / "config.json").read_text())["flags"]
    assert (saved["text_encoder"], saved["autoencoder_path"]) == ("../encoder", "../run/first.pt")


def test_an_average_is_chosen_by_its_rate(tmp_path, run, capsys):
    checkpoints.save(str(run / "ema_0.5_000002.pt"), {"of": th.ones(1)})
    for rate, source in (("", "ema_0.9"), ("0.90", "ema_0.9"), ("0.5", "ema_0.5"), ("0", "model000002")):
        convert.main([str(run), str(tmp_path / "out.pt"), *(["--ema_rate", rate] if rate else [])])
        assert f"{source}" in capsys.readouterr().out.rpartition("/out.pt")[0]
    with pytest.raises(SystemExit):
        convert.main([str(run), str(tmp_path / "out.pt"), "--ema_rate", "0.99"])
    assert "--ema_rate 0.99 is no average of" in (told := capsys.readouterr().err)
    assert "it has 0, 0.5, 0.9" in told


def test_half_precision_halves_the_file_and_is_read_into_fp32(tmp_path, run):
    whole, half = str(tmp_path / "whole.safetensors"), str(tmp_path / "half.safetensors")
    convert.main([str(run), whole])
    convert.main([str(run), half, "--precision", "fp16"])
    read = checkpoints.load(half)
    for key, value in checkpoints.load(whole).items():
        assert th.equal(read[key], value.half())
    assert {param.dtype for param in restored(half).network.parameters()} == {th.float32}


def test_what_cannot_be_written_or_read_is_a_sentence(tmp_path, run, capsys):
    for source, out, words in (
        (str(run), str(tmp_path / "a.bin"), "a.bin' must end in .safetensors or .pt, or be a folder without an ending"),
        (str(tmp_path / "none.pt"), str(tmp_path / "a.pt"), "none.pt' does not exist"),
    ):
        with pytest.raises(SystemExit):
            convert.main([source, out])
        assert words in capsys.readouterr().err
    path = tmp_path / "cut.safetensors"
    convert.main([str(run), str(path)])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        restored(path)
