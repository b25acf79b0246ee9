"""Images of a data set, cropped and mirrored, and batches of them in an order that depends on the seed alone.

Shapes: N batch, C channels, H W space. A size is 64, "64x128" or (64, 128): height before width.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ..config import BAD_IMAGE_RULES, BALANCES, FITS, LoaderConfig
from ..runtime.errors import check_choice, refuse
from ..runtime.files import is_remote
from ..runtime.options import Size, shuffle_flag
from ..runtime.pictures import to_unit
from .archives import AT_ONCE
from .cache import ImageCache
from .conditioning import Pairing, Partners
from .crops import Draws, Picture, center_crop_arr, channels_first, fitted_arr, largest_cover, random_crop_arr, replay
from .decoding import Decoded, Range
from .orders import Numbers, Order
from .sources import UnreadableImage, naming, read_decoded

if TYPE_CHECKING:
    from .captions import Captioning

Key = tuple[int, int]  # (epoch, index)
Item = tuple[NDArray[np.float32], dict[str, Any]]
Crop = tuple[NDArray[Any], dict[str, Any]]

MAX_REPLACEMENTS = 100  # images tried in place of one that cannot be read


@dataclass(frozen=True, kw_only=True)
class DataOptions(LoaderConfig):
    """How a data set is read, beside the originals' keywords; the fields of `LoaderConfig` are flags.

    class_from, label_column, classes and num_classes are those of `labels.read_labels`, vector_columns is that of
    `labels.read_vectors`.

    :param data_range: the numbers that are black and white, where files do not say it: (0, 4095).
    :param on_bad_image: "error" ends with the name of an image that cannot be read; "skip" takes another one instead,
        the same on every run, and says so.
    :param seed: of the order, of crops and of flips.
    :param pairing: where the images have conditioning images.
    :param captioning: how their captions are read, if at all.
    :param num_workers: processes that decode ahead; 0 decodes when a batch is asked for.
    :param as_bytes: images are uint8 [0, 255] where no image of their batch is finer; `pictures.to_unit` makes [-1, 1]
        of them, on any device.
    :param few: for images to measure on: with fewer than one global batch, batches are as small as the images allow,
        and `cache_images` keeps none of them.
    :param shuffle: "all", or "shards" with the number of them that are shuffled together: "shards:16".
    :param data_weights: of each data set, "3,1"; '' takes them by size.
    :param balance: "classes" shows all classes equally often.
    :param fit: "crop" cuts pictures to their middle, or at random; "pad" puts black beside them; "squash" forgets their
        proportions.
    :param rank: None, like `world_size`, asks `dist_util`.
    """

    class_from: str = "auto"
    label_column: str = ""
    classes: Sequence[str] | str | None = None
    num_classes: int | None = None
    image_channels: int = 3
    data_range: Range | None = None
    vector_columns: str = ""
    on_bad_image: str = "error"
    seed: int = 0
    pairing: Pairing | None = None
    captioning: Captioning | None = None
    num_workers: int = 0
    as_bytes: bool = False
    few: bool = False
    shuffle: str = "all"
    data_weights: str = ""
    balance: str = ""
    fit: str = "crop"
    rank: int | None = None
    world_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("on_bad_image", self.on_bad_image, BAD_IMAGE_RULES)
        check_choice("fit", self.fit, FITS)
        check_choice("balance", self.balance, BALANCES)
        shuffle_flag(self.shuffle)
        negative = self.seed < 0 or self.num_workers < 0
        refuse((negative, f"seed {self.seed} and num_workers {self.num_workers} must not be negative"))


class ImageDataset(Dataset[Item]):
    """Images cropped to one size, as (float32 [C, H, W] in [-1, 1], {"y": class id} or {}).

    An index i draws its augmentation from the module `random`. A pair (epoch, i) draws it from (seed, epoch, i), which
    is the same in any process and in any order. Where the image of a pair cannot be read, "skip" takes another one,
    chosen by (seed, epoch, i), with its own class; for an index alone it is an error.

    :param resolution: the size.
    :param image_paths: of files, also of members of zips, as ``pets.zip/cat/1.png``.
    :param classes: the class id of each path, or None.
    :param shard: take every `num_shards`-th image from this one on.
    :param partners: conditioning images, which come as "cond_image" beside "y".
    :param vectors: [N, D], which come as "vector".
    :param options: of reading; single ones may be given as keywords.
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
        partners: Partners | None = None,
        vectors: NDArray[np.float32] | None = None,
        options: DataOptions | None = None,
        log: Callable[[str], object] = lambda line: None,
        **given: Any,
    ) -> None:
        super().__init__()
        self.options = replace(options or DataOptions(), **given)
        self.resolution = resolution
        self.local_images = list(image_paths[shard::num_shards])
        self.local_classes = None if classes is None else list(classes[shard::num_shards])
        self.vectors = None if vectors is None else vectors[shard::num_shards]
        self.random_crop, self.random_flip = random_crop, random_flip
        self.partners = partners and replace(partners, paths=partners.paths[shard::num_shards])
        self.cache: ImageCache | None = None
        self.remote = any(map(is_remote, self.local_images))
        if self.options.cache_images and not self.options.few:
            channels = self.options.image_channels
            if random_crop:
                log(f"  reading the sizes of {len(self)} images, which say how much memory they take")
            self.cache = ImageCache(
                self.local_images, resolution, channels, random_crop=random_crop, fit=self.options.fit
            )

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int | Key) -> Item:
        array, label = self.take_crop(idx)[0] if isinstance(idx, tuple) else self._crop(idx, random)
        return channels_first(array), label

    def take_crop(self, key: Key) -> tuple[Crop, list[UnreadableImage]]:
        """The image of a pair (epoch, i) and its labels, and what could not be read before it was found.

        The image is [H, W, C] or [H, W]: uint8, but [-1, 1] where the file has finer numbers.
        """
        name, index = f"{self.options.seed}/{key[0]}/{key[1]}", key[1]
        bad: list[UnreadableImage] = []
        while True:
            try:
                return self._crop(index, random.Random(name)), bad
            except UnreadableImage as error:
                bad.append(error)
                if self.options.on_bad_image == "error" or len(bad) > MAX_REPLACEMENTS:
                    raise
            index = random.Random(f"{name}/instead/{len(bad)}").randrange(len(self))

    def _crop(self, index: int, draws: Draws) -> Crop:
        path, again = self.local_images[index], replay(draws) if self.partners else draws
        decoded = self.cache.take(index, partial(self._read, path)) if self.cache else self._read(path)
        with naming(path):
            array = self._place(decoded.picture, draws)
        label: dict[str, Any] = {}
        if self.local_classes is not None:
            label["y"] = np.array(self.local_classes[index], dtype=np.int64)
        if self.vectors is not None:
            label["vector"] = self.vectors[index]
        if self.partners is not None:  # placed by the very draws that the image took
            label |= self.partners.item(index, decoded.size, partial(self._place, draws=again), again)
        return array, label

    def stacked(self, arrays: Sequence[NDArray[Any]]) -> th.Tensor:
        """[N, C, H, W] of what `take_crop` gives: bytes or [-1, 1]."""
        if any(array.dtype != np.uint8 for array in arrays):
            return th.from_numpy(np.stack([channels_first(array) for array in arrays]))
        height, width, channels = (*arrays[0].shape, 1)[:3]
        images = np.empty((len(arrays), channels, height, width), np.uint8)
        for image, array in zip(images, arrays, strict=True):
            image[...] = array.reshape(height, width, channels).transpose(2, 0, 1)  # once, mirrored or not
        return th.from_numpy(images) if self.options.as_bytes else to_unit(th.from_numpy(images))

    def _read(self, path: str) -> Decoded:
        options = self.options
        enough = largest_cover(self.resolution, random_crop=self.random_crop) if options.fast_decode else None
        return read_decoded(path, options.image_channels, enough, data_range=options.data_range)

    def _place(self, picture: Picture, draws: Draws, *, nearest: bool = False) -> NDArray[Any]:
        """A picture cropped and mirrored."""
        if self.options.fit != "crop":
            array = fitted_arr(picture, self.resolution, pad=self.options.fit == "pad", nearest=nearest)
        elif self.random_crop:
            array = random_crop_arr(picture, self.resolution, rng=draws, nearest=nearest)
        else:
            array = center_crop_arr(picture, self.resolution, nearest=nearest)
        return array[:, ::-1] if self.random_flip and draws.random() < 0.5 else array


