"""Samples made and saved: seeded image by image, cut into global batches, restartable, merged into one npz.

Shapes: N images in all, B per batch, C channels, K classes. Images leave the loops as float [B, C, H, W] in [-1, 1]
and are kept as uint8 [N, H, W, C] (any number of space dimensions between batch and channels).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import torch as th

from . import dist_util, logger
from .data.upsampling import NAMES, picture_names
from .networks.compiling import evaluating as evaluating
from .nn import traits_of
from .respace import respaced, space_timesteps
from .runtime.errors import refuse
from .runtime.files import write_json
from .runtime.jobs import Job
from .runtime.labels import check_labels
from .runtime.npz import PROMPTS, fingerprint, read_npz, save_npz, write_arrays
from .runtime.pictures import FILM_IMAGES, LEVEL, Film, Pixels, can_draw, draw_each, draw_grid, save_grid, to_uint8
from .runtime.seeds import image_generator, seeded
from .sampling.loop import SampleOptions, network_calls
from .sampling.samplers import make_sampler
from .sampling.steps import StepOutput

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion

Model = Callable[..., th.Tensor]

PREVIEW_STEPS = 25
CHUNK = 64  # images in memory at a time
LISTED = 32  # longer lists of labels are a fingerprint in the request
NOT_IN_THE_RESULT = ("device", "progress", "callback")
STRAYED = 0.1  # share of the values of a guided x_0 outside of [-1, 1] that is worth a line


def generate(process: GaussianDiffusion, model: Model, job: Job, **options: Unpack[SampleOptions]) -> str:
    """Make and save the images of a job; returns the path of the npz (arr_0 images, arr_1 labels if there are any).

    Image i of seed s is the same bit for bit for any number of ranks and any restart with the same batch size. Every
    rank calls this; all of them must see the same folder.

    :param options: of the sampling loop, e.g. `cond_fn`; what they are made of belongs into `job.request`.
    """
    _check(job, model, options)
    finished = dist_util.decide(lambda: _claim(job, _manifest(process, model, job, options)))
    if job.film and (finished or job.is_whole(0)) and not os.path.exists(job.file("film.gif")):
        logger.warn(f"no film: the images that it shows are made already; give another folder than {job.out_dir}")
    rank, world_size = dist_util.rank(), dist_util.world_size()
    if finished:
        logger.log(f"{job.path} is there already, whole and of the same request: nothing to sample")
    else:
        make_shards(process, model, job, rank=rank, world_size=world_size, **options)
        dist_util.barrier()
        dist_util.decide(lambda: merge(job))
    _draw_pictures(job, rank, world_size)
    if rank == 0:
        job.tidy(os.path.basename(job.path))
    dist_util.barrier()
    return job.path


def _check(job: Job, model: Model, options: SampleOptions) -> None:
    traits = traits_of(model)
    classes = traits.num_classes
    undrawable = job.film and not can_draw(job.shape)
    lacking = classes is not None and not job.labelled
    surplus = classes is None and job.labelled and traits.known
    refuse(
        *(
            (name in options, f"generate() has no option {name}: it makes it for each batch from the job")
            for name in ("noise", "generator", "model_kwargs")
        ),
        (undrawable, f"no film can show images of shape {job.shape}: leave it out, or take 1, 3 or 4 channels"),
        (lacking, f"the network is class-conditional: give labels or num_classes (up to {classes})"),
        (surplus, "the network is unconditional: give no labels, or hide them by guidance.without_labels(model)"),
    )
    if classes is not None:
        check_labels([*job.labels, max(job.num_classes - 1, 0)], classes)


def _manifest(process: GaussianDiffusion, model: Model, job: Job, options: SampleOptions) -> dict[str, Any]:
    """Everything that the result depends on, as JSON values."""
    labels, texts = list(job.labels), list(job.prompts)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    settings = {
        "shape": job.shape,
        "num_samples": job.num_samples,
        **({"start_index": job.start_index, "total": job.total} if job.total else {}),
        "batch_size": job.batch_size,
        "seed": job.seed,
        "labels": labels if len(labels) <= LISTED else fingerprint({"labels": np.asarray(labels)}),
        "random_classes": 0 if labels else job.num_classes,
        **({"prompts": texts if len(texts) <= LISTED else digest} if texts else {}),
        "sampler": repr(make_sampler(job.sampler)),
        "steps": process.num_timesteps,
        "schedule": fingerprint({"betas": process.betas, "timesteps": np.asarray(process.timestep_map)}),
        "prediction": f"{process.model_mean_type.name} {process.model_var_type.name} {process.rescale_timesteps}",
        "clip_denoised": job.decode is None,
    }
    loop: dict[str, Any] = {name: value for name, value in options.items() if name not in NOT_IN_THE_RESULT}
    for name, value in loop.items():
        if not isinstance(value, bool | int | float | str | None):
            loop[name] = fingerprint({"": value}) if isinstance(value, th.Tensor) else "given"
    return {**job.request, **settings, **loop, "device": _device(model, options).type}


def _claim(job: Job, manifest: Mapping[str, Any]) -> bool:
    """Make the folder this job's; True where its result is there already."""
    results = [os.path.basename(job.path), "samples.png", "shards", *["images"] * job.save_images]
    results += [*["film.png", "film.gif"] * (job.film > 0), *[NAMES] * bool(job.names)]
    finished = job.claim(manifest, results) and job.holds(job.path, job.size)
    if os.path.exists(job.path) and not finished:
        logger.warn(f"{job.path} was damaged after it was written: it is made again")
    return finished


