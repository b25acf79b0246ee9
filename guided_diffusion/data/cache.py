"""Decoded pictures in memory that the processes that decode share: each is decoded once, by the first that needs it.

Shapes: H W space, C channels.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..runtime.errors import UserError, quoted, refuse
from ..runtime.options import Size
from .crops import fitted_arr, shrunk, shrunk_size
from .decoding import MODES, Decoded
from .sources import UnreadableImage, naming, read_size


class ImageCache:
    """Pictures, shrunk as far as crops to one size stay the same bit for bit.

    Processes that are forked share it without a lock: two that decode the same picture write the same bytes, and a
    picture is read once its height is written, after all the rest.

    :param random_crop: keep what random crops need; else the middle, or all of it as `fit` says.
    """

    def __init__(
        self, paths: Sequence[str], image_size: Size, channels: int, *, random_crop: bool, fit: str = "crop"
    ) -> None:
        kept = "pictures of 1, 3 or 4 channels are kept in memory"
        refuse((channels not in MODES, f"{kept}, not of {channels}: leave that out"))
        self._paths, self._image_size, self._random_crop, self._fit = paths, image_size, random_crop, fit
        self._channels = channels
        self._starts = np.cumsum([0, *(height * width * channels for height, width in map(self._size, paths))])
        table = 4 * np.dtype(np.int64).itemsize * len(paths)
        self.bytes = table + int(self._starts[-1])
        # backed by memory once it is written to, and by that of all processes that inherit it
        memory = np.frombuffer(mmap.mmap(-1, self.bytes), np.uint8)
        self._pixels = memory[table:]
        # (height, width) as kept and in the file; zeros where a picture is not kept yet
        self._table: NDArray[np.int64] = memory[:table].view(np.int64).reshape(-1, 4)

    def _size(self, path: str) -> tuple[int, int]:
        """(height, width) of the shrunk picture; (0, 0) where the file cannot be read."""
        try:
            size = read_size(path) if self._random_crop else (1, 1)
        except UnreadableImage:
            return 0, 0
        return shrunk_size(size, self._image_size, random_crop=self._random_crop)

    def take(self, index: int, read: Callable[[], Decoded]) -> Decoded:
        """A picture, which is read and kept where it is not kept yet."""
        height, width, *size = self._table[index].tolist()
        if not height:
            return self._keep(index, read())
        first = int(self._starts[index])
        array = self._pixels[first : first + height * width * self._channels]
        shape = (height, width) if self._channels == 1 else (height, width, self._channels)
        return Decoded(Image.fromarray(array.reshape(shape)), (size[0], size[1]))

    def _keep(self, index: int, decoded: Decoded) -> Decoded:
        if not isinstance(decoded.picture, Image.Image):
            raise UserError(
                f"bytes are kept in memory, and image {quoted(self._paths[index])} has finer numbers: leave that out"
            )
        with naming(self._paths[index]):
            if self._fit == "crop":
                picture = shrunk(decoded.picture, self._image_size, random_crop=self._random_crop)
            else:
                picture = Image.fromarray(fitted_arr(decoded.picture, self._image_size, pad=self._fit == "pad"))
        first, end = self._starts[index : index + 2].tolist()
        array = np.asarray(picture)
        if array.size <= end - first:  # else an EXIF tag behind the pixels has turned it: it is decoded each time
            self._pixels[first : first + array.size] = array.reshape(-1)
            self._table[index, 1:] = (picture.width, *decoded.size)
            self._table[index, 0] = picture.height
        return Decoded(picture, decoded.size)
