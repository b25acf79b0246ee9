"""FFHQ: a folder of images, in folders of a thousand or not, of one class."""

from __future__ import annotations

from conversion.command import converter
from conversion.config import OneClassConfig
from conversion.folder import folder_source, listing_of
from conversion.images import Source


def read(config: OneClassConfig) -> Source:
    """All faces."""
    listing = listing_of(config.source)
    return folder_source(listing, [config.prefix or "ffhq"] * len(listing.images))


main = converter("ffhq", read)

if __name__ == "__main__":
    main()
