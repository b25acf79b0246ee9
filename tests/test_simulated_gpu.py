"""Every command and every loop as on a GPU: nothing is left on the CPU, and no step waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from few import FEW, few
from PIL import Image
from runs import NAMES, PROCESS, scrambled, write_run
from simulated_gpu import SimulatedGPU
from text_encoders import save_clip, save_encoder

from guided_diffusion import dist_util
from guided_diffusion.commands.sections import LatentConfig
from guided_diffusion.config import AutoencoderConfig, ClassifierConfig, DiffusionConfig, SuperResConfig, UNetConfig
from guided_diffusion.networks.context import ScratchEncoder, train_tokenizer
from guided_diffusion.runtime.seeds import to_device
from guided_diffusion.sampling.guidance import loss_guidance
from guided_diffusion.sampling.samplers import SAMPLERS, make_sampler
from guided_diffusion.script_util import (
    build_autoencoder,
    build_classifier,
    build_diffusion,
    build_unet,
    build_upsampler,
)

STEPS = 4
# Waits that come back in all but one of the steps, or more often, and why they may.
ALLOWED = {
    "features.py:_numbers": "features are compared on the host, to which they go batch by batch",
    "flow_likelihood.py:_rk45": "how many steps a flow takes depends on the error of each",
    "fp16_util.py:MixedPrecisionTrainer._optimize_normal": "a step that is not finite is not taken: one wait",
    "guidance.py:GuidedNetwork.limited.<locals>.scale": "outside of its interval the weaker network is not asked",
    "guidance.py:interval.<locals>.limited": "outside of its interval the guide is not asked",
    "meter.py:log_loss_dict": "losses go to the log: of a line, or of a batch of validation",
    "resample.py:LossAwareSampler.update_with_local_losses": "the distribution of the next steps lies on the host",
}


def pictures(folder: Path, count: int, side: int, suffix: str = "") -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{NAMES[index % 3]}_{index:02}.png")
    return folder


NETWORK: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "8",
    "num_heads": 2,
    "num_classes": 3,
}
LATENTS: dict[str, Any] = {"attention_resolutions": "4", "latent_factor": 2, "latent_channels": 2}
CLASSIFIER: dict[str, Any] = {
    "image_size": 8,
    "num_classes": 3,
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_channel_mult": "1",
    "classifier_attention_resolutions": "8",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of networks and of pictures; a mask."""
    root = tmp_path_factory.mktemp("places")
    unet = UNetConfig(image_size=8, class_cond=True, **NETWORK)
    for name, config in {
        "unet": unet,
        "weak": unet,
        "guided": replace(unet, null_class=True),
        "unconditional": replace(unet, class_cond=False),
        "base": replace(unet, image_size=4, attention_resolutions=""),
    }.items():
        write_run(root / name, "image_train", scrambled(build_unet(config, True)), config, PROCESS)
    first = AutoencoderConfig(image_size=8, ch_mult="1,1", z_channels=2, embed_dim=2)
    write_run(root / "first", "autoencoder_train", build_autoencoder(first), first)
    latent, of_first = replace(unet, **LATENTS), LatentConfig(autoencoder_path="../first", scale_factor=1.0)
    write_run(root / "latent", "image_train", scrambled(build_unet(latent, True)), latent, PROCESS, of_first)
    upsampler = SuperResConfig(large_size=8, small_size=4, class_cond=True, **NETWORK)
    write_run(root / "upsampler", "super_res_train", scrambled(build_upsampler(upsampler, True)), upsampler, PROCESS)
    classifier = ClassifierConfig(**CLASSIFIER)
    write_run(root / "classifier", "classifier_train", scrambled(build_classifier(classifier)), classifier, PROCESS)
    for picture in pictures(root / "captioned", 4, 8).iterdir():
        picture.with_suffix(".txt").write_text("a red cat")
    text = replace(unet, class_cond=False, context="text", context_dim=16, text_depth=1, max_tokens=8)
    network, tokenizer = build_unet(text, True), train_tokenizer(["a red cat"], 260)
    network.context_encoder = ScratchEncoder(tokenizer, 16, 1, 8)
    write_run(root / "text", "image_train", scrambled(network), text, PROCESS)
    (root / "text" / "tokenizer.json").write_text(tokenizer)
    save_encoder("bert", root / "bert")
    save_clip(root / "clip")
    pictures(root / "pictures", 12, 8)
    pictures(root / "small", 2, 4)
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(root / "mask.png")
    return root


