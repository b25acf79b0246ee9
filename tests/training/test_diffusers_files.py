"""Folders of diffusers: the same predictions on both sides, both ways, and a sentence where that cannot be."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from importlib import import_module as library
from pathlib import Path
from typing import Any

import pytest
import torch as th
from few import few
from runs import NAMES, PROCESS, UPSAMPLER, scrambled, write_run

from guided_diffusion import load
from guided_diffusion.commands import convert
from guided_diffusion.commands.common import restore
from guided_diffusion.commands.flags import parse
from guided_diffusion.config import AutoencoderConfig, UNetConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.script_util import build_autoencoder, build_network
from guided_diffusion.training import checkpoints
from guided_diffusion.training.diffusers_files import FILE
from guided_diffusion.training.first_stage import load_autoencoder

os.environ["HF_HUB_OFFLINE"] = "1"

SMALL: dict[str, Any] = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2,3"}
NETWORKS = {
    "heads of a size": UNetConfig(
        **SMALL, attention_resolutions="8", num_head_channels=16, class_cond=True, num_classes=5
    ),
    "one head": UNetConfig(**SMALL, attention_resolutions="16,4", num_heads=1, use_scale_shift_norm=False),
    "residual": UNetConfig(
        **SMALL,
        attention_resolutions="8",
        num_head_channels=32,
        resblock_updown=True,
        use_new_attention_order=True,
        norm_groups=8,
    ),
    "plain": replace(UNetConfig(**SMALL, attention_resolutions="", num_heads=2), num_res_blocks=2, dropout=0.1),
}
AUTOENCODERS = {
    "middle": AutoencoderConfig(
        norm_groups=16, image_size=16, ch_mult="1,2", z_channels=3, embed_dim=3, num_res_blocks=2
    ),
    "levels": AutoencoderConfig(image_size=16, ch_mult="1,1,2", z_channels=4, embed_dim=4, attn_resolutions="8"),
}


def run_of(folder: Path, config: Any, learn_sigma: bool = True) -> tuple[Path, Any]:
    network = scrambled(build_network(config, learn_sigma))
    command = "super_res_train" if hasattr(config, "large_size") else "image_train"
    return write_run(folder, command, network, config, replace(PROCESS, learn_sigma=learn_sigma)), network


def opened(path: Path) -> Any:
    return restore(parse("image_sample", [f"--model_path={path}", "--device=cpu"]))


def same(first: Any, second: Any) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and th.equal(value, its) for (name, value), (other, its) in pairs)


def both(ours: Any, theirs: Any, classes: int = 0) -> tuple[th.Tensor, th.Tensor]:
    x, t = th.randn(2, 3, 16, 16, generator=th.Generator().manual_seed(0)), th.tensor([3, 777])
    y = th.tensor([0, classes - 1]) if classes else None
    with th.no_grad():
        return ours(x, t, **({} if y is None else {"y": y})), theirs(x, t, class_labels=y).sample


@pytest.mark.parametrize("name", few(NETWORKS, ["one head", "residual"]))
def test_a_unet_predicts_the_same_in_diffusers_and_after_the_way_back(name: str, tmp_path: Path) -> None:
    config = NETWORKS[name]
    run, network = run_of(tmp_path / "run", config)
    convert.main([str(run), str(tmp_path / "theirs")])
    theirs = library("diffusers").UNet2DModel.from_pretrained(tmp_path / "theirs").eval()
    ours, other = both(network, theirs, config.num_classes if config.class_cond else 0)
    th.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    convert.main([str(tmp_path / "theirs"), str(tmp_path / "again.safetensors")])
    for path in (tmp_path / "theirs", tmp_path / "again.safetensors"):
        again = opened(path)
        assert same(again.network, network)
        kept = {name: again.flags.values[name] for name in asdict(config)} | {"noise_schedule": "cosine"}
        assert kept == {**asdict(config), "noise_schedule": again.flags.values["noise_schedule"]}
    assert again.classes == NAMES


THEIRS: dict[str, dict[str, Any]] = {
    "conv": {"num_class_embeds": 5, "attention_head_dim": None},
    "resnet": {
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "out_channels": 6,
    },
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_unet_of_diffusers_is_loaded_and_samples(name: str, tmp_path: Path) -> None:
    types = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    options = {"sample_size": 16, "block_out_channels": [32, 64], "layers_per_block": 1, **types, **THEIRS[name]}
    theirs = scrambled(library("diffusers").UNet2DModel(**options))
    theirs.save_pretrained(tmp_path / "unet")
    with pytest.warns(UserWarning, match="no flags of a training beside .* noise_schedule linear"):
        load(tmp_path / "unet", device="cpu")
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    model = load(tmp_path / "unet", device="cpu")
    assert (model.config["noise_schedule"], model.config["predict_v"]) == ("cosine", True)
    ours, other = both(model.network, theirs, THEIRS[name].get("num_class_embeds", 0))
    th.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert model.config["learn_sigma"] == (name == "resnet")
    assert model.sample(steps=2, sampler="ddim").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_goes_there_and_back(name: str, tmp_path: Path) -> None:
    config = AUTOENCODERS[name]
    network = scrambled(build_autoencoder(config))
    run = write_run(tmp_path / "run", "autoencoder_train", network, config)
    th.save({"extra": {"scale": {"factor": 0.25}}}, run / "state000100.pt")
    convert.main([str(run), str(tmp_path / "vae")])
    theirs = library("diffusers").AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    assert theirs.config.scaling_factor == 0.25
    x = th.randn(2, 3, 16, 16, generator=th.Generator().manual_seed(0))
    with th.no_grad():
        pairs = [(network.encode(x).parameters, theirs.encode(x).latent_dist.parameters)]
        latents = pairs[0][0].chunk(2, dim=1)[0]
        pairs.append((network.decode(latents), theirs.decode(latents).sample))
    for ours, other in pairs:
        th.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    theirs.save_pretrained(tmp_path / "saved")
    convert.main([str(tmp_path / "saved"), str(tmp_path / "file.safetensors")])
    for path in (run, tmp_path / "saved", tmp_path / "file.safetensors"):
        again, factor = load_autoencoder(str(path))
        assert factor == 0.25
        assert same(again, network)


def test_heads_of_a_checkpoint_without_a_config_are_asked_for(tmp_path: Path) -> None:
    run, network = run_of(tmp_path / "run", NETWORKS["heads of a size"])
    (run / "config.json").unlink()
    with pytest.raises(SystemExit):
        convert.main([str(run), str(tmp_path / "theirs")])
    (run / "config.json").write_text(json.dumps({"flags": {"num_head_channels": 16}}))
    convert.main([str(run), str(tmp_path / "theirs")])
    theirs = library("diffusers").UNet2DModel.from_pretrained(tmp_path / "theirs").eval()
    ours, other = both(network, theirs, 5)
    th.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(NETWORKS["plain"], channel_mult="0.5,1", num_channels=64), "no --channel_mult that begins with 0.5"),
        (replace(NETWORKS["plain"], attention_resolutions="8"), "--num_heads 2 makes some of 32 and 48 channels"),
        (replace(NETWORKS["plain"], context="classes", class_cond=True), "no --context"),
        (replace(NETWORKS["plain"], dims=1), "no --dims 1"),
        (replace(NETWORKS["plain"], cond_type="mask"), "no --large_size or --cond_type"),
        (UPSAMPLER, "no --large_size or --cond_type"),
    ],
)
def test_what_diffusers_has_not_is_told_by_its_flag(
    config: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_of(tmp_path / "run", config)
    with pytest.raises(SystemExit):
        convert.main([str(run), str(tmp_path / "theirs")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


def test_folders_that_are_not_ours_are_told(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path / "run", NETWORKS["plain"])
    convert.main([str(run), str(tmp_path / "theirs")])
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"freq_shift": 1}, "it has freq_shift 1 in place of 0"),
        ({"down_block_types": ["SkipDownBlock2D"] * 3}, "SkipDownBlock2D"),
        ({"layers_per_block": 1}, "tensors of another network"),
        ({"_class_name": "UNet2DConditionModel"}, "it is of a UNet2DConditionModel"),
        ({"block_out_channels": 7}, "is damaged"),
        (None, "needs the config.json of its UNet2DModel beside it"),
    ):
        path.write_text(json.dumps(config | change)) if change else path.unlink()
        with pytest.raises(UserError, match=message):
            load(tmp_path / "theirs")
    weights = checkpoints.load(str(tmp_path / "theirs" / FILE))
    checkpoints.save(str(tmp_path / "theirs" / FILE), {n: x for n, x in weights.items() if ".0.to_k." not in n})
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds no whole attention, of middle_block.1"):
        load(tmp_path / "theirs")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"of diffusers one with diffusion_pytorch_model.safetensors, such as unet"):
        load(tmp_path / "pipeline")
