"""Files made to do harm: none runs a command, fills memory or disk, hangs, or ends in anything but a sentence."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image
from refusals import sentence_of
from runs import load_weights

from guided_diffusion.commands import flags as cli, image_sample
from guided_diffusion.commands.conditioning import read_base
from guided_diffusion.config import DiffusionConfig, UNetConfig
from guided_diffusion.data import crops, decoding, sources
from guided_diffusion.data.init_images import InitImages
from guided_diffusion.data.labels import read_labels
from guided_diffusion.data.sources import UnreadableImage, find_images, read_image
from guided_diffusion.image_datasets import ImageDataset, ImageStream, load_data
from guided_diffusion.networks.architecture import architecture
from guided_diffusion.runtime import files as untrusted
from guided_diffusion.runtime.labels import parse_classes
from guided_diffusion.runtime.npz import holds, read_npz, save_npz
from guided_diffusion.runtime.pictures import save_grid
from guided_diffusion.script_util import build_unet
from guided_diffusion.training import checkpoints

ROOT = Path(__file__).parents[2]
MIB = 2**20


def png(value: int = 7, size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(file, "png")
    return file.getvalue()


def stream(data_dir: Path, batch_size: int = 1, **options: Any) -> ImageStream:
    return load_data(
        data_dir=str(data_dir),
        **{"batch_size": batch_size, "image_size": 4, "random_flip": False, "log": lambda line: None, **options},
    )


def peak(call: Callable[[], Any]) -> int:
    """Bytes that Python and numpy held at most during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


TEXTS: dict[str, dict[str, tuple[str | bytes, str]]] = {}  # file -> case -> its content, words of the answer
TEXTS["dataset.json"] = {
    "deep": ('{"labels":' + "[" * 100_000, "recursion depth"),
    "deep objects": ('{"a":' * 100_000, "recursion depth"),
    "not UTF-8": (b'{"labels":[["\xff",0]]}', "can't decode byte 0xff in position 13"),
    "path is a list": ('{"labels":[[["a.png"],0]]}', "1 of 1 images have no label"),
    "path is a number": ('{"labels":[[1,0]]}', "1 of 1 images have no label"),
    "5000 digits": ('{"labels":[["a.png",' + "9" * 5000 + "]]}", "digits"),
    "5000 digits in text": ('{"labels":[["a.png","' + "9" * 5000 + '"]]}', "a name of more than 1000 characters"),
    "2^63": ('{"labels":[["a.png",9223372036854775808]]}', "does not fit num_classes"),
    "not a number": ('{"labels":[["a.png",NaN]]}', "neither a class id nor a name"),
    "infinite": ('{"labels":[["a.png",1e999]]}', "neither a class id nor a name"),
    "two labels": ('{"labels":[["a.png",0],["a.png",1]]}', "'a.png' has two labels, 0 and 1"),
    "surrogate": ('{"labels":[["a.png","\\ud800"]]}', "a name that is no text"),
    "long name": ('{"labels":[["a.png","' + "x" * 2000 + '"]]}', "a name of more than 1000 characters"),
    "list": ("[]", "it is not"),
    "null": ("null", "it is not"),
    "number": ('{"labels":5}', "it is not"),
    "text": ('{"labels":"ab"}', "it is not"),
    "empty": ("", "it is not"),
    "cut": ('{"labels":[["a.png"', "it is not"),
    "truth": ('{"labels":[["a.png",true]]}', "neither"),
}
TEXTS["labels.csv"] = {
    "long field": ('file,label\na.png,"' + "x" * 200_000 + '"\n', "field larger"),
    "not UTF-8": (b"file,label\n\xff,0\n", "no table of UTF-8 text"),
    "open quote": ('file,label\n"a.png,0', "is not 'file,label'"),
    "5000 digits": ("file,label\na.png," + "1" * 5000, "a name of more than 1000 characters"),
    "two labels": ("file,label\na.png,0\na.png,1", "two labels"),
    "control characters": ("file,label\n\x1b[2J\n", "is not 'file,label'"),
}
TEXTS["classes.json"] = {
    name: (content, "is no table of classes")
    for name, content in {
        "text": '{"classes":"abc"}',
        "deep": '{"classes":' + "[" * 100_000,
        "rule of no type": '{"classes":["a"],"class_from":[1]}',
        "twice": '{"classes":["a","a"]}',
        "not UTF-8": b"\xff\xfe",
        "number": "3",
        "no names": '{"classes":[[1],{"a":2}]}',
        "null": '{"classes":[null]}',
    }.items()
}
TEXTS["classes.json"]["unknown rule"] = ('{"classes":["a"],"class_from":"nope"}', "class_from must be one of")
TEXTS["config.json"] = {
    "deep": ('{"flags":' * 100_000, "recursion depth"),
    "list": ("[]", "is no config of a run"),
    "pairs": ('{"flags":["ab","cd"]}', "is no config of a run"),
    "not UTF-8": (b'{"flags":{"a":"\xff"}}', "can't decode byte"),
    "not a number": ('{"flags":{"dropout":NaN}}', "dropout nan, which cannot be used"),
    "infinite": ('{"flags":{"min_snr_gamma":1e999}}', "not a finite number"),
    "negative": ('{"flags":{"num_channels":-5}}', "below the least value, 1"),
    "huge": ('{"flags":{"num_res_blocks":1000000000}}', "above the greatest value, 100"),
    "no choice": ('{"flags":{"noise_schedule":"x"}}', "'x' is none of linear"),
    "wrong type": ('{"flags":{"num_channels":[1]}}', "should be of type int"),
    "truth for a number": ('{"flags":{"num_channels":true}}', "should be of type int"),
    "size": ('{"flags":{"image_size":"0x0"}}', "is not a size"),
}


