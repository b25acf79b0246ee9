"""Train an autoencoder of images."""

from __future__ import annotations

from .entry import entry
from .flags import Flags


def train(flags: Flags) -> None:
    """Train as the flags say."""
    from .. import dist_util
    from ..config import AutoencoderConfig, AutoencoderTrainConfig
    from ..evaluation.features import frechet
    from ..runtime.errors import refuse
    from ..script_util import build_autoencoder
    from . import training
    from .autoencoder_loop import AutoencoderLoop, Untimed
    from .evaluation import extractor_of

    flags = training.start(flags)
    config, losses = flags.part(AutoencoderConfig), flags.part(AutoencoderTrainConfig)
    network = build_autoencoder(config).to(dist_util.dev())
    stream, validation = training.open_streams(flags, image_size=config.image_size, class_cond=False)
    options = {}
    if losses.feature_weight or losses.val_distance:
        extractor = extractor_of(flags)
        options["distance"] = frechet(extractor) if losses.val_distance else None
        options["features"] = getattr(extractor, "differentiable", None) if losses.feature_weight else None
        lacking = losses.feature_weight and options["features"] is None
        refuse((lacking, f"--feature_weight needs --features inception or classifier:PATH, not {extractor.name}"))
    run = training.Training(flags, network, Untimed(), stream, validation)
    run.run(AutoencoderLoop, losses=losses, **options)


main = entry("autoencoder_train", train)