class Schedule(Iterable[list[Key]]):
    """The keys of the batches of one rank, from the image `taken` on, as seen when iteration begins.

    It knows nothing of the stream it serves: in a cycle of references the loader's workers would outlive the stream.

    :ivar taken: images that all ranks together have taken.
    """

    def __init__(self, count: int, order: Order, *, batch_size: int, rank: int, world_size: int) -> None:
        self.count, self.order, self.batch_size = count, order, batch_size
        self.stride, self.offset, self.taken = batch_size * world_size, batch_size * rank, 0
        self._orders: dict[int, tuple[Numbers, Numbers]] = {}

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.keys, itertools.count(self.taken, self.stride))

    def keys(self, taken: int) -> list[Key]:
        """The next batch of the rank when all ranks have taken so many images."""
        first, known = taken + self.offset, self._orders
        places = [divmod(place, self.count) for place in range(first, first + self.batch_size)]
        self._orders = {epoch: self.order(epoch) if epoch not in known else known[epoch] for epoch, _ in places}
        ordered = ((*self._orders[epoch], place) for epoch, place in places)
        return [(int(times[place]), int(indices[place])) for times, indices, place in ordered]


class Loaded(NamedTuple):
    """A batch, and (path, reason) of the images that could not be read on the way to it."""

    images: th.Tensor
    labels: dict[str, th.Tensor]
    bad: list[tuple[str, str]]


class BatchDataset(Dataset[Loaded | ValueError]):
    """Batches of a data set, by lists of keys, in any process; errors are values: a worker's error arrives garbled."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    @cached_property
    def _map(self) -> Any:
        """`map`, by threads that stay from batch to batch where each image is a request to a bucket or server."""
        return ThreadPoolExecutor(AT_ONCE).map if self.images.remote else map

    def __getitem__(self, keys: list[Key]) -> Loaded | ValueError:
        try:
            crops, bad = zip(*self._map(self.images.take_crop, keys), strict=True)
        except ValueError as error:
            return error
        arrays, labels = zip(*crops, strict=True)
        stacked = {name: th.from_numpy(np.stack([label[name] for label in labels])) for name in labels[0]}
        reasons = [(error.path, error.reason) for errors in bad for error in errors]
        return Loaded(self.images.stacked(arrays), stacked, reasons)


def batches(images: ImageDataset, order: Iterable[list[Key]], num_workers: int) -> DataLoader[Loaded | ValueError]:
    """The batches of an order, made ahead in worker processes, which share a cache by being forked."""
    return DataLoader(
        BatchDataset(images),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=th.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if num_workers and images.cache else None,
        generator=th.Generator(),  # else starting it would advance the generator that training draws from
    )


def _as_is(batch: Any) -> Any:
    return batch


def ignore_signals(worker: int = 0) -> None:
    """Ignore the signals that end training, in a process that decodes images: launchers send them to all processes.

    The training needs images until its ranks have agreed to stop; the processes end with their loader or its process.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
