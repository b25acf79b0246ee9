"""Tables of labels that lie beside images: dataset.json (EDM), labels.csv, metadata.csv and .jsonl (Hugging Face).

A table is a heading and rows. The column that names the images is the one whose cells do; names may be written without
an extension, with "./" or as absolute paths, as long as it is clear which image is meant.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import CLASS_RULES
from ..runtime.files import parse_json, printable, quoted, reason
from ..runtime.options import nearest
from .sources import IMAGE_EXTENSIONS, LABEL_FILES, Listing, read_bytes

Label = str | int

LONGEST_ID = 18  # characters of a number
LONGEST_PATH = 4096
LOOKED_AT = 500  # rows that show which column names the images
FILE_HEADINGS = ("file", "file_name", "filename", "path", "file_path", "filepath", "image", "image_path", "img", "name")
NUMBERS_OF_ROWS = ("id", "index", "idx", "no", "number", "", "unnamed: 0")
CAPTIONS = ("text", "caption", "captions", "prompt", "description")


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns.

    :param heading: names of the columns; [] where there is none.
    """

    heading: Sequence[str]
    rows: Sequence[Sequence[Any]]


def find(listing: Listing, rule: str) -> str:
    """The name of the table that a rule reads, '' where there is none."""
    return next((place for file in LABEL_FILES[rule] for place in _places(listing, file)), "")


def find_any(listing: Listing, column: str) -> tuple[str, str]:
    """(rule, table) of a table that has labels, ("", "") where there is none.

    :raises ValueError: if there are tables, but further down, so that each is of a part of the images.
    """
    for rule in LABEL_FILES:
        file = find(listing, rule)
        if file and (column or not os.path.basename(file).startswith("metadata") or _has_labels(listing, file)):
            return rule, file
    known = [name for files in LABEL_FILES.values() for name in files if not name.startswith("metadata")]
    deeper = [name for name in listing.others if os.path.basename(name) in known]
    if deeper and not any(find(listing, rule) for rule in LABEL_FILES):
        raise ValueError(
            f"{quoted(deeper[0])} in {listing.root!r} is the table of a part of the images: give that part as "
            "data_dir, or choose another class_from"
        )
    return "", ""


def _places(listing: Listing, file: str) -> Iterator[str]:
    """A table's name: at the root, or in the one folder that holds everything, as in a zip of a folder."""
    folders = [name.split("/")[:-1] for name in listing.images]
    pairs = zip(min(folders), max(folders), strict=False)
    shared = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    places = ["/".join([*shared[:depth], file]) for depth in range(len(shared) + 1)]
    others = set(listing.others)
    return (place for place in places if place in others)


def read(listing: Listing, rule: str, column: str = "") -> tuple[list[Label], list[str]]:
    """The label of every image, and lines for the user.

    :param column: the one that has the labels; '' where it is clear.
    :raises ValueError: if there is no table, or it does not say one label for every image.
    """
    file = find(listing, rule)
    if not file:
        raise ValueError(
            f"class_from {rule} needs the file {' or '.join(LABEL_FILES[rule])} in {listing.root!r}, which is not "
            f"there; write it, or choose another of {', '.join(CLASS_RULES)}"
        )
    names = _Names(_names_below(listing, file))
    try:
        table = _parsed(listing, file, names)
        files, labels = _columns(table, names, file, column)
        found, surplus = _looked_up(table, names, files, labels)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file!r} in {listing.root!r} cannot be used: {reason(error)}; correct it") from error
    unlabelled = [name for name in names.all if name not in found]
    if unlabelled:
        shown = printable(", ".join(map(str, table.rows[0]))) if table.rows else "nothing"
        raise ValueError(
            f"{len(unlabelled)} of {len(names.all)} images have no label in {file!r}, the first {unlabelled[0]!r}; "
            f"add them, with paths as they are below that file, which begins with {shown!r}"
        )
    notes = [f"{file} labels {surplus} files that are not there"] if surplus else []
    if len(table.heading) > 2:
        notes.append(f"labels are the column {table.heading[labels]!r} of {', '.join(table.heading)}")
    return as_numbers([found[name] for name in names.all]), notes


