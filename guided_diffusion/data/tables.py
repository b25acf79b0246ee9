"""Tables beside images: rows of CSV or JSON that name each image, and their columns as labels or as vectors.

They are dataset.json (EDM), labels.csv, and metadata.csv or metadata.jsonl (Hugging Face). The column of the files is
called as in `FILE_COLUMNS`, else it is the first; the names in it may lack an extension, begin with "./" or be absolute
paths, as long as it is clear which image is meant.

Shapes: N images, D numbers a vector.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import DAMAGE, WHY, UserError, as_user_error, nearest, printable, refuse
from ..runtime.files import parse_json
from .sources import LABEL_FILES, ImageSource, read_bytes, shared_folder

Label = str | int

LONGEST_PATH = 4096
FILE_COLUMNS = ("file", "file_name", "filename", "path", "image")
LABEL_COLUMNS = ("label", "class", "class_id", "category")


class Table:
    """A table beside images, which it names as seen from its folder: rows by the names of its columns.

    :param rows: where they are read already.
    """

    def __init__(self, source: ImageSource, file: str, rows: list[dict[str, Any]] | None = None) -> None:
        self.images = [name[file.rfind("/") + 1 :] for name in source.images]
        names: dict[str, str] = {}
        for name in self.images:
            bare = f"*/{os.path.basename(name)}"
            for key in (os.path.splitext(name)[0], bare, os.path.splitext(bare)[0]):
                names[key] = name if names.get(key, name) == name else ""  # not clear which is meant
        self._names = names | {name: name for name in self.images}
        self.rows = self._read(read_bytes(source.path(file)), file) if rows is None else rows
        first = self.rows[0] if self.rows else {}
        kept = [*first] if rows is not None else ["file", "label"]
        self.columns = [n for n, cell in first.items() if n in kept or not isinstance(cell, dict | list)] or kept
        self.path_column = next(iter([*self.columns_called(FILE_COLUMNS), *self.columns]), "")

    def vectors(self, columns: Sequence[str]) -> NDArray[np.float32]:
        """The numbers [N, D] of some columns for every image; nan where a cell is empty."""
        if absent := [column for column in columns if not any(column in row for row in self.rows)]:
            raise UserError(f"it has no column {absent[0]!r}{nearest(absent[0], self.columns)}")
        vectors: dict[str, list[float]] = {}
        for row in self.rows:
            name, numbers = self.find(row.get(self.path_column)), _numbers_of([row.get(column) for column in columns])
            if name and str(vectors.setdefault(name, numbers)) != str(numbers):
                raise UserError(f"{name!r} has two vectors, {vectors[name]} and {numbers}")
        lacking = [name for name in self.images if name not in vectors]
        lengths = {len(numbers) for numbers in vectors.values()}
        refuse(
            (bool(lacking), f"it has no row for {len(lacking)} of {len(self.images)} images, the first {lacking[:1]}"),
            (len(lengths) > 1, f"its vectors have from {min(lengths, default=0)} to {max(lengths, default=0)} numbers"),
        )
        return np.array([vectors[name] for name in self.images], np.float32)

    def _read(self, content: bytes, file: str) -> list[dict[str, Any]]:
        return _of_json(content, file) if file.endswith((".json", ".jsonl")) else self._of_text(content)

    @property
    def first_row(self) -> str:
        """The first row as text."""
        return printable(", ".join(map(str, self.rows[0].values()))) if self.rows else "nothing"

    def columns_called(self, names: Sequence[str]) -> list[str]:
        """The columns of these names, whether they are written in capitals or not."""
        return [column for name in names for column in self.columns if column.lower() == name.lower()]

    def find(self, cell: Any) -> str:
        """The image that is meant: by its path, by the end of a longer one, or by its name alone; '' for none."""
        if not isinstance(cell, str) or len(cell) > LONGEST_PATH:
            return ""
        parts = [part for part in cell.strip().replace("\\", "/").split("/") if part not in ("", ".")]
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        ends += [f"*/{part}" for part in parts if len(parts) == 1]
        return next(filter(None, (self._names.get(end) for end in ends)), "")

    def label_column(self, asked: str) -> str:
        """The column of that name; for '' the one that is called like a label, or the only one beside the files."""
        rest = [name for name in self.columns if name != self.path_column]
        likely = self.columns_called([asked] if asked else LABEL_COLUMNS) or ([] if asked else rest)
        named = f", and none of them is {asked!r}{nearest(asked, rest)}" if asked else ""
        found = f"beside the files its columns are {', '.join(map(printable, rest))}{named}"
        refuse((len(likely) != 1, f"{found}: --label_column names that of the labels"))
        return likely[0]

    def labels(self, column: str) -> tuple[dict[str, Label], int]:
        """The label of each image that is named, and how many rows name none."""
        labels: dict[str, Label] = {}
        surplus = 0
        for row in self.rows:
            path, label = row.get(self.path_column), row.get(column)
            label = int(label) if isinstance(label, float) and label.is_integer() else label
            if isinstance(label, bool) or not isinstance(label, str | int):
                raise UserError(f"the label {printable(repr(label))} of {path!r} is neither a class id nor a name")
            name = self.find(path)
            if name and labels.setdefault(name, label) != label:
                raise UserError(f"{path!r} has two labels, {printable(str(labels[name]))} and {label!r}")
            surplus += not name
        return labels, surplus

    def _of_text(self, content: bytes) -> list[dict[str, Any]]:
        """Rows with commas, semicolons or tabs; without a heading they are files and labels."""
        with as_user_error(f"it is no table of UTF-8 text ({WHY})", ValueError, csv.Error):
            text = content.decode("utf-8-sig")
            delimiter = max(",;\t", key=text.strip().partition("\n")[0].count)
            lines = io.StringIO(text, newline=None)  # line ends of any system
            cells = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            rows = [row for row in cells if any(cell.strip() for cell in row)]
        if rows and self.find(rows[0][0]):
            rows.insert(0, ["file", "label"])
        odd = next((row for row in rows if len(row) != len(rows[0])), None)
        if odd is not None:
            raise UserError(
                f"the line {printable(','.join(odd))!r} is not {printable(','.join(rows[0]))!r}, {len(odd)} columns in "
                f"place of {len(rows[0])}; put a comma between them, and quotation marks around what holds one"
            )
        names = [cell.strip() for cell in rows[0]] if rows else []
        return [dict(zip(names, row, strict=True)) for row in rows[1:]]


def _numbers_of(cells: Sequence[Any]) -> list[float]:
    """The numbers of cells, one each, or a list of them."""
    flat = [number for cell in cells for number in (cell if isinstance(cell, list) else [cell])]
    try:
        numbers = [math.nan if cell in (None, "") else float(cell) for cell in flat]
    except (TypeError, ValueError) as error:
        raise UserError(f"its cells {printable(str(flat))} are not all numbers") from error
    if any(map(math.isinf, numbers)):
        raise UserError(f"its cells {printable(str(flat))} are not all finite")
    return numbers


def read_vectors(source: ImageSource, columns: str) -> NDArray[np.float32]:
    """The vectors [N, D] of the images: numbers, and in JSON lists of them, from columns of a table beside them.

    :param columns: with commas in between.
    """
    file = next(filter(None, (find_table(source, names) for names in LABEL_FILES.values())), "")
    tables = ", ".join(itertools.chain(*LABEL_FILES.values()))
    refuse((not file, f"vector_columns {columns!r} needs a table in {source.root!r}: write one of {tables}"))
    with as_user_error(f"{file!r} in {source.root!r} gives no vectors: {WHY}; correct it", ValueError, OSError):
        return Table(source, file).vectors([name.strip() for name in columns.split(",") if name.strip()])


def _of_json(content: bytes, file: str) -> list[dict[str, Any]]:
    """Rows of EDM's ``{"labels": [[path, id], ...]}``, or of objects ``{"file_name": ..., ...}``."""
    formats = '{"labels": [[path, id], ...]}, nor rows of {"file_name": ..., "label": ...}'
    with as_user_error(f"it is not {formats} ({WHY})", *DAMAGE):
        lines = [line for line in content.splitlines() if line.strip()]
        value = [parse_json(line) for line in lines] if file.endswith(".jsonl") else parse_json(content)
        if isinstance(value, dict):
            labels = value["labels"] or []
            pairs = labels.items() if isinstance(labels, dict) else labels
            return [{"file": path, "label": label} for path, label in pairs]
        columns = [*value[0]]
        return [{name: row.get(name) for name in columns} for row in value]


def find_table(source: ImageSource, names: Sequence[str]) -> str:
    """The first of the tables `names` at the root or in the one folder that holds all images, as in a zip; or ''."""
    shared = list(filter(None, shared_folder(source.images).split("/")))
    places = ["/".join([*shared[:depth], file]) for file in names for depth in range(len(shared) + 1)]
    return next((place for place in places if place in source.others), "")


def beside(name: str, extension: str) -> list[str]:
    """The names of the file beside an image: without the extension, or up to the first dot as WebDataset has it."""
    folder, _, base = name.rpartition("/")
    start = f"{folder}/" if folder else ""
    return list(dict.fromkeys(f"{start}{stem}{extension}" for stem in (os.path.splitext(base)[0], base.split(".")[0])))


def file_beside(source: ImageSource, image: str, extension: str) -> str:
    """The file beside an image, '' where there is none."""
    return next((file for file in beside(image, extension) if file in source.known), "")
