"""Reading images fast: whatever makes it faster, the batches are the same, bit for bit, but for --fast_decode."""

import csv
import io
import os
import random
import signal
import textwrap
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image
from ranks import Nursery

from guided_diffusion import logger
from guided_diffusion.commands.flags import Flags
from guided_diffusion.commands.training import open_streams
from guided_diffusion.config import DiffusionConfig, UNetConfig
from guided_diffusion.data import cache, items, sources
from guided_diffusion.data.archives import Archive
from guided_diffusion.data.conditioning import CondKind, Pairing
from guided_diffusion.data.crops import center_crop_arr, largest_cover, random_crop_arr, shrunk, shrunk_size, size_of
from guided_diffusion.data.sources import UnreadableImage, read_decoded, read_image, read_size
from guided_diffusion.image_datasets import ImageStream, load_data, load_superres_data
from guided_diffusion.runtime import files
from guided_diffusion.runtime.pictures import to_unit
from guided_diffusion.script_util import build_diffusion, build_unet
from guided_diffusion.train_util import TrainLoop

METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflate": zipfile.ZIP_DEFLATED,
}


def waves(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """A smooth picture, which any careful way to shrink it shrinks alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    planes = [np.sin(6 * (rng.normal() * y + rng.normal() * x) + rng.uniform(0, 6)) for _ in range(channels)]
    return ((np.stack(planes, -1) + 1) * 127.5).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return array[..., 0] if channels == 1 else array


def encoded(array: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine pictures, of which none is like another: sizes, proportions, formats."""
    sizes = [(40, 64), (64, 40), (33, 90), (17, 21), (100, 100), (8, 8), (47, 31), (128, 70), (5, 9)]
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate(sizes):
        kind = "jpeg" if index % 3 == 1 else "png"
        (tmp_path / "pictures" / f"{'ab'[index % 2]}_{index}.{kind}").write_bytes(encoded(noise(*size, index), kind))
    return tmp_path / "pictures"


def opened(data_dir: Any, **options: Any) -> ImageStream:
    defaults: dict[str, Any] = {"image_size": 8, "batch_size": 4, "class_cond": True, "log": lambda line: None}
    return load_data(data_dir=str(data_dir), **{**defaults, **options})


def assert_same(one: ImageStream, other: ImageStream, batches: int = 6) -> None:
    """Images and labels of several epochs, bit for bit."""
    for _ in range(batches):
        (images, cond), (others, same) = next(one), next(other)
        assert th.equal(to_unit(images), to_unit(others))
        assert cond.keys() == same.keys()
        assert all(th.equal(cond[name], same[name]) for name in cond)


def zipped(path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in ("a.bin", "\u00e9/\u4e16.bin", "empty"):
            archive.writestr(name, b"" if name == "empty" else name.encode() * 300 + os.urandom(100))
        with archive.open("streamed", "w") as member:  # sizes behind the bytes
            member.write(b"0123456789" * 200)
    return path


def outcome(read: Any, name: str) -> Any:
    try:
        return read(name)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_members_are_what_zipfile_reads(tmp_path: Path, method: int) -> None:
    path = zipped(tmp_path / "a.zip", method)
    (tmp_path / "behind.zip").write_bytes(b"another program" + path.read_bytes())
    for place in (path, tmp_path / "behind.zip"):
        archive = Archive(str(place))
        with zipfile.ZipFile(place) as reference:
            for name in reference.namelist():
                assert archive.read(name) == reference.read(name)
        assert outcome(archive.read, "nothing") == "it is not in the zip"
        archive.close()


@pytest.mark.parametrize("method", METHODS)
def test_of_a_damaged_zip_sound_members_are_read_and_others_refused(tmp_path: Path, method: str) -> None:
    """Wherever a bit is flipped: the content that was packed, or a sentence."""
    rng, path = np.random.default_rng(0), zipped(tmp_path / "a.zip", METHODS[method])
    with zipfile.ZipFile(path) as sound:
        contents = {sound.read(name) for name in sound.namelist()}
    whole, refused = path.read_bytes(), 0
    headers = [place for place in range(len(whole)) if whole[place : place + 2] == b"PK"]
    for number in range(250):
        content = bytearray(whole)
        place = rng.choice(headers) + rng.integers(46) if number % 2 else rng.integers(len(whole))
        content[min(place, len(whole) - 1)] ^= 1 << rng.integers(8)
        (tmp_path / "b.zip").write_bytes(content)
        try:
            archive = Archive(str(tmp_path / "b.zip"))
        except ValueError:
            continue
        for name, _, _ in archive.members():
            found = outcome(archive.read, name)
            assert isinstance(found, str) or found in contents
            refused += isinstance(found, str)
        archive.close()
    assert refused > 30


def test_threads_read_at_once(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", zipfile.ZIP_DEFLATED)
    archive = Archive(str(path))
    with zipfile.ZipFile(path) as reference:
        expected = {name: reference.read(name) for name in reference.namelist()}
    found: list[bool] = []

    def read() -> None:
        found.append(all(archive.read(name) == content for _ in range(20) for name, content in expected.items()))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_many_zips_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are classes, up to a limit."""
    monkeypatch.setattr(sources, "_archives", {})
    content = encoded(noise(4, 4))
    for index in range(100):
        with zipfile.ZipFile(tmp_path / f"{index:03}.zip", "w") as archive:
            archive.writestr("1.png", content)
    paths = [str(tmp_path / f"{index:03}.zip" / "1.png") for index in range(100)]
    for path in paths:
        assert sources.read_bytes(path) == content
    assert len(sources._archives) == 100
    monkeypatch.setattr(sources, "MAX_OPEN_ARCHIVES", 100)
    with zipfile.ZipFile(tmp_path / "last.zip", "w") as archive:
        archive.writestr("1.png", content)
    assert sources.read_bytes(str(tmp_path / "last.zip" / "1.png")) == content
    assert list(sources._archives)[-2:] == [str(tmp_path / f"{name}.zip") for name in ("099", "last")]
    assert len(sources._archives) == 100
    for opened_zip in sources._archives.values():
        opened_zip.close()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_packed_in_other_ways_are_refused(tmp_path: Path, method: int) -> None:
    archive = Archive(str(zipped(tmp_path / "a.zip", method)))
    assert outcome(archive.read, "a.bin") == "neither stored nor deflated"


def test_all_bytes_have_the_bits_of_the_formula() -> None:
    every = np.arange(256, dtype=np.uint8)
    assert to_unit(th.from_numpy(every)).numpy().tobytes() == (every.astype(np.float32) / 127.5 - 1).tobytes()
    floats = th.rand(3)
    assert to_unit(floats) is floats


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bytes_are_the_same_images(folder: Path, channels: int, num_workers: int) -> None:
    options: dict[str, Any] = {"image_channels": channels, "random_crop": True, "image_size": (6, 10)}
    as_bytes = opened(folder, as_bytes=True, num_workers=num_workers, **options)
    images, _ = next(as_bytes)
    assert (images.dtype, images.shape) == (th.uint8, (4, channels, 6, 10))
    as_bytes.load_state_dict({"images": 0})
    assert_same(as_bytes, opened(folder, **options))
    as_bytes.close()


def test_a_batch_with_finer_numbers_is_of_floats(folder: Path) -> None:
    np.save(folder / "a_9.npy", np.linspace(-1, 1, 8 * 8 * 3).reshape(8, 8, 3))
    as_bytes = opened(folder, as_bytes=True, batch_size=5)
    assert {next(as_bytes)[0].dtype for _ in range(6)} == {th.uint8, th.float32}
    as_bytes.load_state_dict({"images": 0})
    assert_same(as_bytes, opened(folder, batch_size=5))


def test_small_versions_are_made_of_the_same_numbers(folder: Path) -> None:
    options: dict[str, Any] = {"cond_aug": 0.5, "log": lambda line: None}
    one, other = (load_superres_data(str(folder), 4, 8, 4, as_bytes=kind, **options) for kind in (True, False))
    assert_same(one, other)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [8, (6, 10), (12, 5)])
def test_crops_of_a_shrunk_picture_are_those_of_the_whole(channels: int, size: Any) -> None:
    for index, shape in enumerate([(64, 64), (33, 90), (171, 40), (7, 9), (16, 20), (100, 21)]):
        whole = Image.fromarray(noise(*shape, index, channels))
        middle = shrunk(whole, size, random_crop=False)
        assert size_of(middle) == shrunk_size(shape, size, random_crop=False)
        assert np.array_equal(center_crop_arr(middle, size), center_crop_arr(whole, size))
        window = shrunk(whole, size, random_crop=True)
        assert size_of(window) == shrunk_size(shape, size, random_crop=True)
        assert window.width * window.height <= whole.width * whole.height
        for seed in range(8):
            crops = [random_crop_arr(one, size, rng=random.Random(seed)) for one in (window, whole)]
            assert np.array_equal(*crops)


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_kept_images_are_the_same_images(folder: Path, channels: int, random_crop: bool) -> None:
    options: dict[str, Any] = {"random_crop": random_crop, "image_channels": channels, "image_size": (8, 6)}
    for fast_decode in (False, True):
        kept = opened(folder, cache_images=True, fast_decode=fast_decode, **options)
        assert_same(kept, opened(folder, fast_decode=fast_decode, **options))


@pytest.mark.parametrize("random_crop", [False, True])
def test_workers_share_what_each_of_them_has_decoded(folder: Path, random_crop: bool) -> None:
    """Once all images were read by someone, the files may go."""
    options: dict[str, Any] = {"random_crop": random_crop, "batch_size": 3}
    kept, plain = opened(folder, cache_images=True, num_workers=2, **options), opened(folder, **options)
    assert_same(kept, plain, batches=9)
    ahead = [next(plain) for _ in range(6)]
    kept.close()
    for path in folder.iterdir():
        path.unlink()
    for images, cond in ahead:
        same, labels = next(kept)
        assert th.equal(same, images)
        assert th.equal(labels["y"], cond["y"])
    kept.close()


def test_an_image_that_cannot_be_read_is_never_kept(folder: Path) -> None:
    for name in ("a_2.png", "b_7.jpeg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    for random_crop in (False, True):
        options: dict[str, Any] = {"on_bad_image": "skip", "random_crop": random_crop}
        kept, plain = (opened(folder, cache_images=kind, **options) for kind in (True, False))
        assert_same(kept, plain)
        assert kept.skipped == plain.skipped
        assert len(kept.skipped) == 2
    with pytest.raises(ValueError, match=r"cannot read image .*(a_2.png|b_7.jpeg)"):
        [next(stream) for stream in [opened(folder, cache_images=True)] for _ in range(3)]


def test_conditioning_images_lie_on_kept_images_as_on_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for path in folder.iterdir():
        mask = np.asarray(read_image(str(path), 1)) // 128 * 255
        (tmp_path / "masks" / path.with_suffix(".png").name).write_bytes(encoded(mask))
    pairing = Pairing(str(tmp_path / "masks"), CondKind("mask", 1), dropout=0.3)
    kept, plain = (opened(folder, pairing=pairing, random_crop=True, cache_images=kind) for kind in (True, False))
    assert_same(kept, plain)


def test_an_exif_tag_behind_the_pixels_is_heeded(tmp_path: Path) -> None:
    """The header promises another size than the picture has, and there is no place for it."""
    exif = Image.Exif()
    exif[0x112] = 6
    content = encoded(noise(40, 90), exif=exif)
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    tail = content.index(b"IEND") - 4
    (tmp_path / "a_1.png").write_bytes(content[:start] + content[end:tail] + content[start:end] + content[tail:])
    assert size_of(read_image(str(tmp_path / "a_1.png"), 3)) == (90, 40)
    options: dict[str, Any] = {"batch_size": 1, "random_crop": True, "image_size": (6, 12)}
    assert_same(opened(tmp_path, cache_images=True, **options), opened(tmp_path, **options))


def test_what_cannot_be_kept_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="pictures of 1, 3 or 4 channels are kept in memory, not of 2"):
        opened(folder, cache_images=True, image_channels=2)


def test_sizes_are_read_from_headers_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(folder / "a_9.npy", np.zeros((12, 30, 3), np.uint8))
    (folder / "b_10.png").write_bytes(b"")
    (folder / "b_11.png").write_bytes(b"text")
    expected = {str(path): size_of(read_image(str(path), 3)) for path in folder.glob("*_?.*")}
    assert len(expected) == 10
    monkeypatch.setattr(sources, "read_bytes", lambda path: pytest.fail(f"all of {path} is read"))
    assert {path: read_size(path) for path in expected} == expected
    for name, said in {"b_10.png": "it is empty", "b_11.png": "no image", "b_12.png": "No such file"}.items():
        with pytest.raises(UnreadableImage, match=said):
            read_size(str(folder / name))
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    with pytest.raises(UnreadableImage, match="larger than 100 bytes"):
        read_size(str(folder / "a_0.png"))


def test_that_sizes_are_read_is_said_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(cache, "read_size", lambda path: lines.append("read") or read_size(path))
    opened(folder, cache_images=True, random_crop=True, log=lines.append)
    first = lines.index("read")
    assert lines[first - 1] == "  reading the sizes of 9 images, which say how much memory they take"
    assert lines.count("read") == 9


@pytest.mark.parametrize("num_workers", [0, 1])
def test_finer_numbers_than_bytes_are_not_kept(folder: Path, num_workers: int) -> None:
    np.save(folder / "a_9.npy", np.zeros((8, 8, 3)))
    kept = opened(folder, cache_images=True, batch_size=10, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"bytes are kept in memory, and image '.*a_9.npy' has finer numbers"):
        next(kept)


def jpeg(path: Path, array: np.ndarray, **options: Any) -> str:
    path.write_bytes(encoded(array, "jpeg", quality=95, **options))
    return str(path)


@pytest.mark.parametrize("turned", [False, True])
def test_jpegs_are_decoded_at_a_part_that_covers_what_is_needed(tmp_path: Path, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x112] = 6 if turned else 1
    path = jpeg(tmp_path / "1.jpg", waves(375, 500), exif=exif)
    for at_least, part in {(375, 500): 1, (188, 10): 1, (187, 250): 2, (64, 64): 4, (46, 62): 8, (1, 1): 8}.items():
        sides = at_least[::-1] if turned else at_least
        picture, size = read_decoded(path, 3, sides)
        expected = (375 // part, 500 // part)
        assert size_of(picture) == (expected[::-1] if turned else expected)
        assert size == ((500, 375) if turned else (375, 500))
    assert size_of(read_decoded(path, 3).picture) == size


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [16, (12, 30)])
def test_fast_crops_are_of_the_same_places(tmp_path: Path, mode: str, size: Any) -> None:
    """Pixels differ a little; the middle, the windows and the flips do not."""
    for index, shape in enumerate([(375, 500), (203, 131), (90, 400)]):
        picture = Image.fromarray(waves(*shape, index)).convert(mode)
        picture.save(tmp_path / f"a_{index}.jpg", quality=95)
    for random_crop in (False, True):
        options: dict[str, Any] = {"batch_size": 3, "random_crop": random_crop, "image_size": size}
        fast, exact = (opened(tmp_path, fast_decode=kind, **options) for kind in (True, False))
        for _ in range(4):
            one, other = next(fast)[0], next(exact)[0]
            assert not th.equal(one, other)
            aside = min(float((one - other.roll(1, dim))[..., 1:, 1:].abs().mean()) for dim in (2, 3))
            assert float((one - other).abs().mean()) < aside / 3


def test_fast_decoding_leaves_other_formats_alone(folder: Path) -> None:
    for path in list(folder.glob("*.jpeg")):
        path.unlink()
    assert_same(opened(folder, fast_decode=True), opened(folder))


def test_a_damaged_jpeg_is_unreadable_at_any_part_of_its_size(tmp_path: Path) -> None:
    path = Path(jpeg(tmp_path / "1.jpg", noise(64, 64)))
    path.write_bytes(path.read_bytes()[:-900])
    for at_least in (None, (8, 8)):
        with pytest.raises(UnreadableImage, match="truncated"):
            read_decoded(str(path), 3, at_least)


def test_largest_cover_is_what_random_crops_need_at_most() -> None:
    assert largest_cover("64x128", random_crop=False) == (64, 128)
    assert largest_cover("64x128", random_crop=True) == (80, 160)


def test_the_flags_reach_the_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"data_dir": str(folder), "val_data_dir": str(folder), "fast_decode": True, "cache_images": True}
    flags = Flags("image_train", {**given, "batch_size": 2, "num_workers": 0}, {})
    train, validation = open_streams(flags, class_cond=False, image_size=8)
    assert validation is not None
    for stream, kept in ((train, True), (validation, False)):
        assert next(stream)[0].dtype == th.uint8
        assert stream.dataset.options.fast_decode
        assert bool(stream.dataset.cache) == kept
    read: list[str] = []
    monkeypatch.setattr(
        items,
        "read_decoded",
        lambda path, *rest, **options: read.append(path) or read_decoded(path, *rest, **options),
    )
    for _ in range(9):
        next(train)
    assert len(read) == 7  # of 9, as 2 were read before


def test_a_lost_worker_is_found_out_when_a_batch_is_asked_for_and_not_in_the_middle_of_a_step(folder: Path) -> None:
    alarm = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch sets its own with the first loader of a process
    stream = opened(folder, num_workers=1)
    next(stream)
    (worker,) = stream._batches._workers  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0.05)  # torch's own alarm would go off here, where a training may be changing weights
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        for _ in range(9):  # those that it has made are given
            next(stream)
    signal.signal(signal.SIGCHLD, alarm)


def test_training_on_bytes_is_training_on_their_floats(folder: Path, tmp_path: Path) -> None:
    diffusion = build_diffusion(DiffusionConfig(diffusion_steps=40))
    found = []
    for as_bytes in (True, False):
        logger.configure(dir=str(tmp_path / str(as_bytes)), format_strs=["csv"])
        th.manual_seed(0)
        shape: dict[str, Any] = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1"}
        model = build_unet(UNetConfig(**shape, attention_resolutions="8"), False)
        data, val_data = (opened(folder, class_cond=False, as_bytes=as_bytes) for _ in range(2))
        options: dict[str, Any] = {"lr": 1e-3, "ema_rate": "", "log_interval": 2, "save_interval": 9, "max_steps": 2}
        options |= {"val_data": val_data, "val_interval": 2, "resume_checkpoint": "", "batch_size": 4, "microbatch": 2}
        TrainLoop(model=model, diffusion=diffusion, data=data, **options).run_loop()
        found.append([(tmp_path / str(as_bytes) / "progress.csv").read_text(), *model.parameters()])
    losses = [[float(row["val_loss"]) for row in csv.DictReader(io.StringIO(table))] for table, *_ in found]
    assert losses[0] == losses[1]
    assert all(map(th.equal, found[0][1:], found[1][1:]))


@pytest.mark.slow
def test_the_log_has_the_wait_of_the_rank_that_waited_longest(tmp_path: Path, ranks: Nursery) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent("""
            from types import SimpleNamespace
            from guided_diffusion import dist_util, logger
            from guided_diffusion.training import meter

            clock = [0.0]
            meter.time = SimpleNamespace(perf_counter=lambda: clock[0])

            def work():
                dist_util.setup_dist(device="cpu")
                with meter.Meter(1) as measured:
                    with measured.waiting_for_data():
                        clock[0] += 1 + 2 * dist_util.rank()
                    clock[0] = 8.0
                    measured.step_done()
                    own = measured.data_wait
                    measured.log_speed()
                print(own, logger.getkvs()["data_wait"])

            dist_util.run(work)
        """)
    )
    done = ranks.run([script], OPENAI_LOGDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = sorted(tuple(map(float, line.split())) for line in done.stdout.splitlines() if line[0].isdigit())
    assert lines == [(1 / 8, 3 / 8), (3 / 8, 3 / 8)]
