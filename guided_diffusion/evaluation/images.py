"""Images to evaluate: those of an npz, of a folder or zip, or of a sampling run, as uint8 [n, H, W, 3] in their order.

They are streamed: no more than a batch is held in memory.

Shapes: N images in all, n per batch, H W space, C channels (1, 3 or 4).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import dist_util
from ..data.archives import archives_of, is_stack, read_each
from ..data.decoding import Range, decode
from ..data.sources import ImageSource, find_images, read_by, read_pixels, size_of_content, split_archive, tar_of
from ..runtime import files
from ..runtime.errors import WHY, UserError, as_user_error, printable, refuse
from ..runtime.files import parse_json, read_file
from ..runtime.npz import Npz, read_npz
from ..runtime.options import Size, parse_size
from ..runtime.pictures import levels
from .metrics import Statistics
from .scores import RECORD, STATISTICS

Pixels = NDArray[np.uint8]

LARGEST_D = 2**14  # features that a stored covariance may have
RECORDED = {"extractor": str, "identity": str, "n": int}  # in the record of a reference
PIECE = 2**22  # bytes of an array that are read at a time
# (kinds of type, low, high, scale, how) by which numbers in a range become 0 .. 255, before fractions are cut off
CONVERSIONS: tuple[tuple[str, int, int, Callable[[NDArray[Any]], NDArray[Any]], str], ...] = (
    ("iu", 0, 255, lambda x: x, "its integers of 0 .. 255 are taken as they are"),
    ("f", 0, 1, lambda x: x * 255 + 0.5, "its values lie in [0, 1], and are scaled to 0 .. 255 and rounded"),
    ("f", -1, 1, levels, "its values lie in [-1, 1], and are scaled to 0 .. 255 as sampling does"),
    ("f", 0, 255, lambda x: x + 0.5, "its values lie in [0, 255], and are rounded"),
)


def to_rgb(images: Pixels) -> Pixels:
    """[n, H, W] or [n, H, W, C] as [n, H, W, 3]: grey is repeated, transparency laid on white, as in training."""
    images = images[..., None] if images.ndim == 3 else images
    if images.shape[-1] == 1:
        return np.repeat(images, 3, -1)
    if images.shape[-1] == 4:
        return np.stack([np.asarray(decode(image, "", 3).picture) for image in images])
    return images


@dataclass(frozen=True)
class Scan:
    """The results of reading through all images once.

    :param digest: sha256 of the content in order: of the numbers of arrays, of the bytes of files.
    :param low: the least number of arrays, `high` the greatest; nan if one of them is.
    :param sizes: the number of images of each (H, W).
    """

    digest: str
    low: float = 0
    high: float = 255
    sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)


class ImageSet(ABC):
    """Images in an order, and what is known of them.

    :param path: as it was given.
    :param count: N; 0 where there are statistics alone.
    """

    def __init__(self, path: str, count: int) -> None:
        self.path, self.count = path, count
        self.shape: tuple[int, int, int] | None = None  # of every stored image; None if unknown, or if sizes differ
        self.dtype = np.dtype(np.uint8)
        self.labels: NDArray[np.int64] | None = None
        self.notes: list[str] = []
        self.scan: Scan | None = None

    @property
    def scanned(self) -> Scan:
        """The scan, at the first access of which all images are read; an error if they cannot be evaluated."""
        return self.scan or self._keep(self._read_through())

    def share_scan(self) -> None:
        """Have rank 0 read through the images, once; collective."""
        self._keep(dist_util.decide(lambda: self.scanned))

    def _keep(self, scan: Scan) -> Scan:
        self.scan = scan
        if self.shape is None and len(scan.sizes) == 1:
            self.shape = (*next(iter(scan.sizes)), 3)
        return scan

    def _read_through(self) -> Scan:
        return Scan(digest=self.path)

    @abstractmethod
    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Pixels]]:
        """The batches number `first`, `first` + `step`, ..., each as runs of images of one size."""

    def batches(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[Pixels]:
        """Images [n, H, W, 3]: n is `size`, but for the last batch and where the sizes of images differ within one."""
        for group in self.groups(size, first=first, step=step):
            yield from group

    def take(self, indices: NDArray[np.int64], rows: int = 256) -> Iterator[Pixels]:
        """The images with these rising indices, in pieces."""
        start = 0
        for batch in self.batches(rows):
            chosen = indices[(indices >= start) & (indices < start + len(batch))] - start
            start += len(batch)
            if len(chosen):
                yield batch[chosen]

    def warnings(self) -> list[str]:
        """Sentences about what is unusual in the images, and what is done about it."""
        sizes = self.scanned.sizes
        if len(sizes) < 2:
            return []
        shown = ", ".join(f"{count} of {h}x{w}" for (h, w), count in Counter(dict(sizes)).most_common(3))
        return [f"{self.path}: the images have {len(sizes)} sizes ({shown}): each is scaled to the network's by itself"]


class FileImages(ImageSet):
    """The images of a folder, a zip or of tars, in the order of their names.

    :param size: they are scaled and cropped to it as in training; None: as they are.
    :param data_range: as `read_image` takes it.
    """

    def __init__(self, source: ImageSource, size: Size | None = None, data_range: Range | None = None) -> None:
        super().__init__(source.root, len(source))
        self.files, self.size, self.data_range = source, size, data_range
        self.shape = None if size is None else (*parse_size(size), 3)
        if source.others or source.refused:
            self.notes.append(f"{source.root}: {source.skipped()}")

    def _read_through(self) -> Scan:
        span = f"{self.data_range} " if self.data_range else ""
        digest, sizes = hashlib.sha256(f"{self.count} {self.size} {span}".encode()), Counter[tuple[int, int]]()
        tars = [tar_of(path) for path in self.files.paths]
        if all(tars):  # their sizes and dates stand for the content, which is then read once
            digest.update("".join(self.files.images).encode())
            digest.update("".join(sorted({tar.identity() for tar in tars if tar})).encode())
            return Scan(digest.hexdigest())
        for path in self.files.paths:
            content, size = read_by(path, lambda content, extension: (content, size_of_content(content, extension)))
            sizes[size] += 1
            number_type = b"" if isinstance(content, bytes) else content.dtype.str.encode()
            digest.update(hashlib.sha256(number_type + bytes(content)).digest())
        return Scan(digest.hexdigest(), sizes=dict(sizes) if self.size is None else {})

    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Pixels]]:
        for start in range(first * size, self.count, step * size):
            indices = range(start, min(start + size, self.count))
            images = read_each(self._image, indices, remote=files.is_remote(self.path))
            yield [np.stack(list(run)) for _, run in groupby(images, np.shape)]

    def _image(self, index: int) -> Pixels:
        return read_pixels(self.files.path(self.files.images[index]), 3, self.size, self.data_range)

    def take(self, indices: NDArray[np.int64], rows: int = 256) -> Iterator[Pixels]:
        yield from (self._image(index)[None] for index in indices)


class ArrayImages(ImageSet):
    """The images of an npz.

    :param file: the npz, which may lie in the folder `path`.
    :param name: of the array; '' where there are statistics alone.
    """

    def __init__(self, path: str, file: str, name: str, notes: Iterable[str] = ()) -> None:
        super().__init__(path, 0)
        self.file, self.name = file, name
        self.notes += notes
        if not name:
            return
        with Npz(file) as archive:
            header = _checked(archive.header(name), file, name)
            try:
                ids = archive.labels() if name == "arr_0" else None
            except ValueError as error:
                self.notes.append(f"the labels are not used: {error}")
                ids = None
        self.labels = None if ids is None else np.asarray(ids, np.int64)
        self.count, self.dtype, self.stored_shape = header.shape[0], header.dtype, header.shape[1:]
        refuse((not self.count, f"{path} holds no images: {name} has the shape {header.shape}"))
        height, width, channels = (*self.stored_shape, 1)[:3]
        self.shape = height, width, channels

    def stored(self, rows: int = 0) -> Iterator[NDArray[Any]]:
        """The numbers as they are stored, `rows` images at a time; 0: as many as `PIECE` bytes hold."""
        rows = rows or max(1, PIECE // (math.prod(self.stored_shape) * self.dtype.itemsize))
        return read_npz(self.file, self.name, rows)

    def _read_through(self) -> Scan:
        assert self.shape is not None
        digest = hashlib.sha256(f"{self.count} {self.shape} {self.dtype.str} ".encode())
        low, high = np.inf, -np.inf
        for chunk in self.stored():
            digest.update(chunk.data)
            low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())  # where nan stays nan
        scan = Scan(digest.hexdigest(), float(low), float(high), {self.shape[:2]: self.count})
        self._conversion(scan)
        return scan

    def _conversion(self, scan: Scan) -> tuple[Callable[[NDArray[Any]], NDArray[Any]], str]:
        """How the numbers become bytes, as a function and in words."""
        for kinds, low, high, scale, how in CONVERSIONS:
            if self.dtype.kind in kinds and low <= scan.low <= scan.high <= high:
                return scale, how
        finite = np.isfinite([scan.low, scan.high]).all()
        shown = f"from {scan.low:.6g} to {scan.high:.6g}" if finite else "some of them not finite"
        raise UserError(
            f"{self.path} holds numbers of {self.dtype}, {shown}, where images are uint8, integers of 0 .. 255, or "
            "floats in [-1, 1], [0, 1] or [0, 255]: clip and scale them to 0 .. 255, and save them as uint8"
        )

    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Pixels]]:
        scale, _ = self._conversion(self.scanned)
        for batch in islice(self.stored(size), first, None, step):
            if batch.dtype != np.uint8:
                numbers = batch.astype(np.float32) if batch.dtype == np.float16 else batch
                batch = np.clip(scale(numbers), 0, 255).astype(np.uint8)
            yield [to_rgb(batch)]

    def warnings(self) -> list[str]:
        if not self.count:
            return []
        if self.dtype != np.uint8:
            return [f"{self.path}: {self.name} is of {self.dtype}, not of uint8: {self._conversion(self.scanned)[1]}"]
        darkest = f"{self.path}: no number is above 1, all but black: scale images before they are cast to uint8"
        return [darkest] if self.scanned.high <= 1 else []


def _checked(header: files.Header, path: str, name: str) -> files.Header:
    shape = header.shape
    fits = len(shape) == 3 or (len(shape) == 4 and shape[-1] in (1, 3, 4))
    if header.dtype.kind not in "iuf" or not fits or 0 in shape[1:]:
        channels_first = len(shape) == 4 and not fits and shape[1] in (1, 3, 4)
        remedy = f": write {name}.transpose(0, 2, 3, 1)" * channels_first
        raise UserError(
            f"{path}: {name} is {shape} of {header.dtype}, where images are [N, H, W] or [N, H, W, 1, 3 or 4] of "
            f"uint8{remedy}"
        )
    return header


Opened = str | os.PathLike[str] | ImageSet


def open_images(path: Opened, size: Size | None = None, data_range: Range | None = None) -> ImageSet:
    """The images of an npz or npy, of a folder or zip of images, or of the folder of a sampling run.

    :param path: images that are open already are returned as they are.
    :param size: images of files are scaled and cropped to it as in training; None: they are taken as they are.
    :param data_range: of images of files, as `read_image` takes it.
    """
    if isinstance(path, ImageSet):
        return path
    path = files.resolve(path)
    folder = bool(path) and files.isdir(path)
    if folder or split_archive(path) or archives_of(path) or (path.lower().endswith(".npy") and is_stack(path)):
        samples = _samples_of_run(path) if folder else ""
        if samples:
            return ArrayImages(path, f"{path.rstrip('/')}/{samples}", "arr_0", [f"{path}: the samples are {samples}"])
        source = find_images(path)
        if not source.images:
            raise UserError(f"{path} holds no images, {source.skipped()}: give an npz, or a folder or a zip of images")
        return FileImages(source, size, data_range)
    refuse((not files.exists(path), f"{path!r} does not exist: give an npz, or a folder or zip of images"))
    return _open_npz(path)


def _samples_of_run(folder: str) -> str:
    """The name of the samples of a run; '' if it is no run's folder."""
    names = files.names_in(folder)
    merged = [name for name in names if re.fullmatch(r"samples_[\dx]+\.npz", name)]
    refuse(
        (len(merged) > 1, f"{folder} holds {len(merged)} files of samples, {', '.join(merged[:4])}: give one of them"),
        (
            not merged and "shards" in names,
            f"{folder}: the run is not finished: run its command again to go on with it",
        ),
    )
    return "".join(merged)


