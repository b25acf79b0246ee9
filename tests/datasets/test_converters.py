"""The scripts in datasets/: what comes out of each format, and that no kill and no number of workers changes it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import dataset_sources as sources
import numpy as np
import pytest
from dataset_sources import SCRIPTS, SOURCES, packed, run, tar_of
from few import few
from PIL import Image

from conversion import output
from conversion.command import DATASETS
from guided_diffusion.data.captions import read_captions
from guided_diffusion.data.labels import read_labels
from guided_diffusion.data.sources import find_images
from guided_diffusion.image_datasets import load_data


class Killed(BaseException):
    """What a test ends a run with."""


def kill_after(monkeypatch, lines):
    """End runs where the journal would get its next line but so many: the image is written by then."""
    add, written = output.Journal.add, []

    def counted(self, entry):
        if len(written) == lines:
            raise Killed
        written.append(entry)
        add(self, entry)

    monkeypatch.setattr(output.Journal, "add", counted)


def append(path, content):
    with path.open("ab") as file:
        file.write(content)


def everything(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pictures(path):
    """Name -> content of the files of an output."""
    if path.is_dir():
        return everything(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def report_of(out):
    return json.loads(Path(f"{out}.report.json").read_text())


def refused(capfd, name, *words):
    """The one line with which a script ends."""
    with pytest.raises(SystemExit) as end:
        run(name, *words)
    assert end.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def made(tmp_path):
    """A source by name, and a place for what comes of it."""

    def make(name, maker=None, **options):
        folder = tmp_path / "source"
        folder.mkdir()
        source, flags, classes = (maker or SOURCES[name])(folder, **options)
        return source, flags, classes, tmp_path

    return make


def kinds_of(name):
    return ("data.tars", "data2.tars") if name == "shards" else ("data", "data.zip")


@pytest.mark.parametrize("name", few(SOURCES, ["imagenet", "lsun", "parquet", "shards"]))
def test_killed_and_run_again_gives_the_bytes_of_an_unbroken_run(name, made, monkeypatch, capfd):
    """The unbroken one has two workers, the other none; a torn image and a torn line lie where it was killed."""
    source, flags, classes, folder = made(name)
    kind = kinds_of(name)[list(SOURCES).index(name) % 2]
    whole, broken = folder / "whole" / kind, folder / "broken" / kind
    run(name, source, whole, *flags, "--workers", 2)
    with monkeypatch.context() as patch:
        kill_after(patch, sum(classes.values()) // 2)
        with pytest.raises(Killed):
            run(name, source, broken, *flags, "--workers", 0)
    part, journal = Path(f"{broken}.part"), Path(f"{broken}.part.jsonl")
    assert not broken.exists()
    assert len(journal.read_bytes().splitlines()) == 1 + sum(classes.values()) // 2
    append(journal, b'{"key": "x", "na')
    append(part / "torn.png" if part.is_dir() else part, b"\x89PN")
    run(name, source, broken, *flags, "--workers", 0)
    assert everything(broken.parent) == everything(whole.parent)
    report = report_of(whole)
    assert (report["classes"], report["skipped"]) == (classes, [])
    said = f"{sum(classes.values())} images in {len(classes)} classes, nothing was skipped"
    assert said in capfd.readouterr().out


@pytest.mark.parametrize("name", SOURCES)
def test_training_reads_what_comes_out_with_its_classes(name, made):
    source, flags, classes, folder = made(name)
    for out in map(folder.joinpath, kinds_of(name)):
        run(name, source, out, *flags, "--workers", 0)
        data = load_data(data_dir=str(out), batch_size=2, image_size=8, class_cond=True, log=lambda line: None)
        assert {label: count for _, label, count in data.class_table()} == classes
        images, _ = next(data)
        assert images.shape == (2, 3, 8, 8)
    assert pictures(folder / kinds_of(name)[0]) == pictures(folder / kinds_of(name)[1])


@pytest.mark.parametrize("kind", ["missing", "empty folder", "empty file", "URL"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_is_none_is_one_sentence(name, kind, tmp_path, capfd):
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "empty file").touch()
    out, source = tmp_path / "out", "https://host/x.tar" if kind == "URL" else tmp_path / kind
    if kind == "URL":
        with pytest.raises(SystemExit):
            run(name, source, out)
        said = capfd.readouterr().err
    else:
        said = refused(capfd, name, source, out, "--workers", 0)
    assert "Errno" not in said
    assert "Traceback" not in said
    assert str(source) in said or kind == "empty file"
    assert not out.exists()


@pytest.mark.parametrize("name", SOURCES)
def test_each_script_says_what_it_takes(name, capsys):
    with pytest.raises(SystemExit) as end:
        sources.script(name).main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("SOURCE", "OUT", "--size", "--format", "--workers", "--skip_bad"):
        assert word in text


def test_every_script_has_a_command_line_a_test_and_a_section_in_the_readme():
    names = {path.stem for path in SCRIPTS.glob("*.py")} - {"lsun_bedroom"}
    assert names == set(DATASETS) == set(SOURCES)
    readme = (SCRIPTS / "README.md").read_text()
    for name in names:
        assert f"python datasets/{name}.py " in readme
    assert not (SCRIPTS / "__init__.py").exists()


def test_checksums_are_those_of_sha256sum(made):
    source, flags, _, folder = made("celeba")
    for name in ("data", "data.zip"):
        run("celeba", source, folder / name, *flags, "--workers", 0)
        lines = (folder / f"{name}.sha256").read_text().splitlines()
        found = {file: digest for digest, file in (line.split("  ") for line in lines)}
        files = [folder / name] if name.endswith("zip") else sorted((folder / name).iterdir())
        wanted = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        assert found == wanted


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_that_looks_whole(made):
    """SIGKILL, in the middle of 1,500 images."""
    images = np.random.default_rng(0).integers(0, 256, (1500, 28, 28), np.uint8)
    source, _, _, folder = made("mnist", images=images, labels=(np.arange(1500) % 10).astype(np.uint8))
    out, journal = folder / "broken" / "data.zip", folder / "broken" / "data.zip.part.jsonl"
    command = [sys.executable, SCRIPTS / "mnist.py", source, out, "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 50):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        workers = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(signal.SIGKILL)
    while any(Path(f"/proc/{worker}/stat").exists() for worker in workers):
        assert time.monotonic() < end, "workers end with the process that started them"
        time.sleep(0.005)
    assert not out.exists()
    assert 50 < journal.read_bytes().count(b"\n") < 1500
    run("mnist", source, out, "--workers", 0)
    run("mnist", source, folder / "whole" / "data.zip", "--workers", 0)
    assert everything(folder / "broken") == everything(folder / "whole")


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_jpeg_bytes_stay_what_they_are(made):
    source, _, _, folder = made("imagenet")
    run("imagenet", source, folder / "data", "--workers", 0)
    assert pictures(folder / "data") == {
        **{f"n02084071_000000{n}.jpg": packed(n) for n in range(3)},
        **{f"n01440764_000000{n - 5}.jpg": packed(n) for n in (8, 9)},
    }


def test_planes_become_pixels(made):
    """CIFAR's rows are red, green, blue, each row by row."""
    source, _, _, folder = made("cifar")
    run("cifar", source, folder / "data", "--workers", 0)
    row = sources.rows(2, 32)[1]
    image = decoded((folder / "data" / "automobile_0000001.png").read_bytes())
    assert all(image[y, x, c] == row[c * 1024 + y * 32 + x] for c in range(3) for y in (0, 9, 31) for x in (0, 5, 31))
    assert np.array_equal(
        decoded((folder / "data" / "airplane_0000002.png").read_bytes())[0, :, 0], sources.rows(2, 32)[0, :32]
    )


