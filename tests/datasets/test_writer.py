"""What all scripts in datasets/ share: the writer with its journal, and the readers of tars and pickles."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from dataset_sources import ROOT, SCRIPTS, packed, pixels, tar_of
from PIL import Image

from conversion import output, pickles
from conversion.config import ConversionConfig
from conversion.images import Item, Recipe, Source, bad, encode, of_pixels
from conversion.output import Folder, Journal, Zip
from conversion.writer import ClassNames, convert
from guided_diffusion.data.tars import Truncated, members


class Killed(BaseException):
    """What a test ends a run with."""


COUNT = 23


def item(number, content=None):
    image = pixels(number) if number % 3 else packed(number)
    return Item(f"k{number}", "cd"[number % 2], lambda: image if content is None else content)


def items(*faults, extra=()):
    """Pictures, some of which cannot be used."""
    made = [item(n, b"no picture" if n % 2 else b"") if n in faults else item(n) for n in range(COUNT)]
    return Source([*made, *extra])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "source").mkdir()
    return ConversionConfig(source=str(tmp_path / "source"), out=str(tmp_path / "out" / "data.zip"), workers=0)


def result(config, place, source=None, **flags):
    """Everything beside the output of a run."""
    folder = os.path.join(os.path.dirname(config.source), place)
    flags = {"out": os.path.join(folder, os.path.basename(config.out)), **flags}
    convert(source or items(), replace(config, **flags), "script")
    return contents(folder)


def contents(folder):
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(base, name), "rb") as file:
                found[os.path.relpath(os.path.join(base, name), folder)] = file.read()
    return found


def report(config):
    with open(f"{config.out}.report.json") as file:
        return json.load(file)


def read_part(config):
    with open(f"{config.out}.part", "rb") as file:
        return file.read()


def test_the_number_of_workers_changes_nothing(config):
    """Faults stay in their places too."""
    runs = [result(config, f"w{n}", items(3, 4, 20), workers=n, skip_bad=True, size=8) for n in (0, 1, 3)]
    assert runs[0] == runs[1] == runs[2]
    skipped = json.loads(runs[0]["data.zip.report.json"])["skipped"]
    assert [entry["item"] for entry in skipped] == ["k3", "k4", "k20"]
    assert [entry["reason"] for entry in skipped] == ["its content is no image", "it is empty", "it is empty"]


@pytest.mark.parametrize("name", ["data", "data.zip"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_kill_at_any_place_changes_nothing(config, name, skip_bad, monkeypatch):
    """Every run is killed some places further on, before or after the line in the journal, until one gets through."""
    source = items(4, 11) if skip_bad else items()
    config = replace(config, out=config.out.replace("data.zip", name), skip_bad=skip_bad)
    add, left = Journal.add, [0]

    def killing(self, entry):
        if left[0] == 0:
            if rng.random() < 0.5:
                add(self, entry)
            raise Killed
        left[0] -= 1
        add(self, entry)

    whole, rng, kills = result(config, "whole", source), random.Random(0), 0
    monkeypatch.setattr(Journal, "add", killing)
    while not os.path.exists(config.out):
        left[0] = rng.randrange(6)
        try:
            convert(source, config, "script")
        except Killed:
            kills += 1
    assert kills > 3
    assert contents(os.path.dirname(config.out)) == whole


@pytest.mark.parametrize("sink", [Folder, Zip])
def test_a_kill_at_the_very_end_changes_nothing(config, sink, monkeypatch):
    """The directory of the zip is written, and reports and checksums; only the name is not given yet."""
    config = replace(config, out=config.out if sink is Zip else config.out[: -len(".zip")])
    whole = result(config, "whole")

    def kill(*_):
        raise Killed

    for place in ("rename", "remove"):
        with monkeypatch.context() as patch:
            patch.setattr(output.os if place == "rename" else Journal, place, kill)
            with pytest.raises(Killed):
                convert(items(), config, "script")
        assert os.path.exists(config.out) == (place == "remove")
    convert(items(), config, "script")
    assert contents(os.path.dirname(config.out)) == whole


def begun(config, monkeypatch, lines=15, source=None):
    """A run that was killed after so many images."""
    add, left = Journal.add, [lines]

    def killing(self, entry):
        if not left[0]:
            raise Killed
        left[0] -= 1
        add(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killing)
        with pytest.raises(Killed):
            convert(source or items(), config, "script")


@pytest.mark.parametrize("spoil", ["cut", "bit", "gone"])
@pytest.mark.parametrize("name", ["data", "data.zip"])
def test_what_was_damaged_in_between_is_written_again(config, spoil, name, monkeypatch):
    config = replace(config, out=config.out.replace("data.zip", name))
    begun(config, monkeypatch)
    path = f"{config.out}.part"
    path = path if name == "data.zip" else os.path.join(path, sorted(os.listdir(path))[5])
    with open(path, "rb") as file:
        content = bytearray(file.read())
    content[len(content) // 2] ^= 4
    with open(path, "wb") as file:
        file.write(content if spoil == "bit" else content[: len(content) // 2])
    if spoil == "gone":
        os.remove(path)
    assert result(config, "out") == result(config, "whole")


def test_a_journal_of_nonsense_begins_anew(config, monkeypatch):
    begun(config, monkeypatch)
    with open(f"{config.out}.part.jsonl", "rb") as file:
        first = file.readline()
    with open(f"{config.out}.part.jsonl", "wb") as file:
        file.write(first + b'{"key": "k0", "class": "c", "name": 5}\n[1]\n')
    assert result(config, "out") == result(config, "whole")


def test_only_what_is_missing_is_read_again(config, monkeypatch):
    begun(config, monkeypatch)
    loaded = []

    def counted(made):
        return replace(made, load=lambda: loaded.append(made.key) or made.load())

    convert(Source([counted(made) for made in items().items]), config, "script")
    assert loaded == [f"k{n}" for n in range(15, COUNT)]


def test_what_cannot_be_used_ends_the_run_which_goes_on_when_it_is_repaired(config):
    with pytest.raises(ValueError, match=r"k4 cannot be used, it is empty: repair it .* --skip_bad True"):
        convert(items(4, 11), config, "script")
    assert not os.path.exists(config.out)
    with pytest.raises(ValueError, match="k11 cannot be used, its content is no image"):
        convert(items(11), config, "script")
    assert result(config, "out") == result(config, "whole")


def test_what_was_left_out_is_tried_again_without_the_flag(config, monkeypatch):
    begun(replace(config, skip_bad=True), monkeypatch, source=items(4))
    with pytest.raises(ValueError, match="k4 cannot be used"):
        convert(items(4), config, "script")
    assert result(config, "out") == result(config, "whole")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": 8}, r"was begun by another command \(size 0, now 8\)"),
        ({"format": "jpeg"}, r"another command \(format '', now 'jpeg'\)"),
    ],
)
def test_other_flags_are_not_mixed(config, change, told, monkeypatch):
    begun(config, monkeypatch)
    before = read_part(config)
    with pytest.raises(ValueError, match=told):
        convert(items(), replace(config, **change), "script")
    assert read_part(config) == before


def test_another_source_is_not_mixed(config, monkeypatch):
    begun(config, monkeypatch)
    other = Source([of_pixels("other", "c", pixels(1)), *items().items])
    with pytest.raises(ValueError, match=r"has changed since .* was begun \('other' is where 'k0' was\)"):
        convert(other, config, "script")
    with pytest.raises(ValueError, match="nothing is where 'k0' was"):
        convert(Source([]), config, "script")


def test_items_whose_names_are_no_plain_text_are_the_same_when_a_run_goes_on(config, monkeypatch):
    """As with the narrow space in the names of macOS's screenshots, or with bytes that are no UTF-8."""
    named = ["9.41\u202fAM.png", "caf\udce9.png", "long" * 100]
    source = Source([replace(made, key=f"{made.key}{named[n % 3]}") for n, made in enumerate(items().items)])
    begun(config, monkeypatch, source=source)
    assert result(config, "out", source) == result(config, "whole", source)


