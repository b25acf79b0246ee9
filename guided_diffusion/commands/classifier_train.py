"""Train a classifier of noisy images, e.g. to guide a diffusion model."""

from __future__ import annotations

from ..config import ClassifierConfig, ClassifierTrainConfig, DiffusionConfig, resolve_precision
from .entry import entry
from .flags import Flags

INITIAL_LOG_LOSS_SCALE = 16.0  # gradients of a cross-entropy are larger than those of a mean square


def train(flags: Flags) -> None:
    """Train as the flags say.

    :raises ValueError: naming the flag that is wrong.
    """
    from .. import dist_util
    from ..script_util import build_classifier, build_diffusion
    from ..train_util import ClassifierTrainLoop
    from . import finetuning, performance, training

    flags = training.start(flags)
    config, loop = flags.part(ClassifierConfig), flags.part(ClassifierTrainConfig)
    if not loop.noised and loop.schedule_sampler != "uniform":
        raise ValueError(f"--schedule_sampler {loop.schedule_sampler} has no effect with --noised False: leave it out")
    names = ("classifier_precision", "classifier_use_fp16")
    precision = resolve_precision(config.classifier_precision, config.classifier_use_fp16, *names)
    model, diffusion = build_classifier(config).to(dist_util.dev()), build_diffusion(flags.part(DiffusionConfig))
    streams = training.open_streams(flags, image_size=config.image_size, class_cond=True)
    finetuning.prepare(flags, model, streams.train.classes)
    performance.prepare(flags, model)
    ClassifierTrainLoop(
        model=model,
        precision=precision,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        noised=loop.noised,
        max_steps=loop.iterations,
        lr_anneal_steps=loop.iterations if loop.anneal_lr else 0,
        val_interval=loop.eval_interval,
        **training.loop_keywords(flags, diffusion, streams),
    ).run_loop()
    training.finish()


main = entry("classifier_train", train)