def _open_npz(path: str) -> ImageSet:
    notes = []
    with Npz(path) as archive:
        names = set(archive.names())
        for pair in STATISTICS.values():
            if len(names & set(pair)) == 1:
                present, missing = sorted(pair, key=lambda name: name not in names)
                notes.append(f"{path}: {present} is there without {missing}, and not used")
        try:
            name = archive.name_of_images()
        except UserError:
            if not any(set(pair) <= names for pair in STATISTICS.values()):
                raise
            name = ""  # statistics alone
    if name not in ("", "arr_0"):
        notes.insert(0, f"{path}: the images are those of the array {printable(name)}")
    return ArrayImages(path, path, name, notes)


def request_of(path: str) -> dict[str, Any]:
    """The request.json beside the samples of a run, {} if there is none."""
    samples = re.fullmatch(r"samples_[\dx]+\.npz", os.path.basename(path))
    folder = os.path.dirname(path) or "." if samples else path
    try:
        request = parse_json(read_file(f"{folder.rstrip('/')}/request.json")) if folder else {}
    except (OSError, ValueError):
        return {}
    return request if isinstance(request, dict) else {}


def read_statistics(images: ImageSet) -> tuple[dict[str, Statistics], dict[str, Any]]:
    """The stored statistics of "pool" and "spatial" features, and the record of what they are of, or {}."""
    if not isinstance(images, ArrayImages):
        return {}, {}
    with Npz(images.file) as archive:
        record = _read_record(archive) if RECORD in archive else {}
        pairs = {kind: pair for kind, pair in STATISTICS.items() if all(name in archive for name in pair)}
        return {kind: _read_pair(archive, *pair, record.get("n", 0)) for kind, pair in pairs.items()}, record


def _read_pair(archive: Npz, mu: str, sigma: str, n: int) -> Statistics:
    shapes = archive.header(mu).shape, archive.header(sigma).shape
    if shapes == (shapes[0][:1], shapes[0] * 2) and 0 < shapes[0][0] <= LARGEST_D:
        mean, cov = (archive.whole(name).astype(np.float64) for name in (mu, sigma))
        if np.isfinite(mean).all() and np.isfinite(cov).all():
            return Statistics(n, mean, cov)
    raise UserError(
        f"{archive.path}: {mu} {shapes[0]} and {sigma} {shapes[1]} are no mean and covariance of finite numbers: make "
        "the file again"
    )


def _read_record(archive: Npz) -> dict[str, Any]:
    with as_user_error(
        f"{archive.path}: {RECORD} does not say what the statistics are of ({WHY}): make the file again", ValueError
    ):
        record: dict[str, Any] = parse_json(archive.whole(RECORD).tobytes())
        named = isinstance(record, dict) and all(type(record.get(name)) is kind for name, kind in RECORDED.items())
        refuse((not named, f"it does not name {', '.join(RECORDED)}"))
    return record
