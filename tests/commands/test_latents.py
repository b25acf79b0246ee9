"""Diffusion in the space of an autoencoder: streams of latents, resuming, samples that decode, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from few import few
from PIL import Image
from ranks import Nursery
from runs import CLASSIFIER, PROCESS, SCRIPTS, UNET, UPSAMPLER, Main, saved_by, scrambled, write_run
from text_encoders import save_clip

from guided_diffusion import load, logger
from guided_diffusion.commands import (
    autoencoder_train,
    cascade_sample,
    classifier_sample,
    classifier_train,
    convert,
    image_nll,
    image_sample,
    image_train,
)
from guided_diffusion.commands.latents import Encoder, cached_images
from guided_diffusion.config import AutoencoderConfig
from guided_diffusion.data.init_images import InitImages
from guided_diffusion.evaluation.features import make_extractor
from guided_diffusion.image_datasets import ImageStream, load_data
from guided_diffusion.networks.context import clip_embedding
from guided_diffusion.networks.first_stage import FirstStage
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.npz import fingerprint, save_npz
from guided_diffusion.runtime.pictures import to_uint8, to_unit
from guided_diffusion.runtime.seeds import image_generator
from guided_diffusion.sampling.editing import invert
from guided_diffusion.sampling.guidance import classifier_guidance, loss_guidance
from guided_diffusion.sampling.samplers import make_sampler
from guided_diffusion.script_util import build_autoencoder, build_diffusion, build_network
from guided_diffusion.training import checkpoints
from guided_diffusion.training.first_stage import load_autoencoder

ROOT = Path(__file__).parents[2]
AUTOENCODER = AutoencoderConfig(image_size=16, ch_mult="1,1", z_channels=3, embed_dim=2)
CODES = replace(AUTOENCODER, kind="vq", n_embed=16)
LATENTS: dict[str, Any] = {"image_size": 16, "latent_factor": 2, "latent_channels": 2}  # of 8 x 8
SAMPLING = ["--num_samples=3", "--batch_size=2", "--timestep_respacing=4"]
TRAINING = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "",
    "diffusion_steps": 40,
    "batch_size": 4,
    "num_workers": 0,
    "log_interval": 1,
    "ema_rate": 0.5,
}


def command_line(**flags: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def network_of(config: AutoencoderConfig) -> Any:
    th.manual_seed(3)
    return build_autoencoder(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six smooth pictures of three classes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(6):
        corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        corners.resize((16, 16), Image.Resampling.BILINEAR).save(
            folder / f"{['cat', 'dog', 'owl'][index % 3]}_{index}.png"
        )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two autoencoders, a diffusion model and a classifier of latents of the first, and of its codes."""
    root = tmp_path_factory.mktemp("runs")
    for name, config in (("kl", AUTOENCODER), ("vq", CODES)):
        write_run(root / name, "autoencoder_train", network_of(config), config)
    unet, classifier = replace(UNET, **LATENTS), replace(CLASSIFIER, **LATENTS)
    for name, config, kind in (("unet", unet, "kl"), ("classifier", classifier, "kl"), ("unet_vq", unet, "vq")):
        command = "classifier_train" if name == "classifier" else "image_train"
        write_run(root / name, command, scrambled(build_network(config, True)), config, PROCESS)
        link(root / name, f"../{kind}/ema_0.5_000100.pt", network_of(AUTOENCODER if kind == "kl" else CODES))
    return root


def link(run: Path, path: str, autoencoder: Any, **more: Any) -> None:
    """Let the config of a run name an autoencoder."""
    config = json.loads((run / "config.json").read_text())
    mark = fingerprint(autoencoder.state_dict())
    config["flags"] |= {"autoencoder_path": path, "autoencoder_id": mark, "scale_factor": 0.5, **more}
    (run / "config.json").write_text(json.dumps(config))


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())["flags"]


