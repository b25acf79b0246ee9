"""The small pieces, against formulas written out here and against identities they must satisfy."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion import nn
from guided_diffusion.networks import ops


def test_silu_is_x_times_its_sigmoid() -> None:
    x = th.linspace(-20, 20, 101, dtype=th.float64)
    th.testing.assert_close(nn.SiLU()(x), x / (1 + th.exp(-x)))


def plain_group_norm(x: th.Tensor, eps: float = 1e-5) -> th.Tensor:
    groups = x.double().reshape(x.shape[0], 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)


@pytest.mark.parametrize("shape", [(3, 64), (3, 64, 7), (3, 64, 5, 4), (3, 64, 2, 3, 4)])
def test_normalization_makes_every_group_standard(shape: tuple[int, ...]) -> None:
    x = th.randn(shape, dtype=th.float64) * 3 + 5
    th.testing.assert_close(nn.normalization(64).double()(x), plain_group_norm(x))


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_group_norm_survives_half_precision_inputs_whose_squares_overflow(dtype: th.dtype) -> None:
    x = (th.randn(2, 32, 4000) * 300 + 1000).to(dtype)
    out = nn.normalization(32)(x)
    assert out.dtype == dtype
    want = plain_group_norm(x)
    assert (out.double() - want).abs().max() < 2 * th.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("channels", [0, 16, 48])
def test_normalization_names_illegal_channels(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"multiple of 32 .* got {channels}; change num_channels"):
        nn.normalization(channels)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_act_on_that_many_axes(dims: int) -> None:
    x = th.randn(2, 3, *[8] * dims)
    conv = nn.conv_nd(dims, 3, 5, 3, padding=1, stride=2)
    th.testing.assert_close(conv(x), getattr(F, f"conv{dims}d")(x, conv.weight, conv.bias, stride=2, padding=1))
    blocks = x.reshape(2, 3, *[4, 2] * dims).mean(tuple(range(3, 3 + 2 * dims, 2)))
    th.testing.assert_close(nn.avg_pool_nd(dims, kernel_size=2, stride=2)(x), blocks)


@pytest.mark.parametrize("make", [nn.conv_nd, nn.avg_pool_nd])
def test_layers_of_other_axes_are_refused(make: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="dims must be one of 1, 2, 3, the axes of space, got 4"):
        make(4, 3, 3, 1)


@pytest.mark.parametrize("inner", ["tokens", "channels"])
def test_convolutions_over_tokens_leave_channels_innermost(inner: str) -> None:
    layer = th.nn.Conv1d(6, 10, 1)
    x = th.randn(2, 6, 7) if inner == "tokens" else th.randn(2, 7, 6).transpose(1, 2)
    out = ops.over_tokens(layer, x)
    th.testing.assert_close(out, F.conv1d(x, layer.weight, layer.bias))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_ema_of_a_constant_approaches_it_geometrically(rate: float) -> None:
    starts = [th.randn(3, 2, dtype=th.float64), th.randn(4, dtype=th.float64)]
    goals = [th.nn.Parameter(th.randn_like(start)) for start in starts]
    averages = [start.clone() for start in starts]
    for _ in range(7):
        nn.update_ema(iter(averages), iter(goals), rate=rate)
    for average, start, goal in zip(averages, starts, goals, strict=True):
        th.testing.assert_close(average, goal + (start - goal) * rate**7)
        assert not average.requires_grad


def test_ema_keeps_its_own_precision() -> None:
    average, source = th.nn.Parameter(th.ones(5)), th.full((5,), 3.0, dtype=th.float16)
    nn.update_ema([average], [source], rate=0.75)
    th.testing.assert_close(average.detach(), th.full((5,), 1.5))


def test_ema_refuses_parameters_of_another_network() -> None:
    nn.update_ema([], [])
    with pytest.raises(ValueError, match="zip"):
        nn.update_ema([th.ones(2)], [th.ones(2), th.ones(2)])


def test_scaling_and_zeroing_modules_in_place() -> None:
    layer = th.nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert nn.scale_module(layer, -2.5) is layer
    th.testing.assert_close([layer.weight.detach(), layer.bias.detach()], [-2.5 * weight, -2.5 * bias])
    with th.no_grad():
        layer.weight[0] = math.nan
    assert nn.zero_module(layer) is layer
    assert not any(parameter.any() for parameter in layer.parameters())
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_mean_flat_keeps_the_batch() -> None:
    for shape in ((4,), (4, 3), (4, 3, 2, 5)):
        x = th.randn(shape, dtype=th.float64)
        np.testing.assert_allclose(nn.mean_flat(x), [row.mean() for row in x.numpy()])


def test_timestep_embedding_is_the_written_formula() -> None:
    for dim, period in ((8, 10000), (9, 10000), (6, 100)):
        got = nn.timestep_embedding(th.tensor([0, 0.5, 37]), dim, period)
        for row, t in zip(got, (0, 0.5, 37), strict=True):
            angles = [t / period ** (i / (dim // 2)) for i in range(dim // 2)]
            want = [*map(math.cos, angles), *map(math.sin, angles)] + [0] * (dim % 2)
            np.testing.assert_allclose(row, want, atol=1e-5)
    assert got.dtype == th.float32


def test_timestep_embeddings_compare_by_distance_alone() -> None:
    """cos a cos b + sin a sin b = cos(a - b): inner products depend on the difference of timesteps."""
    a, b, shift = th.tensor([3.0, 10, 40]), th.tensor([1.0, 30, 40]), 55
    near, far = ((nn.timestep_embedding(a + s, 64) * nn.timestep_embedding(b + s, 64)).sum(1) for s in (0, shift))
    th.testing.assert_close(near, far, atol=1e-4, rtol=0)
    th.testing.assert_close(near[2], th.tensor(32.0))


class Counted(th.nn.Module):
    """A layer with dropout that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = th.nn.Linear(4, 4), 0

    def forward(self, x: th.Tensor, scale: th.Tensor) -> th.Tensor:
        self.calls += 1
        return F.dropout(self.layer(x).tanh() * scale, 0.5)


