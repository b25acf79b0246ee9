"""Restartable jobs: rows made in global batches, kept in shards until all are there, and merged. Sampling is one.

Shapes: N images in all, B per batch, C channels, H W space (any number of space dimensions), K classes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch as th

from .atomic import PART
from .errors import DAMAGE, WHY, UserError, as_user_error, listed, printable, refuse
from .files import parse_json, read_file, write_json
from .labels import check_labels
from .npz import Rows, holds, read_npz

if TYPE_CHECKING:
    from ..sampling.steps import Sampler

REQUEST = "request.json"

Conditioning = Callable[[Sequence[int]], Mapping[str, th.Tensor]]
Decode = Callable[[th.Tensor, Sequence[int]], th.Tensor]
Start = Callable[[Sequence[int], dict[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RestartableJob(ABC):
    """Work that is cut into batches by the index of its rows, and goes on in its folder after a kill.

    A subclass gives `size` and `arrays`; rank r makes the batches of `missing(r, world_size)` and saves them to
    `shard(batch)`.

    :param request: what identifies the result (weights, flags, ...), as JSON values.
    :param request_defaults: values that an older request, which does not name them, had.
    """

    out_dir: str
    batch_size: int
    seed: int = 0
    request: Mapping[str, Any] = field(default_factory=dict)
    request_defaults: Mapping[str, Any] = field(default_factory=dict)

    what: ClassVar[str] = "results"  # in messages

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def arrays(self) -> list[tuple[tuple[int, ...], Any]]:
        """Shape of a row and dtype of each array of the shards."""

    @property
    def batches(self) -> int:
        """Number of batches."""
        return math.ceil(self.size / self.batch_size)

    def rows(self, batch: int) -> range:
        """Indices of the rows of a batch; the last one may be shorter."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.size))

    def file(self, *names: str) -> str:
        """The path of a file of this job."""
        return os.path.join(self.out_dir, *names)

    def shard(self, batch: int) -> str:
        """The file of one batch until all are merged."""
        return self.file("shards", f"{batch:06d}.npz")

    def holds(self, path: str, rows: int) -> bool:
        """Whether a file is there with so many rows of the job's arrays; one that a disk damaged is not."""
        return holds(path, *(((rows, *shape), kind) for shape, kind in self.arrays))

    def is_whole(self, batch: int) -> bool:
        """Whether the shard of a batch is there."""
        return self.holds(self.shard(batch), len(self.rows(batch)))

    def claim(self, request: Mapping[str, Any], results: Iterable[str]) -> bool:
        """Make the folder this job's; True if it was already.

        :param request: all that the result depends on.
        :param results: names of the files that will lie there.
        :raises UserError: if the folder is another job's, or holds such files of unknown origin.
        """
        path, request = self.file(REQUEST), json.loads(json.dumps(request))
        if not os.path.exists(path):
            for taken in filter(os.path.exists, map(self.file, results)):
                raise UserError(f"{taken} exists and no {REQUEST} says what it is: give another --log_dir or remove it")
            write_json(path, request)
            return False
        earlier = {key: value for key, value in self.request_defaults.items() if key in request}
        fault = f"{path} does not say whose {self.what} lie there ({WHY}): give another --log_dir, or remove it"
        with as_user_error(fault, *DAMAGE):
            earlier = {**earlier, **parse_json(read_file(path))}
        pairs = {key: (earlier.get(key), request.get(key)) for key in {**earlier, **request}}
        changes = [
            f"{printable(k)} was {_shown(old)} and is {_shown(new)}" for k, (old, new) in pairs.items() if old != new
        ]
        fault = f"{self.out_dir} holds the {self.what} of another request ({listed(changes, 4)})"
        refuse((changes, f"{fault}: give another --log_dir"))
        return True

    def missing(self, rank: int, world_size: int, *, log: Callable[[str], None]) -> list[int]:
        """The batches that a rank is to make: of every world_size-th one those whose shards are not there."""
        share = range(rank, self.batches, world_size)
        missing = [batch for batch in share if not self.is_whole(batch)]
        if whole := len(share) - len(missing):
            log(f"going on where an earlier run stopped: {whole} of {len(share)} batches are there")
        return missing

    def check_complete(self) -> None:
        """Refuse to go on if the shard of a batch is missing or damaged."""
        missing = [batch for batch in range(self.batches) if not self.is_whole(batch)]
        fault = f"{len(missing)} of {self.batches} batches are missing in {self.file('shards')}, the first is"
        refuse((missing, f"{fault} {min(missing, default=0)}: all ranks must write to the same folder"))

    def column(self, array: int) -> Iterator[np.ndarray[Any, Any]]:
        """One array of the shards, batch by batch; a shard that was damaged is removed, and an error says so."""
        for path in map(self.shard, range(self.batches)):
            try:
                yield from read_npz(path, f"arr_{array}", self.batch_size)
            except ValueError as error:
                os.remove(path)
                fault = f"{path} was damaged after it was written ({error})"
                raise UserError(f"{fault}: it is removed, run the same command again") from error

    def merged(self) -> list[Rows]:
        """All rows of each array, read while they are written elsewhere."""
        self.check_complete()
        return [((self.size, *shape), kind, self.column(array)) for array, (shape, kind) in enumerate(self.arrays)]

    def tidy(self, *results: str) -> None:
        """Remove the shards, and what killed runs left half written of the result's files."""
        shutil.rmtree(self.file("shards"), ignore_errors=True)
        for name in os.listdir(self.out_dir):
            if PART in name and name.partition(PART)[0] in (REQUEST, *results):
                os.remove(self.file(name))


