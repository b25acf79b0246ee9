"""Masks of any numbers, read by one rule; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.data.conditioning import CondKind
from guided_diffusion.data.init_images import InitImages
from guided_diffusion.data.sources import UnreadableImage, read_mask

KEPT = np.zeros((8, 8), bool)
KEPT[2:7, 3:] = True
SHADES = np.where(KEPT, 255, 0)
SHADES[1, 3:], SHADES[0, 3:] = 127, 128  # of which the lighter counts as white
SHADED = KEPT.copy()
SHADED[0, 3:] = True


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(KEPT.astype(np.uint8), "P")
    image.putpalette([level for colour in colours for level in colour])
    return image


def seen(array: np.ndarray[Any, Any]) -> Image.Image:
    """Of one colour, and opaque where an array is."""
    return Image.merge("RGBA", [Image.new("L", (8, 8), 90)] * 3 + [Image.fromarray(array)])


ONE, FULL = KEPT.astype(np.uint8), KEPT * np.uint8(255)
MASKS: dict[str, Any] = {
    "0 and 255": Image.fromarray(FULL),
    "0 and 1": Image.fromarray(ONE),
    "one bit": Image.fromarray(KEPT),
    "7 and 9": Image.fromarray(ONE * 2 + np.uint8(7)),
    "16 bits": Image.fromarray(KEPT * np.uint16(65535)),
    "12 bits in 16": Image.fromarray(KEPT * np.uint16(4095)),
    "32 bits": Image.fromarray(KEPT.astype(np.int32)),
    "colours": Image.fromarray(np.stack([FULL, ONE, ONE], -1)),
    "a palette": palette((0, 0, 0), (128, 0, 0)),
    "a palette of greys": palette((0, 0, 0), (1, 1, 1)),
    "transparency": seen(FULL),
    "opaque": Image.merge("RGBA", [*[Image.fromarray(FULL)] * 3, Image.new("L", (8, 8), 255)]),
    "npy of bool": KEPT,
    "npy of 0 and 1": ONE,
    "npy of int64": KEPT.astype(np.int64),
    "npy of floats": KEPT.astype(np.float32),
    "npy of -1 and 1": KEPT * 2.0 - 1,
    "npy [H, W, 1]": ONE[..., None],
    "npy [1, H, W]": ONE[None],
    "npy of three alike": ONE[..., None].repeat(3, -1),
    "npy of Fortran": np.asfortranarray(ONE),
    "npz": {"mask": KEPT},
    "npz of one in a row": {"arr_0": FULL[None]},
}
SHADED_MASKS: dict[str, Any] = {
    "shades": Image.fromarray(SHADES.astype(np.uint8)),
    "shades of 16 bits": Image.fromarray(SHADES.astype(np.uint16) * 257),
    "shades of floats": SHADES / 255,
    "shades of -1 .. 1": SHADES / 127.5 - 1,
}


def saved(folder: Path, content: Any) -> str:
    if isinstance(content, dict):
        np.savez_compressed(folder / "m.npz", **content)
        return f"{folder}/m.npz"
    if isinstance(content, np.ndarray):
        np.save(folder / "m.npy", content)
        return f"{folder}/m.npy"
    name = "m.tif" if content.mode == "I" else "m.png"
    content.save(folder / name)
    return f"{folder}/{name}"


@pytest.mark.parametrize("name", MASKS | SHADED_MASKS)
def test_one_rule_for_all_masks(tmp_path: Path, name: str) -> None:
    content = (MASKS | SHADED_MASKS)[name]
    kept = SHADED if name in SHADED_MASKS else KEPT
    path = saved(tmp_path, content)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    images = InitImages(f"{tmp_path}/image.png", 8, 3, masks=path)
    images.check(1)
    np.testing.assert_array_equal(images.rows([0])["mask"][0, 0], kept)
    (line,) = images.describe_masks(9)
    assert f"{100 * kept.mean():.3g} % is kept" in line
    swapped = InitImages(f"{tmp_path}/image.png", 8, 3, masks=path, swap=True)
    np.testing.assert_array_equal(swapped.rows([0])["mask"][0, 0], ~kept)
    assert f"{100 * (~kept).mean():.3g} % is kept" in swapped.describe_masks(9)[0]
    if not path.endswith("npz"):
        np.testing.assert_array_equal(CondKind("mask", 1).load(path, 8)[0], kept)


@pytest.mark.parametrize(("level", "kept"), [(0, "nothing is kept"), (1, "all is kept"), (255, "all is kept")])
def test_masks_of_one_value_are_said(tmp_path: Path, level: int, kept: str) -> None:
    path = saved(tmp_path, Image.new("L", (8, 8), level))
    assert kept in InitImages(path, 8, 3, masks=path).describe_masks(1)[0]
    other = "nothing is kept" if "all" in kept else "all is kept"
    assert other in InitImages(path, 8, 3, masks=path, swap=True).describe_masks(1)[0]


def test_the_share_is_that_of_the_crop(tmp_path: Path) -> None:
    array = np.zeros((4, 16), np.uint8)
    array[:, 6:10] = 1
    path = saved(tmp_path, Image.fromarray(array))
    assert "all is kept" in InitImages(path, 4, 3, masks=path).describe_masks(1)[0]


RAMP = np.linspace(0, 100, 64).reshape(8, 8)
REFUSED: dict[str, tuple[Any, str]] = {
    "a map of classes": (
        Image.fromarray((np.arange(64) % 3).astype(np.uint8).reshape(8, 8)),
        "3 values from 0 to 2, all",
    ),
    "dark shades": (Image.fromarray(RAMP.astype(np.uint8)), "all on one side of 127.5"),
    "12 bits of shades": (Image.fromarray((RAMP * 40).astype(np.uint16)), "from 0 to 4000, all on one side of 32767.5"),
    "numbers of no range": (RAMP * 1000, "from 0 to 100000"),
    "nan": (np.where(KEPT, np.nan, 0), "not finite"),
    "colours of one brightness": (palette((0, 0, 255), (97, 0, 0)), "a palette of colours, 2 of them in use"),
    "many colours": (
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).quantize(4).convert("RGB").quantize(4),
        "4 values from 7 to 55",
    ),
    "transparent photo": (
        Image.merge("RGBA", [Image.fromarray(RAMP.astype(np.uint8))] * 3 + [Image.fromarray(FULL)]),
        "colours and its transparency both vary",
    ),
    "planes": (np.stack([KEPT, ~KEPT, KEPT], -1), r"numbers of shape \(8, 8, 3\), where masks are \[H, W\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused(tmp_path: Path, name: str) -> None:
    content, sentence = REFUSED[name]
    with pytest.raises(UnreadableImage, match=f"m\\.[np]+[yg].*{sentence}") as caught:
        read_mask(saved(tmp_path, content))
    assert "\n" not in str(caught.value)
