"""What the commands that sample and measure share: the run's folder, networks from checkpoints, the sampler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch as th

from .. import dist_util, logger
from ..config import ClassifierConfig, DiffusionConfig, RangeConfig, RunConfig, SuperResConfig, UNetConfig
from ..gaussian_diffusion import GaussianDiffusion
from ..image_datasets import load_classes
from ..networks.architecture import architecture
from ..networks.compiling import compile_network
from ..runtime import paths
from ..runtime.jobs import Job
from ..runtime.labels import parse_classes
from ..runtime.npz import fingerprint
from ..runtime.options import parse_size
from ..sample_util import generate
from ..sampling.guidance import dynamic_thresholding
from ..sampling.loop import network_calls
from ..sampling.samplers import DDIM, make_sampler
from ..sampling.steps import Sampler
from ..script_util import build_classifier, build_diffusion, build_unet, build_upsampler
from ..training import checkpoints, lora, weights as weight_files
from . import performance
from .flags import Flags
from .sections import AdapterConfig, SampleConfig

FIRST = "input_blocks.0.0.weight"  # the first convolution
LONG = 10000  # evaluations of the network, from which on a run that was given no --num_samples is remarked on
SAMPLER_OPTIONS = ("eta", "order", "churn")
NOT_IN_THE_RESULT = ("use_checkpoint", "use_fp16", "precision", "classifier_use_fp16", "classifier_precision")


def start(flags: Flags) -> None:
    """Join the other ranks and log, all to one folder."""
    run = flags.part(RunConfig)
    dist_util.setup_dist(device=run.device, timeout=run.dist_timeout)
    logger.configure(dir=run.log_dir or None)


@dataclass(frozen=True)
class Restored:
    """A network from a checkpoint: on its device, in its precision, in evaluation mode.

    :param path: of the checkpoint.
    :param flags: the command line over what the checkpoint says.
    :param process: of these flags.
    :param classes: class names by id, [] where none are known.
    :param identity: what the result depends on, for `Job.request`.
    """

    network: Any
    path: str
    flags: Flags
    process: GaussianDiffusion
    classes: list[str]
    identity: dict[str, Any]


def restore_unet(flags: Flags) -> Restored:
    """The U-Net of --model_path."""
    return _restore(flags, "model_path", UNetConfig, build_unet)


def restore_upsampler(flags: Flags) -> Restored:
    """The upsampler of --model_path."""
    return _restore(flags, "model_path", SuperResConfig, build_upsampler)


def restore_classifier(flags: Flags, source: str = "classifier_path") -> Restored:
    """The classifier of --classifier_path, or of what else says where it is."""
    return _restore(flags, source, ClassifierConfig, lambda config, _: build_classifier(config))


def restore_weaker(flags: Flags) -> Restored:
    """The network of --autoguide_path, of the same kind as that of --model_path.

    Its own config says what it is; the command line speaks of the other model, and of this one in precision alone.
    """
    if "large_size" in flags.values:
        return _restore(flags, "autoguide_path", SuperResConfig, build_upsampler, secondary=True)
    return _restore(flags, "autoguide_path", UNetConfig, build_unet, secondary=True)


def _restore(
    flags: Flags,
    source: str,
    section: type[Any],
    build: Callable[[Any, bool], th.nn.Module],
    *,
    secondary: bool = False,
) -> Restored:
    """The network whose checkpoint the flag `source` names, by its own flags, as `described` has them.

    :raises ValueError: if there is no such checkpoints, or it does not fit the flags.
    """
    path, flags = described(flags, source, section, secondary=secondary)
    process = build_diffusion(flags.part(DiffusionConfig))  # refuses an impossible grid before anything large is read
    config = flags.part(section)
    with th.device("meta"):  # a config may ask for any size: memory is taken for what fits the weights alone
        frame = build(config, flags.part(DiffusionConfig).learn_sigma)
    weights = _adapted(flags, source, weight_files.fitting_weights(frame, path, asdict(config)))
    network: Any = build(config, flags.part(DiffusionConfig).learn_sigma)
    network.load_state_dict(weights)
    logger.log(f"{source}: {path}")
    _warn_if_unknown(path, flags, section)
    _say_which(flags.values[source], path)
    precision, names = _precision(config), checkpoints.classes_beside(path)
    identity = {key: value for key, value in asdict(config).items() if key not in NOT_IN_THE_RESULT}
    identity |= {f"{source} weights": fingerprint(network.state_dict()), f"{source} precision": precision}
    network.to(dist_util.dev()).eval().requires_grad_(False).convert_to(precision)
    if flags.values.get("compile"):
        compile_network(network, f"the network of --{source}", sampling=True)
        identity["compile"] = True  # it rounds otherwise
    return Restored(network, path, flags, process, load_classes(names) if names else [], identity)


def _adapted(flags: Flags, source: str, weights: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """The weights of --model_path with the adapters of --lora_path; other weights as they are."""
    path = flags.values.get("lora_path", "") if source == "model_path" else ""
    if not path and "lora_scale" in flags.changed and source == "model_path":
        raise ValueError("--lora_scale has no effect without --lora_path: give both or none")
    if not path:
        return weights
    if not paths.exists(path):
        raise ValueError(f"--lora_path {path!r} does not exist: give a file loraNNNNNN.pt, or the folder of its run")
    scale = flags.part(AdapterConfig).lora_scale
    weights, doubt = lora.applied(weights, lora.read(path), scale=scale)
    logger.log(f"lora_path: {path}, times {scale:g}")
    if doubt:
        logger.warn(doubt)
    return weights


def described(flags: Flags, source: str, section: type[Any], *, secondary: bool = False) -> tuple[str, Flags]:
    """The checkpoint that the flag `source` names, and the command line over what it says of itself.

    Flags of `section` and of the process come from the config.json beside the checkpoints, without one from the shapes
    of its weights, and above all from the command line.

    :param secondary: the command line says only what the checkpoint does not.
    :raises ValueError: if there is no such checkpoints, or it is of another kind of network.
    """
    if not flags.values[source]:
        raise ValueError(f"--{source} is missing: give a checkpoint or the folder of a run")
    path = checkpoints.resolve_model(flags.values[source], f"--{source}")
    saved = checkpoints.config_beside(path) or _shapes(path, flags)
    check_kind(saved, section, f"--{source} {path}")
    if secondary:
        flags = _without(flags, saved, section)
    else:
        saved = saved | _of_another_size(flags, saved, path)
    data = [RangeConfig] if "data_range" in flags.values else []  # images to sample from are of the kind trained on
    return path, flags.over(saved, section, DiffusionConfig, *data)


def _of_another_size(flags: Flags, saved: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What the levels of a network are at another size of images than it was trained with, read off its weights."""
    sizes = [name for name in ("image_size", "large_size") if name in flags.given and name in saved]
    if all(parse_size(flags.given[name]) == parse_size(saved[name]) for name in sizes):
        return {}
    ends = "attention_resolutions", "channel_mult"
    return {name: value for name, value in _shapes(path, flags).items() if name.endswith(ends)}


