"""Making and saving samples: seeded image by image, cut into global batches, restartable, merged into one npz.

Shapes: N images in all, B per batch, C channels, K classes. Images leave the loops as float [B, C, H, W] in [-1, 1]
and are kept as uint8 [N, H, W, C] (any number of space dimensions between batch and channels).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack, cast

import numpy as np
import numpy.typing as npt
import torch as th

from . import dist_util, logger
from .data.upsampling import NAMES, picture_names
from .gaussian_diffusion import GaussianDiffusion
from .respace import respaced, space_timesteps
from .runtime.files import PART, write_json
from .runtime.gallery import draw_each, draw_grid
from .runtime.jobs import LISTED, Job, check_labels
from .runtime.npz import fingerprint, holds, read_npz, save_npz, write_npz
from .runtime.pictures import Pixels, can_draw, save_grid, to_uint8
from .runtime.results import REQUEST, read_request, refuse_another
from .runtime.seeds import image_generator, seeded
from .runtime.trajectory import FILM_IMAGES, Film
from .sampling.loop import SampleOptions, network_calls
from .sampling.prediction import traits_of
from .sampling.samplers import make_sampler
from .sampling.steps import StepOutput

Model = Callable[..., th.Tensor]

PREVIEW_STEPS = 25
OWN_OPTIONS = ("noise", "generator", "model_kwargs")
NOT_IN_THE_RESULT = ("device", "progress", "callback")
STRAYED = 0.1  # share of the values of a guided x_0 outside of [-1, 1] that is worth a line


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The network in evaluation mode, and afterwards every module as it was."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, th.nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- one way out


def generate(process: GaussianDiffusion, model: Model, job: Job, **options: Unpack[SampleOptions]) -> str:
    """Make and save the images of a job; returns the path of the npz (arr_0 images, arr_1 labels if there are any).

    Image i of seed s is the same bit for bit for any number of ranks and any restart with the same batch size. Every
    rank calls this; all of them must see the same folder.

    :param options: of the sampling loop, e.g. `cond_fn`; what they are made of belongs into `job.request`.
    :raises ValueError: if the folder holds another request, or the labels do not fit the network.
    """
    _check(job, model, options)
    finished = dist_util.decide(lambda: _claim(job, _manifest(process, model, job, options)))
    if job.film and (finished or _is_whole(job, 0)) and not os.path.exists(job.file("film.gif")):
        logger.warn(
            f"no film: the images that it shows are made already; for a film give another folder than {job.out_dir}"
        )
    if finished:
        logger.log(f"{job.path} is there already, whole and of the same request: nothing to sample")
    else:
        rank, world_size = dist_util.rank(), dist_util.world_size()
        make_shards(process, model, job, rank=rank, world_size=world_size, **options)
        dist_util.barrier()
        dist_util.decide(lambda: merge(job))
    _draw_pictures(job)
    dist_util.barrier()
    return job.path


def _check(job: Job, model: Model, options: SampleOptions) -> None:
    for name in OWN_OPTIONS:
        if name in options:
            raise ValueError(f"generate() has no option {name}: it makes it for each batch from the job")
    if job.film and not can_draw(job.shape):
        raise ValueError(f"no film can show images of shape {job.shape}: leave it out, or take 1, 3 or 4 channels")
    traits = traits_of(model)
    classes = traits.num_classes
    if classes is not None and not job.labelled:
        raise ValueError(f"the network is class-conditional: give labels or num_classes (up to {classes})")
    if classes is None and job.labelled and traits.known:
        raise ValueError("the network is unconditional: give no labels, or hide them by guidance.without_labels(model)")
    if classes is not None:
        check_labels([*job.labels, job.num_classes - 1 if job.num_classes else 0], classes)


def _manifest(process: GaussianDiffusion, model: Model, job: Job, options: SampleOptions) -> dict[str, Any]:
    """Everything that the result depends on, as JSON values."""
    labels = list(job.labels)
    schedule = {"betas": process.betas, "timesteps": np.asarray(process.timestep_map)}
    own = {
        "shape": list(job.shape),
        "num_samples": job.num_samples,
        "batch_size": job.batch_size,
        "seed": job.seed,
        "labels": labels if len(labels) <= LISTED else fingerprint({"labels": np.asarray(labels)}),
        "random_classes": 0 if labels else job.num_classes,
        "sampler": repr(make_sampler(job.sampler)),
        "steps": process.num_timesteps,
        "schedule": fingerprint(schedule),
        "prediction": f"{process.model_mean_type.name} {process.model_var_type.name} {process.rescale_timesteps}",
    }
    chosen = {"clip_denoised": True, **options}
    loop = {name: _plain(value) for name, value in chosen.items() if name not in NOT_IN_THE_RESULT}
    where = {"device": _device(model, options).type}
    manifest: dict[str, Any] = json.loads(json.dumps({**job.request, **own, **loop, **where}))
    return manifest


def _plain(value: Any) -> Any:
    """A JSON value that stands for an option."""
    if isinstance(value, th.Tensor):
        return fingerprint({"": value})
    return value if value is None or isinstance(value, bool | int | float | str) else "given"


def _claim(job: Job, manifest: Mapping[str, Any]) -> bool:
    """Make the folder this job's; True where its result is there already.

    :raises ValueError: if the folder is another job's.
    """
    path = job.file(REQUEST)
    finished = _holds(job, job.path, job.num_samples)
    if os.path.exists(path):
        refuse_another(read_request(path), manifest, job.out_dir, defaults=job.request_defaults)
        if os.path.exists(job.path) and not finished:
            logger.warn(f"{job.path} was damaged after it was written: it is made again")
        return finished
    names = (
        "samples.png",
        "shards",
        *["images"] * job.save_images,
        *["film.png", "film.gif"] * (job.film > 0),
        *[NAMES] * bool(job.names),
    )
    for taken in (job.path, *(job.file(name) for name in names)):
        if os.path.exists(taken):
            raise ValueError(f"{taken} exists and no request.json says what it is: give another --log_dir or remove it")
    write_json(path, manifest)
    return False


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

    :raises ValueError: if images are not finite.
    """
    own = range(rank, job.batches, world_size)
    missing = [batch for batch in own if not _is_whole(job, batch)]
    if len(missing) < len(own):
        logger.log(f"going on where an earlier run stopped: {len(own) - len(missing)} of {len(own)} batches are there")
    show = options.pop("progress", False) and rank == 0
    steps = network_calls(process, make_sampler("ddim"), **options)  # which asks once in every step
    reported = strayed = False
    with (
        logger.progress_bar(shown=show, total=len(missing) * steps, desc="sampling", unit="step") as bar,
        evaluating(model),
    ):
        for batch in missing:
            outside: list[th.Tensor | None] = []

            def each(output: StepOutput, outside: list[th.Tensor | None] = outside) -> None:
                bar.update()
                outside.append(output.get("guided_outside"))

            x, labels = _sample_batch(process, model, job, batch, each, options)
            _check_finite(x, batch)
            reported = reported or _report(x, batch)
            strayed = strayed or _report_strayed(outside, clipped=options.get("clip_guided") is not False)
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
    device = _device(model, options)
    indices = range(batch * job.batch_size, (batch + 1) * job.batch_size)
    generators = [image_generator(job.seed, index, device) for index in indices]
    with seeded(job.seed, batch, device):
        labels = job.draw_labels(indices, generators)
        kwargs: dict[str, Any] = {} if labels is None else {"y": labels}
        own = [min(index, job.num_samples - 1) for index in indices]  # the padding repeats the last image's
        if job.conditioning is not None:
            kwargs |= {name: value.to(device) for name, value in job.conditioning(own).items()}
        loop: SampleOptions = {**options, "model_kwargs": kwargs, "generator": generators, "device": device}
        if job.start is not None:
            loop = cast(SampleOptions, {**loop, **job.start(own, kwargs)})
        shape = (len(indices), *job.shape)
        with _filmed(job, batch, loop):
            for output in process.sample_loop_progressive(job.sampler, model, shape, **loop):
                each(output)
    count = job.count(batch)
    return output["sample"][:count], None if labels is None else labels[:count]


