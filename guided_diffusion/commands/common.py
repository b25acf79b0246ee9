"""What the commands that sample and measure share: the run's folder, the sampler, networks from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch as th

from .. import dist_util, logger
from ..config import ClassifierConfig, DiffusionConfig, RangeConfig, RunConfig, SuperResConfig, UNetConfig
from ..gaussian_diffusion import GaussianDiffusion
from ..networks.architecture import architecture
from ..networks.compiling import compile_network
from ..runtime import paths
from ..runtime.errors import UserError
from ..runtime.npz import fingerprint
from ..runtime.options import parse_size
from ..sampling.guidance import dynamic_thresholding
from ..sampling.samplers import make_sampler
from ..sampling.steps import Sampler
from ..script_util import build_diffusion, build_network
from ..training import lora
from ..training.checkpoints import Checkpoint, is_young, open_checkpoint
from . import performance
from .flags import SAVED_NAMES, Flags
from .sections import AdapterConfig, SampleConfig

FIRST = "input_blocks.0.0.weight"  # the first convolution
KINDS = {ClassifierConfig: "a classifier", SuperResConfig: "an upsampler", UNetConfig: "a diffusion model"}
NOT_IN_THE_RESULT = ("use_checkpoint", "use_fp16", "precision", "classifier_use_fp16", "classifier_precision")
SAMPLER_OPTIONS = ("eta", "order", "churn")


def start(flags: Flags) -> None:
    """Join the other ranks and log, all to one folder."""
    run = flags.part(RunConfig)
    dist_util.setup_dist(device=run.device, timeout=run.dist_timeout)
    logger.configure(dir=run.log_dir or None)


def image_shape(channels: int, size: int | str, dims: int = 2) -> tuple[int, ...]:
    """(C, H, W) of an image, or (C, L) and (C, D, H, W) in one and three dimensions."""
    height, width = parse_size(size)
    return (channels, height, width) if dims == 2 else (channels, *[height] * dims)


def sampler_of(flags: Flags) -> Sampler:
    """The sampler that --sampler, --use_ddim and its options ask for; options that are not given are its own.

    :raises ValueError: if there is no such sampler, it does not have such an option, or it makes noise of images.
    """
    config = flags.part(SampleConfig)
    name = config.sampler or ("ddim" if config.use_ddim else "ddpm")
    sampler = make_sampler(name, **{word: flags.given[word] for word in SAMPLER_OPTIONS if word in flags.given})
    if sampler.ascending:
        raise UserError(f"--sampler {name} turns images to noise: give --invert True and another sampler")
    return sampler


def schedule_of(flags: Flags) -> DiffusionConfig:
    """The process that the flags describe, --steps on the grid of the sampler."""
    schedule = flags.part(DiffusionConfig)
    if "sampler" not in flags.values or not flags.part(SampleConfig).steps:
        return schedule
    grid = f"{sampler_of(flags).grid}{flags.part(SampleConfig).steps}"
    return replace(schedule, timestep_respacing=grid)


def clipping_of(flags: Flags) -> dict[str, Any]:
    """What is done to every prediction of x_0, as options of the loop."""
    config = flags.part(SampleConfig)
    threshold = config.dynamic_threshold
    clip: dict[str, Any] = {"clip_denoised": config.clip_denoised}
    return clip | ({"denoised_fn": dynamic_thresholding(threshold)} if threshold else {})


# ---- networks


@dataclass(frozen=True)
class Restored:
    """A network from a checkpoint: on its device, in its precision, in evaluation mode.

    :param path: of the checkpoint.
    :param flags: the command line over what the checkpoint says.
    :param classes: class names by id, [] where none are known.
    :param identity: what the result depends on, for `Job.request`.
    """

    network: Any
    path: str
    flags: Flags
    process: GaussianDiffusion
    classes: list[str]
    identity: dict[str, Any]

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
    :param job: fields of the `Job` in place of those that `job_of` takes from the flags.
    :param request: what the result depends on, for `Job.request`.
    :param calls: evaluations of the network per batch besides those of the loop.
    """

    network: Any
    loop: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    calls: int = 0


def restore_unet(flags: Flags) -> Restored:
    """The U-Net of --model_path."""
    return _restore(flags, "model_path", UNetConfig)


def restore_upsampler(flags: Flags) -> Restored:
    """The upsampler of --model_path."""
    return _restore(flags, "model_path", SuperResConfig)


def restore_classifier(flags: Flags) -> Restored:
    """The classifier of --classifier_path."""
    return _restore(flags, "classifier_path", ClassifierConfig)


def restore_weaker(flags: Flags) -> Restored:
    """The network of --autoguide_path, of the same kind as that of --model_path.

    Its own config says what it is; the command line speaks of the other model, and of this one in precision alone.
    """
    return _restore(flags, "autoguide_path", SuperResConfig if "large_size" in flags.values else UNetConfig)


def _restore(flags: Flags, source: str, section: type[Any]) -> Restored:
    """The network whose checkpoint the flag `source` names, by its own flags, as `described` has them.

    :raises ValueError: if there is no such checkpoint, or it does not fit the flags.
    """
    checkpoint, flags = described(flags, source, section)
    if source == "model_path":
        flags.check()
    process = build_diffusion(schedule_of(flags))  # refuses an impossible grid before anything large is read
    config, learn_sigma = flags.part(section), flags.part(DiffusionConfig).learn_sigma
    with th.device("meta"):  # a config may ask for any size: memory is taken for what fits the weights alone
        frame = build_network(config, learn_sigma)
    weights = checkpoint.fitting(frame, asdict(config))
    if source == "model_path":
        weights = _adapted(flags, weights)
    network: Any = build_network(config, learn_sigma)
    network.load_state_dict(weights)
    logger.log(f"{source}: {checkpoint.path}")
    _warn_of_defaults(checkpoint.path, flags, section)
    _report_average(flags.values[source], checkpoint)
    precision = _precision(config)
    identity = {key: value for key, value in asdict(config).items() if key not in NOT_IN_THE_RESULT}
    identity |= {f"{source} weights": fingerprint(network.state_dict()), f"{source} precision": precision}
    network.to(dist_util.dev()).eval().requires_grad_(False).convert_to(precision)
    if flags.values.get("compile"):
        compile_network(network, f"the network of --{source}", sampling=True)
        identity["compile"] = True  # it rounds otherwise
    return Restored(network, checkpoint.path, flags, process, list(checkpoint.classes), identity)