def test_two_runs_do_not_write_the_same(config):
    journal = Journal(config.out, {})
    with pytest.raises(ValueError, match="another run is writing"):
        convert(items(), config, "script")
    journal.close()
    os.remove(journal.path)
    convert(items(), config, "script")


def test_an_output_that_is_there_is_kept(config, capsys):
    convert(items(), config, "script")
    before = contents(os.path.dirname(config.out))
    convert(items(), config, "script")
    assert "is complete already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is there already, and not from this command"):
        convert(items(), replace(config, size=8), "script")
    assert contents(os.path.dirname(config.out)) == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"out": "{source}/x.zip"}, "lies in SOURCE"),
        ({"out": ""}, "is no name"),
        ({"source": "{source}/gone"}, "is not there"),
    ],
)
def test_places_that_cannot_be(config, flags, told):
    flags = {name: text.format(source=config.source) for name, text in flags.items()}
    with pytest.raises(ValueError, match=told):
        convert(items(), replace(config, **flags), "script")


def test_a_source_without_an_image_makes_nothing(config):
    with pytest.raises(ValueError, match=r"holds no image that can be used: skipped 1 \(a class with no images: 1\)"):
        convert(Source([bad("n01", "a class with no images", "n01")]), replace(config, skip_bad=True), "script")
    assert not os.path.exists(config.out)


