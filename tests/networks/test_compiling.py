"""Compiled networks: the same numbers, the same files, and what is said before and after the minutes that it takes.

The backend is one that traces and makes no machine code, but in the slow test.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import torch._functorch.config as autograd_config

from guided_diffusion import logger
from guided_diffusion.commands import (
    classifier_train,
    common,
    image_sample,
    image_train,
    training,
)
from guided_diffusion.config import DiffusionConfig, UNetConfig
from guided_diffusion.networks import compiling
from guided_diffusion.networks.compiling import compile_network
from guided_diffusion.runtime.files import write_json
from guided_diffusion.runtime.options import defaults
from guided_diffusion.sampling.guidance import classifier_guidance
from guided_diffusion.script_util import build_diffusion, build_unet
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training import checkpoints
from guided_diffusion.unet import EncoderUNetModel, UNetModel

EMOJI = str(Path(__file__).parents[2] / "datasets" / "emoji64.zip")
traced = partial(compile_network, backend="aot_eager", log=logger.log)
OPTIONS: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "channel_mult": (1,),
}
X, T = th.randn(2, 3, 8, 8, generator=th.Generator().manual_seed(1)), th.tensor([3.0, 40.0])


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled code of other tests, and no variable of the compiler."""
    th.compiler.reset()  # which sets the variable
    monkeypatch.delenv(compiling.CACHE, raising=False)
    yield
    os.environ.pop(compiling.CACHE, None)


def random_weights(network: th.nn.Module) -> Any:
    with th.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return network.eval()


def said(folder: Path) -> list[str]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [re.sub(r"took [\d.]+ s", "took 0 s", line) for line in lines if line.startswith("compil")]


