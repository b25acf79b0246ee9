"""Mixed precision: masters, loss scale, skipped steps, gradients on their way, and the layouts in memory and files."""

import copy
import gc
import weakref

import pytest
import torch as th
import torch.distributed as dist
from few import few
from torch import nn

from guided_diffusion import dist_util, fp16_util, logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.nn import update_ema
from guided_diffusion.training import gradients
from guided_diffusion.training.gradients import AdamW, AveragingTrainer
from guided_diffusion.training.saving import unflatten_optimizer_state

DTYPES = {"fp32": th.float32, "fp16": th.float16, "bf16": th.bfloat16}


class Toy(nn.Module):
    """Two layers of which the first changes its precision, as the blocks of a U-Net do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def convert_to(self, precision: str) -> None:
        self.body.to(DTYPES[precision])

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.head(self.body(x.to(self.body.weight.dtype)).float())


X = th.linspace(-1, 1, 15).view(5, 3)


def loss_of(model: nn.Module) -> th.Tensor:
    return ((model(X) - 1) ** 2).mean()


def make(precision: str, **options: float) -> tuple[Toy, MixedPrecisionTrainer, th.optim.SGD]:
    """The same toy every time, trained by plain gradient descent, in which a wrong scale cannot hide."""
    th.manual_seed(1)
    model = Toy()
    # 2^20, the default, is for gradients of about 1e-3: these overflow in fp16
    trainer = MixedPrecisionTrainer(model=model, precision=precision, **{"initial_lg_loss_scale": 10.0, **options})
    return model, trainer, th.optim.SGD(trainer.master_params, lr=0.1)


def train(trainer: MixedPrecisionTrainer, opt: th.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        trainer.zero_grad()
        trainer.backward(loss_of(trainer.model))
        assert trainer.optimize(opt)


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=[])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_every_parameter_moves_as_in_fp32(precision, tolerance):
    """Also the vectors, and not by 2^20 too much: gradients are unscaled on all masters."""
    _, reference, opt = make("fp32")
    train(reference, opt, 3)
    model, trainer, opt = make(precision)
    start = [p.detach().clone() for p in trainer.master_params]
    train(trainer, opt, 3)
    for ours, theirs, first in zip(trainer.master_params, reference.master_params, start, strict=True):
        assert ours.dtype == th.float32
        moved = (theirs - first).abs().max().item()
        assert moved > 0.01
        th.testing.assert_close(ours, theirs, atol=tolerance * moved, rtol=0)
    assert model.body.weight.dtype == DTYPES[precision]
    for param, master in zip(model.parameters(), trainer.master_params, strict=True):
        assert th.equal(param, master.to(param.dtype))


def test_masters_are_the_parameters_in_fp32_and_unrounded_copies_otherwise():
    model, trainer, _ = make("fp32")
    assert all(a is b for a, b in zip(trainer.master_params, model.parameters(), strict=True))
    half, trainer, _ = make("bf16")
    originals = dict(model.named_parameters())
    state = trainer.master_params_to_state_dict(trainer.master_params)
    assert list(state) == list(originals)
    assert all(th.equal(state[name], originals[name]) for name in originals)
    assert not th.equal(half.body.weight.float(), originals["body.weight"])
    back = trainer.state_dict_to_master_params(state)
    assert all(th.equal(a, b) for a, b in zip(back, trainer.master_params, strict=True))


def test_the_gradients_of_many_backward_passes_add_up_in_fp32():
    """In bf16 a sum of ones would stop at 256."""
    model, trainer, opt = make("bf16")
    trainer.zero_grad()
    for _ in range(400):
        trainer.backward(model.body.bias.float().sum())
    before = trainer.master_params[1].detach().clone()
    trainer.optimize(opt)
    th.testing.assert_close(before - trainer.master_params[1].detach(), th.full((4,), 40.0))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(precision, bad):
    model, trainer, _ = make(precision)
    opt = th.optim.AdamW(trainer.master_params, lr=0.1, weight_decay=0.1)
    train(trainer, opt, 2)
    before = copy.deepcopy((model.state_dict(), trainer.master_params, opt.state_dict()))
    scale = trainer.lg_loss_scale
    trainer.zero_grad()
    trainer.backward(loss_of(model) * bad)
    assert not trainer.optimize(opt)
    assert trainer.fault == "loss"
    after = (model.state_dict(), trainer.master_params, opt.state_dict())
    th.testing.assert_close(after, before, atol=0, rtol=0)
    assert trainer.lg_loss_scale == scale - (precision == "fp16")
    train(trainer, opt, 1)
    assert trainer.fault == ""


def test_the_loss_scale_falls_by_one_never_below_zero_and_grows_slowly(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["log"])
    model, trainer, opt = make("fp16", initial_lg_loss_scale=2.5, fp16_scale_growth=0.25)
    seen = []
    for _ in range(4):
        trainer.zero_grad()
        trainer.backward(loss_of(model) * float("nan"))
        trainer.optimize(opt)
        seen.append(trainer.lg_loss_scale)
    assert seen == [1.5, 0.5, 0, 0]
    said = (tmp_path / "log.txt").read_text()
    assert "lg_loss_scale is now 0 and falls no further" in said
    train(trainer, opt, 2)
    assert trainer.lg_loss_scale == 0.5
    _, other, _ = make("fp16")
    other.load_state_dict(trainer.state_dict())
    assert other.lg_loss_scale == 0.5


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_step_is_skipped_for_its_loss_its_gradient_or_its_weights(precision):
    """A loss that is not finite counts where its gradient is; and of several backward passes each counts."""
    model, trainer, opt = make(precision)

    def fault(*losses):
        trainer.zero_grad()
        for loss in losses:
            trainer.backward(loss)
        return "" if trainer.optimize(opt) else trainer.fault

    good = loss_of(model)
    assert fault(good) == ""
    for bad in (float("inf"), float("-inf"), float("nan")):
        assert fault(loss_of(model) + bad) == "loss"
        assert fault(loss_of(model) + bad, loss_of(model)) == fault(loss_of(model), loss_of(model) + bad) == "loss"
    root = (model.head.bias[0] - model.head.bias[0].detach()).abs().sqrt()  # 0, and its derivative infinite times 0
    assert fault(loss_of(model) + root) == "gradient"
    assert trainer.only_scaled == (precision == "fp16")
    assert fault(loss_of(model)) == ""
    assert not trainer.only_scaled
    with th.no_grad():
        trainer.master_params[0][0, 0] = 1e20
    assert fault(loss_of(model)) == "weight norm"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_limits_the_norm_and_logs_the_unclipped_one(precision):
    _, trainer, opt = make(precision, grad_clip=0.01)
    start = [p.detach().clone() for p in trainer.master_params]
    train(trainer, opt, 1)
    moved = th.cat([(a - b).flatten() for a, b in zip(trainer.master_params, start, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert logger.getkvs()["grad_norm"] > 0.1
    norm = th.cat([p.flatten() for p in start]).norm().item()
    assert logger.getkvs()["param_norm"] == pytest.approx(norm, rel=1e-6)
    trainer.zero_grad()
    trainer.backward(loss_of(trainer.model))
    trainer.grad_clip = 1e-9
    assert trainer.optimize(opt)
    again = th.cat([(a - b).flatten() for a, b in zip(trainer.master_params, start, strict=True)]).norm()
    assert again.item() == pytest.approx(moved.item(), rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parameters_stay_and_unused_ones_count_as_zero_gradients(precision):
    th.manual_seed(1)
    model = Toy()
    model.spare = nn.Parameter(th.ones(2))
    model.body.requires_grad_(False)
    trainer = MixedPrecisionTrainer(model=model, precision=precision)
    opt = th.optim.AdamW(trainer.master_params, lr=0.1, weight_decay=0.5)
    start = [p.detach().clone() for p in trainer.master_params]
    train(trainer, opt, 1)
    changed = [
        name
        for (name, _), a, b in zip(model.named_parameters(), trainer.master_params, start, strict=True)
        if not th.equal(a, b)
    ]
    assert set(changed) == {"head.weight", "head.bias", "spare"}
    spare = dict(zip(dict(model.named_parameters()), trainer.master_params, strict=True))["spare"]
    th.testing.assert_close(spare.detach(), th.full((2,), 0.95))  # decay alone


def test_what_cannot_be_trained_is_refused():
    model = Toy()
    with pytest.raises(ValueError, match="contradicts"):
        MixedPrecisionTrainer(model=model, use_fp16=True, precision="bf16")
    with pytest.raises(TypeError, match="Linear cannot train in bf16"):
        MixedPrecisionTrainer(model=nn.Linear(2, 2), precision="bf16")
    with pytest.raises(ValueError, match="nothing can be trained"):
        MixedPrecisionTrainer(model=Toy().requires_grad_(False))
    model.convert_to("fp16")
    with pytest.raises(ValueError, match=r"torch.float16 but precision is fp32"):
        MixedPrecisionTrainer(model=model)


def test_a_model_that_only_knows_fp16_trains_in_it():
    class Old(Toy):
        convert_to = None

        def convert_to_fp16(self) -> None:
            self.body.half()

    model = Old()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=10.0)
    train(trainer, th.optim.SGD(trainer.master_params, lr=0.1), 1)
    assert model.body.weight.dtype == th.float16


def step_by_step(trainer: MixedPrecisionTrainer, losses: list[th.Tensor], *, last: bool = True) -> list[th.Tensor]:
    """The gradients of some backward passes, copied; `last`: the last of them is said to be it."""
    trainer.zero_grad()
    for index, loss in enumerate(losses):
        trainer.backward(loss, last=last and index + 1 == len(losses))
    return [grad.clone() for grad in trainer._gradients()[0]]


def test_a_gradient_leaves_the_model_as_soon_as_it_is_there():
    """Those of the first layer come last: by then those of the second have moved."""
    model = Picture()
    trainer = MixedPrecisionTrainer(model=model, precision="bf16")
    first, second = model.body
    there = []
    first.weight.register_post_accumulate_grad_hook(lambda _: there.append(second.weight.grad))
    trainer.zero_grad()
    trainer.backward(picture_loss(model))
    assert there == [None]
    assert all(master.grad is not None and master.grad.dtype == th.float32 for master in trainer.master_params)


def test_a_parameter_that_stays_in_fp32_is_its_own_master():
    model, trainer, _ = make("bf16")
    kept = [param is master for param, master in zip(model.parameters(), trainer.master_params, strict=True)]
    assert kept == [False, False, True, True]
    trainer.zero_grad()
    trainer.backward(loss_of(model))
    assert [param.grad is None for param in model.parameters()] == [True, True, False, False]


@pytest.mark.parametrize("precision", few(["fp32", "bf16"], ["bf16"]))
def test_trainers_of_one_model_and_passes_without_one_do_not_disturb_each_other(precision):
    model, first, _ = make(precision)
    second = MixedPrecisionTrainer(model=model, precision=precision)
    expected = step_by_step(first, [loss_of(model)])
    assert all(th.equal(a, b) for a, b in zip(step_by_step(second, [loss_of(model)]), expected, strict=True))
    second.zero_grad()
    loss_of(model).backward()
    assert all(param.grad is not None for param in model.parameters())
    found, loss = second._gradients()
    assert loss == 0
    assert all(th.equal(a, b) for a, b in zip(found, expected, strict=True))
    reference = weakref.ref(first.gradients)
    del first
    gc.collect()
    assert reference() is None
    loss_of(model).backward()


@pytest.fixture
def buckets(monkeypatch):
    """A group of one rank, small buckets, and a list of the sizes that are sent."""
    dist_util.setup_dist(device="cpu")
    sent = []
    all_reduce = dist.all_reduce

    def send(tensor, **options):
        sent.append(len(tensor))
        return all_reduce(tensor, **options)

    monkeypatch.setattr(gradients, "BUCKET", 12)
    monkeypatch.setattr(dist, "all_reduce", send)
    return sent


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("last", [False, True])
def test_buckets_of_ranks_hold_the_gradients_of_one_process(buckets, precision, last):
    """Bit for bit, over several passes and steps; sent while the last pass goes on, or after it."""
    model, alone, _ = make(precision)
    shared = AveragingTrainer(model=model, precision=precision, initial_lg_loss_scale=10.0)
    for _ in range(2):
        expected = step_by_step(alone, [loss_of(model), loss_of(model) * 2])
        assert buckets == []
        shared.zero_grad()
        shared.backward(loss_of(model))
        assert buckets == []
        shared.backward(loss_of(model) * 2, last=last)
        assert buckets == ([4 + 4 + 8, 4 + 4, 4 + 12] if last else [])
        found, loss = shared._gradients()
        assert len(buckets) == 3
        assert loss == 3 * loss_of(model)
        assert all(th.equal(a, b) for a, b in zip(found, expected, strict=True))
        buckets.clear()


def test_buckets_are_sent_in_one_order_with_zeros_for_what_took_no_part(buckets):
    """The first of two buckets has the second weight and the first bias, whose gradient the last pass does not see."""
    model, _, _ = make("fp32")
    model.head.bias.requires_grad_(False)
    trainer = AveragingTrainer(model=model, precision="fp32")
    trainer.zero_grad()
    trainer.backward(model.head.weight.sum() + model.body.bias.sum())
    trainer.backward(model.head.weight.sum() + model.body.weight.sum(), last=True)
    assert buckets == []  # the second is complete, and waits for the first
    assert [float(grad.mean()) for grad in trainer._gradients()[0]] == [1, 1, 2]
    assert len(buckets) == 2
    assert [float(grad.mean()) for grad in step_by_step(trainer, [model.body.weight.sum()])] == [1, 0, 0]
    assert len(buckets) == 4
    trainer.backward(model.head.weight.sum() + model.body.bias.sum(), last=True)
    assert len(buckets) == 5
    with pytest.raises(RuntimeError, match="a gradient came after its bucket was sent"):
        trainer.backward(model.head.weight.sum(), last=True)


class Picture(Toy):
    """Convolutions of kernels 1 and 3 that are channels-last after the conversion, and a vector that stays in fp32."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 1))
        self.head = nn.Conv2d(4, 2, 3)
        self.scale = nn.Parameter(th.ones(2))

    def convert_to(self, precision: str) -> None:
        self.body.to(DTYPES[precision])
        self.to(memory_format=th.channels_last)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.head(self.body(x.to(self.body[0].weight.dtype)).float()) * self.scale[:, None, None]


