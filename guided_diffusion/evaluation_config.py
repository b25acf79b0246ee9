"""The flags of the commands that evaluate. As in config.py, a field is a flag, and nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .config import PLUGIN_HELP, PRECISIONS, flag, local_flag, path_flag, size_flag

METRIC_NAMES = ("is", "fid", "sfid", "pr", "kid", "dc")


def parse_metrics(text: str) -> str:
    """The same text, if it names metrics.

    :raises ValueError: naming the word that is none.
    """
    for word in text.split(","):
        if word not in METRIC_NAMES:
            raise ValueError(f"{word!r} in {text!r} is no metric: name some of {','.join(METRIC_NAMES)}")
    return text


def parse_counts(text: str) -> str:
    """The same text, if it lists different whole numbers above 0.

    :raises ValueError: if it does not.
    """
    return _listed(text, lambda word: word.isdecimal() and int(word) > 0, "whole numbers above 0, such as 10,25")


def parse_scales(text: str) -> str:
    """The same text, if it lists different numbers.

    :raises ValueError: if it does not.
    """
    return _listed(text, lambda word: re.fullmatch(r"-?\d+(\.\d*)?", word), "numbers, such as 0,1,2.5")


def _listed(text: str, fits: Callable[[str], object], what: str) -> str:
    words = text.split(",")
    if not all(map(fits, words)) or len(set(map(float, words))) < len(words):
        raise ValueError(f"{text!r} is no list of different {what}")
    return text


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """The network whose features are compared."""

    features: str = flag(
        "inception",
        "inception; classifier:PATH, a run of classifier_train; dinov2:FOLDER or clip:FOLDER, a local folder that "
        "transformers reads",
    )
    inception_weights: str = path_flag(
        "file of the Inception network, .pth or .safetensors; '' for $GUIDED_DIFFUSION_INCEPTION, then the cache that "
        "download fills"
    )
    eval_batch_size: int = flag(64, "images per pass of the network", at_least=1)
    eval_precision: str = flag("fp32", "precision of that network", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class TrainEvaluationConfig:
    """Metrics of samples during the training."""

    eval_interval: int = flag(0, "steps between two evaluations of EMA samples; 0: none", at_least=0)
    eval_metrics: str = flag(
        "fid", f"their metrics, separated by commas: {','.join(METRIC_NAMES)}", convert=parse_metrics
    )
    eval_samples: int = flag(1000, "samples of an evaluation, always from the same noise", at_least=10)
    eval_sampler: str = flag("dpm++2m", "their sampler, one of {samplers}")
    eval_steps: int = flag(20, "their steps, on the sampler's own grid", at_least=1)
    eval_reference: str = path_flag(
        "npz, folder or zip of the images that they are compared with, or an npz of statistics; '' for at most 10000 "
        "of those trained on, or as many as there are samples"
    )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The grid: every sampler in every number of steps at every scale."""

    model_path: str = path_flag("the diffusion model: a checkpoint, or the folder of a run (its newest EMA)")
    classifier_path: str = path_flag("the classifier that guides: a checkpoint, or the folder of its run")
    reference: str = path_flag("npz, folder or zip of real images, or an npz of their statistics")
    guidance: str = flag(
        "classifier",
        "what the scales are of: --classifier_scale, or --cfg_scale for cfg",
        choices=("classifier", "cfg"),
    )
    samplers: str = flag("ddim,dpm++2m", "samplers, separated by commas: {samplers}")
    steps: str = flag("25", "numbers of steps, on each sampler's own grid", convert=parse_counts)
    scales: str = flag("0,1,2,4", "scales of guidance", convert=parse_scales)
    metrics: str = flag("fid,pr", f"metrics: {','.join(METRIC_NAMES)}", convert=parse_metrics)
    num_samples: int = flag(1000, "images of each cell of the grid, always from the same noise", at_least=10)
    batch_size: int = flag(16, "images per pass of the diffusion model", at_least=1)
    classes: str = flag("", "labels in turn: 207,360 or names of classes.json; '' draws at random")
    clip_denoised: bool = flag(True, "clip predictions of x_0 to [-1, 1]")
    guidance_interval: str = flag("", "LOW,HIGH: guide only at these timesteps of 0 .. T; '' throughout")
    distances: str = flag(
        "float16",
        "type of the distances of precision and recall: the published numbers' is float16",
        choices=("float16", "float32"),
    )


@dataclass(frozen=True, kw_only=True)
class PlaceConfig:
    """Where it happens."""

    log_dir: str = local_flag("folder to keep log.txt in, with all that is said; '' keeps none")
    device: str = flag("", "cpu, cuda, cuda:1, mps; '' takes a GPU where there is one")
    dist_timeout: float = flag(10.0, "minutes that ranks wait for each other before the job ends", at_least=0.01)
    plugin: str = flag("", PLUGIN_HELP)


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """What is compared, and what is told of it."""

    reference: str = path_flag("npz, folder or zip of real images, or an npz of their statistics", positional=True)
    samples: str = path_flag("npz, folder or zip of samples, or the folder of a run", positional=True)
    metrics: str = flag(
        "is,fid,sfid,pr", f"metrics, separated by commas: {','.join(METRIC_NAMES)}", convert=parse_metrics
    )
    json: str = local_flag("file to write the results to, as JSON")
    distances: str = flag(
        "float16",
        "type of the distances of precision and recall: the published numbers' is float16",
        choices=("float16", "float32"),
    )
    image_size: int | str = flag(
        "", "crop and scale the images of folders and zips to 64, or HEIGHTxWIDTH, as in training", convert=size_flag
    )
    cache: bool = flag(True, "keep features by the content of what they are of, and take those that are kept")
    seed: int = flag(0, "seed of the subsets that KID is the mean of", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The images of a reference, and where it goes."""

    data_dir: str = path_flag("folder or zip of images, or an npz of them", positional=True)
    out: str = local_flag("npz to write", positional=True)
    image_size: int | str = flag(
        64, "crop and scale the images to 64, or HEIGHTxWIDTH, as in training", convert=size_flag
    )
    num_samples: int = flag(10000, "images to keep for precision and recall, evenly over the data; 0: all", at_least=0)
    statistics: bool = flag(True, "mean and covariance of the features of all images; False: images alone")


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What to fetch."""

    name: str = flag(
        "",
        "what to fetch: inception, the weights of the network of FID",
        positional=True,
    )
    out: str = local_flag("file or folder to write to; '' for $GUIDED_DIFFUSION_CACHE, else ~/.cache/guided-diffusion")