@contextlib.contextmanager
def _filmed(job: Job, batch: int, loop: SampleOptions) -> Iterator[None]:
    """Film what happens in the loop, where a film is asked for: in the first batch."""
    if not job.film or batch:
        yield
        return
    film, others = Film(job.film, min(FILM_IMAGES, job.count(batch))), loop.get("callback")

    def collect(index: int, output: Any) -> None:
        film.collect(index, output)
        if others is not None:
            others(index, output)

    loop["callback"] = collect
    yield
    film.save(job.file("film.png"), job.file("film.gif"))


def _device(model: Model, options: SampleOptions) -> th.device:
    """The device that was asked for, else the network's, else this rank's."""
    given = options.get("device")
    parameter = next(model.parameters(), None) if isinstance(model, th.nn.Module) else None
    return th.device(given) if given is not None else dist_util.dev() if parameter is None else parameter.device


def _check_finite(x: th.Tensor, batch: int) -> None:
    """:raises ValueError: if images are not finite; nothing of their batch is kept, and those before it are."""
    broken = int((~x.flatten(1).isfinite().all(dim=1)).sum())
    if broken:
        raise ValueError(
            f"{broken} of the {len(x)} samples of batch {batch} have values that are not finite, and no result is "
            "written: do the diffusion flags fit those of the training? Else give --precision fp32 or a lower scale of "
            "guidance, and another --log_dir"
        )


def _report(x: th.Tensor, batch: int) -> bool:
    """Warn of images that are of one colour; True if there are any."""
    pixels = x.flatten(1)
    plain = int((pixels.amax(dim=1) - pixels.amin(dim=1) < 1 / 127.5).sum())
    if plain:
        logger.warn(
            f"{plain} of the {len(x)} samples of batch {batch} are of one colour: do the diffusion flags fit those of "
            "the training, and is the model trained long enough? (said once per rank)"
        )
    return plain > 0


