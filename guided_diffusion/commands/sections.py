"""The flags that commands alone take, in training and sampling. As in config.py, a field is a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config import (
    BALANCES,
    FITS,
    LABELLED,
    PRECISIONS,
    DataConfig,
    LabelConfig,
    RangeConfig,
    RunConfig,
    local_flag,
    path_flag,
)
from ..runtime.options import flag, interval_flag, list_of, names_of, share_flag, share_of_job, shuffle_flag

SEED_STEP = 1_000_000  # between stages: with one seed for all, a stage would draw the noise of the one before it
MISMATCHES = ("error", "reinit", "inflate")

# flags of several sections
CLASSES = "labels in turn: 207,360, names of classes.json, or @FILE with one on each line; '' draws at random"
VECTOR = "numbers for --vector_columns, such as 1,0,0.5; nan for an unknown one; several vectors with ; between them"
INTERVAL = "LOW,HIGH: guide only at these timesteps of 0 .. T; '' throughout"
COND_FN = "classifier_path&classifier_scale|clip_path&clip_scale"  # where the gradient of something guides
LORA_KINDS = ("attention", "convolutions")
LORA_LIST = names_of(LORA_KINDS, "layer that carries adapters")
WEIGHTS = list_of(r"0*[1-9]\d*(\.\d*)?|0?\.\d*[1-9]\d*", "numbers above 0, such as 3,1", repeated=True)


@dataclass(frozen=True, kw_only=True)
class ClassifierDataConfig(DataConfig):
    """The labelled images to train on."""

    random_crop: bool = flag(True, "crop at random instead of the centre")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Which images come when, and how they are made to fit."""

    shuffle: str = flag("all", "all; or shards:N, N tars or zips at a time (shards is shards:16)", convert=shuffle_flag)
    data_weights: str = flag("", "of the data sets in --data_dir, such as 3,1; '' by size", convert=WEIGHTS)
    balance: str = flag(
        "", "classes: all come equally often", choices=BALANCES, needs="class_cond", excludes="data_weights"
    )
    fit: str = flag(
        "crop",
        "crop to --image_size; pad with black; squash",
        choices=FITS,
        excludes="random_crop",
    )


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """An autoencoder, in whose space the diffusion happens."""

    autoencoder_path: str = path_flag(
        "a run of autoencoder_train, or a file of latent-diffusion, on whose latents the network works; '': on pixels",
        excludes="cond_type",
    )
    autoencoder_id: str = flag("", "fingerprint of its weights; the training sets it", needs="autoencoder_path")
    decode_tile: int = flag(
        0,
        "decode in tiles of so many numbers a side, to save memory; 0: as a whole",
        at_least=8,
        runtime=True,
        needs="autoencoder_path",
    )
    scale_factor: float = flag(
        0.0, "what latents are multiplied by; 0: the autoencoder's own", at_least=0, needs="autoencoder_path"
    )


@dataclass(frozen=True, kw_only=True)
class LatentTrainConfig(LatentConfig):
    """An autoencoder, in whose space the diffusion happens."""

    NEEDS: ClassVar[str] = "autoencoder_path"
    cache_latents: bool = flag(
        False,
        "encode every image once, to files in the run's folder",
        excludes="random_crop cache_images on_bad_image=skip",
    )
    copy_autoencoder: bool = flag(False, "keep a copy of the autoencoder in the run's folder, which can then be moved")


@dataclass(frozen=True, kw_only=True)
class CondDataConfig:
    """Conditioning images beside the images of --data_dir, of the kind that --cond_type says."""

    NEEDS: ClassVar[str] = "cond_type"
    cond_dir: str = path_flag("folder or zip of a conditioning image for each image, named as it but for the extension")
    skip_unpaired: bool = flag(False, "leave out what is without its partner, of either kind; False: that is an error")


