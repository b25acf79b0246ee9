"""Images of a data set one at a time, cropped and mirrored, and batches of them, made in whatever process.

Shapes: N batch, C channels, H W space. A size is 64, "64x128" or (64, 128): height before width.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ..config import BAD_IMAGE_RULES
from ..runtime.options import Size, nearest
from ..runtime.pictures import to_unit
from .cache import ImageCache, NotKept
from .conditioning import Partners
from .crops import Draws, Picture, TooThin, center_crop_arr, channels_first, largest_cover, random_crop_arr, replay
from .decoding import Range, Whole
from .order import Key
from .sources import UnreadableImage, read_whole

Item = tuple[NDArray[np.float32], dict[str, Any]]
Crop = tuple[NDArray[Any], dict[str, Any]]

MAX_REPLACEMENTS = 100  # images tried in place of one that cannot be read


class ImageDataset(Dataset[Item]):
    """Images cropped to one size, as (float32 [C, H, W] in [-1, 1], {"y": class id} or {}).

    An index i draws its augmentation from the module `random`. A pair (epoch, i) draws it from (seed, epoch, i), which
    is the same in any process and in any order.

    :param resolution: the size.
    :param image_paths: of files, also of members of zips, as ``pets.zip/cat/1.png``.
    :param classes: the class id of each path, or None.
    :param shard: take every `num_shards`-th image from this one on.
    :param on_bad_image: what a pair does where its image cannot be read: "error", or "skip", which takes another one
        instead that (seed, epoch, i) chooses, with its own class. An index alone always is an error.
    :param partners: conditioning images, which come as "cond_image" beside "y".
    :param fast_decode: decode JPEGs at a part of their size where that covers the crop: pixels differ a little.
    :param cache_images: keep the decoded images in memory (not the conditioning images), which changes no number.
    :param data_range: of the images, as `image_files.read_image` takes it.
    """

    def __init__(
        self,
        resolution: Size,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
        *,
        image_channels: int = 3,
        seed: int = 0,
        on_bad_image: str = "error",
        partners: Partners | None = None,
        fast_decode: bool = False,
        cache_images: bool = False,
        data_range: Range | None = None,
    ) -> None:
        super().__init__()
        if on_bad_image not in BAD_IMAGE_RULES:
            rules = ", ".join(BAD_IMAGE_RULES)
            raise ValueError(
                f"on_bad_image {on_bad_image!r} is none of {rules}{nearest(on_bad_image, BAD_IMAGE_RULES)}"
            )
        self.resolution = resolution
        self.local_images = list(image_paths[shard::num_shards])
        self.local_classes = None if classes is None else list(classes[shard::num_shards])
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.image_channels = image_channels
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.partners = partners.shard(shard, num_shards) if partners else None
        self.fast_decode, self.data_range = fast_decode, data_range
        self.cache = (
            ImageCache(self.local_images, resolution, image_channels, random_crop=random_crop) if cache_images else None
        )

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int | Key) -> Item:
        return self.take(idx)[0] if isinstance(idx, tuple) else _as_floats(self._crop(idx, random))

    def take(self, key: Key) -> tuple[Item, list[UnreadableImage]]:
        """What a pair (epoch, i) stands for, and what could not be read before it was found."""
        crop, bad = self.take_crop(key)
        return _as_floats(crop), bad

    def take_crop(self, key: Key) -> tuple[Crop, list[UnreadableImage]]:
        """The same as [H, W, C] or [H, W]: uint8 but where the file has finer numbers, which lie in [-1, 1]."""
        name, index = f"{self.seed}/{key[0]}/{key[1]}", key[1]
        bad: list[UnreadableImage] = []
        while True:
            try:
                return self._crop(index, random.Random(name)), bad
            except UnreadableImage as error:
                bad.append(error)
                if self.on_bad_image == "error" or len(bad) > MAX_REPLACEMENTS:
                    raise
            index = random.Random(f"{name}/instead/{len(bad)}").randrange(len(self))

    def _crop(self, index: int, draws: Draws) -> Crop:
        path, again = self.local_images[index], replay(draws) if self.partners else draws
        try:
            whole = self.cache.take(index, partial(self._read, path)) if self.cache else self._read(path)
            array = self._place(whole.picture, draws)
        except TooThin as error:
            raise UnreadableImage(path, str(error)) from error
        label: dict[str, Any] = (
            {} if self.local_classes is None else {"y": np.array(self.local_classes[index], dtype=np.int64)}
        )
        if self.partners is not None:  # placed by the very draws that the image took
            label |= self.partners.item(index, whole.size, partial(self._place, draws=again), again)
        return array, label

    def _read(self, path: str) -> Whole:
        enough = largest_cover(self.resolution, random_crop=self.random_crop) if self.fast_decode else None
        return read_whole(path, self.image_channels, enough, data_range=self.data_range)

    def _place(self, picture: Picture, draws: Draws, *, nearest: bool = False) -> NDArray[Any]:
        """A picture cropped and mirrored."""
        if self.random_crop:
            array = random_crop_arr(picture, self.resolution, rng=draws, nearest=nearest)
        else:
            array = center_crop_arr(picture, self.resolution, nearest=nearest)
        return array[:, ::-1] if self.random_flip and draws.random() < 0.5 else array

    def unreadable(self) -> list[UnreadableImage]:
        """Try every image: what is wrong with those that cannot be read."""
        found = []
        for index in range(len(self)):
            try:
                self._crop(index, random.Random(0))
            except UnreadableImage as error:
                found.append(error)
        return found


def _as_floats(crop: Crop) -> Item:
    return channels_first(crop[0]), crop[1]


# ---- batches


class Loaded(NamedTuple):
    """A batch, and (path, reason) of the images that were passed over on the way to it."""

    images: th.Tensor
    labels: dict[str, th.Tensor]
    bad: list[tuple[str, str]]


class BatchDataset(Dataset[Loaded | ValueError]):
    """Makes batches in whatever process. What is wrong travels as a value: a worker's error arrives garbled.

    :param as_bytes: images are uint8, a quarter of the memory, but where one of a batch is finer; else float32.
    """

    def __init__(self, images: ImageDataset, *, as_bytes: bool) -> None:
        self.images, self.as_bytes = images, as_bytes

    def __getitem__(self, keys: list[Key]) -> Loaded | ValueError:
        try:
            crops, bad = zip(*[self.images.take_crop(key) for key in keys], strict=True)
        except (UnreadableImage, NotKept) as error:
            return error
        arrays, labels = zip(*crops, strict=True)
        stacked = {name: th.from_numpy(np.stack([label[name] for label in labels])) for name in labels[0]}
        passed_over = [(error.path, error.reason) for errors in bad for error in errors]
        return Loaded(self._stacked(arrays), stacked, passed_over)

    def _stacked(self, arrays: Sequence[NDArray[Any]]) -> th.Tensor:
        """[N, C, H, W]."""
        if any(array.dtype != np.uint8 for array in arrays):
            return th.from_numpy(np.stack([channels_first(array) for array in arrays]))
        height, width, channels = (*arrays[0].shape, 1)[:3]
        images = np.empty((len(arrays), channels, height, width), np.uint8)
        for image, array in zip(images, arrays, strict=True):
            image[...] = array.reshape(height, width, channels).transpose(2, 0, 1)  # once, mirrored or not
        return th.from_numpy(images) if self.as_bytes else to_unit(th.from_numpy(images))


def batches(dataset: BatchDataset, order: Iterable[list[Key]], num_workers: int) -> DataLoader[Loaded | ValueError]:
    """The batches of an order, made ahead in worker processes, which share a cache by being forked."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=th.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if num_workers and dataset.images.cache else None,
        generator=th.Generator(),  # else starting it would advance the generator that training draws from
    )


def ignore_signals(worker: int = 0) -> None:
    """Ignore the signals that end training, in a process that decodes images: launchers send them to all processes.

    The training needs images until its ranks have agreed to stop; the processes end with their loader or its process.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch
