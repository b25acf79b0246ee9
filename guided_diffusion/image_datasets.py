"""Images and their labels as an endless stream of batches, in an order that depends on the seed alone.

Shapes: N batch, C channels, H W space. A size is 64, "64x128" or (64, 128): height before width.
"""

from __future__ import annotations

import math as math
import random as random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import blobfile as bf  # noqa: F401
import numpy as np
import torch as th
from numpy.typing import NDArray
from PIL import Image as Image
from torch.utils.data import DataLoader, Dataset as Dataset

from . import dist_util, logger
from .data.captions import Captions
from .data.conditioning import Partners
from .data.crops import center_crop_arr as center_crop_arr, random_crop_arr as random_crop_arr
from .data.fetching import Fetcher
from .data.items import DataOptions, ImageDataset as ImageDataset, Loaded, Schedule, batches
from .data.labels import ClassRow, Labels, read_labels, save_classes as save_classes
from .data.orders import WINDOW, Order, order_of
from .data.sources import IMAGE_EXTENSIONS, ImageSource, UnreadableImage, find_images, paths_in, split_archive, tar_of
from .data.tables import read_vectors
from .data.upsampling import SmallVersions, check_sizes
from .runtime.errors import UserError, printable, refuse
from .runtime.files import load_classes as load_classes
from .runtime.options import Size, size_flag
from .runtime.pictures import to_unit

Batch = tuple[th.Tensor, dict[str, th.Tensor]]

TABLE_ROWS = 40


def _list_image_files_recursively(data_dir: str) -> list[str]:
    return find_images(data_dir).paths


class ImageStream(Iterator[Batch]):
    """Endless batches of (images [N, C, H, W] in [-1, 1], {"y": ids [N]} or {}).

    The images of all epochs form one sequence: a permutation by (seed, epoch) for each, or 0 .. n-1 again and again.
    The ranks cut it into global batches and each takes its slice, so that neither their number nor the batch size
    changes what comes after what, and no image is left out.

    :param dataset: whose `options` say num_workers, as_bytes, fit, rank and world_size (see `DataOptions`).
    :param batch_size: of one rank.
    :param labels: of the data set's images; None leaves the stream without a class table.
    :param order: None is a permutation of all images in every epoch.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, *, labels: Labels | None = None, order: Order | None = None
    ) -> None:
        options, count = dataset.options, len(dataset)
        self.dataset, self.labels, self.num_workers = dataset, labels, options.num_workers
        self.rank = dist_util.rank() if options.rank is None else options.rank
        self.world_size = dist_util.world_size() if options.world_size is None else options.world_size
        self.batch_size = min(batch_size, max(1, -(-count // self.world_size))) if options.few else batch_size
        self.small_versions: SmallVersions | None = None
        self.captions: Captions | None = None  # whose `keywords` are set before the first batch
        self.source = dataset  # of what batches are made of; another one where latents are read instead of images
        self.encoder: Callable[[th.Tensor, list[int]], th.Tensor] | None = None  # (batch, number of each) -> latents
        self.skipped: dict[str, str] = {}  # path of an image that could not be read -> why
        if self.batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise UserError(f"batch_size {self.batch_size} on rank {self.rank} of {self.world_size}: give 1 or more")
        if count < self.global_batch and not (options.few and count):
            most = count // self.world_size
            remedy = f"set batch_size to at most {most}" if most else f"start at most {count} ranks"
            raise UserError(
                f"{count} images are fewer than one global batch of {self.global_batch} (batch_size {self.batch_size} "
                f"on {self.world_size} ranks); {remedy}, or add images"
            )
        self._schedule = Schedule(
            count,
            order or order_of(count, options.seed),
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.fetcher: Fetcher | None = None  # of shards that lie elsewhere
        self._loader: DataLoader[Loaded | ValueError] | None = None
        self._batches: Iterator[Loaded | ValueError] | None = None

    @property
    def classes(self) -> list[str]:
        """The name of each class id; [] without labels."""
        return self.labels.classes if self.labels else []

    @property
    def class_from(self) -> str:
        """The rule that the labels come from; "" without labels."""
        return self.labels.class_from if self.labels else ""

    def class_table(self) -> list[ClassRow]:
        """The classes by id and how many images each has; [] without labels."""
        return self.labels.class_table() if self.labels else []

    @property
    def global_batch(self) -> int:
        """Images that all ranks together take per step."""
        return self.batch_size * self.world_size

    def __next__(self) -> Batch:
        if self.fetcher is not None:
            self.fetcher.at(self._schedule.taken)
        if self._batches is None:
            if self._loader is None:
                self._loader = batches(self.source, self._schedule, self.num_workers)
            with _without_alarm():
                self._batches = iter(self._loader)
        batch = next(self._batches)
        if isinstance(batch, ValueError):
            self.close()
            skippable = isinstance(batch, UnreadableImage) and self.dataset.options.on_bad_image == "error"
            raise UserError(f"{batch}{', or set on_bad_image to skip' * skippable}")
        first = self._schedule.taken + self._schedule.offset
        images, cond = batch.images, batch.labels
        for path, reason in batch.bad:
            if path not in self.skipped:
                self.skipped[path] = reason
                count = f"on_bad_image is skip ({len(self.skipped)} such so far)"
                logger.warn(f"{UnreadableImage(path, reason)}; others take its place, as {count}")
        if self.small_versions is not None:
            cond |= self.small_versions(to_unit(images), range(first, first + len(images)))
        keys = self._schedule.keys(self._schedule.taken) if self.captions or self.encoder else []
        if self.encoder is not None:
            images = self.encoder(images, [epoch * len(self.dataset) + index for epoch, index in keys])
        if self.captions is not None:
            cond |= dict(self.captions(keys, self.dataset.local_images, self.skipped))
        self._schedule.taken += self.global_batch
        return images, cond

    def names(self) -> list[str]:
        """The files of the images that this rank was given last; those in `skipped` had others in their place."""
        keys = self._schedule.keys(self._schedule.taken - self.global_batch)
        return [self.dataset.local_images[index] for _, index in keys]

    def state_dict(self) -> dict[str, int]:
        """The position: global batches taken, and the images in them. Batches that workers hold ready do not count."""
        return {"batches": self._schedule.taken // self.global_batch, "images": self._schedule.taken}

    def give_back(self) -> None:
        """Count the last batch as not taken, in `state_dict`."""
        self._schedule.taken -= self.global_batch

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; with another batch size, to the image where the old one stood."""
        self._schedule.taken = state["images"] if "images" in state else state["batches"] * self.global_batch
        self._batches = None

    def close(self) -> None:
        """Stop the worker processes; asking for another batch starts new ones."""
        self._batches = self._loader = None
        if self.fetcher is not None:
            self.fetcher.close()


