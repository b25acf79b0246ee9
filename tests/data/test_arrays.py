"""Arrays of images as data sets, zips of Windows, and the numbers that are black and white."""

from __future__ import annotations

import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from few import few
from PIL import Image

from guided_diffusion.commands import flags as cli
from guided_diffusion.commands.common import described
from guided_diffusion.commands.conditioning import kind_of
from guided_diffusion.commands.npz_files import from_images
from guided_diffusion.commands.tool_sections import FromImagesConfig, NpzToolConfig
from guided_diffusion.commands.training import open_streams
from guided_diffusion.data.conditioning import CondKind, Pairing, open_cond_images
from guided_diffusion.data.init_images import InitImages
from guided_diffusion.data.sources import Selection, UnreadableImage, find_images, read_image
from guided_diffusion.data.upsampling import read_base
from guided_diffusion.evaluation.images import open_images
from guided_diffusion.image_datasets import load_data
from guided_diffusion.runtime import files
from guided_diffusion.runtime.options import parse_range

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), np.uint8)
UNIT = PIXELS.astype(np.float32) / 127.5 - 1


def batch(path: str | Path, count: int = 7, **options: Any) -> tuple[np.ndarray[Any, Any], dict[str, th.Tensor]]:
    """The images [N, H, W, C] of a data set in its order, and what lies beside them."""
    fixed: dict[str, Any] = {"deterministic": True, "random_flip": False, "log": lambda _: None}
    stream = load_data(**{"data_dir": str(path), "batch_size": count, "image_size": "5x6", **fixed, **options})
    images, cond = next(stream)
    return images.movedim(1, -1).numpy(), cond


ARRAYS = {
    "uint8": PIXELS,
    "Fortran": np.asfortranarray(PIXELS),
    "floats": UNIT,
    "float64 of Fortran": np.asfortranarray(UNIT.astype(np.float64)),
    "big endian": UNIT.astype(">f4"),
    "grey": PIXELS[..., 0],
    "grey with an axis": PIXELS[..., :1],
    "five channels": UNIT.repeat(2, -1)[..., :5],
}


FILES = product(ARRAYS, ("npy", "npz", "packed npz", "large npz"))


@pytest.mark.parametrize(("name", "kind"), few(FILES, lambda row: row[0] == "uint8" or row[1] == "npy"))
def test_an_array_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """In its order and in any other, from workers too."""
    if kind == "large npz":
        monkeypatch.setattr(files, "LARGE_MEMBER", 16)
    array = ARRAYS[name]
    path = tmp_path / f"x.{kind[-3:]}"
    if kind == "npy":
        np.save(path, array)
    else:
        (np.savez_compressed if kind == "packed npz" else np.savez)(path, arr_0=array, arr_1=np.arange(7)[::-1])
    expected = (array if array.dtype != np.uint8 else array.astype(np.float32) / 127.5 - 1).astype(np.float32)
    expected = expected.reshape(7, 5, 6, -1)
    options = {"image_channels": expected.shape[-1], "class_cond": kind != "npy"}
    images, cond = batch(path, **options)
    np.testing.assert_allclose(images, expected, atol=1e-6)
    assert kind == "npy" or cond["y"].tolist() == [6, 5, 4, 3, 2, 1, 0]
    mixed, cond = batch(path, deterministic=False, num_workers=1, **options)
    order = [int(np.abs(expected - image).sum(axis=(1, 2, 3)).argmin()) for image in mixed]
    assert sorted(order) == list(range(7)) != order
    assert kind == "npy" or cond["y"].tolist() == [6 - index for index in order]