def make_shards(
    process: GaussianDiffusion,
    model: Model,
    job: Job,
    *,
    rank: int = 0,
    world_size: int = 1,
    **options: Unpack[SampleOptions],
) -> None:
    """Sample and write the batches of one rank: batch b is rank b % world_size's. Those that are there stay.

    The first batch comes with its film.
    """
    missing, warned = job.missing(rank, world_size, log=logger.log), set[str]()
    decode: Any = job.decode or (lambda x, _: x)
    show = options.pop("progress", False) and rank == 0
    total = len(missing) * network_calls(process, make_sampler("ddim"), **options)  # which asks once in every step
    with logger.progress_bar(shown=show, total=total, desc="sampling", unit="step") as bar, evaluating(model):
        for batch in missing:
            film = None
            if job.film and batch == 0:
                film = Film(job.film, min(FILM_IMAGES, len(job.rows(0))), lambda x: decode(x, range(len(x))))
            outside: list[th.Tensor | None] = []

            def each(output: StepOutput, film: Film | None = film, outside: list[Any] = outside) -> None:
                bar.update()
                outside.append(output.get("guided_outside"))
                if film is not None:
                    film.collect(len(outside), output)

            x, labels = _sample_batch(process, model, job, batch, each, options)
            clipped = options.get("clip_guided") is not False
            warnings = {"plain": plain_images(x, batch), "strayed": _strayed(outside, clipped=clipped)}
            for kind in [kind for kind, text in warnings.items() if text and kind not in warned]:
                logger.warn(f"{warnings[kind]} (said once per rank)")
                warned.add(kind)
            if film is not None:
                film.save(job.file("film.png"), job.file("film.gif"))
            save_npz(job.shard(batch), to_uint8(x), *([] if labels is None else [labels.cpu().numpy()]))