def words(flags: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in flags.items())


TRAIN = f"--num_workers 0 --max_steps {STEPS} --batch_size 2 --data_dir pictures --diffusion_steps"
PLAIN = f"image_train {TRAIN} 40 {words(NETWORK)} --image_size 8"
SAMPLE = f"--num_samples 2 --batch_size 2 --steps {STEPS}"
CAPTIONS = f"{PLAIN} --data_dir captioned --context text --caption_dropout 0.5 --max_tokens 8"
PROMPT = f"image_sample --model_path text {SAMPLE} --prompt cat"
UNET = f"image_sample --model_path unet {SAMPLE}"
BITS = f"image_nll --model_path unet --data_dir pictures --num_samples 2 --batch_size 2 --timestep_respacing {STEPS}"
FEATURES = "--features classifier:classifier --eval_batch_size"

COMMANDS = {
    "train": f"{PLAIN} --class_cond True --class_dropout 0.5 --ema_rate 0.5,0.9 --grad_clip 1 --save_interval 2",
    "train, measured": f"{PLAIN} --diffusion_steps {STEPS} --noise_schedule cosine --class_cond True "
    "--val_data_dir pictures --val_interval 4 "
    f"--sample_interval 4 --eval_interval 4 --eval_samples 10 --eval_steps 1 {FEATURES} 10",
    "train in fp16": f"{PLAIN} --precision fp16 --microbatch 1",
    "train in bf16": f"{PLAIN} --precision bf16 --use_checkpoint True --async_save False",
    "train variances": f"{PLAIN} --learn_sigma True --loss_weight min_snr --schedule_sampler loss-second-moment",
    "train on images": f"{PLAIN} --cond_type image --cond_dir pictures --cond_dropout 0.5",
    "train on latents": f"{PLAIN} --autoencoder_path first --attention_resolutions 4 --sample_interval 4",
    "train on kept latents": f"{PLAIN} --autoencoder_path first --attention_resolutions 4 --cache_latents True",
    "train on captions": f"{CAPTIONS} --context_dim 16 --text_depth 1 --vocab_size 260 --val_data_dir captioned "
    "--val_interval 4 --sample_interval 4",
    "train on captions with a frozen encoder": f"{CAPTIONS} --text_encoder bert",
    "train adapters": f"image_train {TRAIN} 40 --init_from unet --lora_rank 2",
    "train a classifier": f"classifier_train {TRAIN} 40 {words(CLASSIFIER)} --val_data_dir pictures --eval_interval 4",
    "train an upsampler": f"super_res_train {TRAIN} 40 {words(NETWORK)} --large_size 8 --small_size 4 --cond_aug 0.5",
    "sample": f"{UNET} --save_intermediate 4 --save_images True",
    "sample in fp16": f"{UNET} --precision fp16 --sampler ddim --eta 1",
    "null class": f"image_sample --model_path guided {SAMPLE} --cfg_scale 2 --cfg_rescale 0.5 --sampler dpm++2m",
    "null class in an interval": f"image_sample --model_path guided {SAMPLE} --cfg_scale 2 --guidance_interval 5,30",
    "weaker model": f"{UNET} --autoguide_path weak --autoguide_scale 2 --dynamic_threshold 0.99 --sampler plms",
    "negative prompt": f"{PROMPT} --cfg_scale 2 --negative_prompt dog",
    "CLIP": f"{PROMPT} --clip_path clip",
    "CLIP of noisy images": f"{PROMPT} --clip_path clip --clip_on x_t --sampler ddim",
    "classifier": f"classifier_sample --model_path unet --classifier_path classifier {SAMPLE} --classifier_scale 2",
    "classifier in an interval": f"classifier_sample --model_path unet --classifier_path classifier {SAMPLE} "
    "--classifier_scale 2 --guidance_interval 0,30 --classifier_precision bf16 --precision bf16 --sampler heun",
    "paint": f"image_sample --model_path unconditional {SAMPLE} --init_image pictures --mask mask.png --resample 2 "
    "--resample_jump 2",
    "paint latents": f"image_sample --model_path latent {SAMPLE} --init_image pictures --mask mask.png --classes cat "
    "--save_intermediate 4",
    "vary": f"{UNET} --init_image pictures --strength 0.99 --steps 8 --sampler lms",
    "invert": f"{UNET} --init_image pictures --invert True --sampler ddim --init_classes cat",
    "interpolate": f"{UNET} --init_image mask.png --interpolate mask.png --sampler ddim --classes cat",
    "enlarge": "super_res_sample --model_path upsampler --base_samples small --classes cat --batch_size 2 "
    f"--steps {STEPS}",
    "cascade": "cascade_sample --num_samples 2 --batch_size 2 --classes cat --base.model_path base --base.steps 2 "
    f"--up1.model_path upsampler --up1.steps {STEPS}",
    "bound": BITS,
    "flow": f"{BITS} --likelihood flow --flow_tolerance 10",
    "flow by heun": f"{BITS} --likelihood flow --flow_solver heun --dequantize decoder",
    "evaluate": f"evaluator pictures pictures {FEATURES} 2 --metrics is,fid,pr,kid,dc --cache False",
    "make a reference": f"make_reference pictures reference.npz --image_size 8 {FEATURES} 2",
    "sweep": f"sweep --model_path unet --classifier_path classifier --reference pictures {FEATURES} 10 "
    f"--samplers ddim --steps {STEPS} --scales 2 --num_samples 10 --batch_size 10",
}


