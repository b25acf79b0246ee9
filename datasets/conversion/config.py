"""The flags of the scripts in datasets/. As in config.py, a field is a flag, and nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from guided_diffusion.commands.flags import Command
from guided_diffusion.config import CLASS_RULES, LABEL_COLUMN, local_flag, path_flag
from guided_diffusion.runtime.options import flag, size_flag

FORMATS = ("", "png", "jpeg")
CROPS = ("center", "box")


def optional_size(text: str) -> int | str:
    """A size, or 0 for none.

    :raises ValueError: if it is neither.
    """
    return 0 if text == "0" else size_flag(text)


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """The source and the output."""

    source: str = local_flag("the data set as it was fetched: file or folder", positional=True)
    out: str = local_flag("folder to make; or a zip, or a folder of tars, if it ends in .zip or .tars", positional=True)
    size: int | str = flag(
        0, "pixels: 64, or HEIGHTxWIDTH; 0 leaves images as they are", convert=optional_size, alias="image-size"
    )
    crop: str = flag(
        "center",
        "how --size is reached: center, as in training; box, as openai/guided-diffusion prepared LSUN",
        choices=CROPS,
    )
    format: str = flag("", "png or jpeg; '' keeps what is PNG or JPEG and makes PNG of the rest", choices=FORMATS)
    quality: int = flag(95, "quality of JPEG files that are made", at_least=1, at_most=100)
    workers: int = flag(2, "processes that decode and encode; 0: the main process does", at_least=0)
    skip_bad: bool = flag(False, "leave out what cannot be used, and report it; else it ends the run")


@dataclass(frozen=True, kw_only=True)
class OneClassConfig(ConversionConfig):
    """The source and the output."""

    prefix: str = flag("", "the class of all images; '' takes it from the source")


@dataclass(frozen=True, kw_only=True)
class LsunConfig(OneClassConfig):
    """The source and the output."""

    size: int | str = flag(
        256, "pixels: 256, or HEIGHTxWIDTH; 0 leaves images as they are", convert=optional_size, alias="image-size"
    )
    crop: str = flag(
        "box",
        "how --size is reached: center, as in training; box, as openai/guided-diffusion prepared LSUN",
        choices=CROPS,
    )


@dataclass(frozen=True, kw_only=True)
class ImagenetConfig(ConversionConfig):
    """The source and the output."""

    ground_truth: str = local_flag(
        "for the validation tar: a class per line in the order of the files, or LOC_val_solution.csv"
    )
    synsets: str = local_flag("where classes are numbers: a file whose line N starts with the name of class N")


@dataclass(frozen=True, kw_only=True)
class Imagenet64Config(ConversionConfig):
    """The source and the output."""

    synsets: str = local_flag("map_clsloc.txt, for names in place of numbers: its line N starts with that of class N")


@dataclass(frozen=True, kw_only=True)
class CifarConfig(ConversionConfig):
    """The source and the output."""

    split: str = flag("train", "which images", choices=("train", "test"))
    coarse: bool = flag(False, "the 20 coarse classes of CIFAR-100 in place of its 100")


@dataclass(frozen=True, kw_only=True)
class MnistConfig(ConversionConfig):
    """The source and the output."""

    split: str = flag("train", "which images", choices=("train", "test"))
    fashion: bool = flag(False, "they are clothes: put Fashion-MNIST's words behind the digits")


@dataclass(frozen=True, kw_only=True)
class CelebaConfig(OneClassConfig):
    """The source and the output."""

    attribute: str = flag("", "one of list_attr_celeba.txt, e.g. Smiling, for the two classes with and without it")
    attribute_file: str = local_flag("that file; '' looks for it beside the images and one folder up")


@dataclass(frozen=True, kw_only=True)
class ParquetConfig(OneClassConfig):
    """The source and the output."""

    image_column: str = flag("", "column of the images; '' takes the only one that holds any")
    label_column: str = flag("", "column of the classes; '' takes 'label' or the like, or --prefix where there is none")


@dataclass(frozen=True, kw_only=True)
class FolderConfig(OneClassConfig):
    """The source and the output."""

    class_from: str = flag("auto", "where classes come from", choices=CLASS_RULES)
    label_column: str = flag("", LABEL_COLUMN)


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(FolderConfig):
    """The source and the output."""

    source: str = path_flag("folder, zip, array or tars of images", positional=True)
    out: str = local_flag("folder of tars to make, whose name ends in .tars", positional=True)
    caption_column: str = flag("", "column, or key in captions.json, with the captions; several with commas between")


@dataclass(frozen=True, kw_only=True)
class EmojiConfig(ConversionConfig):
    """The source and the output."""

    size: int | str = flag(0, "pixels; 0: 64", convert=optional_size, alias="image-size")
    styles: str = flag(
        "google,twitter",
        "drawings to take: google, twitter (64 pixels as npm has them), noto, twemoji, fluent",
    )
    split: str = flag(
        "all",
        "which emoji: train, test (a tenth, by the code points, so in all styles the same) or all",
        choices=("all", "train", "test"),
    )
    google: str = local_flag("Noto Emoji: a checkout, or emoji-datasource-google unpacked; '' is SOURCE")
    twitter: str = local_flag("Twemoji: a checkout, or emoji-datasource-twitter unpacked; '' is SOURCE")


DATASETS = {
    "imagenet": Command("ImageNet (ILSVRC 2012) from its tars.", (ImagenetConfig,)),
    "imagenet64": Command("Downsampled ImageNet from its batches.", (Imagenet64Config,)),
    "lsun": Command("LSUN from an LMDB per class.", (LsunConfig,)),
    "cifar": Command("CIFAR-10 and CIFAR-100 from their Python batches.", (CifarConfig,)),
    "mnist": Command("MNIST and Fashion-MNIST from their idx files.", (MnistConfig,)),
    "ffhq": Command("FFHQ from its folders.", (OneClassConfig,)),
    "afhq": Command("AFHQ from its folders.", (ConversionConfig,)),
    "celeba": Command("CelebA from its folder of aligned faces.", (CelebaConfig,)),
    "parquet": Command("A data set of the Hugging Face Hub from its parquet files.", (ParquetConfig,)),
    "folder": Command("Any folder or zip of images.", (FolderConfig,)),
    "shards": Command("Any images that training reads to tars, with labels and captions.", (ShardsConfig,)),
    "emoji": Command("Emoji from the drawings of Noto Emoji, Twemoji and Fluent Emoji.", (EmojiConfig,)),
}