def flags_beside(path: Path) -> dict[str, Any]:
    saved = checkpoints.config_beside(str(path))
    return dict(cli.Flags("image_sample", {}, {}).over(saved, UNetConfig, DiffusionConfig).saved)


def labelled(folder: Path) -> list[int]:
    (folder / "a.png").write_bytes(png())
    return read_labels(find_images(str(folder))).ids


def classed(folder: Path) -> list[int]:
    (folder / "a_1.png").write_bytes(png())
    return read_labels(find_images(str(folder)), "auto", str(folder / "classes.json")).ids


READERS: dict[str, Callable[[Path], Any]] = {
    "dataset.json": labelled,
    "labels.csv": labelled,
    "classes.json": classed,
    "config.json": lambda folder: flags_beside(folder / "model000001.pt"),
}


@pytest.mark.parametrize(("file", "case"), [(file, case) for file, cases in TEXTS.items() for case in cases])
def test_text_files(tmp_path: Path, file: str, case: str) -> None:
    content, words = TEXTS[file][case]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(words, sentence_of(READERS[file], tmp_path))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_system(tmp_path: Path, end: str) -> None:
    (tmp_path / "labels.csv").write_bytes(f"\ufefffile,label{end}a.png,3{end}".encode())
    assert labelled(tmp_path) == [3]


def test_saved_defaults_are_taken_whatever_the_least_value_is(tmp_path: Path) -> None:
    flags = {name: spec.default for name, spec in cli.COMMANDS["image_sample"].flags().items()}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}))
    assert flags_beside(tmp_path)["num_head_channels"] == -1


@pytest.mark.parametrize("text", ["--5", "9" * 5000, "\u0663-", "-", "1.5", "\x1b[2J"])
def test_class_words(text: str) -> None:
    sentence_of(parse_classes, text, 10)


def test_what_is_no_file_is_passed_over_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.png").write_bytes(png(9))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "device.png")
    os.symlink("nowhere", tmp_path / "dangling.png")
    os.symlink("itself.png", tmp_path / "itself.png")
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
        listing = find_images(str(tmp_path))
    assert listing.images == ["good.png"]
    assert [name for name, _ in listing.refused] == [
        *["dangling.png", "device.png", "itself.png", "pipe.png", "socket.png"]
    ]
    lines = listing.summary(shown=4).split("\n")
    assert "found 1 images, skipped 5 (cannot be read (Too many levels of symbolic links): 1" in lines[0]
    assert "no regular file: 4)" in lines[0]
    assert lines[1] == "  skipped 'dangling.png': no regular file"
    assert lines[-1] == "  and 1 more that are not taken"