def picture_loss(model: nn.Module) -> th.Tensor:
    return ((model(th.linspace(-1, 1, 3 * 2 * 8 * 8).view(3, 2, 8, 8)) - 1) ** 2).mean()


@pytest.mark.parametrize("kind", [MixedPrecisionTrainer, AveragingTrainer])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_that_belongs_to_a_weight_lies_in_memory_as_it_does(precision, kind):
    dist_util.setup_dist(device="cpu")
    th.manual_seed(1)
    model = Picture()
    trainer = kind(model=model, precision=precision, initial_lg_loss_scale=8.0)
    opt = AdamW(trainer.master_params, lr=0.1, fused=True)
    for _ in range(2):
        trainer.zero_grad()
        for _ in range(2):
            trainer.backward(picture_loss(model))
        assert trainer.optimize(opt)
    assert not model.body[0].weight.is_contiguous()
    for param, master in zip(model.parameters(), trainer.master_params, strict=True):
        moments = [opt.state[master][name] for name in ("exp_avg", "exp_avg_sq")]
        for tensor in (master, master.grad, *moments):
            assert gradients.laid_out_as(tensor, param) is tensor

    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    for value, master in zip(trainer.state_dict_to_master_params(state), trainer.master_params, strict=True):
        assert gradients.laid_out_as(value, master) is value
    saved = copy.deepcopy(opt.state_dict()["state"])
    files = {i: {name: value.contiguous() for name, value in entry.items()} for i, entry in saved.items()}
    th.testing.assert_close(unflatten_optimizer_state(files, model), saved, check_stride=True)