@dataclass(frozen=True, kw_only=True)
class CondTrainConfig(CondDataConfig):
    """Conditioning images to train with, of the kind that --cond_type says."""

    val_cond_dir: str = path_flag("as --cond_dir, for --val_data_dir", needs="val_data_dir")
    cond_dropout: float = share_flag("probability that a conditioning image becomes zeros, for guidance")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Starting from a trained network."""

    init_from: str = path_flag("a checkpoint, or a run's folder (its newest EMA), whose weights a new run starts from")
    init_mismatch: str = flag(
        "error",
        "parameters that do not fit it: error; reinit, they start anew; inflate, they grow so that the network still "
        "computes what it did, and classes are found by name",
        choices=MISMATCHES,
        needs="init_from",
    )
    freeze: str = flag("", "untrained parameters: patterns such as input_blocks.*,time_embed.*", excludes="lora_rank")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA) in place of training the weights."""

    NEEDS: ClassVar[str] = "lora_rank"
    lora_rank: int = flag(0, "rank of the adapters; 0: none", at_least=0, at_most=2**16, needs="init_from")
    lora_alpha: float = flag(0.0, "the adapters' output is scaled by this over the rank; 0: not scaled", at_least=0)
    lora_on: str = flag("attention,convolutions", "layers that have adapters", convert=LORA_LIST)
    lora_train: str = flag("", "parameters that are trained beside the adapters: patterns such as label_emb.*")


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """The network whose features are compared."""

    NEEDS: ClassVar[str] = "eval_interval"
    features: str = flag(
        "inception",
        "inception; classifier:PATH, a run of classifier_train; dinov2:FOLDER or clip:FOLDER, a local folder that "
        "transformers reads",
    )
    inception_weights: str = path_flag(
        "Inception's weights, .pth or .safetensors; '' for $GUIDED_DIFFUSION_INCEPTION, else what download fetched"
    )
    eval_batch_size: int = flag(64, "images per pass of the network", at_least=1)
    eval_precision: str = flag("fp32", "precision of that network", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, and how it is used."""

    model_path: str = path_flag("a checkpoint, or the folder of a run (its newest EMA)")
    preset: str = flag("", "a model by name, with its flags: those that 'guided-diffusion models list' names")
    clip_denoised: bool = flag(True, "clip predictions of x_0 to [-1, 1]")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelConfig):
    """Sampling."""

    num_samples: int = flag(10000, "images to make", at_least=1)
    start_index: int = flag(0, "number of the first one: image i of a seed is always the same", at_least=0)
    shard: str = flag(
        "", "I/N: part I of 1 .. N of them, in a job of its own", convert=share_of_job, excludes="start_index"
    )
    batch_size: int = flag(16, "images per pass of the network", at_least=1)
    sampler: str = flag("", "one of {samplers}; '' is ddpm, or ddim with --use_ddim True")
    use_ddim: bool = flag(False, "alias of --sampler ddim", excludes="sampler!=,ddim")
    steps: int = flag(
        0, "steps on the sampler's own grid (NFE is logged); 0: none given", at_least=1, excludes="timestep_respacing"
    )
    eta: float = flag(-1.0, "noise of samplers that take it: 0 none, 1 ddpm's; -1: the sampler's own", at_least=0)
    order: int = flag(0, "order of samplers that have several; 0: the sampler's own", at_least=1)
    churn: float = flag(-1.0, "extra noise of euler and heun (S_churn); -1: the sampler's own, 0", at_least=0)
    dynamic_threshold: float = share_flag("clip x_0 at this percentile, e.g. 0.995, then scale; 0: off")
    classes: str = flag("", CLASSES, needs="class_cond|classifier_path")
    class_sampling: str = flag(
        "",
        "random labels; balanced: all classes in turn; list: --classes; '' is list where there are these, else random",
        choices=("", "random", "balanced", "list"),
        needs="class_cond|classifier_path",
    )
    randomize_class: bool = flag(
        False,
        "new random labels in every step: a class-conditional network without classes; none are saved",
        needs="class_cond",
        excludes="classes class_sampling classifier_path",
    )
    vector: str = flag("", VECTOR, needs="vector_columns", excludes="vectors")
    vectors: str = path_flag("file of vectors for the images in turn, a line of numbers each", needs="vector_columns")
    save_images: bool = flag(False, "write one PNG per image as well")
    save_intermediate: int = flag(0, "film.png, film.gif: the first x_0 every so many steps; 0: none", at_least=0)

    @property
    def chooses_labels(self) -> bool:
        """Whether labels come from flags, and not from what images there are or from chance."""
        return bool(self.classes or self.class_sampling or self.randomize_class)


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier guidance."""

    classifier_path: str = path_flag("the classifier's checkpoint, or the folder of its run")
    classifier_scale: float = flag(
        1.0, "guidance scale, a factor of grad log p(y | x_t); 0: off", needs="classifier_path"
    )
    clip_guided: str = flag(
        "auto",
        "clip x_0 after guidance too; auto: not of ddim, plms without --steps",
        choices=("auto", "True", "False"),
        needs=f"{COND_FN} clip_denoised|dynamic_threshold sampler|use_ddim sampler!=ddpm",
    )


@dataclass(frozen=True, kw_only=True)
class FreeGuidanceConfig:
    """Guidance without a classifier, and when guidance of any kind acts."""

    cfg_scale: float = flag(
        1.0,
        "guidance scale w in uncond + w (cond - uncond); above 1 guides",
        needs=f"{LABELLED}|cond_type|context=text",
    )
    cfg_rescale: float = share_flag("share of guidance's gain in contrast to take back", needs="cfg_scale!=1.0")
    autoguide_path: str = path_flag("a weaker model of the same kind to guide away from", needs="autoguide_scale!=1.0")
    autoguide_scale: float = flag(1.0, "w in weak + w (model - weak); above 1 guides", needs="autoguide_path")
    guidance_interval: str = flag("", INTERVAL, convert=interval_flag, needs=f"cfg_scale!=1.0|autoguide_path|{COND_FN}")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Texts to sample for."""

    NEEDS: ClassVar[str] = "context=text"
    prompt: str = flag("", "what the images show, such as 'a red apple'", excludes="prompts")
    prompts: str = path_flag("file of prompts, one on each line, for the images in turn")
    negative_prompt: str = flag(
        "", "what --cfg_scale leads away from, in place of the empty text", needs="cfg_scale!=1.0"
    )


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Guidance to a text by CLIP, for any network."""

    NEEDS: ClassVar[str] = "clip_path"
    clip_path: str = path_flag("local folder of a CLIP that transformers reads")
    clip_scale: float = flag(100.0, "factor of the gradient of half the squared angle to the text; 0: off")
    clip_prompt: str = flag("", "the text; '' is --prompt")
    clip_on: str = flag(
        "x_0", "what CLIP sees: x_0, the prediction, through the network; x_t, the noisy image", choices=("x_0", "x_t")
    )


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Starting from images."""

    init_image: str = path_flag("an image to start from (img2img); of a folder or zip its images in turn")
    mask: str = path_flag("inpainting: white keeps --init_image, black is painted; or a folder", needs="init_image")
    mask_invert: bool = flag(False, "black keeps and white is painted", needs="mask")
    strength: float = share_flag(
        "share of the way to noise, as in SDEdit; -1: 0.6, and 1 with --mask or --invert",
        -1.0,
        at_least=1e-6,
        needs="init_image",
    )
    resample: int = flag(1, "how often each stretch of steps is taken, to fit the painted in", at_least=1, needs="mask")
    resample_jump: int = flag(10, "steps in such a stretch", at_least=1, needs="mask resample!=1")
    invert: bool = flag(False, "start from the noise that makes --init_image", needs="init_image", excludes="cond_type")
    interpolate: str = path_flag(
        "an image: make --num_samples steps from --init_image to it",
        needs="init_image num_samples!=1",
        excludes="invert mask strength cond_type",
    )
    init_classes: str = flag("", "classes of those images; '' --classes", needs="invert|interpolate class_cond")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter (LoRA) over the network of --model_path."""

    lora_path: str = path_flag("its folder loraNNNNNN, or that of the run that trained it; '' for none")
    lora_scale: float = flag(1.0, "how much of it: 0 none, 1 as it was trained", needs="lora_path")


@dataclass(frozen=True, kw_only=True)
class CondSampleConfig:
    """Conditioning images to sample for: a sample for each."""

    cond_images: str = path_flag("folder, zip or npz (arr_0) of conditioning images, or one", needs="cond_type")


@dataclass(frozen=True, kw_only=True)
class UpsampleConfig(LabelConfig):
    """The small images to enlarge."""

    base_samples: str = path_flag("npz of small images (arr_0, labels in arr_1), folder of a sampling run, or images")
    cond_aug_level: float = share_flag("noise to put on the small images, of 0 to 1; 0: none", needs="cond_aug")
    tile_overlap: float = share_flag(
        "enlarge images of any size in tiles of the training's that overlap by this share, such as 0.25; 0: whole ones",
        excludes="classifier_path",
    )


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(RunConfig):
    """What all stages share; every other flag belongs to a stage: --base.model_path, --up1.model_path, --up1.steps."""

    seed: int = flag(0, "seed of the base; up1 takes 1000000 more, up2 2000000 more", at_least=0)
    num_samples: int = flag(10000, "images to make", at_least=1)
    batch_size: int = flag(16, "images per pass of a network; --up1.batch_size is that of a stage", at_least=1)
    classes: str = flag("", CLASSES)
    prompt: str = flag("", "what the images show, for all stages that attend to text", excludes="prompts")
    prompts: str = path_flag("file of prompts, one on each line, for the images in turn")
    save_images: bool = flag(False, "write one PNG per image of the last stage as well")
    stages: str = local_flag("YAML or JSON file of the stages' flags, by stage; the command line has the last word")


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(ModelConfig, LabelConfig, RangeConfig):
    """The images to measure."""

    data_dir: str = path_flag("folder or zip of images, or an array of them")
    num_samples: int = flag(1000, "images to measure", at_least=1)
    batch_size: int = flag(1, "images per pass of the network", at_least=1)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured of the images."""

    likelihood: str = flag("vlb", "vlb: variational bound; flow: of the probability flow", choices=("vlb", "flow"))
    spread: bool = flag(False, "take --num_samples images evenly over the data, not the first ones by name")
    save_terms: bool = flag(False, "keep the terms of each image, as arr_1 [N, T]", needs="likelihood=vlb")
