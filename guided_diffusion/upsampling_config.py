"""The flags of enlarging images. As in config.py, a field is a flag, and nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import CLASS_RULES, LABEL_COLUMN, RunConfig, flag, local_flag, path_flag


@dataclass(frozen=True, kw_only=True)
class UpsampleConfig:
    """The small images to enlarge."""

    base_samples: str = path_flag(
        "npz of small images (arr_0, labels in arr_1), the folder of a sampling run, or images: a folder, zip or file"
    )
    class_from: str = flag("auto", "where labels of a folder or zip come from", choices=CLASS_RULES)
    label_column: str = flag("", LABEL_COLUMN)
    cond_aug_level: float = flag(
        0.0, "noise to put on the small images, for upsamplers trained with --cond_aug; 0: none", at_least=0, at_most=1
    )


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(RunConfig):
    """What all stages share; every other flag belongs to a stage: --base.model_path, --up1.model_path, --up1.steps."""

    seed: int = flag(0, "seed of the base; up1 takes 1000000 more, up2 2000000 more", at_least=0)
    num_samples: int = flag(10000, "images to make", at_least=1)
    batch_size: int = flag(16, "images per pass of a network; --up1.batch_size is that of a stage", at_least=1)
    classes: str = flag("", "labels in turn, of all stages: 207,360 or names of classes.json; '' draws at random")
    save_images: bool = flag(False, "write one PNG per image of the last stage as well")
    stages: str = local_flag("JSON or TOML file of the stages' flags, by stage; the command line has the last word")