def _without(flags: Flags, saved: Mapping[str, Any], section: type[Any]) -> Flags:
    """The command line without what a checkpoint says of itself, and without what another one said."""
    own = {spec.name for part in (section, DiffusionConfig) for spec in fields(part) if not spec.metadata["runtime"]}
    return Flags(flags.command, {name: value for name, value in flags.given.items() if name not in own & set(saved)})


def _precision(config: Any) -> str:
    """The precision that a network's own flags ask for."""
    name = "classifier_precision" if isinstance(config, ClassifierConfig) else "precision"
    precision, line = performance.settled(name, asdict(config))
    if line:
        logger.log(line)
    return precision


def check_kind(saved: Mapping[str, Any], section: type[Any], where: str) -> None:
    """Refuse a network of one kind where one of another belongs, as far as what is saved with it tells them apart."""
    kinds = {"classifier": "classifier_width" in saved, "upsampler": "large_size" in saved}
    wanted = {ClassifierConfig: "classifier", SuperResConfig: "upsampler"}.get(section, "diffusion model")
    found = next((kind for kind, it_is in kinds.items() if it_is), "diffusion model")
    told = saved and (found in kinds or wanted == "classifier" or {"image_size", "learn_sigma"} & set(saved))
    if told and found != wanted:
        answer = f"a {found}" if found == "classifier" else "an upsampler" if found in kinds else f"no {wanted}"
        article = "an" if wanted == "upsampler" else "a"
        raise ValueError(f"{where} is {answer}: give the checkpoint of {article} {wanted} there")


