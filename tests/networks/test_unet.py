"""The networks, against plain references, against themselves in another form, and against identities."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch as th
import torch.nn.functional as F
from few import few
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import nn, unet
from guided_diffusion.networks import backbone, blocks
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

Network = UNetModel | EncoderUNetModel
SMALL: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
}


def random_weights(module: th.nn.Module) -> Any:
    """Give every parameter, those that start at zero too, values that matter."""
    with th.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=max(0.1, parameter[0].numel() ** -0.5) if parameter.ndim > 1 else 0.3)
    return module.eval()


def small(kind: Callable[..., Any] = UNetModel, **options: Any) -> Any:
    return random_weights(kind(**{**SMALL, **options}))


def images(*sides: int, channels: int = 3) -> th.Tensor:
    return th.randn(2, channels, *(sides or (8, 8)))


T = th.tensor([3, 712])
Y = th.tensor([4, 0])


def gradients(model: th.nn.Module, *inputs: th.Tensor) -> list[th.Tensor | None]:
    """Of a fixed projection of the output: the first input's gradient, then the parameters'."""
    x = inputs[0].clone().requires_grad_()
    model.zero_grad()
    th.manual_seed(5)  # for dropout
    out = model(x, *inputs[1:])
    (out * th.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def joined(tensors: list[th.Tensor | None]) -> th.Tensor:
    return th.cat([tensor.flatten() for tensor in tensors if tensor is not None])


def attention_in_words(q: th.Tensor, k: th.Tensor, v: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """softmax(q k / sqrt(D)) v for [N, H, D, T]."""
    scores = th.einsum("nhdt,nhds->nhts", q, k) / q.shape[2] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -th.inf)
    return th.einsum("nhts,nhds->nhdt", scores.softmax(-1), v)


def new_order(q: th.Tensor, k: th.Tensor, v: th.Tensor) -> th.Tensor:
    return th.stack([q, k, v], dim=1).flatten(1, 3)


def legacy_order(q: th.Tensor, k: th.Tensor, v: th.Tensor) -> th.Tensor:
    return th.stack([q, k, v], dim=2).flatten(1, 3)


ORDERS = [(unet.QKVAttention, new_order), (unet.QKVAttentionLegacy, legacy_order)]


@pytest.mark.parametrize(("kind", "order"), ORDERS)
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_the_formula(kind: type[unet.QKVAttention], order: Callable[..., th.Tensor], heads: int) -> None:
    q, k, v = th.randn(3, 2, heads, 4, 6, dtype=th.float64)
    qkv = order(q, k, v)
    out = kind(heads)(qkv)
    th.testing.assert_close(out, attention_in_words(q, k, v).flatten(1, 2))
    innermost = qkv.transpose(1, 2).contiguous().transpose(1, 2)  # the same numbers with channels contiguous
    th.testing.assert_close(kind(heads)(innermost), out)


@pytest.mark.parametrize(("kind", "order"), ORDERS)
def test_windowed_attention_is_the_formula_with_a_mask(
    kind: type[unet.QKVAttention], order: Callable[..., th.Tensor]
) -> None:
    q, k, v = th.randn(3, 2, 2, 4, 24, dtype=th.float64)
    windowed = kind(2, (3, 2), use_neighborhood_attention=True)
    want = attention_in_words(q, k, v, nn.make_neighborhood_mask((6, 4), (3, 2)))
    th.testing.assert_close(windowed(order(q, k, v), (6, 4)), want.flatten(1, 2))
    th.testing.assert_close(
        windowed(order(q, k, v)[..., :6], (3, 2)), attention_in_words(*th.stack([q, k, v])[..., :6]).flatten(1, 2)
    )


def test_attention_to_a_window_does_not_see_beyond_it() -> None:
    windowed = unet.QKVAttention(1, (4,), use_neighborhood_attention=True)
    qkv = th.randn(1, 6, 12)
    changed = qkv.clone()
    changed[:, 2:, 8:] += 1  # keys and values; position 5 sees 3 .. 6
    th.testing.assert_close(windowed(qkv, (12,))[..., :7], windowed(changed, (12,))[..., :7])
    assert (windowed(qkv, (12,)) != windowed(changed, (12,)))[..., 9:].any()


def test_legacy_weights_become_new_ones_by_a_permutation_of_output_channels() -> None:
    heads, width = 4, 64
    old = random_weights(unet.AttentionBlock(width, heads))
    new = unet.AttentionBlock(width, heads, use_new_attention_order=True).eval()
    state = old.state_dict()
    for name in ("qkv.weight", "qkv.bias"):
        by_head = state[name].unflatten(0, (heads, 3, width // heads))
        state[name] = by_head.transpose(0, 1).flatten(0, 2)
    new.load_state_dict(state)
    x = th.randn(2, width, 3, 5)
    th.testing.assert_close(new(x), old(x))


def test_attention_does_not_care_for_the_order_of_positions() -> None:
    block, x, order = random_weights(unet.AttentionBlock(32, 2)), th.randn(2, 32, 9), th.randperm(9)
    th.testing.assert_close(block(x[..., order]), block(x)[..., order])


def test_attention_pooling_is_the_formula_for_the_mean_token() -> None:
    pool = random_weights(unet.AttentionPool2d((3, 2), 8, 4, output_dim=5)).double()
    x = th.randn(2, 8, 3, 2, dtype=th.float64)
    tokens = th.cat([x.mean((2, 3))[..., None], x.flatten(2)], dim=2) + pool.positional_embedding
    qkv = F.conv1d(tokens, pool.qkv_proj.weight, pool.qkv_proj.bias).unflatten(1, (3, 2, 4))
    attended = attention_in_words(*qkv.unbind(1)).flatten(1, 2)
    th.testing.assert_close(pool(x), F.conv1d(attended, pool.c_proj.weight, pool.c_proj.bias)[..., 0])


def test_flops_are_those_of_the_two_products() -> None:
    attention, qkv = unet.QKVAttention(2), th.randn(3, 24, 10)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:  # it knows no fused kernel of CPUs
        out = attention(qkv)
    for output in (out, (out,), (out.unflatten(2, (2, 5)),)):
        attention.total_ops = th.zeros(1, dtype=th.float64)
        unet.QKVAttention.count_flops(attention, (qkv,), output)
        assert 2 * attention.total_ops.item() == counted.get_total_flops()  # a multiplication and an addition each


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_averaging_undoes_repetition_along_the_resampled_axes(dims: int) -> None:
    x = th.randn(2, 3, *(4, 6, 5)[:dims])
    larger = unet.Upsample(3, False, dims)(x)
    factors = [1, 2, 2] if dims == 3 else [2] * dims
    assert list(larger.shape[2:]) == [side * factor for side, factor in zip(x.shape[2:], factors, strict=True)]
    assert th.equal(larger[..., ::2], x if dims == 1 else x.repeat_interleave(2, -2))
    th.testing.assert_close(unet.Downsample(3, False, dims)(larger), x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_learned_resampling_is_resampling_and_a_convolution(dims: int) -> None:
    x = th.randn(2, 3, *[6] * dims)
    up, down = unet.Upsample(3, True, dims, out_channels=4), unet.Downsample(3, True, dims, out_channels=4)
    th.testing.assert_close(up(x), up.conv(unet.Upsample(3, False, dims)(x)))
    inner = (..., *[slice(None, None, 2)] * min(dims, 2))
    full = getattr(F, f"conv{dims}d")(x, down.op.weight, down.op.bias, padding=1)
    th.testing.assert_close(down(x), full[inner])


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize(("up", "down"), [(False, False), (True, False), (False, True)])
def test_residual_block_is_its_equation(film: bool, up: bool, down: bool) -> None:
    block = random_weights(
        unet.ResBlock(32, 16, 0.0, out_channels=64, use_scale_shift_norm=film, up=up, down=down, use_conv=up)
    )
    x, emb = images(4, 6, channels=32), th.randn(2, 16)
    resample = unet.Upsample(32, False) if up else unet.Downsample(32, False) if down else th.nn.Identity()
    h = block.in_layers[2](resample(F.silu(block.in_layers[0](x))))
    film_or_shift = block.emb_layers[1](F.silu(emb))[:, :, None, None]
    if film:
        h = block.out_layers[0](h) * (1 + film_or_shift[:, :64]) + film_or_shift[:, 64:]
    else:
        h = block.out_layers[0](h + film_or_shift)
    th.testing.assert_close(block(x, emb), block.skip_connection(resample(x)) + block.out_layers[3](F.silu(h)))
    assert block.skip_connection.kernel_size == ((3, 3) if up else (1, 1))


def test_new_blocks_are_the_identity_and_new_networks_predict_zero() -> None:
    x = images(8, 8, channels=32)
    assert th.equal(unet.ResBlock(32, 16, 0.0)(x, th.randn(2, 16)), x)
    assert th.equal(unet.AttentionBlock(32, 2)(x), x)
    assert not UNetModel(**SMALL)(images(), T).any()
    assert not EncoderUNetModel(**SMALL, pool="adaptive")(images(), T).any()


def test_dropout_silences_the_second_convolution_of_training_blocks() -> None:
    block, x, emb = random_weights(unet.ResBlock(32, 16, 0.5)), images(8, 8, channels=32), th.randn(2, 16)
    seen: list[th.Tensor] = []
    block.out_layers[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block.train()(x, emb)
    block.eval()(x, emb)
    dropped = seen[0] == 0
    assert 0.45 < dropped.float().mean() < 0.55
    th.testing.assert_close(seen[0], 2 * seen[1] * ~dropped)


class ForeignBlock(unet.TimestepBlock):
    """A block of somebody who knows no context."""

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:  # type: ignore[override]
        return x * emb


class Listener(unet.TimestepBlock):
    def forward(self, x: th.Tensor, emb: th.Tensor, context: th.Tensor | None = None) -> th.Tensor:
        return x if context is None else x + context


def test_sequences_hand_on_embedding_and_context_to_those_who_take_them() -> None:
    x, emb, context = th.randn(3, 2, 32, 4)
    plain = unet.TimestepEmbedSequential(ForeignBlock(), th.nn.SiLU())
    th.testing.assert_close(plain(x, emb), F.silu(x * emb))
    listening = unet.TimestepEmbedSequential(Listener(), unet.AttentionBlock(32), th.nn.SiLU())
    assert th.equal(listening(x, emb), F.silu(x))
    assert th.equal(listening(x, emb, context), F.silu(x + context))


# Groups of one channel would hide every shift before a normalization, the timestep's included: hence 64 channels.
FORMS: dict[str, tuple[Callable[..., Any], dict[str, Any], Sequence[int]]] = {
    "1d": (UNetModel, {"dims": 1}, (16,)),
    "2d": (UNetModel, {"num_classes": 5, "use_scale_shift_norm": True}, (8, 4)),
    "2d, no class": (UNetModel, {"num_classes": 4, "null_class": True}, (8, 8)),  # Y has a 4, which is "no class"
    "3d": (UNetModel, {"dims": 3, "resblock_updown": True}, (3, 4, 8)),
    "fractional": (UNetModel, {"channel_mult": (0.5, 1.5), "conv_resample": False, "model_channels": 128}, (4, 8)),
    "adaptive 1d": (EncoderUNetModel, {"dims": 1, "pool": "adaptive"}, (12,)),
    "adaptive 2d": (EncoderUNetModel, {"pool": "adaptive", "resblock_updown": True}, (4, 6)),
    "adaptive 3d": (EncoderUNetModel, {"dims": 3, "pool": "adaptive"}, (3, 4, 4)),
    "attention 1d": (EncoderUNetModel, {"dims": 1, "pool": "attention", "num_head_channels": 16}, (8,)),
    "attention 2d": (
        EncoderUNetModel,
        {"image_size": (4, 10), "pool": "attention", "num_head_channels": 32, "use_new_attention_order": True},
        (4, 10),
    ),
    "attention 3d": (
        EncoderUNetModel,
        {"image_size": (3, 4, 6), "dims": 3, "pool": "attention", "num_head_channels": 64},
        (3, 4, 6),
    ),
    "spatial 1d": (EncoderUNetModel, {"dims": 1, "pool": "spatial"}, (6,)),
    "spatial 3d": (EncoderUNetModel, {"dims": 3, "pool": "spatial_v2"}, (2, 4, 4)),
}


def inputs_of(model: Network, sides: Sequence[int]) -> tuple[th.Tensor, ...]:
    return (images(*sides), T) if model.num_classes is None else (images(*sides), T, Y)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_learns_in_every_form(form: str) -> None:
    kind, options, sides = FORMS[form]
    model = small(kind, **{"model_channels": 64, **options})
    found = gradients(model, *inputs_of(model, sides))
    names = ["x", *(name for name, _ in model.named_parameters())]
    rounding = 1e-6 * joined(found).norm()
    assert [name for name, grad in zip(names, found, strict=True) if grad is None or not grad.norm() > rounding] == []


@pytest.mark.parametrize("form", FORMS)
def test_images_of_a_batch_do_not_mix(form: str) -> None:
    kind, options, sides = FORMS[form]
    model = small(kind, **options)
    inputs = inputs_of(model, sides)
    alone = th.cat([model(*(value[i : i + 1] for value in inputs)) for i in range(2)])
    th.testing.assert_close(model(*inputs), alone, atol=1e-5, rtol=1e-4)


def test_fractional_multipliers_round_down() -> None:
    model = small(model_channels=192, channel_mult=(0.67, 1.5), attention_resolutions=())
    assert [block[0].weight.shape[0] for block in model.input_blocks[:1]] == [128]
    assert model.middle_block[0].in_layers[0].num_channels == 288


def test_decoder_has_its_own_number_of_heads_unless_their_size_is_given() -> None:
    def heads(blocks: th.nn.Module) -> set[int]:
        return {module.num_heads for module in blocks.modules() if isinstance(module, unet.AttentionBlock)}

    for options, encoder, decoder in (
        ({}, 2, 2),
        ({"num_heads_upsample": 8}, 2, 8),
        ({"num_heads_upsample": 8, "num_head_channels": 16}, 4, 4),
    ):
        model = UNetModel(**{**SMALL, **options})
        assert heads(model.input_blocks) == heads(model.middle_block) == {encoder}
        assert heads(model.output_blocks) == {decoder}


@pytest.mark.parametrize(("kind", "more"), [(UNetModel, {}), (SuperResModel, {"low_res": th.ones(1, 3, 4, 4)})])
def test_null_class_is_one_more_class_by_another_name(kind: Callable[..., Any], more: dict[str, th.Tensor]) -> None:
    plain, null = small(kind, num_classes=6), small(kind, num_classes=5, null_class=True)
    assert [*null.state_dict()] == [*plain.state_dict()]
    null.load_state_dict(plain.state_dict())
    assert (null.num_classes, null.null_label) == (5, 5)
    assert (plain.num_classes, plain.null_label) == (6, None)
    x, t, y = images()[:1].expand(6, -1, -1, -1), T[:1].expand(6), th.arange(6)
    more = {name: value.expand(6, -1, -1, -1) for name, value in more.items()}
    out = null(x, t, y=y, **more)
    assert th.equal(out, plain(x, t, y=y, **more))
    assert (out[:5] - out[5]).flatten(1).norm(dim=1).min() > 1e-2


def test_networks_without_a_null_class_draw_their_weights_as_ever() -> None:
    th.manual_seed(3)
    state = UNetModel(**SMALL, num_classes=5).state_dict()
    th.manual_seed(3)
    layers = th.nn.Linear(32, 128), th.nn.Linear(128, 128), th.nn.Embedding(5, 128), th.nn.Conv2d(3, 32, 3)
    for name, layer in zip(("time_embed.0", "time_embed.2", "label_emb", "input_blocks.0.0"), layers, strict=True):
        assert th.equal(state[f"{name}.weight"], layer.weight)
    assert EncoderUNetModel(**SMALL).null_label is None


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_upsampler_is_a_network_that_sees_both_images(dims: int) -> None:
    model = small(SuperResModel, dims=dims, num_classes=5)
    assert model.in_channels == 6
    plain = small(dims=dims, num_classes=5, in_channels=6)
    plain.load_state_dict(model.state_dict())
    x, low = images(*[8] * dims), images(*[8] * dims)
    th.testing.assert_close(model(x, T, low_res=low, y=Y), plain(th.cat([x, low], 1), T, Y))
    level = th.full_like(low, 0.3)
    th.testing.assert_close(model(x, T, level[..., ::2], y=Y), model(x, T, level, y=Y))


def test_enlarging_interpolates_linearly() -> None:
    model, seen = small(SuperResModel), []
    model.input_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ramp = th.arange(4.0).expand(2, 3, 4, 4)
    model(images(), T, ramp)
    want = th.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])  # centres of pixels, edges repeated
    th.testing.assert_close(seen[0][:, 3:], want.expand(2, 3, 8, 8))


@pytest.mark.parametrize("pool", ["spatial", "spatial_v2"])
def test_spatial_heads_read_the_means_of_all_feature_maps(pool: str) -> None:
    model, means = small(EncoderUNetModel, pool=pool), []
    for block in [*model.input_blocks, model.middle_block]:
        block.register_forward_hook(lambda _, __, h: means.append(h.mean((2, 3))))
    out = model(images(6, 4), T)
    hidden = model.out[0](th.cat(means, 1))
    hidden = (
        hidden.relu() if pool == "spatial" else F.silu(F.group_norm(hidden, 32, model.out[1].weight, model.out[1].bias))
    )
    th.testing.assert_close(out, model.out[-1](hidden), atol=1e-4, rtol=1e-4)


def test_adaptive_head_averages_before_it_maps() -> None:
    model, last = small(EncoderUNetModel, pool="adaptive"), []
    model.middle_block.register_forward_hook(lambda _, __, h: last.append(h))
    out = model(images(6, 4), T)
    pooled = F.silu(model.out[0](last[0])).mean((2, 3))
    th.testing.assert_close(out, pooled @ model.out[3].weight[:, :, 0, 0].T + model.out[3].bias)


@pytest.mark.parametrize("options", [{}, {"conv_resample": False}, {"resblock_updown": True}])
def test_attention_pooling_knows_the_feature_map_of_odd_images(options: dict[str, Any]) -> None:
    model = small(
        EncoderUNetModel, image_size=(18, 7), channel_mult=(1, 1, 1), pool="attention", num_head_channels=32, **options
    )
    assert model(images(18, 7), T).isfinite().all()


def test_windowed_network_is_the_plain_one_at_the_size_of_training_only() -> None:
    plain, windowed = small(), small(use_neighborhood_attention=True)
    windowed.load_state_dict(plain.state_dict())
    for sides in ((8, 8), (4, 6)):
        x = images(*sides)
        assert th.equal(windowed(x, T), plain(x, T))
    x = images(8, 12)
    assert (windowed(x, T) - plain(x, T)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [UNetModel, EncoderUNetModel])
def test_groups_of_normalization_change_what_is_computed_and_no_weight(kind: Callable[..., Any]) -> None:
    """With a group for each channel nothing is left of what is added to one; with fewer groups something is."""
    usual, wider = (small(kind, model_channels=32, channel_mult=(1, 1), **more) for more in ({}, {"norm_groups": 8}))
    wider.load_state_dict(usual.state_dict())
    norms = [layer for layer in wider.modules() if isinstance(layer, th.nn.GroupNorm)]
    assert {layer.num_groups for layer in norms} == {8}
    x = images(8, 8)
    assert not th.allclose(wider(x, T), usual(x, T))
    shift = th.zeros(1, 32, 1, 1).index_fill(1, th.tensor(3), 5.0)
    block = [layer for layer in (usual, wider) for layer in [layer.input_blocks[1][0].in_layers[0]]]
    h = th.randn(1, 32, 4, 4)
    for layer, hidden in zip(block, (True, False), strict=True):
        assert th.allclose(layer(h + shift), layer(h), atol=1e-4) == hidden
    norms = [layer for layer in small(kind, norm_groups=4, model_channels=20).modules() if hasattr(layer, "num_groups")]
    assert {layer.num_groups for layer in norms} == {4}
    with pytest.raises(UserError, match=r"multiple of 32 .* got 40; change num_channels .* or take norm_groups 8"):
        small(kind, model_channels=40)


def test_a_normalization_of_ones_own_keeps_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old repositories put another one in the place of ours, to have widths that are no multiple of 32."""
    for module in (backbone, blocks):
        monkeypatch.setattr(module, "normalization", lambda channels: th.nn.GroupNorm(4, channels))
    norms = [layer for layer in small(model_channels=20).modules() if isinstance(layer, th.nn.GroupNorm)]
    assert {layer.num_groups for layer in norms} == {4}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [UNetModel, EncoderUNetModel])