def grads(module: Counted, x: th.Tensor, how: str) -> list[th.Tensor | None]:
    x, scale = x.clone().requires_grad_(), th.full((4,), 2.0, requires_grad=True)
    th.manual_seed(3)
    if how == "function":
        out = nn.CheckpointFunction.apply(module, 2, x, scale, *module.parameters())
    else:
        out = nn.checkpoint(module, (x, scale), module.parameters(), how == "flag")
    module.zero_grad()
    out.square().sum().backward()
    return [x.grad, scale.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["flag", "function"])
def test_checkpoint_recomputes_and_changes_no_gradient(how: str, frozen: bool) -> None:
    module, x = Counted().requires_grad_(not frozen), th.randn(5, 4)
    plain = grads(module, x, "no flag")
    assert module.calls == 1
    recomputed = grads(module, x, how)
    assert module.calls == 3
    for a, b in zip(plain, recomputed, strict=True):
        assert (a is None) == (b is None)
        assert a is None or th.equal(a, b)


def test_checkpoint_computes_once_where_nothing_is_kept_anyway() -> None:
    module = Counted()
    with th.no_grad():
        nn.checkpoint(module, (th.randn(5, 4), th.ones(4)), (), True)
    assert module.calls == 1


def windows_one_by_one(spatial: tuple[int, ...], window: tuple[int, ...]) -> np.ndarray:
    """The mask from a list of positions per query."""
    places = list(itertools.product(*map(range, spatial)))
    mask = np.zeros((len(places), len(places)), dtype=bool)
    for row, place in enumerate(places):
        axes = []
        for at, side, width in zip(place, spatial, window, strict=True):
            first = min(max(at - width // 2, 0), max(side - width, 0))
            axes.append(range(first, min(first + width, side)))
        for seen in itertools.product(*axes):
            mask[row, places.index(seen)] = True
    return mask


@pytest.mark.parametrize(
    ("spatial", "window"), [((9,), (4,)), ((5, 7), (3, 4)), ((4, 6), (4, 3)), ((3, 5), (8, 2)), ((2, 4, 5), (2, 3, 2))]
)
def test_neighborhood_mask_against_lists_of_positions(spatial: tuple[int, ...], window: tuple[int, ...]) -> None:
    mask = nn.make_neighborhood_mask(spatial, window)
    np.testing.assert_array_equal(mask.numpy(), windows_one_by_one(spatial, window))
    assert mask.diagonal().all()
    sizes = mask.sum(1)
    assert (sizes == math.prod(map(min, spatial, window))).all()


def test_neighborhood_mask_of_odd_windows_is_symmetric_under_reflection() -> None:
    mask = nn.make_neighborhood_mask((6, 9), (3, 5))
    assert th.equal(mask, mask.flip(0, 1))


def test_neighborhood_mask_hides_nothing_at_the_size_of_training() -> None:
    assert nn.make_neighborhood_mask((4, 6), (4, 6)).all()
