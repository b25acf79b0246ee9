"""Captions of images, and the one of each that a step of training sees.

They lie in captions.json, .jsonl, .csv, .tsv or .parquet, in NAME.txt beside each image (a caption a line) or, in tars,
under a key of NAME.json, or in a column of metadata.jsonl, .csv, .parquet or labels.csv; the first of these that there
is counts. A captions.json is ``{"cat/1.png": "a cat"}``, with a list in place of the text for several captions, or with
an object of texts, of which `--caption_column` takes one or several; or a list of objects as the lines of a .jsonl are.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch as th

from ..runtime.errors import WHY, UserError, as_user_error, listed, nearest, printable, quoted, refuse
from ..runtime.files import parse_json
from .sources import ImageSource, read_bytes
from .tables import Table, beside, find_table

Keywords = Callable[[Sequence[str]], Mapping[str, th.Tensor]]
Rows = list[dict[str, Any]]

CAPTION_FILES = tuple(f"captions.{extension}" for extension in ("json", "jsonl", "csv", "tsv", "parquet"))
OTHER_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "labels.csv", "labels.tsv")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description", "name", "title")  # the first of them counts
FILE = "file"  # the column of the names in a captions.json
FORMS = 'a captions.json {"1.png": "a cat", ...}, NAME.txt beside each image, or a table with a column caption or text'


@dataclass(frozen=True)
class CaptionTable:
    """The captions of the images of a source.

    :param texts: of each image, in the order of the source; [] where it has none.
    :param origin: where they come from, for the user.
    """

    texts: list[list[str]]
    origin: str


def read_captions(source: ImageSource, column: str = "") -> CaptionTable:
    """The captions of all images.

    :param column: of a table that has several; more than one with commas between gives several captions.
    """
    file = find_table(source, CAPTION_FILES)
    texts = (
        {} if file or (column and not any(".tar/" in name for name in source.images)) else _texts_beside(source, column)
    )
    if texts:
        return CaptionTable([texts.get(name, []) for name in source.images], "NAME.json" if column else "NAME.txt")
    file = file or find_table(source, OTHER_TABLES)
    refuse((not file, f"{source.root} holds no captions: give {FORMS}"))
    with as_user_error(f"{file!r} in {source.root!r} cannot be used: {WHY}", ValueError, OSError):
        table = Table(source, file, _rows(read_bytes(source.path(file)), file))
        named = any(table.find(row.get(table.path_column)) for row in table.rows)
        refuse((not named, f"it names no image: it begins with {table.first_row!r}"))
        columns = _caption_columns(table, column)
        texts = _texts_of(table, columns)
    return CaptionTable([texts.get(name, []) for name in table.images], f"{file}, {', '.join(map(printable, columns))}")


def _texts_beside(source: ImageSource, column: str) -> dict[str, list[str]]:
    """The lines of each NAME.txt, or a text of each NAME.json in a tar, by image."""
    texts = dict[str, list[str]]()
    for name in source.images:
        files = [file for kind in (".txt", ".json") for file in beside(name, kind) if file in source.known]
        file = next((file for file in files if file.endswith(".json" if column else "")), "")
        if file.endswith(".json") and ".tar/" not in file:
            continue
        if file:
            with as_user_error(f"{file!r} in {source.root!r} is no text in UTF-8 ({WHY})", ValueError, OSError):
                content = read_bytes(source.path(file)).decode("utf-8-sig")
                texts[name] = _cleaned(_of_json(content, column) if file.endswith(".json") else content.splitlines())
    return texts


def _of_json(content: str, column: str) -> list[str]:
    """The captions in a NAME.json, under the keys that are asked for or the first of `CAPTION_COLUMNS`."""
    row = parse_json(content)
    known = row if isinstance(row, dict) else {}
    keys = [word.strip() for word in column.split(",")] if column else [k for k in CAPTION_COLUMNS if k in known][:1]
    return [text for key in keys for text in [known.get(key)] if isinstance(text, str)]


def _rows(content: bytes, file: str) -> Rows | None:
    """The rows of a table; None of one with separators, which `Table` reads."""
    extension = os.path.splitext(file)[1]
    if extension == ".parquet":
        return _rows_of_parquet(content)
    if extension not in (".json", ".jsonl"):
        return None
    lines = [line for line in content.splitlines() if line.strip()]
    value = [parse_json(line) for line in lines] if extension == ".jsonl" else parse_json(content)
    if isinstance(value, dict):
        pairs = value.items()
        value = [{**(cell if isinstance(cell, dict) else {"caption": cell}), FILE: name} for name, cell in pairs]
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        raise UserError('it is neither {"1.png": "a cat", ...} nor rows of {"file_name": ..., "text": ...}')
    return value


def _rows_of_parquet(content: bytes) -> Rows:
    """The columns of text and of lists, without images that lie beside them."""
    with as_user_error('a parquet needs pyarrow: run `pip install "guided-diffusion[datasets]"`', ImportError):
        import pyarrow
        from pyarrow import parquet
    with as_user_error(f"it is no parquet ({WHY})", pyarrow.ArrowException):
        file, kinds = parquet.ParquetFile(io.BytesIO(content)), pyarrow.types
        readable = (kinds.is_string, kinds.is_large_string, kinds.is_list, kinds.is_large_list)
        columns = [entry.name for entry in file.schema_arrow if any(is_kind(entry.type) for is_kind in readable)]
        rows: Rows = file.read(columns).to_pylist()
    return rows


def _caption_columns(table: Table, asked: str) -> list[str]:
    """The columns that are asked for, or the first of `CAPTION_COLUMNS` that there is."""
    columns = {name.lower(): name for name in table.columns if name != table.path_column}
    words = [word.strip() for word in asked.split(",")] if asked else []
    shown = ", ".join(map(printable, columns.values()))
    for word in words:
        if word.lower() not in columns:
            raise UserError(f"caption_column {word!r} is none of its columns ({shown}){nearest(word, columns)}")
    names = words or [name for name in CAPTION_COLUMNS if name in columns][:1]
    refuse((not names, f"it has no column {' or '.join(CAPTION_COLUMNS[:3])} ({shown}): give caption_column"))
    return [columns[name.lower()] for name in names]


def _texts_of(table: Table, columns: Sequence[str]) -> dict[str, list[str]]:
    """The captions of each image that is named, rows of the same image together."""
    texts = dict[str, list[str]]()
    for row in table.rows:
        name = table.find(row.get(table.path_column))
        for column in columns if name else ():
            cell = row.get(column)
            cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
            if not all(isinstance(text, str) for text in cells):
                raise UserError(f"the {column} of {quoted(name)} is neither a text nor a list of texts")
            texts.setdefault(name, []).extend(_cleaned(cells))
    return {name: list(dict.fromkeys(captions)) for name, captions in texts.items()}


def _cleaned(texts: Sequence[str]) -> list[str]:
    """Texts with single spaces, without empty ones."""
    return [" ".join(text.split()) for text in texts if text.strip()]


@dataclass
class Captions:
    """Gives a stream of images the keywords of one caption of each.

    The caption and whether it is dropped depend on (seed, epoch, index) alone.

    :param texts: of each image, by its path.
    :param dropout: probability of the empty text in its place.
    :param keywords: texts -> keywords of the network, each [N, ...], such as `keywords` of a context encoder. It is set
        when the encoder is made, perhaps of these captions.
    """

    texts: Mapping[str, Sequence[str]]
    seed: int
    dropout: float = 0.0
    keywords: Keywords | None = None

    def __call__(
        self, keys: Sequence[tuple[int, int]], images: Sequence[str], replaced: Collection[str] = ()
    ) -> Mapping[str, th.Tensor]:
        """The keywords of a batch.

        :param keys: (epoch, index) of its images.
        :param images: the path of each index.
        :param replaced: paths of images that have another one in their place, which goes without a caption.
        """
        if self.keywords is None:
            raise UserError("the captions have no encoder: set `captions.keywords` of the stream")
        return self.keywords([self.choose(key, images[key[1]], replaced) for key in keys])

    def choose(self, key: tuple[int, int], image: str, replaced: Collection[str] = ()) -> str:
        """The caption of an image in an epoch; '' where it is dropped."""
        draws = random.Random(f"{self.seed}/{key[0]}/{key[1]}/caption")
        dropped = draws.random() < self.dropout or image in replaced
        return "" if dropped else draws.choice(self.texts[image])

    def all_texts(self) -> list[str]:
        """Every caption once, in their order, as a tokenizer is made of them."""
        return list(dict.fromkeys(text for texts in self.texts.values() for text in texts))


@dataclass(frozen=True)
class Captioning:
    """How the captions of a data set are read; the fields are the flags of `CaptionConfig` without their first word.

    :param skip_uncaptioned: leave out images without a caption; else they are an error.
    """

    column: str = ""
    skip_uncaptioned: bool = False
    dropout: float = 0.0

    def match(self, source: ImageSource, say: Callable[[str], object], seed: int = 0) -> tuple[ImageSource, Captions]:
        """The images that have a caption, and these.

        :param say: takes lines for the user.
        """
        table = read_captions(source, self.column)
        texts = {name: captions for name, captions in zip(source.images, table.texts, strict=True) if captions}
        bare = [name for name in source.images if name not in texts]
        fault = (
            f"{len(bare)} of {len(source)} images have no caption in {table.origin} ({listed(map(quoted, bare), 5)})"
        )
        remedy = "add some, or set skip_uncaptioned to True" if texts else "add some"
        refuse((bare and not (self.skip_uncaptioned and texts), f"{fault}: {remedy}"))
        count = sum(map(len, texts.values()))
        say(f"captions from {table.origin}: {count} of {len(texts)} images" + f", {len(bare)} left out" * bool(bare))
        captions = Captions({source.path(name): values for name, values in texts.items()}, seed, self.dropout)
        return replace(source, images=list(texts)), captions
