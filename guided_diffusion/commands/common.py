"""What the commands that sample and measure share: the run's folder, the sampler, networks from checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch as th

from .. import dist_util, logger
from ..config import (
    AutoencoderConfig,
    ClassifierConfig,
    ContextConfig,
    DiffusionConfig,
    RangeConfig,
    RunConfig,
    SuperResConfig,
    UNetConfig,
    resolve_precision,
)
from ..networks.architecture import GLIDE, architecture
from ..networks.compiling import compile_network
from ..networks.context import ContextEncoder, ScratchEncoder, build_context_encoder
from ..networks.glide import GlideEncoder, Text2ImUNet, read_glide
from ..networks.hardware import fastest_precision
from ..runtime import files
from ..runtime.errors import WHY, UserError, as_user_error, refuse
from ..runtime.npz import fingerprint
from ..runtime.options import defaults, parse_size
from ..sampling.guidance import dynamic_thresholding
from ..sampling.samplers import make_sampler
from ..sampling.steps import Sampler
from ..script_util import build_diffusion, build_network
from ..training import lora
from ..training.checkpoints import Checkpoint, is_young, open_checkpoint, tokenizer_beside
from ..training.weights import State, tensor_differences
from . import latent_space
from .flags import SAVED_NAMES, Flags
from .presets import class_names
from .sections import AdapterConfig, LatentConfig, SampleConfig

if TYPE_CHECKING:
    from ..gaussian_diffusion import GaussianDiffusion
    from ..networks.first_stage import FirstStage

FIRST = "input_blocks.0.0.weight"  # the first convolution
KINDS = {ClassifierConfig: "a classifier", SuperResConfig: "an upsampler", UNetConfig: "a diffusion model"}
KINDS |= {AutoencoderConfig: "an autoencoder"}
# flag -> its older alias, and the width of its network
PRECISIONS = {
    "precision": ("use_fp16", "num_channels"),
    "classifier_precision": ("classifier_use_fp16", "classifier_width"),
}
PRECISION_FLAGS = ("precision", "use_fp16", "classifier_precision", "classifier_use_fp16")
NOT_IN_THE_RESULT = ("use_checkpoint", "text_encoder", *PRECISION_FLAGS)  # of an encoder its fingerprint is
NEWER = {"norm_groups": 32, "classifier_norm_groups": 32}  # what older results do not say, where it is so
OLDER = defaults(ContextConfig) | NEWER  # what the config.json of an older run does not say
SAMPLER_OPTIONS = ("eta", "order", "churn")
SIZES, OF_LEVELS = ("image_size", "large_size"), ("attention_resolutions", "channel_mult")


def start(flags: Flags) -> None:
    """Join the other ranks and log, all to one folder."""
    run = flags.part(RunConfig)
    dist_util.setup_dist(device=run.device, timeout=run.dist_timeout)
    logger.configure(dir=run.log_dir or None)


def log_to_screen() -> None:
    """Let rank 0 log to stdout, without a folder."""
    writers = [logger.HumanOutputFormat(sys.stdout)] if dist_util.rank() == 0 else []
    logger.Logger.CURRENT = logger.Logger(dir="", output_formats=writers)


def image_shape(channels: int, size: int | str, dims: int = 2) -> tuple[int, ...]:
    """(C, H, W) of an image, or (C, L) and (C, D, H, W) in one and three dimensions."""
    height, width = parse_size(size)
    return (channels, height, width) if dims == 2 else (channels, *[height] * dims)


def sampler_of(flags: Flags) -> Sampler:
    """The sampler that --sampler, --use_ddim and its options ask for; options that are not given are its own."""
    config = flags.part(SampleConfig)
    name = config.sampler or ("ddim" if config.use_ddim else "ddpm")
    sampler = make_sampler(name, **{word: flags.given[word] for word in SAMPLER_OPTIONS if word in flags.given})
    refuse((sampler.ascending, f"--sampler {name} turns images to noise: give --invert True and another sampler"))
    return sampler


def schedule_of(flags: Flags) -> DiffusionConfig:
    """The process that the flags describe, --steps on the grid of the sampler."""
    schedule = flags.part(DiffusionConfig)
    if not flags.values.get("steps"):
        return schedule
    return replace(schedule, timestep_respacing=f"{sampler_of(flags).grid}{flags.values['steps']}")


def precision_of(values: Mapping[str, Any]) -> tuple[str, list[str]]:
    """fp32, fp16 or bf16 of the network with these flags, and a line about the choice where there was one.

    Collective where the flag is "auto": all ranks take rank 0's choice.
    """
    name = "precision" if "precision" in values else "classifier_precision"
    precision, (alias, width) = values[name], PRECISIONS[name]
    if precision != "auto":
        return resolve_precision(precision, values.get(alias, False), name, alias), []
    refuse((values[alias], f"{name} auto contradicts {alias} True: give one of the two"))
    choice = dist_util.decide(lambda: fastest_precision(dist_util.dev(), values[width]))
    return choice.precision, [f"{name} auto: {choice.precision}, because {choice.reason}"]


@dataclass(frozen=True)
class Restored:
    """A network from a checkpoint: on its device, in its precision, in evaluation mode.

    :param path: of the checkpoint.
    :param flags: the command line over what the checkpoint says.
    :param classes: class names by id, [] where none are known.
    :param identity: what the result depends on, for `Job.request`.
    :param encoder: of prompts, where the network attends to text.
    :param first_stage: the autoencoder on whose latents it works, None for pixels.
    """

    network: Any
    path: str
    flags: Flags
    process: GaussianDiffusion
    classes: list[str]
    identity: dict[str, Any]
    encoder: ContextEncoder | None = None
    first_stage: FirstStage | None = None

    @property
    def clipping(self) -> dict[str, Any]:
        """What is done to every prediction of x_0, as options of the loop."""
        config = self.flags.part(SampleConfig)
        threshold = {"denoised_fn": dynamic_thresholding(config.dynamic_threshold)} if config.dynamic_threshold else {}
        return {"clip_denoised": config.clip_denoised and self.first_stage is None, **threshold}

    def with_flags(self, **values: Any) -> Restored:
        """The same network under other flags of sampling."""
        flags = self.flags.with_values(**values)
        flags.check()
        return replace(self, flags=flags, process=build_diffusion(schedule_of(flags)))


@dataclass
class Plan:
    """What is sampled, put together part by part.

    :param network: with its guidance.
    :param loop: options of the sampling loop.
    :param job: fields of the `Job` in place of those from the flags.
    :param request: what the result depends on, for `Job.request`.
    :param calls: evaluations of the network per batch besides those of the loop.
    """

    network: Any
    loop: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    calls: int = 0


def section_of(flags: Flags, source: str) -> type[Any]:
    """The config class of the network whose checkpoint the flag `source` names."""
    if source == "classifier_path":
        return ClassifierConfig
    return SuperResConfig if "large_size" in flags.values else UNetConfig


def restore(flags: Flags, source: str = "model_path", checkpoint: Checkpoint | None = None) -> Restored:
    """The network whose checkpoint the flag `source` names, by its own flags, as `described` has them.

    :param checkpoint: that one, where it is open already.
    """
    section, (checkpoint, flags) = section_of(flags, source), described(flags, source, checkpoint)
    first_stage = None
    if source == "model_path":
        flags.check()
        flags, first_stage = latent_space.of_sampling(flags, checkpoint)
    process = build_diffusion(schedule_of(flags))  # refuses an impossible grid before anything large is read
    config, learn_sigma = flags.part(section), flags.part(DiffusionConfig).learn_sigma
    build = partial(network_of, config, learn_sigma, checkpoint)
    with th.device("meta"):  # a config may ask for any size: memory is taken for what fits the weights alone
        frame = build()
    weights = checkpoint.fitting(frame, asdict(config))
    if source == "model_path" and flags.values.get("lora_path"):
        weights = _adapted(flags.part(AdapterConfig), weights)
    network: Any = build()
    network.load_state_dict(weights)
    logger.log(f"{source}: {checkpoint.path}")
    _warn_of_defaults(checkpoint.path, flags, section)
    _report_average(flags.values[source], checkpoint)
    precision, choices = precision_of(asdict(config))
    for line in choices:
        logger.log(line)
    identity = {k: v for k, v in asdict(config).items() if k not in NOT_IN_THE_RESULT and (k, v) not in NEWER.items()}
    if not identity.get("latent_channels"):  # as results before there were latents say it
        identity = {key: value for key, value in identity.items() if key not in latent_space.ON_PIXELS}
    identity |= {f"{source} weights": fingerprint(network.state_dict()), f"{source} precision": precision}
    if first_stage is not None:
        identity |= {"autoencoder_id": first_stage.fingerprint, "scale_factor": first_stage.scale_factor}
    network.to(dist_util.dev()).eval().requires_grad_(False).convert_to(precision)
    encoder = encoder_beside(network, config, checkpoint.path) if source == "model_path" else None
    if flags.values.get("compile"):
        compile_network(network, f"the network of --{source}", sampling=True, log=logger.log)
        identity["compile"] = True  # it rounds otherwise
    classes = list(checkpoint.classes) or class_names(flags.values.get("preset", ""))
    return Restored(network, checkpoint.path, flags, process, classes, identity, encoder, first_stage)


def network_of(config: Any, learn_sigma: bool, checkpoint: Checkpoint) -> Any:
    """The network of a config, with its text encoder where that was trained along.

    :param checkpoint: its own, beside which the tokenizer lies.
    """
    encoder = config.text_encoder if getattr(config, "context", "") == "text" else ""
    if encoder == GLIDE:
        return network_of_glide(checkpoint.weights, checkpoint.path)
    network = build_network(config, learn_sigma)
    if encoder == "scratch":
        tokenizer = tokenizer_beside(checkpoint.path)
        network.context_encoder = build_context_encoder(config, tokenizer=tokenizer, log=logger.warn)
    return network


def network_of_glide(state: State, path: str) -> Text2ImUNet:
    """An untrained network of the architecture that weights show, on the default device.

    :param path: of their file, for messages.
    """
    with as_user_error(f"{path} holds no whole network of GLIDE: {WHY}", LookupError, ValueError, ArithmeticError):
        network = read_glide(state)
        refuse((faults := "; ".join(tensor_differences(state, network.state_dict())), faults))
    return network.to_empty(device=th.get_default_device())


def encoder_beside(network: Any, config: Any, path: str) -> ContextEncoder | None:
    """The encoder of the texts that a restored network is sampled for: its own, or the frozen one of its flags."""
    if getattr(config, "context", "") != "text":
        return None
    if config.text_encoder == GLIDE:
        return GlideEncoder(network, tokenizer_beside(path), logger.warn)
    if isinstance(network.context_encoder, ScratchEncoder):
        return network.context_encoder
    return build_context_encoder(config, device=dist_util.dev(), log=logger.warn)


def _adapted(config: AdapterConfig, weights: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    remedy = "give a folder loraNNNNNN, or that of its run"
    refuse((not files.exists(config.lora_path), f"--lora_path {config.lora_path!r} does not exist: {remedy}"))
    weights, doubt = lora.applied(weights, lora.read(config.lora_path), scale=config.lora_scale)
    logger.log(f"lora_path: {config.lora_path}, times {config.lora_scale:g}")
    if doubt:
        logger.warn(doubt)
    return weights


def described(
    flags: Flags, source: str = "model_path", checkpoint: Checkpoint | None = None
) -> tuple[Checkpoint, Flags]:
    """The checkpoint that the flag `source` names, and the command line over what it says of itself.

    Flags of the network and the process come from the config.json beside the checkpoint, without one from the shapes of
    its weights, and above all from the command line. Of the weaker network of --autoguide_path this says nothing but
    the precision.
    """
    refuse((not flags.values[source], f"--{source} is missing: give a checkpoint or the folder of a run"))
    checkpoint, section = checkpoint or open_checkpoint(flags.values[source], f"--{source}"), section_of(flags, source)
    saved = OLDER | latent_space.ON_PIXELS | (checkpoint.flags or _shapes(checkpoint, flags))
    check_kind(saved, section, f"--{source} {checkpoint.path}")
    if source == "autoguide_path":
        given = {name: value for name, value in flags.given.items() if name not in SAVED_NAMES & set(saved)}
        flags = Flags(flags.command, given)
    else:
        sizes = [name for name in SIZES if name in flags.given.keys() & checkpoint.flags.keys()]
        if any(parse_size(flags.given[name]) != parse_size(checkpoint.flags[name]) for name in sizes):
            shapes = _shapes(checkpoint, flags)  # which levels a network has does not change with the size of images
            saved = saved | {name: value for name, value in shapes.items() if name.endswith(OF_LEVELS)}
    data = [RangeConfig] if "data_range" in flags.values else []  # images to sample from are of the kind trained on
    return checkpoint, flags.over(saved, section, DiffusionConfig, LatentConfig, *data)


def check_kind(saved: Mapping[str, Any], section: type[Any], where: str) -> None:
    """Refuse a network of another kind, as far as what is saved with it tells."""
    kind: type[Any] | None = ClassifierConfig if "classifier_width" in saved else None
    if kind is None and saved.keys() & {"image_size", "large_size", "learn_sigma"}:
        kind = SuperResConfig if "large_size" in saved else UNetConfig
    kind = AutoencoderConfig if "z_channels" in saved else kind
    if kind not in (None, section):
        raise UserError(f"{where} is {KINDS[kind]}: give the checkpoint of {KINDS[section]} there")


def _shapes(checkpoint: Checkpoint, flags: Flags) -> dict[str, Any]:
    """The flags that the weights themselves show."""
    state = checkpoint.weights
    size = checkpoint.size_of_inputs(flags.values.get("large_size", flags.values.get("image_size", 0)), flags.values)
    shapes = architecture(state)  # an attention pool knows its size
    if shapes and not flags.values.get("cond_type") and state[FIRST].shape[1] == 2 * shapes.get("image_channels", 0):
        shapes["large_size"] = flags.values.get("large_size", 0)  # it is an upsampler
    return architecture(state, shapes.get("image_size", size)) | shapes


def _warn_of_defaults(path: str, flags: Flags, section: type[Any]) -> None:
    """Log what a checkpoint without a config.json leaves to defaults."""
    known = {**flags.saved, **flags.given}
    specs = [spec for part in (section, DiffusionConfig) for spec in fields(part) if spec.name in SAVED_NAMES]
    rest = [f"{spec.name} {str(spec.default) or repr('')}" for spec in specs if spec.name not in known]
    named = flags.values.get("preset")  # of which all is known
    if rest and "noise_schedule" not in flags.saved and not named:  # weights do not show the process
        logger.warn(f"no flags of a training beside {path}: by default {', '.join(rest)}; give those that were others")


def _report_average(given: str, checkpoint: Checkpoint) -> None:
    """Log a moving average that is longer than its training, whether it was taken or not."""
    step = checkpoint.step
    if step is None or checkpoint.flags.get("ema_warmup") or checkpoint.flags.get("ema_start"):
        return
    for rate, average in checkpoint.emas.items():
        if not is_young(rate, step) or (average != checkpoint.path and given == checkpoint.path):
            continue
        text = f"{average} averages over about {1 / max(1e-9, 1 - float(rate)):.0f} steps and was trained for {step}"
        if average == checkpoint.path:
            logger.warn(f"{text}: if its samples are noise, try {checkpoint.model or 'a faster average'}")
        else:
            logger.log(f"{text}: it is not taken, unless it is given by its name")
