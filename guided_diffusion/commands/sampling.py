"""What the commands that sample share: from flags to a guided network, to a job, its log and its result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from .. import dist_util, logger
from ..config import ClassifierConfig, DiffusionConfig, RunConfig, SuperResConfig, UNetConfig
from ..data.labels import listed_classes
from ..runtime.errors import refuse
from ..runtime.jobs import Job
from ..runtime.options import parse_range, parse_size, size_flag
from ..sample_util import generate
from ..sampling.guidance import autoguidance, classifier_free, classifier_guidance, interval, without_labels
from ..sampling.loop import network_calls
from ..sampling.samplers import DDIM, PLMS, Ancestral
from ..script_util import build_diffusion
from . import conditioning, editing, latent_space, prompts, vectors
from .common import Plan, Restored, described, image_shape, restore, sampler_of, schedule_of, start
from .flags import Flags
from .sections import FreeGuidanceConfig, GuidanceConfig, SampleConfig, UpsampleConfig

LONG = 10000  # evaluations of the network, from which on a run without --num_samples gets advice
# flags that two networks must have in common
OF_A_CLASSIFIER = (
    "image_size image_channels dims diffusion_steps noise_schedule rescale_timesteps latent_channels autoencoder_id "
    "scale_factor"
).split()
OF_A_WEAKER_MODEL = (
    *OF_A_CLASSIFIER,
    *"large_size small_size cond_type cond_channels zero_terminal_snr predict_xstart predict_v learn_sigma".split(),
    *"context text_fingerprint max_tokens".split(),
)


def sample(flags: Flags) -> str:
    """Sample from a U-Net, guided by a classifier where the flags name one; returns the path of the npz."""
    editing.check(flags, sampler_of(flags))
    start(flags)
    model = restore(flags)
    return draw(model, restore_guide(model) if "classifier_path" in flags.values else None)[0]


def draw(model: Restored, classifier: Restored | None = None, **job: Any) -> tuple[str, int]:
    """Sample as the model's flags say; returns what `run` does.

    :param job: fields of the `Job` in place of those from the flags.
    """
    plan = drawing(model, classifier)
    plan.job |= job
    return run(model, plan)


def drawing(model: Restored, classifier: Restored | None = None) -> Plan:
    """What `draw` samples."""
    model = _from_zero(model)
    config = model.flags.part(UNetConfig)
    plan = guided(model, classifier)
    names, count = model.classes, config.num_classes
    if classifier is not None:
        names, count = classifier.classes or names, classifier.flags.part(ClassifierConfig).num_classes
    if config.class_cond or classifier is not None:
        plan.job |= labels_of(model.flags, names, count)
    if not config.class_cond and classifier is not None:
        plan.network = without_labels(plan.network)
    conditioning.extend(plan, model)
    prompts.extend(plan, model)
    vectors.extend(plan, model)
    shape = image_shape(config.image_channels, config.image_size, config.dims)
    plan.job |= latent_space.decoded(model.first_stage, shape)
    editing.extend(plan, model)
    plan.job["shape"] = shape
    return plan


def _from_zero(model: Restored) -> Restored:
    """The model with flags for all images from number 0 on, of which `job_of` takes those that are asked for."""
    options, flags = model.flags.part(SampleConfig), model.flags
    count = {"num_samples": options.start_index + options.num_samples}
    if "num_samples" in flags.given:
        return replace(model, flags=flags.with_values(**count))
    return replace(model, flags=Flags(flags.command, flags.given, {**flags.saved, **count}))


def enlarge(flags: Flags) -> str:
    """Enlarge images with an upsampler; returns the path of the npz."""
    sampler_of(flags)  # refuses a wrong one before anything else
    missing = (
        "--base_samples is missing: give small images: an npz, the folder of a run that sampled, a folder or a zip"
    )
    refuse((not flags.part(UpsampleConfig).base_samples, missing))
    start(flags)
    model = restore(flags)
    guide = restore_guide(model) if model.flags.part(GuidanceConfig).classifier_path else None
    return run(model, enlarging(model, guide))[0]


def enlarging(model: Restored, classifier: Restored | None = None) -> Plan:
    """What `enlarge` samples."""
    model = _from_zero(model)
    flags, config = model.flags, model.flags.part(SuperResConfig)
    plan = guided(model, classifier)
    names = (classifier.classes if classifier else []) or model.classes
    prompts.extend(plan, model, conditioning.enlarge(plan, flags, names))
    vectors.extend(plan, model)
    if "labels" not in plan.job and flags.part(SampleConfig).chooses_labels:
        plan.job |= labels_of(flags, names, config.num_classes)
    if not config.class_cond:
        plan.network = without_labels(plan.network)
    return plan


# (height, width, channels), with labels, names of known classes, with prompts
Made = tuple[tuple[int, int, int], bool, list[str], bool]


def made(flags: Flags, before: Made | None) -> Made:
    """What `sample` would make, or `enlarge` of the images made before; refused as far as configs tell."""
    sampler = sampler_of(flags)
    checkpoint, flags = described(flags)
    flags.check()
    build_diffusion(schedule_of(flags))
    values, classes = flags.values, list(checkpoint.classes)
    channels, class_cond = values["image_channels"], values["class_cond"]
    guide = described(flags, "classifier_path")[0] if values.get("classifier_path") else None
    if before is None:
        editing.check(flags, sampler)
        names = list(guide.classes) if guide else []
        size = (*parse_size(values["image_size"]), channels)
        labelled = (class_cond or guide is not None) and not values["randomize_class"]
        return size, labelled, names or classes, prompts.check_prompts(flags)
    shape, labelled, names, prompted = before
    prompted = prompts.check_prompts(flags, prompted=prompted)
    conditioning.level_of(flags)
    needed = (*parse_size(values["small_size"]), channels)
    shown = ["{}x{} with {} channels".format(*each) for each in (needed, shape)]
    others = class_cond and labelled and names and classes and names != classes
    refuse(
        (shape != needed, f"the upsampler enlarges images of {shown[0]}, and the stage before makes {shown[1]}"),
        (others, f"the upsampler has classes {classes}, and the stage before {names}"),
    )
    conditioning.check_labels(flags, labelled)
    size = (*parse_size(values["large_size"]), channels)
    labelled = bool(labelled or values["classes"] or values["class_sampling"]) and not values["randomize_class"]
    return size, labelled, names or classes, prompted


def restore_guide(model: Restored) -> Restored:
    """The classifier of --classifier_path, trained for the same images, classes and noise as the model."""
    classifier = restore(model.flags, "classifier_path")
    _check_agreement(model, classifier, "classifier", OF_A_CLASSIFIER)
    return classifier


def _check_agreement(model: Restored, other: Restored, title: str, names: Sequence[str]) -> None:
    """Refuse a network that does not go together with the model.

    :param names: flags that have to be the same; classes are compared where both have them.
    """
    ours, theirs = dict(model.flags.values), dict(other.flags.values)
    if title == "classifier" and "large_size" in ours:  # it sees the upsampler's output
        ours["image_size"] = ours["large_size"]
    if ours["class_cond"] and theirs.get("class_cond", True):
        names = [*names, "num_classes", "classes"]
        known = model.classes and other.classes
        ours["classes"], theirs["classes"] = (model.classes, other.classes) if known else ([], [])
    for name in (name for name in names if name in ours):
        same = size_flag if name.endswith("_size") else lambda value: value
        both = f"the model has {name} {ours[name]} and the {title} {theirs[name]}"
        differ = same(ours[name]) != same(theirs[name])
        refuse((differ, f"{both}: they must be of the same images, classes and noise"))


def guided(model: Restored, classifier: Restored | None = None) -> Plan:
    """The network that the flags ask for and the options of the loop that guide it; what has no effect is left out."""
    config = model.flags.part(FreeGuidanceConfig)
    plan = Plan(model.network)
    if model.flags.part(SampleConfig).randomize_class:
        plan.loop["randomize_class"], plan.job["keep_labels"] = True, False
    if config.cfg_scale != 1:
        _guide_freely(plan, model, config)
    if config.autoguide_path:
        _guide_away_from_weaker(plan, model, config)
    scale = model.flags.part(GuidanceConfig).classifier_scale if classifier else 0.0
    # at scale 0 there is no guide, not one of zeros: from x_0 to the score and back it would round
    guide = classifier_guidance(classifier.network, scale) if classifier and scale else None
    guide = prompts.with_clip(plan, model, guide)
    if classifier:
        plan.request |= classifier.identity | {"classifier_scale": scale}
    if config.guidance_interval:
        bounds = _interval(model, config.guidance_interval)
        plan.request["guidance_interval"] = list(bounds)
        if plan.network is not model.network:
            plan.network = interval(plan.network, *bounds)
        guide = guide and interval(guide, *bounds)
    if guide is not None:
        plan.loop |= {"cond_fn": guide, **_clipping_again(model)}
    plan.request |= model.identity
    return plan


def _clipping_again(model: Restored) -> dict[str, bool]:
    """Whether the guided x_0 is clipped, as an option of the loop; {} where there is nothing to clip.

    By default it is, except where the originals' images are kept: in ddim and plms on the originals' grids.
    """
    config, values, kind = model.flags.part(SampleConfig), model.flags.values, type(sampler_of(model.flags))
    if kind is Ancestral or model.first_stage or not (config.clip_denoised or config.dynamic_threshold):
        return {}
    grid = re.fullmatch(r"(ddim)?[\d, ]*", values["timestep_respacing"])
    theirs, again = kind in (DDIM, PLMS) and grid and not config.steps, values.get("clip_guided", "auto")
    return {"clip_guided": again == "True" or (again == "auto" and not theirs)}


def _guide_freely(plan: Plan, model: Restored, config: FreeGuidanceConfig) -> None:
    """Classifier-free guidance by the network's own null class, null conditioning image and empty or negative text."""
    null = prompts.null_keywords(model)
    prompts.refuse_unguidable(model, config.cfg_scale, null)
    plan.network = classifier_free(plan.network, config.cfg_scale, rescale=config.cfg_rescale, null=null)
    plan.request |= {"cfg_scale": config.cfg_scale, "cfg_rescale": config.cfg_rescale}
    if negative := model.flags.values["negative_prompt"]:
        plan.request["negative_prompt"] = negative