@contextmanager
def _without_alarm() -> Iterator[None]:
    """Undo torch's signal handler, which would interrupt the main thread wherever it is when a worker is lost.

    Asking for a batch finds that out too, within seconds and at a moment at which a training can still be saved.
    """
    settable = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if settable else None
    yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: Size,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    log: Callable[[str], object] | None = None,
    **options: Any,
) -> ImageStream:
    """The stream of all images below a folder or a zip, or in an array.

    :param data_dir: folder, zip, tar, folder in a zip, tars by a pattern ``train-{000..146}.tar`` or in a list, any of
        them in a bucket, tars on a web server, or an .npy or .npz [N, H, W, C]; several with commas between.
    :param deterministic: in the order of the names instead of shuffled.
    :param log: takes lines about the data set; None writes them to `logger`.
    :param options: fields of `DataOptions`: class_from, classes, num_workers, seed, ...
    """
    say, given = log or logger.log, DataOptions(**options)
    sources, captions, partners = _found(data_dir, given, say)
    labels = None
    if class_cond:
        fixed = given.classes, given.num_classes
        labels = read_labels(sources, given.class_from, *fixed, label_column=given.label_column)
    elif given.class_from != "auto" or given.classes or given.label_column:
        raise UserError("class_from, label_column and classes have no effect; set class_cond to True")
    refuse(
        (random_crop and given.fit != "crop", f"fit {given.fit} takes all of a picture: set random_crop to False"),
        (given.balance and not labels, "balance classes needs labels: set class_cond to True"),
    )
    dataset = ImageDataset(
        size_flag(image_size),
        [path for source in sources for path in source.paths],
        labels.ids if labels else None,
        random_crop=random_crop,
        random_flip=random_flip,
        partners=partners,
        vectors=_vectors(sources, given.vector_columns) if given.vector_columns else None,
        options=given,
        log=say,
    )
    if dataset.cache:
        say(f"  the decoded images are kept in memory, {dataset.cache.bytes / 1e9:.3g} GB when all of them are read")
    order, fetcher = _order(dataset, labels, [len(source) for source in sources], deterministic=deterministic)
    stream = ImageStream(dataset, batch_size, labels=labels, order=order)
    stream.captions, stream.fetcher = captions, fetcher
    if labels:
        rows = labels.class_table()
        lines = [f"  class {number}: {printable(name)} ({count} images)" for number, name, count in rows[:TABLE_ROWS]]
        more = [f"  and {len(rows) - TABLE_ROWS} classes more"] * (len(rows) > TABLE_ROWS)
        say("\n".join([*labels.notes, *lines, *more]))
    return stream


