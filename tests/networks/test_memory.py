"""Blocks that compute their activations again: which they are, and that nothing but memory changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch as th

from guided_diffusion.networks.blocks import AttentionBlock, ResBlock
from guided_diffusion.networks.memory import recompute_at
from guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

OPTIONS: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 1, 2),
    "num_heads": 2,
}
NETWORKS = {
    "plain resampling": lambda **more: UNetModel(**OPTIONS, **more),
    "residual resampling": lambda **more: UNetModel(**OPTIONS, resblock_updown=True, **more),
    "classifier": lambda **more: EncoderUNetModel(**OPTIONS, resblock_updown=True, pool="adaptive", **more),
}
X, T = th.randn(2, 3, 16, 16, generator=th.Generator().manual_seed(1)), th.tensor([3, 40])


def blocks(network: th.nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, ResBlock | AttentionBlock)]


@contextmanager
def counted(network: th.nn.Module) -> Iterator[dict[Any, list[int]]]:
    """Block -> the larger side of input and output at each time that its inside is computed."""
    calls: dict[Any, list[int]] = {}

    def count(block: Any) -> None:
        inside = block._forward

        def counting(x: th.Tensor, *rest: th.Tensor) -> th.Tensor:
            out: th.Tensor = inside(x, *rest)
            calls.setdefault(block, []).append(max(x.shape[-1], out.shape[-1]))
            return out

        block._forward = counting

    for block in blocks(network):
        count(block)
    yield calls


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("resolutions", ["16", "8,4", "4"])
def test_the_blocks_of_some_resolutions_are_computed_twice(kind: str, resolutions: str) -> None:
    """Of 16, 8 and 4 pixels; where a block changes them, it is the larger side that counts."""
    network = NETWORKS[kind]()
    chosen = recompute_at(network, resolutions)
    with counted(network) as calls:
        network(X, T).square().sum().backward()
    assert set(calls) == set(blocks(network))
    sides = {int(word) for word in resolutions.split(",")}
    twice = [block for block, seen in calls.items() if block.use_checkpoint]
    assert all((seen[0] in sides) == block.use_checkpoint for block, seen in calls.items())
    assert 0 < chosen == len(twice) < len(calls)


def test_gradients_are_the_same_bits() -> None:
    network = NETWORKS["residual resampling"]()
    with th.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    found = []
    for resolutions in ("", "16,4"):
        assert bool(recompute_at(network, resolutions)) == bool(resolutions)
        network.zero_grad()
        network(X, T).square().sum().backward()
        found.append(th.cat([p.grad.flatten() for p in network.parameters()]))
    assert th.equal(*found)


def test_an_upsampler_and_oblong_images_count_by_the_longer_side() -> None:
    network = SuperResModel(**{**OPTIONS, "image_size": (8, 16)})
    assert recompute_at(network, "16,8,4") == len(blocks(network))


@pytest.mark.parametrize(
    ("resolutions", "sentence"),
    [
        ("32", "checkpoint_resolutions 32 of '32' do not occur at size 16: its levels are 16, 8, 4; use these"),
        ("16,5,x", "checkpoint_resolutions 5, x of '16,5,x' do not occur"),
    ],
)
def test_other_resolutions_are_refused(resolutions: str, sentence: str) -> None:
    network = NETWORKS["plain resampling"]()
    with pytest.raises(ValueError, match=sentence):
        recompute_at(network, resolutions)
    assert not any(block.use_checkpoint for block in blocks(network))