def test_a_pipe_in_place_of_any_file_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("a.png", "a.npy", "a.pt", "a.npz", "a.safetensors", "config.json", "classes.json", "request.json"):
        os.mkfifo(tmp_path / name)
    path = lambda name: str(tmp_path / name)  # noqa: E731
    for name in ("a.png", "a.npy"):
        assert "no regular file" in sentence_of(read_image, path(name), 3)
    assert "no regular file" in sentence_of(InitImages(path("a.png"), 4, 3).check, 1)
    for name in ("a.pt", "a.safetensors"):
        assert "cannot be read as a checkpoint" in sentence_of(checkpoints.load, path(name))
    assert "no regular file" in sentence_of(checkpoints.config_beside, path("a.pt"))
    assert "no regular file" in sentence_of(read_base, base_flags(path("a.npz")))
    assert "no regular file" in sentence_of(lambda: list(read_npz(path("a.npz"), "arr_0", 1)))


@pytest.mark.parametrize("target", [".", "..", "../cats"])
def test_circles_of_links_end(tmp_path: Path, target: str) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.png").write_bytes(png())
    os.symlink(target, tmp_path / "cats" / "again")
    os.symlink(target, tmp_path / "cats" / "and again")
    listing = find_images(str(tmp_path))
    assert listing.images == ["cats/1.png"]
    assert {reason for _, reason in listing.refused} == {"a link to a folder that is read already"}


def test_many_ways_to_one_place_are_one(tmp_path: Path) -> None:
    """2^30 paths, one picture; its own name is the one that counts, not that of a link that comes first."""
    for level in range(30):
        (tmp_path / f"d{level:02}").mkdir()
        os.symlink(f"../d{level + 1:02}", tmp_path / f"d{level:02}" / "x")
        os.symlink(f"../d{level + 1:02}", tmp_path / f"d{level:02}" / "y")
    (tmp_path / "d30").mkdir()
    (tmp_path / "d30" / "1.png").write_bytes(png())
    assert find_images(str(tmp_path)).images == ["d30/1.png"]
    assert find_images(str(tmp_path / "d00")).images == ["/".join(["x"] * 30) + "/1.png"]


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "deep" / "1.png").write_bytes(png())
    os.symlink("../store", tmp_path / "data" / "link")
    assert find_images(str(tmp_path / "data")).images == ["link/deep/1.png"]