def _names_below(listing: Listing, file: str) -> list[str]:
    """Names of the images, as seen from where a table lies."""
    start = len(file) - len(os.path.basename(file))
    return [name[start:] for name in listing.images]


def _has_labels(listing: Listing, file: str) -> bool:
    """Whether a table of metadata has more than captions."""
    names = _Names(_names_below(listing, file))
    try:
        table = _parsed(listing, file, names)
        files = _file_column(table, names)
    except (ValueError, OSError):
        return True  # it is said when it is read
    rest = [name for index, name in enumerate(table.heading) if index != files]
    return any(name.strip().lower() not in (*CAPTIONS, *NUMBERS_OF_ROWS) for name in rest)


# ---- the columns


def _columns(table: Table, names: _Names, file: str, column: str) -> tuple[int, int]:
    """The places of the column of files and of that of labels.

    :raises ValueError: if it is not clear which that is, listing the columns.
    """
    files = _file_column(table, names)
    width = len(table.rows[0]) if table.rows else 2
    heading = [name.strip() for name in table.heading]
    rest = [index for index in range(width) if index != files]
    listed = ", ".join(printable(heading[index]) for index in rest) if heading else f"{len(rest)} without a heading"
    if column:
        found = [index for index in rest if heading and column.lower() == heading[index].lower()]
        if not found:
            raise ValueError(f"label_column {column!r} is none of its columns ({listed}){nearest(column, heading)}")
        return files, found[0]
    ignored = () if len(rest) == 1 else (*NUMBERS_OF_ROWS, *CAPTIONS)
    likely = [index for index in rest if not heading or heading[index].lower() not in ignored]
    if len(likely) != 1:
        first = ", ".join(map(str, table.rows[0])) if table.rows else ""
        raise ValueError(
            f"it has several columns beside the files ({listed}), as in {printable(first)!r}: give --label_column, the "
            f"one with the labels{'' if heading else ', and the table a heading'}"
        )
    return files, likely[0]


def _file_column(table: Table, names: _Names) -> int:
    """The column whose cells name images, the first where none does."""
    rows = table.rows[:LOOKED_AT]
    width = len(rows[0]) if rows else 0

    def score(index: int) -> tuple[int, int, bool]:
        cells = [row[index] for row in rows if isinstance(row[index], str)]
        called = bool(table.heading) and table.heading[index].strip().lower() in FILE_HEADINGS
        return sum(cell in names.exact for cell in cells), sum(names.find(cell) != "" for cell in cells), called

    return max(range(width), key=lambda index: (*score(index), -index), default=0)


def _looked_up(table: Table, names: _Names, files: int, labels: int) -> tuple[dict[str, Label], int]:
    """The label of each image that a table names, and how many files it names that are not there.

    :raises ValueError: if a label is none, or a file has two.
    """
    found: dict[str, Label] = {}
    surplus = set[str]()
    for row in table.rows:
        path, label = row[files], row[labels]
        if not isinstance(path, str):
            raise ValueError(f"the path {printable(repr(path))} is no text")
        label = int(label) if isinstance(label, float) and label.is_integer() else label
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(
                f"the label {printable(repr(label))} of {printable(path)!r} is neither a class id nor a name"
            )
        name = names.find(path)
        surplus |= set() if name else {path}
        if name and found.setdefault(name, label) != label:
            raise ValueError(f"{printable(path)!r} has two labels, {printable(str(found[name]))} and {label!r}")
    return found, len(surplus)


def as_numbers(labels: Sequence[Label]) -> list[Label]:
    """Labels as numbers if all are, ``2.0`` too, else all as text."""
    texts = [label.strip() if isinstance(label, str) else label for label in labels]
    numbers = [text if isinstance(text, int) else re.fullmatch(r"(-?\d+)(\.0*)?", text) for text in texts]
    if None in numbers:
        return [str(text) for text in texts]
    digits = [number if isinstance(number, int) else str(number and number[1]) for number in numbers]
    long = [text for text in digits if isinstance(text, str) and len(text) > LONGEST_ID]
    if long:
        raise ValueError(f"the label {printable(long[0])} is too large for a class id; correct it")
    return [int(text) for text in digits]