def test_a_full_disk_is_told_and_survived(config, monkeypatch):
    write = zipfile.ZipFile.writestr

    def full(self, info, content):
        if info.filename.startswith("c_0000008"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, info, content)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", full)
        with pytest.raises(OSError, match=r"data.zip.part cannot be written \(No space left on device\)"):
            convert(items(), config, "script")
    assert result(config, "out") == result(config, "whole")


def test_workers_load_no_torch():
    """Which would take each of them seconds and memory."""
    code = "import sys, conversion.images; sys.exit('torch' in sys.modules)"
    folders = os.pathsep.join([str(ROOT), str(SCRIPTS)])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folders}, check=True)


class Deadly(bytes):
    """Ends the worker that it is sent to."""

    def __reduce__(self):
        return (os._exit, (9,))


def test_a_worker_that_is_killed_is_told(config):
    with pytest.raises(OSError, match="a worker process was killed"):
        convert(items(extra=[Item("deadly", "c", lambda: Deadly(b"x"))]), replace(config, workers=1), "script")
    assert not os.path.exists(config.out)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("church_outdoor", "church-outdoor"),
        ("a/b\\c:d", "a-b-c-d"),
        (".hid", "hid"),
        ("Straße 木", "Straße-木"),
        ("../x", "-x"),
    ],
)
def test_classes_as_file_names(label, name):
    names = ClassNames()
    assert names(label) == name
    assert names(label) == name
    assert names.renamed() == {label: name}


@pytest.mark.parametrize("label", ["_", "...", "///", "x" * 151, "\ud800"])
def test_classes_that_cannot_stand_in_a_file_name(label):
    with pytest.raises(ValueError, match="cannot stand in the name of a file"):
        ClassNames()(label)


def test_two_classes_are_not_united(config):
    source = Source([of_pixels("1", "a_b", pixels(1)), of_pixels("2", "a-b", pixels(2))])
    with pytest.raises(ValueError, match="'a_b' and 'a-b' would both be called 'a-b'"):
        convert(source, config, "script")


def test_names_of_their_own_come_once(config, monkeypatch):
    made = [Item(f"{n}", "c", lambda: packed(1), name) for n, name in enumerate(["x", "y", "x", "z"])]
    config = replace(config, skip_bad=True)
    begun(config, monkeypatch, lines=2, source=Source(made))
    convert(Source(made), config, "script")
    assert zipfile.ZipFile(config.out).namelist() == ["c_x.jpg", "c_y.jpg", "c_z.jpg"]
    assert report(config)["skipped"] == [
        {"item": "2", "class": "c", "reason": "the name c_x is another image's already"}
    ]


def test_what_is_kept_and_what_is_made():
    png, jpeg, webp = (packed(1, kind) for kind in ("PNG", "JPEG", "WEBP"))
    assert encode(png, Recipe()) == (".png", png)
    assert encode(jpeg, Recipe()) == (".jpg", jpeg)
    assert [encode(content, Recipe()).extension for content in (webp, pixels(1))] == [".png", ".png"]
    assert {encode(content, Recipe(format="jpeg")).extension for content in (png, jpeg, webp)} == {".jpg"}
    small = [encode(jpeg, Recipe(format="png", size=4, crop=crop)) for crop in ("center", "box")]
    assert small[0] != small[1]
    assert len(encode(png, Recipe(format="jpeg", quality=1)).content) >= 300


