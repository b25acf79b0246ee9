"""Images from files to batches: real files, values known beforehand, identities of the stream."""

import io
import json
import math
import multiprocessing
import os
import pickle
import random
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blobfile as bf
import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.data.sources import find_images, read_image
from guided_diffusion.image_datasets import (
    ImageDataset,
    ImageStream,
    _list_image_files_recursively,
    center_crop_arr,
    load_classes,
    load_data,
    load_superres_data,
    random_crop_arr,
    save_classes,
)

EMOJI = str(Path(__file__).parents[2] / "datasets" / "emoji64.zip")
EMOJI_COUNTS = {
    "activities": 170,
    "animals": 318,
    "flags": 540,
    "food": 262,
    "objects": 528,
    "people": 772,
    "smileys": 338,
    "symbols": 448,
    "travel": 436,
}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return array[..., 0] if channels == 1 else array


def encoded(array: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def pixel(value: int) -> bytes:
    """A 4x4 picture all of one grey: the value tells the image."""
    return encoded(np.full((4, 4, 3), value, np.uint8))


def write(root: Path, files: dict[str, bytes], as_zip: bool = False) -> str:
    """A folder or a zip of the given files."""
    if as_zip:
        with zipfile.ZipFile(root / "pack.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return str(root / "pack.zip")
    for name, content in files.items():
        path = root / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root / "folder")


def numbered(root: Path, count: int, as_zip: bool = False) -> str:
    """Images whose grey value is their index, in the order of their names."""
    return write(root, {f"{'ab'[i % 2]}_{i:03}.png": pixel(i) for i in range(count)}, as_zip)


def stream(data_dir: str, batch_size: int, **options: Any) -> ImageStream:
    defaults = {"image_size": 4, "random_flip": False, "log": lambda line: None}
    return load_data(data_dir=data_dir, batch_size=batch_size, **{**defaults, **options})


def values(images: th.Tensor) -> list[int]:
    """The grey value of each image."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def first(path: str, channels: int = 3, size: Any = 4) -> np.ndarray:
    """The one image of a data set, [H, W, C] in [-1, 1]."""
    dataset = ImageDataset(size, [path], random_flip=False, image_channels=channels)
    array, label = dataset[0]
    assert label == {}
    assert array.dtype == np.float32
    return array.transpose(1, 2, 0)


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "tif", "tiff", "webp", "npy", "PNG", "TIFF"])
def test_lossless_formats_give_their_pixels(tmp_path: Path, kind: str) -> None:
    corners = np.array([[[0, 0, 0], [255, 255, 255]], [[200, 100, 50], [3, 128, 251]]], np.uint8)
    array = corners.repeat(2, 0).repeat(2, 1)
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path, **({"lossless": True} if kind == "webp" else {}))
    np.testing.assert_array_equal(first(str(path)), array.astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "JPEG"])
def test_jpeg(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / f"x.{kind}", quality=95)
    got = (first(str(tmp_path / f"x.{kind}"), size=16) + 1) * 127.5
    np.testing.assert_allclose(got, np.broadcast_to([200, 100, 50], (16, 16, 3)), atol=3)


def save(path: Path, image: Image.Image, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


MODES = {
    # name: (extension, image, what to save it with, expected RGB)
    "grey": ("png", Image.new("L", (4, 4), 90), {}, (90, 90, 90)),
    "bits": ("png", Image.new("1", (4, 4), 1), {}, (255, 255, 255)),
    "palette": ("gif", Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4), {}, (10, 200, 30)),
    "clear": ("png", Image.new("RGBA", (4, 4), (9, 9, 9, 0)), {}, (255, 255, 255)),
    "opaque": ("png", Image.new("RGBA", (4, 4), (9, 80, 200, 255)), {}, (9, 80, 200)),
    "half": ("png", Image.new("RGBA", (4, 4), (0, 100, 255, 51)), {}, (204, 224, 255)),  # 255 (1 - a) + c a, a = 0.2
    "grey alpha": ("png", Image.new("LA", (4, 4), (0, 51)), {}, (204, 204, 204)),
    "palette alpha": ("png", Image.new("P", (4, 4), 0), {"transparency": 0}, (255, 255, 255)),
    "colour key": ("png", Image.new("RGB", (4, 4), (7, 8, 9)), {"transparency": (7, 8, 9)}, (255, 255, 255)),
    "cmyk": ("tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)), {}, (255, 0, 0)),
    "cmyk jpeg": ("jpg", Image.new("CMYK", (4, 4), (255, 0, 255, 0)), {"quality": 100}, (0, 255, 0)),
}


@pytest.mark.parametrize("name", MODES)
def test_modes(tmp_path: Path, name: str) -> None:
    extension, image, options, expected = MODES[name]
    path = save(tmp_path / f"x.{extension}", image, **options)
    near = 3 if extension == "jpg" else 1
    colour = np.array(expected)
    np.testing.assert_allclose((first(path) + 1) * 127.5, np.broadcast_to(colour, (4, 4, 3)), atol=near)
    luma = (colour * [0.299, 0.587, 0.114]).sum()
    np.testing.assert_allclose((first(path, 1) + 1) * 127.5, np.full((4, 4, 1), luma), atol=near)


def test_four_channels_keep_alpha(tmp_path: Path) -> None:
    array = np.dstack([noise(4, 4), np.full((4, 4), 255, np.uint8)])
    array[1, 2, 3] = 128
    path = save(tmp_path / "x.png", Image.fromarray(array))
    expected = array.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(read_image(path, 4), array)
    np.testing.assert_allclose(
        first(path, 4), expected, atol=1.01 / 127.5
    )  # resizing multiplies by alpha and divides again
    opaque = first(save(tmp_path / "y.png", Image.fromarray(array[..., :3])), 4)
    np.testing.assert_array_equal(opaque[..., 3], 1)
    np.testing.assert_array_equal(opaque[..., :3], expected[..., :3])


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_greys_keep_their_levels(tmp_path: Path, extension: str, channels: int) -> None:
    array = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    array[0, :4] = 0, 1, 2, 65535
    path = save(tmp_path / f"x.{extension}", Image.fromarray(array))
    got = first(path, channels, 16)
    np.testing.assert_allclose(got[..., :3], np.repeat(array[..., None] / 32767.5 - 1, min(channels, 3), -1), atol=1e-6)
    assert got.shape == (16, 16, channels)
    assert np.all(got[..., 3:] == 1)


def test_32_bit_integers_in_the_range_of_16_bits_are_taken_as_such(tmp_path: Path) -> None:
    array = np.array([[0, 65535], [1, 40000]], np.int32).repeat(2, 0).repeat(2, 1)
    got = first(save(tmp_path / "x.tif", Image.fromarray(array)), 1)
    np.testing.assert_allclose(got[..., 0], array / 32767.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="numbers of type int32"):
        first(save(tmp_path / "y.tif", Image.fromarray(array * 2)), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = noise(6, 9)
    stored = {  # how a camera held this way stores the scene
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(first(path, size=(6, 9)), upright.astype(np.float32) / 127.5 - 1)


def test_a_damaged_exif_block_does_not_hide_the_picture(tmp_path: Path) -> None:
    array = noise(4, 4)
    path = save(tmp_path / "x.png", Image.fromarray(array), exif=b"Exif\0\0no such thing")
    np.testing.assert_array_equal(first(path), array.astype(np.float32) / 127.5 - 1)


NUMBERS = np.random.default_rng(3)
ARRAYS = {
    # name: (array, channels, what is to come of it)
    "bytes": (noise(4, 4), 3, lambda a: a / 127.5 - 1),
    "grey bytes": (noise(4, 4, 1), 1, lambda a: a[..., None] / 127.5 - 1),
    "16 bit": (NUMBERS.integers(0, 65536, (4, 4, 3)).astype(np.uint16), 3, lambda a: a / 32767.5 - 1),
    "big endian": (NUMBERS.integers(0, 65536, (4, 4)).astype(">u2"), 1, lambda a: a[..., None] / 32767.5 - 1),
    "mask": (np.eye(4, dtype=bool), 1, lambda a: a[..., None] * 2.0 - 1),
    "floats": (NUMBERS.uniform(-1, 1, (4, 4, 3)), 3, lambda a: a),
    "half floats": (NUMBERS.uniform(-1, 1, (4, 4, 2)).astype(np.float16), 2, lambda a: a),
    "seven": (NUMBERS.uniform(-1, 1, (4, 4, 7)).astype(np.float32), 7, lambda a: a),
    "seven bytes": (noise(4, 4, 7), 7, lambda a: a / 127.5 - 1),
    "grey to RGB": (NUMBERS.uniform(-1, 1, (4, 4)), 3, lambda a: np.repeat(a[..., None], 3, -1)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(tmp_path: Path, name: str) -> None:
    array, channels, expected = ARRAYS[name]
    np.save(tmp_path / "x.npy", array)
    np.testing.assert_allclose(first(str(tmp_path / "x.npy"), channels), expected(array), atol=1e-6)


def test_float_planes_stay_in_range_when_enlarged(tmp_path: Path) -> None:
    array = np.where(np.indices((6, 6)).sum(0) % 2, 1.0, -1.0)[..., None].repeat(5, -1)
    np.save(tmp_path / "x.npy", array)
    got = first(str(tmp_path / "x.npy"), 5, 16)
    assert np.abs(got).max() == 1  # bicubic interpolation of a chequerboard overshoots


def test_planes_are_cropped_as_pictures_are(tmp_path: Path) -> None:
    array = noise(20, 31)
    planes = array.astype(np.float32) / 127.5 - 1
    for crop in (center_crop_arr, lambda p, s: random_crop_arr(p, s, rng=random.Random(5))):
        picture = crop(Image.fromarray(array), (8, 12))
        np.testing.assert_allclose(crop(planes, (8, 12)).clip(-1, 1), picture / 127.5 - 1, atol=1.6 / 127.5)


UNREADABLE = {
    # what the file holds, its name, channels, what the sentence says
    "text": (b"hello", "x.png", 3, "its content is no image"),
    "cut off": (encoded(noise(40, 40))[:1500], "x.png", 3, "truncated"),
    "empty": (b"", "x.jpg", 3, "it is empty"),
    "no array": (b"hello", "x.npy", 3, "magic string"),
    "picture for five": (pixel(1), "x.png", 5, "image_channels 5 is read from .npy alone"),
    "three for five": (ARRAYS["floats"][0], "x.npy", 5, "3 channels, where image_channels is 5"),
    "too large": (ARRAYS["floats"][0] * 2, "x.npy", 3, "floats outside"),
    "not a number": (np.full((4, 4), np.nan), "x.npy", 1, "floats outside"),
    "integers": (np.ones((4, 4), np.int64), "x.npy", 1, "numbers of type int64"),
    "a row": (np.ones(4, np.uint8), "x.npy", 1, r"shape \(4,\)"),
    "objects": (np.array([{}], object), "x.npy", 1, "type object"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_named(tmp_path: Path, name: str) -> None:
    content, file, channels, words = UNREADABLE[name]
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        np.save(tmp_path / file, content, allow_pickle=True)
    with pytest.raises(ValueError, match=f"cannot read image '.*{file}': .*{words}.*; repair or remove it"):
        first(str(tmp_path / file), channels)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_stops_the_stream_where_it_stands(tmp_path: Path, num_workers: int) -> None:
    folder = write(tmp_path, {"0.png": pixel(0), "1.png": b"hello", "2.png": pixel(2)})
    images = stream(folder, 1, deterministic=True, num_workers=num_workers)
    assert values(next(images)[0]) == [0]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot read image '.*1\.png': .*, or set on_bad_image to skip"):
            next(images)
    assert images.state_dict() == {"batches": 1, "images": 1}
    (tmp_path / "folder" / "1.png").write_bytes(pixel(1))
    assert take(images, 2) == [[1], [2]]


def reference_cover(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Average pairs of columns, then of rows, as long as twice the size fits; then bicubic to cover."""
    array = np.asarray(image).astype(int)
    while array.shape[0] >= 2 * height and array.shape[1] >= 2 * width:
        array = (array[:, ::2] + array[:, 1::2] + 1) // 2
        array = (array[::2] + array[1::2] + 1) // 2
    factor = max(height / array.shape[0], width / array.shape[1])
    shape = [round(side * factor) for side in array.shape[:2]]
    return np.asarray(Image.fromarray(array.astype(np.uint8)).resize(shape[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((64, 64), (16, 16)), ((40, 72), (16, 16)), ((48, 32), (12, 8)), ((20, 50), (8, 12)), ((5, 9), (16, 24))],
)
def test_crops_are_windows_of_the_covering_picture(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    cover = reference_cover(image, *size)
    top, left = (cover.shape[0] - size[0]) // 2, (cover.shape[1] - size[1]) // 2
    np.testing.assert_array_equal(center_crop_arr(image, size), cover[top : top + size[0], left : left + size[1]])
    for seed in range(5):
        dice = random.Random(seed)
        short = min(size)
        side = dice.randint(short, math.ceil(short / 0.8))
        cover = reference_cover(image, *[math.ceil(length * side / short) for length in size])
        top, left = dice.randint(0, cover.shape[0] - size[0]), dice.randint(0, cover.shape[1] - size[1])
        window = cover[top : top + size[0], left : left + size[1]]
        np.testing.assert_array_equal(random_crop_arr(image, size, rng=random.Random(seed)), window)


@pytest.mark.parametrize("text", ["8x12", (8, 12)])
def test_sizes_are_height_by_width(tmp_path: Path, text: Any) -> None:
    images, _ = next(stream(write(tmp_path, {"a.png": pixel(7)}), 1, image_size=text))
    assert images.shape == (1, 3, 8, 12)


def test_center_crop_of_stripes() -> None:
    """A 16x64 picture of 16 px stripes, cropped to 16: the middle two half stripes, untouched by any filter."""
    stripes = np.repeat(np.array([10, 80, 160, 240], np.uint8), 16)[None].repeat(16, 0)
    assert center_crop_arr(Image.fromarray(stripes), 16).tolist() == [[80] * 8 + [160] * 8] * 16


def test_random_crops_follow_the_module_random() -> None:
    image = Image.fromarray(noise(30, 40))
    random.seed(3)
    ours = random_crop_arr(image, 16)
    np.testing.assert_array_equal(ours, random_crop_arr(image, 16, rng=random.Random(3)))
    assert len({random_crop_arr(image, 16).tobytes() for _ in range(20)}) > 15


def test_crop_fractions_are_checked() -> None:
    for fractions in ((0.0, 1.0), (0.9, 0.8), (0.8, 1.2)):
        with pytest.raises(ValueError, match="choose 0 < min_crop_frac <= max_crop_frac <= 1"):
            random_crop_arr(Image.fromarray(noise(8, 8)), 4, *fractions)


NESTED = {
    "b/2_x.png": pixel(2),
    "b/a/1_y.JPG": encoded(noise(4, 4), "jpeg"),
    "b.png": pixel(3),
    "a.txt": b"",
    "b/c.mp4": b"",
    "b/README": b"",
    "._b.png": b"resource fork",
    "__MACOSX/b.png": b"resource fork",
}
NESTED_ORDER = ["b/2_x.png", "b/a/1_y.JPG", "b.png"]  # sorted folder by folder: "b" before "b.png"


@pytest.mark.parametrize("as_zip", [False, True])
def test_nested_files_are_found_in_order_and_the_rest_is_counted(tmp_path: Path, as_zip: bool) -> None:
    lines: list[str] = []
    root = write(tmp_path, NESTED, as_zip)
    images = stream(root, 1, deterministic=True, log=lines.append)
    assert images.dataset.local_images == _list_image_files_recursively(root) == [f"{root}/{n}" for n in NESTED_ORDER]
    assert lines == [f"{root}: found 3 images, skipped 5 (.mp4: 1, .txt: 1, hidden: 2, no extension: 1)"]
    assert _list_image_files_recursively(f"{root}/b/") == [f"{root}/b/2_x.png", f"{root}/b/a/1_y.JPG"]


def test_a_folder_of_zips_is_entered_only_without_pictures_of_its_own(tmp_path: Path) -> None:
    cats, dogs = (io.BytesIO() for _ in range(2))
    for file, value in ((cats, 1), (dogs, 2)):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("1.png", pixel(value))
    folder = write(tmp_path, {"cats.zip": cats.getvalue(), "dogs.ZIP": dogs.getvalue()})
    images, cond = next(stream(folder, 2, deterministic=True, class_cond=True))
    assert values(images) == [1, 2]
    assert cond["y"].tolist() == [0, 1]
    assert stream(folder, 1, class_cond=True).classes == ["cats", "dogs"]
    write(tmp_path, {"own.png": pixel(3)})
    assert [os.path.basename(path) for path in _list_image_files_recursively(folder)] == ["own.png"]


def test_more_zips_than_stay_open(tmp_path: Path) -> None:
    for value in range(40):
        write(tmp_path, {f"{value:02}.png": pixel(value)}, as_zip=True)
        (tmp_path / "pack.zip").rename(tmp_path / f"{value:02}.zip")
    images = stream(str(tmp_path), 40, deterministic=True)
    assert [values(next(images)[0]) for _ in range(2)] == [list(range(40))] * 2


def test_members_of_a_zip_never_reach_the_disk(tmp_path: Path) -> None:
    """Names that point out of the zip are passed over, the others mean nothing outside of it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "outside.png").write_bytes(pixel(99))
    hostile = {"../outside.png": pixel(1), "/etc/absolute.png": pixel(2), "inner.zip/x.png": pixel(3)}
    root = write(tmp_path / "data", hostile, as_zip=True)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    lines: list[str] = []
    images, _ = next(stream(root, 1, log=lines.append))
    assert values(images) == [3]
    assert "found 1 images, skipped 2 (a path that leads out of the zip: 2)" in lines[0]
    assert "skipped '../outside.png': a path that leads out of the zip" in lines[0]
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_rewritten_zip_is_read_anew(tmp_path: Path) -> None:
    for value in (1, 2):
        root = write(tmp_path, {"a.png": pixel(value), "pad.txt": b"x" * value * 100}, as_zip=True)
        assert values(next(stream(root, 1))[0]) == [value]


class Bucket:
    """A bucket of a blob store, for blobfile's own functions to be replaced by."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def isdir(self, path: str) -> bool:
        return any(name.startswith(path.rstrip("/") + "/") for name in self.files)

    def exists(self, path: str) -> bool:
        return path in self.files or self.isdir(path)

    def scandir(self, path: str) -> Iterable[Any]:
        start = path.rstrip("/") + "/"
        for name in sorted({name[len(start) :].split("/")[0] for name in self.files if name.startswith(start)}):
            yield SimpleNamespace(name=name, is_dir=self.isdir(start + name))

    def open(self, path: str, mode: str, streaming: bool) -> io.BytesIO:
        assert (mode, streaming) == ("rb", True)
        return io.BytesIO(self.files[path])


def test_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Path(numbered(tmp_path, 4, as_zip=True)).read_bytes()
    folder = {f"gs://bucket/train/{name}": content for name, content in NESTED.items()}
    bucket = Bucket(folder | {"gs://bucket/pack.zip": packed})
    for name in ("isdir", "exists", "scandir"):
        monkeypatch.setattr(bf, name, getattr(bucket, name))
    monkeypatch.setattr(bf, "BlobFile", bucket.open)
    images = stream("gs://bucket/train/", 1, deterministic=True)
    assert images.dataset.local_images == [f"gs://bucket/train/{name}" for name in NESTED_ORDER]
    assert values(next(images)[0]) == [2]
    packed_images, cond = next(stream("gs://bucket/pack.zip", 4, deterministic=True, class_cond=True))
    assert values(packed_images) == [0, 2, 1, 3]
    assert cond["y"].tolist() == [0, 0, 1, 1]


def csv_file(*rows: str) -> bytes:
    return "\n".join(rows).encode()


def json_file(*pairs: tuple[str, Any]) -> bytes:
    return json.dumps({"labels": pairs}).encode()


RULES = {
    # name: (files besides pictures, pictures, class_from, names, ids in the order of the files, a word of the log)
    "one folder": ({}, "cat_1.png dog_2.png cat_3.png", "auto", "cat dog", [0, 0, 1], "all images lie in one folder"),
    "sorted by text": ({}, "10_a.png 2_a.png 1_a.png", "auto", "1 10 2", [1, 0, 2], "file names"),
    "prefixes agree": ({}, "cat/cat_1.png dog/dog_2.png", "auto", "cat dog", [0, 1], "each agrees with its folder"),
    "folders": ({}, "cat/001_x.png dog/001_x.png dog/002_x.png", "auto", "cat dog", [0, 1, 1], "--class_from filename"),
    "folders in one": ({}, "all/cat/1.png all/dog/1.png", "auto", "cat dog", [0, 1], "classes from the folders"),
    "united": (
        {},
        "a/cat/1.png b/cat/1.png b/dog/1.png",
        "auto",
        "cat dog",
        [0, 0, 1],
        "class cat unites a/cat, b/cat",
    ),
    "as the originals": ({}, "cat/001_x.png dog/001_x.png", "filename", "001", [0, 0], "001 (2 images)"),
    "folder asked": ({}, "x/cat_1.png x/dog_1.png", "folder", "x", [0, 0], "x (2 images)"),
    "csv": (
        {"labels.csv": csv_file("file,label", "b.png,dog", "a.png,cat")},
        "a.png b.png",
        "auto",
        "cat dog",
        [0, 1],
        "csv",
    ),
    "csv, no heading": (
        {"labels.csv": csv_file("a.png,1", "b.png, 0")},
        "a.png b.png",
        "csv",
        "0 1",
        [1, 0],
        "found 2",
    ),
    "csv, BOM": ({"labels.csv": b"\xef\xbb\xbfa.png,x\r\nb.png,y\r\n"}, "a.png b.png", "auto", "x y", [0, 1], "csv"),
    "csv of some": (
        {"labels.csv": csv_file("f,l", "a.png,u", "c.png,u")},
        "a.png",
        "auto",
        "u",
        [0],
        "labels 1 files that",
    ),
    "edm": (
        {"dataset.json": json_file(("00/a.png", 3), ("00/b.png", 10), ("01/c.png", 0))},
        "00/a.png 00/b.png 01/c.png",
        "auto",
        "0 1 2 3 4 5 6 7 8 9 10",
        [3, 10, 0],
        "classes from dataset.json",
    ),
    "json of names": (
        {"dataset.json": json_file(("a.png", "v"), ("b.png", "u"))},
        "a.png b.png",
        "json",
        "u v",
        [1, 0],
        "u (1",
    ),
    "json mapping": ({"dataset.json": b'{"labels": {"a.png": 1}}'}, "a.png", "auto", "0 1", [1], "0 (0 images)"),
    "zip of a folder": ({"d/dataset.json": json_file(("x/a.png", 1))}, "d/x/a.png", "auto", "0 1", [1], "dataset.json"),
    "json before csv": (
        {"dataset.json": json_file(("a.png", 1)), "labels.csv": csv_file("a.png,zebra")},
        "a.png",
        "auto",
        "0 1",
        [1],
        "skipped 0",
    ),
    "csv asked": (
        {"dataset.json": json_file(("a.png", 1)), "labels.csv": csv_file("a.png,zebra")},
        "a.png",
        "csv",
        "zebra",
        [0],
        "zebra",
    ),
}


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_class_rules(tmp_path: Path, name: str, as_zip: bool) -> None:
    extra, pictures, rule, names, ids, words = RULES[name]
    lines: list[str] = []
    root = write(tmp_path, {file: pixel(0) for file in pictures.split()} | extra, as_zip)
    images = stream(root, 1, class_cond=True, class_from=rule, log=lines.append)
    assert images.classes == names.split()
    assert images.dataset.local_classes == ids
    assert images.class_table() == [(i, name, ids.count(i)) for i, name in enumerate(names.split())]
    assert rule in ("auto", images.class_from)
    assert words in "\n".join(lines)


KNOWN = ["bird", "cat", "dog"]
LABEL_ERRORS = {
    # name: (files besides pictures, pictures, options, the sentence)
    "no prefix": ({}, "cat_1.png dog.png", {}, r"'dog.png' has no class before a '_'; name it CLASS_dog.png"),
    "no folder": ({}, "a.png b/1.png", {}, "'a.png' lies in no folder below"),
    "unknown": (
        {},
        "cat_1.png wolf_1.png",
        {"classes": KNOWN},
        "'wolf' of 'wolf_1.png' is none of the 3 known ones .bird,",
    ),
    "misspelt": ({}, "catt_1.png", {"classes": KNOWN}, "did you mean cat"),
    "too many": (
        {},
        "a_1.png b_1.png c_1.png",
        {"num_classes": 2},
        r"'c' \(id 2\) of 'c_1.png' does not fit num_classes 2",
    ),
    "known beyond": ({}, "cat_1.png", {"classes": KNOWN, "num_classes": 2}, "3 classes are more than num_classes 2"),
    "id too large": (
        {"dataset.json": json_file(("a.png", 10))},
        "a.png",
        {"num_classes": 10},
        "class 10 .id 10. of 'a.png' does not fit",
    ),
    "absurd id": (
        {"dataset.json": json_file(("a.png", 10**12))},
        "a.png",
        {},
        "class 1000000000000 .id 1000000000000. of 'a.png'",
    ),
    "negative": (
        {"labels.csv": csv_file("a.png,-1")},
        "a.png",
        {},
        r"class -1 .id -1. of 'a.png' .*ids 0 to 65535.; correct it",
    ),
    "number unknown": (
        {"labels.csv": csv_file("a.png,3")},
        "a.png",
        {"classes": KNOWN},
        "class 3 of 'a.png' is none of the 3",
    ),
    "unlabelled": (
        {"labels.csv": csv_file("a.png,1")},
        "a.png b.png",
        {},
        "1 of 2 images have no label in 'labels.csv', the first 'b",
    ),
    "no csv": ({}, "a.png", {"class_from": "csv"}, "class_from csv needs the file labels.csv"),
    "no json": ({}, "a.png", {"class_from": "json"}, "class_from json needs the file dataset.json"),
    "null": ({"dataset.json": b'{"labels": null}'}, "a.png", {}, "1 of 1 images have no label"),
    "broken json": ({"dataset.json": b"{"}, "a.png", {}, r"it is not \{\"labels\""),
    "vector": ({"dataset.json": json_file(("a.png", [0.5]))}, "a.png", {}, r"label \[0.5\] of 'a.png' is neither"),
    "half a row": ({"labels.csv": csv_file("file,label", "a.png")}, "a.png", {}, "the line 'a.png' is not"),
    "rule": (
        {},
        "a_1.png",
        {"class_from": "folders"},
        "class_from must be one of auto, .*got 'folders'; did you mean folder",
    ),
    "no effect": ({}, "a_1.png", {"class_cond": False, "class_from": "folder"}, "have no effect; set class_cond"),
    "no table": ({}, "a_1.png", {"classes": "/nowhere/classes.json"}, "'/nowhere/classes.json' is no table of classes"),
}


@pytest.mark.parametrize("name", LABEL_ERRORS)
def test_labels_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    extra, pictures, options, words = LABEL_ERRORS[name]
    root = write(tmp_path, {file: pixel(0) for file in pictures.split()} | extra)
    with pytest.raises(ValueError, match=words) as caught:
        stream(root, 1, **{"class_cond": True, **options})
    assert "\n" not in str(caught.value)


def test_saved_classes_fix_the_ids_of_later_sets(tmp_path: Path) -> None:
    """A validation set that lacks a class, and lies in one folder, is labelled as training was."""
    train = stream(write(tmp_path / "t", {f"{c}/1_x.png": pixel(0) for c in ("ant", "bee", "cow")}), 1, class_cond=True)
    table = str(tmp_path / "classes.json")
    save_classes(table, train)
    with open(table) as file:
        assert json.load(file) == {"classes": ["ant", "bee", "cow"], "class_from": "folder", "counts": [1, 1, 1]}
    assert load_classes(table) == train.classes
    assert sorted(os.listdir(tmp_path)) == ["classes.json", "t"]
    val_dir = write(tmp_path / "v", {f"cow/{i}_x.png": pixel(i) for i in range(3)})
    val = stream(val_dir, 3, class_cond=True, classes=table)
    assert next(val)[1]["y"].tolist() == [2, 2, 2]
    assert val.class_table() == [(0, "ant", 0), (1, "bee", 0), (2, "cow", 3)]
    by_list = stream(val_dir, 3, class_cond=True, classes=["cow", "ant"], class_from="folder")
    assert next(by_list)[1]["y"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"class '0' of 'cow/0_x\.png' is none of the 3 known ones"):
        stream(val_dir, 3, class_cond=True, classes=table, class_from="filename")


def test_numbers_take_the_ids_of_names_that_are_numbers(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.png": pixel(0), "labels.csv": b"a.png,10"})
    assert stream(root, 1, class_cond=True, classes=["1", "10", "2"]).dataset.local_classes == [1]
    (tmp_path / "folder" / "labels.csv").write_bytes(b"a.png,2")
    assert stream(root, 1, class_cond=True, classes=KNOWN).dataset.local_classes == [2]


def test_long_class_tables_are_shortened_in_the_log(tmp_path: Path) -> None:
    lines: list[str] = []
    names = {f"{i:02}_.png": pixel(i) for i in range(50)}
    assert len(stream(write(tmp_path, names), 1, class_cond=True, log=lines.append).class_table()) == 50
    assert lines[-1].splitlines()[-2:] == ["  class 39: 39 (1 images)", "  and 10 classes more"]


def take(images: ImageStream, count: int) -> list[list[int]]:
    return [values(next(images)[0]) for _ in range(count)]


def joined(batches: list[list[int]]) -> list[int]:
    return [value for batch in batches for value in batch]


def test_every_image_comes_once_per_epoch_and_no_tail_is_dropped(tmp_path: Path) -> None:
    sequence = joined(take(stream(numbered(tmp_path, 11), 4), 33))
    epochs = [sequence[i : i + 11] for i in range(0, 132, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12


def test_the_sequence_does_not_depend_on_the_batch_size_nor_on_the_container(tmp_path: Path) -> None:
    folder, packed = numbered(tmp_path, 11), numbered(tmp_path, 11, as_zip=True)
    sequence = joined(take(stream(folder, 1, seed=5), 60))
    for batch_size in (2, 5, 11):
        got = joined(take(stream(packed, batch_size, seed=5), 60 // batch_size))
        assert got == sequence[: len(got)]
    assert joined(take(stream(folder, 1, seed=6), 60)) != sequence


@pytest.mark.parametrize("deterministic", [False, True])
def test_ranks_share_the_global_batch(tmp_path: Path, deterministic: bool) -> None:
    folder = numbered(tmp_path, 11)
    options = {"deterministic": deterministic, "random_crop": True, "random_flip": True, "class_cond": True}
    alone = stream(folder, 6, **options)
    ranks = [stream(folder, 2, rank=rank, world_size=3, **options) for rank in range(3)]
    for _ in range(8):
        images, cond = next(alone)
        parts = [next(part) for part in ranks]
        assert th.equal(images, th.cat([part[0] for part in parts]))
        assert th.equal(cond["y"], th.cat([part[1]["y"] for part in parts]))
    assert all(part.state_dict() == alone.state_dict() for part in ranks)


def test_deterministic_is_the_order_of_the_names_again_and_again(tmp_path: Path) -> None:
    files = {f"{i:03}.png": pixel(i) for i in range(5)}
    assert take(stream(write(tmp_path, files), 2, deterministic=True), 5) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


@pytest.mark.parametrize("deterministic", [False, True])
def test_resuming_anywhere_is_going_on(tmp_path: Path, deterministic: bool) -> None:
    folder = write(tmp_path, {f"{i:02}.png": encoded(noise(9, 7, seed=i)) for i in range(7)})
    options = {"deterministic": deterministic, "random_crop": True, "random_flip": True}
    straight = stream(folder, 3, **options)
    batches = [next(straight)[0] for _ in range(12)]
    for position in (0, 1, 2, 3, 7):
        before, resumed = stream(folder, 3, **options), stream(folder, 3, **options)
        for _ in range(position):
            next(before)
        resumed.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
        assert resumed.state_dict() == {"batches": position, "images": 3 * position}
        assert all(th.equal(next(resumed)[0], batch) for batch in batches[position:])
    straight.load_state_dict({"batches": 1})  # a running stream can go back
    assert th.equal(next(straight)[0], batches[1])


def test_another_batch_size_goes_on_with_the_next_image(tmp_path: Path) -> None:
    folder = numbered(tmp_path, 11)
    sequence = joined(take(stream(folder, 1), 30))
    old, new = stream(folder, 3), stream(folder, 2, rank=1, world_size=2)
    take(old, 4)
    new.load_state_dict(old.state_dict())
    assert joined(take(new, 3)) == sequence[14:16] + sequence[18:20] + sequence[22:24]


@pytest.fixture
def spawn() -> Iterator[None]:
    """Processes that inherit nothing: what they need is pickled."""
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(None, force=True)


@pytest.mark.usefixtures("spawn")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    """What they hold ready does not count as taken."""
    files = {f"{i:02}.png": encoded(noise(9, 7, seed=i)) for i in range(7)}
    packed = write(tmp_path, files | {"labels.csv": csv_file(*[f"{i:02}.png,{i}" for i in range(7)])}, as_zip=True)
    options = {"random_crop": True, "random_flip": True, "class_cond": True}
    here, there = stream(packed, 3, **options), stream(packed, 3, num_workers=workers, **options)
    for step in range(8):
        (images, cond), (other_images, other_cond) = next(here), next(there)
        assert th.equal(images, other_images)
        assert th.equal(cond["y"], other_cond["y"])
        assert here.state_dict() == there.state_dict() == {"batches": step + 1, "images": 3 * step + 3}
    for images in (here, there):
        images.load_state_dict({"batches": 2})
    assert all(th.equal(next(here)[0], next(there)[0]) for _ in range(3))
    assert len(multiprocessing.active_children()) == workers
    there.close()
    assert multiprocessing.active_children() == []
    there.num_workers = 0
    assert th.equal(next(here)[0], next(there)[0])


def test_the_stream_leaves_all_global_generators_alone(tmp_path: Path) -> None:
    folder = numbered(tmp_path, 5)

    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist()

    before = states()
    take(stream(folder, 2, random_crop=True, random_flip=True), 4)
    assert states() == before


def test_augmentation_differs_between_epochs_and_seeds(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.png": encoded(noise(40, 40))})
    options = {"random_crop": True, "image_size": 16}
    images = stream(folder, 1, **options)
    crops = [next(images)[0] for _ in range(8)]
    assert len({crop.numpy().tobytes() for crop in crops}) >= 7
    other = next(stream(folder, 1, seed=1, **options))[0]
    assert not th.equal(other, crops[0])


def test_flips_mirror_half_of_the_images(tmp_path: Path) -> None:
    array = noise(4, 4)
    images = stream(write(tmp_path, {"a.png": encoded(array)}), 1, random_flip=True)
    upright = th.from_numpy(array.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    drawn = [next(images)[0][0] for _ in range(200)]
    mirrored = [th.equal(image, upright.flip(-1)) for image in drawn]
    assert all(flip or th.equal(image, upright) for flip, image in zip(mirrored, drawn, strict=True))
    assert 70 <= sum(mirrored) <= 130  # 200 fair coins: 100 +- 7


def test_an_index_draws_from_the_module_random(tmp_path: Path) -> None:
    """Foreign loaders index with numbers: crop first, then the coin for the flip."""
    array = noise(20, 30)
    path = save(tmp_path / "a.png", Image.fromarray(array))
    dataset = ImageDataset(8, [path], [4], random_crop=True)
    for seed in range(4):
        random.seed(seed)
        crop = random_crop_arr(Image.fromarray(array), 8)
        crop = crop[:, ::-1] if random.random() < 0.5 else crop
        random.seed(seed)
        image, label = dataset[0]
        np.testing.assert_array_equal(image, crop.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
        assert label["y"].dtype == np.int64
        assert label["y"] == 4


def test_shards_of_a_data_set(tmp_path: Path) -> None:
    paths = _list_image_files_recursively(numbered(tmp_path, 7))
    shards = [ImageDataset(4, paths, list(range(7)), shard, 3) for shard in range(3)]
    assert [shard.local_classes for shard in shards] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    loader = th.utils.data.DataLoader(shards[1], batch_size=2)
    images, cond = next(iter(loader))
    assert images.shape == (2, 3, 4, 4)
    assert cond["y"].tolist() == [1, 4]


STREAM_ERRORS = {
    "one batch": ({"batch_size": 4}, "3 images are fewer than one global batch of 4 .*set batch_size to at most 3"),
    "two ranks": (
        {"batch_size": 2, "world_size": 2, "rank": 0},
        r"\(batch_size 2 on 2 ranks\); set batch_size to at most 1",
    ),
    "many ranks": ({"batch_size": 1, "world_size": 5, "rank": 4}, "start at most 3 ranks"),
    "in order": ({"batch_size": 9, "deterministic": True}, "fewer than one global batch of 9"),
    "nothing": ({"batch_size": 0}, "batch_size 0 on rank 0 of 1: give 1 or more"),
    "workers": ({"batch_size": 1, "num_workers": -1}, "num_workers -1 must not be negative"),
    "rank": ({"batch_size": 1, "rank": 2, "world_size": 2}, "batch_size 1 on rank 2 of 2"),
    "seed": ({"batch_size": 1, "seed": -1}, "seed -1 and num_workers 0 must not be negative"),
    "fit": ({"batch_size": 1, "fit": "foo"}, "fit must be one of crop, pad, squash, got 'foo'"),
    "shuffle": ({"batch_size": 1, "shuffle": "foo"}, "'foo' is no way to shuffle: write all, shards or shards:16"),
    "balance": ({"batch_size": 1, "balance": "foo"}, "balance must be one of '', classes, got 'foo'"),
    "size": ({"batch_size": 1, "image_size": "4by4"}, "'4by4' is not a size"),
}


@pytest.mark.parametrize("name", STREAM_ERRORS)
def test_streams_that_cannot_be(tmp_path: Path, name: str) -> None:
    options, words = STREAM_ERRORS[name]
    with pytest.raises(ValueError, match=words):
        stream(numbered(tmp_path, 3), **options)


def test_places_without_images(tmp_path: Path) -> None:
    (tmp_path / "not.zip").write_bytes(b"hello")
    empty = write(tmp_path, {"a.txt": b"", "b.txt": b"", "c.mp4": b""})
    pictures = numbered(tmp_path / "pictures", 1)
    cases = {
        "": "data_dir '' does not exist: give a folder, a zip, a tar",
        str(tmp_path / "gone"): "gone' does not exist: give a folder, a zip, a tar",
        str(tmp_path / "nto.zip"): "nto.zip' does not exist; did you mean not.zip?",
        f"{pictures}/a_000.png": "a_000.png' is a single picture: give its folder",
        f"{empty}/c.mp4": "c.mp4' is none of the kinds that are read: give a folder, a zip, a tar",
        str(tmp_path / "not.zip"): "is not a readable zip",
        f"{empty}/a.txt": "names nothing: name shards such as",
        empty: r"holds no images, skipped 3 \(.mp4: 1, .txt: 2\); readable are jpg jpeg png",
    }
    for data_dir, words in cases.items():
        with pytest.raises(ValueError, match=words):
            stream(data_dir, 1)


def test_superres_pairs_are_means_of_blocks(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"a_{i}.png": encoded(noise(16, 24, seed=i)) for i in range(4)})
    options = {"random_flip": False, "log": lambda line: None}
    pairs = load_superres_data(folder, 2, (16, 24), "4x8", class_cond=True, **options)
    plain = stream(folder, 2, image_size=(16, 24), class_cond=True)
    for _ in range(3):
        (large, cond), (expected, labels) = next(pairs), next(plain)
        assert th.equal(large, expected)
        assert th.equal(cond["y"], labels["y"])
        th.testing.assert_close(cond["low_res"], large.unflatten(3, (8, 3)).unflatten(2, (4, 4)).mean((3, 5)))
    resumed = load_superres_data(folder, 2, (16, 24), "4x8", class_cond=True, **options)
    resumed.load_state_dict(pairs.state_dict())
    assert th.equal(next(resumed)[1]["low_res"], next(pairs)[1]["low_res"])
    with pytest.raises(ValueError, match="small_size 32 exceeds large_size 16"):
        load_superres_data(folder, 1, 16, 32, **options)


def test_the_emoji() -> None:
    lines: list[str] = []
    images = stream(EMOJI, 256, image_size=64, class_cond=True, log=lines.append)
    assert lines[0] == f"{EMOJI}: found 3812 images, skipped 2 (.json: 1, .txt: 1)"
    assert images.class_table() == [(i, name, count) for i, (name, count) in enumerate(EMOJI_COUNTS.items())]
    batch, cond = next(images)
    assert batch.shape == (256, 3, 64, 64)
    assert batch.min() >= -1
    assert batch.max() == 1
    assert (batch[:, :, 0, 0] == 1).all(1).float().mean() > 0.5  # they are drawn on white
    assert set(cond["y"].tolist()) == set(range(9))
    (listing,) = [find_images(EMOJI)]
    styles = [name.split("_")[1].split("-")[0] for name in listing.images]
    assert (styles.count("google"), styles.count("twitter")) == (1906, 1906)


@pytest.mark.slow
def test_every_emoji_is_readable_and_captioned() -> None:
    dataset = stream(EMOJI, 1, image_size=64).dataset
    for index in range(len(dataset)):
        dataset.take_crop((0, index))
    with zipfile.ZipFile(EMOJI) as archive:
        captions = json.loads(archive.read("captions.json"))
        licence = archive.read("LICENSE.txt").decode()
    assert {f"{EMOJI}/{name}" for name in captions} == set(dataset.local_images)
    for words in ("Noto Emoji", "Apache License 2.0", "Twemoji", "CC-BY 4.0"):
        assert words in licence
        assert words in (Path(EMOJI).parent / "README.md").read_text()