class _Names:
    """Names of images, found by what a table calls them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.all, self.exact = names, set(names)
        self._lax: dict[str, str] = {}

    def find(self, text: str) -> str:
        """The image that is meant: by its path, by the end of a longer one, or by its name alone; '' for none."""
        if text in self.exact or len(text) > LONGEST_PATH:
            return text if text in self.exact else ""
        parts = [part for part in text.strip().replace("\\", "/").split("/") if part not in ("", ".")]
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        exact = next((end for end in ends if end in self.exact), "")
        if exact or not parts:
            return exact
        lax = self._lax or self._fill()
        stems = ends if os.path.splitext(parts[-1])[1].lower() not in IMAGE_EXTENSIONS else []
        keys = [*(f"stem:{end}" for end in stems), *(f"bare:{end}" for end in ends if len(parts) == 1)]
        keys += [f"bare stem:{end}" for end in stems if len(parts) == 1]
        return next((lax[key] for key in keys if lax.get(key)), "")

    def _fill(self) -> dict[str, str]:
        """Other names -> image, '' where they are those of several."""
        for name in self.all:
            bare = os.path.basename(name)
            stem, bare_stem = (os.path.splitext(text)[0] for text in (name, bare))
            for key in (f"stem:{stem}", f"bare:{bare}", f"bare stem:{bare_stem}"):
                self._lax[key] = name if self._lax.get(key, name) == name else ""
        return self._lax


# ---- text -> table


def _parsed(listing: Listing, file: str, names: _Names) -> Table:
    content = read_bytes(listing.path(file))
    if file.endswith(".jsonl"):
        lines = [line for line in content.splitlines() if line.strip()]
        return _of_objects([parse_json(line) for line in lines])
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
        raise ValueError(f'it is not {{"labels": [[path, id], ...]}} ({reason(error)})') from error
    return Table(["file", "label"], pairs)


def _of_objects(objects: Sequence[Any]) -> Table:
    if not objects or not all(isinstance(value, dict) for value in objects):
        raise ValueError('it is not {"file_name": ..., "label": ...} in every line')
    heading = [name for name, value in objects[0].items() if not isinstance(value, dict | list)]
    return Table(heading, [[value.get(name) for name in heading] for value in objects])


def _of_text(content: bytes, names: _Names) -> Table:
    """A table with commas, semicolons or tabs; its first line is a heading unless it names an image."""
    try:
        code = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        lines = io.StringIO(content.decode(code), newline=None).read().split("\n")  # line ends of any system
        tables = [_split(lines, delimiter) for delimiter in ",;\t"]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"it is no table of UTF-8 text ({reason(error)})") from error
    rows = max(tables, key=lambda rows: _likeness(rows, names))
    width = max(2, len(rows[0])) if rows else 2
    odd = next((row for row in rows if len(row) != width), None)
    if odd is not None:
        first = ",".join(rows[0] if len(rows[0]) > 1 else ["file", "label"])
        raise ValueError(
            f"the line {printable(','.join(odd))!r} is not {printable(first)!r}, {len(odd)} columns in place of "
            f"{width}; put a comma between them, and quotation marks around what holds one"
        )
    column = _file_column(Table([], rows), names)
    first, *rest = [row[column] for row in rows[:LOOKED_AT]] or [""]
    like_no_other = not names.find(first) or any(cell in names.exact for cell in rest)
    headed = bool(rows) and first not in names.exact and (first.strip().lower() in FILE_HEADINGS or like_no_other)
    return Table(rows[0] if headed else [], rows[headed:])


def _split(lines: Iterable[str], delimiter: str) -> list[list[str]]:
    """The rows of a text, but those that are empty."""
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, skipinitialspace=True)
    return [row for row in rows if any(cell.strip() for cell in row)]


def _likeness(rows: Sequence[Sequence[str]], names: _Names) -> tuple[bool, int]:
    """How much rows look like a table of these images: as many columns in each, and names in one of them."""
    widths = {len(row) for row in rows[:LOOKED_AT]}
    even = len(widths) == 1 and widths.pop() > 1
    hits = sum(any(cell in names.exact or names.find(cell) for cell in row) for row in rows[:LOOKED_AT])
    return even and hits > 0, hits