def _guide_away_from_weaker(plan: Plan, model: Restored, config: FreeGuidanceConfig) -> None:
    """Guidance away from the model of --autoguide_path, which may be unconditional where the model has classes."""
    weak = restore(model.flags, "autoguide_path")
    labelled: bool = weak.flags.values["class_cond"]
    _check_agreement(model, weak, "weaker model", [*OF_A_WEAKER_MODEL, *["class_cond"] * labelled])
    network = weak.network if labelled else without_labels(weak.network)
    plan.network = autoguidance(plan.network, network, config.autoguide_scale)
    plan.request |= {f"autoguide {name}": value for name, value in weak.identity.items()}
    plan.request["autoguide_scale"] = config.autoguide_scale


def _interval(model: Restored, text: str) -> tuple[float, float]:
    """The bounds of --guidance_interval in the unit of what networks are fed."""
    low, high = parse_range(text) or (0.0, 0.0)
    taus: Any = model.process.timestep_map
    none, steps = not any(low <= tau <= high for tau in taus), f"{len(taus)} from {taus[0]:g} to {taus[-1]:g}"
    refuse((none, f"--guidance_interval {text} holds none of the steps, which are {steps}: widen it"))
    schedule = model.flags.part(DiffusionConfig)
    unit = 1000.0 / schedule.diffusion_steps if schedule.rescale_timesteps else 1.0
    return low * unit, high * unit


