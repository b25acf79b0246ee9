"""Any folder or zip of images; classes as in training, or one for all."""

from __future__ import annotations

from conversion.command import converter
from conversion.config import FolderConfig
from conversion.folder import folder_source, listing_of, numbered
from conversion.images import Source
from guided_diffusion.runtime.errors import UserError


def read(config: FolderConfig) -> Source:
    """All images."""
    from guided_diffusion.data.labels import read_labels

    listing = listing_of(config.source)
    if config.prefix:
        return folder_source(listing, [config.prefix] * len(listing.images))
    try:
        labels = read_labels(listing, config.class_from, label_column=config.label_column)
    except ValueError as error:
        raise UserError(f"{error}; or give all images one class: --prefix NAME") from error
    print(*labels.notes, sep="\n")
    classes = numbered(labels.classes)
    names = [classes[number] for number in labels.ids]
    return folder_source(listing, names, folders_are_classes=labels.class_from == "folder")


main = converter("folder", read)

if __name__ == "__main__":
    main()
