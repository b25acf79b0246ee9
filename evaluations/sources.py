"""Images to evaluate, in an order: what every source of them can do, and the files of a folder or a zip.

Shapes: N images in all, n per batch, H W space, C channels (1, 3 or 4).
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluations.levels import Images
from evaluations.metrics import Statistics
from guided_diffusion.config import Size, parse_size
from guided_diffusion.crops import Picture, TooThin, as_bytes, center_crop_arr
from guided_diffusion.decoding import Range, size_in
from guided_diffusion.image_files import Listing, UnreadableImage, read_bytes, read_image
from guided_diffusion.untrusted import reason


@dataclass(frozen=True)
class Look:
    """What going through all images once has shown.

    :param digest: sha256 of the content, in order: of the numbers of arrays, of the bytes of files.
    :param low: the least number of arrays, `high` the greatest; nan where one of them is none.
    :param sizes: how many images there are of each (H, W).
    """

    digest: str
    low: float = 0
    high: float = 255
    sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)


class ImageSource(ABC):
    """Images in an order, and what is known of them.

    :param path: as it was given.
    :param count: N; 0 where there are statistics alone.
    :param shape: (H, W, C) of every image as it lies there; None before `look`, or where sizes differ.
    :param notes: sentences about what was taken from where.
    """

    def __init__(self, path: str, count: int) -> None:
        self.path, self.count = path, count
        self.shape: tuple[int, int, int] | None = None
        self.dtype = np.dtype(np.uint8)
        self.labels: NDArray[np.int64] | None = None
        self.notes: list[str] = []
        self._seen: Look | None = None

    @property
    def seen(self) -> Look:
        """What `look` has found; this reads all images where nobody has done that yet."""
        if self._seen is None:
            self.adopt(self.look())
        assert self._seen is not None
        return self._seen

    @property
    def looked(self) -> bool:
        """Whether anybody has gone through the images."""
        return self._seen is not None

    def adopt(self, look: Look) -> None:
        """Take what `look` has found elsewhere, on another rank."""
        self._seen = look

    def digest(self) -> str:
        """64 hex digits that stand for the content."""
        return self.seen.digest

    @abstractmethod
    def look(self) -> Look:
        """Go through all images once.

        :raises ValueError: if they cannot be read.
        """

    @abstractmethod
    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Images]]:
        """The batches number `first`, `first` + `step`, ..., each as runs of images of one size."""

    def batches(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[Images]:
        """Images [n, H, W, 3]: n is `size`, but for the last batch and where the sizes of images differ within one."""
        for group in self.groups(size, first=first, step=step):
            yield from group

    def take(self, indices: NDArray[np.int64], rows: int = 256) -> Iterator[Images]:
        """The images with these rising indices, in pieces."""
        start = 0
        for batch in self.batches(rows):
            own = indices[(indices >= start) & (indices < start + len(batch))] - start
            start += len(batch)
            if len(own):
                yield batch[own]

    def warnings(self) -> list[str]:
        """Sentences about what is unusual in the images, and what is done about it."""
        sizes = self.seen.sizes
        if len(sizes) < 2:
            return []
        shown = ", ".join(f"{count} of {h}x{w}" for (h, w), count in Counter(dict(sizes)).most_common(3))
        return [f"{self.path}: the images have {len(sizes)} sizes ({shown}): each is scaled to the network's by itself"]

    def statistics(self) -> dict[str, Statistics]:
        """What is stored beside the images, of "pool" and "spatial" features; {} where nothing is."""
        return {}

    def record(self) -> dict[str, Any]:
        """What those statistics are of: "extractor", "identity", "n"; {} in files of the original, which do not say."""
        return {}


# ---- files


class FileSource(ImageSource):
    """The images of a folder or a zip, in the order of their names.

    :param size: they are scaled and cropped to it as in training; None: as they are.
    :param data_range: as `read_image` takes it.
    """

    def __init__(self, listing: Listing, size: Size | None = None, data_range: Range | None = None) -> None:
        super().__init__(listing.root, len(listing.images))
        self.paths = [listing.path(name) for name in listing.images]
        self.size, self.data_range = size, data_range
        if size is not None:
            self.shape = (*parse_size(size), 3)
        if listing.others or listing.refused:
            self.notes.append(f"{listing.root}: {listing.skipped()}")

    def look(self) -> Look:
        """Go through the bytes of all files once, and the first ones of what each says of itself."""
        span = f"{self.data_range} " if self.data_range else ""
        digest, sizes = hashlib.sha256(f"{self.count} {self.size} {span}".encode()), Counter[tuple[int, int]]()
        for path in self.paths:
            content = _content(path)
            digest.update(hashlib.sha256(content).digest())
            sizes[_size(path, content)] += 1
        return Look(digest.hexdigest(), sizes=dict(sizes) if self.size is None else {})

    def adopt(self, look: Look) -> None:
        """Take what `look` has found."""
        super().adopt(look)
        if len(look.sizes) == 1:
            self.shape = (*next(iter(look.sizes)), 3)

    def groups(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[list[Images]]:
        """The batches number `first`, `first` + `step`, ..., each as runs of images of one size."""
        for start in range(first * size, self.count, step * size):
            runs: list[list[Images]] = []
            for path in self.paths[start : start + size]:
                image = self._read(path)
                if not runs or runs[-1][0].shape != image.shape:
                    runs.append([])
                runs[-1].append(image)
            yield [np.stack(run) for run in runs]

    def take(self, indices: NDArray[np.int64], rows: int = 256) -> Iterator[Images]:
        """The images with these indices, one by one."""
        yield from (self._read(self.paths[index])[None] for index in indices)

    def _read(self, path: str) -> Images:
        picture: Picture = read_image(path, 3, self.data_range)
        try:
            array = np.asarray(picture) if self.size is None else center_crop_arr(picture, self.size)
        except TooThin as error:
            raise UnreadableImage(path, str(error)) from error
        return as_bytes(array)


def _content(path: str) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:
        raise UnreadableImage(path, reason(error)) from error


def _size(path: str, content: bytes) -> tuple[int, int]:
    """(H, W) of an image, by its first bytes, as a viewer turns it."""
    try:
        return size_in(io.BytesIO(content), ".npy" if path.lower().endswith(".npy") else "")
    except Exception as error:  # Pillow does not say what it raises on a damaged file
        raise UnreadableImage(path, reason(error) if content else "it is empty") from error
