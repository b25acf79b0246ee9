"""Looking into npz files: what their arrays are, what is unusual in them, and the first images in one picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .npz import Npz, replacing
from .npz_tools import CHUNK, headers_of, open_npz, refuse_existing
from .pictures import DRAWN_CHANNELS, grid
from .untrusted import Header, printable, reason

GRID_SIDE = 10
COUNTED = 2**16  # different labels that are counted


def draw(path: str, out: str, rows: int = 0, columns: int = 0) -> str:
    """Draw the first images as one picture; returns a line about it.

    :param rows: 0 chooses.
    :param columns: 0 chooses.
    """
    source = open_npz(path)
    refuse_existing(out)
    most = source.count if rows or columns else GRID_SIDE**2
    columns = columns or (math.ceil(source.count / rows) if rows else math.ceil(math.sqrt(min(source.count, most))))
    columns = min(columns, GRID_SIDE) if not rows else columns
    count = min(source.count, columns * rows if rows else columns * GRID_SIDE)
    pixels = np.concatenate(list(source.pixels(count)))
    picture = grid(pixels[..., None] if pixels.ndim == 3 else pixels, columns)
    with replacing(out) as file:
        picture.save(file, format="PNG")
    return f"{out}: {count} of {source.count} images"


@dataclass
class _Look:
    """What going through an array has shown."""

    low: float = math.inf
    high: float = -math.inf
    not_finite: int = 0
    counts: Counter[int] = field(default_factory=Counter)

    def see(self, chunk: NDArray[Any], *, labels: bool) -> None:
        """Some rows more."""
        finite = chunk[np.isfinite(chunk)] if chunk.dtype.kind == "f" else chunk.ravel()
        self.not_finite += chunk.size - finite.size
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        if labels and len(self.counts) < COUNTED:
            self.counts.update(chunk.ravel().tolist())


def describe(path: str) -> list[str]:
    """Lines about every array of an npz, and what is unusual in them."""
    lines, headers = [], {}
    with Npz(path) as archive:
        for name, header in headers_of(archive):
            if isinstance(header, str):
                lines.append(f"{printable(name)}: {header}")
                continue
            headers[name] = header
            lines += [f"{printable(name)}: {' x '.join(map(str, header.shape))} of {header.dtype}"]
            lines += [f"  {line}" for line in _content(archive, name, header)]
    if {"mu", "sigma"} <= set(headers):
        also = " and sFID (mu_s, sigma_s)" if {"mu_s", "sigma_s"} <= set(headers) else ""
        lines.append(f"statistics for FID (mu, sigma){also} are there")
    images, labels = headers.get("arr_0"), headers.get("arr_1")
    if images and labels and labels.shape != images.shape[:1]:
        lines.append(f"warning: arr_1 {labels.shape} is no label for each of the {images.shape[0]} images of arr_0")
    return lines or [f"{path} holds no arrays"]


def _content(archive: Npz, name: str, header: Header) -> list[str]:
    """Lines about the numbers of an array."""
    labels, look = len(header.shape) == 1 and header.dtype.kind in "iu" and header.dtype != np.uint8, _Look()
    if header.dtype.kind == "c" or 0 in header.shape:
        return []
    row = max(1, math.prod(header.shape[1:]) * header.dtype.itemsize)
    try:
        for chunk in archive.chunks(name, max(1, CHUNK // row)):
            look.see(chunk, labels=labels)
    except ValueError as error:
        return [f"warning: {reason(error)}"]
    lines = [f"values from {look.low:g} to {look.high:g}"]
    if labels and len(look.counts) < COUNTED:
        least, most = min(look.counts.values()), max(look.counts.values())
        share = f"{least} images of each" if least == most else f"{least} to {most} images of each"
        lines.append(f"{len(look.counts)} different labels, {share}")
    return lines + [f"warning: {text}" for text in _doubts(header, look)]


def _doubts(header: Header, look: _Look) -> Iterator[str]:
    """What is unusual in an array, were it one of images."""
    if look.not_finite:
        yield f"{look.not_finite} numbers are not finite"
    if len(header.shape) != 4:
        return
    if header.dtype.kind == "f":
        inside = "in [-1, 1] " if -1 <= look.low < 0 and look.high <= 1 else ""
        yield f"images of floats {inside}where uint8 is read: save ((x + 1) * 127.5).clip(0, 255).astype(uint8)"
    elif look.high <= 1:
        yield "no number is above 1: images in [0, 1] that were cast to integers are black"
    if header.shape[-1] not in DRAWN_CHANNELS and header.shape[1] in DRAWN_CHANNELS:
        yield "channels first: save x.transpose(0, 2, 3, 1)"