def test_lsun_is_cropped_as_the_originals_did(made):
    """Scaled by means over boxes until the shorter side fits, then the middle: numbers worked out by hand."""
    source, _, _, folder = made("lsun")
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, :, 0], stripes[:, :, 1] = np.arange(96), np.arange(64)[:, None]
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    shutil.rmtree(source)
    (source / "cat_lmdb").mkdir(parents=True)
    sources.write_lmdb(source / "cat_lmdb", [(b"k", file.getvalue())])
    run("lsun", source / "cat_lmdb", folder / "data", "--image-size", 32, "--prefix", "kitten", "--workers", 0)
    image = decoded((folder / "data" / "kitten_0000000.png").read_bytes())
    # two pixels become one, 48 columns, of which the first 8 fall away; a mean of n and n + 1 is rounded up
    assert np.array_equal(image[..., 0], np.tile(2 * np.arange(8, 40) + 1, (32, 1)))
    assert np.array_equal(image[..., 1], np.tile(2 * np.arange(32)[:, None] + 1, (1, 32)))


def test_size_crops_as_training_does(made):
    source, _, _, folder = made("ffhq")
    run("ffhq", source, folder / "small", "--size", "6x8", "--workers", 0)
    ours = load_data(
        data_dir=str(folder / "small"), batch_size=3, image_size="6x8", deterministic=True, random_flip=False
    )
    theirs = load_data(data_dir=str(source), batch_size=3, image_size="6x8", deterministic=True, random_flip=False)
    assert (next(ours)[0] == next(theirs)[0]).all()


