"""Tables of labels that lie beside images: dataset.json (EDM), labels.csv, metadata.csv and .jsonl (Hugging Face).

The column that names the images is the one whose cells do; names may lack an extension, begin with "./" or be absolute
paths, as long as it is clear which image is meant.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from ..config import CLASS_RULES
from ..runtime.errors import UserError
from ..runtime.files import parse_json, printable, quoted, reason
from ..runtime.options import nearest
from .sources import IMAGE_EXTENSIONS, LABEL_FILES, ImageSource, read_bytes

Label = str | int

LONGEST_ID = 18  # characters of a number
LONGEST_PATH = 4096
SAMPLED = 500  # rows that show which column names the images
FILE_HEADINGS = ("file", "file_name", "filename", "path", "file_path", "filepath", "image", "image_path", "img", "name")
CAPTIONS = ("text", "caption", "captions", "prompt", "description")
CAPTIONS_OR_NUMBERS = (*CAPTIONS, "id", "index", "idx", "no", "number", "", "unnamed: 0")


class Table(NamedTuple):
    """Rows of as many cells as there are columns; the heading is [] where there is none."""

    heading: Sequence[str]
    rows: Sequence[Sequence[Any]]


def read(source: ImageSource, rule: str, column: str) -> tuple[list[Label], list[str]]:
    """The label of every image from the table of a rule, and lines for the user."""
    file = _find(source, rule)
    if not file:
        raise UserError(
            f"class_from {rule} needs the file {' or '.join(LABEL_FILES[rule])} in {source.root!r}, which is not "
            f"there; write it, or choose another of {', '.join(CLASS_RULES)}"
        )
    names = _Names(source, file)
    try:
        table = _parsed(source, file, names)
        path_column, label_column = _columns(table, names, column)
        labels, surplus = _looked_up(table, names, path_column, label_column)
    except (ValueError, OSError) as error:
        raise UserError(f"{file!r} in {source.root!r} cannot be used: {reason(error)}; correct it") from error
    unlabelled = [name for name in names.all if name not in labels]
    if unlabelled:
        shown = printable(", ".join(map(str, table.rows[0]))) if table.rows else "nothing"
        raise UserError(
            f"{len(unlabelled)} of {len(names.all)} images have no label in {file!r}, the first {unlabelled[0]!r}; "
            f"add them, with paths as they are below that file, which begins with {shown!r}"
        )
    notes = [f"{file} labels {surplus} files that are not there"] * bool(surplus)
    if len(table.heading) > 2:
        notes.append(f"labels are the column {table.heading[label_column]!r} of {', '.join(table.heading)}")
    return as_numbers([labels[name] for name in names.all]), notes


def _find(source: ImageSource, rule: str) -> str:
    """The table of a rule, at the root or in the one folder that holds all images, as in a zip of a folder; or ''."""
    folders = (name.split("/")[:-1] for name in (min(source.images), max(source.images)))
    shared = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*folders, strict=False))]
    places = ["/".join([*shared[:depth], file]) for file in LABEL_FILES[rule] for depth in range(len(shared) + 1)]
    return next((place for place in places if place in source.others), "")


def find_any(source: ImageSource, column: str) -> tuple[str, str]:
    """(rule, table) of a table that has labels, ("", "") where there is none.

    :raises ValueError: if there are tables, but further down, each of a part of the images.
    """
    tables = {rule: _find(source, rule) for rule in LABEL_FILES}
    for rule, file in tables.items():
        if file and (column or not os.path.basename(file).startswith("metadata") or _has_labels(source, file)):
            return rule, file
    known = [name for names in LABEL_FILES.values() for name in names if not name.startswith("metadata")]
    deeper = [name for name in source.others if os.path.basename(name) in known]
    if deeper and not any(tables.values()):
        raise UserError(
            f"{quoted(deeper[0])} in {source.root!r} is the table of a part of the images: give that part as data_dir, "
            "or choose another class_from"
        )
    return "", ""


def _has_labels(source: ImageSource, file: str) -> bool:
    """Whether a table of metadata has more than captions."""
    names = _Names(source, file)
    try:
        table = _parsed(source, file, names)
        path_column = _path_column(table, names)
    except (ValueError, OSError):
        return True  # reading it says what is wrong
    return any(
        name.strip().lower() not in CAPTIONS_OR_NUMBERS for i, name in enumerate(table.heading) if i != path_column
    )


def _columns(table: Table, names: _Names, column: str) -> tuple[int, int]:
    """The columns of paths and of labels.

    :raises ValueError: if it is not clear which that is, listing the columns.
    """
    path_column = _path_column(table, names)
    heading = [name.strip() for name in table.heading]
    rest = [index for index in range(len(table.rows[0]) if table.rows else 2) if index != path_column]
    listed = ", ".join(printable(heading[index]) for index in rest) if heading else f"{len(rest)} without a heading"
    if column:
        named = [index for index in rest if heading and column.lower() == heading[index].lower()]
        if not named:
            raise UserError(f"label_column {column!r} is none of its columns ({listed}){nearest(column, heading)}")
        return path_column, named[0]
    likely = [i for i in rest if len(rest) == 1 or not heading or heading[i].lower() not in CAPTIONS_OR_NUMBERS]
    if len(likely) != 1:
        first = ", ".join(map(str, table.rows[0])) if table.rows else ""
        raise UserError(
            f"it has several columns beside the files ({listed}), as in {printable(first)!r}: give --label_column, the "
            f"one with the labels{'' if heading else ', and the table a heading'}"
        )
    return path_column, likely[0]


def _path_column(table: Table, names: _Names) -> int:
    """The column most of whose cells name images, the first where none does."""
    rows = table.rows[:SAMPLED]

    def score(index: int) -> tuple[int, int, bool, int]:
        cells = [row[index] for row in rows if isinstance(row[index], str)]
        called = bool(table.heading) and table.heading[index].strip().lower() in FILE_HEADINGS
        return sum(cell in names.exact for cell in cells), sum(names.find(cell) != "" for cell in cells), called, -index

    return max(range(len(rows[0]) if rows else 0), key=score, default=0)


def _looked_up(table: Table, names: _Names, path_column: int, label_column: int) -> tuple[dict[str, Label], int]:
    """The label of each image that a table names, and how many files it names that are not there."""
    labels: dict[str, Label] = {}
    surplus = set[str]()
    for row in table.rows:
        path, label = row[path_column], row[label_column]
        if not isinstance(path, str):
            raise UserError(f"the path {printable(repr(path))} is no text")
        label = int(label) if isinstance(label, float) and label.is_integer() else label
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise UserError(
                f"the label {printable(repr(label))} of {printable(path)!r} is neither a class id nor a name"
            )
        name = names.find(path)
        surplus |= set() if name else {path}
        if name and labels.setdefault(name, label) != label:
            raise UserError(f"{printable(path)!r} has two labels, {printable(str(labels[name]))} and {label!r}")
    return labels, len(surplus)


def as_numbers(labels: Sequence[Label]) -> list[Label]:
    """Labels as numbers if all are, ``2.0`` too, else all as text."""
    texts = [label.strip() if isinstance(label, str) else label for label in labels]
    digits = [text if isinstance(text, int) else re.sub(r"^(-?\d+)\.0*$", r"\1", text) for text in texts]
    if not all(isinstance(text, int) or re.fullmatch(r"-?\d+", text) for text in digits):
        return [str(text) for text in texts]
    long = [text for text in digits if isinstance(text, str) and len(text) > LONGEST_ID]
    if long:
        raise UserError(f"the label {printable(long[0])} is too large for a class id; correct it")
    return [int(text) for text in digits]


class _Names:
    """The images as seen from where a table lies, found by what the table calls them."""

    def __init__(self, source: ImageSource, file: str) -> None:
        start = len(file) - len(os.path.basename(file))
        self.all = [name[start:] for name in source.images]
        self.exact = set(self.all)

    def find(self, text: str) -> str:
        """The image that is meant: by its path, by the end of a longer one, or by its name alone; '' for none."""
        if text in self.exact or len(text) > LONGEST_PATH:
            return text if text in self.exact else ""
        parts = [part for part in text.strip().replace("\\", "/").split("/") if part not in ("", ".")]
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        exact = next((end for end in ends if end in self.exact), "")
        if exact or not parts:
            return exact
        named = os.path.splitext(parts[-1])[1].lower() in IMAGE_EXTENSIONS
        meant = [self._stems.get(end, "") for end in ends if not named]
        meant += [self._bare.get(end, "") for end in ends if len(parts) == 1]
        return next(filter(None, meant), "")

    @cached_property
    def _stems(self) -> dict[str, str]:
        return _unambiguous((os.path.splitext(name)[0], name) for name in self.all)

    @cached_property
    def _bare(self) -> dict[str, str]:
        bare = [(os.path.basename(name), name) for name in self.all]
        return _unambiguous((os.path.splitext(key)[0], name) for key, name in bare) | _unambiguous(bare)


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Key -> name, '' where a key is that of several names."""
    names: dict[str, str] = {}
    for key, name in pairs:
        names[key] = name if names.get(key, name) == name else ""
    return names