def refused(capsys: pytest.CaptureFixture[str], main: Main, *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*argv])
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("config", [AUTOENCODER, CODES], ids=["kl", "vq"])
def test_latents_of_a_first_stage(config: AutoencoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = network_of(config), th.rand(3, 3, 16, 16) * 2 - 1
    stage = FirstStage(network, 0.5)
    encoded = network.encode(images)
    mean = encoded.mean if stage.draws else encoded
    th.testing.assert_close(stage.encode(images), 0.5 * mean)
    assert stage.latent_shape((3, 16, 16)) == mean.shape[1:]
    assert stage.moments_shape((3, 16, 16)) == stage.moments(images).shape[1:]
    noise = th.randn(mean.shape)
    drawn = mean + encoded.std * noise if stage.draws else mean  # nothing is drawn of codes
    th.testing.assert_close(stage.latents(stage.moments(images), noise), 0.5 * drawn)
    th.testing.assert_close(stage.decode(stage.encode(images)), network.decode(mean))
    latents = stage.encode(images)
    latents[1, 0, 0, 0] = th.nan
    whole = stage.decode(latents).isfinite().flatten(1).all(1)
    assert whole.tolist() == [True, False, True]
    monkeypatch.setattr("guided_diffusion.networks.first_stage.PIXELS", 256)  # one image at a time
    th.testing.assert_close(stage.decode(stage.encode(images)), network.decode(mean))


def test_a_number_of_a_latent_is_kept_as_far_as_all_its_pixels_are() -> None:
    mask = th.ones(1, 1, 4, 4)
    mask[0, 0, 0, 1], mask[0, 0, 3, 3] = 0.25, 0
    assert FirstStage(network_of(AUTOENCODER), 1.0).kept(mask).tolist() == [[[[0.25, 1], [1, 0]]]]


def test_gradients_pass_through_the_decoder() -> None:
    stage, latents = FirstStage(network_of(AUTOENCODER), 0.5), th.randn(2, 2, 8, 8, requires_grad=True)
    (slope,) = th.autograd.grad(stage.decode(latents).square().sum(), latents)
    assert slope.abs().sum() > 0


def stream_of(pictures: Path, **options: Any) -> ImageStream:
    usual = {"image_size": 16, "batch_size": 4, "as_bytes": True, "log": lambda line: None}
    return load_data(data_dir=str(pictures), **usual | options)


@pytest.mark.parametrize("config", [AUTOENCODER, CODES], ids=["kl", "vq"])
def test_cached_latents_are_those_of_the_batches(config: AutoencoderConfig, pictures: Path, tmp_path: Path) -> None:
    logger.configure(dir=str(tmp_path))
    stage, said = FirstStage(network_of(config), 0.5, "mark"), list[str]()
    fly, cached, images = stream_of(pictures), stream_of(pictures), stream_of(pictures)
    cached.source = cached_images(cached, stage, str(pictures), str(tmp_path / "latents"), log=said.append)
    fly.encoder, cached.encoder = (Encoder(stage, 7, th.device("cpu"), cached=held) for held in (False, True))
    for _ in range(4):  # more than two epochs: images come in both directions
        (ours, labels), (theirs, same), (pixels, _) = next(fly), next(cached), next(images)
        assert labels == same
        th.testing.assert_close(ours, theirs)
        moments = stage.moments(to_unit(pixels))
        assert ours.shape == (4, 2, 8, 8)
        assert stage.draws != bool(th.allclose(ours, stage.latents(moments)))
    (folder,) = (tmp_path / "latents").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["moments.npy", "request.json"]
    written = (folder / "moments.npy").stat().st_mtime_ns
    cached_images(cached, stage, str(pictures), str(tmp_path / "latents"), log=said.append)
    assert (folder / "moments.npy").stat().st_mtime_ns == written
    assert sum("encoding 6 images and their mirror images once" in line for line in said) == 1
    others = [replace(stage, fingerprint="other")]
    for stream, other in [(cached, others[0]), (stream_of(pictures, random_flip=False), stage)]:
        cached_images(stream, other, str(pictures), str(tmp_path / "latents"), log=said.append)
    assert len(list((tmp_path / "latents").iterdir())) == 3


def test_encoding_goes_on_where_it_was_interrupted(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger.configure(dir=str(tmp_path))
    monkeypatch.setattr("guided_diffusion.commands.latents.AT_ONCE", 2)
    stage, stream = FirstStage(network_of(AUTOENCODER), 1.0, "mark"), stream_of(pictures)
    whole = np.array(cached_images(stream, stage, str(pictures), str(tmp_path / "1"), log=lambda line: None).moments)
    (folder,) = (tmp_path / "1").iterdir()
    (folder / "moments.npy").unlink()
    save_npz(str(folder / "shards" / "000001.npz"), np.zeros_like(whole[2:4]))  # as if made before the interruption
    resumed = cached_images(stream, stage, str(pictures), str(tmp_path / "1"), log=lambda line: None).moments
    np.testing.assert_array_equal(resumed[[0, 1, 4, 5]], whole[[0, 1, 4, 5]])
    assert not resumed[2:4].any()
    assert not (folder / "shards").exists()


def test_every_epoch_draws_other_latents_and_the_batch_does_not_matter(pictures: Path) -> None:
    stage = FirstStage(network_of(AUTOENCODER), 1.0)
    streams = [stream_of(pictures, batch_size=size, random_flip=False, deterministic=True) for size in (6, 3)]
    for stream in streams:
        stream.encoder = Encoder(stage, 0, th.device("cpu"))
    first, second = (next(streams[0])[0] for _ in range(2))
    th.testing.assert_close(th.cat([next(streams[1])[0] for _ in range(2)]), first)
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_an_image_that_cannot_be_read_is_named_when_it_is_encoded(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "dog_1.png").write_bytes(b"no picture")
    stage = FirstStage(network_of(AUTOENCODER), 1.0, "mark")
    with pytest.raises(ValueError, match=r"dog_1\.png"):
        cached_images(stream_of(folder), stage, str(folder), str(tmp_path / "others"), log=lambda line: None)


def weights(run: Path, step: int) -> dict[str, th.Tensor]:
    return checkpoints.load(str(run / f"model{step:06d}.pt"))


@pytest.mark.parametrize("cached", few([False, True], [True]), ids=["on the fly", "cached"])
def test_a_resumed_training_is_the_uninterrupted_one(cached: bool, runs: Path, pictures: Path, tmp_path: Path) -> None:
    more = {"data_dir": pictures, "val_data_dir": pictures, "val_interval": 2, "cache_latents": cached}
    flags = command_line(**TRAINING, **more, autoencoder_path=runs / "kl")
    image_train.main([*flags, *command_line(max_steps=4, log_dir=tmp_path / "whole")])
    image_train.main([*flags, *command_line(max_steps=2, log_dir=tmp_path / "half", copy_autoencoder=True)])
    image_train.main(command_line(max_steps=4, log_dir=tmp_path / "half", resume_checkpoint=tmp_path / "half"))
    whole, resumed = weights(tmp_path / "whole", 4), weights(tmp_path / "half", 4)
    assert whole.keys() == resumed.keys()
    assert all(th.equal(value, resumed[name]) for name, value in whole.items())
    assert whole["input_blocks.0.0.weight"].shape[1] == whole["out.2.weight"].shape[0] == 2
    assert len(list(tmp_path.glob("half/latents/*"))) == 2 * cached  # those of validation are not mirrored
    saved = config_of(tmp_path / "half")
    assert saved["autoencoder_path"] == "autoencoder.pt"
    _, scale = load_autoencoder(str(runs / "kl"))
    known = (fingerprint(network_of(AUTOENCODER).state_dict()), scale, 2, 2, 16, 3)
    names = "autoencoder_id scale_factor latent_factor latent_channels image_size image_channels".split()
    assert tuple(saved[name] for name in names) == known
    lines = (tmp_path / "whole" / "log.txt").read_text()
    assert "latents of the first batch, mean" in lines


@pytest.mark.slow
def test_two_ranks_encode_and_train_as_one(runs: Path, pictures: Path, tmp_path: Path, ranks: Nursery) -> None:
    flags = {**TRAINING, "data_dir": pictures, "cache_latents": True, "max_steps": 2, "autoencoder_path": runs / "kl"}
    image_train.main(command_line(**flags, log_dir=tmp_path / "one"))
    halves = command_line(**flags | {"batch_size": 2}, device="cpu", log_dir=tmp_path / "two")
    result = ranks.run([SCRIPTS / "image_train.py", *halves])
    assert result.returncode == 0, result.stderr
    for name, value in weights(tmp_path / "one", 2).items():
        th.testing.assert_close(weights(tmp_path / "two", 2)[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_whole_chain_of_commands(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder, a diffusion model with previews, a classifier of the same latents, samples that it guides."""
    monkeypatch.chdir(tmp_path)
    small = {"ch_mult": "1,1", "embed_dim": 2, "image_size": 16, "batch_size": 4, "num_workers": 0, "ema_rate": 0.5}
    autoencoder_train.main(command_line(**small, data_dir=pictures, max_steps=2, log_dir="first"))
    shared = {"data_dir": pictures, "autoencoder_path": "first", "num_classes": 3, "max_steps": 2}
    more = {"class_cond": True, "sample_interval": 2, "log_dir": "unet"}
    image_train.main(command_line(**TRAINING, **shared, **more))
    with Image.open("unet/previews/000002.png") as grid:
        assert grid.width > 4 * 16
    known = {name: TRAINING[name] for name in "image_size diffusion_steps batch_size num_workers".split()}
    network = {"classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "4"}
    classifier_train.main(
        command_line(**known, **network, **shared, cache_latents=True, random_crop=False, log_dir="c")
    )
    assert config_of(Path("c"))["autoencoder_path"] == config_of(Path("unet"))["autoencoder_path"]
    sampling = [*SAMPLING, "--classifier_path=c", "--classifier_scale=2", "--sampler=ddim", "--save_intermediate=2"]
    made = saved_by(classifier_sample.main, Path("samples"), "--model_path=unet", *sampling)
    assert made["arr_0"].shape == (3, 16, 16, 3)
    assert Path("samples/film.gif").exists()


@pytest.mark.slow
def test_metrics_during_the_training_are_of_decoded_samples(runs: Path, pictures: Path, tmp_path: Path) -> None:
    judge = {"classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "8", "max_steps": 1}
    shared = {"data_dir": pictures, "num_workers": 0, "image_size": 16}
    argv = command_line(**judge, **shared, num_classes=3, noised=False, log_dir=tmp_path / "judge")
    classifier_train.main(argv)
    metrics = {"eval_interval": 1, "eval_samples": 10, "eval_steps": 2, "features": f"classifier:{tmp_path / 'judge'}"}
    more = {"autoencoder_path": runs / "kl", "max_steps": 1, "log_dir": tmp_path / "run"}
    image_train.main(command_line(**TRAINING | shared, **metrics, **more))
    (header, row) = (tmp_path / "run" / "evaluation.csv").read_text().splitlines()
    assert header.startswith("step,samples,FD")
    assert float(row.split(",")[2]) > 0


def by_hand(runs: Path, name: str = "unet", **options: Any) -> np.ndarray:
    """The first two samples of a run, straight from the loop."""
    config, process = replace(UNET, **LATENTS), build_diffusion(PROCESS)
    network, stage = (
        scrambled(build_network(config, True)),
        FirstStage(network_of(CODES if "vq" in name else AUTOENCODER), 0.5),
    )
    generators = [image_generator(0, index) for index in range(2)]
    loop = {"model_kwargs": {"y": th.tensor([1, 2])}, "generator": generators, "device": "cpu", "clip_denoised": False}
    sampler = make_sampler(options.pop("sampler", "ddpm"))
    return to_uint8(stage.decode(process.sample_loop(sampler, network, (2, 2, 8, 8), **loop | options)))


def sampled(folder: Path, runs: Path, *argv: str, name: str = "unet", main: Main = image_sample.main) -> np.ndarray:
    return saved_by(main, folder, f"--model_path={runs / name}", *SAMPLING, "--classes=dog,owl", *argv)["arr_0"]


@pytest.mark.parametrize(("name", "sampler"), [("unet", "ddpm"), ("unet_vq", "dpm++2m")])
def test_samples_are_those_of_the_loop_decoded(runs: Path, tmp_path: Path, name: str, sampler: str) -> None:
    made = sampled(tmp_path, runs, f"--sampler={sampler}", name=name)
    assert made.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(made[:2], by_hand(runs, name, sampler=sampler))


def test_samples_start_from_images_as_latents(runs: Path, pictures: Path, tmp_path: Path) -> None:
    """Of the pixels that a mask keeps every byte comes back."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :7] = 255  # half of the fourth column of latents
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    rows = InitImages(str(pictures), 16, 3, masks=str(tmp_path / "mask.png")).rows([0, 1])
    stage, start = FirstStage(network_of(AUTOENCODER), 0.5), f"--init_image={pictures}"
    latents = stage.encode(rows["init_image"])
    made = sampled(tmp_path / "start", runs, start, "--strength=0.7")
    np.testing.assert_array_equal(made[:2], by_hand(runs, init_image=latents, strength=0.7))

    made = sampled(tmp_path / "mask", runs, start, f"--mask={tmp_path / 'mask.png'}")[:2]
    images = to_uint8(rows["init_image"])
    np.testing.assert_array_equal(made[:, :, :7], images[:, :, :7])
    kept = th.zeros(1, 1, 8, 8)
    kept[..., :3] = 1
    np.testing.assert_array_equal(made[:, :, 7:], by_hand(runs, init_image=latents, mask=kept, strength=1.0)[:, :, 7:])

    made = sampled(tmp_path / "invert", runs, start, "--invert=True", "--sampler=ddim", "--init_classes=cat")
    options: dict[str, Any] = {"clip_denoised": False, "model_kwargs": {"y": th.tensor([0, 0])}, "device": "cpu"}
    network = scrambled(build_network(replace(UNET, **LATENTS), True))
    noise = invert(build_diffusion(PROCESS), network, latents, **options)
    np.testing.assert_array_equal(made[:2], by_hand(runs, sampler="ddim", start=noise))


def test_load_does_the_same(runs: Path, pictures: Path, tmp_path: Path) -> None:
    """With its classifier, and from a file that was converted elsewhere: it finds the autoencoder by itself."""
    convert.main([str(runs / "unet"), str(tmp_path / "deep" / "unet.safetensors")])
    for path in (runs / "unet", tmp_path / "deep" / "unet.safetensors"):
        model = load(path, classifier=runs / "classifier", device="cpu")
        made = model.sample(classes="dog,owl", num_samples=2, timestep_respacing="4", sampler="dpm++2m")
        np.testing.assert_array_equal(made.images, by_hand(runs, sampler="dpm++2m"))
    argv = [f"--classifier_path={runs / 'classifier'}", "--classifier_scale=20", "--sampler=dpm++2m"]
    guided = sampled(tmp_path / "guided", runs, *argv, main=classifier_sample.main)
    options = {"num_samples": 3, "batch_size": 2, "timestep_respacing": "4", "sampler": "dpm++2m"}
    made = model.sample(classes=["dog", "owl"], classifier_scale=20, **options)
    np.testing.assert_array_equal(made.images, guided)
    stage, rows = FirstStage(network_of(AUTOENCODER), 0.5), InitImages(str(pictures), 16, 3).rows([0, 1])
    images = to_uint8(rows["init_image"])
    assert th.equal(model.encode(images), stage.encode(rows["init_image"]))
    inverted = [f"--init_image={pictures}", "--invert=True", "--sampler=ddim", "--init_classes=cat"]
    back = sampled(tmp_path / "invert", runs, *inverted)[:2]
    noise = model.invert(images, classes=["cat"], timestep_respacing="4")
    again = model.sample(start=noise, sampler="ddim", classes="dog,owl", timestep_respacing="4", batch_size=2)
    np.testing.assert_array_equal(again.images, back)
    with pytest.raises(
        UserError, match="works on the latents of an autoencoder, of which bits per dimension are not measured"
    ):
        model.bits_per_dim(images)
    with pytest.raises(UserError, match="--prompt has no effect without --context"):
        model.sample(prompt="a cat")


def test_a_classifier_of_noisy_latents_guides(runs: Path, tmp_path: Path) -> None:
    guide = classifier_guidance(scrambled(build_network(replace(CLASSIFIER, **LATENTS), True)), 20.0)
    argv = [f"--classifier_path={runs / 'classifier'}", "--classifier_scale=20", "--sampler=dpm++2m"]
    made = sampled(tmp_path, runs, *argv, main=classifier_sample.main)
    np.testing.assert_array_equal(made[:2], by_hand(runs, sampler="dpm++2m", cond_fn=guide))
    assert (made[:2] != by_hand(runs, sampler="dpm++2m")).any()


def test_a_loss_of_images_guides_through_the_decoder(runs: Path) -> None:
    stage = FirstStage(network_of(AUTOENCODER), 0.5)
    darker = loss_guidance(lambda latents: 1e3 * stage.decode(latents).flatten(1).mean(1))
    plain, guided = by_hand(runs, sampler="ddim"), by_hand(runs, sampler="ddim", cond_fn=darker)
    assert guided.mean() < plain.mean() - 1


@pytest.mark.slow
def test_clip_sees_decoded_latents(runs: Path, tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip")
    extractor, target = make_extractor(f"clip:{clip}"), F.normalize(clip_embedding(clip, "a red cat"), dim=0).numpy()
    near = []
    for scale in (-200, 200):
        flags = [f"--clip_path={clip}", "--clip_prompt=a red cat", f"--clip_scale={scale}"]
        near.append(float((extractor(sampled(tmp_path / str(scale), runs, *flags)).pool @ target).mean()))
    assert near[0] < near[1]


def test_the_page_shows_guidance_through_the_decoder(runs: Path) -> None:
    names: dict[str, Any] = {}
    page = (ROOT / "docs" / "latent.md").read_text()
    [code] = [code for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "darker" in code]
    exec(compile(code, "snippet", "exec", dont_inherit=True), names)
    guide = names["darker"](str(runs / "kl"))
    assert (by_hand(runs, sampler="ddim", cond_fn=guide) != by_hand(runs, sampler="ddim")).any()


@pytest.mark.slow
def test_a_run_starts_from_another_on_the_same_latents(
    runs: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another size too; a dry run says what it would take."""
    shared = {"data_dir": pictures, "init_from": runs / "unet", "num_workers": 0, "batch_size": 2, "image_size": 24}
    image_train.main(command_line(**shared, dry_run=True))
    said = capsys.readouterr().out
    assert "parameters: " in said
    image_train.main(command_line(**shared, max_steps=1, log_dir=tmp_path / "run"))
    saved = config_of(tmp_path / "run")
    assert saved["attention_resolutions"] == "6"  # of latents of 12 pixels: where it was
    assert (tmp_path / "run" / saved["autoencoder_path"]).resolve() == (runs / "kl" / "ema_0.5_000100.pt").resolve()


def test_an_upsampler_enlarges_what_was_decoded(runs: Path, tmp_path: Path) -> None:
    config = replace(UPSAMPLER, small_size=16, large_size=32, attention_resolutions="")
    write_run(tmp_path / "up", "super_res_train", scrambled(build_network(config, True)), config, PROCESS)
    stages = [f"--base.model_path={runs / 'unet'}", f"--up1.model_path={tmp_path / 'up'}", "--up1.steps=2"]
    argv = [*stages, "--base.steps=2", "--num_samples=2", "--batch_size=2", f"--log_dir={tmp_path / 'out'}"]
    cascade_sample.main(argv)
    assert (tmp_path / "out" / "up1" / "samples_2x32x32x3.npz").exists()


def test_a_run_with_a_copy_can_be_moved_and_an_autoencoder_can_be_elsewhere(runs: Path, tmp_path: Path) -> None:
    expected = by_hand(runs)
    shutil.copytree(runs / "unet", tmp_path / "moved")
    shutil.copy(runs / "kl" / "ema_0.5_000100.pt", tmp_path / "moved" / "autoencoder.pt")
    link(tmp_path / "moved", "autoencoder.pt", network_of(AUTOENCODER))
    np.testing.assert_array_equal(sampled(tmp_path / "1", tmp_path, name="moved")[:2], expected)
    link(tmp_path / "moved", "nowhere.pt", network_of(AUTOENCODER))
    made = sampled(tmp_path / "2", tmp_path, f"--autoencoder_path={runs / 'kl'}", name="moved")
    np.testing.assert_array_equal(made[:2], expected)


@pytest.mark.parametrize(
    ("main", "argv", "sentence"),
    [
        (image_train.main, "--autoencoder_path={kl} --image_size=17", "use 16 or 18"),
        (image_train.main, "--autoencoder_path={kl} --image_channels=1", "images with 3 channels"),
        (image_train.main, "--autoencoder_path={kl} --cond_type=mask", "exclude each other"),
        (image_train.main, "--autoencoder_path={kl} --cache_latents --random_crop", "exclude each other"),
        (
            image_train.main,
            "--autoencoder_path={kl} --cache_latents --on_bad_image skip",
            "--cache_latents and --on_bad_image exclude each other: give one",
        ),
        (image_train.main, "--autoencoder_path={unet}", "holds no autoencoder"),
        (image_train.main, "--autoencoder_path={kl}/none", "does not exist"),
        (
            image_train.main,
            "--autoencoder_path={kl} --latent_channels=5",
            "--latent_channels 5 is not the autoencoder's, 2",
        ),
        (image_train.main, "--latent_channels=4", "give --autoencoder_path"),
        (image_train.main, "--cache_latents", "has no effect without --autoencoder_path"),
        (image_sample.main, "--model_path={unet} --clip_denoised=True", "do not end at -1 and 1"),
        (image_sample.main, "--model_path={unet} --dynamic_threshold=0.99", "do not end at -1 and 1"),
        (image_sample.main, "--model_path={unet} --autoencoder_path={vq}", "is another autoencoder (fingerprint"),
        (image_sample.main, "--model_path={pixels} --autoencoder_path={kl}", "works on pixels"),
        (
            image_sample.main,
            "--model_path={lost}",
            "nowhere.pt, where it was in training: give its place by --autoencoder",
        ),
        (image_nll.main, "--model_path={unet} --data_dir={pictures}", "works on the latents of an autoencoder"),
        (
            classifier_sample.main,
            "--model_path={unet} --classifier_path={pixel_classifier}",
            "the model has latent_channels 2 and the classifier 0",
        ),
        (
            classifier_sample.main,
            "--model_path={unet_vq} --classifier_path={classifier}",
            "the model has autoencoder_id",
        ),
    ],
)
def test_mistakes_get_one_sentence(
    runs: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Main, argv: str, sentence: str
) -> None:
    pixels, judge = (
        replace(UNET, image_size=16, attention_resolutions=""),
        replace(CLASSIFIER, image_size=16, classifier_attention_resolutions="8"),
    )
    for name, config, command in (("pixels", pixels, "image_train"), ("pixel_classifier", judge, "classifier_train")):
        if name in argv:
            write_run(runs / name, command, scrambled(build_network(config, True)), config, PROCESS)
    if "lost" in argv:
        shutil.copytree(runs / "unet", runs / "lost", dirs_exist_ok=True)
        link(runs / "lost", "nowhere.pt", network_of(AUTOENCODER))
    names = {path.name: path for path in [*runs.iterdir(), *[runs / "lost"]]}
    words = argv.format(**names, pictures=pictures).split()
    defaults = command_line(**TRAINING, data_dir=pictures, max_steps=1) if main is image_train.main else []
    errors = refused(capsys, main, *defaults, *words, f"--log_dir={tmp_path / 'run'}")
    assert sentence in errors
    assert len(errors.strip().splitlines()) == 1
