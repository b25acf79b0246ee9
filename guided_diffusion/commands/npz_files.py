"""An npz of images to a folder of PNG files, a folder or zip of images to an npz, parts of an npz to the whole one.

None is held as a whole.

Shapes: N images, H W space, C channels; arrays are [N, H, W, C] or [N, H, W] of uint8, labels [N].
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import logger
from ..data.archives import expanded
from ..data.labels import Labels, read_labels, save_classes
from ..data.sources import ImageSource, find_images, paths_in, read_bytes, read_pixels
from ..runtime.atomic import PART, explained
from ..runtime.errors import DAMAGE, WHY, UserError, as_user_error, quoted, refuse
from ..runtime.files import load_classes, parse_json, write_json
from ..runtime.npz import PROMPTS, Npz, write_arrays
from ..runtime.options import parse_range
from ..runtime.pictures import DRAWN_CHANNELS, Pixels, save_png
from .flags import Flags
from .tool_sections import FromImagesConfig, NpzToolConfig

if TYPE_CHECKING:
    from ..evaluation.images import ArrayImages

ORDER, CLASSES = "names.json", "classes.json"  # in a folder from an npz: its images in their order, and their classes
MAX_LABEL = 2**16  # without names of the classes


def run(flags: Flags) -> None:
    """Run one of the tools, and print what it wrote."""
    config = flags.part(NpzToolConfig)
    if not config.out or os.path.lexists(config.out):
        raise UserError(f"{config.out!r} exists already: remove it, or give another name")
    if config.tool == "from-images":
        print(*from_images(config, flags.part(FromImagesConfig)), sep="\n")
    else:
        print((to_png if config.tool == "to-png" else merge)(config))


def to_png(config: NpzToolConfig) -> str:
    """Write CLASS_NUMBER.png of every image in a new folder; returns a line about it."""
    from ..evaluation.images import ArrayImages, open_images

    images, out = open_images(config.source), config.out.rstrip("/")
    if not isinstance(images, ArrayImages) or images.dtype != np.uint8 or not images.count:
        raise UserError(
            f"{config.source} holds no images of uint8, but of {images.dtype}: save images in [-1, 1] as "
            "((x + 1) * 127.5).clip(0, 255).astype(uint8)"
        )
    with Npz(images.file) as archive:
        others = images.labels is None and images.name == "arr_0" and "arr_1" in archive
    idle = images.labels is None and config.classes
    refuse(
        (others, f"{config.source}: arr_1 is no label for each of {images.count} images"),
        (idle, f"{config.source} has no labels (arr_1): leave out --classes {config.classes}"),
    )
    ids = None if images.labels is None else images.labels.tolist()
    classes = [] if ids is None else _classes(ids, config.classes)
    digits = max(6, len(str(images.count - 1)))
    starts = [""] * images.count if ids is None else [f"{classes[label]}_" for label in ids]
    names = [f"{start}{index:0{digits}d}.png" for index, start in enumerate(starts)]
    part = f"{out}{PART}{os.getpid()}"
    pixels = (image for chunk in images.stored() for image in chunk)
    try:
        with explained(out), logger.progress_bar(total=len(names), desc="writing", unit="image") as bar:
            os.makedirs(part)
            for name, image in zip(names, pixels, strict=True):
                save_png(os.path.join(part, name), image[..., None] if image.ndim == 2 else image)
                bar.update()
            order = {"file": os.path.basename(config.source), "shape": list(images.stored_shape), "names": names}
            write_json(os.path.join(part, ORDER), order)
            if ids is not None:
                save_classes(os.path.join(part, CLASSES), Labels(ids, classes, "filename", []))
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{out}: {images.count} images" + (f" of {len(classes)} classes" if classes else "")


def _classes(ids: Sequence[int], table: str) -> list[str]:
    """Names of classes by id, which file names can begin with; without a classes.json their numbers."""
    low, high, names = min(ids), max(ids), load_classes(table) if table else []
    nameless = low < 0 or high > (len(names) - 1 if names else MAX_LABEL)
    refuse((nameless, f"label {min(low, 0) or high} has no name: give a classes.json that names it"))
    for name in names:
        odd = not name or name[0] == "." or set(name) & set('_/\\:*?"<>|\0')
        refuse((odd, f"the class {quoted(name)} is no beginning of a file name: change it in classes.json"))
    return names or [f"{number:0{len(str(high))}d}" for number in range(high + 1)]


def from_images(config: NpzToolConfig, options: FromImagesConfig) -> list[str]:
    """Write the images of a folder or zip, and their labels, as an npz; returns lines about it."""
    listing, shape = _in_order(find_images(config.source))
    channels = options.image_channels or ([*shape, 1][2] if shape else 3)
    refuse(
        (not config.out.endswith(".npz"), f"{config.out!r} is no name of an npz: give one that ends in .npz"),
        (not listing.images, f"{config.source} holds no images, {listing.skipped()}: give a folder or a zip that does"),
        (channels not in DRAWN_CHANNELS, f"images must have 1, 3 or 4 channels, got {channels}"),
    )
    labels, notes = _labels(listing, config.classes, options)
    sides = next(_pixels(listing, channels, options)).shape[:2]
    flat = len(shape) == 2 and not options.image_channels
    count, shape = len(listing.images), sides if flat else (*sides, channels)
    images = (image.reshape(1, *shape) for image in _pixels(listing, channels, options))
    ids = {} if labels is None else {"arr_1": np.asarray(labels.ids, np.int64)}
    write_arrays(config.out, {"arr_0": ((count, *shape), np.uint8, images), **ids})
    if labels is not None:
        table = f"{os.path.splitext(config.out)[0]}.{CLASSES}"
        save_classes(table, labels)
        notes.append(f"{table}: {len(labels.classes)} classes")
    return [listing.summary(), *notes, f"{config.out}: {count} images {'x'.join(map(str, shape))}"]


def _in_order(listing: ImageSource) -> tuple[ImageSource, tuple[int, ...]]:
    """The files in the order of the npz that they come from, and the shape of its images; () for any other folder."""
    if ORDER not in listing.others:
        return listing, ()
    where = listing.path(ORDER)
    with as_user_error(f"{where} does not tell the order of the images ({WHY}): remove it", *DAMAGE):
        order = parse_json(read_bytes(where))
        names, shape = list(order["names"]), tuple(map(int, order["shape"]))
        if len(names) != len(listing.images) or set(names) != set(listing.images):
            raise UserError(f"it names {len(names)} files, and others than the {len(listing.images)} that are there")
    return ImageSource(listing.root, names, listing.others, listing.refused), shape


def _labels(listing: ImageSource, classes: str, options: FromImagesConfig) -> tuple[Labels | None, list[str]]:
    """The labels, None where there are none and none are asked for; and lines about them."""
    if not classes and CLASSES in listing.others and not listing.root.lower().endswith(".zip"):
        classes = listing.path(CLASSES)
    try:
        labels = read_labels(listing, options.class_from or "auto", classes or None, label_column=options.label_column)
    except ValueError as error:
        if options.class_from or options.label_column or classes:
            raise
        return None, [f"no labels: {error}"]
    return labels, labels.notes


def _pixels(listing: ImageSource, channels: int, options: FromImagesConfig) -> Iterator[Pixels]:
    """Each image, [H, W] or [H, W, C], all of one size."""
    span, first = parse_range(options.data_range), ""
    with logger.progress_bar(total=len(listing.images), desc="reading", unit="image") as bar:
        for name in listing.images:
            image = read_pixels(listing.path(name), channels, options.image_size or None, span)
            sides = "{}x{}".format(*image.shape)
            first = first or sides
            if sides != first:
                both = f"{quoted(name)} is {sides} and {quoted(listing.images[0])} {first}"
                raise UserError(f"{both} (height x width): give --image_size, to which all are scaled and cropped")
            yield image
            bar.update()


OF_A_PART = ("start_index", "num_samples", "total")  # what differs in the requests of parts of one job


def merge(config: NpzToolConfig) -> str:
    """Write the npz that one job would have written, or the statistics of all images; returns a line about it."""
    from ..evaluation.images import ArrayImages, open_images

    paths = [path for text in paths_in(config.source) for path in expanded(text)]
    opened = [open_images(path) for path in paths]
    parts = [images for images in opened if isinstance(images, ArrayImages)]
    if len(parts) < max(2, len(opened)):
        raise UserError(f"{config.source} are no npz files of parts: write run1,run2, or run{{1..8}} for eight runs")
    arrays = _sum_of(parts) or _joined(_in_turn(parts))
    write_arrays(config.out, arrays)
    shapes = {name: array[0] if isinstance(array, tuple) else array.shape for name, array in arrays.items()}
    return f"{config.out}: {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}"


def _in_turn(parts: list[ArrayImages]) -> list[ArrayImages]:
    """The parts of a job in the order of their images; those that no request.json tells of as they are given."""
    from ..evaluation.images import request_of

    requests = [request_of(part.file) for part in parts]
    if not any(requests):
        return parts
    begins = [int(request.get("start_index", 0)) for request in requests]
    turns, end = sorted(range(len(parts)), key=begins.__getitem__), min(begins)
    first = requests[turns[0]]
    for number in turns:
        request, path = requests[number], parts[number].path
        odd = [name for name in {**first, **request} if request.get(name) != first.get(name) and name not in OF_A_PART]
        here = f"{path} begins at image {begins[number]}"
        refuse(
            (odd, f"{path} and {parts[turns[0]].path} are of two jobs: they differ in {', '.join(odd[:4])}"),
            (begins[number] > end, f"{here}, and those from {end} on are missing: make that part too"),
            (begins[number] < end, f"{here}, and others before it go to {end}: leave one of them out"),
        )
        end += parts[number].count
    total = max(int(request.get("total", 0)) for request in requests)
    refuse((end < total, f"the images from {end} to {total} are missing: make that part too"))
    return [parts[number] for number in turns]


def _joined(parts: Sequence[ArrayImages]) -> dict[str, Any]:
    """Images, labels and prompts, one part after the other."""
    first, count = parts[0], sum(part.count for part in parts)
    for part in parts:
        ours, theirs = ((each.stored_shape, each.dtype, each.labels is None) for each in (part, first))
        differ = f"{part.path} and {first.path} differ in shape, type or labels"
        refuse((ours != theirs, f"{differ}: they are no parts of one set"))
    chunks = (chunk for part in parts for chunk in part.stored())
    arrays: dict[str, Any] = {"arr_0": ((count, *first.stored_shape), first.dtype, chunks)}
    if first.labels is not None:
        arrays["arr_1"] = ((count,), np.int64, [part.labels for part in parts if part.labels is not None])
    texts = list[str]()
    for part in parts:
        with Npz(part.file) as archive:
            texts += archive.texts(PROMPTS) if PROMPTS in archive else []
    return arrays | ({PROMPTS: np.asarray(texts)} if texts else {})


def _sum_of(parts: Sequence[ArrayImages]) -> dict[str, Any]:
    """Mean and covariance of the features of all images, {} where the parts are no statistics."""
    from ..evaluation.images import read_statistics
    from ..evaluation.references import statistics_arrays

    statistics, records = zip(*map(read_statistics, parts), strict=True)
    if not any(statistics):
        return {}
    first = records[0]
    for part, record in zip(parts, records, strict=True):
        other = not record or record["identity"] != first.get("identity")
        fault = f"{part.path} and {parts[0].path} do not say that they are of one network"
        refuse((other, f"{fault}: make them again"))
    sums = {kind: reduce(add, (part[kind] for part in statistics)) for kind in statistics[0]}
    return statistics_arrays(sums, {**first, "n": sum(record["n"] for record in records)})