class Small(th.nn.Module):
    """Enough of a network for what does not depend on it, and compiled in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = th.nn.Conv2d(3, 8, 3, padding=1), th.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        out: th.Tensor = self.last(th.nn.functional.silu(self.first(x)) + timesteps[:, None, None, None] / 40)
        return out


@pytest.mark.slow
def test_a_network_is_compiled_in_place(tmp_path: Path) -> None:
    logger.configure(str(tmp_path), ["log"])
    network = random_weights(UNetModel(**OPTIONS))
    plain, names = copy.deepcopy(network), list(network.state_dict())
    compiled = traced(network, "the U-Net")
    assert said(tmp_path) == []
    with th.no_grad():
        for batch in (X, X, X[:1], X):
            th.testing.assert_close(network(batch, T[: len(batch)]), plain(batch, T[: len(batch)]))
    both = [
        [f"compiling the U-Net for {n}x3x8x8, which may take minutes", "compiled the U-Net: its first call took 0 s"]
        for n in (2, 1)
    ]
    assert said(tmp_path) == both[0] + both[1]
    assert len(compiled.known) == 2
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert list(network.state_dict()) == names
    twin = copy.deepcopy(network)
    with th.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(X, T).any()  # its own weights, by calls of its own
    assert len(compiled.known) == 2


@pytest.mark.slow
def test_guidance_by_a_compiled_classifier_has_the_same_gradient() -> None:
    options = {**OPTIONS, "out_channels": 5, "pool": "attention", "num_head_channels": 32}
    classifier, y = random_weights(EncoderUNetModel(**options)), th.tensor([4, 0])
    expected = classifier_guidance(classifier, 2.0)(X, T, y=y)
    traced(classifier, "the classifier", sampling=True)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    found = classifier_guidance(classifier, 2.0)(X, T, y=y)
    assert found is not None
    assert expected is not None
    assert expected.any()
    th.testing.assert_close(found, expected)


@autograd_config.patch(donated_buffer=True)  # as it is in a new process
def test_a_compiled_network_is_gone_back_through_twice() -> None:
    network = random_weights(Small())
    plain = copy.deepcopy(network)
    traced(network, "the network", sampling=True)
    found = []
    for model in (network, plain):
        x = X.clone().requires_grad_()
        th.autograd.grad(model(x, T).sum(), x)  # the backward pass is made, for a graph that is gone through once
        out = model(x, T)
        probes = (th.ones_like(out), out.detach())
        found.append([th.autograd.grad(out, x, probe, retain_graph=probe is probes[0])[0] for probe in probes])
    th.testing.assert_close(*found)
    assert not th.equal(*found[0])


def test_more_shapes_than_the_compiler_takes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger.configure(str(tmp_path), ["log"])
    monkeypatch.setattr(compiling, "SHAPES", 2)
    with th._dynamo.config.patch(recompile_limit=1), th.no_grad():
        network = random_weights(Small())
        traced(network, "the network")
        network(X, T), network(X[:1], T[:1])
        with pytest.raises(ValueError, match=r"^the network could not be compiled \(.+\): leave out --compile$"):
            network(th.cat([X, X[:1]]), th.zeros(3))


def test_a_network_that_is_looked_at_is_not_compiled(tmp_path: Path) -> None:
    """In a training without averages, where it is the one in training itself."""
    logger.configure(str(tmp_path), ["log"])
    process = build_diffusion(DiffusionConfig(diffusion_steps=40))
    network = random_weights(Small())
    compiled = traced(network, "the network in training")
    usual: dict[str, Any] = {"batch_size": 2, "microbatch": -1, "lr": 1e-3, "log_interval": 1, "save_interval": 9}
    usual |= {"ema_rate": "", "resume_checkpoint": "", "max_steps": 1, "data": repeat((X.clamp(-1, 1), {}))}
    loop = TrainLoop(model=network, diffusion=process, **usual)
    with loop.evaluation_model() as model:
        assert model is network
        model(X[:1], T[:1])
        assert not compiled.known
    model(X, T)
    assert len(compiled.known) == 1


@pytest.mark.parametrize("flags", ["--microbatch=auto --compile", "--microbatch=auto --fsdp"])
def test_flags_that_contradict_each_other_are_refused_before_a_run_and_in_a_dry_one(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        image_train.main([*flags.split(), "--dry_run", "--image_size=8"])
    assert "and --microbatch exclude each other: give one" in capsys.readouterr().err


def test_weights_that_change_are_those_that_compiled_code_uses() -> None:
    """In training, where an optimizer and a conversion change them in place."""
    network, plain = (random_weights(Small()) for _ in range(2))
    traced(network, "the network")
    network(X, T)
    network.load_state_dict(plain.state_dict())
    th.testing.assert_close(network(X, T), plain(X, T))


@pytest.mark.slow
def test_a_command_trains_compiled_what_it_trains_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compile_network", traced)
    flags = ["--data_dir", EMOJI, "--image_size=8", "--num_classes=9", "--classifier_width=64", "--iterations=2"]
    flags += ["--classifier_depth=1", "--classifier_channel_mult=1", "--classifier_attention_resolutions="]
    flags += ["--diffusion_steps=40", "--num_workers=0", "--batch_size=3", "--microbatch=2", "--lr=1e-2"]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        classifier_train.main([*flags, *more, "--log_dir", str(tmp_path / name)])
    plain, compiled = (checkpoints.load(str(tmp_path / name / "model000002.pt")) for name in ("plain", "compiled"))
    assert list(compiled) == list(plain)
    th.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-3)
    lines = said(tmp_path / "compiled")
    assert [line.split(", which")[0] for line in lines[::2]] == [
        "compiling the network in training for 2x3x8x8",
        "compiling the network in training for 1x3x8x8",
    ]


@pytest.mark.slow
def test_a_command_samples_compiled_what_it_samples_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "compile_network", traced)
    sizes = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}
    network = random_weights(build_unet(UNetConfig(**sizes), learn_sigma=False))
    checkpoints.save(str(tmp_path / "model000001.pt"), network.state_dict())
    flags = {**defaults(UNetConfig, DiffusionConfig), **sizes, "diffusion_steps": 40}
    write_json(str(tmp_path / "config.json"), {"command": "image_train", "flags": flags})
    words = ["--model_path", str(tmp_path / "model000001.pt"), "--num_samples=3", "--batch_size=2", "--steps=3"]
    found = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        image_sample.main([*words, *more, "--log_dir", str(tmp_path / name)])
        with np.load(tmp_path / name / "samples_3x8x8x3.npz") as file:
            found.append(file["arr_0"].astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1
    assert found[0].std() > 1
    compiling_lines = [line for line in said(tmp_path / "compiled") if line.startswith("compiling ")]
    assert compiling_lines == ["compiling the network of --model_path for 2x3x8x8, which may take minutes"]


def test_what_is_compiled_is_kept_in_our_folder_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", "/ours")
    assert compiling.use_cache() == os.path.join("/ours", "compiled") == os.environ[compiling.CACHE]
    monkeypatch.setenv(compiling.CACHE, "/theirs")
    assert compiling.use_cache() == "/theirs"


class Wilful(th.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = th.nn.Parameter(th.ones(1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x * self.weight if bool(x.sum() > 0) else x


def test_a_network_that_is_no_single_graph_is_refused(tmp_path: Path) -> None:
    logger.configure(str(tmp_path), ["log"])
    network = Wilful()
    traced(network, "the wilful one")
    with pytest.raises(ValueError, match=r"^the wilful one could not be compiled \(.+\): leave out --compile$"):
        network(X)


def test_what_the_compiler_needs_is_asked_for_before_hours_are_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler"):
        compile_network(UNetModel(**OPTIONS), "the U-Net")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="there is no clang"):
        compile_network(UNetModel(**OPTIONS), "the U-Net")
    with th.device("meta"), pytest.raises(ValueError, match="--compile is for cpu and cuda, not for meta"):
        compile_network(UNetModel(**OPTIONS), "the U-Net")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("sampling", [False, True])
def test_machine_code_computes_the_same(sampling: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path))
    logger.configure(str(tmp_path), ["log"])
    network = random_weights(UNetModel(**OPTIONS))
    network.convert_to("bf16")
    plain = copy.deepcopy(network)
    compile_network(network, "the U-Net", sampling=sampling, log=logger.log)
    for _ in range(2):
        with th.set_grad_enabled(not sampling):
            out, expected = network(X, T), plain(X, T)
        th.testing.assert_close(out, expected, atol=0.02 * float(expected.detach().abs().max()), rtol=0)
    if not sampling:
        for model, result in ((network, out), (plain, expected)):
            result.square().sum().backward()
            assert model.out[2].weight.grad is not None
        th.testing.assert_close(network.out[2].weight.grad, plain.out[2].weight.grad, atol=0.5, rtol=0.05)
    assert os.listdir(tmp_path / "compiled")
    assert f"kept in {tmp_path / 'compiled'}" in said(tmp_path)[0]