def labels_of(flags: Flags, classes: Sequence[str], num_classes: int) -> dict[str, Any]:
    """The labels of a job, as --class_sampling says, from the classes that there were in training.

    :param classes: names by id, [] where none are known and num_classes decides.
    """
    config, num_classes = flags.part(SampleConfig), len(classes) or num_classes
    rule = config.class_sampling or ("list" if config.classes else "random")
    refuse(
        (rule == "list" and not config.classes, "--class_sampling list has no effect without --classes: give both"),
        (rule != "list" and config.classes, f"--class_sampling {rule} and --classes exclude each other: give one"),
    )
    labels = listed_classes(config.classes, num_classes, classes) if rule == "list" else []
    labels = [*range(num_classes)] if rule == "balanced" else labels
    return {"labels": labels, "num_classes": num_classes, "class_names": classes}


def job_of(flags: Flags, plan: Plan) -> Job:
    """The job that the sampling flags describe."""
    config = flags.part(SampleConfig)
    threshold = {"dynamic_threshold": config.dynamic_threshold} if config.dynamic_threshold else {}
    values = {
        "num_samples": config.start_index + config.num_samples,
        "batch_size": config.batch_size,
        "seed": flags.part(RunConfig).seed,
        "out_dir": logger.get_dir(),
        "save_images": config.save_images,
        "film": config.save_intermediate,
        "request_defaults": flags.defaults,
        "request": {**asdict(schedule_of(flags)), **threshold, **plan.request},
    }
    job = Job(sampler=sampler_of(flags), **{**values, **plan.job})
    if config.shard:
        return job.part(*map(int, config.shard.split("/")))
    return job.cut(config.start_index, job.num_samples) if config.start_index else job