@pytest.fixture
def descend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """Makes folders within folders and goes there; takes them down again, which pytest itself cannot."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def go(name: str, depth: int) -> None:
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
            made.append(name)

    yield go
    for entry in os.listdir("."):
        os.remove(entry)
    for name in reversed(made):
        os.chdir("..")
        os.rmdir(name)


def test_folders_deeper_than_python_can_recurse(tmp_path: Path, descend: Callable[[str, int], None]) -> None:
    descend("d", 1200)
    Path("1.png").write_bytes(png())
    assert find_images(str(tmp_path)).images == ["d/" * 1200 + "1.png"]


def test_a_path_longer_than_the_system_takes(tmp_path: Path, descend: Callable[[str, int], None]) -> None:
    (tmp_path / "1.png").write_bytes(png())
    descend("d" * 200, 30)
    listing = find_images(str(tmp_path))
    assert listing.images == ["1.png"]
    assert [reason for _, reason in listing.refused] == ["a folder that cannot be read (File name too long)"]
    sentence_of(find_images, "x" * 5000)


def test_unreadable_folders_are_passed_over_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png())
    scandir = os.scandir

    def refuse(path: str) -> Any:  # what the system says to all but root
        if str(path).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = find_images(str(tmp_path))
    assert listing.images == ["good/1.png"]
    assert listing.refused == [("locked/", "a folder that cannot be read (Permission denied)")]
    assert "Permission denied" in sentence_of(find_images, str(tmp_path / "locked"))


def test_names_in_any_script_are_taken_and_what_is_no_text_is_not(tmp_path: Path) -> None:
    names = [
        "\u732b_1.png",
        "\u05d7\u05ea\u05d5\u05dc_1.png",
        "\U0001f408_1.png",
        "new\nline\x1b[2J_1.png",
        "a b'\"_1.png",
    ]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(png(number))
    with open(os.fsencode(str(tmp_path)) + b"/\xff_1.png", "wb") as file:
        file.write(png())
    lines: list[str] = []
    images = stream(tmp_path, len(names), class_cond=True, log=lines.append)
    assert sorted(images.classes) == sorted(name.partition("_")[0] for name in names)
    next(images)
    assert images.labels is not None
    text = "\n".join(lines)
    assert "a name that is no text: 1" in text
    assert "\x1b" not in text
    assert "class 2: 'new\\nline\\x1b[2J' (1 images)" in text or "'new\\nline\\x1b[2J'" in text
    save_grid(str(tmp_path / "grid.png"), np.zeros((len(names), 4, 4, 3), np.uint8), 1, names)


def packed(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def patched(path: Path, **values: tuple[int, bytes]) -> Path:
    """Overwrite bytes of the first entry of the directory (name -> (offset, bytes)); `local` is of the member."""
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\1\2")
    for name, (offset, new) in values.items():
        start = offset + (0 if name == "local" else entry)
        content[start : start + len(new)] = new
    path.write_bytes(content)
    return path


ENCRYPTED = {"local": (6, b"\1"), "entry": (8, b"\1")}


def test_members_that_are_not_taken(tmp_path: Path) -> None:
    foreign = ["../1.png", "a/../../1.png", "/etc/1.png", "C:\\1.png", "\\\\server\\1.png", "..\\2.png"]
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that comes twice
        for name in [*foreign, "good.png", "good.png", "x" * 1001 + ".png"]:
            archive.writestr(name, png(len(archive.namelist())))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    listing = find_images(str(path))
    assert listing.images == ["good.png"]
    reasons = dict(listing.refused)
    assert {reasons[name.replace("\\", "/")] for name in foreign} == {"a path that leads out of the zip"}
    assert reasons["good.png"] == "of the same name as a later one"
    assert reasons["link.png"] == "a link"
    assert np.asarray(read_image(f"{path}/good.png", 3))[0, 0, 0] == 7  # the later one, as zipfile itself takes it
    before = sorted(tmp_path.rglob("*"))
    assert "out of the zip" in sentence_of(read_image, f"{path}/../1.png", 3)
    assert sorted(tmp_path.rglob("*")) == before


def test_encrypted_members(tmp_path: Path) -> None:
    path = patched(packed(tmp_path / "a.zip", {"1.png": png(), "2.png": png()}), **ENCRYPTED)
    listing = find_images(str(path))
    assert (listing.images, listing.refused) == (["2.png"], [("1.png", "encrypted")])
    assert "encrypted" in sentence_of(read_image, f"{path}/1.png", 3)
    labels = patched(packed(tmp_path / "b.zip", {"dataset.json": b"{}", "2.png": png()}), **ENCRYPTED)
    assert "encrypted" in sentence_of(read_labels, find_images(str(labels)))  # never another rule in silence


@pytest.mark.parametrize("name", ["version", "UTF-8", "cut", "method", "text", "empty", "offset"])
def test_damaged_zips(tmp_path: Path, name: str) -> None:
    path = packed(tmp_path / "a.zip", {"\u00e9.png": png()})
    content = path.read_bytes()
    if name in ("version", "method", "offset"):
        places = {"version": (6, b"\xff"), "method": (10, b"\x63"), "offset": (42, b"\xff\xff\xff\x7f")}
        patched(path, entry=places[name])
    else:
        broken = {
            "UTF-8": content.replace("\u00e9".encode(), b"\xff\xfe"),
            "cut": content[:-10],
            "text": b"PK",
            "empty": b"",
        }
        path.write_bytes(broken[name])
    sentence_of(lambda: next(stream(path)))


def test_bombs_are_seen_before_they_are_unpacked(tmp_path: Path) -> None:
    bomb, size = bytes(untrusted.LARGE_MEMBER + 1), untrusted.LARGE_MEMBER + 1
    path = packed(tmp_path / "a.zip", {"1.png": bomb})
    del bomb
    listing = find_images(str(path))
    assert (listing.images, listing.refused) == ([], [("1.png", "unpacks to too many bytes")])
    assert path.stat().st_size < size / untrusted.MAX_RATIO
    assert peak(lambda: sentence_of(read_image, f"{path}/1.png", 3)) < MIB
    # and where the directory lies, no more than the small size it claims is kept
    patched(path, entry=(24, struct.pack("<I", 10)))
    assert find_images(str(path)).images == ["1.png"]
    assert peak(lambda: sentence_of(read_image, f"{path}/1.png", 3)) < MIB


def test_files_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(untrusted.MAX_BYTES + 1)
    assert peak(lambda: sentence_of(read_image, str(tmp_path / "sparse.png"), 3)) < MIB
    monkeypatch.setattr(untrusted, "MAX_BYTES", 1000)
    stored = packed(tmp_path / "a.zip", {"1.png": os.urandom(1001), "2.png": png()}, zipfile.ZIP_STORED)
    assert find_images(str(stored)).images == ["2.png"]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9460, 9460), (10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (1, 2**30)])
def test_pictures_of_too_many_pixels_cost_nothing(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "1.png").write_bytes(png_header(*size))
    text = ""

    def read() -> None:
        nonlocal text
        text = sentence_of(read_image, str(tmp_path / "1.png"), 3)

    assert peak(read) < MIB
    assert "pixels" in text
    assert str(crops.MAX_PIXELS) in text


def test_the_limit_of_pixels_is_the_largest_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 12)
    (tmp_path / "1.png").write_bytes(png(size=(4, 3)))
    (tmp_path / "2.png").write_bytes(png(size=(13, 1)))
    read_image(str(tmp_path / "1.png"), 3)
    assert "13 x 1 pixels" in sentence_of(read_image, str(tmp_path / "2.png"), 3)
    np.save(tmp_path / "3.npy", np.zeros((13, 1), np.uint8))
    sentence_of(read_image, str(tmp_path / "3.npy"), 3)


def test_long_thin_pictures_are_not_blown_up(tmp_path: Path) -> None:
    """1 x 1,000,000 pixels would be 256 x 256,000,000 where they cover 256 x 256."""
    Image.new("1", (1_000_000, 1)).save(tmp_path / "1.png")
    assert "long and thin" in sentence_of(lambda: next(stream(tmp_path, image_size=256)))
    assert "long and thin" in sentence_of(InitImages(str(tmp_path / "1.png"), 256, 3).check, 1)


def test_what_is_named_like_a_picture_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript, an interpreter: here it is not even opened."""
    import subprocess

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("started a program")

    for function in ("Popen", "check_call", "call", "run", "check_output"):
        monkeypatch.setattr(subprocess, function, refuse)
    (tmp_path / "1.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    assert "its content is no image" in sentence_of(read_image, str(tmp_path / "1.png"), 3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_a_name_may_say_another_format(tmp_path: Path, kind: str) -> None:
    for extension in sources.IMAGE_EXTENSIONS:
        if extension != ".npy":
            Image.new("RGB", (4, 4), (200, 200, 200)).save(tmp_path / f"1{extension}", kind)
            np.testing.assert_allclose(np.asarray(read_image(str(tmp_path / f"1{extension}"), 3)), 200, atol=3)


U8 = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}\n"
HEADERS = {
    "a tera": U8 % "(1000000000000, 4, 3)",
    "a giga": U8 % "(1000000, 1000, 3)",
    "negative": U8 % "(-1, 4, 3)",
    "nothing": U8 % "(0, 4, 3)",
    "truth": U8 % "(True, 1, 3)",
    "overflow": U8 % "(4294967296, 4294967296, 4)",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 3)}\n",
    "records": "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (4, 4, 3)}\n",
    "dates": "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1, 2, 3)}\n",
    "no bytes": "{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000, 1, 3)}\n",
    "deep": "(" * 9000,
    "long": "x" * 20_000,
    "empty": "",
    "a call": "__import__('os').system('touch canary')",
}