@pytest.fixture
def gpu() -> Iterator[SimulatedGPU]:
    with SimulatedGPU() as simulated:
        yield simulated


@pytest.fixture
def run(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGPU) -> Callable[[str], None]:
    """Runs a command line among the places."""
    monkeypatch.setenv("GUIDED_DIFFUSION_DEBUG", "1")
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(places)

    def run_line(line: str) -> None:
        name, *argv = line.split()
        import_module(f"guided_diffusion.commands.{name}").main([*argv, "--log_dir", str(tmp_path / "run")])

    return run_line


# one of each command, and what in it is the likeliest to wait
FAST = [
    *["train", "train variances", "train on kept latents", "train a classifier", "train an upsampler", "sample"],
    *["null class in an interval", "negative prompt", "classifier", "paint", "cascade", "bound", "evaluate"],
    "make a reference",
]


@pytest.mark.parametrize("name", few(COMMANDS, FAST), ids=lambda name: name.replace(",", "").replace(" ", "_"))
def test_a_command_runs_and_no_step_of_it_waits(name: str, run: Callable[[str], None], gpu: SimulatedGPU) -> None:
    run(COMMANDS[name])
    assert gpu.calls >= STEPS
    assert gpu.waits_per_step(STEPS - 1) <= set(ALLOWED)


def test_a_training_goes_on(run: Callable[[str], None], tmp_path: Path) -> None:
    for steps in (1, 2):
        run(f"{PLAIN} --precision bf16 --resume_checkpoint auto --max_steps {steps}")
        assert (tmp_path / "run" / f"opt{steps:06d}.pt").exists()


class Network(th.nn.Module):
    """Sees everything that a network sees, and does little with it."""

    num_classes = 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer, self.embedding = th.nn.Conv2d(3, channels, 3, padding=1), th.nn.Embedding(3, channels)

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor) -> th.Tensor:
        return self.layer(x) + (self.embedding(y) + timesteps[:, None] / 1000)[..., None, None]