def test_checkpointing_changes_no_gradient(kind: Callable[..., Any], frozen: bool) -> None:
    plain = small(kind, dropout=0.3).train().requires_grad_(not frozen)
    saving = small(kind, dropout=0.3, use_checkpoint=True).train().requires_grad_(not frozen)
    saving.load_state_dict(plain.state_dict())
    x = images()
    for a, b in zip(gradients(plain, x, T), gradients(saving, x, T), strict=True):
        assert a is b is None or th.equal(a, b)


def test_gradients_reach_the_image_through_a_frozen_network() -> None:
    model, x = small(), images()
    free = gradients(model, x, T)[0]
    frozen = gradients(model.requires_grad_(False), x, T)
    th.testing.assert_close(frozen[0], free)
    assert all(grad is None for grad in frozen[1:])


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_autocast_stays_near_float32(use_checkpoint: bool) -> None:
    model, x = small(use_checkpoint=use_checkpoint), images()
    want, want_grads = model(x, T), joined(gradients(model, x, T))
    with th.autocast("cpu", th.bfloat16):
        out = model(x, T)
        found = gradients(model, x, T)
    assert out.dtype == th.bfloat16
    assert {grad.dtype for grad in found if grad is not None} == {th.float32}
    assert (out - want).norm() < 0.03 * want.norm()
    assert (joined(found) - want_grads).norm() < 0.05 * want_grads.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", [UNetModel, EncoderUNetModel])
