"""Every flag once: the config dataclasses and their help texts.

A field is a flag: its name, default and help text stand here and nowhere else. The `*_defaults()` dictionaries, the
command lines, the keyword sets of the factory and the config.json beside a checkpoint are all read off these classes.
Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from . import paths

T = TypeVar("T")
Size = int | str | Sequence[int]  # 64, "64", "64x128", (64, 128): height before width

PRECISIONS = ("fp32", "fp16", "bf16")
PRECISION_CHOICES = ("", *PRECISIONS, "auto")
SCHEDULE_NAMES = ("linear", "cosine", "sigmoid", "scaled_linear")
LOSS_WEIGHTS = ("", "min_snr")
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
CLASS_RULES = ("auto", "filename", "folder", "csv", "json")
LABEL_COLUMN = "column of the labels in a table that has several; '' where it is clear"  # a flag beside each class_from
BAD_IMAGE_RULES = ("error", "skip")
PLUGIN_HELP = "Python files that run first and may add samplers, grids and the like, separated by commas or by flags"
COND_TYPES = ("image", "mask", "classes")


def flag(
    default: T,
    help: str,
    *,
    choices: Iterable[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    runtime: bool = False,
    alias: str = "",
    convert: Callable[[str], Any] | None = None,
    positional: bool = False,
) -> T:
    """A dataclass field that is also a flag.

    :param runtime: True for what may change between training and sampling (precision, memory): never taken from a
        checkpoint's config.
    :param convert: text -> value where the type of the default does not say it.
    :param positional: True for a word that a command always needs, written without a name, in the order of the fields;
        one with a tuple as its default takes several.
    """
    extra = {
        "help": help,
        "choices": tuple(choices),
        "at_least": at_least,
        "at_most": at_most,
        "runtime": runtime,
        "alias": alias,
        "convert": convert,
        "positional": positional,
    }
    return field(default=default, metadata=extra)


def path_flag(help: str, default: str = "", *, positional: bool = False) -> str:
    """The flag of a path to read from."""
    return flag(default, help, positional=positional, convert=paths.resolve)


def local_flag(help: str, default: str = "", *, positional: bool = False) -> str:
    """The flag of a path on this machine, such as all that is written to."""
    return flag(default, help, positional=positional, convert=paths.local)


def nearest(word: str, words: Iterable[str]) -> str:
    """``; did you mean X?`` for the word most like `word`, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def str2bool(v: str | bool) -> bool:
    """The boolean that a word on the command line stands for."""
    if isinstance(v, bool):
        return v
    known = dict.fromkeys(("yes", "true", "t", "y", "1", "on"), True)
    known |= dict.fromkeys(("no", "false", "f", "n", "0", "off"), False)
    if v.lower() not in known:
        raise argparse.ArgumentTypeError(f"boolean value expected: {v!r} is neither True nor False")
    return known[v.lower()]


