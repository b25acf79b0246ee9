"""Films: what is on the frames, and the files they are kept in."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from oracle import GaussianData, make_process
from PIL import Image

from guided_diffusion.runtime.pictures import CELL, LAST, PAD, Film, to_uint8
from guided_diffusion.sampling.samplers import make_sampler

STEPS = make_process(100, "6", name="cosine")


def filmed(shape: tuple[int, ...] = (2, 3, 8, 8), **options: int) -> tuple[Film, list[Any]]:
    """A film of a sampling, and what its loop yielded."""
    film = Film(**options)
    th.manual_seed(0)
    outputs = STEPS.sample_loop_progressive(
        make_sampler("ddim"), GaussianData(STEPS), shape, device="cpu", callback=film.collect
    )
    return film, list(outputs)


@pytest.mark.parametrize(("every", "shown"), [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 3, 5]), (4, [1, 5]), (9, [1])])
def test_frames_are_predictions_and_the_last_one_is_the_sample(every: int, shown: list[int]) -> None:
    film, outputs = filmed(every=every)
    *steps, last = film.frames()
    assert [title for title, _ in steps] == [f"step {number}" for number in shown]
    for number, (_, images) in zip(shown, steps, strict=True):
        np.testing.assert_array_equal(images, to_uint8(outputs[number - 1]["pred_xstart"]))
    assert last[0] == "image"
    np.testing.assert_array_equal(last[1], to_uint8(outputs[-1]["sample"]))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_strip_has_a_row_per_image_and_a_column_per_frame(tmp_path: Path, channels: int) -> None:
    film, _ = filmed((9, channels, 8, 10), every=3, images=2)
    strip, animation = str(tmp_path / "deep" / "film.png"), str(tmp_path / "deep" / "film.gif")
    film.save(strip, animation)
    zoom, frames = CELL // 8, film.frames()
    height, width = 8 * zoom, 10 * zoom
    with Image.open(strip) as picture:
        pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    top = pixels.shape[0] - 2 * (height + PAD) - PAD + PAD
    assert pixels.shape[1] == len(frames) * (width + PAD) + PAD
    for column, (_, images) in enumerate(frames):
        for row, image in enumerate(images):
            y, x = top + row * (height + PAD), PAD + column * (width + PAD)
            np.testing.assert_array_equal(pixels[y : y + height, x : x + width], image.repeat(zoom, 0).repeat(zoom, 1))
    assert (pixels[:top, ..., 0] < 100).any(axis=0).sum() > 20  # titles
    assert sorted(os.listdir(tmp_path / "deep")) == ["film.gif", "film.png"]


def test_the_animation_shows_every_frame_and_holds_the_last(tmp_path: Path) -> None:
    film, _ = filmed(every=2)
    film.save(str(tmp_path / "film.png"), str(tmp_path / "film.gif"))
    with Image.open(tmp_path / "film.gif") as animation:
        frames, times = [], []
        for number in range(animation.n_frames):  # type: ignore[attr-defined]
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")).astype(int))
            times.append(animation.info["duration"])
        assert animation.info["loop"] == 0
    assert len(frames) == len(film.frames()) == 4
    assert times[-1] == LAST > 5 * times[0]
    assert len(set(times[:-1])) == 1
    zoom = CELL // 8
    for shown, (_, images) in zip(frames, film.frames(), strict=True):
        tile = shown[-PAD - 8 * zoom : -PAD, PAD : PAD + 8 * zoom]
        assert np.abs(tile - images[0].repeat(zoom, 0).repeat(zoom, 1)).mean() < 4


def test_what_is_not_finite_is_shown_as_black(tmp_path: Path) -> None:
    film = Film()
    images = th.full((1, 3, 8, 8), math.nan)
    film.collect(0, {"sample": images, "pred_xstart": images})
    film.save(str(tmp_path / "film.png"), str(tmp_path / "film.gif"))
    assert all((images == 0).all() for _, images in film.frames())