def test_conversion_casts_the_convolutions_of_the_blocks_and_back(kind: Callable[..., Any], precision: str) -> None:
    model, x, dtype = small(kind), images(), {"bf16": th.bfloat16, "fp16": th.float16}[precision]
    before, want = {name: value.clone() for name, value in model.state_dict().items()}, model(x, T)
    model.convert_to(precision)
    assert model.dtype == dtype
    out = model(x, T)
    assert out.dtype == th.float32
    assert (out - want).norm() < 0.03 * want.norm()
    half = {name for name, value in model.state_dict().items() if value.dtype == dtype}
    convolutions = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, th.nn.Conv1d | th.nn.Conv2d) and not name.startswith("out.")
        for part in ("weight", "bias")
    }
    assert half == convolutions
    model.convert_to("fp32")
    assert model.dtype == th.float32
    for name, value in model.state_dict().items():
        assert th.equal(value, before[name].to(dtype).float() if name in half else before[name])


@pytest.mark.parametrize(("device", "innermost"), [(None, False), ("cpu", False), ("cuda", True)])
def test_a_network_without_values_is_laid_out_for_the_device_it_will_be_on(device: str | None, innermost: bool) -> None:
    with th.device("meta"):
        model = small()
    model.convert_to("bf16", th.device(device) if device else None)
    assert model.middle_block[0].out_layers[3].weight.is_contiguous(memory_format=th.channels_last) == innermost


