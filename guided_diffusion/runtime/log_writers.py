"""Writers of rows of values and lines of text: tables, JSON, CSV, TensorBoard, Weights & Biases.

Files are appended to, never emptied, so that a resumed run keeps its history; `rewind` drops what it will write again.
"""

import csv
import io
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, TextIO

from .atomic import explained, replacing
from .errors import as_user_error, refuse

KeyValues = Mapping[str, Any]

CELL_WIDTH = 30  # longest key or value in a table, in characters


class KVWriter(ABC):
    """Writes one row of values per dump: numbers, arrays of one element, or texts, by name."""

    @abstractmethod
    def writekvs(self, kvs: KeyValues) -> None:
        """Writes one row."""

    def rewind(self, step: int) -> None:  # noqa: B027 - most writers cannot take anything back
        """Forgets rows of later steps, and one that a killed process did not finish; where that is possible."""

    def close(self) -> None:  # noqa: B027 - most writers keep nothing open
        """Closes what this writer has opened."""


class SeqWriter(ABC):
    """Writes one line of text per message."""

    def close(self) -> None:  # noqa: B027
        """Closes what this writer has opened."""

    @abstractmethod
    def writeseq(self, seq: Iterable[str]) -> None:
        """Writes the parts of one message, joined by spaces."""


