"""On a GPU what the CPU computes: networks, samplers, training steps, graphs, NCCL, saves from pinned memory.

`scripts/gpu_checks.sh` runs these and the tables of docs/benchmarks.md in ten minutes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import runs
import test_train_util as training
import torch as th
import torch.distributed as dist

from guided_diffusion import dist_util
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.networks.compiling import compile_network
from guided_diffusion.sampling.guidance import classifier_guidance
from guided_diffusion.sampling.samplers import SAMPLERS
from guided_diffusion.script_util import build_classifier, build_diffusion, build_unet, build_upsampler
from guided_diffusion.training import checkpoints
from guided_diffusion.training.gradients import AdamW, AveragingTrainer
from guided_diffusion.training.saving import snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not th.cuda.is_available(), reason="no GPU that torch sees"),
]

# distance over the size of what the CPU has in fp32; TF32 is off
NEAR = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
N = 2


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(th.backends.cuda.matmul, "allow_tf32", False)


def off(one: th.Tensor, other: th.Tensor) -> float:
    """How far a tensor of the GPU is from one of the CPU, over the size of that."""
    return float((one.cpu().double() - other.double()).norm() / other.double().norm())


def unet() -> Any:
    return runs.scrambled(build_unet(runs.UNET, True))


def inputs(device: str = "cpu") -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(0)
    x, t, y = th.randn(N, 3, 8, 8, generator=generator), th.tensor([3.0, 17.0]), th.tensor([0, 2])
    return x.to(device), t.to(device), y.to(device)


@pytest.mark.parametrize("precision", NEAR)
@pytest.mark.parametrize("kind", ["unet", "upsampler", "classifier"])
def test_networks_and_their_gradients(kind: str, precision: str) -> None:
    make: dict[str, Any] = {
        "unet": lambda: build_unet(runs.UNET, True),
        "upsampler": lambda: build_upsampler(runs.UPSAMPLER, True),
        "classifier": lambda: build_classifier(runs.CLASSIFIER),
    }
    network = runs.scrambled(make[kind]())
    other = copy.deepcopy(network).cuda()
    other.convert_to(precision)
    found = []
    for model, device in ((network, "cpu"), (other, "cuda")):
        x, t, y = inputs(device)
        x.requires_grad_(True)
        more = {} if kind == "classifier" else {"y": y}
        more |= {"low_res": x.detach()[:, :, ::2, ::2]} if kind == "upsampler" else {}
        output = model(x, t, **more)
        (gradient,) = th.autograd.grad(output.float().square().sum(), x)
        found.append((output.detach().float(), gradient))
    for here, there in zip(*found, strict=True):
        assert off(there, here) < NEAR[precision]


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddim_reverse"])
def test_samplers_guided_by_a_classifier(name: str) -> None:
    """With the noise of the CPU, which the GPU draws otherwise; four steps from the same x_T."""
    network, classifier = unet(), runs.scrambled(build_classifier(runs.CLASSIFIER))
    process = build_diffusion(runs.PROCESS)
    samples = []
    for device in ("cpu", "cuda"):
        x, _, y = inputs(device)
        guide = classifier_guidance(copy.deepcopy(classifier).to(device), 2.0)
        options: dict[str, Any] = {"noise": x, "cond_fn": guide, "model_kwargs": {"y": y}, "device": device}
        options["generator"] = [th.Generator("cpu").manual_seed(i) for i in range(N)]
        samples.append(process.sample_loop(name, copy.deepcopy(network).to(device), x.shape, **options))
    assert off(samples[1], samples[0]) < 1e-2


@pytest.mark.parametrize("precision", NEAR)
def test_training_steps(precision: str) -> None:
    """Two steps on each device: losses, and how far the weights have come."""
    network, process = unet(), build_diffusion(runs.PROCESS)
    origin, weights, losses = copy.deepcopy(network.state_dict()), [], []
    for device, kind in (("cpu", "fp32"), ("cuda", precision)):
        model = copy.deepcopy(network).to(device)
        trainer = MixedPrecisionTrainer(model=model, precision=kind, initial_lg_loss_scale=10.0)
        opt = th.optim.SGD(trainer.master_params, lr=1e-3)  # Adam's first steps are signs, whatever the gradient
        for step in range(2):
            x, _, y = inputs(device)
            t = th.tensor([1, 3 - step], device=device)
            noise = th.randn(x.shape, generator=th.Generator().manual_seed(step)).to(device)
            trainer.zero_grad()
            loss = process.training_losses(model, x.clamp(-1, 1), t, {"y": y}, noise=noise)["loss"].mean()
            trainer.backward(loss, last=True)
            assert trainer.optimize(opt)
        losses.append(float(loss.detach()))
        weights.append(
            {name: value.detach().cpu() for name, value in trainer.weights_for_files(trainer.master_params).items()}
        )
    assert losses[1] == pytest.approx(losses[0], rel=NEAR[precision])
    apart = sum((weights[1][name] - weights[0][name]).double().square().sum() for name in origin)
    far = sum((weights[0][name] - origin[name]).double().square().sum() for name in origin)
    assert float((apart / far).sqrt()) < 2 * NEAR[precision]


def test_the_fused_optimizer_is_the_one_of_the_cpu() -> None:
    values = []
    for device in ("cpu", "cuda"):
        params = [th.linspace(-1, 1, 64, device=device).view(4, 4, 2, 2).contiguous(memory_format=th.channels_last)]
        opt = AdamW(params, lr=0.1, weight_decay=0.1, fused=True)
        for step in range(3):
            params[0].grad = (params[0] * (step + 1)).sin()
            opt.step()
        values.append(params[0])
    assert off(values[1], values[0]) < 1e-5


def test_a_step_is_recorded_as_a_graph_and_played_again() -> None:
    network = unet().cuda()
    x, t, y = inputs("cuda")
    side = th.cuda.Stream()
    side.wait_stream(th.cuda.current_stream())
    with th.no_grad(), th.cuda.stream(side):
        for _ in range(3):
            network(x, t, y=y)
    th.cuda.current_stream().wait_stream(side)
    graph = th.cuda.CUDAGraph()
    with th.no_grad(), th.cuda.graph(graph):
        output = network(x, t, y=y)
    x.copy_(x.flip(0))
    t.copy_(t.flip(0))
    y.copy_(y.flip(0))
    graph.replay()
    with th.no_grad():
        assert off(output.cpu(), network(x, t, y=y).cpu()) < 1e-5


@pytest.mark.slow
def test_a_network_compiled_for_sampling_computes_the_same() -> None:
    network, compiled = unet().cuda(), unet().cuda()
    compile_network(compiled, "the network", sampling=True, log=lambda line: None)  # with CUDA graphs
    x, t, y = inputs("cuda")
    with th.no_grad():
        assert off(compiled(x, t, y=y).cpu(), network(x, t, y=y).cpu()) < 1e-3


@pytest.mark.parametrize(("name", "bound"), [("AveragingTrainer", 1e-6), ("ShardedTrainer", 1e-3)])
def test_one_rank_of_nccl_trains_as_without(name: str, bound: float) -> None:
    from guided_diffusion.training.sharding import ShardedTrainer

    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    found = []
    for kind in (MixedPrecisionTrainer, {"AveragingTrainer": AveragingTrainer, "ShardedTrainer": ShardedTrainer}[name]):
        model = unet().cuda()
        trainer = kind(model=model, precision="bf16")
        opt = AdamW(trainer.master_params, lr=1e-3, fused=True)
        x, t, y = inputs("cuda")
        trainer.backward(model(x, t, y=y).float().square().mean(), last=True)
        assert trainer.optimize(opt)
        state = trainer.weights_for_files(trainer.master_params)
        found.append(th.cat([state[name].detach().float().cpu().flatten() for name in sorted(state)]))
    assert off(found[1], found[0]) < bound


def test_a_copy_for_saving_is_pinned_and_of_the_moment() -> None:
    value = th.arange(1e6, device="cuda")
    copied = snapshot({"a": [value, 3]})
    value.zero_()
    assert copied["a"][0].is_pinned()
    assert th.equal(copied["a"][0], th.arange(1e6))


def test_asynchronous_saves_are_those_of_waiting_ones(tmp_path: Path) -> None:
    pictures = training.pictures.__wrapped__(tmp_path)
    dist_util.setup_dist(device="cuda")
    for name, asynchronous in (("one", True), ("two", False)):
        network = training.labelled().cuda()
        data = training.stream(pictures, 4, class_cond=True)
        options = {"network": network, "save_interval": 1, "async_save": asynchronous, "precision": "bf16"}
        training.make(tmp_path / name, data, **options).run_loop()
    for step in (1, 2, 3):
        one, two = (checkpoints.load(str(tmp_path / name / f"model{step:06d}.pt")) for name in ("one", "two"))
        for key, value in one.items():  # kernels of a GPU may add in another order
            assert off(value, two[key]) < 1e-3
