"""What a dry run says, against networks whose numbers are known, and against real steps."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from torch import nn

from guided_diffusion import checkpoint, footprint, lora
from guided_diffusion.commands import classifier_train, image_train, super_res_train
from guided_diffusion.config import DiffusionConfig, UNetConfig, defaults
from guided_diffusion.footprint import measure
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.recomputing import recompute_at
from guided_diffusion.script_util import build_unet
from guided_diffusion.unet import UNetModel

CPU = th.device("cpu")
OPTIONS: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
}
SIZES: dict[str, Any] = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8"}
TINY = ["--image_size=8", *(f"--{name}={value}" for name, value in SIZES.items())]


def chain(bias: bool = False) -> nn.Module:
    """Two products of matrices, 5 -> 7 -> 2."""
    return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Linear(7, 2, bias=bias))


def of_chain(network: nn.Module, n: int) -> th.Tensor:
    out: th.Tensor = network(th.zeros(n, 5)).sum()
    return out


def on_meta(build: Callable[[], nn.Module]) -> Any:
    with th.device("meta"):
        return build()


def test_numbers_of_two_products_of_matrices() -> None:
    found = measure(on_meta(chain), of_chain, [3], CPU, averages=2)
    assert found.parts == {"0": 35, "1": 14}
    assert found.trained == 49
    assert found.forward == 2 * 49  # a product and a sum for each weight
    assert found.step == 2 * (49 + 49 + 14)  # the gradients of both weights, and of the input of the second
    assert (found.weights, found.masters, found.optimizer, found.averages) == (4 * 49, 0, 8 * 49, 8 * 49)
    assert found.gradients == 4 * 49
    assert found.peak == found.lasting + max(found.activations, found.gradients)


def test_what_is_frozen_has_no_gradient_and_no_state() -> None:
    network = on_meta(chain)
    network[0].requires_grad_(False)
    found = measure(network, of_chain, [1], CPU)
    assert (found.trained, found.gradients, found.optimizer, found.averages) == (14, 56, 112, 4 * 49)
    assert found.step == 2 * (49 + 14)


def test_ranks_share_what_is_in_fp32() -> None:
    found = measure(on_meta(chain), of_chain, [1], CPU).spread(7)
    assert (found.masters, found.optimizer, found.averages, found.weights) == (4 * 7, 8 * 7, 4 * 7, 0)


def test_gradients_that_ranks_share_are_not_in_the_peak() -> None:
    whole = measure(on_meta(chain), of_chain, [1], CPU)
    found = whole.spread(2)
    assert found.gradients == 2 * 49
    assert found.activations == whole.activations - 2 * 49
    assert found.peak == found.lasting + found.activations


def loss_of(network: nn.Module, n: int) -> th.Tensor:
    generator = th.Generator().manual_seed(n)
    x = th.randn(n, 3, 16, 16, generator=generator)
    out: th.Tensor = network(x, th.zeros(n)).square().mean()
    return out


def without_values(network: nn.Module, n: int) -> th.Tensor:
    out: th.Tensor = network(th.empty(n, 3, 16, 16), th.zeros(n)).square().mean()
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("resolutions", "sizes"), [("", [3]), ("16", [2, 1])])
def test_a_step_takes_what_a_real_one_takes(precision: str, resolutions: str, sizes: list[int]) -> None:
    """By the same count of the tensors that are there, of the trainer itself at work."""
    plan = on_meta(lambda: UNetModel(**OPTIONS))
    recompute_at(plan, resolutions)
    plan.convert_to(precision)
    found = measure(plan, without_values, sizes, CPU)

    network = UNetModel(**OPTIONS)
    recompute_at(network, resolutions)
    trainer = MixedPrecisionTrainer(model=network, precision=precision)
    trainer.zero_grad()
    with footprint._Live() as live:
        for n in sizes:
            trainer.backward(loss_of(network, n) * (n / sum(sizes)))
    own = {id(param): param.nbytes for param in network.parameters()}
    masters = {id(param): param.nbytes for param in trainer.master_params if id(param) not in own}
    assert (found.weights, found.masters) == (sum(own.values()), sum(masters.values()))
    assert found.gradients == sum(param.grad.nbytes for param in trainer.master_params if param.grad is not None)
    assert found.activations == pytest.approx(live.peak, rel=0.02)  # here the images are drawn, and there they are not


def test_recomputing_saves_memory_and_costs_arithmetic() -> None:
    peaks, costs = [], []
    for resolutions in ("", "8", "16,8"):
        network = on_meta(lambda: UNetModel(**OPTIONS))
        recompute_at(network, resolutions)
        found = measure(network, without_values, [4], CPU)
        peaks.append(found.activations)
        costs.append(found.step)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.6 * peaks[0]
    assert costs == sorted(costs)
    assert costs[2] < 1.34 * costs[0]


def test_attention_on_a_cpu_is_counted() -> None:
    """[N, H, T, D]: 4 N H T T D, and for the gradients two and a half times as much."""
    heads, tokens, width = 3, 50, 8
    size = heads * tokens * width

    def attend(network: nn.Module, n: int) -> th.Tensor:
        q = network(th.zeros(n, 5)).view(n, heads, tokens, width)
        return nn.functional.scaled_dot_product_attention(q, q, q).sum()

    found = measure(on_meta(lambda: nn.Linear(5, size, bias=False)), attend, [2], CPU)
    once = 4 * heads * tokens * tokens * width
    assert found.forward - 2 * 5 * size == once
    assert found.step - 2 * 2 * 5 * size == once * 3.5


def test_a_dry_run_writes_nothing_and_says_what_a_run_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "none"))
    more = ["--dry_run", "--log_dir", str(tmp_path / "run"), "--batch_size=6", "--microbatch=4", "--num_classes=9"]
    image_train.main([*TINY, *more, "--class_cond=True", "--precision=bf16", "--ema_rate=0.9,0.99"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dry run: nothing is trained and nothing is written"
    config = UNetConfig(image_size=8, class_cond=True, num_classes=9, **SIZES)
    total = sum(param.numel() for param in build_unet(config, learn_sigma=False).parameters())
    assert lines[1] == f"parameters: {total:,}, all of them trained"
    assert any(line.startswith("memory of a step in bf16 on cpu, in microbatches of 4:") for line in lines)
    forward, step = (
        re.search(r": ([\d.]+) GFLOP an image, ([\d.]+) GFLOP a batch of 6$", line)
        for line in lines
        if line.startswith("arithmetic")
    )
    assert forward is not None
    assert step is not None
    assert 2.9 < float(step[2]) / float(forward[2]) < 3.2
    assert os.listdir(tmp_path) == []


OTHERS: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "an upsampler": (super_res_train.main, ["--large_size=8", "--small_size=4", "--cond_aug=0.1", *TINY[1:]]),
    "a mask": (image_train.main, [*TINY, "--cond_type=mask", "--cond_dir=none", "--learn_sigma=True"]),
    "frozen parts": (image_train.main, [*TINY, "--freeze=input_blocks.*", "--microbatch=auto"]),
    "a classifier": (
        classifier_train.main,
        "--image_size=8 --classifier_width=64 --classifier_depth=1 --classifier_channel_mult=1 --fsdp "
        "--classifier_attention_resolutions=8 --checkpoint_resolutions=8 --classifier_precision=bf16".split(),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_training_has_a_dry_run(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, flags = OTHERS[kind]
    main([*flags, "--dry_run=True", "--diffusion_steps=40", "--batch_size=3", "--async_save=False"])
    out = capsys.readouterr().out
    sizes = dict(re.findall(r"^  (\w.*?) +([\d.]+) MiB$", out, re.MULTILINE))
    assert "while a checkpoint is written, on the CPU" not in sizes
    assert ("fp32 masters of them" in sizes) == (kind == "a classifier")
    assert ("weights" in sizes) == (kind != "a classifier")  # which are gathered part by part
    frozen = re.search(r"^parameters: ([\d,]+), ([\d,]+|all) of them trained$", out, re.MULTILINE)
    assert frozen is not None
    assert (frozen[2] != "all") == (kind == "frozen parts")
    if kind == "a classifier":
        assert "1 blocks" not in out
        assert "blocks, those at 8, compute their activations again" in out


def test_adapters_over_another_network_train_themselves_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**defaults(UNetConfig, DiffusionConfig), **SIZES, "image_size": 8}
    network = build_unet(UNetConfig(image_size=8, **SIZES), learn_sigma=False)
    checkpoint.save(str(tmp_path / "model000001.pt"), network.state_dict())
    checkpoint.save_json(str(tmp_path / "config.json"), {"command": "image_train", "flags": flags})
    image_train.main([f"--init_from={tmp_path / 'model000001.pt'}", "--lora_rank=2", "--dry_run"])
    adapters = lora.attach(network, rank=2, alpha=0.0, on=["attention", "convolutions"], train=[])
    trained = sum(param.numel() for param in network.parameters() if param.requires_grad)
    out = capsys.readouterr().out
    assert f"adapters of rank 2 on {len(adapters)} convolutions" in out
    assert f", {trained:,} of them trained" in out


def test_what_a_training_would_refuse_a_dry_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        image_train.main([*TINY, "--dry_run", "--checkpoint_resolutions=4"])
    assert "checkpoint_resolutions 4 of '4' do not occur at size 8" in capsys.readouterr().err
