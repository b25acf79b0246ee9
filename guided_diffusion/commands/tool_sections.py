"""The flags of evaluation and of the tools: evaluator, sweep, convert, models, npz_tool, page and others.

As in sections.py, a field is a flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config import (
    CLASS_RULES,
    LABEL_COLUMN,
    METRIC_LIST,
    METRICS,
    PRECISIONS,
    ProcessConfig,
    RangeConfig,
    local_flag,
    path_flag,
)
from ..runtime.options import flag, interval_flag, list_of, size_flag
from .sections import CLASSES, INTERVAL, ModelConfig

ACTIONS = ("list", "show", "download", "verify")
TOOLS = ("to-png", "from-images", "merge")
OUT = "file or folder to write to; '' for $GUIDED_DIFFUSION_CACHE or ~/.cache/guided-diffusion"
MIRROR = "address of a folder with the files by their names, in place of the published one"
DISTANCES = "type of the distances of precision and recall: the published numbers' is float16"
DISTANCE_TYPES = ("float16", "float32")
COUNTS = list_of(r"\d*[1-9]\d*", "whole numbers above 0, such as 10,25")
SCALES = list_of(r"-?\d+(\.\d*)?", "numbers, such as 0,1,2.5")


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """What is compared, and what is told of it."""

    reference: str = path_flag("npz, folder or zip of real images, or an npz of their statistics", positional=True)
    samples: str = path_flag("npz, folder or zip of samples, or the folder of a run", positional=True)
    metrics: str = flag("is,fid,sfid,pr", METRICS, convert=METRIC_LIST)
    json: str = local_flag("file to write the results to, as JSON")
    neighbours: str = local_flag("png file of the samples nearest to the reference, each beside its nearest images")
    distances: str = flag("float16", DISTANCES, choices=DISTANCE_TYPES)
    image_size: int | str = flag("", "scale and crop folders and zips to 64, or HEIGHTxWIDTH", convert=size_flag)
    cache: bool = flag(True, "keep features by the content of what they are of, and take those that are kept")
    seed: int = flag(0, "seed of the subsets that KID is the mean of", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The images of a reference, and where it goes."""

    data_dir: str = path_flag("folder or zip of images, or an npz of them", positional=True)
    out: str = local_flag("npz to write", positional=True)
    image_size: int | str = flag(64, "scale and crop to 64, or HEIGHTxWIDTH, as in training", convert=size_flag)
    num_samples: int = flag(10000, "images to keep for precision and recall, evenly over the data; 0: all", at_least=0)
    statistics: bool = flag(True, "mean and covariance of the features of all images; False: images alone")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(ModelConfig):
    """The grid: every sampler in every number of steps at every scale."""

    classifier_path: str = path_flag("the classifier's checkpoint, or its run's folder", needs="guidance=classifier")
    reference: str = path_flag("npz, folder or zip of real images, or an npz of their statistics")
    guidance: str = flag("classifier", "the guidance whose scales these are", choices=("classifier", "cfg"))
    samplers: str = flag("ddim,dpm++2m", "samplers, separated by commas: {samplers}")
    steps: str = flag("25", "numbers of steps, on each sampler's own grid", convert=COUNTS)
    scales: str = flag("0,1,2,4", "scales of guidance", convert=SCALES)
    metrics: str = flag("fid,pr", METRICS, convert=METRIC_LIST)
    num_samples: int = flag(1000, "images of each cell of the grid, always from the same noise", at_least=10)
    batch_size: int = flag(16, "images per pass of the diffusion model", at_least=1)
    classes: str = flag("", CLASSES)
    guidance_interval: str = flag("", INTERVAL, convert=interval_flag)
    distances: str = flag("float16", DISTANCES, choices=DISTANCE_TYPES)


@dataclass(frozen=True, kw_only=True)
class PlaceConfig(ProcessConfig):
    """Where it happens."""

    log_dir: str = local_flag("folder to keep log.txt in, with all that is said; '' keeps none")


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What to fetch."""

    name: str = flag("", "what to fetch: inception, the weights of the network of FID, or a model", positional=True)
    out: str = local_flag(OUT)
    mirror: str = flag("", MIRROR)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """What to do with which model."""

    action: str = flag("", f"one of {', '.join(ACTIONS)}", choices=ACTIONS, positional=True)
    name: str = flag("", "of the model", positional="?")
    out: str = local_flag(OUT, needs="action=download")
    mirror: str = flag("", MIRROR, needs="action=download")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to write."""

    source: str = path_flag("a checkpoint, a run's folder, or one of diffusers", positional=True)
    out: str = local_flag(
        "file to write, .safetensors or .pt; or a folder, for diffusers' UNet2DModel or AutoencoderKL", positional=True
    )
    ema_rate: str = flag("", "of a run: the rate of the moving average to take; 0: none; '' for the slowest")
    precision: str = flag("fp32", "type of the numbers in it: fp32, fp16 or bf16", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Which average to make."""

    source: str = path_flag("the folder of a run that was trained with --ema_profiles", positional=True)
    profile: float = flag(
        0.05, "width of the average: the deviation of the updates in it, as a share of all", at_least=1e-3
    )
    step: int = flag(0, "updates after which it ends, those of a checkpoint; 0: the last one's", at_least=0)
    out: str = local_flag("file to write, .safetensors or .pt; '': SOURCE/profile_PROFILE_STEP.safetensors")


@dataclass(frozen=True, kw_only=True)
class NpzToolConfig:
    """What to do."""

    tool: str = flag("", f"one of {', '.join(TOOLS)}", choices=TOOLS, positional=True)
    source: str = path_flag(
        "of to-png: npz of images (arr_0) and, if any, labels; of merge: runs or npz files that are parts of one job, "
        "with commas between, or run{1..8}; else folder or zip",
        positional=True,
    )
    out: str = local_flag("folder of PNG files or npz that is made", positional=True)
    classes: str = path_flag("classes.json; '': that in SOURCE, else their names in order, of to-png their numbers")


@dataclass(frozen=True, kw_only=True)
class FromImagesConfig(RangeConfig):
    """From images to an npz."""

    NEEDS: ClassVar[str] = "tool=from-images"
    image_size: int | str = flag("", "scale and crop to 64, or HEIGHTxWIDTH; '': as they are", convert=size_flag)
    image_channels: int = flag(0, "channels: 1, 3 or 4; 0: what to-png wrote down, else 3", at_least=0, at_most=4)
    class_from: str = flag("", "where labels come from; '' is auto where that finds any", choices=("", *CLASS_RULES))
    label_column: str = flag("", LABEL_COLUMN)


@dataclass(frozen=True, kw_only=True)
class PageConfig(ProcessConfig):
    """The page, and the models that it offers beside those that have a name and are here."""

    port: int = flag(0, "of 127.0.0.1; 0: the first free one from 7860 on", at_least=1, at_most=65535)
    preset: str = flag("", "the model by name to start with: those that 'guided-diffusion models list' names")
    model_path: str = path_flag("a checkpoint, or the folder of a run (its newest EMA)", excludes="preset")
    classifier_path: str = path_flag("its classifier's checkpoint, or the folder of its run", needs="model_path")
    upsampler_path: str = path_flag("its upsampler's checkpoint, or the folder of its run", needs="model_path")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demonstration."""

    log_dir: str = local_flag("folder of the pictures, the numbers and the page", "demo-output")
    seed: int = flag(0, "seed of all randomness", at_least=0)
    train: bool = flag(False, "train small networks first, for some minutes, and sample from these")