def _vectors(sources: Sequence[ImageSource], columns: str) -> NDArray[np.float32]:
    """The vectors of the images of all data sets."""
    parts = [read_vectors(source, columns) for source in sources]
    widths = sorted({part.shape[1] for part in parts})
    refuse((len(widths) > 1, f"vector_columns {columns!r} gives vectors of {widths} numbers: give data sets of one"))
    return np.concatenate(parts)


def _found(
    data_dir: str, options: DataOptions, say: Callable[[str], object]
) -> tuple[list[ImageSource], Captions | None, Partners | None]:
    """The images of each data set, their captions and their conditioning images."""
    sources, captions, partners = list[ImageSource](), None, None
    for path in paths_in(data_dir):
        source = find_images(path, options.image_channels)
        if not source.images:
            known = " ".join(extension[1:] for extension in IMAGE_EXTENSIONS)
            raise UserError(f"data_dir {path!r} holds no images, {source.skipped()}; readable are {known}")
        source.hold()
        say(source.summary())
        if options.captioning:
            source, more = options.captioning.match(source, say, options.seed)
            captions = replace(more, texts={**(captions.texts if captions else {}), **more.texts})
        sources.append(source)
    if options.pairing:
        refuse((len(sources) > 1, f"conditioning images go with one data_dir, got {data_dir}: give one"))
        source, partners = options.pairing.match(sources[0], say)
        sources = [source]
    return sources, captions, partners


def _order(
    dataset: ImageDataset, labels: Labels | None, parts: list[int], *, deterministic: bool
) -> tuple[Order, Fetcher | None]:
    """The order of the images, and what copies the shards that come next in it."""
    options = dataset.options
    window = options.shuffle.partition(":")[2]
    weights = [float(word) for word in options.data_weights.split(",") if word]
    if weights and len(weights) != len(parts):
        says = f"data_weights {options.data_weights} are {len(weights)}, and data_dir names {len(parts)}"
        raise UserError(f"{says}: give one for each")
    shards, numbers = None, None
    if dataset.remote or options.shuffle != "all":
        archives = [split_archive(path) for path in dataset.local_images]
        names, numbers = np.unique([archive[0] if archive else "" for archive in archives], return_inverse=True)
        tars = [tar_of(str(name)) for name in names]
    if options.shuffle != "all":
        shards = numbers
        refuse(("" in names, "shuffle shards needs images in tars or zips: leave it out, or see datasets/shards.py"))
    order = order_of(
        len(dataset),
        None if deterministic else options.seed,
        shards=shards,
        window=int(window or WINDOW),
        labels=labels.ids if labels and options.balance else (),
        parts=parts,
        weights=weights,
    )
    if numbers is None or not dataset.remote or not options.shard_cache_gb or dist_util.local_rank() or options.rank:
        return order, None
    elsewhere = np.array([tar is not None and tar.remote for tar in tars])
    places = [(tar.path, tar.copy, tar.size) if tar else ("", "", 0) for tar in tars]
    return order, Fetcher(np.where(elsewhere[numbers], numbers, -1), places, order, options.shard_cache_gb * 1e9)


def load_superres_data(
    data_dir: str,
    batch_size: int,
    large_size: Size,
    small_size: Size,
    class_cond: bool = False,
    *,
    cond_aug: float = 0.0,
    **options: Any,
) -> ImageStream:
    """A stream as `load_data` gives, with cond["low_res"]: the same images averaged down to `small_size`.

    :param cond_aug: above 0 there is noise on them, and cond["low_res_level"] says how much, up to this.
    :param options: further keywords of `load_data`.
    """
    small = check_sizes(large_size, small_size)
    stream = load_data(
        data_dir=data_dir, batch_size=batch_size, image_size=large_size, class_cond=class_cond, **options
    )
    stream.small_versions = SmallVersions(small, cond_aug, stream.dataset.options.seed)
    return stream