def _sample_batch(
    process: GaussianDiffusion,
    model: Model,
    job: Job,
    batch: int,
    each: Callable[[StepOutput], object],
    options: SampleOptions,
) -> tuple[th.Tensor, th.Tensor | None]:
    """Images [count, C, H, W] and labels of one global batch, the padding dropped; `each` is called after each step."""
    device, count = _device(model, options), len(job.rows(batch))
    first = job.start_index + batch * job.batch_size
    indices = range(first, first + job.batch_size)
    generators = [image_generator(job.seed, index, device) for index in indices]
    with seeded(job.seed, first // job.batch_size, device):
        labels = job.draw_labels(indices, generators)
        kwargs: dict[str, Any] = {} if labels is None else {"y": labels}
        rows = [min(index, job.start_index + job.size - 1) for index in indices]  # the padding repeats the last image's
        if job.conditioning is not None:
            kwargs |= {name: value.to(device) for name, value in job.conditioning(rows).items()}
        loop: SampleOptions = {**options, "model_kwargs": kwargs, "generator": generators, "device": device}
        shape = job.shape
        if job.decode is not None:
            shape, loop = job.latent_shape, {"clip_denoised": False, **loop}
        if job.start is not None:
            loop = cast(SampleOptions, {**loop, **job.start(rows, kwargs)})
        for output in process.sample_loop_progressive(job.sampler, model, (len(rows), *shape), **loop):
            each(output)
        with th.no_grad():
            x = output["sample"] if job.decode is None else job.decode(output["sample"], rows)
    return x[:count], None if labels is None or not job.saves_labels else labels[:count]


def _device(model: Model, options: SampleOptions) -> th.device:
    """The device that was asked for, else the network's, else this rank's."""
    given = options.get("device")
    parameter = next(model.parameters(), None) if isinstance(model, th.nn.Module) else None
    return th.device(given) if given is not None else dist_util.dev() if parameter is None else parameter.device


def plain_images(x: th.Tensor, batch: int) -> str:
    """A warning of images that are of one colour; '' where there are none. Those that are not finite are refused."""
    pixels = x.flatten(1)
    broken = int((~pixels.isfinite().all(dim=1)).sum())
    fault = f"{broken} of the {len(x)} samples of batch {batch} have values that are not finite"
    remedy = "Else give --precision fp32 or a lower scale of guidance, and another --log_dir"
    refuse((broken, f"{fault}, and no result is written: do the diffusion flags fit those of the training? {remedy}"))
    plain = int((pixels.amax(dim=1) - pixels.amin(dim=1) < LEVEL).sum())
    cause = "do the diffusion flags fit those of the training, and is the model trained long enough?"
    return f"{plain} of the {len(x)} samples of batch {batch} are of one colour: {cause}" if plain else ""


def _strayed(outside: Sequence[th.Tensor | None], *, clipped: bool) -> str:
    """A warning of guidance that moves many values of x_0 out of their range; '' where it does not.

    :param outside: for each step the share of them in each image, None where it is not known.
    """
    known = [share.max() for share in outside if share is not None]
    worst = th.stack(known).max().item() if known else 0.0  # one wait for the device
    what = "where they were clipped" if clipped else "and --clip_guided clips them there: give True if images are blots"
    sentence = f"guidance moved {worst:.0%} of the values of a predicted x_0 far out of [-1, 1], {what}"
    return sentence if worst > STRAYED else ""


def merge(job: Job) -> None:
    """Put the shards together, batch by batch, and the prompts beside them."""
    arrays: dict[str, Any] = {f"arr_{number}": rows for number, rows in enumerate(job.merged())}
    if job.prompts:
        arrays[PROMPTS] = np.asarray([job.prompt(job.start_index + index) for index in range(job.size)])
    write_arrays(job.path, arrays)


def _draw_pictures(job: Job, rank: int, world_size: int) -> None:
    """samples.png and, where asked for, one PNG per image, shared out among the ranks."""
    if job.names and rank == 0:
        write_json(job.file(NAMES), {"file": os.path.basename(job.path), "names": list(job.names)})
    if not can_draw(job.shape):
        logger.log(f"no pictures: images of shape {job.shape} cannot be drawn, with 1, 3 or 4 channels they can")
        return
    if rank == 0:
        rows = (range(len(job.prompts)), job.prompts) if job.prompts else (job.labels, job.class_names)
        rows = ([], []) if job.start_index % max(len(rows[0]), 1) else rows  # which are those of images from 0 on
        draw_grid(job.file("samples.png"), job.path, *rows)
    if job.save_images:
        names, share = picture_names(job.names), {"rank": rank, "world_size": world_size, "first": job.start_index}
        images = (image for chunk in read_npz(job.path, "arr_0", CHUNK) for image in chunk)
        labels = np.concatenate([*read_npz(job.path, "arr_1", CHUNK)]) if job.saves_labels else None
        draw_each(job.file("images"), images, labels, names=names, prompts=job.prompts, **share)


def sampled(
    process: GaussianDiffusion,
    model: Model,
    job: Job,
    *,
    rank: int = 0,
    world_size: int = 1,
    **options: Unpack[SampleOptions],
) -> Iterator[tuple[th.Tensor, th.Tensor | None]]:
    """The batches of one rank that `make_shards` would write, in memory: images [n, C, H, W], and labels [n] if any."""
    _check(job, model, options)
    with evaluating(model):
        for batch in range(rank, job.batches, world_size):
            yield _sample_batch(process, model, job, batch, lambda _: None, options)


def preview(
    process: GaussianDiffusion,
    model: Model,
    shape: Sequence[int],
    *,
    labels: Sequence[int],
    seed: int,
    path: str,
    **fields: Any,
) -> Pixels:
    """Write a grid of few-step DDIM samples and return them; no generator but its own is touched.

    :param shape: of all images, [N, C, H, W].
    :param labels: taken in turn; empty for an unconditional network.
    :param fields: further ones of the `Job`.
    """
    kept = space_timesteps(process.num_timesteps, [min(PREVIEW_STEPS, process.num_timesteps)])
    few_steps = respaced(process, [float(process.timestep_map[int(t)]) for t in sorted(kept)])
    count, *image_shape = shape
    sizes: dict[str, Any] = {"shape": tuple(image_shape), "num_samples": count, "batch_size": count}
    job = Job(sampler="ddim", out_dir="", seed=seed, labels=labels, **sizes, **fields)
    [(x, _)] = sampled(few_steps, model, job)
    images = to_uint8(x)
    save_grid(path, images, math.ceil(math.sqrt(count)))
    return images