@pytest.mark.parametrize("name", few(SAMPLERS, [*FEW, "ddim_reverse"]))
def test_no_step_of_a_sampler_waits(name: str, gpu: SimulatedGPU) -> None:
    """Guided through the denoiser, on a grid between the timesteps of training."""
    process = build_diffusion(DiffusionConfig(timestep_respacing=f"logsnr{STEPS + 1}", learn_sigma=True))
    network, y = Network(6).cuda(), th.tensor([0, 1], device="cuda")
    options: dict[str, Any] = {"model_kwargs": {"y": y}, "cond_fn": loss_guidance(lambda x: x.square().sum((1, 2, 3)))}
    if name == "ddim_reverse":
        options = {"model_kwargs": {"y": y}, "init_image": th.zeros(2, 3, 4, 4)}
    steps = list(process.sample_loop_progressive(make_sampler(name), network, (2, 3, 4, 4), **options))
    assert all(value.is_cuda for step in steps for value in (step["sample"], step["pred_xstart"]))
    assert not gpu.waits_per_step(STEPS - 1)


def test_no_step_of_the_originals_loops_waits(gpu: SimulatedGPU) -> None:
    process, network = build_diffusion(DiffusionConfig(timestep_respacing=str(2 * STEPS))), Network(3).cuda()
    kwargs, shape = {"y": th.tensor([0, 1], device="cuda")}, (2, 3, 4, 4)
    x = process.p_sample_loop(network, shape, model_kwargs=kwargs, randomize_class=True)
    process.ddim_sample_loop(network, shape, noise=x, model_kwargs=kwargs, init_image=x, skip_timesteps=1)
    process.plms_sample_loop(network, shape, model_kwargs=kwargs, cond_fn=lambda x, t, y: -x)
    process.calc_bpd_loop(network, x, model_kwargs=kwargs)
    assert x.is_cuda
    assert not gpu.waits_per_step(2 * STEPS)  # fewer than of one loop


@pytest.mark.parametrize("flags", [{}, {"learn_sigma": True}, {"use_kl": True}, {"predict_v": True}], ids=str)
def test_no_loss_waits(flags: dict[str, bool], gpu: SimulatedGPU) -> None:
    process = build_diffusion(DiffusionConfig(**flags, loss_weight="" if "use_kl" in flags else "min_snr"))
    network, y = Network(6 if "learn_sigma" in flags else 3).cuda(), th.tensor([0, 1], device="cuda")
    for _ in range(STEPS):
        x, t = th.randn(2, 3, 4, 4, device="cuda"), th.randint(1000, (2,), device="cuda")
        process.training_losses(network, x, t, {"y": y})["loss"].mean().backward()
    assert all(parameter.grad is not None and parameter.grad.is_cuda for parameter in network.parameters())
    assert not gpu.waits_per_step(STEPS)


def test_two_devices_do_not_mix(gpu: SimulatedGPU) -> None:
    here, there = th.ones(2, 3), th.ones(2, 3, device="cuda", requires_grad=True)
    weight = th.nn.Parameter(there.detach())
    mixed: list[Callable[[], object]] = [
        lambda: here + there,
        lambda: here.add_(weight[0, 0]),
        lambda: th.cat([there, here]),
        lambda: th.nn.functional.linear(here, weight),
        lambda: here[there[:, 0].long()],
        lambda: th.randn(2, device="cuda", generator=th.Generator()),
        lambda: th.empty(2).normal_(generator=th.Generator("cuda")),
    ]
    for call in mixed:
        with pytest.raises(RuntimeError, match=r"mixes devices|device type for generator"):
            call()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there.detach())
    assert (there * th.tensor(2.0)).is_cuda  # a number is a number