def test_the_originals_conversions_and_their_flag() -> None:
    model = small(use_fp16=True)
    assert model.dtype == th.float32, "weights must load, and masters be copied, in float32"
    model.convert_to_fp16()
    assert model.dtype == th.float16
    model.convert_to_fp32()
    assert model.dtype == th.float32


def test_float64_agrees_with_float32() -> None:
    model, x = small(num_classes=5), images()
    want = model(x, T, Y)
    out = model.double()(x.double(), T, Y)
    assert out.dtype == th.float64
    th.testing.assert_close(out.float(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"resblock_updown": True, "use_scale_shift_norm": True}])
def test_channels_last_is_kept_from_end_to_end(options: dict[str, Any]) -> None:
    model, x = small(**options), images(8, 12)
    want, strays = model(x, T), []

    def look(module: th.nn.Module, _: object, out: th.Tensor) -> None:
        if out.ndim == 4 and not out.is_contiguous(memory_format=th.channels_last):
            strays.append(module)

    for module in model.to(memory_format=th.channels_last).modules():
        module.register_forward_hook(look)
    out = model(x.to(memory_format=th.channels_last), T)
    assert strays == []
    th.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


LAYERS = (th.nn.Conv1d, th.nn.Conv2d, th.nn.Conv3d, th.nn.Linear, th.nn.Embedding)
LISTENED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (UNetModel, {"num_classes": 5}),
    "film": (UNetModel, {"use_scale_shift_norm": True, "resblock_updown": True, "use_new_attention_order": True}),
    "attention": (EncoderUNetModel, {"pool": "attention", "num_head_channels": 32, "resblock_updown": True}),
    "spatial": (EncoderUNetModel, {"pool": "spatial_v2", "use_scale_shift_norm": True}),
}


