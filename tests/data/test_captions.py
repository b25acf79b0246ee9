"""Captions in every form, and the one that an image is trained with."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch as th
from PIL import Image
from pyarrow import parquet

from guided_diffusion.data.captions import Captioning, Captions, read_captions
from guided_diffusion.data.sources import find_images
from guided_diffusion.image_datasets import load_data

EMOJI = Path(__file__).parents[2] / "datasets" / "emoji64.zip"
PICTURES = ("a.png", "b/c.png", "d e.png")


def folder_of(root: Path, tables: dict[str, Any], pictures: tuple[str, ...] = PICTURES) -> str:
    for name in pictures:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), len(name), np.uint8)).save(root / name)
    for name, content in tables.items():
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(content), root / name)
        elif isinstance(content, bytes | str):
            (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            (root / name).write_text(json.dumps(content))
    return str(root)


def texts(*arguments: Any, column: str = "") -> list[list[str]]:
    return read_captions(find_images(folder_of(*arguments)), column).texts


ONE_EACH = [["a  cat"], ["two dogs"], ["rain, snow"]]
ROWS = [{"file_name": name, "text": text[0]} for name, text in zip(PICTURES, ONE_EACH, strict=True)]
FORMS: dict[str, dict[str, Any]] = {
    "json": {"captions.json": {name: text[0] for name, text in zip(PICTURES, ONE_EACH, strict=True)}},
    "lists": {"captions.json": dict(zip(PICTURES, ONE_EACH, strict=True))},
    "without extension": {"captions.json": {"a": "a cat", "c": "two dogs", "d e": "rain, snow"}},
    "rows": {"captions.json": ROWS},
    "jsonl": {"metadata.jsonl": "\n".join(map(json.dumps, ROWS))},
    "csv": {"captions.csv": 'file,caption\na.png,a cat\nb/c.png,two dogs\nd e.png,"rain, snow"\n'},
    "beside labels": {"labels.csv": 'file,label,text\na.png,0,a cat\nb/c.png,1,two dogs\nd e.png,1,"rain, snow"\n'},
    "parquet": {"metadata.parquet": [{**row, "image": b"\x89PNG", "width": 4} for row in ROWS]},
    "txt": {"a.txt": "\ufeffa cat\n", "b/c.txt": "two dogs", "d e.txt": "\n rain, snow \r\n", "notes.txt": "no"},
}


@pytest.mark.parametrize("form", FORMS)
def test_captions_are_read_in_every_form(tmp_path, form):
    assert texts(tmp_path, FORMS[form]) == [["a cat"], ["two dogs"], ["rain, snow"]]


SEVERAL: dict[str, tuple[dict[str, Any], str]] = {
    "lists": ({"captions.json": {"a.png": ["x", "y", "x", " "], "b/c.png": ["z"]}}, ""),
    "columns": ({"captions.json": {"a.png": {"p": "x", "Q": "y"}, "b/c.png": {"p": "z", "Q": None}}}, "P, q"),
    "rows": ({"metadata.csv": "file,text\na.png,x\na.png,y\nb/c.png,z\nd e.png,\nlost.png,w\n"}, ""),
    "lists of rows": ({"captions.parquet": [{"f": "a.png", "text": ["x", "y"]}, {"f": "c.png", "text": ["z"]}]}, ""),
    "lines": ({"a.txt": "x\n\ny\n", "b/c.txt": "z"}, ""),
}


@pytest.mark.parametrize("form", SEVERAL)
def test_an_image_may_have_several_captions_or_none(tmp_path, form):
    tables, column = SEVERAL[form]
    assert texts(tmp_path, tables, column=column) == [["x", "y"], ["z"], []]


def test_captions_lie_in_a_zip_of_a_folder_too(tmp_path):
    root = Path(folder_of(tmp_path / "set", FORMS["json"]))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(root.rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path))
    assert read_captions(find_images(tmp_path / "set.zip")).texts == [["a cat"], ["two dogs"], ["rain, snow"]]


def test_the_names_of_the_emoji_are_captions():
    source = find_images(EMOJI)
    table = read_captions(source)
    assert table.origin == "captions.json, name"
    assert table.texts[source.images.index("symbols_google-0023-fe0f-20e3.png")] == ["hash key"]
    both = read_captions(source, "name,short_name")
    assert both.texts[source.images.index("symbols_google-0023-fe0f-20e3.png")] == ["hash key", "hash"]
    assert all(table.texts)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "nothing": ({}, "", "holds no captions: give a captions.json"),
    "labels alone": ({"labels.csv": "file,label\na.png,x\n"}, "", r"no column caption or captions or text \(label\)"),
    "another column": ({"captions.json": {"a.png": {"naem": "x"}}}, "name", r"'name' is none of its columns \(naem\)"),
    "numbers": ({"captions.json": {"a.png": 3}}, "", "the caption of 'a.png' is neither a text nor a list"),
    "other files": ({"captions.json": {"x.png": "x"}}, "", "names no image: it begins with 'x"),
    "a list": ({"captions.json": [1]}, "", "is neither"),
    "no parquet": ({"captions.parquet.": [], "captions.csv": "a.png\n"}, "", "cannot be used"),
    "bytes": ({"a.txt": b"\xff\xfe\xff"}, "", "'a.txt' in .* is no text in UTF-8"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_read_is_a_sentence(tmp_path, fault):
    tables, column, sentence = REFUSED[fault]
    with pytest.raises(ValueError, match=sentence):
        texts(tmp_path, tables, column=column)


def test_a_damaged_parquet_is_a_sentence(tmp_path):
    folder_of(tmp_path, {})
    (tmp_path / "captions.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"captions\.parquet.* cannot be used: it is no parquet"):
        read_captions(find_images(tmp_path))


def test_images_without_a_caption_are_counted_or_left_out(tmp_path):
    source = find_images(folder_of(tmp_path, {"a.txt": "x", "b/c.txt": " \n"}))
    with pytest.raises(ValueError, match=r"2 of 3 images have no caption in NAME.txt \('b/c.png', 'd e.png'\)"):
        Captioning().match(source, print)
    lines: list[str] = []
    kept, captions = Captioning(skip_uncaptioned=True).match(source, lines.append)
    assert kept.images == ["a.png"]
    assert captions.all_texts() == ["x"]
    assert lines == ["captions from NAME.txt: 1 of 1 images, 2 left out"]


def test_the_choice_is_keyed_and_fair():
    captions = Captions({"a": ["x", "y"], "b": ["z"]}, seed=3, dropout=0.25)
    drawn = [captions.choose((epoch, 0), "a") for epoch in range(4000)]
    assert drawn == [captions.choose((epoch, 0), "a") for epoch in range(4000)]
    shares = {text: drawn.count(text) / len(drawn) for text in ("x", "y", "")}
    assert shares == pytest.approx({"x": 0.375, "y": 0.375, "": 0.25}, abs=0.03)
    assert {Captions(captions.texts, 3).choose((epoch, 1), "b") for epoch in range(50)} == {"z"}
    other = [Captions(captions.texts, 4, 0.25).choose((epoch, 0), "a") for epoch in range(100)]
    assert other != drawn[:100]


def numbers(words: Any) -> dict[str, th.Tensor]:
    """Keywords that show the texts."""
    return {"tokens": th.tensor([[ord(letter) for letter in word.ljust(8)] for word in words])}


def words_of(cond: dict[str, th.Tensor]) -> list[str]:
    return ["".join(map(chr, row)).strip() for row in cond["tokens"].tolist()]


def stream_of(folder: str, **options: Any) -> Any:
    captioning = Captioning(dropout=options.pop("dropout", 0.0), skip_uncaptioned=True)
    stream = load_data(
        data_dir=folder, image_size=4, random_flip=False, log=str, **{"batch_size": 4} | options, captioning=captioning
    )
    stream.captions.keywords = numbers
    return stream


@pytest.fixture
def shades(tmp_path):
    """Twelve images whose grey value g has the captions "g" and "g!"; there is a thirteenth without one."""
    for grey in range(13):
        Image.fromarray(np.full((4, 4), grey, np.uint8)).save(tmp_path / f"{grey:02d}.png")
        if grey < 12:
            (tmp_path / f"{grey:02d}.txt").write_text(f"{grey}\n{grey}!\n")
    return tmp_path


def greys(images: th.Tensor) -> list[str]:
    return [str(round((value.item() + 1) * 127.5)) for value in images[:, 0, 0, 0]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_image_comes_with_one_of_its_captions(shades, num_workers):
    stream = stream_of(str(shades), num_workers=num_workers, batch_size=5)
    seen = []
    for _ in range(12):
        images, cond = next(stream)
        words = words_of(cond)
        assert [word.rstrip("!") for word in words] == greys(images)
        seen += words
    assert len(set(seen)) > 12  # both captions of some images over the epochs
    stream.close()


def test_a_resumed_stream_goes_on_with_the_same_captions(shades):
    stream = stream_of(str(shades), dropout=0.3)
    batches = [next(stream) for _ in range(7)]
    assert "" in [word for _, cond in batches for word in words_of(cond)]
    resumed = stream_of(str(shades), dropout=0.3)
    resumed.load_state_dict({"batches": 4, "images": 16})
    for images, cond in batches[4:]:
        again, labels = next(resumed)
        assert (images == again).all()
        assert (cond["tokens"] == labels["tokens"]).all()


def test_ranks_see_the_captions_that_one_process_sees(shades):
    whole = words_of(next(stream_of(str(shades), dropout=0.3))[1])
    ranks = [stream_of(str(shades), dropout=0.3, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [word for stream in ranks for word in words_of(next(stream)[1])] == whole


def test_an_image_in_place_of_an_unreadable_one_has_no_caption(shades):
    (shades / "03.png").write_bytes(b"no image")
    stream = stream_of(str(shades), on_bad_image="skip")
    words, values = [], []
    for _ in range(3):
        images, cond = next(stream)
        words += words_of(cond)
        values += greys(images)
    assert words.count("") == 1
    assert all(word in ("", value, f"{value}!") for word, value in zip(words, values, strict=True))


def test_a_stream_of_captions_needs_an_encoder(shades):
    stream = stream_of(str(shades))
    stream.captions.keywords = None
    with pytest.raises(ValueError, match=r"set `captions\.keywords`"):
        next(stream)
