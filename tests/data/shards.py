"""Tars of pictures as WebDataset keeps them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue")


def picture(value: int, size: int = 4) -> bytes:
    """A PNG of one grey."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(numbers: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """Picture NNN of grey N, with its label N % 3, a caption, and both in a JSON."""
    for number in numbers:
        label, caption = number % 3, f"a {COLOURS[number % 3]} picture"
        yield f"{number:03}.png", picture(number)
        yield f"{number:03}.cls", f"{label}\n".encode()
        yield f"{number:03}.txt", caption.encode()
        yield f"{number:03}.json", json.dumps({"label": label, "caption": caption, "width": 4}).encode()


def write_shards(folder: Path, count: int = 3, each: int = 5) -> str:
    """Some tars; returns their pattern."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        write_tar(folder / f"train-{number:02}.tar", samples(range(number * each, (number + 1) * each)))
    return f"{folder}/train-{{00..{count - 1:02}}}.tar"
