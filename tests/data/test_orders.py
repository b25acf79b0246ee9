"""The order of images, for any number of ranks and from any place on; several data sets; ways to fit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.data.crops import fitted_arr
from guided_diffusion.data.orders import order_of
from guided_diffusion.image_datasets import ImageStream, load_data
from guided_diffusion.runtime.errors import UserError
from shards import picture, write_shards

COUNT = 24
SHARDS = np.repeat(np.arange(6), 4)
LABELS = [0] * 18 + [1] * 4 + [2] * 2
ORDERS: dict[str, dict[str, Any]] = {
    "all": {},
    "shards": {"shards": SHARDS, "window": 2},
    "classes": {"labels": LABELS},
    "weights": {"parts": [20, 4], "weights": [1.0, 2.0]},
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_depends_on_seed_and_epoch_alone(name: str) -> None:
    order, again = order_of(COUNT, 1, **ORDERS[name]), order_of(COUNT, 1, **ORDERS[name])
    for epoch in (2, 0):
        assert all(map(np.array_equal, order(epoch), again(epoch)))
        assert len(order(epoch)[1]) == COUNT
    assert not np.array_equal(order(0)[1], order(1)[1])
    assert not np.array_equal(order(0)[1], order_of(COUNT, 2, **ORDERS[name])(0)[1])
    shown = Counter(
        zip(*map(np.ndarray.tolist, map(np.concatenate, zip(*map(order, range(12)), strict=True))), strict=True)
    )
    assert set(shown.values()) == {1}  # no image twice in the same pass, so that it is augmented anew


def test_windows_hold_their_shards_whole() -> None:
    order = order_of(COUNT, 1, **ORDERS["shards"])
    windows = [set(SHARDS[part]) for part in np.split(order(0)[1], 3)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))
    assert sorted(order(0)[1]) == list(range(COUNT))
    whole = order(0)[1][:8]
    assert len({*SHARDS[whole[:4]]}) == 2  # they are mixed, not one after the other
    assert {*windows[0]} != {*SHARDS[order(1)[1][:8]]} or {*windows[1]} != {*SHARDS[order(1)[1][8:16]]}


def test_classes_and_weights_have_their_shares() -> None:
    """Over three passes of the largest group, and within a group all images equally often."""
    balanced = np.concatenate([order_of(COUNT, 1, labels=LABELS)(epoch)[1] for epoch in range(9)])
    assert Counter(np.take(LABELS, balanced).tolist()) == {0: 72, 1: 72, 2: 72}
    assert set(Counter(balanced.tolist()).values()) == {4, 18, 36}
    weighted = np.concatenate([order_of(COUNT, 1, **ORDERS["weights"])(epoch)[1] for epoch in range(5)])
    assert Counter((weighted >= 20).tolist()) == {False: 40, True: 80}
    with pytest.raises(
        UserError, match="a weight of 1 in 1001 leaves nothing of 20 images in an epoch of 24: raise it"
    ):
        order_of(COUNT, 1, parts=[20, 4], weights=[1, 1000])


def opened(data_dir: Any, **options: Any) -> ImageStream:
    defaults: dict[str, Any] = {"image_size": 4, "batch_size": 6, "random_flip": False, "log": lambda line: None}
    return load_data(data_dir=str(data_dir), **{**defaults, **options})


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))


def two_sets(tmp_path: Path) -> str:
    """Twelve pictures in tars of classes 0 to 2, four in folders."""
    pattern = write_shards(tmp_path / "shards", 3, 4)
    for number in range(4):
        folder = tmp_path / "more" / ("cat", "2")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(100 + number))
    return f"{pattern},{tmp_path}/more"


MIXES: dict[str, dict[str, Any]] = {
    "all": {},
    "weights": {"data_weights": "1,3"},
    "classes": {"balance": "classes"},
}


@pytest.mark.parametrize("mix", MIXES)
def test_ranks_and_resumed_runs_see_the_same(tmp_path: Path, mix: str) -> None:
    place, options = two_sets(tmp_path), {"class_cond": True, "random_crop": True, **MIXES[mix]}
    alone = opened(place, **options)
    batches = [next(alone) for _ in range(6)]
    ranks = [opened(place, rank=rank, world_size=2, **{**options, "batch_size": 3}) for rank in (0, 1)]
    for images, cond in batches:
        (first, one), (second, other) = map(next, ranks)
        assert th.equal(images, th.cat([first, second]))
        assert th.equal(cond["y"], th.cat([one["y"], other["y"]]))
    later = opened(place, **options)
    later.load_state_dict({"batches": 4, "images": 24})
    for images, _ in batches[4:]:
        assert th.equal(images, next(later)[0])


def test_several_data_sets_have_their_classes_in_common(tmp_path: Path) -> None:
    stream = opened(two_sets(tmp_path), class_cond=True)
    assert stream.classes == ["0", "1", "2", "cat"]
    assert [count for _, _, count in stream.class_table()] == [4, 4, 6, 2]
    stream = opened(two_sets(tmp_path), class_cond=True, data_weights="1,3")
    taken = [round((image.mean().item() + 1) * 127.5) for _ in range(8) for image in next(stream)[0]]
    assert sum(grey >= 100 for grey in taken) == 36
    with pytest.raises(UserError, match="data_weights 1,2,3 are 3, and data_dir names 2: give one for each"):
        opened(two_sets(tmp_path), data_weights="1,2,3")
    with pytest.raises(UserError, match="shuffle shards needs images in tars or zips"):
        opened(tmp_path / "more", shuffle="shards:2")


def test_shards_are_shuffled_within_windows(tmp_path: Path) -> None:
    stream = opened(write_shards(tmp_path / "shards", 6, 4), shuffle="shards:2", batch_size=8)
    for _ in range(6):
        greys = [round((image.mean().item() + 1) * 127.5) for image in next(stream)[0]]
        assert len({grey // 4 for grey in greys}) == 2
        assert len(set(greys)) == 8


def test_pad_and_squash_take_all_of_a_picture() -> None:
    tall = np.full((40, 20, 3), 200, np.uint8)
    tall[:, 10:] = 100
    padded = fitted_arr(Image.fromarray(tall), 16, pad=True)
    assert (padded[:, :4] == 0).all()
    assert (padded[:, 12:] == 0).all()
    assert (padded[:, 5:7] == 200).all()
    squashed = fitted_arr(Image.fromarray(tall), 16, pad=False)
    assert (squashed[:, :6] == 200).all()
    assert (squashed[:, 10:] == 100).all()
    planes = fitted_arr((tall / 127.5 - 1).astype(np.float32), 16, pad=True)
    np.testing.assert_allclose(planes[:, 5:7], 200 / 127.5 - 1, atol=0.01)
    assert (planes[:, :4] == -1).all()


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_kept_pictures_are_the_same(tmp_path: Path, fit: str) -> None:
    for number in range(6):
        content = np.random.default_rng(number).integers(0, 255, (9 + number, 30 - 2 * number, 3), np.uint8)
        Image.fromarray(content).save(tmp_path / f"{number}.png")
    plain, kept = opened(tmp_path, fit=fit), opened(tmp_path, fit=fit, cache_images=True)
    for _ in range(3):
        assert th.equal(next(plain)[0], next(kept)[0])
    with pytest.raises(UserError, match=f"fit {fit} takes all of a picture: set random_crop to False"):
        opened(tmp_path, fit=fit, random_crop=True)
