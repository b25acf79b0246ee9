"""Images to evaluate, where they lie: an npz, a folder or a zip of images, the folder of a sampling run.

Whatever they are, they leave as uint8 [n, H, W, 3] in their order, and are never held all at once.

Shapes: N images in all, n per batch, H W space, C channels (1, 3 or 4), D features.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluations.levels import Images, find_rule, to_levels, to_rgb
from evaluations.metrics import Statistics
from evaluations.sources import FileSource, ImageSource, Look
from guided_diffusion import paths, untrusted
from guided_diffusion.archives import is_stack
from guided_diffusion.config import Size
from guided_diffusion.decoding import Range
from guided_diffusion.image_files import IMAGE_EXTENSIONS, find_images, split_archive
from guided_diffusion.npz import Npz
from guided_diffusion.untrusted import parse_json, printable, quoted, read_file

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
RECORD = "record"  # the array of an npz, bytes of JSON, that says what its statistics are of
LARGEST_D = 2**14  # features that a stored covariance may have
PIECE = 2**22  # bytes of images that are looked at together


class ArraySource(ImageSource):
    """The images of one npz, or of several that follow each other.

    :param name: of the array in each of them; '' for statistics alone.
    """

    def __init__(self, path: str, parts: Sequence[str], name: str) -> None:
        super().__init__(path, 0)
        self.parts, self.name = list(parts), name
        headers = [_header(part, name) for part in self.parts] if name else []
        if not headers:
            return
        self.count = sum(header.shape[0] for header in headers)
        self.dtype = headers[0].dtype
        if not self.count:
            raise ValueError(f"{path} holds no images: {name} has the shape {headers[0].shape}; give one that does")
        for part, header in zip(self.parts, headers, strict=True):
            if (header.shape[1:], header.dtype) != (headers[0].shape[1:], self.dtype):
                raise ValueError(f"{part} holds other images than {self.parts[0]}: remove what is of another run")
        height, width, *channels = headers[0].shape[1:]
        self.shape = height, width, channels[0] if channels else 1
        self.labels = self._labels()

    def _labels(self) -> NDArray[np.int64] | None:
        found = []
        for part in self.parts:
            with Npz(part) as archive:
                if "arr_1" not in archive or self.name != "arr_0":
                    return None
                images, labels = archive.header("arr_0"), archive.header("arr_1")
                if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
                    self.notes.append(f"{part}: arr_1 {labels.shape} of {labels.dtype} are no labels, and not used")
                    return None
                found += [chunk.astype(np.int64) for chunk in archive.chunks("arr_1", PIECE)]
        return np.concatenate(found)

    def look(self) -> Look:
        """Go through all numbers once."""
        assert self.shape is not None
        digest = hashlib.sha256(f"{self.count} {self.shape} {self.dtype.str} ".encode())
        low, high = np.inf, -np.inf
        for chunk in self._stream(max(1, PIECE // (math.prod(self.shape) * self.dtype.itemsize))):
            digest.update(chunk.data)
            low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())  # where nan stays nan
        return Look(digest.hexdigest(), float(low), float(high), {self.shape[:2]: self.count})

    def adopt(self, look: Look) -> None:
        """Take what `look` has found, unless the numbers are no images.

        :raises ValueError: saying what to make of them.
        """
        self._rule = find_rule(self.dtype, look.low, look.high, self.path)
        super().adopt(look)

    def _stream(self, rows: int) -> Iterator[NDArray[Any]]:
        for part in self.parts:
            with Npz(part) as archive:
                yield from archive.chunks(self.name, rows)

    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Images]]:
        """The batches number `first`, `first` + `step`, ..., each as one array in a list."""
        _ = self.seen
        for pieces in islice(_cut(self._stream(size), size), first, None, step):
            yield [to_rgb(to_levels(np.concatenate(pieces) if len(pieces) > 1 else pieces[0], self._rule))]

    def warnings(self) -> list[str]:
        """Sentences about numbers that are no bytes of 0 .. 255."""
        if not self.count:
            return []
        look, found = self.seen, super().warnings()
        if self.dtype != np.uint8:
            found.append(f"{self.path}: {self.name} is of {self.dtype}, not of uint8: {self._rule.said}")
        elif look.high <= 1:
            found.append(
                f"{self.path}: no number is above {look.high:.0f}: images in [0, 1] or [-1, 1] that were cast to uint8 "
                "are black, and must be scaled before; they are taken as they are"
            )
        return found

    def statistics(self) -> dict[str, Statistics]:
        """What is stored beside the images."""
        if len(self.parts) != 1:
            return {}
        with Npz(self.parts[0]) as archive:
            n = int(self.record().get("n", 0))
            pairs = {kind: pair for kind, pair in STATISTICS.items() if all(name in archive for name in pair)}
            return {kind: _statistics(archive, *pair, n) for kind, pair in pairs.items()}

    def record(self) -> dict[str, Any]:
        """What the statistics are of."""
        if len(self.parts) != 1:
            return {}
        with Npz(self.parts[0]) as archive:
            return _record(archive) if RECORD in archive else {}


def _cut(chunks: Iterable[NDArray[Any]], size: int) -> Iterator[list[NDArray[Any]]]:
    """Rows that come in chunks of any length, as batches of `size` rows, the last one smaller, each in pieces."""
    pieces: list[NDArray[Any]] = []
    room = size
    for chunk in chunks:
        while len(chunk):
            head, chunk = chunk[:room], chunk[room:]
            pieces.append(head)
            room -= len(head)
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def _header(path: str, name: str) -> untrusted.Header:
    """The header of an array of images.

    :raises ValueError: if it is of something else.
    """
    with Npz(path) as archive:
        header = archive.header(name)
    shape = header.shape
    if header.dtype.kind not in "iuf":
        raise ValueError(f"{path}: {name} is of {header.dtype}, where images are of uint8: save them as that")
    if len(shape) == 4 and shape[-1] not in (1, 3, 4) and shape[1] in (1, 3, 4):
        raise ValueError(
            f"{path}: {name} has the shape {shape}, channels first: write {name}.transpose(0, 2, 3, 1), [N, H, W, C]"
        )
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[-1] not in (1, 3, 4)) or 0 in shape[1:]:
        raise ValueError(f"{path}: {name} has the shape {shape}, where images are [N, H, W] or [N, H, W, 1, 3 or 4]")
    return header


def _statistics(archive: Npz, mu: str, sigma: str, n: int) -> Statistics:
    """Mean [D] and covariance [D, D] of a file.

    :raises ValueError: if they are none.
    """
    shapes = archive.header(mu).shape, archive.header(sigma).shape
    if shapes != (shapes[0][:1], shapes[0] * 2) or not 0 < shapes[0][0] <= LARGEST_D:
        raise ValueError(f"{archive.path}: {mu} {shapes[0]} and {sigma} {shapes[1]} are no mean and covariance")
    mean, cov = (next(archive.chunks(name, shapes[0][0])).astype(np.float64) for name in (mu, sigma))
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{archive.path}: {mu} or {sigma} holds numbers that are not finite: make the file again")
    return Statistics(n, mean, cov)


def _record(archive: Npz) -> dict[str, Any]:
    kinds = {"extractor": str, "identity": str, "n": int}
    try:
        if archive.header(RECORD).shape[0] > 2**16:
            raise ValueError("it is too long")
        found = parse_json(b"".join(chunk.tobytes() for chunk in archive.chunks(RECORD, 2**16)))
        if not isinstance(found, dict) or any(type(found.get(name)) is not kind for name, kind in kinds.items()):
            raise ValueError(f"it does not name {', '.join(kinds)}")
    except ValueError as error:
        raise ValueError(
            f"{archive.path}: {RECORD} does not say what the statistics are of ({error}): make the file again"
        ) from error
    return found


# ---- finding out what there is


def open_images(path: str, size: Size | None = None, data_range: Range | None = None) -> ImageSource:
    """What lies at a path: an npz or npy, a folder or a zip of images, or the folder of a sampling run.

    :param size: images of files are scaled and cropped to it as in training; None: they are taken as they are.
    :param data_range: of images of files, as `read_image` takes it.
    :raises ValueError: if nothing there can be evaluated.
    """
    path = paths.resolve(path)
    if _is_folder(path):
        run = _of_a_run(path)
        return run if run is not None else _files(path, size, data_range)
    if split_archive(path):
        return _files(path, size, data_range)
    if not path or not paths.exists(path):
        raise ValueError(f"{quoted(path)} does not exist: give an npz, a folder or a zip of images, or a run's folder")
    if path.lower().endswith(".npy") and is_stack(path):
        return _files(path, size, data_range)
    if path.lower().endswith(IMAGE_EXTENSIONS):
        raise ValueError(f"{path} is one image: give an npz, or a folder or a zip of images")
    with Npz(path) as archive:
        name, notes = _find_array(archive)
    source = ArraySource(path, [path], name)
    source.notes += notes
    return source


def _is_folder(path: str) -> bool:
    return bool(path) and paths.isdir(path)


def _of_a_run(folder: str) -> ImageSource | None:
    """The samples of a run, or those of its batches that are there; None where it is no run's folder."""
    names = paths.names_in(folder)
    merged = [name for name in names if re.fullmatch(r"samples_[\dx]+\.npz", name)]
    if len(merged) > 1:
        raise ValueError(f"{folder} holds {len(merged)} files of samples, {', '.join(merged[:4])}: give one of them")
    if merged:
        path = f"{folder.rstrip('/')}/{merged[0]}"
        source = ArraySource(folder, [path], "arr_0")
        source.notes.append(f"{folder}: the samples are those of {merged[0]}")
        return source
    shards = f"{folder.rstrip('/')}/shards" if "shards" in names else folder
    parts = sorted(f"{shards}/{name}" for name in paths.names_in(shards) if re.fullmatch(r"\d{6}\.npz", name))
    if not parts:
        return None
    source = ArraySource(folder, parts, "arr_0")
    source.notes.append(f"{folder}: the run is not finished: the {source.count} images of {len(parts)} batches")
    return source