def npy(header: str, content: bytes = bytes(48)) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + content


def base_flags(path: str | Path) -> cli.Flags:
    return cli.Flags("super_res_sample", {"base_samples": str(path), "small_size": 4}, {})


@pytest.mark.parametrize("name", HEADERS)
def test_array_headers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.npy").write_bytes(npy(HEADERS[name]))
    packed(tmp_path / "1.npz", {"arr_0.npy": npy(HEADERS[name])})
    assert peak(lambda: sentence_of(read_image, "1.npy", 3)) < 4 * MIB
    assert peak(lambda: sentence_of(read_base, base_flags("1.npz"))) < 4 * MIB
    assert not holds("1.npz", ((1, 4, 4, 3), np.uint8))
    assert not Path("canary").exists()


def test_what_is_not_asked_for_is_not_unpacked(tmp_path: Path) -> None:
    rows = npy(U8 % "(1000, 4, 4, 3)", bytes(48_000))
    path = packed(tmp_path / "1.npz", {"arr_0.npy": rows, "junk.npy": npy(U8 % "(48000000,)", bytes(48_000_000))})
    flags = cli.Flags("super_res_sample", {**base_flags(path).given, "num_samples": 7}, {})
    assert peak(lambda: read_base(flags)) < 4 * MIB
    assert read_base(flags).pixels.shape == (7, 4, 4, 3)


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "1.npz"
    save_npz(str(path), np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3))
    whole = path.read_bytes()
    read_base(base_flags(path))
    for content in (b"", b"PK", b"hello", whole[:-5], whole[: len(whole) // 2]):
        path.write_bytes(content)
        sentence_of(read_base, base_flags(path))
    path.write_bytes(whole)
    patched(path, **ENCRYPTED)
    sentence_of(read_base, base_flags(path))
    path.write_bytes(whole.replace(bytes(range(20, 30)), bytes(10)))  # its checksum tells
    sentence_of(read_base, base_flags(path))
    assert "holds no arr_7, but arr_0" in sentence_of(lambda: list(read_npz(str(path), "arr_7", 1)))
    np.savez(path, np.float32(3))
    sentence_of(lambda: list(read_npz(str(path), "arr_0", 1)))
    array = np.arange(6.0).reshape(2, 3)
    np.savez(path, np.asfortranarray(array))  # rows of it do not lie together
    np.testing.assert_array_equal(np.concatenate(list(read_npz(str(path), "arr_0", 1))), array)


def test_arrays_in_the_order_of_fortran_are_pictures_all_the_same(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 4), np.uint8).T
    np.save(tmp_path / "1.npy", array)
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / "1.npy"), 1)), array)