def prepare(model: Restored, plan: Plan) -> tuple[Job, dict[str, Any], int]:
    """Announce a job: itself, the options of its loop, and the evaluations of the network per batch of the loop."""
    job = job_of(model.flags, plan)
    calls = network_calls(model.process, sampler_of(model.flags), **plan.loop)
    strength, steps = plan.loop.get("strength"), model.process.num_timesteps
    refuse((not calls, f"--strength {strength} takes none of the {steps} steps: raise it"))
    announce(model, job, plan.calls + calls)
    return job, {**plan.loop, **model.clipping, "device": dist_util.dev()}, calls


def run(model: Restored, plan: Plan) -> tuple[str, int]:
    """Run and report a job.

    Returns the path of the npz, and the evaluations of the network per batch in the sampling itself.
    """
    job, options, calls = prepare(model, plan)
    path = generate(model.process, plan.network, job, **options, progress=True)
    logger.log(f"sampling complete: {path}")
    return path, calls


def announce(model: Restored, job: Job, calls: int) -> None:
    """Log how samples are made, so that a wrong flag is seen before they are.

    :param calls: evaluations of the network per batch.
    """
    config = schedule_of(model.flags)
    predicted = "x_0" if config.predict_xstart else "v" if config.predict_v else "eps"
    variance = "a learned" if config.learn_sigma else "a fixed"
    grid = f" (grid {config.timestep_respacing})" if config.timestep_respacing else ""
    source = f"classes {', '.join(map(str, job.labels[:20]))}" if job.labels else f"random of {job.num_classes} classes"
    logger.log(
        f"sampling {job.num_samples} images {'x'.join(map(str, job.shape[1:]))} in batches of {job.batch_size} on "
        f"{dist_util.world_size()} ranks: {job.sampler}, {model.process.num_timesteps} of {config.diffusion_steps} "
        f"steps{grid}, {calls} evaluations of the network per batch, {config.noise_schedule} schedule, the network "
        f"predicts {predicted} with {variance} variance, seed {job.seed}, {source if job.labelled else 'no classes'}"
    )
    total = job.batches * calls
    if "num_samples" not in model.flags.given and total >= LONG:
        logger.log(
            f"these are {total} evaluations: for a first look give --num_samples 16 --sampler dpm++2m --steps 20"
        )
