"""Tiles of larger images than a network was trained for: whatever it does at their edges, no seam is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from runs import SAMPLING, UPSAMPLER, Runs, saved_by

from guided_diffusion.commands import super_res_sample
from guided_diffusion.config import DiffusionConfig
from guided_diffusion.networks.autoencoder import AutoencoderKL
from guided_diffusion.networks.first_stage import FirstStage
from guided_diffusion.networks.tiling import blended, starts, tiled
from guided_diffusion.runtime.npz import save_npz
from guided_diffusion.script_util import build_diffusion

SCALE = 4


def gradient(height: int, width: int) -> th.Tensor:
    """An image whose brightness rises evenly, [1, 1, H, W]."""
    rows, columns = (th.arange(side, dtype=th.float64) / side - 0.5 for side in (height, width))
    return (rows[:, None] + columns)[None, None]


def steepest(image: th.Tensor) -> float:
    """The greatest difference of neighbours."""
    return max(image.diff(dim=axis).abs().max().item() for axis in (2, 3))


@pytest.mark.parametrize(
    ("side", "tile", "overlap"), [(8, 8, 0.25), (9, 8, 0.25), (64, 16, 0.5), (31, 7, 0.0), (99, 8, 0.9)]
)
def test_tiles_cover_a_side_and_overlap(side: int, tile: int, overlap: float) -> None:
    places = starts(side, tile, overlap)
    assert (places[0], places[-1]) == (0, side - tile)
    gaps = np.diff(places)
    assert all(tile - gap >= int(overlap * tile) for gap in gaps)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_function_of_each_pixel_is_not_changed() -> None:
    x = th.randn(2, 3, 23, 17, dtype=th.float64)
    made = blended(lambda place: 3 * x[..., place[0], place[1]] + 1, (23, 17), (8, 5), 0.25, 1)
    th.testing.assert_close(made, 3 * x + 1)


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_a_gradient_is_enlarged_without_a_seam(overlap: float) -> None:
    """By a network that is wrong at the edges of what it sees, and darker or brighter by the middle of it."""
    small, process = gradient(24, 32), build_diffusion(DiffusionConfig(timestep_respacing="ddim4"))
    abar = th.from_numpy(process.alphas_cumprod)[:, None, None, None]
    taus = list(process.timestep_map)

    def network(x: th.Tensor, timesteps: th.Tensor, low_res: th.Tensor) -> th.Tensor:
        large = F.interpolate(low_res, scale_factor=SCALE, mode="bilinear") * 1.1
        index = taus.index(int(timesteps[0]))
        return (x - abar[index].sqrt() * (large + 0.015 * low_res.mean().sign())) / (1 - abar[index]).sqrt()

    def enlarged(model: Any) -> th.Tensor:
        noise = th.randn(1, 1, 24 * SCALE, 32 * SCALE, dtype=th.float64, generator=th.Generator().manual_seed(0))
        options = {"noise": noise, "device": "cpu", "model_kwargs": {"low_res": small}, "clip_denoised": False}
        return process.sample_loop("ddim", model, noise.shape, **options)

    even = steepest(enlarged(network))
    assert steepest(enlarged(tiled(network, (8, 8), SCALE, overlap))) < 1.6 * even
    assert steepest(enlarged(tiled(network, (8, 8), SCALE, 0.0))) > 3 * even  # tiles that only meet


def test_latents_are_decoded_in_tiles_without_a_seam() -> None:
    network = AutoencoderKL(
        ddconfig={
            "double_z": True,
            "z_channels": 4,
            "resolution": 16,
            "in_channels": 1,
            "out_ch": 1,
            "ch": 32,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        embed_dim=4,
    ).eval()
    latents = gradient(24, 24).float().expand(2, 4, 24, 24)
    with th.no_grad():
        whole, parts = (FirstStage(network, 1.0, tile=tile).decode(latents) for tile in (0, 8))
        alone = FirstStage(network, 1.0, tile=24).decode(latents)
    assert th.equal(whole, alone)
    assert parts.shape == whole.shape == (2, 1, 48, 48)
    assert steepest(parts[..., 4:-4, 4:-4]) < 1.6 * steepest(whole[..., 4:-4, 4:-4])


def test_images_of_any_size_are_enlarged(tmp_path: Path) -> None:
    runs = Runs(tmp_path, upsampler=UPSAMPLER)
    base = np.random.default_rng(0).integers(0, 256, (2, 9, 6, 3)).astype(np.uint8)
    save_npz(str(tmp_path / "base.npz"), base, np.array([0, 2]))
    words = [
        "--model_path",
        runs["upsampler"],
        "--base_samples",
        f"{tmp_path}/base.npz",
        *SAMPLING[4:],
        "--batch_size",
        "1",
    ]
    made = saved_by(super_res_sample.main, tmp_path / "out", *words, "--tile_overlap", "0.5")
    assert made["arr_0"].shape == (2, 18, 12, 3)
    assert made["arr_1"].tolist() == [0, 2]
    save_npz(str(tmp_path / "base.npz"), base[:, :3])
    with pytest.raises(SystemExit):
        saved_by(super_res_sample.main, tmp_path / "small", *words, "--tile_overlap", "0.5")
