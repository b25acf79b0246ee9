"""Jobs: what to sample and where it goes, cut into global batches.

Shapes: N images in all, B per batch, C channels, H W space (any number of space dimensions), K classes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch as th

from .files import printable

if TYPE_CHECKING:
    from ..sampling.steps import Sampler

Conditioning = Callable[[Sequence[int]], Mapping[str, th.Tensor]]
Start = Callable[[Sequence[int], dict[str, Any]], Mapping[str, Any]]

_ID = re.compile(r"-?\d{1,18}")
LISTED = 32  # longer lists of labels and names are not spelled out


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to sample, and where it goes.

    :param sampler: the step rule, e.g. ``make_sampler("ddim", eta=0.5)``, or its name.
    :param shape: of one image, (C, H, W).
    :param labels: class ids taken in turn: image i gets labels[i % len(labels)].
    :param num_classes: without `labels`, image i draws its label from range(num_classes); 0: no labels at all.
    :param class_names: names by class id, for the rows of the grid.
    :param conditioning: indices of a batch -> further keyword arguments of the network, one row per index.
    :param start: indices of a batch and the network's keyword arguments for it -> further options of the loop, such as
        init_image [B, C, H, W], in place of those of `generate`.
    :param request: what else identifies the run (weights, guidance scale, ...), as JSON values.
    :param request_defaults: values that an older request, which does not name them, had.
    :param save_images: write one PNG per image too.
    :param names: the file that each image comes from, where they come from files: kept in names.json, and their PNG
        files are called like them.
    :param film: show the first images on their way, in film.png and film.gif, every so many steps; 0: do not.
    """

    sampler: Sampler | str
    shape: tuple[int, ...]
    num_samples: int
    batch_size: int
    out_dir: str
    seed: int = 0
    labels: Sequence[int] = ()
    num_classes: int = 0
    class_names: Sequence[str] = ()
    conditioning: Conditioning | None = None
    start: Start | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    request_defaults: Mapping[str, Any] = field(default_factory=dict)
    save_images: bool = False
    names: Sequence[str] = ()
    film: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1, the least number of images")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative: give 0 or more")
        if len(self.names) not in (0, self.num_samples):
            raise ValueError(f"{len(self.names)} names are given for {self.num_samples} images: give one for each")
        check_labels(self.labels, self.num_classes or math.inf)

    @property
    def batches(self) -> int:
        """Number of global batches, the last one padded."""
        return math.ceil(self.num_samples / self.batch_size)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return bool(self.labels) or self.num_classes > 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the result, channels last."""
        return (self.num_samples, *self.shape[1:], self.shape[0])

    @property
    def path(self) -> str:
        """Where the merged result goes."""
        return self.file(f"samples_{'x'.join(str(side) for side in self.stored_shape)}.npz")

    def file(self, *names: str) -> str:
        """The path of a file of this job."""
        return os.path.join(self.out_dir, *names)

    def shard(self, batch: int) -> str:
        """Where one global batch goes until all are merged."""
        return self.file("shards", f"{batch:06d}.npz")

    def count(self, batch: int) -> int:
        """How many images of a global batch are kept: the last one's padding is not."""
        return min(self.batch_size, self.num_samples - batch * self.batch_size)

    def draw_labels(self, indices: Sequence[int], generators: Sequence[th.Generator]) -> th.Tensor | None:
        """Labels [B] of the images with these indices, or None; random ones are the first draw of each generator."""
        if self.labels:
            return th.tensor([self.labels[i % len(self.labels)] for i in indices], device=generators[0].device)
        if not self.num_classes:
            return None
        draws = [th.randint(self.num_classes, (), device=g.device, generator=g) for g in generators]
        return th.stack(draws)


def check_labels(labels: Iterable[int], num_classes: float) -> None:
    """Refuse labels outside of 0 .. num_classes - 1.

    :raises ValueError: naming the first of them and the range.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            allowed = f"0 .. {num_classes - 1}" if num_classes < math.inf else "0 or more"
            raise ValueError(f"class {label} does not exist: the classes are {allowed}")


def parse_classes(text: str, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Class ids from "207,360" or from names, which may hold commas themselves; a number always is an id.

    :param names: names by class id, as in classes.json.
    :raises ValueError: for an id out of range, an unknown name, none at all, or commas that can be read in two ways.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"classes {text!r} names no class: write ids or names with commas in between")
    readings = _readings(parts, names)
    if not readings:
        word = next((part for part in parts if not _ID.fullmatch(part) and part not in names), text)
        shown = ", ".join(map(printable, names[:LISTED]))
        known = f"the names are {shown}" if names else "there is no classes.json with names: give ids"
        raise ValueError(f"class {printable(word)!r} is unknown: {known}")
    if len(readings) > 1:
        one, other = ("".join(f"[{dict(enumerate(names)).get(n, n)}]" for n in labels) for labels in readings)
        raise ValueError(f"classes {printable(text)!r} may be {printable(one)} or {printable(other)}: give ids")
    check_labels(readings[0], num_classes)
    return readings[0]


def _readings(parts: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """At most two ways to read words as ids and names, of which some are several words with commas in between."""
    ids = {", ".join(map(str.strip, name.split(","))): label for label, name in reversed([*enumerate(names)])}
    longest = max((name.count(",") + 1 for name in names), default=1)
    ways: list[list[Any]] = [[()]]  # to read the last 0, 1, ... words, each as (label, the way to read the rest)
    for start in reversed(range(len(parts))):
        found: list[Any] = []
        for count in range(1, min(longest, len(parts) - start) + 1):
            word = ", ".join(parts[start : start + count])
            label = int(word) if _ID.fullmatch(word) else ids.get(word)
            found += [] if label is None else [(label, rest) for rest in ways[-count]]
        ways.append(found[:2])
    return [list(_unrolled(way)) for way in ways[-1]]


def _unrolled(way: Any) -> Iterator[int]:
    while way:
        label, way = way
        yield label