def test_the_split_of_the_models_keeps_every_emoji_on_one_side(tmp_path):
    """As `--split` of the converter cuts it, with the captions of each part."""
    code = runpy.run_path(str(SCRIPTS.parent / "models" / "split.py"))
    parts = [str(tmp_path / name) for name in ("train.zip", "rest.zip")]
    code["split"](str(SCRIPTS / "emoji64.zip"), *parts)
    names = [sorted(name for name in zipfile.ZipFile(part).namelist() if name.endswith(".png")) for part in parts]
    assert list(map(len, names)) == [3458, 354]
    codes = [{name.partition("-")[2] for name in side} for side in names]
    assert not codes[0] & codes[1]
    for part, side in zip(parts, names, strict=True):
        with zipfile.ZipFile(part) as archive, zipfile.ZipFile(SCRIPTS / "emoji64.zip") as whole:
            assert sorted(json.loads(archive.read("captions.json"))) == side
            assert archive.read(side[0]) == whole.read(side[0])
            assert archive.read("LICENSE.txt") == whole.read("LICENSE.txt")


def test_the_emoji_zip_has_names_captions_and_the_licence(made):
    source, flags, _, folder = made("emoji")
    run("emoji", source, folder / "emoji.zip", *flags, "--workers", 0)
    files = pictures(folder / "emoji.zip")
    codes = ["symbols_google-0023-fe0f-20e3.png", "food_google-1f355.png", "symbols_google-2764-fe0f.png"]
    names = codes + [name.replace("google", "twitter") for name in codes]
    assert list(files) == [*names, "captions.json", "LICENSE.txt"]
    captions = json.loads(files["captions.json"])
    assert list(captions) == names
    assert captions["food_twitter-1f355.png"] == {
        "name": "name 1f355",
        "short_name": "a b c",
        "subcategory": "s",
        "emoji": "\N{SLICE OF PIZZA}",
    }
    with zipfile.ZipFile(SCRIPTS / "emoji64.zip") as bundled:
        assert files["LICENSE.txt"] == bundled.read("LICENSE.txt")
        mine, theirs = zipfile.ZipFile(folder / "emoji.zip").infolist()[0], bundled.infolist()[0]
        assert (mine.date_time, mine.external_attr) == (theirs.date_time, theirs.external_attr)


