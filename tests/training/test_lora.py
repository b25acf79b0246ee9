"""Adapters: they start as nothing, learn over frozen weights, and are merged, resumed and passed on to the bit."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch as th

from guided_diffusion import logger
from guided_diffusion.config import DiffusionConfig, SuperResConfig, UNetConfig
from guided_diffusion.script_util import build_diffusion, build_unet, build_upsampler
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training import checkpoints, lora

DIFFUSION = build_diffusion(DiffusionConfig(diffusion_steps=40))
TINY = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}
LEVELS = {"channel_mult": "1,2", "attention_resolutions": "4"}


class Repeated:
    """A stream of the same images, which knows where it is."""

    def __init__(self, channels: int = 3) -> None:
        self.images, self.position = th.linspace(-1, 1, 2 * channels * 64).view(2, channels, 8, 8), 0

    def __iter__(self) -> Repeated:
        return self

    def __next__(self) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        self.position += 1
        return self.images.roll(self.position, 3), {}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def unet(**more: Any) -> th.nn.Module:
    """A network whose every weight matters: nothing of it is at zero."""
    th.manual_seed(3)
    model = build_unet(UNetConfig(image_size=8, **{**TINY, **more}), False)
    for parameter in model.parameters():
        th.nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    return model


def adapted(**options: Any) -> th.nn.Module:
    model = unet()
    lora.attach(model, rank=2, **options)
    return model


def stirred(model: th.nn.Module) -> th.nn.Module:
    """With adapters that have learned something."""
    th.manual_seed(9)
    for adapter in lora.adapters(model).values():
        th.nn.init.normal_(adapter.up, std=0.3)
    return model


def outputs(model: th.nn.Module, channels: int = 3) -> th.Tensor:
    x = th.linspace(-1, 1, 2 * channels * 64).view(2, channels, 8, 8)
    with th.no_grad():
        return model.eval()(x, th.tensor([3.0, 17.0]))


def train(folder: Path, model: th.nn.Module, steps: int, **options: Any) -> TrainLoop:
    logger.configure(dir=str(folder), format_strs=["log"])
    usual: dict[str, Any] = {"batch_size": 2, "microbatch": 1, "lr": 1e-2, "ema_rate": "0.5,0.9", "weight_decay": 0.1}
    more: dict[str, Any] = {"log_interval": 100, "save_interval": 2, "resume_checkpoint": ""}
    merged = {**usual, **more, **options}
    loop = TrainLoop(model=model, diffusion=DIFFUSION, data=Repeated(), max_steps=steps, **merged)
    loop.run_loop()
    return loop


def same(one: Any, two: Any) -> bool:
    """Whether nested values are equal, tensors to the bit."""
    if isinstance(one, th.Tensor):
        return th.equal(one, two)
    if isinstance(one, dict):
        return set(one) == set(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


# ---- the network


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_adapters_start_as_nothing(precision: str) -> None:
    plain, model = unet(), adapted()
    plain.convert_to(precision), model.convert_to(precision)
    assert {adapter.down.dtype for adapter in lora.adapters(model).values()} == {plain.dtype}
    assert th.equal(outputs(plain), outputs(model))
    stirred(model)
    assert not th.equal(outputs(plain), outputs(model))


def test_they_are_on_the_projections_of_attention_and_the_convolutions_of_blocks() -> None:
    models = {kind: unet(**LEVELS) for kind in ("attention", "convolutions")}
    attention, convolutions = (set(lora.attach(model, on=[kind])) for kind, model in models.items())
    assert {re.sub(r".*\.", "", name) for name in attention} == {"qkv", "proj_out"}
    model = unet(**LEVELS)
    inside = {name for name, module in model.named_modules() if isinstance(module, th.nn.Conv1d | th.nn.Conv2d)}
    outside = {"input_blocks.0.0", "input_blocks.2.0.op", "output_blocks.1.2.conv", "out.2"}
    assert attention | convolutions == inside - outside
    assert len(convolutions) + len(attention) == len(inside) - 4
    with pytest.raises(ValueError, match="finds nothing to adapt in Linear"):
        lora.attach(th.nn.Linear(2, 2))


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_merging_changes_no_output(alpha: float) -> None:
    model, plain = stirred(adapted(alpha=alpha)), unet()
    assert {adapter.scale for adapter in lora.adapters(model).values()} == {(alpha or 2) / 2}
    before = outputs(plain)
    plain.load_state_dict(lora.merged(model, model.state_dict()))
    th.testing.assert_close(outputs(plain), outputs(model), rtol=0, atol=2e-5)
    assert (outputs(plain) - before).abs().max() > 0.1


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    model = unet(dims=dims)
    shape = (2, 3, *[8] * dims)
    lora.attach(model, rank=1)
    stirred(model)
    x, t = th.randn(shape), th.tensor([1.0, 2.0])
    plain = unet(dims=dims)
    plain.load_state_dict(lora.merged(model, model.state_dict()))
    with th.no_grad():
        th.testing.assert_close(plain(x, t), model(x, t), rtol=1e-4, atol=1e-4)


def test_strided_padded_and_dilated_convolutions() -> None:
    conv = th.nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2)
    adapter = lora.Adapter(conv, 2, 3.0)
    th.nn.init.normal_(adapter.up)
    x = th.randn(2, 3, 9, 9)
    summed = copy.deepcopy(conv)
    with th.no_grad():
        summed.weight += 1.5 * (adapter.up.flatten(1) @ adapter.down.flatten(1)).view_as(conv.weight)
    th.testing.assert_close(conv(x) + adapter(x, conv), summed(x), rtol=0, atol=1e-5)


def test_joined_undoes_merged_to_the_bit() -> None:
    model = stirred(adapted(train=["out.2.bias"]))
    state = model.state_dict()
    parts = lora.split(model, state)
    assert {name for name in parts if not lora.is_part(name)} == {"out.2.bias"}
    whole = lora.joined(model, lora.merged(model, state), lora.base(model, state), parts)
    assert list(whole) == list(state)
    assert all(th.equal(whole[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="adapters of the checkpoint are others"):
        lora.joined(adapted(on=["attention"]), lora.merged(model, state), lora.base(model, state), parts)


# ---- training


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_only_adapters_learn_and_files_hold_them_merged(tmp_path: Path, precision: str) -> None:
    before = unet().state_dict()
    train(tmp_path, adapted(train=["out.2.bias"]), 4, precision=precision, initial_lg_loss_scale=8.0)
    pack = lora.read(str(tmp_path))
    assert set(pack.weights) == {"model", "0.5", "0.9"}
    assert all(parts["out.2.bias"].dtype == th.float32 for parts in pack.weights.values())
    adapters = {f"{name}.weight" for name in lora.adapters(adapted())}
    for key, name in (("model", "model"), ("0.5", "ema_0.5_"), ("0.9", "ema_0.9_")):
        saved = checkpoints.load(str(tmp_path / f"{name}000004.pt"))
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in before.items()}
        changed = {name for name in saved if not th.equal(saved[name], before[name])}
        assert changed == adapters | {"out.2.bias"}
        # the same file from the base and the adapters: what those who share them do
        alone = lora.Pack(pack.scale, pack.base, {"model": pack.weights[key]})
        merged, doubt = lora.applied(before, alone)
        assert doubt == ""
        for changed_name in adapters:
            assert th.equal(merged[changed_name], saved[changed_name])
        th.testing.assert_close(merged["out.2.bias"], saved["out.2.bias"])
    assert pack.best is pack.weights["0.9"]


def test_averages_are_those_of_the_adapters(tmp_path: Path) -> None:
    train(tmp_path, adapted(), 1, save_interval=1, ema_rate="0.5")
    first = lora.read(str(tmp_path)).weights
    start = lora.split(adapted(), adapted().state_dict())
    for name, value in first["0.5"].items():
        th.testing.assert_close(value, (start[name] + first["model"][name]) / 2, rtol=0, atol=1e-7)


def test_optimizer_files_have_a_place_for_every_parameter_and_a_state_for_trained_ones(tmp_path: Path) -> None:
    model = adapted()
    train(tmp_path, model, 2)
    saved = checkpoints.load(str(tmp_path / "opt000002.pt"))
    parameters = list(model.parameters())
    assert saved["param_groups"][0]["params"] == list(range(len(parameters)))
    assert set(saved["state"]) == {index for index, value in enumerate(parameters) if value.requires_grad}
    assert all(saved["state"][index]["exp_avg"].shape == parameters[index].shape for index in saved["state"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path: Path, precision: str) -> None:
    train(tmp_path / "whole", adapted(train=["out.2.bias"]), 4, precision=precision)
    train(tmp_path / "parts", adapted(train=["out.2.bias"]), 2, precision=precision)
    other = unet()
    for parameter in other.parameters():
        th.nn.init.normal_(parameter)  # nothing of the network that resumes may remain
    lora.attach(other, rank=2, train=["out.2.bias"])
    train(tmp_path / "parts", other, 4, precision=precision, resume_checkpoint=str(tmp_path / "parts"))
    names = sorted(name for name in os.listdir(tmp_path / "whole") if "000004.pt" in name)
    assert len(names) == 6
    for name in names:
        one, two = (checkpoints.load(str(tmp_path / folder / name)) for folder in ("whole", "parts"))
        assert same(one, two), name


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    train(tmp_path / "plain", unet(), 2)
    with pytest.raises(ValueError, match=r"is no checkpoint of a run with adapters: give --init_from"):
        train(tmp_path / "a", adapted(), 3, resume_checkpoint=str(tmp_path / "plain"))
    train(tmp_path / "lora", adapted(), 2)
    with pytest.raises(ValueError, match="are scaled by 1: leave --lora_alpha as it was"):
        train(tmp_path / "a", adapted(alpha=9.0), 3, resume_checkpoint=str(tmp_path / "lora"))
    other = unet()
    lora.attach(other, rank=3)
    with pytest.raises(ValueError, match="adapters of the checkpoint are others"):
        train(tmp_path / "a", other, 3, resume_checkpoint=str(tmp_path / "lora"))


def test_old_sets_go_with_their_adapters(tmp_path: Path) -> None:
    train(tmp_path, adapted(), 4, save_interval=1, keep_last=2)
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("lora")) == [
        "lora000003.pt",
        "lora000004.pt",
    ]
    assert checkpoints.find_set(str(tmp_path / "lora000003.pt")).model == str(tmp_path / "model000003.pt")


# ---- files


@pytest.fixture
def shared(tmp_path: Path) -> lora.Pack:
    model = stirred(adapted())
    checkpoints.save(str(tmp_path / "lora000001.pt"), lora.content(model, {"model": model.state_dict()}))
    return lora.read(str(tmp_path / "lora000001.pt"))


def test_the_scale_blends(shared: lora.Pack) -> None:
    weights = unet().state_dict()
    none, half, whole = (lora.applied(weights, shared, scale=scale)[0] for scale in (0.0, 0.5, 1.0))
    name = "middle_block.1.qkv.weight"
    assert th.equal(none[name], weights[name])
    th.testing.assert_close(half[name], (weights[name] + whole[name]) / 2)
    assert {key for key in weights if not th.equal(whole[key], weights[key])} == {
        f"{key}.weight" for key in lora.adapters(adapted())
    }


def test_adapters_of_another_base_are_told(shared: lora.Pack) -> None:
    weights = unet().state_dict()
    weights["middle_block.1.qkv.weight"] = weights["middle_block.1.qkv.weight"] + 1
    assert lora.applied(weights, shared)[1] == "the adapters were trained over other weights than these"
    others = build_upsampler(SuperResConfig(large_size=8, small_size=4, **{**TINY, "num_channels": 64}), False)
    with pytest.raises(ValueError, match=r"of another network: there is .*lora.down \[2, 32, 3, 3\] for .* \[64, 64"):
        lora.applied(others.state_dict(), shared)
    with pytest.raises(ValueError, match="for nothing"):
        lora.applied({}, shared)


def spoiled(value: dict[str, Any], key: str, change: Any) -> dict[str, Any]:
    return {**value, key: change(value[key])}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: {"a": th.zeros(2)},
        lambda value: value["weights"]["model"],
        lambda value: spoiled(value, "format", lambda old: 7),
        lambda value: spoiled(value, "weights", lambda old: {}),
        lambda value: spoiled(value, "weights", lambda old: {"slow": old["model"]}),
        lambda value: spoiled(value, "weights", lambda old: {"model": dict.fromkeys(old["model"], 1.0)}),
        lambda value: spoiled(value, "weights", lambda old: {"model": dict(list(old["model"].items())[1:])}),
        lambda value: spoiled(value, "weights", lambda old: {"model": {k: v[:1] for k, v in old["model"].items()}}),
        lambda value: spoiled(value, "weights", lambda old: [1]),
        lambda value: spoiled(value, "scale", lambda old: "much"),
        lambda value: spoiled(value, "scale", lambda old: th.zeros(2)),
        lambda value: spoiled(value, "weights", lambda old: {"model": {k: v[0] for k, v in old["model"].items()}}),
        lambda value: th.zeros(2),
        lambda value: [value],
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, shared: lora.Pack, spoil: Any) -> None:
    path = str(tmp_path / "lora000002.pt")
    checkpoints.save(path, spoil(checkpoints.load(str(tmp_path / "lora000001.pt"))))
    with pytest.raises(ValueError, match=r"lora000002.pt holds no adapters: give a file loraNNNNNN.pt"):
        lora.read(path)


def test_a_folder_without_adapters(tmp_path: Path) -> None:
    (tmp_path / "model000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no loraNNNNNN.pt: give the folder of a run with --lora_rank"):
        lora.read(str(tmp_path))