class Command:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def pickled_files(folder: Path) -> list[Path]:
    import pickle

    (folder / "plain.pt").write_bytes(pickle.dumps(Command(), protocol=2))
    th.save({"weight": Command()}, folder / "saved.pt")
    th.save([th.zeros(2), {"nested": (Command(),)}], folder / "nested.pt")
    th.save({"weight": Command()}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "named.safetensors").write_bytes(pickle.dumps(Command(), protocol=2))
    return sorted(folder.glob("*.*"))


def test_no_pickle_runs_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = pickled_files(tmp_path)
    assert len(paths) == 5
    for path in paths:
        assert "cannot be read as a checkpoint" in sentence_of(checkpoints.load, str(path))
        sentence_of(load_weights, th.nn.Linear(1, 1), str(path))
    array = np.array([[[Command()]]], object)
    np.save("1.npy", array, allow_pickle=True)
    np.savez("1.npz", arr_0=array)
    sentence_of(read_image, "1.npy", 3)
    sentence_of(read_base, base_flags("1.npz"))
    sentence_of(lambda: list(read_npz("1.npz", "arr_0", 1)))
    assert not Path("canary").exists()
    call, words = Command().__reduce__()  # and the canary can be seen
    call(*words)
    assert Path("canary").exists()


def test_shapes_without_numbers_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "1.pt")
    for tensor in (th.zeros(1).expand(10**6, 10**6), th.empty(10**6, 10**6, device="meta")):
        th.save({"deep": [{"weight": tensor}]}, path)
        assert "cannot be read as a checkpoint" in sentence_of(checkpoints.load, path)
    th.save({"weight": th.arange(10)[2:5], "matrix": th.ones(2, 3).T, "empty": th.zeros(0, 3)}, path)
    assert checkpoints.load(path)["weight"].tolist() == [2, 3, 4]


