"""AFHQ: folders cat, dog and wild, which are the classes."""

from __future__ import annotations

from conversion.command import converter
from conversion.config import ConversionConfig
from conversion.folder import class_folders, folder_source, listing_of
from conversion.images import Source


def read(config: ConversionConfig) -> Source:
    """The faces of one split."""
    listing = listing_of(config.source)
    return folder_source(listing, class_folders(listing), folders_are_classes=True)


main = converter("afhq", read)

if __name__ == "__main__":
    main()