def npm_packages(source, size=40):
    """A folder node_modules with the tables and tiny drawings of one emoji in three styles."""
    data, icons, fluent = (source / name for name in ("emojibase-data/en", "@iconify-json/noto", "@lobehub"))
    for folder in (data, icons, fluent / "fluent-emoji-3d/assets"):
        folder.mkdir(parents=True)
    (data / "data.json").write_text(json.dumps([{"label": "pizza", "hexcode": "1F355", "tags": ["cheese", "slice"]}]))
    red = {"body": '<path fill="#f00" d="M0 0h20v10H0z"/>', "height": 10}
    (icons / "icons.json").write_text(
        json.dumps({"width": 20, "height": 20, "icons": {"pizza": red}, "aliases": {"slice": {"parent": "pizza"}}})
    )
    (icons / "chars.json").write_text(json.dumps({"1f355": "slice"}))
    picture = Image.new("RGBA", (size, size), (0, 0, 255, 0))
    picture.paste((0, 255, 0, 255), (0, 0, size, size // 2))
    picture.save(fluent / "fluent-emoji-3d/assets/1f355.webp", lossless=True)
    return source


def test_larger_emoji_have_several_captions_and_their_licences(made):
    source, _, _, folder = made("emoji")
    npm_packages(source)
    flags = ["--size", 32, "--styles", "fluent,google", "--google", source.parent / "noto-emoji", "--workers", 0]
    run("emoji", source, folder / "emoji.zip", *flags, "--skip_bad", "True")
    files = pictures(folder / "emoji.zip")
    drawing = decoded(files["food_fluent-1f355.png"])
    assert drawing.shape == (32, 32, 3)
    assert drawing[4, 4].tolist() == [0, 255, 0]
    assert drawing[28, 4].tolist() == [255, 255, 255]
    captions = json.loads(files["captions.json"])
    assert captions["food_fluent-1f355.png"]["captions"] == ["pizza", "pizza, Fluent Emoji 3D", "cheese, slice"]
    assert captions["food_google-1f355.png"]["captions"] == ["pizza", "pizza, Noto Emoji", "cheese, slice"]
    assert captions["symbols_google-2764-fe0f.png"]["captions"] == ["a b c", "a b c, Noto Emoji"]
    licence = files["LICENSE.txt"].decode()
    assert licence.startswith("Pictures in this archive, 32x32")
    for words in ("*_fluent-*.png", "(c) Microsoft, MIT", "*_google-*.png", "Apache License 2.0", "Unicode License"):
        assert words in licence
    assert "twemoji" not in licence
    assert {entry["reason"] for entry in report_of(folder / "emoji.zip")["skipped"]} == {
        "@lobehub/fluent-emoji-3d has no drawing of it"
    }


def test_emoji_in_svg_are_drawn_at_the_size(made):
    pytest.importorskip("resvg_py")
    source, _, _, folder = made("emoji")
    flags = ["--size", 100, "--styles", "noto", "--workers", 0, "--skip_bad", "True"]
    run("emoji", npm_packages(source), folder / "out", *flags)
    drawing = decoded((folder / "out/food_noto-1f355.png").read_bytes())
    # 20 wide and 10 high, in the middle of a square
    red = (drawing == [255, 0, 0]).all(2)
    assert red[25:75].all()
    assert (drawing[~red] == 255).all()
    assert red.sum() == 50 * 100


def test_the_two_parts_of_the_emoji_share_none_and_are_all(made):
    source, flags, _, folder = made("emoji")
    row, *_ = json.loads((source / "emoji.json").read_text())
    codes = [f"{0x1F400 + number:x}" for number in range(30)]
    (source / "emoji.json").write_text(json.dumps([{**row, "unified": code.upper()} for code in codes]))
    sources.write_images(source.parent / "noto-emoji/png/128", [f"emoji_u{code}.png" for code in codes], height=64)
    sources.write_images(source.parent / "twemoji/assets/72x72", [f"{code}.png" for code in codes], height=64)
    names = {}
    for part in ("all", "train", "test"):
        run("emoji", source, folder / part, *flags, "--workers", 0, "--size", 8, "--split", part)
        names[part] = {name.split("-")[1] for name in pictures(folder / part) if name.endswith(".png")}
        assert len(pictures(folder / part)) == 2 * len(names[part]) + 2, "both drawings of each"
    assert names["all"] == {f"{code}.png" for code in codes}
    assert names["train"] | names["test"] == names["all"]
    assert not names["train"] & names["test"]
    assert 0 < len(names["test"]) < 10


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--styles", "google,twemji"], "got 'twemji'; did you mean twemoji?"),
        (["--styles", "twemoji"], "run `npm install @iconify-json/twemoji`"),
        (["--styles", "noto"], "run `pip install resvg-py`"),
        (["--styles", "fluent", "--size", "48"], "has 40 x 40 pixels: give a --size of at most that"),
        (["--size", "32x64"], "emoji are square"),
        (["--format", "jpeg"], "emoji are drawn to PNG"),
    ],
)
def test_emoji_that_cannot_be_drawn_are_refused(flags, told, made, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    source, _, _, folder = made("emoji")
    (source / "emoji.json").write_text(json.dumps(json.loads((source / "emoji.json").read_text())[:1]))
    assert told in refused(capfd, "emoji", npm_packages(source), folder / "out", *flags, "--workers", 0)


def test_captions_of_larger_emoji_need_their_words(made, capfd):
    source, _, _, folder = made("emoji")
    (npm_packages(source) / "emojibase-data/en/data.json").unlink()
    told = refused(capfd, "emoji", source, folder / "out", "--styles", "fluent", "--workers", 0)
    assert "`npm install emojibase-data`" in told


@pytest.mark.parametrize(
    ("flags", "classes"), [([], {"apple": 1, "aquarium-fish": 3, "baby": 1}), (["--coarse"], {"x": 2, "y": 3})]
)
def test_cifar_100_from_its_tar(made, flags, classes):
    source, _, _, folder = made("cifar", sources.cifar100)
    run("cifar", source, folder / "data", "--split", "test", "--workers", 0, *flags)
    assert report_of(folder / "data")["classes"] == classes


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_cifar_of_every_pickle_protocol(made, protocol):
    source, _, classes, folder = made("cifar", protocol=protocol)
    run("cifar", source, folder / "data", "--workers", 0)
    assert report_of(folder / "data")["classes"] == classes


def test_downsampled_imagenet_as_pickles_with_names(made):
    source, _, _, folder = made("imagenet64")
    run("imagenet64", source, folder / "npz", "--workers", 0)
    for path in source.iterdir():
        with np.load(path) as batch:
            content = {"data": batch["data"], "labels": batch["labels"].tolist(), "mean": np.zeros(192)}
        path.with_suffix("").write_bytes(pickle.dumps(content))
        path.unlink()
    run("imagenet64", source, folder / "pickles", "--workers", 0)
    assert pictures(folder / "npz") == pictures(folder / "pickles")
    table = folder / "map_clsloc.txt"
    table.write_text("".join(f"n{number:08d} {number} name\n" for number in range(1, 1001)))
    run("imagenet64", source, folder / "named", "--synsets", table, "--workers", 0)
    assert report_of(folder / "named")["classes"] == {"n00000001": 2, "n00000003": 3, "n00001000": 1}


@pytest.mark.parametrize(
    ("truth", "synsets"),
    [
        ("n02\nn01\nn02\n", ""),
        ("2\n1\n2\n", "n01 1 tench\nn02 2 goldfish\n"),
        ("ImageId,PredictionString\nv_00000002,n01 1 2 3 4\nv_00000001,n02 1 2 3 4\nv_00000003,n02 1 2 3 4\n", ""),
    ],
)
def test_the_validation_tar_of_imagenet(tmp_path, truth, synsets):
    (tmp_path / "val.tar").write_bytes(tar_of([(f"v_0000000{n}.JPEG", packed(n)) for n in (3, 1, 2)]))
    (tmp_path / "truth.txt").write_text(truth)
    flags = ["--ground_truth", tmp_path / "truth.txt"]
    if synsets:
        (tmp_path / "synsets.txt").write_text(synsets)
        flags += ["--synsets", tmp_path / "synsets.txt"]
    run("imagenet", tmp_path / "val.tar", tmp_path / "data", *flags, "--workers", 0)
    assert sorted(pictures(tmp_path / "data")) == ["n01_0000002.jpg", "n02_0000000.jpg", "n02_0000001.jpg"]


def test_fashion_mnist_keeps_its_ids(made):
    source, _, _, folder = made("mnist")
    run("mnist", source, folder / "data", "--fashion", "--workers", 0)
    names = sorted(report_of(folder / "data")["classes"])
    assert [int(name[0]) for name in names] == list(range(10))
    assert names[9] == "9-boot"


def test_numbers_as_classes_keep_their_order(tmp_path):
    source = sources.write_images(tmp_path / "source", ["a.png", "b.png", "c.png"])
    (source / "labels.csv").write_text("a.png,10\nb.png,2\nc.png,0\n")
    run("folder", source, tmp_path / "data", "--workers", 0)
    assert sorted(pictures(tmp_path / "data")) == ["00_0000002.png", "02_0000001.png", "10_0000000.png"]


def test_a_folder_without_classes_gets_one(tmp_path, capfd):
    source = sources.write_images(tmp_path / "source", ["a.png", "b.png"])
    assert "--prefix NAME" in refused(capfd, "folder", source, tmp_path / "data", "--workers", 0)
    run("folder", source, tmp_path / "data", "--prefix", "dog", "--workers", 0)
    assert sorted(pictures(tmp_path / "data")) == ["dog_0000000.png", "dog_0000001.png"]


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def edit_imagenet(source):
    """Two good images; the rest is what a tar can hold."""
    hostile = tar_of([("../../n1_1.JPEG", packed(1)), ("n1_2.JPEG", packed(2)), ("n1_2.JPEG", packed(3))])
    good = tar_of([("n2_1.JPEG", packed(4)), ("n2_2.JPEG", packed(5)[:150]), ("n2_3.JPEG", b"")])
    tars = [("n1.tar", hostile), ("n2.tar", good), ("n3.tar", tar_of([])), ("n4.tar", b"no tar" * 999)]
    tars += [("n5.tar", class_tar_cut()), ("/etc/n6.tar", good), ("readme.txt", b"text")]
    source.write_bytes(tar_of(tars))


def class_tar_cut():
    return sources.class_tar("n5", [6, 7])[:2000]


def edit_lsun(source):
    header = source / "church_outdoor_train_lmdb" / "data.mdb"
    content = bytearray(header.read_bytes())
    content[20:24] = (999).to_bytes(4, "little")
    header.write_bytes(content)
    (source / "empty_lmdb").mkdir()
    sources.write_lmdb(source / "empty_lmdb", [])
    (source / "tower_lmdb").mkdir()
    (source / "tower_lmdb" / "data.mdb").write_bytes(b"no lmdb at all" * 999)
    cut_lmdb = source / "zoo_lmdb"
    cut_lmdb.mkdir()
    sources.write_lmdb(cut_lmdb, [(f"{n}".encode(), packed(n, "PNG", height=90, width=90)) for n in range(5)])
    cut(cut_lmdb / "data.mdb")


def edit_imagenet64(source):
    np.savez(source / "train_data_batch_2.npz", data=np.zeros((2, 192), np.float32), labels=np.array([1, 2]))
    np.savez(source / "train_data_batch_3.npz", data=rows_of(2), labels=np.array([0, 7]))
    np.savez(source / "train_data_batch_4.npz", data=rows_of(2), labels=np.array([7]))
    np.savez(source / "train_data_batch_5.npz", data=np.array([{}, {}]), labels=np.array([7, 7]))
    cut(source / "train_data_batch_10.npz")


def rows_of(count):
    return sources.rows(count, 8)


def edit_cifar(source):
    (source / "data_batch_1").write_bytes(pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, 2))
    (source / "data_batch_2").write_bytes(pickle.dumps({b"data": sources.rows(2, 32), b"labels": [0, 9]}, 2))
    cut(source / "data_batch_3")
    (source / "data_batch_4").unlink()