def _adapted(flags: Flags, weights: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """The weights with the adapters of --lora_path."""
    path = flags.values.get("lora_path", "")
    if not path:
        return weights
    if not paths.exists(path):
        raise UserError(f"--lora_path {path!r} does not exist: give a folder loraNNNNNN, or that of its run")
    scale = flags.part(AdapterConfig).lora_scale
    weights, doubt = lora.applied(weights, lora.read(path), scale=scale)
    logger.log(f"lora_path: {path}, times {scale:g}")
    if doubt:
        logger.warn(doubt)
    return weights


def described(flags: Flags, source: str, section: type[Any]) -> tuple[Checkpoint, Flags]:
    """The checkpoint that the flag `source` names, and the command line over what it says of itself.

    Flags of `section` and of the process come from the config.json beside the checkpoint, without one from the shapes
    of its weights, and above all from the command line, which does not speak of the weaker network.

    :raises ValueError: if there is no such checkpoint, or it is of another kind of network.
    """
    if not flags.values[source]:
        raise UserError(f"--{source} is missing: give a checkpoint or the folder of a run")
    checkpoint = open_checkpoint(flags.values[source], f"--{source}")
    saved = checkpoint.flags or _shapes(checkpoint, flags)
    check_kind(saved, section, f"--{source} {checkpoint.path}")
    if source == "autoguide_path":
        given = {name: value for name, value in flags.given.items() if name not in SAVED_NAMES & set(saved)}
        flags = Flags(flags.command, given)
    else:
        saved = saved | _levels_of_another_size(flags, checkpoint)
    data = [RangeConfig] if "data_range" in flags.values else []  # images to sample from are of the kind trained on
    return checkpoint, flags.over(saved, section, DiffusionConfig, *data)


def _levels_of_another_size(flags: Flags, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the levels of a network are at another size of images than it was trained with, read off its weights."""
    sizes = [name for name in ("image_size", "large_size") if name in flags.given and name in checkpoint.flags]
    if all(parse_size(flags.given[name]) == parse_size(checkpoint.flags[name]) for name in sizes):
        return {}
    ends = "attention_resolutions", "channel_mult"
    return {name: value for name, value in _shapes(checkpoint, flags).items() if name.endswith(ends)}


def _precision(config: Any) -> str:
    """The precision that a network's own flags ask for."""
    name = "classifier_precision" if isinstance(config, ClassifierConfig) else "precision"
    precision, line = performance.settled(name, asdict(config))
    if line:
        logger.log(line)
    return precision


def check_kind(saved: Mapping[str, Any], section: type[Any], where: str) -> None:
    """Refuse a network of one kind where one of another belongs, as far as what is saved with it tells them apart."""
    if "classifier_width" in saved:
        kind = "a classifier"
    elif "large_size" in saved:
        kind = "an upsampler"
    else:
        kind = "a diffusion model" if {"image_size", "learn_sigma"} & set(saved) else ""
    expected = KINDS[section]
    if kind and kind != expected:
        raise UserError(f"{where} is {kind}: give the checkpoint of {expected} there")


def _shapes(checkpoint: Checkpoint, flags: Flags) -> dict[str, Any]:
    """The flags that can be read off the weights themselves."""
    state = checkpoint.weights
    size = flags.values.get("large_size", flags.values.get("image_size"))
    shapes = architecture(state)  # an attention pool knows its size
    if shapes and not flags.values.get("cond_type") and state[FIRST].shape[1] == 2 * shapes.get("image_channels", 0):
        shapes["large_size"] = flags.values.get("large_size", 0)  # it is an upsampler
    return architecture(state, shapes.get("image_size", size)) | shapes


def _warn_of_defaults(path: str, flags: Flags, section: type[Any]) -> None:
    """Say what a checkpoint without a config.json leaves to defaults."""
    known = {**flags.saved, **flags.given}
    specs = [spec for part in (section, DiffusionConfig) for spec in fields(part) if spec.name in SAVED_NAMES]
    rest = [f"{spec.name} {str(spec.default) or repr('')}" for spec in specs if spec.name not in known]
    if rest and "noise_schedule" not in flags.saved:  # what weights show does not include the process
        logger.warn(f"no config.json beside {path}: by default {', '.join(rest)}; give those that were others")


def _report_average(given: str, checkpoint: Checkpoint) -> None:
    """Say so where a moving average is longer than its training: it was not taken, or was asked for by its name."""
    step = checkpoint.step
    if step is None or checkpoint.flags.get("ema_warmup"):
        return
    for rate, average in checkpoint.emas.items():
        if not is_young(rate, step):
            continue
        what = f"{average} averages over about {1 / max(1e-9, 1 - float(rate)):.0f} steps and was trained for {step}"
        if average == checkpoint.path:
            logger.warn(f"{what}: if its samples are noise, try {checkpoint.model or 'a faster average'}")
        elif given != checkpoint.path:
            logger.log(f"{what}: it is not taken, unless it is given by its name")