def called(model: Network) -> list[str]:
    """The modules that the originals call in a forward pass."""
    silent = set()
    for name, block in model.named_modules():
        if isinstance(block, th.nn.ModuleList):
            silent.add(name)
        if isinstance(block, unet.ResBlock):
            silent |= {f"{name}.in_layers"} if block.updown else {f"{name}.h_upd"}
            silent |= {f"{name}.out_layers"} if block.use_scale_shift_norm else set()
    return sorted(name for name, _ in model.named_modules() if name not in silent)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", LISTENED)
def test_hooks_hear_what_they_hear_in_the_originals(form: str, precision: str) -> None:
    kind, options = LISTENED[form]
    model, heard, shapes = small(kind, **options), [], {}
    model.convert_to(precision)
    inputs = inputs_of(model, (8, 8))
    plain = model(*inputs)
    for name, module in model.named_modules():

        def look(module: th.nn.Module, given: Any, output: th.Tensor, name: str = name) -> None:
            heard.append(name)
            shapes[name.split(".")[-1]] = output.ndim

        module.register_forward_hook(look)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if precision == "fp32" else {"atol": 0.1, "rtol": 0.1}
    th.testing.assert_close(model(*inputs), plain, **tolerance)
    assert sorted(heard) == called(model)
    assert shapes["norm"] == shapes["qkv"] == shapes["attention"] == shapes["proj_out"] == 3


