"""What a dry run says, against networks whose numbers are known."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from torch import nn

from guided_diffusion.commands import classifier_train, image_train, super_res_train
from guided_diffusion.commands.dry_run import Cost, Loss, count
from guided_diffusion.config import DiffusionConfig, UNetConfig
from guided_diffusion.networks.memory import recompute_at
from guided_diffusion.runtime.files import write_json
from guided_diffusion.runtime.options import defaults
from guided_diffusion.script_util import build_unet
from guided_diffusion.training import checkpoints, lora
from guided_diffusion.unet import UNetModel

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


def counted(build: Callable[[], nn.Module], loss: Loss, n: int) -> Cost:
    with th.device("meta"):
        return count(build(), loss, n)


def test_numbers_of_two_products_of_matrices() -> None:
    cost = counted(chain, of_chain, 3)
    assert cost.parts == {"0": 35, "1": 14}
    assert cost.trained == 49
    assert cost.forward == 2 * 49  # a product and a sum for each weight
    assert cost.step == 2 * (49 + 49 + 14)  # the gradients of both weights, and of the input of the second


def test_what_is_frozen_has_no_gradient() -> None:
    def frozen() -> nn.Module:
        network = chain()
        network[0].requires_grad_(False)
        return network

    cost = counted(frozen, of_chain, 1)
    assert cost.trained == 14
    assert cost.step == 2 * (49 + 14)


def without_values(network: nn.Module, n: int) -> th.Tensor:
    out: th.Tensor = network(th.empty(n, 3, 16, 16), th.zeros(n)).square().mean()
    return out


@pytest.mark.slow
def test_recomputing_costs_arithmetic() -> None:
    costs = []
    for resolutions in ("", "8", "16,8"):

        def build(resolutions: str = resolutions) -> nn.Module:
            network = UNetModel(**OPTIONS)
            recompute_at(network, resolutions)
            return network

        costs.append(counted(build, without_values, 4).step)
    assert costs == sorted(set(costs))
    assert costs[2] < 1.34 * costs[0]


def test_attention_is_counted() -> None:
    """[N, H, T, D]: 4 N H T T D, and twice as much for the gradients."""
    heads, tokens, width = 3, 50, 8
    size = heads * tokens * width

    def attend(network: nn.Module, n: int) -> th.Tensor:
        q = network(th.zeros(n, 5)).view(n, heads, tokens, width)
        return nn.functional.scaled_dot_product_attention(q, q, q).sum()

    cost = counted(lambda: nn.Linear(5, size, bias=False), attend, 2)
    once = 4 * heads * tokens * tokens * width
    assert cost.forward - 2 * 5 * size == once
    assert once * 3 <= cost.step - 2 * 2 * 5 * size <= once * 3.5  # which kernel counts its products again is torch's


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
    assert lines[-1].startswith(f"weights, AdamW's state and 2 averages: {20 * total / 2**20:,.0f} MiB; ")
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
    assert (
        len(re.findall(r"^arithmetic of .*: [\d.]+ GFLOP an image, [\d.]+ GFLOP a batch of 3$", out, re.MULTILINE)) == 2
    )
    frozen = re.search(r"^parameters: ([\d,]+), ([\d,]+|all) of them trained$", out, re.MULTILINE)
    assert frozen is not None
    assert (frozen[2] != "all") == (kind == "frozen parts")
    if kind == "a classifier":
        assert "1 blocks" not in out
        assert "blocks, those at 8, compute their activations again" in out


@pytest.mark.slow
def test_adapters_over_another_network_train_themselves_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**defaults(UNetConfig, DiffusionConfig), **SIZES, "image_size": 8}
    network = build_unet(UNetConfig(image_size=8, **SIZES), learn_sigma=False)
    checkpoints.save(str(tmp_path / "model000001.pt"), network.state_dict())
    write_json(str(tmp_path / "config.json"), {"command": "image_train", "flags": flags})
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
    with pytest.raises(SystemExit):
        super_res_train.main(["--dry_run", "--small_size=64", "--large_size=32"])
    assert "small_size 64 exceeds large_size 32; give a small_size within it" in capsys.readouterr().err
