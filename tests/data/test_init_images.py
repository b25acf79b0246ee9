"""Images to start from: their order, their bytes, their masks, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.data.init_images import InitImages
from guided_diffusion.data.sources import images_at
from guided_diffusion.image_datasets import load_data
from guided_diffusion.runtime.pictures import to_uint8

RNG = np.random.default_rng(0)


def save(path: Path, *size: int) -> np.ndarray:
    pixels = RNG.integers(0, 256, size).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        save(tmp_path / "images" / f"{name}.png", 8, 8, 3)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_every_byte_comes_back(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    Image.fromarray(levels).save(tmp_path / "levels.png")
    rows = InitImages(str(tmp_path / "levels.png"), 16, 3).rows([0])["init_image"]
    np.testing.assert_array_equal(to_uint8(rows)[0], levels)
    exact = th.from_numpy(levels).movedim(-1, 0)[None] / 127.5 - 1
    assert (rows - exact).abs().max() <= 2**-23


def test_images_are_those_of_training_in_turn(folder: Path) -> None:
    images = InitImages(str(folder), 6, 3)
    rows = images.rows([0, 1, 2, 3, 7])["init_image"]
    stream = load_data(data_dir=str(folder), batch_size=3, image_size=6, deterministic=True, random_flip=False)
    expected, _ = next(stream)
    th.testing.assert_close(rows, expected[[0, 1, 2, 0, 1]], rtol=0, atol=2**-23)


def test_a_file_a_zip_and_a_member_of_it_are_found(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.write(folder / name, f"deep/{name}")
    whole = [f"{tmp_path}/all.zip/deep/a.png", f"{tmp_path}/all.zip/deep/b.png"]
    for path, expected in (
        (str(folder / "b.png"), [str(folder / "b.png")]),
        (f"{tmp_path}/all.zip", whole),
        (whole[1], whole[1:]),
    ):
        listing = images_at(path, "init_image")
        assert [listing.path(name) for name in listing.images] == expected
    one, other = (InitImages(path, 8, 3).rows([0])["init_image"] for path in (whole[1], str(folder / "b.png")))
    assert th.equal(one, other)


def test_masks_are_cropped_like_their_images_and_have_two_values(tmp_path: Path) -> None:
    save(tmp_path / "wide.png", 8, 16, 3)
    grey = np.full((8, 16), 255, np.uint8)
    grey[:, :6], grey[:, 6] = 0, 127
    Image.fromarray(grey).save(tmp_path / "mask.png")
    wide, mask = str(tmp_path / "wide.png"), str(tmp_path / "mask.png")
    kept = InitImages(wide, 8, 3, masks=mask).rows([0])["mask"]
    assert kept.shape == (1, 1, 8, 8)
    expected = (th.arange(4, 12) > 6).float().expand(1, 1, 8, 8)  # the middle half of the columns
    assert th.equal(kept, expected)
    assert th.equal(InitImages(wide, 8, 3, masks=mask, swap=True).rows([0])["mask"], 1 - kept)


def write_masks(folder: Path, **levels: int) -> str:
    """Masks of one level each, whose names say it."""
    folder.mkdir()
    for name, level in levels.items():
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / f"{name}.bmp")
    return str(folder)


def test_masks_belong_to_images_by_name(folder: Path, tmp_path: Path) -> None:
    """Not by order; one alone is everybody's, and one image takes several in turn."""
    masks = write_masks(tmp_path / "masks", c=0, b=255, a=0)
    images = InitImages(str(folder), 8, 3, masks=masks)
    assert images.rows(range(6))["mask"][:, 0, 0, 0].tolist() == [0, 1, 0, 0, 1, 0]
    assert InitImages(str(folder), 8, 3, masks=f"{masks}/b.bmp").rows(range(3))["mask"].mean() == 1
    turns = InitImages(str(folder / "a.png"), 8, 3, masks=masks).rows(range(4))
    assert turns["mask"][:, 0, 0, 0].tolist() == [0, 1, 0, 0]
    assert th.equal(turns["init_image"][0], turns["init_image"][3])
    assert images.describe_masks(99)[:2] == [
        "mask a.bmp: nothing is kept, all is painted",
        "mask b.bmp: all is kept, nothing is painted",
    ]


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        ({"a": 0, "b": 0}, r"1 of 3 images have no mask in .*masks \('c.png'\): several images and masks belong"),
        ({"a": 0, "b": 0, "c": 0, "d": 0}, r"1 of 4 masks have no image \('d.bmp'\)"),
        ({"mask0": 0, "mask1": 0, "mask2": 0}, r"3 of 3 images have no mask .*'a.png', 'b.png', 'c.png'"),
    ],
)
def test_a_partner_that_is_missing_is_named(folder: Path, tmp_path: Path, levels: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        InitImages(str(folder), 8, 3, masks=write_masks(tmp_path / "masks", **levels))


def test_the_digest_is_of_what_is_used(folder: Path) -> None:
    images = InitImages(str(folder), 8, 3)
    one, all_three = images.check(1), images.check(3)
    assert one != all_three == images.check(10**9)
    assert one == InitImages(str(folder / "a.png"), 8, 3).check(5)
    save(folder / "c.png", 8, 8, 3)
    assert images.check(1) == one
    assert images.check(3) != all_three


def test_masks_and_their_sense_change_the_digest(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "mask.png", 8, 8)
    mask, image = str(tmp_path / "mask.png"), str(folder / "a.png")
    kinds = [
        InitImages(image, 8, 3),
        InitImages(image, 8, 3, masks=mask),
        InitImages(image, 8, 3, masks=mask, swap=True),
    ]
    assert len({kind.check(1) for kind in kinds}) == 3


def test_what_cannot_be_used_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for path, message in (
        ("", "init_image '' does not exist"),
        (str(tmp_path / "nowhere.png"), "does not exist: give an image"),
        (str(tmp_path / "none"), "holds no images, skipped 0"),
    ):
        with pytest.raises(ValueError, match=message):
            InitImages(path, 8, 3)
    with pytest.raises(ValueError, match=r"mask '.*' does not exist"):
        InitImages(str(folder), 8, 3, masks=str(tmp_path / "nowhere.png"))
    for path in (folder / "notes.txt", folder / "torn.png"):
        path.write_bytes((folder / "a.png").read_bytes()[:60] if path.suffix == ".png" else b"text")
        with pytest.raises(ValueError, match=f"cannot read image '.*{path.name}'"):
            InitImages(str(path), 8, 3).check(1)


def test_a_mask_of_another_size_is_refused_with_both_sizes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for name, height in (("a", 8), ("b", 4), ("c", 8)):
        save(tmp_path / "masks" / f"{name}.png", height, 8)
    images = InitImages(str(folder), 8, 3, masks=str(tmp_path / "masks"))
    images.check(1)
    with pytest.raises(ValueError, match=r"the mask b.png is 4x8 and its image b.png 8x8 \(height x width\)"):
        images.check(2)