def test_hooks_of_all_modules_are_heard_too() -> None:
    model, heard = small(), list[th.nn.Module]()
    handle = th.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    try:
        model(images(), T)
    finally:
        handle.remove()
    assert len(heard) == len(called(model))


def modules_of(model: Network, *kinds: type[th.nn.Module]) -> list[th.nn.Module]:
    return [module for module in model.modules() if type(module) in kinds]


@pytest.mark.parametrize("on", ["class", "instance", "subclass"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (nn.GroupNorm32, "forward"),
        (th.nn.Conv1d, "forward"),
        (th.nn.SiLU, "forward"),
        (unet.QKVAttention, "forward"),
        (unet.QKVAttentionLegacy, "forward"),
        (unet.AttentionBlock, "_forward"),
        (unet.ResBlock, "_forward"),
        (unet.TimestepEmbedSequential, "forward"),
    ],
)
def test_replaced_methods_of_layers_are_what_is_called(
    kind: type[th.nn.Module], method: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = kind is unet.QKVAttention
    model = small(use_new_attention_order=new, channel_mult=(1,), attention_resolutions=(1,))
    model.convert_to("bf16")
    old, given = getattr(kind, method), list[int]()

    def replaced(self: Any, *tensors: th.Tensor) -> th.Tensor:
        given.append(len(tensors))
        assert kind not in (unet.QKVAttention, unet.QKVAttentionLegacy) or tensors[0].is_contiguous()
        out: th.Tensor = old(self, *tensors)
        return out

    found = modules_of(model, kind)
    if on == "class":
        monkeypatch.setattr(kind, method, replaced)
    for module in found:
        if on == "instance":
            setattr(module, method, replaced.__get__(module))
        elif on == "subclass":
            module.__class__ = type(kind.__name__, (kind,), {method: replaced})
    model(images(2, 2), T)
    assert given == [2 if kind in (unet.ResBlock, unet.TimestepEmbedSequential) else 1] * len(found) != []


def test_names_replaced_in_the_module_are_what_its_networks_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(th.nn.Module):
        def __init__(self, n_heads: int, *_: Any) -> None:
            super().__init__()

        def forward(self, qkv: th.Tensor) -> th.Tensor:
            return qkv.view(len(qkv), 3, -1, qkv.shape[-1])[:, 2]

    flags = list[bool]()

    def checkpoint(func: Any, inputs: Any, params: Any, flag: bool) -> Any:
        flags.append(flag and len(list(params)) > 0)
        return func(*inputs)

    plain = small()
    monkeypatch.setattr(unet, "QKVAttentionLegacy", Mine)
    monkeypatch.setattr(unet, "checkpoint", checkpoint)
    monkeypatch.setattr(unet, "timestep_embedding", lambda t, size: th.zeros(len(t), size))
    model = small(use_checkpoint=True)
    model.load_state_dict(plain.state_dict())
    assert th.equal(model(images() * 0, T), model(images() * 0, T + 1))
    assert len(modules_of(model, Mine)) == len(modules_of(plain, unet.AttentionBlock))
    assert flags == [True] * 2 * len(modules_of(plain, unet.AttentionBlock, unet.ResBlock))


@pytest.mark.parametrize("form", LISTENED)
def test_layers_are_of_torchs_own_classes_and_operations_are_counted_by_class(form: str) -> None:
    """As counters do (thop): a hook for each module whose class, and no base of it, they know."""
    kind, options = LISTENED[form]
    model, counted = small(kind, **options), list[float]()
    owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
    assert {type(module) for module in owners} <= {*LAYERS, nn.GroupNorm32, unet.AttentionPool2d}
    inputs = inputs_of(model, (8, 8))
    for module in modules_of(model, *LAYERS[:4]):
        module.register_forward_hook(lambda m, _, y: counted.append(y.numel() * m.weight[0].numel()))
    attentions = modules_of(model, unet.QKVAttention, unet.QKVAttentionLegacy)
    for module in attentions:
        module.total_ops = th.zeros(1, dtype=th.float64)
        module.register_forward_hook(unet.count_flops_attn)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as wanted:
        model(*inputs)
    assert 2 * (sum(counted) + sum(m.total_ops.item() for m in attentions)) == wanted.get_total_flops()


def test_blocks_and_networks_have_the_originals_attributes() -> None:
    block = unet.ResBlock(32, 16, 0.25, use_conv=True, use_checkpoint=True, up=True)
    names = "channels emb_channels dropout out_channels use_conv use_checkpoint use_scale_shift_norm updown"
    assert [getattr(block, name) for name in names.split()] == [32, 16, 0.25, 32, True, True, False, True]
    assert [type(part) for part in (block.h_upd, block.x_upd, block.skip_connection)] == [
        *[unet.Upsample] * 2,
        th.nn.Identity,
    ]
    names = "channels out_channels use_conv dims"
    for resampler in (unet.Upsample(32, True, 1, 64), unet.Downsample(32, True, 1, 64)):
        assert [getattr(resampler, name) for name in names.split()] == [32, 64, True, 1]
    attention = unet.AttentionBlock(32, num_head_channels=8)
    assert (attention.channels, attention.num_heads, attention.attention.n_heads) == (32, 4, 4)
    assert unet.AttentionPool2d(4, 32, 8).num_heads == 4

    for kind in (UNetModel, EncoderUNetModel):
        model = kind(**SMALL)
        names = "in_channels model_channels out_channels num_res_blocks attention_resolutions channel_mult num_heads"
        assert {name: getattr(model, name) for name in names.split()}.items() <= SMALL.items()
        rest = [model.dropout, model.conv_resample, model.use_checkpoint, model.num_head_channels]
        assert [*rest, model.num_heads_upsample] == [0, True, False, -1, 2]
        parts = [*model.input_blocks, model.middle_block, *getattr(model, "output_blocks", ())]
        for part in parts:
            part.register_forward_hook(lambda module, _, output: setattr(module, "width", output.shape[1]))
        model(images(), T)
        assert model._feature_size == sum(part.width for part in parts)


def test_the_dtype_of_a_network_can_be_assigned() -> None:
    model = small()
    model.dtype = th.float64
    with pytest.raises(RuntimeError):
        model(images(), T)
    assert model.double()(images().double(), T).dtype == th.float64
    model.convert_to("bf16")
    assert model.dtype == th.bfloat16


def test_a_replica_of_data_parallel_computes_in_the_dtype_of_its_weights() -> None:
    model = small().bfloat16()
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():  # as torch.nn.parallel.replicate, which needs GPUs
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        replica._former_parameters = dict(module._parameters)
        for name, value in module._parameters.items():
            setattr(replica, name, None if value is None else value.detach())
    assert list(replicas[model].parameters()) == []
    assert th.equal(replicas[model](images().bfloat16() * 0, T), model(images().bfloat16() * 0, T))


class Fork(UNetModel):
    """Written as the originals' forward pass is."""

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        emb = self.time_embed(unet.timestep_embedding(timesteps, self.model_channels))
        h, skips = x.type(self.dtype), list[th.Tensor]()
        for module in self.input_blocks:
            skips.append(h := module(h, emb))
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(th.cat([h, skips.pop()], dim=1), emb)
        out: th.Tensor = self.out(h.type(x.dtype))
        return out


def test_an_upsampler_goes_through_the_forward_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = small(SuperResModel), list[th.Size]()
    forward = UNetModel.forward
    monkeypatch.setattr(
        UNetModel, "forward", lambda self, x, t, y=None: given.append(x.shape) or forward(self, x, t, y)
    )
    model(images(), T, low_res=images(4, 4))
    assert given == [(2, 6, 8, 8)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_subclass_with_its_own_forward_computes_the_same(precision: str) -> None:
    ours, fork, x = small(), small(Fork), images()
    fork.load_state_dict(ours.state_dict())
    for model in (ours, fork):
        model.convert_to(precision)
    assert th.equal(fork(x, T), ours(x, T))


TORCHS_OWN = pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
DERIVED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "film": (UNetModel, {"use_scale_shift_norm": True, "resblock_updown": True}),
    "checkpoint": (UNetModel, {"use_checkpoint": True}),
    "attention": (EncoderUNetModel, {"pool": "attention", "num_head_channels": 32}),
}


def derived(form: str, precision: str) -> tuple[Any, dict[str, float]]:
    """A network, and how near two of its derivatives must be."""
    kind, options = DERIVED[form]
    model = small(kind, **{**options, "num_heads": 1})
    model.convert_to(precision)
    return model, {"rtol": 2e-4 if precision == "fp32" else 0.1, "atol": 0.0}


@TORCHS_OWN
@pytest.mark.parametrize(
    ("form", "precision"), few([("film", "bf16"), ("checkpoint", "fp32"), ("attention", "bf16")], ["attention"])
)
def test_derivatives_along_a_direction_and_of_gradients(form: str, precision: str) -> None:
    model, near = derived(form, precision)

    def number(x: th.Tensor) -> th.Tensor:
        return model(x, T).square().sum()

    x = images().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = th.autograd.grad(number(x), x, create_graph=True)
        along = gradient.detach()
        (twice,) = th.autograd.grad(gradient, x, along)
    x = x.detach()
    th.testing.assert_close(th.func.jvp(number, (x,), (along,))[1].detach(), along.square().sum(), **near)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(number(forward_ad.make_dual(x, along))).tangent
        th.testing.assert_close(tangent.detach(), along.square().sum(), **near)
    forward_over_reverse = th.func.jvp(th.func.grad(number), (x,), (along,))[1].detach()
    assert (forward_over_reverse - twice).norm() < near["rtol"] * twice.norm()


@TORCHS_OWN
@pytest.mark.parametrize(("form", "precision"), [("film", "bf16"), ("checkpoint", "fp32"), ("attention", "bf16")])
def test_gradients_of_each_image_alone(form: str, precision: str) -> None:
    model, near = derived(form, precision)
    weights, x = dict(model.named_parameters()), images()

    def number(weights: dict[str, th.Tensor], image: th.Tensor, t: th.Tensor) -> th.Tensor:
        return th.func.functional_call(model, weights, (image[None], t[None])).square().sum()

    found = th.func.vmap(th.func.grad(number), in_dims=(None, 0, 0))(weights, x, T)
    for index in range(2):
        alone = th.autograd.grad(model(x[index, None], T[index, None]).square().sum(), list(weights.values()))
        together = joined([found[name][index] for name in weights])
        assert (together - joined(list(alone))).norm() < near["rtol"] * joined(list(alone)).norm()


@pytest.mark.parametrize("form", DERIVED)
def test_copies_and_files_of_a_network_are_the_network(form: str) -> None:
    model, x = derived(form, "bf16")[0], images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert th.equal(other(x, T), model(x, T))


WHOLE_GRAPHS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "windows, classes": (
        UNetModel,
        {"image_size": 4, "num_classes": 5, "use_neighborhood_attention": True, "use_scale_shift_norm": True},
    ),
    "checkpoint": (UNetModel, {"use_checkpoint": True, "resblock_updown": True, "attention_resolutions": ()}),
    "attention": (EncoderUNetModel, {"pool": "attention", "num_head_channels": 32}),
    "spatial": (EncoderUNetModel, {"pool": "spatial_v2"}),
}