def parse_size(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as 64, "64", "64x128" or a pair.

    :raises ValueError: if it is none of these, or not positive.
    """
    try:
        sides = size.lower().split("x") if isinstance(size, str) else [size] if isinstance(size, int) else list(size)
        numbers = [int(side) for side in sides]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers, default=0) < 1:
        raise ValueError(f"image size {size!r} is not a size: write 64, or HEIGHTxWIDTH such as 64x128")
    return numbers[0], numbers[-1]


def parse_rates(text: str | float) -> list[float]:
    """The rates of moving averages in "0.999,0.9999"; [] of ''.

    :raises ValueError: if one is not a number from 0 to 1.
    """
    try:
        rates = [float(word) for word in str(text).split(",") if word.strip()]
    except ValueError:
        rates = [math.nan]
    if not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"ema_rate {text!r} is not a list of rates from 0 to 1: write 0.9999 or 0.999,0.9999")
    return rates


def parse_microbatch(text: str) -> int | str:
    """A number of images, or "auto".

    :raises ValueError: if it is neither.
    """
    if text == "auto":
        return text
    if not text.removeprefix("-").isdecimal() or int(text) < -1:
        raise ValueError(f"{text!r} is no number of images: write a number, -1 for the whole batch, or auto")
    return int(text)


def size_flag(text: Size) -> int | str:
    """The plain JSON form of a size: an int for squares, else the text HxW."""
    height, width = parse_size(text)
    return height if height == width else f"{height}x{width}"


# ---- the networks and the process: saved with a checkpoint


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The Gaussian diffusion process."""

    learn_sigma: bool = flag(False, "the network predicts the variance too (twice the output channels)")
    diffusion_steps: int = flag(1000, "T, the number of noise levels in training", at_least=1, at_most=10**6)
    noise_schedule: str = flag("linear", "betas over t: " + ", ".join(SCHEDULE_NAMES), choices=SCHEDULE_NAMES)
    timestep_respacing: str = flag(
        "",
        "steps used in sampling: '' all, '250', '10,15,20' per section, 'ddim25' for an even stride; 'trailing25', "
        "'linspace25', 'quad25', 'logsnr25' or 'karras25' at real timesteps, or these themselves: 'list:0,10.5,999'",
        runtime=True,
    )
    use_kl: bool = flag(False, "train on the variational bound instead of the mean squared error")
    predict_xstart: bool = flag(False, "the network predicts x_0 instead of the noise eps")
    rescale_timesteps: bool = flag(False, "feed t * 1000 / T to the network, so that t means the same for every T")
    rescale_learned_sigmas: bool = flag(False, "with --learn_sigma: scale the variational term by T / 1000")
    predict_v: bool = flag(False, "the network predicts v = alpha eps - sigma x_0 instead of the noise eps")
    zero_terminal_snr: bool = flag(
        False, "rescale the schedule so that nothing of the image is left at T-1; with --predict_v or --predict_xstart"
    )
    loss_weight: str = flag("", "weight of the squared error over t: '' none, or min_snr", choices=LOSS_WEIGHTS)
    min_snr_gamma: float = flag(5.0, "the signal-to-noise ratio above which --loss_weight min_snr falls")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What the images are, for every network."""

    num_classes: int = flag(1000, "number of classes K; labels are 0 .. K-1", at_least=1, at_most=10**8)
    image_channels: int = flag(3, "channels of the images: 1, 3, 4 or any N", at_least=1, at_most=2**20)
    dims: int = flag(2, "dimensions of the data: 1, 2 or 3", choices=("1", "2", "3"))


@dataclass(frozen=True, kw_only=True)
class SizedConfig(ImageConfig):
    """Images of one size."""

    image_size: int | str = flag(64, "pixels: 64, or HEIGHTxWIDTH", convert=size_flag)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ImageConfig):
    """What a diffusion U-Net and an upsampler have in common."""

    num_channels: int = flag(128, "channels of the first level", at_least=1, at_most=2**20)
    num_res_blocks: int = flag(2, "residual blocks per level", at_least=1, at_most=100)
    num_heads: int = flag(4, "attention heads, where --num_head_channels is -1", at_least=1, at_most=2**20)
    num_heads_upsample: int = flag(-1, "attention heads of the decoder; -1: as in the encoder")
    num_head_channels: int = flag(-1, "channels per attention head; -1: use --num_heads")
    attention_resolutions: str = flag("16,8", "resolutions (pixels of the longer side) with attention; '' for none")
    channel_mult: str = flag("", "channels of each level over --num_channels, e.g. 1,2,3,4; '' chooses by size")
    dropout: float = flag(0.0, "dropout probability in the residual blocks", at_least=0)
    class_cond: bool = flag(False, "condition the network on class labels")
    null_class: bool = flag(False, "there is an embedding for 'no class', label num_classes; --class_dropout sets it")
    use_checkpoint: bool = flag(False, "recompute activations in the backward pass to save memory", runtime=True)
    use_scale_shift_norm: bool = flag(True, "the embedding scales and shifts the normalised activations (FiLM)")
    resblock_updown: bool = flag(False, "residual blocks, not plain convolutions, change the resolution")
    use_fp16: bool = flag(False, "alias of --precision fp16", runtime=True)
    use_new_attention_order: bool = flag(False, "channels of qkv: q, k, v first, then heads")
    use_neighborhood_attention: bool = flag(False, "attend to a window of the training size in larger images")
    precision: str = flag(
        "",
        "fp32, fp16 or bf16; auto: what this hardware is fastest in; '' is what --use_fp16 says",
        choices=PRECISION_CHOICES,
        runtime=True,
    )


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig, SizedConfig):
    """A diffusion U-Net."""

    cond_type: str = flag(
        "",
        "what the network also sees of each image: another image, a mask, or a map of classes",
        choices=("", *COND_TYPES),
    )
    cond_channels: int = flag(
        0, "its channels, of a map its classes; 0: as --image_channels, 1 of a mask", at_least=1, at_most=2**16
    )
    null_cond: bool = flag(False, "it was also trained without, on zeros in its place; --cond_dropout sets this")


@dataclass(frozen=True, kw_only=True)
class SuperResConfig(NetworkConfig):
    """An upsampler: a U-Net that also sees the small image."""

    large_size: int | str = flag(256, "pixels of the output: 256, or HEIGHTxWIDTH", convert=size_flag)
    small_size: int | str = flag(64, "pixels of the input: 64, or HEIGHTxWIDTH", convert=size_flag)
    cond_aug: float = flag(
        0.0,
        "in training, noise on the input up to this level, which the network is told, 0 to 1; 0: none",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(SizedConfig):
    """A classifier of noisy images."""

    classifier_use_fp16: bool = flag(False, "alias of --classifier_precision fp16", runtime=True)
    classifier_width: int = flag(128, "channels of the classifier's first level", at_least=1, at_most=2**20)
    classifier_depth: int = flag(2, "residual blocks per level of the classifier", at_least=1, at_most=100)
    classifier_attention_resolutions: str = flag("32,16,8", "resolutions with attention in the classifier")
    classifier_use_scale_shift_norm: bool = flag(True, "as --use_scale_shift_norm, for the classifier")
    classifier_resblock_updown: bool = flag(True, "as --resblock_updown, for the classifier")
    classifier_pool: str = flag("attention", "the classifier's head", choices=POOLS)
    classifier_channel_mult: str = flag("", "as --channel_mult, for the classifier")
    classifier_precision: str = flag(
        "",
        "fp32, fp16, bf16 or auto for the classifier; '' is what --classifier_use_fp16 says",
        choices=PRECISION_CHOICES,
        runtime=True,
    )


# ---- what a command does with them


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run happens and where its files go."""

    log_dir: str = local_flag("folder of everything the run writes; '' is $OPENAI_LOGDIR, else a new temporary folder")
    seed: int = flag(0, "seed of all randomness", at_least=0)
    device: str = flag("", "cpu, cuda, cuda:1, mps; '' takes a GPU where there is one")
    dist_timeout: float = flag(10.0, "minutes that ranks wait for each other before the job ends", at_least=0.01)
    plugin: str = flag("", PLUGIN_HELP)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    batch_size: int = flag(1, "images per step and rank", at_least=1)
    microbatch: int | str = flag(
        -1,
        "images per forward pass; -1: the whole batch; auto: as many of it as the memory holds",
        convert=parse_microbatch,
    )
    lr: float = flag(1e-4, "learning rate of AdamW", at_least=0)
    weight_decay: float = flag(0.0, "weight decay of AdamW", at_least=0)
    warmup_steps: int = flag(0, "steps over which the learning rate rises from 0", at_least=0)
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0: no clipping", at_least=0)
    schedule_sampler: str = flag("uniform", "how timesteps are drawn", choices=("uniform", "loss-second-moment"))
    ema_rate: str = flag("0.9999", "rates of the moving averages of the weights, separated by commas; '' for none")
    ema_warmup: bool = flag(False, "after n steps let the averages have a rate of (1 + n) / (10 + n), or less")
    fp16_scale_growth: float = flag(1e-3, "growth of the logarithmic loss scale per step, with fp16", at_least=0)
    resume_checkpoint: str = path_flag(
        "any file of a checkpoint, or a run's folder, to go on from; auto: the newest in --log_dir, if there is one"
    )
    val_data_dir: str = path_flag("folder or zip of validation images")
    max_bad_steps: int = flag(
        50, "skipped steps in a row (loss or gradient not finite) that end the training; 0: none do", at_least=0
    )
    log_interval: int = flag(10, "steps between two lines of the log", at_least=1)
    save_interval: int = flag(10000, "steps between two checkpoints", at_least=1)
    keep_last: int = flag(0, "how many checkpoints to keep; 0: all", at_least=0)
    async_save: bool = flag(True, "write checkpoints while training goes on, from a copy in the memory of the CPU")


@dataclass(frozen=True, kw_only=True)
class ImageTrainConfig(TrainConfig):
    """The training loop of a diffusion model."""

    class_dropout: float = flag(
        0.0, "probability that a label becomes 'no class' in training, for classifier-free guidance", at_least=0
    )
    max_steps: int = flag(0, "updates of the whole run, resumed parts included; 0: without end", at_least=0)
    lr_anneal_steps: int = flag(0, "steps over which the learning rate falls to 0, then stop; 0: constant", at_least=0)
    val_interval: int = flag(1000, "steps between two validation losses", at_least=1)
    sample_interval: int = flag(0, "steps between two preview grids of EMA samples; 0: none", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainConfig(TrainConfig):
    """The training loop of a classifier."""

    batch_size: int = flag(4, "images per step and rank", at_least=1)
    lr: float = flag(3e-4, "learning rate of AdamW", at_least=0)
    ema_rate: str = flag("", "rates of the moving averages of the weights, separated by commas; '' for none")
    noised: bool = flag(True, "train on noisy images; False: on clean ones, at t = 0")
    iterations: int = flag(150000, "steps of the whole run, resumed parts included", at_least=1, alias="max_steps")
    anneal_lr: bool = flag(False, "let the learning rate fall to 0 over the run")
    eval_interval: int = flag(5, "steps between two evaluations on the validation images", at_least=1)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sampling."""

    model_path: str = path_flag("a checkpoint, or the folder of a run (its newest EMA)")
    num_samples: int = flag(10000, "images to make", at_least=1)
    batch_size: int = flag(16, "images per pass of the network", at_least=1)
    sampler: str = flag("", "one of {samplers}; '' is ddpm, or ddim with --use_ddim True")
    use_ddim: bool = flag(False, "alias of --sampler ddim")
    steps: int = flag(0, "steps, on the sampler's own grid; 0: as --timestep_respacing says", at_least=1)
    eta: float = flag(-1.0, "noise of samplers that take it: 0 none, 1 ddpm's; -1: the sampler's own", at_least=0)
    order: int = flag(0, "order of samplers that have several; 0: the sampler's own", at_least=1)
    churn: float = flag(-1.0, "extra noise of euler and heun (S_churn); -1: the sampler's own, 0", at_least=0)
    clip_denoised: bool = flag(True, "clip predictions of x_0 to [-1, 1]")
    dynamic_threshold: float = flag(
        0.0, "clip x_0 at this percentile of its sizes, such as 0.995, then scale it to [-1, 1]; 0: off", at_least=0
    )
    classes: str = flag("", "labels in turn: 207,360 or names of classes.json; '' draws at random")
    save_images: bool = flag(False, "write one PNG per image as well")
    save_intermediate: int = flag(0, "film.png, film.gif: the first x_0 every so many steps; 0: none", at_least=0)


@dataclass(frozen=True, kw_only=True)
class FreeGuidanceConfig:
    """Guidance without a classifier, and when guidance of any kind acts."""

    cfg_scale: float = flag(1.0, "w in uncond + w (cond - uncond): 1 conditional, 0 unconditional, above 1 guides")
    cfg_rescale: float = flag(0.0, "share of guidance's gain in contrast to take back, 0 to 1; 0: none", at_least=0)
    autoguide_path: str = path_flag("a weaker model of the same kind to guide away from: checkpoint or run folder")
    autoguide_scale: float = flag(1.0, "w in weak + w (model - weak): 1 the model alone, above 1 guides")
    guidance_interval: str = flag("", "LOW,HIGH: guide only at these timesteps of 0 .. T; '' throughout")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Starting from images."""

    init_image: str = path_flag("an image to start from; of a folder or zip its images in turn")
    mask: str = path_flag("white keeps --init_image, black is painted; of a folder or zip its masks in turn")
    mask_invert: bool = flag(False, "black keeps and white is painted")
    strength: float = flag(
        -1.0, "share of the way to noise, above 0 and up to 1; -1: 0.6, and 1 with --mask or --invert", at_least=0
    )
    resample: int = flag(1, "how often every stretch of steps is taken, so that what is painted fits in", at_least=1)
    resample_jump: int = flag(10, "steps in such a stretch", at_least=1)
    invert: bool = flag(False, "start from the noise that makes --init_image, not from fresh noise")
    interpolate: str = path_flag("an image: make --num_samples steps from --init_image to it")
    init_classes: str = flag("", "classes of the images that --invert and --interpolate turn to noise; '' --classes")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier guidance."""

    classifier_path: str = path_flag("the classifier's checkpoint, or the folder of its run")
    classifier_scale: float = flag(1.0, "factor of the gradient of log p(y | x_t); 0 is the unguided sampler")
    clip_guided: str = flag(
        "auto",
        "clip x_0 after guidance too; auto: not of ddim, plms without --steps",
        choices=("auto", "True", "False"),
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demonstration."""

    log_dir: str = local_flag("folder of the trained networks, the samples and the picture", "demo-output")
    data_dir: str = path_flag("folder or zip of the images", "datasets/emoji64.zip")
    seed: int = flag(0, "seed of all randomness", at_least=0)


def defaults(*sections: type[Any]) -> dict[str, Any]:
    """Flag -> default of the given config classes, as plain JSON values."""
    return {spec.name: spec.default for section in sections for spec in fields(section)}


def check_keywords(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse keywords that `where` does not know.

    :raises TypeError: naming the unknown keyword and the one most like it.
    """
    for name in names:
        if name not in known:
            raise TypeError(f"{where} has no keyword {name!r}{nearest(name, known)}")


def resolve_precision(precision: str, use_fp16: bool, name: str = "precision", alias: str = "use_fp16") -> str:
    """fp32, fp16 or bf16 from the flag and its older alias; "auto" must have become one of them before.

    :raises ValueError: if both are given and contradict each other, or the precision is unknown.
    """
    if precision not in ("", *PRECISIONS):
        raise ValueError(f"{name} {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
    if use_fp16 and precision not in ("", "fp16"):
        raise ValueError(f"{name} {precision} contradicts {alias} True: give one of the two")
    return precision or ("fp16" if use_fp16 else "fp32")