@pytest.mark.parametrize(
    ("size", "recipe", "word"),
    [
        ((20000, 20000), Recipe(), "pixels"),
        ((200000, 2), Recipe(size=64), "long and thin"),
        ((200000, 2), Recipe(size=64, crop="box"), "long and thin"),
        (None, Recipe(), "no image"),
    ],
)
def test_pictures_that_do_harm_are_no_pictures(size, recipe, word):
    file = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    if size:
        Image.new("1", size).save(file, "PNG")
    fault = encode(file.getvalue(), recipe)
    assert isinstance(fault, str)
    assert word in fault


def fault_of(read, content):
    """What a reader says of something; '' if it takes it. Anything but a ValueError fails the test."""
    try:
        read(content)
    except ValueError as error:
        return str(error)
    return ""


def whole(content):
    return [(member.name, member.read()) for member in members(io.BytesIO(content))]


def test_a_tar_that_was_cut_anywhere_is_told():
    files = [("a", b"1" * 700), ("b", b""), ("c", b"3" * 512)]
    content = tar_of(files)
    end = 512 * 6  # of the last member, before the empty blocks
    for size in range(1, end + 1, 73):
        got = []
        with pytest.raises(ValueError, match=r"it ends early|it is no tar|unexpected end|end of a tar"):
            for member in members(io.BytesIO(content[:size])):
                got.append((member.name, member.read()))
        assert got == files[: len(got)]
    assert whole(content[: end + 512]) == files


def test_members_that_are_not_read():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in (
            ("link", tarfile.SYMTYPE),
            ("hard", tarfile.LNKTYPE),
            ("pipe", tarfile.FIFOTYPE),
            ("device", tarfile.CHRTYPE),
            ("/etc/passwd", tarfile.REGTYPE),
            ("a/../../b", tarfile.REGTYPE),
            ("folder", tarfile.DIRTYPE),
            ("good", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    faults = {member.name: member.fault for member in members(io.BytesIO(file.getvalue()))}
    assert faults == {
        "link": "a link",
        "hard": "a link",
        "pipe": "no regular file",
        "device": "no regular file",
        "/etc/passwd": "a path that leads out of the tar",
        "a/../../b": "a path that leads out of the tar",
        "good": "",
    }
    for member in members(io.BytesIO(file.getvalue())):
        if member.fault:
            with pytest.raises(ValueError, match=member.fault):
                member.read()


def test_a_member_that_claims_too_much_is_not_read():
    info = tarfile.TarInfo("huge")
    info.size = 2**40
    with pytest.raises(Truncated):
        assert [member.fault for member in members(io.BytesIO(info.tobuf()))] == ["too many bytes"]


def test_garbage_in_a_tar_is_told():
    content, rng = tar_of([("a", b"1" * 700), ("b", b"2" * 2000)]), random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        assert "\n" not in fault_of(whole, bytes(damaged))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["u1", "<i8", ">i4", "<f4"])
def test_pickles_of_plain_data(protocol, kind):
    array = np.arange(24).astype(kind).reshape(2, 3, 4)
    value = {"data": array, "turned": np.asfortranarray(array), "labels": [1, 2], "t": "text", "n": None}
    got = pickles.load(pickle.dumps(value, protocol))
    assert set(got) == set(value)
    assert all(np.array_equal(got[name], array) and got[name].dtype == array.dtype for name in ("data", "turned"))
    assert got["labels"] == [1, 2]


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"\x80\x02}r\xff\xff\xff\x7f" + b"0" * 9,
        b"\x80\x04\x8e" + b"\xff" * 8,
        b"\x80\x02]\x85.",
        b"Pid\n.",
        b"",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.array([{}, None], object)}),
    ],
)
def test_pickles_that_are_not_data(content):
    with pytest.raises(ValueError, match=r"^it is no pickle of arrays \(.+\)$|where numbers are read"):
        pickles.load(content)


def test_garbage_in_a_pickle_is_told():
    content, rng = (
        pickle.dumps({b"data": np.arange(50, dtype=np.uint8), b"labels": list(range(9))}, 2),
        random.Random(0),
    )
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        assert "\n" not in fault_of(pickles.load, bytes(damaged))
