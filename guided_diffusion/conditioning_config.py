"""The flags of conditioning images. As in config.py, a field is a flag, and nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import CLASS_RULES, LABEL_COLUMN, flag, path_flag


@dataclass(frozen=True, kw_only=True)
class CondDataConfig:
    """Conditioning images beside the images of --data_dir, of the kind that --cond_type says."""

    cond_dir: str = path_flag(
        "folder or zip of a conditioning image for each image, of the same name but for the extension"
    )
    skip_unpaired: bool = flag(
        False, "leave out images without a conditioning image, and the other way round; False: that is an error"
    )


@dataclass(frozen=True, kw_only=True)
class CondTrainConfig(CondDataConfig):
    """Conditioning images to train with, of the kind that --cond_type says."""

    val_cond_dir: str = path_flag("as --cond_dir, for --val_data_dir")
    cond_dropout: float = flag(
        0.0,
        "probability that a conditioning image becomes zeros in training, for classifier-free guidance",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class CondSampleConfig:
    """Conditioning images to sample for: a sample for each."""

    cond_images: str = path_flag("folder or zip of conditioning images, a single one, or an npz of them (arr_0)")
    cond_class_from: str = flag(
        "", "where labels of a folder or zip come from; '' leaves that to --classes", choices=("", *CLASS_RULES)
    )
    label_column: str = flag("", LABEL_COLUMN)
