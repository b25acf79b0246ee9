"""Tables of labels in every dialect, and classes that are called by numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.commands import flags
from guided_diffusion.commands.training import open_streams
from guided_diffusion.data.labels import Labels, read_labels
from guided_diffusion.data.sources import find_images
from guided_diffusion.image_datasets import load_data

PICTURES = ("a.png", "b/c.png", "d e.jpg")


def labelled(folder: Path, tables: dict[str, str | bytes], pictures: Any = PICTURES, **options: Any) -> Labels:
    """The labels that tables give some pictures."""
    for name in pictures:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / name)
    for name, content in tables.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_labels(find_images(str(folder)), **options)


def names(labels: Labels) -> list[str]:
    return [labels.classes[number] for number in labels.ids]


# each says that a.png is x, b/c.png y and d e.jpg x
DIALECTS: dict[str, str | bytes] = {
    "plain": "file,label\na.png,x\nb/c.png,y\nd e.jpg,x\n",
    "no heading": "a.png,x\nb/c.png,y\nd e.jpg,x\n",
    "semicolons": "file;label\na.png;x\nb/c.png;y\nd e.jpg;x\n",
    "tabs": "file\tlabel\na.png\tx\nb/c.png\ty\nd e.jpg\tx\n",
    "CRLF and blank lines": "file,label\r\n\r\na.png,x\r\nb/c.png,y\r\n,\r\nd e.jpg,x\r\n\r\n",
    "BOM": b"\xef\xbb\xbffile,label\na.png,x\nb/c.png,y\nd e.jpg,x",
    "quotation marks": '"file","label"\n"a.png","x"\n"b/c.png","y"\n"d e.jpg","x"\n',
    "spaces": "file, label\na.png, x\nb/c.png, y\nd e.jpg , x \n",
    "upper case": "FILE,LABEL\na.png,x\nb/c.png,y\nd e.jpg,x\n",
    "other order": "label,filename\nx,a.png\ny,b/c.png\nx,d e.jpg\n",
    "numbered rows": "id,file,label\n1,a.png,x\n2,b/c.png,y\n3,d e.jpg,x\n",
    "an index of pandas": ",file,label\n0,a.png,x\n1,b/c.png,y\n2,d e.jpg,x\n",
    "captions": 'file_name,text,label\na.png,"one, two",x\nb/c.png,three,y\nd e.jpg,"",x\n',
    "without extension": "file,label\na,x\nb/c,y\nd e,x\n",
    "dots": "file,label\n./a.png,x\n./b/c.png,y\n./d e.jpg,x\n",
    "another machine": "file,label\n/data/z/a.png,x\n/data/z/b/c.png,y\n/data/z/d e.jpg,x\n",
    "Windows": "file,label\nC:\\z\\a.png,x\nC:\\z\\b\\c.png,y\nC:\\z\\d e.jpg,x\n",
    "bare names": "file,label\na.png,x\nc.png,y\nd e.jpg,x\n",
    "bare names without extension": "file,label\na,x\nc,y\nd e,x\n",
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects(tmp_path: Path, name: str) -> None:
    labels = labelled(tmp_path, {"labels.csv": DIALECTS[name]})
    assert names(labels) == ["x", "y", "x"]
    assert labels.class_from == "csv"


def test_absolute_names(tmp_path: Path) -> None:
    table = "".join(f"{tmp_path}/{name},{index}\n" for index, name in enumerate(PICTURES))
    assert labelled(tmp_path, {"labels.csv": table}).ids == [0, 1, 2]


ROWS = [
    {"file_name": "a.png", "label": "x"},
    {"file_name": "b/c.png", "label": "y"},
    {"file_name": "d e.jpg", "label": "x"},
]
OTHER_FILES = {
    "labels.tsv": DIALECTS["tabs"],
    "metadata.csv": DIALECTS["captions"],
    "metadata.jsonl": "".join(f"{json.dumps({**row, 'text': 'long', 'box': [1, 2]})}\n" for row in ROWS),
    "dataset.json": json.dumps(ROWS),
}


@pytest.mark.parametrize("file", OTHER_FILES)
def test_other_files(tmp_path: Path, file: str) -> None:
    labels = labelled(tmp_path, {file: OTHER_FILES[file]})
    assert names(labels) == ["x", "y", "x"]
    assert labels.class_from == ("json" if "json" in file else "csv")
    assert f"classes from {file}" in labels.notes


@pytest.mark.parametrize("file", ["metadata.csv", "metadata.jsonl"])
def test_captions_are_no_labels(tmp_path: Path, file: str) -> None:
    rows = [{"file_name": name, "text": f"a picture {name}"} for name in ("cat/1.png", "dog/1.png")]
    table = "file_name,text\n" + "\n".join(",".join(row.values()) for row in rows)
    content = table if file.endswith("csv") else "\n".join(map(json.dumps, rows))
    labels = labelled(tmp_path, {file: content}, ["cat/1.png", "dog/1.png"])
    assert (labels.class_from, labels.classes) == ("folder", ["cat", "dog"])


NUMBERS = {
    "2.0": ("file,label\na.png,2.0\nb/c.png,0.0\nd e.jpg,1.", [2, 0, 1]),
    "spaces": ("a.png, 2 \nb/c.png,0\nd e.jpg,1", [2, 0, 1]),
    "quoted": ('a.png,"2"\nb/c.png,"0"\nd e.jpg,"1"', [2, 0, 1]),
    "fractions are names": ("a.png,2.5\nb/c.png,0\nd e.jpg,1", [2, 0, 1]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(tmp_path: Path, name: str) -> None:
    table, ids = NUMBERS[name]
    assert labelled(tmp_path, {"labels.csv": table}).ids == ids


SEVERAL = "file,breed,colour\na.png,x,red\nb/c.png,y,blue\nd e.jpg,x,red\n"


def test_the_column_is_chosen_by_name(tmp_path: Path) -> None:
    assert names(labelled(tmp_path, {"labels.csv": SEVERAL}, label_column="colour")) == ["red", "blue", "red"]
    labels = labelled(tmp_path, {"labels.csv": SEVERAL}, label_column="BREED")
    assert names(labels) == ["x", "y", "x"]
    assert "labels are the column 'breed' of file, breed, colour" in labels.notes


REFUSED: dict[str, tuple[dict[str, str | bytes], dict[str, Any], str]] = {
    "several columns": ({"labels.csv": SEVERAL}, {}, "its columns are breed, colour: --label_column names"),
    "no such column": (
        {"labels.csv": SEVERAL},
        {"label_column": "color"},
        "its columns are breed, colour, and none of them is 'color'; did you mean colour\\?: --label_column",
    ),
    "no heading": (
        {"labels.csv": "a.png,x,red\n"},
        {},
        "the line 'a.png,x,red' is not 'file,label', 3 columns in place",
    ),
    "an open comma": (
        {"labels.csv": "file,label\na.png,drum, bass\n"},
        {},
        "the line 'a.png,drum,bass' is not 'file,label'.*3 columns in place of 2.*quotation marks",
    ),
    "names nobody": (
        {"labels.csv": "file,label\nz.png,1\n"},
        {},
        "3 of 3 images have no label in 'labels.csv', the first 'a.png'.*begins with 'z.png, 1'",
    ),
    "two labels by two names": ({"labels.csv": "file,label\na,x\na.png,y\n"}, {}, "'a.png' has two labels, x and 'y'"),
    "no effect": (
        {},
        {"class_from": "folder", "label_column": "x"},
        "label_column 'x' has no effect with class_from f",
    ),
    "jsonl": ({"metadata.jsonl": "[1]\n"}, {"class_from": "json"}, '"file_name": ..., "label": ...'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_one_sentence(tmp_path: Path, name: str) -> None:
    tables, options, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        labelled(tmp_path, tables, **options)
    assert "\n" not in str(caught.value)


TWELVE = list(map(str, range(12)))
BY_TEXT = sorted(TWELVE)
CALLED = {
    # name: (pictures, rule, classes by id, a word of the notes)
    "folders from 0 on": (
        [f"{name}/1.png" for name in TWELVE],
        "folder",
        TWELVE,
        "",
    ),
    "folders from 1 on": (
        [f"{name}/1.png" for name in TWELVE[1:]],
        "folder",
        BY_TEXT[1:],
        "id 0 is class 1",
    ),
    "file names": ([f"{name}_1.png" for name in TWELVE], "filename", BY_TEXT, "id 2 is class 10"),
    "of one width": ([f"{int(name):02}_1.png" for name in TWELVE], "filename", [f"{int(n):02}" for n in TWELVE], ""),
    "words": (["cat_1.png", "dog_1.png"], "filename", ["cat", "dog"], ""),
}


@pytest.mark.parametrize("name", CALLED)
def test_classes_that_are_called_by_numbers(tmp_path: Path, name: str) -> None:
    """The originals order all names as text; only folders that are the numbers from 0 on are ids themselves."""
    pictures, rule, classes, words = CALLED[name]
    labels = labelled(tmp_path, {}, pictures, class_from=rule)
    assert labels.classes == classes
    assert words in "\n".join(labels.notes)
    assert words or "ids follow" not in "\n".join(labels.notes)
    saved = labelled(tmp_path, {}, pictures, class_from=rule, classes=BY_TEXT if "folders" in name else classes)
    assert saved.classes == (BY_TEXT if "folders" in name else classes)


def test_the_table_is_said_at_the_start(tmp_path: Path) -> None:
    labelled(tmp_path, {}, [f"{name}_1.png" for name in TWELVE])
    lines: list[str] = []
    load_data(data_dir=str(tmp_path), batch_size=1, image_size=4, class_cond=True, log=lines.append)
    assert "  class 2: 10 (1 images)" in lines[-1].splitlines()


def test_the_flag_reaches_the_table(tmp_path: Path) -> None:
    labelled(tmp_path, {"labels.csv": SEVERAL}, label_column="breed")
    values = {"data_dir": str(tmp_path), "label_column": "colour", "num_workers": 0, "num_classes": 2}
    stream, _ = open_streams(flags.Flags("image_train", values), class_cond=True, image_size=4)
    assert stream.classes == ["blue", "red"]