def _report_strayed(outside: Sequence[th.Tensor | None], *, clipped: bool) -> bool:
    """Say where guidance moves many values of x_0 out of their range; True if it does.

    :param outside: for each step the share of them in each image, None where it is not known.
    """
    known = {step: share.max() for step, share in enumerate(outside, start=1) if share is not None}
    shares = th.stack(list(known.values())).tolist() if known else [0.0]
    if max(shares) <= STRAYED:
        return False
    what = "where they were clipped" if clipped else "and --clip_guided clips them there: give True if images are blots"
    logger.log(
        f"guidance moved {max(shares):.0%} of the values of a predicted x_0 far out of [-1, 1] in step "
        f"{list(known)[shares.index(max(shares))]} of {len(outside)}, {what} (said once per rank)"
    )
    return True


def _is_whole(job: Job, batch: int) -> bool:
    """Whether the shard of a batch is there; one that a disk damaged since it was written counts as missing."""
    return _holds(job, job.shard(batch), job.count(batch))


def _holds(job: Job, path: str, images: int) -> bool:
    """Whether a file has that many images of the job, and their labels."""
    labels = [((images,), np.int64)] if job.labelled else []
    return holds(path, ((images, *job.stored_shape[1:]), np.uint8), *labels)


def merge(job: Job) -> None:
    """Put the shards together, batch by batch.

    :raises ValueError: if one is missing or damaged.
    """
    missing = [batch for batch in range(job.batches) if not _is_whole(job, batch)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {job.batches} batches are missing in {job.file('shards')}, the first is {missing[0]}: "
            "all ranks must write to the same folder"
        )

    def column(name: str) -> Iterator[npt.NDArray[Any]]:
        for batch in range(job.batches):
            yield from _shard(job, batch, name)

    labels = [((job.num_samples,), np.int64, column("arr_1"))] if job.labelled else []
    write_npz(job.path, (job.stored_shape, np.uint8, column("arr_0")), *labels)


def _shard(job: Job, batch: int, name: str) -> Iterator[npt.NDArray[Any]]:
    """One array of the shard of a batch."""
    path = job.shard(batch)
    try:
        yield from read_npz(path, name, job.batch_size)
    except ValueError as error:
        os.remove(path)
        raise ValueError(
            f"{path} was damaged after it was written ({error}): it is removed, run the same command again"
        ) from error


def _draw_pictures(job: Job) -> None:
    """samples.png and, where asked for, one PNG per image, shared out among the ranks; then the shards may go."""
    rank, world_size = dist_util.rank(), dist_util.world_size()
    if job.names and rank == 0:
        write_json(job.file(NAMES), {"file": os.path.basename(job.path), "names": list(job.names)})
    if not can_draw(job.shape):
        logger.log(f"no pictures: images of shape {job.shape} cannot be drawn, with 1, 3 or 4 channels they can")
    else:
        if rank == 0:
            draw_grid(job.file("samples.png"), job.path, job.labels, job.class_names)
        if job.save_images:
            share = {"rank": rank, "world_size": world_size}
            draw_each(job.file("images"), job.path, labelled=job.labelled, names=picture_names(job.names), **share)
    if rank == 0:
        _tidy(job)


def _tidy(job: Job) -> None:
    """Remove the shards, and what runs that were killed left half written."""
    shutil.rmtree(job.file("shards"), ignore_errors=True)
    ours = (os.path.basename(job.path), REQUEST)
    for name in os.listdir(job.out_dir):
        stem, part, _ = name.partition(PART)
        if part and stem in ours:
            os.remove(job.file(name))


def sampled(
    process: GaussianDiffusion,
    model: Model,
    job: Job,
    *,
    rank: int = 0,
    world_size: int = 1,
    **options: Unpack[SampleOptions],
) -> Iterator[tuple[int, Pixels]]:
    """The batches of one rank as `make_shards` would write them, in memory: (batch, uint8 [n, H, W, C])."""
    with evaluating(model):
        for batch in range(rank, job.batches, world_size):
            yield batch, to_uint8(_sample_batch(process, model, job, batch, lambda _: None, options)[0])


def preview(
    process: GaussianDiffusion, model: Model, shape: Sequence[int], *, labels: Sequence[int], seed: int, path: str
) -> Pixels:
    """Write a grid of few-step DDIM samples and return them; no generator but its own is touched.

    :param shape: of all images, [N, C, H, W].
    :param labels: taken in turn; empty for an unconditional network.
    """
    job = Job(
        sampler=make_sampler("ddim"),
        shape=tuple(shape[1:]),
        num_samples=shape[0],
        batch_size=shape[0],
        out_dir=os.path.dirname(path),
        seed=seed,
        labels=labels,
    )
    [(_, images)] = sampled(_few_steps(process), model, job)
    save_grid(path, images, math.ceil(math.sqrt(len(images))))
    return images


def _few_steps(process: GaussianDiffusion) -> GaussianDiffusion:
    """The same process in at most 25 of its steps."""
    kept = space_timesteps(process.num_timesteps, [min(PREVIEW_STEPS, process.num_timesteps)])
    return respaced(process, [float(process.timestep_map[int(t)]) for t in sorted(kept)])