def test_arrays_go_wherever_folders_go(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    path = f"{tmp_path}/x.npy"
    rows = InitImages(path, "5x6", 3).rows(range(8))["init_image"]
    np.testing.assert_allclose(rows.movedim(1, -1).numpy(), UNIT[[*range(7), 0]], atol=1e-6)
    np.testing.assert_array_equal(read_base(path, (5, 6, 3), Selection(3)).pixels, PIXELS[:3])
    cond = open_cond_images(path, CondKind("image", 3), "5x6", Selection(9))
    assert (len(cond.source), cond.names, cond.labels) == (7, [], None)
    np.testing.assert_allclose(cond.conditioning([2])["cond_image"][0].movedim(0, -1), UNIT[2], atol=1e-6)
    _, paired = batch(path, pairing=Pairing(path, CondKind("image", 3)))
    np.testing.assert_allclose(paired["cond_image"].movedim(1, -1), UNIT, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate(list(open_images(path).batches(3))), PIXELS)
    from_images(NpzToolConfig(source=path, out=f"{tmp_path}/y.npz"), FromImagesConfig())
    np.testing.assert_array_equal(np.load(f"{tmp_path}/y.npz")["arr_0"], PIXELS)


ONE_OR_MANY = [
    ((5, 6), 1, 1),
    ((5, 6, 3), 3, 1),
    ((5, 6, 6), 6, 1),
    ((7, 5, 6), 1, 7),
    ((7, 5, 6, 3), 3, 7),
    ((7, 5, 6, 9), 9, 7),
]


@pytest.mark.parametrize(("shape", "channels", "count"), ONE_OR_MANY)
def test_one_picture_or_many(tmp_path: Path, shape: tuple[int, ...], channels: int, count: int) -> None:
    np.save(tmp_path / "x.npy", np.zeros(shape, np.float32))
    images = InitImages(f"{tmp_path}/x.npy", 4, channels)
    assert len(images) == count
    images.check(9)


REFUSED = {
    "no axes": (np.zeros(3, np.uint8), "an array of shape \\(3,\\), where"),
    "none": (np.zeros((0, 4, 4, 3), np.uint8), "an array of shape \\(0, 4, 4, 3\\), where"),
    "five axes": (np.zeros((2, 3, 4, 4, 3), np.uint8), "where \\[N, H, W\\] or"),
    "text": (np.array([[["a"]]]), "where numbers are read"),
    "channels first": (np.zeros((2, 3, 8, 9), np.uint8), "9 channels, where image_channels is 3 .an array is .H, W, C"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_arrays_are_refused(tmp_path: Path, name: str) -> None:
    array, sentence = REFUSED[name]
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=rf"x\.npy.*{sentence}") as caught:
        batch(tmp_path / "x.npy", 1)
    assert "\n" not in str(caught.value)


def test_arrays_that_end_early_or_have_no_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    with pytest.raises(ValueError, match="holds images and no labels: give an npz of images arr_0 and labels arr_1"):
        batch(tmp_path / "x.npy", class_cond=True)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.npy' is not a readable array of images \(mmap length is greater"):
        batch(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", PIXELS, np.arange(6))
    with pytest.raises(ValueError, match="give one class id for each of the 7 images"):
        batch(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", a=PIXELS, b=PIXELS)
    with pytest.raises(ValueError, match="holds a, b, and it is not clear which are images: save them as arr_0"):
        batch(tmp_path / "x.npz")


def test_nothing_large_is_held_without_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ARRAY", 100)
    np.save(tmp_path / "x.npy", PIXELS)
    batch(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.asfortranarray(PIXELS))
    batch(tmp_path / "x.npy")
    np.savez_compressed(tmp_path / "x.npz", PIXELS)
    with pytest.raises(ValueError, match=r"an array of 630 bytes, more than the 100 that are held"):
        batch(tmp_path / "x.npz")


def test_rows_are_names(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    listing = find_images(f"{tmp_path}/x.npy")
    np.testing.assert_array_equal(np.asarray(read_image(listing.path(listing.images[6]), 3)), PIXELS[6])
    assert listing.images[1:3] == ["000001.npy", "000002.npy"]
    for name in ("000007.npy", "7.png", "-1.npy"):
        with pytest.raises(UnreadableImage, match="not in the array"):
            read_image(listing.path(name), 3)


def test_folders_in_zips_of_windows(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("all\\", "")
        for name in ("all\\cat\\1.png", "all\\dog\\2.png"):
            archive.writestr(name, (tmp_path / "x.png").read_bytes())
        archive.writestr("all\\labels.csv", "cat\\1.png,u\r\ndog\\2.png,v\r\n")
    listing = find_images(f"{tmp_path}/x.zip")
    assert (listing.images, listing.refused) == (["all/cat/1.png", "all/dog/2.png"], [])
    for rule, classes in (("auto", ["u", "v"]), ("folder", ["cat", "dog"])):
        stream = load_data(
            data_dir=f"{tmp_path}/x.zip",
            batch_size=2,
            image_size=4,
            class_cond=True,
            class_from=rule,
            log=lambda _: None,
        )
        assert stream.classes == classes
        assert next(stream)[0].shape == (2, 3, 4, 4)


RAMP = np.linspace(0, 1, 30).reshape(5, 6)
RANGES: dict[str, tuple[str, Any, Any]] = {
    # name: (--data_range, numbers, what they are in [0, 1])
    "12 bits in 16": ("0,4095", np.rint(RAMP * 4095).astype(np.uint16), RAMP),
    "12 bits of int32": ("0,4095", np.rint(RAMP * 4095).astype(np.int32), RAMP),
    "floats in [0, 1]": ("0,1", RAMP.astype(np.float32), RAMP),
    "floats in [0, 255]": ("0,255", RAMP * 255, RAMP),
    "Hounsfield units": ("-1000,3000", (RAMP * 4000 - 1000).astype(np.int16), RAMP),
    "a window": ("0.25,0.75", RAMP, (RAMP * 2 - 0.5).clip(0, 1)),
    "0 and 1 in bytes": ("0,1", np.rint(RAMP).astype(np.uint8), np.rint(RAMP)),
    "bytes have their own": ("0,4095", np.rint(RAMP * 255).astype(np.uint8), RAMP),
    "without": ("", np.rint(RAMP * 65535).astype(np.uint16), RAMP),
}


KINDS = [
    (name, kind)
    for name, (_, numbers, _) in RANGES.items()
    for kind in ("npy", "png", "stack")
    if kind != "png" or numbers.dtype in (np.uint8, np.uint16)  # what a PNG holds
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_data_range(tmp_path: Path, name: str, kind: str) -> None:
    text, numbers, unit = RANGES[name]
    if kind == "png":
        Image.fromarray(numbers).save(tmp_path / "x.png")
    else:
        np.save(tmp_path / "x.npy", numbers[None] if kind == "stack" else numbers)
    path = f"{tmp_path}/x.npy" if kind == "stack" else str(tmp_path)
    expected, span = unit * 2 - 1, parse_range(text)
    for found in (
        batch(path, 1, image_channels=1, data_range=span)[0][0, ..., 0],
        InitImages(path, "5x6", 1, data_range=span).rows([0])["init_image"][0, 0],
        open_cond_images(path, CondKind("image", 1, span), "5x6", Selection(1)).load(0)[0],
        read_base(path, (5, 6, 1), Selection(1), span).pixels[0, ..., 0] / 127.5 - 1,
        np.concatenate(list(open_images(path, None, span).batches(1)))[0, ..., 0] / 127.5 - 1,
    ):
        np.testing.assert_allclose(found, expected, atol=0.008)
    from_images(
        NpzToolConfig(source=path, out=f"{tmp_path}/y.npz"), FromImagesConfig(image_channels=1, data_range=text)
    )
    np.testing.assert_allclose(np.load(f"{tmp_path}/y.npz")["arr_0"].squeeze() / 127.5 - 1, expected, atol=0.008)


@pytest.mark.parametrize("text", ["0", "1,0", "a,b", "0,inf", "0,1,2", "nan,1"])
def test_no_range(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse("image_train", ["--data_range", text])
    assert f"argument --data_range: '{text}' is no range: write LOW,HIGH" in capsys.readouterr().err


def test_every_command_that_reads_images_has_the_flag() -> None:
    readers = [name for name, command in cli.COMMANDS.items() if {"data_dir", "num_samples"} & set(command.flags())]
    without = {"cascade_sample"}  # which passes flags on
    for name in {*readers, "evaluator", "sweep", "npz_tool"} - without:
        assert "data_range" in cli.command_of(name).flags(), name


def test_the_flag_reaches_images_and_conditioning_images_and_is_kept_for_sampling(tmp_path: Path) -> None:
    for name in ("images", "conds"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", RAMP)
    values = {
        "cond_type": "image",
        "image_channels": 1,
        "data_dir": f"{tmp_path}/images",
        "num_workers": 0,
        "random_flip": False,
    }
    flags = cli.Flags(
        "image_train", {**values, "cond_dir": f"{tmp_path}/conds", "data_range": "0,1", "image_size": "5x6"}
    )
    kind = kind_of(flags)
    assert kind is not None
    pairing = Pairing(f"{tmp_path}/conds", kind)
    images, cond = next(open_streams(flags, class_cond=False, image_size="5x6", pairing=pairing)[0])
    np.testing.assert_allclose(images[0, 0].numpy(), RAMP * 2 - 1, atol=1e-6)
    np.testing.assert_allclose(cond["cond_image"][0, 0].numpy(), RAMP * 2 - 1, atol=1e-6)
    (tmp_path / "model000001.pt").touch()
    (tmp_path / "config.json").write_text('{"flags": {"image_size": 8, "data_range": "0,1"}}')
    for given, taken in (({}, "0,1"), ({"data_range": "0,2"}, "0,2")):
        sampling = cli.Flags("image_sample", {"model_path": str(tmp_path), **given})
        assert described(sampling)[1].values["data_range"] == taken