@pytest.mark.parametrize("weights", [th.contiguous_format, th.channels_last])
@pytest.mark.parametrize("grads", [th.contiguous_format, th.channels_last])
def test_the_optimizer_updates_weights_in_any_order_of_memory(weights, grads):
    """torch's own fused kernel takes a gradient for another weight's where the two orders differ."""
    found = []
    for kind, options in ((AdamW, {"fused": True}), (th.optim.AdamW, {"fused": False})):
        generator = th.Generator().manual_seed(0)
        shapes = [(5, 3, 3, 3), (4, 3, 1, 1), (7,), ()]
        params = [nn.Parameter(th.randn(shape, generator=generator)) for shape in shapes]
        params[0] = nn.Parameter(params[0].detach().to(memory_format=weights))
        opt = kind(params, lr=0.1, weight_decay=0.1, **options)
        for _ in range(3):
            for param in params:
                param.grad = th.randn(param.shape, generator=generator)
            params[0].grad = params[0].grad.to(memory_format=grads)
            opt.step()
        found.append((params, [opt.state[param] for param in params]))
    th.testing.assert_close(*found)


def test_the_optimizer_goes_on_from_moments_in_another_order_of_memory():
    """Those of a file are contiguous."""
    found = []
    for kind, options in ((AdamW, {"fused": True}), (th.optim.AdamW, {"fused": False})):
        generator = th.Generator().manual_seed(0)
        values = th.randn(5, 3, 3, 3, generator=generator).to(memory_format=th.channels_last)
        param = nn.Parameter(values.clone())
        opt = kind([param], lr=0.1, weight_decay=0.1, **options)
        moments = {name: th.rand(param.shape, generator=generator) for name in ("exp_avg", "exp_avg_sq")}
        state = {0: {"step": th.tensor(3.0), **moments}}
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
        opt.state[param].update({name: value.clone() for name, value in moments.items()})  # in whatever order
        for _ in range(2):
            param.grad = th.randn(param.shape, generator=generator)
            opt.step()
        found.append((param, opt.state[param]["exp_avg"], opt.state[param]["exp_avg_sq"]))
    th.testing.assert_close(*found)
    assert all(value.stride() == found[0][0].stride() for value in found[0])