def _shapes(path: str, flags: Flags) -> dict[str, Any]:
    """The flags that can be read off the weights themselves."""
    state, _ = weight_files.weights_of(path)
    size = flags.values.get("large_size", flags.values.get("image_size"))
    found = architecture(state)  # an attention pool knows its size
    if found and not flags.values.get("cond_type") and state[FIRST].shape[1] == 2 * found.get("image_channels", 0):
        found["large_size"] = flags.values.get("large_size", 0)  # it is an upsampler
    return architecture(state, found.get("image_size", size)) | found


def _warn_if_unknown(path: str, flags: Flags, section: type[Any]) -> None:
    """Say what a checkpoint without a config.json leaves to defaults."""
    specs = [spec for part in (section, DiffusionConfig) for spec in fields(part) if not spec.metadata["runtime"]]
    usual = [
        f"{spec.name} {str(spec.default) or repr('')}"
        for spec in specs
        if spec.name not in {**flags.saved, **flags.given}
    ]
    if usual and "noise_schedule" not in flags.saved:  # what weights show does not include the process
        logger.warn(f"no config.json beside {path}: by default {', '.join(usual)}; give those that were others")


def _say_which(given: str, path: str) -> None:
    """Say so where a moving average is longer than its training: it was not taken, or was asked for by its name."""
    step = checkpoints.step_of(path)
    if step is None or checkpoints.config_beside(path).get("ema_warmup"):
        return
    files = checkpoints.sets_in(os.path.dirname(path) or ".").get(step, checkpoints.CheckpointSet(step))
    for rate, average in files.emas.items():
        if not checkpoints.is_young(rate, step):
            continue
        what = f"{average} averages over about {1 / max(1e-9, 1 - float(rate)):.0f} steps and was trained for {step}"
        if average == path:
            logger.warn(f"{what}: if its samples are noise, try {files.model or 'a faster average'}")
        elif given != path:
            logger.log(f"{what}: it is not taken, unless it is given by its name")


def refuse_difference(pairs: Mapping[str, tuple[Any, Any]], other: str, remedy: str) -> None:
    """Refuse another network than the model goes together with.

    :param pairs: name -> (the model's value, the other's).
    :raises ValueError: naming both values of the first pair that differs.
    """
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ValueError(f"the model has {name} {ours} and the {other} {theirs}: {remedy}")


def sampler_of(flags: Flags) -> Sampler:
    """The sampler that --sampler, --use_ddim and its options ask for; options that are not given are its own.

    :raises ValueError: if they contradict each other, there is no such sampler, or it does not have such an option; or
        if predictions cannot be clipped as asked for.
    """
    config = flags.part(SampleConfig)
    name = config.sampler or ("ddim" if config.use_ddim else "ddpm")
    sampler = make_sampler(name, **{word: flags.given[word] for word in SAMPLER_OPTIONS if word in flags.given})
    if config.use_ddim and type(sampler) is not DDIM:
        raise ValueError(f"--sampler {name} contradicts --use_ddim True: give one of the two")
    if sampler.ascending:
        raise ValueError(f"--sampler {name} turns images to noise: give --invert True and another sampler")
    if config.dynamic_threshold > 1:
        raise ValueError(f"--dynamic_threshold {config.dynamic_threshold} is no share: give e.g. 0.995, or 0 for none")
    return sampler


def on_its_grid(flags: Flags, sampler: Sampler) -> Flags:
    """The flags with --steps as a --timestep_respacing on the grid that the sampler wants.

    :raises ValueError: if both are given.
    """
    steps = flags.part(SampleConfig).steps
    if not steps:
        return flags
    if flags.values["timestep_respacing"]:
        given = flags.values["timestep_respacing"]
        raise ValueError(f"--steps {steps} and --timestep_respacing {given} both say which steps to take: give one")
    grid = f"{sampler.grid}{steps}"
    return Flags(flags.command, {**flags.given, "timestep_respacing": grid}, flags.saved)