def edit_mnist(source):
    (source / "train-labels-idx1-ubyte").write_bytes(sources.idx(np.array([0, 1, 2, 99] * 3, np.uint8)))


def edit_folder(source):
    cut(source / "cat" / "1.jpg")
    (source / "zebra").mkdir()
    (source / "dog" / "a" / "floats.npy").write_bytes(npy(np.zeros((4, 4, 3))))
    (source / "dog" / "a" / "words.png").write_text("not a picture")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(source / "cat" / "deep.png")


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def edit_parquet(source):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = source / "train-00000-of-00002.parquet"
    table = pq.read_table(path)
    images = [{"bytes": packed(1), "path": None}, {"bytes": None, "path": "x.png"}, {"bytes": b"text", "path": None}]
    pq.write_table(pa.table([images, [0, 1, 1]], schema=table.schema), path)
    cut(source / "train-00001-of-00002.parquet")
    pq.write_table(pa.table([images[:1] * 2, [None, 7]], schema=table.schema), source / "z.parquet")


def edit_emoji(source):
    (source.parent / "twemoji/assets/72x72/1f355.png").unlink()
    cut(source.parent / "noto-emoji/png/128/emoji_u2764.png")


HOSTILE = {
    "imagenet": (
        edit_imagenet,
        {"n1": 1, "n2": 1, "n3": 0, "n4": 0, "n5": 1},
        {
            "n1.tar/../../n1_1.JPEG": "a path that leads out of the tar",
            "n1.tar/n1_2.JPEG": "a duplicate of an earlier name",
            "n2.tar/n2_2.JPEG": "truncated",
            "n2.tar/n2_3.JPEG": "it is empty",
            "n3.tar": "a class with no images",
            "n4.tar": "it is no tar",
            "n5.tar": "it ends early or is damaged",
            "/etc/n6.tar": "a path that leads out of the tar",
            "readme.txt": "its name begins with no wnid",
        },
    ),
    "lsun": (
        edit_lsun,
        {"bedroom": 3, "church-outdoor": 0, "empty": 0, "tower": 0, "zoo": 0},
        {
            "church_outdoor_train_lmdb": "LMDB data format v999 is not supported",
            "empty_lmdb": "a class with no images",
            "tower_lmdb": "File is not an LMDB file",
            "zoo_lmdb": "it was cut",
        },
    ),
    "imagenet64": (
        edit_imagenet64,
        {"0001": 1, "0003": 1, "0007": 1, "1000": 1},
        {
            "train_data_batch_2.npz": "its images are numbers of type float32, where uint8 is read",
            "train_data_batch_3.npz/0": "the label 0",
            "train_data_batch_4.npz": "it has 2 images and 1 labels",
            "train_data_batch_5.npz": "where numbers are read",
            "train_data_batch_10.npz": "no npz",
        },
    ),
    "cifar": (
        edit_cifar,
        {"airplane": 2, "automobile": 1},
        {
            "data_batch_1": "its images are numbers of type float64, where uint8 is read",
            "data_batch_2/1": "the label 9 is none of 0 to 1",
            "data_batch_3": "it is no pickle of arrays",
            "data_batch_4": "it is missing",
        },
    ),
    "mnist": (
        edit_mnist,
        {**dict.fromkeys("012", 3), **dict.fromkeys("3456789", 0)},
        {f"train/{n}": "the label 99" for n in (3, 7, 11)}
        | {f"class {digit} of SOURCE": "a class with no images" for digit in range(3, 10)},
    ),
    "folder": (
        edit_folder,
        {"cat": 2, "a": 1, "zebra": 0},
        {
            "zebra": "a class with no images",
            "cat/1.jpg": "truncated",
            "dog/a/floats.npy": "where uint8 of [H, W] or [H, W, 3] is read",
            "dog/a/words.png": "its content is no image",
        },
    ),
    "parquet": (
        edit_parquet,
        {"golden-retriever": 0, "tench": 1},
        {
            "train-00000-of-00002.parquet/1": "the row has no bytes of an image",
            "train-00000-of-00002.parquet/2": "its content is no image",
            "train-00001-of-00002.parquet": "magic bytes",
            "z.parquet/0": "the row has no label",
            "z.parquet/1": "the label 7 is none of 0 to 1",
        },
    ),
    "emoji": (
        edit_emoji,
        {"food": 1, "symbols": 3},
        {"google/2764-fe0f": "truncated", "twitter/1f355": "--twitter has no drawing of it"},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_used_is_named_and_left_out_or_refused(name, made, capfd):
    source, flags, _, folder = made(name)
    edit, classes, faults = HOSTILE[name]
    edit(source)
    faults = {key.replace("SOURCE", str(source)): fault for key, fault in faults.items()}
    out = folder / "out" / "data.zip"
    sentence = refused(capfd, name, source, out, *flags, "--workers", 0)
    assert any(key in sentence and fault in sentence.replace("Truncated", "truncated") for key, fault in faults.items())
    assert "--skip_bad True" in sentence
    assert not out.exists()
    run(name, source, out, *flags, "--workers", 0, "--skip_bad", "True")
    report = report_of(out)
    assert report["classes"] == classes
    assert {entry["item"] for entry in report["skipped"]} == set(faults)
    for entry in report["skipped"]:
        assert faults[entry["item"]] in entry["reason"].replace("Truncated", "truncated")
    assert len(report["skipped"]) == len(faults)
    assert report["empty_classes"] == sorted(label for label, count in classes.items() if not count)
    assert f"skipped {len(faults)} (" in capfd.readouterr().out
    assert len([file for file in pictures(out) if file.endswith((".png", ".jpg"))]) == sum(classes.values())
    assert [path.name for path in sorted(folder.iterdir())] == ["out", "source"], "nothing lies anywhere else"


def test_a_picture_with_finer_levels_is_kept_or_refused(made):
    source, _, _, folder = made("folder")
    edit_folder(source)
    run("folder", source, folder / "data", "--workers", 0, "--skip_bad")
    deep = decoded((folder / "data" / "cat_0000003.png").read_bytes())
    assert deep.max() == 40000
    run("folder", source, folder / "small", "--workers", 0, "--skip_bad", "--size", 4)
    reasons = {entry["item"]: entry["reason"] for entry in report_of(folder / "small")["skipped"]}
    assert "finer levels than 8 bits" in reasons["cat/deep.png"]


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("imagenet", lambda source: source.write_bytes(b"x" * 5000), "it is no tar"),
        ("cifar", lambda source: (source / "batches.meta").unlink(), "neither batches.meta nor meta"),
        (
            "mnist",
            lambda source: cut(source / "train-images-idx3-ubyte.gz"),
            "train-images-idx3-ubyte.gz cannot be used",
        ),
        ("mnist", lambda source: (source / "train-labels-idx1-ubyte").unlink(), "has no train-labels-idx1-ubyte.gz"),
        (
            "mnist",
            lambda source: (source / "train-images-idx3-ubyte.gz").write_bytes(
                gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12)
            ),
            "is too large",
        ),
        (
            "lsun",
            lambda source: (
                shutil.rmtree(source / "bedroom_train_lmdb") or shutil.rmtree(source / "church_outdoor_train_lmdb")
            ),
            "holds no data.mdb",
        ),
        ("celeba", lambda source: (source.parent / "list_attr_celeba.txt").unlink(), "needs list_attr_celeba.txt"),
        (
            "celeba",
            lambda source: (source.parent / "list_attr_celeba.txt").write_text("1\nMale\n1 1\n"),
            "has no attribute 'Smiling'",
        ),
        ("emoji", lambda source: (source / "emoji.json").write_text("{"), "is no table of emoji"),
        ("parquet", lambda source: [path.unlink() for path in source.iterdir()], "holds no .parquet file"),
        ("ffhq", lambda source: shutil.rmtree(source), "is not there: give the path of the data set"),
    ],
)
def test_what_is_no_such_data_set_is_told_in_a_sentence(name, spoil, told, made, capfd):
    source, flags, _, folder = made(name)
    spoil(source)
    assert told in refused(capfd, name, source, folder / "data", *flags, "--workers", 0)
    assert not (folder / "data").exists()


