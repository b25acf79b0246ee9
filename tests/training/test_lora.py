"""Adapters: they start as nothing, learn over frozen weights, and are merged, resumed and passed on to the bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch as th
from few import few
from runs import load_weights

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
    for layer in lora.adapters(model).values():
        th.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_adapters_start_as_nothing(precision: str) -> None:
    plain, model = unet(), adapted()
    plain.convert_to(precision), model.convert_to(precision)
    assert {layer.lora_A["default"].weight.dtype for layer in lora.adapters(model).values()} == {plain.dtype}
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
    assert (
        {layer.scaling["default"] for layer in lora.adapters(model).values()}
        == {lora.scale_of(model)}
        == {(alpha or 2) / 2}
    )
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


def test_layered_undoes_merged_to_the_bit() -> None:
    model = stirred(adapted(train=["out.2.bias"]))
    state = model.state_dict()
    parts = lora.split(model, state)
    assert {name for name in parts if not lora.is_part(name)} == {"out.2.bias"}
    named = {**lora.merged(model, state), **lora.base(model, state), **parts}
    whole = lora.layered(model, named)
    assert list(whole) == list(state)
    assert all(th.equal(whole[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="adapters of the checkpoint are others"):
        lora.layered(adapted(on=["attention"]), named)


@pytest.mark.parametrize("precision", few(["fp32", "bf16", "fp16"], ["bf16"]))
def test_only_adapters_learn_and_files_hold_them_merged(tmp_path: Path, precision: str) -> None:
    before = unet().state_dict()
    train(tmp_path, adapted(train=["out.2.bias"]), 4, precision=precision, initial_lg_loss_scale=8.0)
    state = checkpoints.load(str(tmp_path / "state000004.pt"))
    assert set(state["lora"]) == {"model", "0.5", "0.9"}
    adapters, shared = {f"{name}.weight" for name in lora.adapters(adapted())}, lora.read(str(tmp_path))
    for key, name in (("model", "model"), ("0.5", "ema_0.5_"), ("0.9", "ema_0.9_")):
        parts = state["lora"][key]
        assert {value.dtype for value in parts.values()} == {th.float32}
        saved = checkpoints.load(str(tmp_path / f"{name}000004.pt"))
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in before.items()}
        assert {name for name in saved if not th.equal(saved[name], before[name])} == adapters | {"out.2.bias"}
        # the same file from the base and the adapters: what those who share them do
        merged, doubt = lora.applied(before, lora.Pack(state["lora_scale"], shared.base, parts))
        assert doubt == ""
        for changed_name in adapters:
            assert th.equal(merged[changed_name], saved[changed_name])
        th.testing.assert_close(merged["out.2.bias"], saved["out.2.bias"])
        assert all(th.equal(shared.weights[name], parts[name]) for name in parts) == (key == "0.9")
    assert set(shared.weights) - set(parts) == {"out.2.weight"}  # peft saves whole modules


def test_averages_are_those_of_the_adapters(tmp_path: Path) -> None:
    train(tmp_path, adapted(), 1, save_interval=1, ema_rate="0.5")
    state = checkpoints.load(str(tmp_path / "state000001.pt"))["lora"]
    start = lora.split(adapted(), adapted().state_dict())
    for name, value in state["0.5"].items():
        th.testing.assert_close(value, (start[name] + state["model"][name]) / 2, rtol=0, atol=1e-7)


def test_peft_loads_the_folder(tmp_path: Path) -> None:
    import peft

    train(tmp_path, adapted(alpha=3.0, train=["out.2.bias"]), 2, ema_rate="")
    trained, model = unet(), unet()
    load_weights(trained, str(tmp_path / "model000002.pt"))
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora000002"))
    th.testing.assert_close(outputs(loaded), outputs(trained), rtol=0, atol=1e-5)


def test_optimizer_files_have_a_place_for_every_parameter_and_a_state_for_trained_ones(tmp_path: Path) -> None:
    model = adapted()
    train(tmp_path, model, 2)
    saved = checkpoints.load(str(tmp_path / "opt000002.pt"))
    parameters = list(model.parameters())
    assert saved["param_groups"][0]["params"] == list(range(len(parameters)))
    assert set(saved["state"]) == {index for index, value in enumerate(parameters) if value.requires_grad}
    assert all(saved["state"][index]["exp_avg"].shape == parameters[index].shape for index in saved["state"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path: Path, precision: str) -> None:
    train(tmp_path / "whole", adapted(train=["out.2.bias"]), 4, precision=precision)
    train(tmp_path / "parts", adapted(train=["out.2.bias"]), 2, precision=precision)
    other = unet()
    for parameter in other.parameters():
        th.nn.init.normal_(parameter)  # nothing of the network that resumes may remain
    lora.attach(other, rank=2, train=["out.2.bias"])
    train(tmp_path / "parts", other, 4, precision=precision, resume_checkpoint=str(tmp_path / "parts"))
    assert (tmp_path / "parts" / "lora000004" / lora.WEIGHTS).read_bytes() == (
        tmp_path / "whole" / "lora000004" / lora.WEIGHTS
    ).read_bytes()
    names = sorted(name for name in os.listdir(tmp_path / "whole") if "000004.pt" in name)
    assert len(names) == 5
    for name in names:
        one, two = (checkpoints.load(str(tmp_path / folder / name)) for folder in ("whole", "parts"))
        assert same(one, two), name


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    train(tmp_path / "plain", unet(), 2)
    with pytest.raises(ValueError, match="is no checkpoint of a run with adapters: give --init_from"):
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
    folders = sorted(name for name in os.listdir(tmp_path) if name.startswith("lora"))
    assert folders == ["lora000003", "lora000004"]
    entry = checkpoints.find_set(str(tmp_path / "model000003.pt"))
    assert entry.lora == str(tmp_path / "lora000003")
    (tmp_path / "lora000004" / lora.WEIGHTS).write_bytes(b"half")
    assert checkpoints.newest(str(tmp_path))[0] == entry


@pytest.fixture
def shared(tmp_path: Path) -> lora.Pack:
    model = stirred(adapted())
    for name, value in lora.content(model, model.state_dict()).items():
        checkpoints.save(str(tmp_path / "lora000001" / name), value)
    return lora.read(str(tmp_path / "lora000001"))


def older(parts: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """Adapters under the names of our first runs."""
    renamed = (name.replace(".lora_A.weight", ".lora.down").replace(".lora_B.weight", ".lora.up") for name in parts)
    return dict(zip(renamed, parts.values(), strict=True))


@pytest.mark.slow
def test_an_older_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, adapted(), 2)
    straight = train(tmp_path / "new", adapted(), 3, resume_checkpoint=str(run))
    state = checkpoints.load(str(run / "state000002.pt"))
    parts, scale = state.pop("lora"), state.pop("lora_scale")
    value = {"scale": scale, "base": "", "weights": {key: older(values) for key, values in parts.items()}}
    shutil.rmtree(run / "lora000002")
    os.remove(run / "set000002.json")
    checkpoints.save(str(run / "state000002.pt"), state)
    checkpoints.save(str(run / "lora000002.pt"), value)
    again = train(tmp_path / "again", adapted(), 3, resume_checkpoint=str(run))
    assert same(straight.model.state_dict(), again.model.state_dict())
    assert same(straight.ema_params, again.ema_params)


def test_a_file_of_an_older_run_is_the_same_adapters(tmp_path: Path, shared: lora.Pack) -> None:
    parts = older(shared.weights)
    zeros = {name: th.zeros_like(value) for name, value in parts.items()}
    weights = {"model": zeros, "0.999": zeros, "0.9999": parts}
    value = {"format": 1, "rank": 2, "scale": shared.scale, "base": shared.base, "weights": weights}
    checkpoints.save(str(tmp_path / "lora000002.pt"), value)
    for path in (tmp_path / "lora000002.pt", tmp_path):
        pack = lora.read(str(path))
        assert (pack.scale, pack.base, set(pack.weights)) == (shared.scale, shared.base, set(shared.weights))
        assert all(th.equal(pack.weights[name], value) for name, value in shared.weights.items())
    checkpoints.save(str(tmp_path / "lora000002.pt"), {**value, "weights": {"model": parts}})
    assert lora.read(str(tmp_path)).weights.keys() == shared.weights.keys()


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
    with pytest.raises(ValueError, match=r"of another network: there is one of \[32, 32, 3, 3\] for .* has \[64, 64"):
        lora.applied(others.state_dict(), shared)
    with pytest.raises(ValueError, match="which is missing"):
        lora.applied({}, shared)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (lora.CONFIG, lambda config: [config]),
        (lora.CONFIG, lambda config: {"r": 2}),
        (lora.CONFIG, lambda config: {**config, "lora_alpha": "much"}),
        (lora.CONFIG, lambda config: {**config, "r": 0}),
        (lora.CONFIG, lambda config: {**config, "use_dora": True}),
        (lora.WEIGHTS, lambda weights: {"a": th.zeros(2)}),
        (lora.WEIGHTS, lambda weights: dict(list(weights.items())[1:])),
        (lora.WEIGHTS, lambda weights: {name: value[:1] for name, value in weights.items()}),
        (lora.WEIGHTS, lambda weights: {name: value[0, 0] for name, value in weights.items()}),
    ],
)
def test_folders_of_something_else_are_refused(tmp_path: Path, shared: lora.Pack, name: str, change: Any) -> None:
    path = str(tmp_path / "lora000001" / name)
    content = json.loads(Path(path).read_bytes()) if name == lora.CONFIG else checkpoints.load(path)
    checkpoints.save(path, change(content))
    with pytest.raises(ValueError, match=r"lora000001 holds no adapters that can be merged: give a folder loraNNNNNN"):
        lora.read(str(tmp_path))


@pytest.mark.parametrize("value", [{"a": th.zeros(2)}, th.zeros(2), [1], {"scale": 1, "base": "", "weights": {}}])
def test_files_of_something_else_are_refused(tmp_path: Path, value: Any) -> None:
    checkpoints.save(str(tmp_path / "lora000002.pt"), value)
    with pytest.raises(ValueError, match=r"lora000002.pt holds no adapters"):
        lora.read(str(tmp_path / "lora000002.pt"))


def test_a_folder_without_adapters(tmp_path: Path) -> None:
    (tmp_path / "model000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no loraNNNNNN: give the folder of a run with --lora_rank"):
        lora.read(str(tmp_path))


def test_without_peft_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=re.escape('pip install "guided-diffusion[lora]"')):
        adapted()