def clipping_of(flags: Flags) -> dict[str, Any]:
    """What is done to every prediction of x_0, as options of the loop."""
    config = flags.part(SampleConfig)
    clip: dict[str, Any] = {"clip_denoised": config.clip_denoised}
    threshold = config.dynamic_threshold
    return clip | ({"denoised_fn": dynamic_thresholding(threshold)} if threshold else {})


def job_of(flags: Flags, sampler: Sampler, shape: tuple[int, ...], request: Mapping[str, Any], **options: Any) -> Job:
    """The job that the sampling flags describe.

    :param sampler: by `sampler_of`, which is asked before networks are loaded.
    :param shape: of one image, (C, H, W).
    :param request: what the result depends on beyond those flags.
    :param options: of the job, in place of those from the flags.
    """
    config = flags.part(SampleConfig)
    threshold = {"dynamic_threshold": config.dynamic_threshold} if config.dynamic_threshold else {}
    values = {
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "seed": flags.part(RunConfig).seed,
        "out_dir": logger.get_dir(),
        "save_images": config.save_images,
        "film": config.save_intermediate,
        "request_defaults": flags.usual,
        "request": {**asdict(flags.part(DiffusionConfig)), **threshold, **request},
    }
    return Job(sampler=sampler, shape=shape, **{**values, **options})


def labels_of(flags: Flags, classes: list[str], num_classes: int) -> dict[str, Any]:
    """The labels of a job: those of --classes in turn, else any of the classes that there were in training.

    :param classes: names by id, [] where none are known and num_classes decides.
    """
    text, num_classes = flags.part(SampleConfig).classes, len(classes) or num_classes
    labels = parse_classes(text, num_classes, classes) if text else []
    return {"labels": labels, "num_classes": num_classes, "class_names": classes}


def image_shape(channels: int, size: int | str, dims: int) -> tuple[int, ...]:
    """(C, H, W) of an image, or (C, L) and (C, D, H, W) in one and three dimensions."""
    height, width = parse_size(size)
    return (channels, height, width) if dims == 2 else (channels, *[height] * dims)


def announce(flags: Flags, process: GaussianDiffusion, job: Job, calls: int) -> None:
    """A line that says what is sampled and how, so that a wrong flag is seen before the samples are.

    :param calls: how often the network is asked per batch.
    """
    config = flags.part(DiffusionConfig)
    predicted = "x_0" if config.predict_xstart else "v" if config.predict_v else "eps"
    variance = "a learned" if config.learn_sigma else "a fixed"
    grid = f" (grid {config.timestep_respacing})" if config.timestep_respacing else ""
    source = f"classes {', '.join(map(str, job.labels[:20]))}" if job.labels else f"random of {job.num_classes} classes"
    logger.log(
        f"sampling {job.num_samples} images {'x'.join(map(str, job.shape[1:]))} in batches of {job.batch_size} "
        f"on {dist_util.world_size()} ranks: {job.sampler}, {process.num_timesteps} of {config.diffusion_steps} steps"
        f"{grid}, {calls} evaluations of the network per batch, {config.noise_schedule} schedule, the network predicts "
        f"{predicted} with {variance} variance, seed {job.seed}, {source if job.labelled else 'no classes'}"
    )
    if "num_samples" not in flags.given and job.batches * calls >= LONG:
        logger.log(
            f"these are {job.batches * calls} evaluations, the bar says how long they take: for a first look give "
            "--num_samples 16 --sampler dpm++2m --steps 20"
        )


def sample_and_say(
    flags: Flags, process: GaussianDiffusion, network: Any, job: Job, *, calls: int = 0, **options: Any
) -> str:
    """Announce, run and report a job; returns the path of the npz.

    :param calls: how often a network is asked per batch besides the sampling itself.
    :param options: of the sampling loop.
    """
    asked = network_calls(process, job.sampler, **options)
    if not asked:
        raise ValueError(f"--strength {options['strength']} takes none of the {process.num_timesteps} steps: raise it")
    announce(flags, process, job, calls + asked)
    options |= {**clipping_of(flags), "device": dist_util.dev(), "progress": True}
    path = generate(process, network, job, **options)
    logger.log(f"sampling complete: {path}")
    return path