def _files(path: str, size: Size | None, data_range: Range | None) -> ImageSource:
    listing = find_images(path)
    if not listing.images:
        inner = [name for name in listing.others if name.lower().endswith(".npz")]
        remedy = f"it holds the npz {quoted(inner[0])}: give that, unpacked" if inner else "give one that holds images"
        raise ValueError(f"{path} holds no images, {listing.skipped()}: {remedy}")
    arrays = {"arr_0.npy", "mu.npy"} & set(listing.images)
    if arrays and path.lower().endswith(".zip"):
        raise ValueError(f"{path} is an npz by another name, it holds {min(arrays)}: rename it to end in .npz")
    return FileSource(listing, size, data_range)


def _find_array(archive: Npz) -> tuple[str, list[str]]:
    """The name of the array of images, '' where there are statistics alone; and notes.

    :raises ValueError: if there is neither, or more than one may be meant.
    """
    halves = list(_halves(archive))
    if "arr_0" in archive:
        return "arr_0", halves
    statistics = [name for pair in STATISTICS.values() for name in pair]
    names = [name for name in archive.names() if name != RECORD]
    found = [name for name in names if name not in statistics and len(archive.header(name).shape) == 4]
    if len(found) == 1:
        return found[0], [f"{archive.path}: the images are those of the array {printable(found[0])}", *halves]
    if not found and any(set(pair) <= set(names) for pair in STATISTICS.values()):
        return "", halves
    held = ", ".join(map(printable, names[:8])) or "no array"
    what = "more than one array of images" if found else "neither images nor statistics"
    raise ValueError(f"{archive.path} holds {what} ({held}): save the images as arr_0, [N, H, W, C] of uint8")


def _halves(archive: Npz) -> Iterator[str]:
    """A sentence about each mean without its covariance, and the reverse."""
    for pair in STATISTICS.values():
        there, missing = ([name for name in pair if (name in archive) == held] for held in (True, False))
        if there and missing:
            yield f"{archive.path}: {there[0]} is there without {missing[0]}, and not used"


def request_of(path: str) -> dict[str, Any]:
    """What the run that made some samples was asked for, from the request.json beside them; {} where there is none."""
    folder = path if _is_folder(path) else os.path.dirname(path) or "."
    is_run = _is_folder(path) or re.fullmatch(r"samples_[\dx]+\.npz", os.path.basename(path))
    where = f"{folder.rstrip('/')}/request.json"
    if not is_run or not paths.exists(where):
        return {}
    try:
        found = parse_json(read_file(where))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def record_bytes(record: Mapping[str, Any]) -> Images:
    """A record as the array that is stored."""
    return np.frombuffer(json.dumps(dict(record)).encode(), np.uint8)