GAPS = {  # a part of a larger tensor, by its memory; strides of a 3 x 4 parameter
    "columns": (8, 1),
    "every other number": (8, 2),
    "transposed columns": (1, 8),
    "rows": (4, 1),
    "transposed rows": (1, 3),
    "overlapping": (2, 1),
}


@pytest.mark.parametrize("strides", GAPS)
def test_the_optimizer_writes_nothing_but_its_parameters(strides):
    found = []
    for kind, options in ((AdamW, {"fused": True}), (th.optim.AdamW, {"fused": False})):
        generator = th.Generator().manual_seed(0)
        memory = th.randn(60, generator=generator)
        before = memory.clone()
        param = nn.Parameter(memory.as_strided((3, 4), GAPS[strides], 2))
        opt = kind([param, nn.Parameter(th.ones(2))], lr=0.1, weight_decay=0.1, **options)
        for _ in range(3):
            param.grad = th.randn(3, 4, generator=generator)
            opt.step()
        row, column = GAPS[strides]
        assert {*(memory != before).nonzero().flatten().tolist()} == {
            2 + i * row + j * column for i in range(3) for j in range(4)
        }
        found.append((param, opt.state[param]["exp_avg"]))
    th.testing.assert_close(*found)


@pytest.mark.parametrize("strides", [(1, 0), (0, 1), (0, 0)])
def test_the_optimizer_refuses_expanded_parameters(strides):
    param = nn.Parameter(th.randn(20).as_strided((3, 4), strides))
    param.grad = th.ones(3, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        AdamW([param], fused=True).step()


def test_a_model_is_not_left_with_the_hooks_of_its_trainers():
    model = Toy()
    trainer = MixedPrecisionTrainer(model=model, precision="bf16")
    trainer.backward(loss_of(model))
    hooked = [param for param in model.parameters() if param._post_accumulate_grad_hooks]
    assert hooked == list(model.body.parameters())
    del trainer
    gc.collect()
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_the_optimizer_and_the_averages_are_one_call_without_a_copy():
    model = Picture()
    trainer = MixedPrecisionTrainer(model=model, precision="bf16")
    opt = AdamW(trainer.master_params, lr=0.1, fused=True)
    average = [master.detach().clone() for master in trainer.master_params]
    trainer.zero_grad()
    trainer.backward(picture_loss(model))
    opt.step()  # the first one makes the moments
    with th.profiler.profile() as profile:
        opt.step()
        update_ema(average, trainer.master_params, rate=0.9)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_fused_adamw_"] == calls["aten::_foreach_lerp_"] == 1
    assert not {"aten::clone", "aten::contiguous"} & set(calls)


def test_only_convolutions_change_their_precision():
    layers = nn.Sequential(
        nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.Linear(1, 1), nn.GroupNorm(1, 1)
    )
    layers.apply(fp16_util.convert_module_to_f16)
    assert [p.dtype for p in layers.parameters()] == [th.float16] * 6 + [th.float32] * 4
    layers.apply(fp16_util.convert_module_to_f32)
    assert {p.dtype for p in layers.parameters()} == {th.float32}


def test_flat_masters_hold_the_parameters_and_their_gradients():
    th.manual_seed(0)
    model = Toy()
    named = list(model.named_parameters())
    groups = fp16_util.get_param_groups_and_shapes(named)
    assert [[name for name, _ in group] for group, _ in groups] == [
        ["body.bias", "head.bias"],
        ["body.weight", "head.weight"],
    ]
    masters = fp16_util.make_master_params(groups)
    assert [tuple(m.shape) for m in masters] == [(6,), (1, 20)]
    model.head.weight.grad = th.arange(8.0).view(2, 4)
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert th.equal(masters[1].grad, th.cat([th.zeros(12), th.arange(8.0)])[None])
    assert th.equal(masters[0].grad, th.zeros(6))
    fp16_util.zero_master_grads(masters)
    assert masters[1].grad is None
    fp16_util.zero_grad(model.parameters())
    assert th.equal(model.head.weight.grad, th.zeros(2, 4))

    with th.no_grad():
        masters[1].mul_(2)
    expected = model.body.weight.detach() * 2
    state = fp16_util.master_params_to_state_dict(model, groups, masters, True)
    assert list(state) == [name for name, _ in named]
    assert th.equal(state["body.weight"], expected)
    again = fp16_util.state_dict_to_master_params(model, state, True)
    assert all(th.equal(a, b) for a, b in zip(again, masters, strict=True))
    fp16_util.master_params_to_model_params(groups, masters)
    assert th.equal(model.body.weight, expected)
    assert th.equal(model.body.weight, fp16_util.unflatten_master_params(groups[1][0], masters[1])[0])
    assert fp16_util.state_dict_to_master_params(model, state, False)[0] is state["body.weight"]


def flat_adam(steps: int) -> tuple[Toy, dict]:
    """The optimizer state of a run that trains the two flat masters."""
    th.manual_seed(1)
    model = Toy()
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    masters = fp16_util.make_master_params(groups)
    opt = th.optim.AdamW(masters, lr=0.1)
    for _ in range(steps):
        fp16_util.zero_grad(model.parameters())
        loss_of(model).backward()
        fp16_util.model_grads_to_master_grads(groups, masters)
        opt.step()
        fp16_util.master_params_to_model_params(groups, masters)
    return model, opt.state_dict()


def test_the_flat_optimizer_state_of_older_fp16_runs_is_that_of_each_parameter():
    model, flat = flat_adam(4)
    _, trainer, _ = make("fp32")
    opt = th.optim.AdamW(trainer.master_params, lr=0.1)
    train(trainer, opt, 4)
    expected = opt.state_dict()["state"]
    found = unflatten_optimizer_state(flat["state"], model)
    assert list(found) == [0, 1, 2, 3]
    th.testing.assert_close(found, expected)
    assert unflatten_optimizer_state(expected, model) == expected
    with pytest.raises(ValueError, match="is not that of this model"):
        unflatten_optimizer_state(flat["state"], nn.Linear(2, 3))


def test_overflow_is_whatever_is_not_finite():
    values = (1e30, float("inf"), -float("inf"), float("nan"))
    assert [fp16_util.check_overflow(value) for value in values] == [False, True, True, True]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_functions_of_the_layout_understand_the_trainers(precision):
    model, trainer, _ = make(precision)
    groups = trainer.param_groups_and_shapes
    th.testing.assert_close(fp16_util.make_master_params(groups), trainer.master_params, atol=0.01, rtol=0.01)
    with th.no_grad():
        for master in trainer.master_params:
            master.add_(1)
    fp16_util.master_params_to_model_params(groups, trainer.master_params)
    th.testing.assert_close(
        list(model.parameters()),
        [m.to(p.dtype) for p, m in zip(model.parameters(), trainer.master_params, strict=True)],
    )
    state = fp16_util.master_params_to_state_dict(model, groups, trainer.master_params, use_fp16=True)
    th.testing.assert_close(state, trainer.master_params_to_state_dict(trainer.master_params))
    assert make("fp32")[1].param_groups_and_shapes is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_and_norms_of_a_subclass_are_what_is_taken(precision):
    class Fork(MixedPrecisionTrainer):
        def _optimize_normal(self, opt):
            th.nn.utils.clip_grad_norm_(self.master_params, 1e-3)
            return super()._optimize_normal(opt)

        def _optimize_fp16(self, opt):
            th.nn.utils.clip_grad_norm_(self.master_params, 1e-3)
            return super()._optimize_fp16(opt)

        def _compute_norms(self, grad_scale=1.0):
            grad_norm, param_norm = super()._compute_norms(grad_scale)
            self.norms.append(float(grad_norm))
            return (float("inf") if self.stops else grad_norm), float(param_norm)

    th.manual_seed(1)
    trainer = Fork(model=Toy(), precision=precision, initial_lg_loss_scale=10.0)
    trainer.norms, trainer.stops = [], False
    opt = th.optim.SGD(trainer.master_params, lr=1.0)
    start = [master.detach().clone() for master in trainer.master_params]
    train(trainer, opt, 1)
    moved = th.cat([(a - b).flatten() for a, b in zip(start, trainer.master_params, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert trainer.norms == pytest.approx([1e-3], rel=1e-2)
    trainer.stops = True
    trainer.zero_grad()
    trainer.backward(loss_of(trainer.model))
    assert not trainer.optimize(opt)
    assert trainer.fault == "gradient"
    trainer.zero_grad()
    assert float(MixedPrecisionTrainer._compute_norms(trainer)[0]) == 0
