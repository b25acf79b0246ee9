"""What the commands that sample share: from restored networks to a job, its log and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .. import dist_util, logger
from ..config import ClassifierConfig, RunConfig, UNetConfig
from ..runtime.errors import UserError
from ..runtime.jobs import Job
from ..runtime.labels import parse_classes
from ..sample_util import generate
from ..sampling.guidance import without_labels
from ..sampling.loop import network_calls
from . import conditioning, editing, guidance
from .common import Plan, Restored, clipping_of, image_shape, restore, sampler_of, schedule_of, start
from .flags import Flags
from .sections import SampleConfig

LONG = 10000  # evaluations of the network, from which on a run without --num_samples gets advice


def sample(flags: Flags) -> str:
    """Sample from a U-Net, guided by a classifier where the command has one; returns the path of the npz."""
    editing.check(flags, sampler_of(flags))
    start(flags)
    model = restore(flags)
    return draw(model, guidance.restore_guide(model) if "classifier_path" in flags.values else None)[0]


def draw(model: Restored, classifier: Restored | None = None, **job: Any) -> tuple[str, int]:
    """Sample as the model's flags say; returns what `run` does.

    :param job: fields of the `Job` in place of those from the flags.
    """
    config = model.flags.part(UNetConfig)
    plan = guidance.plan(model, classifier)
    names, count = model.classes, config.num_classes
    if classifier is not None:
        names, count = classifier.classes or names, classifier.flags.part(ClassifierConfig).num_classes
    if config.class_cond or classifier is not None:
        plan.job |= labels_of(model.flags, names, count)
    if not config.class_cond and classifier is not None:
        plan.network = without_labels(plan.network)
    conditioning.extend(plan, model, names)
    editing.extend(plan, model)
    plan.job |= job
    return run(model, plan, image_shape(config.image_channels, config.image_size, config.dims))


def labels_of(flags: Flags, classes: Sequence[str], num_classes: int) -> dict[str, Any]:
    """The labels of a job: those of --classes in turn, else any of the classes that there were in training.

    :param classes: names by id, [] where none are known and num_classes decides.
    """
    text, num_classes = flags.part(SampleConfig).classes, len(classes) or num_classes
    labels = parse_classes(text, num_classes, classes) if text else []
    return {"labels": labels, "num_classes": num_classes, "class_names": classes}


def job_of(flags: Flags, shape: tuple[int, ...], plan: Plan) -> Job:
    """The job that the sampling flags describe, for images of a shape (C, H, W)."""
    config = flags.part(SampleConfig)
    threshold = {"dynamic_threshold": config.dynamic_threshold} if config.dynamic_threshold else {}
    values = {
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "seed": flags.part(RunConfig).seed,
        "out_dir": logger.get_dir(),
        "save_images": config.save_images,
        "film": config.save_intermediate,
        "request_defaults": flags.defaults,
        "request": {**asdict(schedule_of(flags)), **threshold, **plan.request},
    }
    return Job(sampler=sampler_of(flags), shape=shape, **{**values, **plan.job})


def run(model: Restored, plan: Plan, shape: tuple[int, ...]) -> tuple[str, int]:
    """Announce, run and report a job for images of a shape (C, H, W).

    Returns the path of the npz, and the evaluations of the network per batch in the sampling itself.
    """
    job = job_of(model.flags, shape, plan)
    calls = network_calls(model.process, job.sampler, **plan.loop)
    if not calls:
        steps = model.process.num_timesteps
        raise UserError(f"--strength {plan.loop['strength']} takes none of the {steps} steps: raise it")
    announce(model, job, plan.calls + calls)
    options = {**plan.loop, **clipping_of(model.flags), "device": dist_util.dev(), "progress": True}
    path = generate(model.process, plan.network, job, **options)
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