def _parsed(source: ImageSource, file: str, names: _Names) -> Table:
    content = read_bytes(source.path(file))
    if file.endswith(".jsonl"):
        return _of_objects([parse_json(line) for line in content.splitlines() if line.strip()])
    return _of_json(content) if file.endswith(".json") else _of_text(content, names)


def _of_json(content: bytes) -> Table:
    """EDM's ``{"labels": [[path, id], ...]}``, or a list of objects."""
    try:
        value = parse_json(content)
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            return _of_objects(value)
        labels = value["labels"] or []
        pairs = list(labels.items()) if isinstance(labels, dict) else [(path, label) for path, label in labels]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'it is not {{"labels": [[path, id], ...]}} ({reason(error)})') from error
    return Table(["file", "label"], pairs)


def _of_objects(objects: Sequence[Any]) -> Table:
    if not objects or not all(isinstance(value, dict) for value in objects):
        raise UserError('it is not {"file_name": ..., "label": ...} in every line')
    heading = [name for name, value in objects[0].items() if not isinstance(value, dict | list)]
    return Table(heading, [[value.get(name) for name in heading] for value in objects])


def _of_text(content: bytes, names: _Names) -> Table:
    """A table with commas, semicolons or tabs; its first line is a heading unless it names an image."""
    try:
        code = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        lines = io.StringIO(content.decode(code), newline=None).read().split("\n")  # line ends of any system
        rows = max((_split(lines, delimiter) for delimiter in ",;\t"), key=lambda rows: _naming_rows(rows, names))
    except (ValueError, csv.Error) as error:
        raise UserError(f"it is no table of UTF-8 text ({reason(error)})") from error
    width = max(2, len(rows[0])) if rows else 2
    odd = next((row for row in rows if len(row) != width), None)
    if odd is not None:
        first = ",".join(rows[0] if len(rows[0]) > 1 else ["file", "label"])
        raise UserError(
            f"the line {printable(','.join(odd))!r} is not {printable(first)!r}, {len(odd)} columns in place of "
            f"{width}; put a comma between them, and quotation marks around what holds one"
        )
    column = _path_column(Table([], rows), names)
    first, *rest = [row[column] for row in rows[:SAMPLED]] or [""]
    like_no_other = not names.find(first) or any(cell in names.exact for cell in rest)
    headed = bool(rows) and first not in names.exact and (first.strip().lower() in FILE_HEADINGS or like_no_other)
    return Table(rows[0] if headed else [], rows[headed:])


def _split(lines: Iterable[str], delimiter: str) -> list[list[str]]:
    """The rows of a text, without those that are empty."""
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, skipinitialspace=True)
    return [row for row in rows if any(cell.strip() for cell in row)]


def _naming_rows(rows: Sequence[Sequence[str]], names: _Names) -> int:
    return sum(len(row) > 1 and any(map(names.find, row)) for row in rows[:SAMPLED])
