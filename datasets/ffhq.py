"""FFHQ: a folder of images, in folders of a thousand or not, of one class."""

from __future__ import annotations

from guided_diffusion.commands._dataset import converter
from guided_diffusion.dataset_config import OneClassConfig
from guided_diffusion.dataset_folder import folder_source, listing_of
from guided_diffusion.dataset_images import Source


def read(config: OneClassConfig) -> Source:
    """All faces."""
    listing = listing_of(config.source)
    return folder_source(listing, [config.prefix or "ffhq"] * len(listing.images))


main = converter("ffhq", read)

if __name__ == "__main__":
    main()