def _shown(value: Any) -> str:
    return printable(str(value)) or "''"


@dataclass(frozen=True, kw_only=True)
class Job(RestartableJob):
    """What to sample, and where it goes.

    :param sampler: the step rule, e.g. ``make_sampler("ddim", eta=0.5)``, or its name.
    :param shape: of one image, (C, H, W).
    :param start_index: number of the first image, where the job is a part of a larger one; images are told apart by
        these numbers alone.
    :param total: images of the larger one; 0: there is none.
    :param labels: class ids taken in turn: image i gets labels[i % len(labels)].
    :param num_classes: without `labels`, image i draws its label from range(num_classes); 0: no labels at all.
    :param keep_labels: False leaves labels out of the result, where they say nothing of an image (`randomize_class`).
    :param class_names: names by class id, for the rows of the grid.
    :param conditioning: indices of a batch -> further keyword arguments of the network, one row per index.
    :param start: indices of a batch and the network's keyword arguments for it -> further options of the loop, such as
        init_image [B, C, H, W], in place of those of `generate`.
    :param save_images: write one PNG per image too.
    :param names: the file that each image comes from, where they come from files: kept in names.json, and their PNG
        files are called like them.
    :param prompts: the texts that the images are made for, taken in turn: kept in the npz and in the PNG files.
    :param latent_shape: of what the loop makes in place of an image, where `decode` makes images [B, C, H, W] of that,
        called with it and the indices.
    :param film: show the first images on their way, in film.png and film.gif, every so many steps; 0: do not.
    """

    sampler: Sampler | str
    shape: tuple[int, ...]
    num_samples: int
    start_index: int = 0
    total: int = 0
    labels: Sequence[int] = ()
    num_classes: int = 0
    keep_labels: bool = True
    class_names: Sequence[str] = ()
    conditioning: Conditioning | None = None
    start: Start | None = None
    save_images: bool = False
    names: Sequence[str] = ()
    prompts: Sequence[str] = ()
    film: int = 0
    latent_shape: tuple[int, ...] = ()
    decode: Decode | None = None

    what: ClassVar[str] = "samples"

    def __post_init__(self) -> None:
        least = (("num_samples", self.num_samples, 1), ("batch_size", self.batch_size, 1), ("seed", self.seed, 0))
        unnamed = len(self.names) not in (0, self.num_samples)
        refuse(
            *((value < low, f"{name} {value} is below the least value, {low}") for name, value, low in least),
            (unnamed, f"{len(self.names)} names are given for {self.num_samples} images: give one for each"),
        )
        check_labels(self.labels, self.num_classes or math.inf)

    @property
    def size(self) -> int:
        """Number of images."""
        return self.num_samples

    @property
    def arrays(self) -> list[tuple[tuple[int, ...], Any]]:
        """Images, channels last, and labels if there are any."""
        images = ((*self.shape[1:], self.shape[0]), np.uint8)
        return [images, ((), np.int64)] if self.saves_labels else [images]

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return bool(self.labels) or self.num_classes > 0

    @property
    def saves_labels(self) -> bool:
        """Whether the result has them."""
        return self.labelled and self.keep_labels

    @property
    def path(self) -> str:
        """The file of the merged result."""
        sides = (self.num_samples, *self.shape[1:], self.shape[0])
        return self.file(f"samples_{'x'.join(map(str, sides))}.npz")

    def part(self, number: int, count: int) -> Job:
        """Part `number` of 1 .. count of the job: whole batches, as many in one part as in another or one more."""
        first, end = (share * self.batches // count * self.batch_size for share in (number - 1, number))
        whole = f"of {self.batches} batches of {self.batch_size} there are at most {self.batches} parts"
        refuse((first == end, f"part {number} of {count} would be empty: {whole}"))
        return self.cut(first, min(end, self.num_samples))

    def cut(self, first: int, end: int) -> Job:
        """The images from number `first` to before `end` of a job that begins at 0."""
        beyond = not 0 <= first < end
        refuse((beyond, f"start_index {first} is beyond the {end} images that there are: give a lower one"))
        names = self.names[first:end]
        return replace(self, start_index=first, total=self.num_samples, num_samples=end - first, names=names)

    def prompt(self, index: int) -> str:
        """The prompt of an image, '' where there are none."""
        return self.prompts[index % len(self.prompts)] if self.prompts else ""

    def draw_labels(self, indices: Sequence[int], generators: Sequence[th.Generator]) -> th.Tensor | None:
        """Labels [B] of the images with these indices, or None; random ones are the first draw of each generator."""
        if self.labels:
            return th.tensor([self.labels[i % len(self.labels)] for i in indices], device=generators[0].device)
        if not self.num_classes:
            return None
        draws = [th.randint(self.num_classes, (), device=g.device, generator=g) for g in generators]
        return th.stack(draws)