def test_what_is_made_of_the_gpus_is_there(gpu: SimulatedGPU) -> None:
    layer = th.nn.Linear(3, 2).to("cuda")
    x = th.randn(4, 3, device="cuda")
    loss = th.nn.functional.cross_entropy(layer(x), th.zeros(4, dtype=th.int64, device="cuda"))
    hooked: list[bool] = []
    layer.weight.register_post_accumulate_grad_hook(
        lambda weight: hooked.append(weight.grad is not None and th.empty_like(weight, device=weight.device).is_cuda)
    )
    loss.backward()
    made = [layer.weight.grad, layer.bias.data, x[1:], x.new_zeros(2), th.zeros_like(x), copy.deepcopy(layer).weight]
    assert all(tensor is not None and tensor.device == th.device("cuda:0") for tensor in made)
    assert hooked == [True]
    left = [th.zeros(2), x.cpu(), th.zeros_like(x, device="cpu"), x.to("cpu", th.float16), th.tensor([1.0]).to(x.cpu())]
    assert not any(tensor.is_cuda for tensor in left)
    assert x.to("cuda") is x
    assert x.float().data_ptr() == x.data_ptr()


WAITING: dict[str, Callable[[th.Tensor, th.Tensor], object]] = {
    "item": lambda x, _: x[0].item(),
    "truth": lambda x, _: bool(x.any()),
    "list": lambda x, _: x.tolist(),
    "print": lambda x, _: str(x),
    "to the host": lambda x, _: x.cpu(),
    "to the device": lambda _, y: y.to("cuda"),
    "from a list": lambda x, _: th.tensor([1, 2], device="cuda"),
    "mask": lambda x, _: x[x > 0],
    "host's index": lambda x, _: x[[0, 1]],
    "nonzero": lambda x, _: x.nonzero(),
    "equal": lambda x, _: th.equal(x, x),
    "solve": lambda x, _: th.linalg.solve(x.diag(), x),
    "copy": lambda x, y: y.copy_(x),
    "synchronize": lambda *_: th.cuda.synchronize(),
}
PASSING: dict[str, Callable[[th.Tensor, th.Tensor], object]] = {
    "arithmetic": lambda x, _: (x * 2 + 1).sum() / 3,
    "factory": lambda *_: th.full((2,), 1.0, device="cuda"),
    "index": lambda x, _: x[th.arange(2, device="cuda")],
    "slice": lambda x, _: x[1:],
    "pinned": lambda _, y: to_device(y, "cuda"),
    "asynchronous copy": lambda x, _: th.empty(3, pin_memory=True).copy_(x, non_blocking=True),
    "solve without checks": lambda x, _: th.linalg.solve_ex(x.diag(), x),
    "on the host": lambda _, y: y.tolist(),
}


@pytest.mark.parametrize("name", [*WAITING, *PASSING])
def test_what_the_host_waits_for(name: str, gpu: SimulatedGPU) -> None:
    x, y = th.arange(1.0, 4.0).to("cuda", non_blocking=True), th.zeros(3)
    {**WAITING, **PASSING}[name](x, y)
    assert bool(gpu.waits) == (name in WAITING)


def test_waits_per_step_are_those_that_come_back_after_every_call_of_a_network(gpu: SimulatedGPU) -> None:
    network, x = th.nn.Sequential(th.nn.Linear(2, 2), th.nn.Linear(2, 2)).cuda(), th.ones(1, 2, device="cuda")

    def step() -> float:
        return float(network(x).sum().item())

    def end() -> None:
        x.tolist(), x.tolist(), x.tolist()

    for _ in range(3):
        step()
    end()
    assert gpu.calls == 3
    [place] = gpu.waits_per_step(3)
    assert place.endswith("step")


def test_nothing_of_it_stays() -> None:
    with SimulatedGPU():
        dist_util.setup_dist()
        x = th.zeros(2, device=dist_util.dev())
        assert x.is_cuda
    assert x.device.type == "cpu"
    assert "device" not in th.Tensor.__dict__
    assert isinstance(th.default_generator, th.Generator)
    assert dist_util.dev().type == ("cuda" if th.cuda.is_available() else "cpu")