class Canary:
    """Writes a file when it is unpickled by pickle itself."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("where", ["data_batch_1", "batches.meta"])
def test_no_pickle_runs_anything(made, where, capfd):
    source, _, _, folder = made("cifar")
    canary = folder / "canary"
    content = pickle.dumps({b"data": Canary(canary), b"labels": [0], b"label_names": Canary(canary)}, 2)
    (source / where).write_bytes(content)
    assert "exec, which data has no need of" in refused(capfd, "cifar", source, folder / "data", "--workers", 0)
    assert not canary.exists()
    pickle.loads(content)
    assert canary.exists(), "the canary sings where it is let"


def test_the_name_and_flags_of_the_original_script_still_work(made, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    source, _, _, folder = made("lsun")
    flags = ["--image-size", 32, "--prefix", "bedroom", "--workers", 0]
    run("lsun_bedroom", *flags, source / "bedroom_train_lmdb", folder / "data")
    assert sorted(pictures(folder / "data")) == [f"bedroom_000000{n}.png" for n in range(3)]


def test_shards_keep_labels_and_captions(made, monkeypatch, tmp_path):
    """As many tars as it takes, each with its index, and no reading through them when they are opened."""
    source, _, _, folder = made("shards")
    monkeypatch.setattr(output, "SHARD", 6500)
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    run("shards", source, folder / "pets.tars", "--workers", 0)
    names = sorted(path.name for path in (folder / "pets.tars").iterdir())
    assert names == ["000000.tar", "000000.tar.index", "000001.tar", "000001.tar.index", "classes.json"]
    monkeypatch.setattr("guided_diffusion.data.tars.write_index", None)
    listing = find_images(folder / "pets.tars")
    assert listing.skipped().startswith("skipped 1")
    assert read_labels(listing).classes == ["cat", "dog"]
    assert read_labels(find_images(f"{folder}/pets.tars/{{000000..000001}}.tar")).ids == [0, 0, 1]
    assert read_captions(listing).texts == [["a cat/1", "an animal"], [], ["a dog/2", "an animal"]]
    run("shards", f"{folder}/pets.tars/{{000000..000001}}.tar", folder / "again.tars", "--workers", 0)
    assert read_captions(find_images(folder / "again.tars")).texts == read_captions(listing).texts


def test_a_name_that_is_no_folder_of_tars_is_refused(made, capfd):
    source, _, _, folder = made("shards")
    assert "is no folder of tars: give a name that ends in .tars" in refused(capfd, "shards", source, folder / "pets")