def test_packed_checkpoints_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    th.save({"weight": th.zeros(2**22)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    path = packed(tmp_path / "bomb.pt", files)
    del files
    assert path.stat().st_size < 2**18
    assert peak(lambda: sentence_of(checkpoints.load, str(path))) < MIB


@pytest.mark.parametrize(
    "content", [struct.pack("<Q", 10**15) + b"{}", struct.pack("<Q", 500_000) + b'{"a":' * 100_000]
)
def test_safetensors_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1.safetensors").write_bytes(content)
    sentence_of(checkpoints.load, str(tmp_path / "1.safetensors"))


def test_a_config_that_asks_for_more_than_the_weights_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network of 4 TiB beside a file of some kilobytes is refused before memory is taken for it."""
    small = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}
    network = build_unet(UNetConfig(**small), False)
    th.save(network.state_dict(), tmp_path / "model000001.pt")
    (tmp_path / "config.json").write_text(json.dumps({"flags": {**small, "num_channels": 2**18}}))
    with pytest.raises(SystemExit) as caught:
        image_sample.main(["--model_path", str(tmp_path), "--log_dir", str(tmp_path / "out"), "--device", "cpu"])
    assert caught.value.code == 2
    assert "the checkpoint has num_channels 32, you gave 262144" in capsys.readouterr().err


NAMES = {
    "time_embed.0.weight": (32, 8),
    "input_blocks.0.0.weight": (8, 3, 3, 3),
    "middle_block.0.out_layers.0.weight": (8,),
    "middle_block.0.emb_layers.1.weight": (16, 32),
    "out.0.weight": (8,),
    "out.2.weight": (3, 8, 3, 3),
}


@pytest.mark.parametrize(
    "more",
    [
        {"output_blocks.99999999999.0.weight": (1,)},
        {"input_blocks.99999999999.0.weight": (1,)},
        {"input_blocks.x.0.weight": (1,)},
        {"input_blocks.1": (1,)},
        {"input_blocks.-1.0.weight": (1,)},
        {"input_blocks.\u00b2.0.weight": (1,), "output_blocks.0.0.w": ()},
        {"time_embed.0.weight": (0, 0), "input_blocks.1.0.in_layers.0.weight": (1,)}
        | {"input_blocks.1.0.out_layers.0.weight": (1,), "output_blocks.0.0.skip.weight": (1,)},
        {"time_embed.0.weight": ()},
        {"out.2.positional_embedding": (3, 0), "out.2.c_proj.weight": (5,)},
        {"input_blocks.0.0.weight": ()},
    ],
)
def test_names_and_shapes_of_no_network(more: dict[str, tuple[int, ...]]) -> None:
    class Shaped:
        def __init__(self, shape: tuple[int, ...]) -> None:
            self.shape = shape

    state: Any = {name: Shaped(shape) for name, shape in {**NAMES, **more}.items()}
    assert isinstance(architecture(state, 64), dict)
    assert peak(lambda: architecture(state)) < MIB


def spoiled(folder: Path, count: int, bad: set[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{'ab'[number % 2]}_{number:03}.png").write_bytes(b"" if number in bad else png(number))
    return folder


def taken(images: ImageStream, batches: int) -> list[tuple[list[int], list[int]]]:
    found = []
    for _ in range(batches):
        batch, cond = next(images)
        found.append((((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist(), cond["y"].tolist()))
    images.close()
    return found


BAD = {3, 4, 11}


def test_skipping_puts_the_same_images_in_their_places_always(tmp_path: Path) -> None:
    """For any number of workers and ranks, and after resuming; all other images stay where they are, labels too."""
    good = taken(stream(spoiled(tmp_path / "good", 16, set()), 4, class_cond=True), 8)
    folder = spoiled(tmp_path / "bad", 16, BAD)
    options: dict[str, Any] = {"class_cond": True, "on_bad_image": "skip"}
    images = stream(folder, 4, **options)
    once = taken(images, 8)
    assert {Path(path).name: reason for path, reason in images.skipped.items()} == {
        f"{'ab'[number % 2]}_{number:03}.png": "it is empty" for number in BAD
    }
    for (values, labels), (whole, whole_labels) in zip(once, good, strict=True):
        assert not BAD & set(values)
        assert labels == [value % 2 for value in values]
        assert [v for v, w in zip(values, whole, strict=True) if w not in BAD] == [w for w in whole if w not in BAD]
        assert len(whole_labels) == 4
    assert taken(stream(folder, 4, num_workers=1, **options), 8) == once
    halves = [taken(stream(folder, 2, rank=rank, world_size=2, **options), 8) for rank in range(2)]
    assert [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*halves, strict=True)] == once
    resumed = stream(folder, 4, **options)
    resumed.load_state_dict({"batches": 3, "images": 12})
    assert taken(resumed, 5) == once[3:]
    assert len({values[whole.index(3)] for (values, _), (whole, _) in zip(once, good, strict=True) if 3 in whole}) > 1


def test_every_skipped_image_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = stream(spoiled(tmp_path / "bad", 8, {1, 2}), 4, class_cond=True, on_bad_image="skip")
    taken(images, 8)
    said = capsys.readouterr()
    assert [(said.out + said.err).count(name) for name in ("b_001.png", "a_002.png")] == [1, 1]
    assert "(2 such so far)" in said.out + said.err


def test_an_error_is_the_rule_and_names_the_way_out(tmp_path: Path) -> None:
    folder = spoiled(tmp_path / "bad", 4, {1})
    text = sentence_of(lambda: list(zip(range(4), stream(folder, 2), strict=False)))
    assert "b_001.png" in text
    assert "set on_bad_image to skip" in text
    assert "must be one of error, skip" in sentence_of(lambda: stream(folder, 2, on_bad_image="skipp"))


def test_nothing_but_bad_images_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    folder = spoiled(tmp_path / "bad", 3, {0, 1, 2})
    assert "cannot read image" in sentence_of(lambda: next(stream(folder, on_bad_image="skip")))


def test_an_index_alone_is_an_error_always(tmp_path: Path) -> None:
    """Likelihoods and starting images are of the image that was named."""
    folder = spoiled(tmp_path / "bad", 3, {1})
    dataset = ImageDataset(4, [str(path) for path in sorted(folder.iterdir())], on_bad_image="skip")
    dataset[0, 2]
    with pytest.raises(UnreadableImage, match="b_001"):
        dataset[2]


SOURCES = [*(ROOT / "guided_diffusion").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
NEVER_CALLED = ["eval", "exec", "compile", "__import__"]
NEVER_USED = {
    "os": ["system", "popen", "execv", "execve", "execvp", "spawnl", "spawnv", "startfile"],
    "pickle": ["load", "loads", "Unpickler"],
    "marshal": ["load", "loads"],
    "shelve": ["open"],
    "subprocess": ["getoutput", "getstatusoutput"],
    "zipfile": ["extract", "extractall"],
    "np": ["load"],
}


def used(tree: ast.AST) -> list[str]:
    """What a syntax tree uses of the above."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NEVER_CALLED:
            found.append(node.func.id)
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in NEVER_USED.get(owner, []) or node.attr in NEVER_USED["zipfile"]:
                found.append(f"{owner}.{node.attr}")
        if (
            isinstance(node, ast.keyword)
            and node.arg in ("shell", "allow_pickle")
            and ast.unparse(node.value) != "False"
        ):
            found.append(node.arg)
        if isinstance(node, ast.keyword) and node.arg == "weights_only" and ast.unparse(node.value) != "True":
            found.append(node.arg)
    return found


def test_the_search_finds_what_it_looks_for() -> None:
    words = ["eval(x)", "os.system(y)", "run(z, shell=True)", "a.extractall()", "f(weights_only=w)", "np.load(p)"]
    assert [len(used(ast.parse(word))) for word in words] == [1] * len(words)
    assert used(ast.parse("ast.literal_eval(x); th.load(p, weights_only=True); run([a], shell=False)")) == []


def test_no_shell_no_eval_no_pickle() -> None:
    allowed = {
        ("guided_diffusion/commands/latents.py", "np.load"),
        ("guided_diffusion/training/sharded_files.py", "pickle.Unpickler"),  # of which find_class is restricted
    }
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in SOURCES}
    assert {(path, name) for path, tree in trees.items() for name in used(tree)} <= allowed
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess."):
                assert isinstance(node.args[0], ast.List), f"{path}: a program is started with a list of words"
