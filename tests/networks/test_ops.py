"""The bfloat16 ways of the CPU against the plain ones in float64."""

import copy

import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion.networks import ops
from guided_diffusion.networks.blocks import ResBlock
from guided_diffusion.nn import normalization
from guided_diffusion.unet import UNetModel


def distance(found, wanted):
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def plain(x, norm, film):
    h = norm(x)
    return F.silu(h if film is None else th.addcmul(film[1], h, film[0]))


def doubles(values):
    return [value.detach().double().requires_grad_() for value in values]


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("mean", [2, 30])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 64, 16, 16), th.channels_last),
        ((2, 32, 12, 20), th.channels_last),
        ((3, 64, 8, 8), th.contiguous_format),
        ((2, 32, 40), th.contiguous_format),
        ((2, 64, 2, 6, 6), th.channels_last_3d),
    ],
)
def test_the_gradients_of_norm_and_silu_are_those_of_the_plain_steps(shape, layout, mean, film):
    th.manual_seed(0)
    norm = normalization(shape[1])
    th.nn.init.normal_(norm.weight)
    th.nn.init.normal_(norm.bias)
    broad = (*shape[:2], *[1] * (len(shape) - 2))
    x, grad = ((th.randn(shape) + mean).bfloat16().contiguous(memory_format=layout) for mean in (mean, 0))
    given = [x.requires_grad_(), *[(th.randn(broad) + 1).bfloat16().requires_grad_() for _ in range(2 * film)]]
    out = ops.through([norm, th.nn.SiLU()], given[0], tuple(given[1:]) or None)
    exact, reference = copy.deepcopy(norm).double(), doubles(given)
    wanted = plain(reference[0], lambda h: F.group_norm(h, 32, exact.weight, exact.bias), reference[1:] or None)
    assert out.dtype == th.bfloat16
    assert out.stride() == x.stride()
    assert distance(out, wanted) < 5e-3
    found = th.autograd.grad(out, [*given, norm.weight, norm.bias], grad)
    wanted = th.autograd.grad(wanted, [*reference, exact.weight, exact.bias], grad.double())
    assert [distance(*pair) for pair in zip(found, wanted, strict=True)] == pytest.approx([0] * len(found), abs=8e-3)


@pytest.mark.parametrize("strides", [(1, 1, 256, 32), (1024, 1, 256, 32), (4096, 64, 8, 1)])
def test_any_strides_give_the_same(strides):
    th.manual_seed(0)
    norm, memory = normalization(32), th.randn(1 << 13).bfloat16()
    x = memory.as_strided((1, 32, 4, 8), strides).requires_grad_()
    out = ops.through([norm, th.nn.SiLU()], x)
    assert th.equal(out, plain(x.detach().contiguous(), norm, None))
    out.sum().backward()


def saved_bytes(run):
    seen = {}
    with th.autograd.graph.saved_tensors_hooks(
        lambda value: seen.update({value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}) or value,
        lambda value: value,
    ):
        kept = run()
    return sum(seen.values()), kept


def test_norm_and_silu_keep_only_what_they_were_given():
    norm, x = normalization(64), th.randn(4, 64, 32, 32).bfloat16().requires_grad_()
    own, _ = saved_bytes(lambda: ops.through([norm, th.nn.SiLU()], x))
    theirs, _ = saved_bytes(lambda: plain(x, norm, None))
    assert own < 1.02 * x.untyped_storage().nbytes() < theirs / 1.9


@pytest.mark.parametrize(("tokens", "width"), [(64, 64), (40, 32), (1200, 16)])
def test_the_gradients_of_attention_are_those_of_float64(tokens, width):
    th.manual_seed(0)
    qkv = 2 * th.randn(2, tokens, 3, 3, width)
    given = [part.detach().requires_grad_() for part in qkv.bfloat16().permute(2, 0, 3, 1, 4)]
    grad = th.randn(2, tokens, 3, width).bfloat16().transpose(1, 2)
    out, reference = ops.attention(*given), doubles(given)
    wanted = F.scaled_dot_product_attention(*reference)
    assert th.equal(out, F.scaled_dot_product_attention(*given))
    assert distance(out, wanted) < 4e-3
    found = th.autograd.grad(out, given, grad)
    for own, exact in zip(found, th.autograd.grad(wanted, reference, grad.double()), strict=True):
        assert distance(own, exact) < 8e-3


@pytest.mark.parametrize("shift", [True, False])
def test_a_residual_block_of_16_bits_has_the_gradients_of_float64(shift):
    th.manual_seed(0)
    block = ResBlock(32, 64, 0.0, out_channels=64, use_scale_shift_norm=shift)
    for weight in block.parameters():
        th.nn.init.normal_(weight, std=0.1)
    exact = copy.deepcopy(block).double()
    for module in block.modules():
        if isinstance(module, th.nn.Conv2d):
            module.to(th.bfloat16, memory_format=th.channels_last)
    x, emb = th.randn(2, 32, 8, 8), th.randn(2, 64)
    block(x.bfloat16(), emb).float().square().mean().backward()
    exact(x.double(), emb.double()).square().mean().backward()
    for own, wanted in zip(block.parameters(), exact.parameters(), strict=True):
        assert distance(own.grad, wanted.grad) < 0.03


def test_networks_of_16_bits_give_images_in_the_layout_of_those_they_were_given():
    network = UNetModel(8, 3, 128, 6, 1, (2,), channel_mult=(1, 2), num_head_channels=64)
    network.convert_to("bf16")
    assert network.input_blocks[0][0].weight.is_contiguous(memory_format=th.channels_last)
    out = network(th.randn(2, 3, 8, 8), th.tensor([1.0, 2.0]))
    assert out.is_contiguous()
    assert out.dtype == th.float32
    network.convert_to("fp32")
    assert network.input_blocks[0][0].weight.is_contiguous()
