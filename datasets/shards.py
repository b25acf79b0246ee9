"""Any images that training reads to tars of some 256 MB, as WebDataset has them: NAME.jpg, NAME.cls, NAME.txt.

NAME.cls is the id of the class, and NAME.txt the captions, a line each. Beside a tar lies its index, so that training
need not read through it; classes.json names the classes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace

from conversion.command import converter
from conversion.config import ShardsConfig
from conversion.folder import class_folders, folder_source, listing_of
from conversion.images import Source
from guided_diffusion.data.captions import read_captions
from guided_diffusion.data.labels import Labels, read_labels
from guided_diffusion.data.sources import ImageSource
from guided_diffusion.runtime.errors import UserError


def read(config: ShardsConfig) -> Source:
    """All images, with the labels and captions that there are."""
    listing = listing_of(config.source)
    if not config.out.lower().rstrip("/").endswith(".tars"):
        raise UserError(f"OUT {config.out!r} is no folder of tars: give a name that ends in .tars")
    labels, captions = _labels(listing, config), _captions(listing, config.caption_column)
    names = [labels.classes[number] for number in labels.ids] if labels else class_folders(listing)
    texts = [[(".cls", str(number).encode())] for number in labels.ids] if labels else [[] for _ in names]
    for beside, lines in zip(texts, captions, strict=True):
        beside += [(".txt", "\n".join(lines).encode())] * bool(lines)
    source = folder_source(listing, [config.prefix] * len(names) if config.prefix else names, beside=texts)

    def extras(_: Collection[str]) -> list[tuple[str, bytes]]:
        table = {"classes": labels.classes, "class_from": "cls"} if labels else {}
        return [("classes.json", json.dumps(table).encode())] * bool(labels)

    return replace(source, extras=extras)


def _labels(listing: ImageSource, config: ShardsConfig) -> Labels | None:
    try:
        labels = read_labels(listing, config.class_from, label_column=config.label_column)
    except ValueError as error:
        if config.class_from != "auto" or config.label_column:
            raise
        print(f"no labels: {error}")
        return None
    print(*labels.notes, sep="\n")
    return labels


def _captions(listing: ImageSource, column: str) -> list[list[str]]:
    try:
        return read_captions(listing, column).texts
    except ValueError:
        if column:
            raise
        return [[] for _ in listing.images]


main = converter("shards", read)

if __name__ == "__main__":
    main()
