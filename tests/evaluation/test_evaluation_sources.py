"""Where images to evaluate lie: each kind of place, every range of numbers, and what is refused."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections import deque
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.data.sources import read_image
from guided_diffusion.evaluation.images import open_images, read_statistics, request_of
from guided_diffusion.evaluation.references import record_bytes
from guided_diffusion.evaluation.scores import RECORD
from guided_diffusion.image_datasets import ImageDataset
from guided_diffusion.runtime.npz import save_npz

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)


def saved(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def joined(source, size=7, **options):
    return np.concatenate(list(source.batches(size, **options)))


def pictures(folder, images=IMAGES):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return str(folder)


def zipped(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return str(path)


@pytest.mark.parametrize("size", [1, 7, 23, 100])
@pytest.mark.parametrize("kind", ["npz", "compressed", "folder", "zip"])
def test_every_image_comes_once_and_in_order(tmp_path, kind, size):
    folder = pictures(tmp_path / "pictures")
    np.savez_compressed(tmp_path / "small.npz", arr_0=IMAGES)
    path = {
        "npz": saved(tmp_path / "x.npz", arr_0=IMAGES),
        "compressed": str(tmp_path / "small.npz"),
        "folder": folder,
        "zip": zipped(tmp_path / "pictures.zip", tmp_path / "pictures"),
    }[kind]
    source = open_images(path)
    batches = list(source.batches(size))
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    assert [len(batch) for batch in batches] == [min(size, 23 - start) for start in range(0, 23, size)]
    shares = [list(source.batches(size, first=rank, step=3)) for rank in range(3)]
    mixed = [share[turn] for turn in range(len(batches)) for share in shares if turn < len(share)]
    np.testing.assert_array_equal(np.concatenate(mixed), IMAGES)
    assert (source.count, source.warnings(), source.shape) == (23, [], (6, 5, 3))
    picked = np.array([0, 3, 4, 22])
    np.testing.assert_array_equal(np.concatenate(list(source.take(picked, rows=size))), IMAGES[picked])


def test_no_more_than_a_batch_is_held(tmp_path):
    large = np.zeros((4000, 64, 64, 3), np.uint8)  # 49 MB
    path = saved(tmp_path / "x.npz", arr_0=large)
    del large
    source = open_images(path)
    tracemalloc.start()
    try:
        assert sum(len(batch) for batch in source.batches(64)) == 4000
        assert source.scanned.digest
        assert tracemalloc.get_traced_memory()[1] < 16e6
        tracemalloc.reset_peak()
        assert sum(len(batch) for batch in source.batches(64)) == 4000
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()


def test_labels_are_carried(tmp_path):
    labels = rng.integers(0, 5, 23)
    assert open_images(saved(tmp_path / "a.npz", arr_0=IMAGES, arr_1=labels)).labels.tolist() == labels.tolist()
    assert open_images(saved(tmp_path / "b.npz", arr_0=IMAGES)).labels is None
    for other, told in ((labels[:4], "arr_1 (4,)"), (np.array([{}] * 23, object), "an array of type object")):
        wrong = open_images(saved(tmp_path / "c.npz", arr_0=IMAGES, arr_1=other))
        assert wrong.labels is None
        assert told in wrong.notes[0]


def test_an_array_by_another_name_is_found_if_it_is_alone(tmp_path):
    source = open_images(saved(tmp_path / "a.npz", images=IMAGES, ids=np.arange(23)))
    np.testing.assert_array_equal(joined(source), IMAGES)
    assert "the array images" in source.notes[0]


def test_grey_is_repeated_and_transparency_laid_on_white_as_in_training(tmp_path):
    grey = IMAGES[..., :1]
    expected = np.repeat(grey, 3, -1)
    np.testing.assert_array_equal(joined(open_images(saved(tmp_path / "a.npz", arr_0=grey))), expected)
    np.testing.assert_array_equal(joined(open_images(saved(tmp_path / "b.npz", arr_0=grey[..., 0]))), expected)
    transparent = rng.integers(0, 256, (3, 6, 5, 4), dtype=np.uint8)
    folder = pictures(tmp_path / "rgba", transparent)
    trained = np.stack([np.asarray(read_image(f"{folder}/{index:03d}.png", 3)) for index in range(3)])
    for path in (folder, saved(tmp_path / "c.npz", arr_0=transparent)):
        np.testing.assert_array_equal(joined(open_images(path)), trained)


LEVELS = np.arange(256).reshape(1, 16, 16, 1).repeat(3, -1)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((LEVELS / 127.5 - 1).astype(np.float64), "[-1, 1], and are scaled to 0 .. 255 as sampling does"),
        ((LEVELS / 255).astype(np.float32), "[0, 1], and are scaled to 0 .. 255 and rounded"),
        ((LEVELS + 0.2).clip(0, 255).astype(np.float16), "[0, 255], and are rounded"),
        (LEVELS.astype(np.int64), "integers of 0 .. 255 are taken as they are"),
        (LEVELS.astype(np.uint16), "integers of 0 .. 255 are taken as they are"),
    ],
)
def test_numbers_of_another_type_are_converted_and_it_is_said(tmp_path, numbers, said):
    source = open_images(saved(tmp_path / "x.npz", arr_0=numbers))
    difference = np.abs(joined(source).astype(int) - LEVELS)
    assert difference.max() <= ("sampling" in said)  # which truncates
    [warning] = source.warnings()
    assert f"is of {numbers.dtype}, not of uint8" in warning
    assert said in warning


def test_the_range_is_that_of_all_images_not_of_a_batch(tmp_path):
    numbers = np.zeros((9, 4, 4, 3), np.float32)
    numbers[8, 0, 0, 0] = -1
    path = saved(tmp_path / "x.npz", arr_0=numbers)
    assert (joined(open_images(path), size=2)[:8] == 127).all()


def test_bytes_that_are_all_but_black_are_warned_of(tmp_path):
    source = open_images(saved(tmp_path / "x.npz", arr_0=IMAGES // 255))
    assert "no number is above 1" in source.warnings()[0]


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        (LEVELS / 127.5 - 1.1, "float64, from -1.1 to 0.9"),
        (LEVELS * 2, "int64, from 0 to 510"),
        (LEVELS - 1, "int64, from -1 to 254"),
        (np.where(LEVELS == 3, np.nan, 0.5), "some of them not finite"),
        (np.where(LEVELS == 3, np.inf, 0.5), "some of them not finite"),
    ],
)
def test_numbers_that_no_image_has_are_refused(tmp_path, numbers, sentence):
    source = open_images(saved(tmp_path / "x.npz", arr_0=numbers))
    with pytest.raises(ValueError, match=r"clip and scale them to 0 \.\. 255, and save them as uint8") as refusal:
        _ = source.scanned
    assert sentence in str(refusal.value)


def test_images_of_several_sizes_keep_their_order(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    sizes = [(4, 4), (4, 4), (6, 5), (4, 4), (6, 5), (6, 5), (6, 5)]
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(np.full((height, width, 3), index, np.uint8)).save(folder / f"{index}.png")
    source = open_images(str(folder))
    groups = list(source.groups(4))
    assert [[batch.shape[:3] for batch in group] for group in groups] == [
        [(2, 4, 4), (1, 6, 5), (1, 4, 4)],
        [(3, 6, 5)],
    ]
    assert [int(image[0, 0, 0]) for batch in chain(*groups) for image in batch] == list(range(7))
    assert "have 2 sizes (4 of 6x5, 3 of 4x4)" in source.warnings()[0]
    assert source.shape is None


def test_16_bits_and_float_files_become_bytes(tmp_path):
    folder = tmp_path / "deep"
    folder.mkdir()
    levels = np.arange(256).reshape(16, 16)
    Image.fromarray((levels * 257).astype(np.uint16)).save(folder / "a.png")
    np.save(folder / "b.npy", (levels / 127.5 - 1).astype(np.float32))
    np.testing.assert_array_equal(joined(open_images(str(folder))), np.repeat(np.stack([levels] * 2)[..., None], 3, -1))


def test_the_size_of_a_turned_picture_is_the_one_it_is_read_in(tmp_path):
    folder = tmp_path / "turned"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(IMAGES[0]).save(folder / "a.png", exif=exif)
    source = open_images(str(folder))
    assert joined(source).shape == (1, 5, 6, 3)
    assert source.scanned.sizes == {(5, 6): 1}
    assert source.shape == (5, 6, 3)


@pytest.mark.parametrize("size", [4, "3x4"])
def test_images_are_cropped_as_in_training(tmp_path, size):
    folder = pictures(tmp_path / "pictures", rng.integers(0, 256, (3, 21, 17, 3), dtype=np.uint8))
    source = open_images(folder, size)
    dataset = ImageDataset(size, source.files.paths, random_flip=False)
    trained = np.stack([(dataset[index][0].transpose(1, 2, 0) + 1) * 127.5 for index in range(3)])
    np.testing.assert_allclose(joined(source), trained, atol=1e-4)
    assert source.shape == joined(source).shape[1:]


def test_a_damaged_picture_is_named(tmp_path):
    folder = tmp_path / "x"
    pictures(folder)
    whole = (folder / "004.png").read_bytes()
    for content, when in ((b"", "look"), (b"no picture", "look"), (whole[: len(whole) // 2], "read")):
        (folder / "004.png").write_bytes(content)
        source = open_images(str(folder))
        with pytest.raises(ValueError, match=r"cannot read image '.*004.png'"):
            _ = source.scanned if when == "look" else joined(source)


def test_the_folder_of_a_run_gives_its_samples(tmp_path):
    np.savez(tmp_path / "samples_23x6x5x3.npz", IMAGES, np.arange(23))
    (tmp_path / "request.json").write_text(json.dumps({"steps": 25, "seed": 3}))
    Image.fromarray(IMAGES[0]).save(tmp_path / "samples.png")
    source = open_images(str(tmp_path))
    np.testing.assert_array_equal(joined(source), IMAGES)
    assert source.labels.tolist() == list(range(23))
    assert "the samples are samples_23x6x5x3.npz" in source.notes[0]
    assert request_of(str(tmp_path)) == request_of(str(tmp_path / "samples_23x6x5x3.npz")) == {"steps": 25, "seed": 3}
    assert request_of(saved(tmp_path / "other.npz", arr_0=IMAGES)) == {}
    (tmp_path / "request.json").write_text("{")
    assert request_of(str(tmp_path)) == {}
    np.savez(tmp_path / "samples_22x6x5x3.npz", IMAGES[:22])
    with pytest.raises(ValueError, match="holds 2 files of samples"):
        open_images(str(tmp_path))


def test_an_unfinished_run_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    save_npz(str(tmp_path / "shards/000000.npz"), IMAGES[:4])
    with pytest.raises(ValueError, match="the run is not finished: run its command again"):
        open_images(str(tmp_path))


def test_the_digest_is_that_of_the_numbers_in_their_order(tmp_path):
    np.savez_compressed(tmp_path / "b.npz", other=IMAGES, unused=np.zeros(2))
    same = [saved(tmp_path / "a.npz", arr_0=IMAGES), str(tmp_path / "b.npz")]
    changed = IMAGES.copy()
    changed[9, 0, 0, 0] ^= 1
    others = [changed, IMAGES[::-1], IMAGES[:-1], IMAGES.astype(np.int16), IMAGES.reshape(23, 5, 6, 3)]
    paths = [saved(tmp_path / f"{number}.npz", arr_0=array) for number, array in enumerate(others)]
    digests = [open_images(path).scanned.digest for path in (*same, *paths)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 1 + len(others)


def test_the_digest_of_files_knows_their_content_order_and_crop_and_not_their_names(tmp_path):
    first, renamed = pictures(tmp_path / "a"), tmp_path / "b"
    pictures(renamed)
    (renamed / "000.png").rename(renamed / "0000.png")
    (renamed / "notes.txt").write_text("x")
    turned = pictures(tmp_path / "c", IMAGES[::-1])
    assert open_images(first).scanned.digest == open_images(str(renamed)).scanned.digest
    assert (
        len(
            {
                open_images(first).scanned.digest,
                open_images(turned).scanned.digest,
                open_images(first, 4).scanned.digest,
            }
        )
        == 3
    )


def test_statistics_of_a_file_and_what_they_are_of(tmp_path):
    features = rng.normal(size=(50, 4))
    mean, cov = features.mean(0), np.cov(features.T)
    arrays = {"mu": mean, "sigma": cov, "mu_s": mean[:2], "sigma_s": cov[:2, :2]}
    source = open_images(saved(tmp_path / "a.npz", **arrays))
    found, record = read_statistics(source)
    assert (source.count, source.warnings(), record, set(found)) == (0, [], {}, {"pool", "spatial"})
    np.testing.assert_array_equal(found["pool"].cov, cov)
    assert found["pool"].n == 0  # the original's files do not say
    record = record_bytes({"extractor": "x", "identity": "y", "n": 50})
    known = open_images(saved(tmp_path / "b.npz", arr_0=IMAGES, **arrays, **{RECORD: record}))
    found, record = read_statistics(known)
    assert found["spatial"].n == 50
    assert record["identity"] == "y"
    assert known.count == 23


def test_a_mean_without_its_covariance_is_not_used_and_said(tmp_path):
    whole = {"mu": np.zeros(4), "sigma": np.eye(4)}
    source = open_images(saved(tmp_path / "a.npz", **whole, mu_s=np.zeros(2)))
    assert set(read_statistics(source)[0]) == {"pool"}
    assert "mu_s is there without sigma_s, and not used" in source.notes[0]
    source = open_images(saved(tmp_path / "b.npz", arr_0=IMAGES, sigma=np.eye(4)))
    assert (source.count, read_statistics(source)) == (23, ({}, {}))
    assert "sigma is there without mu, and not used" in source.notes[0]
    spatial = open_images(saved(tmp_path / "c.npz", mu_s=np.zeros(2), sigma_s=np.eye(2)))
    assert (spatial.count, set(read_statistics(spatial)[0]), spatial.notes) == (0, {"spatial"}, [])


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, "no mean and covariance"),
        ({"mu": np.zeros((3, 3)), "sigma": np.zeros((3, 3))}, "no mean and covariance"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "of finite numbers"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), RECORD: np.zeros(3, np.uint8)}, "record does not say"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), RECORD: record_bytes({"n": True})}, "record does not say"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), RECORD: np.zeros(3)}, "record does not say"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, arrays, sentence):
    source = open_images(saved(tmp_path / "x.npz", **arrays))
    with pytest.raises(ValueError, match=sentence):
        read_statistics(source)


def truncated(path, share):
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=IMAGES)
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    return str(path)


def test_what_holds_no_images_is_refused_in_a_sentence(tmp_path):
    inner = io.BytesIO()
    np.savez(inner, arr_0=IMAGES)
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "inside.zip", "w") as archive:
        archive.writestr("samples.npz", inner.getvalue())
    with zipfile.ZipFile(tmp_path / "inside.npz", "w") as archive:
        archive.writestr("samples.npz", inner.getvalue())
    Image.fromarray(IMAGES[0]).save(tmp_path / "one.png")
    objects = np.array([{"a": 1}, None], dtype=object)
    cases = {
        "": "does not exist",
        str(tmp_path / "missing.npz"): "does not exist",
        truncated(tmp_path / "cut.npz", 0.5): "is no npz",
        str(tmp_path / "inside.zip"): "holds no images, skipped 1 .\\.npz: 1.: give an npz",
        str(tmp_path / "inside.npz"): "holds .*, and it is not clear which are images",
        str(tmp_path / "one.png"): "is no npz",
        str(tmp_path / "empty"): "holds no images",
        saved(tmp_path / "objects.npz", arr_0=objects): "an array of type object",
        saved(tmp_path / "none.npz", arr_0=IMAGES[:0]): "holds no images",
        saved(tmp_path / "first.npz", arr_0=IMAGES.transpose(0, 3, 1, 2)): "transpose\\(0, 2, 3, 1\\)",
        saved(tmp_path / "bool.npz", arr_0=IMAGES > 9): "of bool, where images are .* of uint8",
        saved(tmp_path / "complex.npz", arr_0=IMAGES.astype(np.complex64)): "of complex64, where",
        saved(tmp_path / "flat.npz", arr_0=IMAGES.reshape(23, -1)): "where images are",
        saved(tmp_path / "many.npz", arr_0=IMAGES[..., [0] * 7]): "where images are",
        saved(tmp_path / "two.npz", a=IMAGES, b=IMAGES): "holds a, b, and it is not clear which are images",
        saved(tmp_path / "other.npz", a=np.arange(3)): "holds .*, and it is not clear which are images",
        saved(tmp_path / "half.npz", mu=np.zeros(3)): "holds mu, and it is not clear which are images",
    }
    for path, sentence in cases.items():
        with pytest.raises(ValueError, match=sentence) as refusal:
            open_images(path)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", ["flip", "short"])
def test_numbers_that_a_disk_damaged_are_noticed_before_they_are_used(tmp_path, damage):
    path = tmp_path / "x.npz"
    if damage == "flip":
        content = bytearray((np.savez(path, arr_0=IMAGES), path.read_bytes())[1])
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    else:  # the header speaks of more rows than there are
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 6, 5, 3)}
            )
            member.write(IMAGES.tobytes())
    with pytest.raises(ValueError, match="cannot be read"):
        _ = open_images(str(path)).scanned


class Holes(io.FileIO):
    """A file in which zeros take no room."""

    def write(self, data):
        view = memoryview(data)
        if view.nbytes > 2**16 and not np.frombuffer(view, np.uint8).any():
            self.seek(view.nbytes, 1)
            return view.nbytes
        return super().write(data)


@pytest.mark.slow
def test_an_array_of_more_than_4_gib_is_streamed(tmp_path):
    rows, last = 350_000, rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "large.npz"
    chunk = np.zeros((1000, 64, 64, 3), np.uint8)
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows + 1, 64, 64, 3)}
    with (
        Holes(path, "w") as file,
        zipfile.ZipFile(file, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(rows // 1000):
            member.write(chunk)
        member.write(last)
    assert path.stat().st_size > 2**32
    tracemalloc.start()
    try:
        source = open_images(str(path))
        assert source.count == rows + 1
        assert source.scanned.high == last.max()
        batch = deque(source.batches(500), maxlen=1)[0]
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(batch[-1:], last)