class _FileWriter:
    """Appends to a file without keeping it open, so that any number of loggers may be left behind unclosed."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self._append("")

    def _append(self, text: str) -> None:
        with explained(self.filename), open(self.filename, "a", encoding="utf-8", newline="") as file:
            file.write(text)

    def _replace(self, text: str) -> None:
        with replacing(self.filename) as file:
            file.write(text.encode())

    def _lines(self) -> list[str]:
        """The complete lines, with their ends."""
        with open(self.filename, encoding="utf-8", newline="") as file:
            return [line for line in file if line.endswith("\n")]


class HumanOutputFormat(KVWriter, SeqWriter):
    """Tables and lines of text, to a file by name or to an open stream."""

    def __init__(self, filename_or_file: str | TextIO) -> None:
        if isinstance(filename_or_file, str):
            self._write: Callable[[str], object] = _FileWriter(filename_or_file)._append
        elif hasattr(filename_or_file, "write"):
            self._write = lambda text: (filename_or_file.write(text), filename_or_file.flush())
        else:
            raise TypeError(f"filename_or_file is {filename_or_file!r}: give a file name or an open text stream")

    def writekvs(self, kvs: KeyValues) -> None:
        if not kvs:
            self._write("WARNING: there are no values to write\n")
            return
        cells = {_cell(key): _cell(value) for key, value in sorted(kvs.items())}
        key_width, value_width = max(map(len, cells)), max(map(len, cells.values()))
        rows = sorted(cells.items(), key=lambda cell: cell[0].lower())
        lines = [f"| {key:<{key_width}} | {value:<{value_width}} |" for key, value in rows]
        rule = "-" * (key_width + value_width + 7)
        self._write("\n".join([rule, *lines, rule, ""]))

    def writeseq(self, seq: Iterable[str]) -> None:
        self._write(" ".join(seq) + "\n")


def _cell(value: Any) -> str:
    text = f"{float(value):<8.3g}" if hasattr(value, "__float__") else str(value)
    return text if len(text) <= CELL_WIDTH else text[: CELL_WIDTH - 3] + "..."


class JSONOutputFormat(_FileWriter, KVWriter):
    """One JSON object per line, keys in the order in which they were logged."""

    def writekvs(self, kvs: KeyValues) -> None:
        row = {key: float(value) if hasattr(value, "dtype") else value for key, value in kvs.items()}
        self._append(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        def is_later(line: str) -> bool:
            try:
                return bool(json.loads(line)["step"] > step)
            except (ValueError, TypeError, KeyError):
                return False

        self._replace("".join(line for line in self._lines() if not is_later(line)))


class CSVOutputFormat(_FileWriter, KVWriter):
    """A comma-separated table; a key seen for the first time becomes a new last column, empty in the rows before.

    :param keys: the first columns of a new table.
    """

    def __init__(self, filename: str, keys: Iterable[str] = ()) -> None:
        super().__init__(filename)
        self.keys = next(csv.reader(self._lines()), [])
        if not self.keys and (first := list(keys)):
            self._add_columns(first)

    def writekvs(self, kvs: KeyValues) -> None:
        if new_keys := sorted(kvs.keys() - set(self.keys)):
            self._add_columns(new_keys)
        values: list[Any] = [kvs.get(key) for key in self.keys]
        self._append(csv_text([[value.item() if hasattr(value, "detach") else value for value in values]]))

    def _add_columns(self, new_keys: list[str]) -> None:
        self.keys.extend(new_keys)
        rows = [row + [""] * len(new_keys) for row in csv.reader(self._lines())]
        self._replace(csv_text([self.keys, *rows[1:]]))

    def rewind(self, step: int) -> None:
        def is_later(row: list[str]) -> bool:
            try:
                return float(row[self.keys.index("step")]) > step
            except (ValueError, IndexError):
                return False

        self._replace(csv_text(row for row in csv.reader(self._lines()) if not is_later(row)))


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a table with the numbers in them, each with its step."""
    with open(path, encoding="utf-8", newline="") as file:
        table = [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]
    rows = [{name: value for name, value in row.items() if value is not None} for row in table]
    return [row for row in rows if "step" in row]


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """The text of a table with commas."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class _CurveWriter(KVWriter):
    """Numbers over a step: the value "step" of a row when it has one, else the number of the row, from 1."""

    step = 0

    def writekvs(self, kvs: KeyValues) -> None:
        self.step = int(kvs.get("step", self.step + 1))
        self._write({k: float(value) for k, value in kvs.items() if isinstance(value, Real) or hasattr(value, "dtype")})

    @abstractmethod
    def _write(self, numbers: Mapping[str, float]) -> None: ...


class TensorBoardOutputFormat(_CurveWriter):
    """Curves for TensorBoard, over the value "step" when there is one."""

    def __init__(self, dir: str) -> None:
        with _needing("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.dir = dir
        self._writer = SummaryWriter(log_dir=dir)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, self.step)
        self._writer.flush()


class WandbOutputFormat(_CurveWriter):
    """Curves for Weights & Biases, over the value "step" when there is one.

    Project, name and mode of the run come from wandb's own environment variables (WANDB_PROJECT, WANDB_MODE, ...).
    """

    def __init__(self, dir: str) -> None:
        with _needing("wandb"):
            import wandb
        self._run = wandb.init(dir=dir)

    def close(self) -> None:
        """End the run."""
        self._run.finish()

    def _write(self, numbers: Mapping[str, float]) -> None:
        self._run.log(numbers, step=self.step)


def _needing(package: str) -> AbstractContextManager[None]:
    return as_user_error(f"log format {package!r} needs a package: run `pip install {package}`", ImportError)


FORMATS: dict[str, Callable[[str, str], KVWriter]] = {
    "stdout": lambda folder, suffix: HumanOutputFormat(sys.stdout),
    "log": lambda folder, suffix: HumanOutputFormat(os.path.join(folder, f"log{suffix}.txt")),
    "json": lambda folder, suffix: JSONOutputFormat(os.path.join(folder, f"progress{suffix}.json")),
    "csv": lambda folder, suffix: CSVOutputFormat(os.path.join(folder, f"progress{suffix}.csv")),
    "tensorboard": lambda folder, suffix: TensorBoardOutputFormat(os.path.join(folder, f"tb{suffix}")),
    "wandb": lambda folder, suffix: WandbOutputFormat(folder),
}


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> Any:
    """The writer of that name, into a folder that is made where it is missing.

    :param format: one of FORMATS.
    :param log_suffix: goes before the extension of the file's name.
    """
    refuse((format not in FORMATS, f"unknown log format {format!r}: choose from {', '.join(FORMATS)}"))
    os.makedirs(ev_dir, exist_ok=True)
    return FORMATS[format](ev_dir, log_suffix)