def compiled_gradients(form: str, backend: str) -> None:
    kind, options = WHOLE_GRAPHS[form]
    model = small(kind, **options)
    inputs = inputs_of(model, (8, 8))
    th.compiler.reset()
    whole = th.compile(model, fullgraph=True, backend=backend)
    th.testing.assert_close(joined(gradients(whole, *inputs)), joined(gradients(model, *inputs)), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_networks_compile_as_one_graph() -> None:
    compiled_gradients("spatial", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in WHOLE_GRAPHS if form != "spatial"])
def test_more_networks_compile_as_one_graph(form: str) -> None:
    compiled_gradients(form, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_networks_compile_to_machine_code() -> None:
    compiled_gradients("windows, classes", "inductor")


@pytest.mark.parametrize("form", few(["windows, classes", "attention"], ["attention"]))
def test_networks_export(form: str) -> None:
    kind, options = WHOLE_GRAPHS[form]
    model = small(kind, **options)
    inputs = inputs_of(model, (8, 8))
    exported = th.export.export(model, inputs).module()
    others = (images(), th.tensor([0, 5]), *(Y.flip(0) for _ in inputs[2:]))
    th.testing.assert_close(exported(*others), model(*others))


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "no label": (lambda: small(num_classes=5)(images(), T), "y is missing: the network has 5 classes"),
    "a label": (lambda: small()(images(), T, Y), "y was given to a network without classes"),
    "labels": (lambda: small(num_classes=5)(images(), T, Y[:1]), r"one label per image, shape \(2,\), got \(1,\)"),
    "no classes": (lambda: small(null_class=True), "null_class needs a network with classes: give num_classes"),
    "size": (
        lambda: small()(images(8, 11), T),
        "multiple of 2 on each side for 2 levels .*, got 8x11; the nearest is 8x12",
    ),
    "tiny": (lambda: small(channel_mult=(1, 1, 1))(images(1, 8), T), "got 1x8; the nearest is 4x8"),
    "low_res": (lambda: small(SuperResModel)(images(), T), "low_res is missing"),
    "heads": (lambda: small(num_heads=3), "num_heads must divide the 64 channels that attend, got 3"),
    "heads of the decoder": (lambda: small(num_heads_upsample=0), "got 0; change it, or in the decoder num_heads_ups"),
    "head size": (lambda: small(num_head_channels=48), "num_head_channels must divide the 64 .*, got 48"),
    "no head size": (lambda: small(EncoderUNetModel, pool="attention"), "num_head_channels must divide .*, got -1"),
    "channels": (lambda: small(model_channels=40), "multiple of 32 .*, got 40"),
    "dims": (lambda: small(dims=4), "dims must be one of 1, 2, 3, the axes of space, got 4"),
    "pool": (lambda: small(EncoderUNetModel, pool="mean"), "pool must be one of adaptive, .*, got 'mean'"),
    "sides": (
        lambda: small(image_size=(8, 8, 8), use_neighborhood_attention=True),
        r"image_size must be an int or have 2 sides \(dims\), got \(8, 8, 8\)",
    ),
    "precision": (lambda: small().convert_to("fp8"), "precision must be one of fp32, fp16, bf16, got 'fp8'"),
    "pooled size": (
        lambda: small(EncoderUNetModel, pool="attention", num_head_channels=32)(images(4, 4), T),
        r"built for feature maps of \(4, 4\), got \(2, 2\)",
    ),
    "averaging": (lambda: unet.Downsample(3, False, out_channels=4), "out_channels 4 needs use_conv=True"),
    "window": (lambda: unet.QKVAttention(1, None, True), "use_neighborhood_attention needs spatial"),
    "windowed sequence": (lambda: unet.QKVAttention(1, (2,), True)(th.randn(1, 3, 4)), "zip"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_sentence(case: str) -> None:
    call, sentence = REFUSALS[case]
    with pytest.raises(ValueError, match=sentence):
        call()
