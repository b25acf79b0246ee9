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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoint import save_json
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.npz import fingerprint, read_npz, save_npz, write_npz
from guided_diffusion.pictures import DRAWN_CHANNELS, save_grid, save_png
from guided_diffusion.respace import space_timesteps
from guided_diffusion.samplers import SampleOptions, Sampler, make_sampler
from guided_diffusion.seeds import image_generator, seeded

Pixels = npt.NDArray[np.uint8]
Model = Callable[..., th.Tensor]
Conditioning = Callable[[Sequence[int]], Mapping[str, th.Tensor]]

GRID_IMAGES = 100
PREVIEW_STEPS = 25
LISTED = 32  # longer lists of labels are recorded by their digest
OWN_OPTIONS = ("noise", "generator", "model_kwargs")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to sample, and where it goes.

    :param sampler: the step rule, e.g. ``make_sampler("ddim")``.
    :param shape: of one image, (C, H, W).
    :param labels: class ids taken in turn: image i gets labels[i % len(labels)].
    :param num_classes: without `labels`, image i draws its label from range(num_classes); 0: no labels at all.
    :param class_names: names by class id, for the rows of the grid.
    :param conditioning: indices of a batch -> further keyword arguments of the network, one row per index.
    :param request: what else identifies the run (weights, guidance scale, ...), as JSON values.
    :param save_images: write one PNG per image too.
    """

    sampler: Sampler
    shape: tuple[int, ...]
    num_samples: int
    batch_size: int
    out_dir: str
    seed: int = 0
    labels: Sequence[int] = ()
    num_classes: int = 0
    class_names: Sequence[str] = ()
    conditioning: Conditioning | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    save_images: bool = False

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1, the least number of images")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative: give 0 or more")
        check_labels(self.labels, self.num_classes or math.inf)

    @property
    def batches(self) -> int:
        """Number of global batches, the last one padded."""
        return math.ceil(self.num_samples / self.batch_size)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return bool(self.labels) or self.num_classes > 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the result, channels last."""
        return (self.num_samples, *self.shape[1:], self.shape[0])

    @property
    def path(self) -> str:
        """Where the merged result goes."""
        return self.file(f"samples_{'x'.join(str(side) for side in self.stored_shape)}.npz")

    def file(self, *names: str) -> str:
        """The path of a file of this job."""
        return os.path.join(self.out_dir, *names)

    def shard(self, batch: int) -> str:
        """Where one global batch goes until all are merged."""
        return self.file("shards", f"{batch:06d}.npz")

    def count(self, batch: int) -> int:
        """How many images of a global batch are kept: the last one's padding is not."""
        return min(self.batch_size, self.num_samples - batch * self.batch_size)

    def draw_labels(self, indices: Sequence[int], generators: Sequence[th.Generator]) -> th.Tensor | None:
        """Labels [B] of the images with these indices, or None; random ones are the first draw of each generator."""
        if self.labels:
            return th.tensor([self.labels[i % len(self.labels)] for i in indices], device=generators[0].device)
        if not self.num_classes:
            return None
        draws = [th.randint(self.num_classes, (), device=g.device, generator=g) for g in generators]
        return th.stack(draws)


def check_labels(labels: Iterable[int], num_classes: float) -> None:
    """Refuse labels outside of 0 .. num_classes - 1.

    :raises ValueError: naming the first of them and the range.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            allowed = f"0 .. {num_classes - 1}" if num_classes < math.inf else "0 or more"
            raise ValueError(f"class {label} does not exist: the classes are {allowed}")


def parse_classes(text: str, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Class ids from "207,360" or from names; a number always is an id.

    :param names: names by class id, as in classes.json.
    :raises ValueError: for an id out of range, an unknown name, or none at all.
    """
    labels = [_class_id(word.strip(), names) for word in text.split(",") if word.strip()]
    if not labels:
        raise ValueError(f"classes {text!r} names no class: write ids or names with commas in between")
    check_labels(labels, num_classes)
    return labels


def _class_id(word: str, names: Sequence[str]) -> int:
    if word.lstrip("-").isdecimal():
        return int(word)
    if word not in names:
        known = (
            f"the names are {', '.join(names[:LISTED])}" if names else "there is no classes.json with names: give ids"
        )
        raise ValueError(f"class {word!r} is unknown: {known}")
    return list(names).index(word)


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


def to_uint8(x: th.Tensor) -> Pixels:
    """uint8 [N, H, W, C] from [N, C, H, W] in [-1, 1]: (x + 1) * 127.5 clamped and truncated; NaN becomes black."""
    levels = ((x.detach() + 1) * 127.5).nan_to_num(nan=0.0).clamp(0, 255).to(th.uint8)
    pixels: Pixels = levels.movedim(1, -1).contiguous().cpu().numpy()
    return pixels


# ---- one way out


def generate(process: GaussianDiffusion, model: Model, job: Job, **options: Unpack[SampleOptions]) -> str:
    """Make and save the images of a job; returns the path of the npz (arr_0 images, arr_1 labels if there are any).

    Image i of seed s is the same bit for bit for any number of ranks and any restart with the same batch size. Every
    rank calls this; all of them must see the same folder.

    :param options: of the sampling loop, e.g. `cond_fn`; what they are made of belongs into `job.request`.
    :raises ValueError: if the folder holds another request, or the labels do not fit the network.
    """
    _check(job, model, options)
    if _broadcast(lambda: _claim(job, _manifest(process, model, job, options))):
        logger.log(f"{job.path} is there already, whole and of the same request: nothing to sample")
    else:
        rank, world_size = dist_util.rank(), dist_util.world_size()
        make_shards(process, model, job, rank=rank, world_size=world_size, **options)
        dist_util.barrier()
        _broadcast(lambda: merge(job))
    _draw_pictures(job)
    dist_util.barrier()
    return job.path


def _check(job: Job, model: Model, options: SampleOptions) -> None:
    for name in OWN_OPTIONS:
        if name in options:
            raise ValueError(f"generate() has no option {name}: it makes it for each batch from the job")
    classes = getattr(model, "num_classes", None)
    if classes is not None and not job.labelled:
        raise ValueError(f"the network is class-conditional: give labels or num_classes (up to {classes})")
    if classes is None and job.labelled and hasattr(model, "num_classes"):
        raise ValueError("the network is unconditional: give no labels, or hide them by guidance.without_labels(model)")
    if classes is not None:
        check_labels([*job.labels, job.num_classes - 1 if job.num_classes else 0], classes)


def _broadcast(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, on every rank; its error is a ValueError on every rank, so that none waits for ever."""
    answer: tuple[Any, str] = (None, "")
    if dist_util.rank() == 0:
        try:
            answer = (decide(), "")
        except (ValueError, OSError) as error:
            answer = (None, str(error))
    result, error_text = dist_util.broadcast_object(answer)
    if error_text:
        raise ValueError(error_text)
    return result


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
        "sampler": repr(job.sampler),
        "steps": process.num_timesteps,
        "schedule": fingerprint(schedule),
        "prediction": f"{process.model_mean_type.name} {process.model_var_type.name} {process.rescale_timesteps}",
    }
    chosen = {"clip_denoised": True, **options}
    loop = {name: _plain(value) for name, value in chosen.items() if name not in ("device", "progress")}
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
    path = job.file("request.json")
    finished = os.path.exists(job.path)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            _compare(json.load(file), manifest, job.out_dir)
        return finished
    names = ("samples.png", "shards", *["images"] * job.save_images)
    for taken in (job.path, *(job.file(name) for name in names)):
        if os.path.exists(taken):
            raise ValueError(f"{taken} exists and no request.json says what it is: give another --log_dir or remove it")
    save_json(path, manifest)
    return False


def _compare(there: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if differing:
        words = ", ".join(f"{key} was {there.get(key)} and is {now.get(key)}" for key in differing[:4])
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(f"{folder} holds the samples of another request ({words}{more}): give another --log_dir")


def make_shards(
    process: GaussianDiffusion,
    model: Model,
    job: Job,
    *,
    rank: int = 0,
    world_size: int = 1,
    **options: Unpack[SampleOptions],
) -> None:
    """Sample and write the batches of one rank: batch b is rank b % world_size's. Those that are there stay."""
    own = range(rank, job.batches, world_size)
    missing = [batch for batch in own if not _is_whole(job, batch)]
    if len(missing) < len(own):
        logger.log(f"going on where an earlier run stopped: {len(own) - len(missing)} of {len(own)} batches are there")
    show = options.pop("progress", False) and rank == 0
    steps = len(missing) * (process.num_timesteps - options.get("skip_timesteps", 0))
    reported = False
    with logger.progress_bar(shown=show, total=steps, desc="sampling", unit="step") as bar, evaluating(model):
        for batch in missing:
            x, labels = _sample_batch(process, model, job, batch, bar, options)
            reported = reported or _report(x, batch)
            save_npz(job.shard(batch), to_uint8(x), *([] if labels is None else [labels.cpu().numpy()]))


def _sample_batch(
    process: GaussianDiffusion, model: Model, job: Job, batch: int, bar: Any, options: SampleOptions
) -> tuple[th.Tensor, th.Tensor | None]:
    """Images [count, C, H, W] and labels of one global batch, the padding dropped."""
    device = _device(model, options)
    indices = range(batch * job.batch_size, (batch + 1) * job.batch_size)
    generators = [image_generator(job.seed, index, device) for index in indices]
    with seeded(job.seed, batch, device):
        labels = job.draw_labels(indices, generators)
        kwargs: dict[str, Any] = {} if labels is None else {"y": labels}
        if job.conditioning is not None:
            rows = job.conditioning([min(index, job.num_samples - 1) for index in indices])
            kwargs |= {name: value.to(device) for name, value in rows.items()}
        loop: SampleOptions = {**options, "model_kwargs": kwargs, "generator": generators, "device": device}
        shape = (len(indices), *job.shape)
        for output in process.sample_loop_progressive(job.sampler, model, shape, **loop):  # noqa: B007 - the last counts
            bar.update()
    count = job.count(batch)
    return output["sample"][:count], None if labels is None else labels[:count]


def _device(model: Model, options: SampleOptions) -> th.device:
    """The device that was asked for, else the network's, else this rank's."""
    given = options.get("device")
    parameter = next(model.parameters(), None) if isinstance(model, th.nn.Module) else None
    return th.device(given) if given is not None else dist_util.dev() if parameter is None else parameter.device


def _report(x: th.Tensor, batch: int) -> bool:
    """Warn of images that are not finite or of one colour; True if there are any."""
    pixels = x.flatten(1)
    broken = int((~pixels.isfinite().all(dim=1)).sum())
    plain = int((pixels.amax(dim=1) - pixels.amin(dim=1) < 1 / 127.5).sum())
    for count, what in ((broken, "have values that are not finite"), (plain, "are of one colour")):
        if count:
            logger.warn(
                f"{count} of the {len(x)} samples of batch {batch} {what}: do the diffusion flags fit those of the "
                "training, and is the model trained long enough? (said once per rank)"
            )
    return broken + plain > 0


def _is_whole(job: Job, batch: int) -> bool:
    """Whether the shard of a batch is there; it was written whole or not at all."""
    return os.path.exists(job.shard(batch))


def merge(job: Job) -> None:
    """Put the shards together, batch by batch, and remove them.

    :raises ValueError: if one is missing.
    """
    missing = [batch for batch in range(job.batches) if not _is_whole(job, batch)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {job.batches} batches are missing in {job.file('shards')}, the first is {missing[0]}: "
            "all ranks must write to the same folder"
        )

    def column(name: str) -> Iterator[npt.NDArray[Any]]:
        for batch in range(job.batches):
            yield from read_npz(job.shard(batch), name, job.batch_size)

    labels = [((job.num_samples,), np.int64, column("arr_1"))] if job.labelled else []
    write_npz(job.path, (job.stored_shape, np.uint8, column("arr_0")), *labels)


def _draw_pictures(job: Job) -> None:
    """samples.png and, where asked for, one PNG per image, shared out among the ranks; then the shards may go."""
    rank, world_size = dist_util.rank(), dist_util.world_size()
    if len(job.shape) != 3 or job.shape[0] not in DRAWN_CHANNELS:
        logger.log(f"no pictures: images of shape {job.shape} cannot be drawn, with 1, 3 or 4 channels they can")
    else:
        if rank == 0:
            _draw_grid(job)
        if job.save_images:
            _draw_each(job, rank, world_size)
    if rank == 0:
        shutil.rmtree(job.file("shards"), ignore_errors=True)


def _draw_each(job: Job, rank: int, world_size: int) -> None:
    """images/NNNNNN_yK.png of every world_size-th image."""
    os.makedirs(job.file("images"), exist_ok=True)
    labels = np.concatenate(list(read_npz(job.path, "arr_1", job.num_samples))) if job.labelled else None
    images = (image for chunk in read_npz(job.path, "arr_0", job.batch_size) for image in chunk)
    for index, image in enumerate(images):
        if index % world_size == rank:
            suffix = "" if labels is None else f"_y{labels[index]}"
            save_png(job.file("images", f"{index:06d}{suffix}.png"), image)


def _draw_grid(job: Job) -> None:
    """The first images in one picture; a row for each class where they take turns."""
    images = next(read_npz(job.path, "arr_0", min(job.num_samples, GRID_IMAGES)))
    turns = len(job.labels)
    columns = len(images) // turns if turns > 1 else 0
    if columns < 2:
        save_grid(job.file("samples.png"), images, math.ceil(math.sqrt(len(images))))
        return
    rows = np.arange(columns * turns).reshape(columns, turns).T
    named = dict(enumerate(job.class_names))
    names = [named.get(label, f"class {label}") for label in job.labels]
    save_grid(job.file("samples.png"), images[rows.ravel()], columns, names)


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
    with evaluating(model), logger.progress_bar(shown=False) as bar:
        images = to_uint8(_sample_batch(_few_steps(process), model, job, 0, bar, {})[0])
    save_grid(path, images, math.ceil(math.sqrt(len(images))))
    return images


def _few_steps(process: GaussianDiffusion) -> GaussianDiffusion:
    """The same process in at most 25 of its steps."""
    kept = sorted(space_timesteps(process.num_timesteps, [min(PREVIEW_STEPS, process.num_timesteps)]))
    levels = np.append(1.0, process.alphas_cumprod[kept])
    return GaussianDiffusion(
        betas=1 - levels[1:] / levels[:-1],
        model_mean_type=process.model_mean_type,
        model_var_type=process.model_var_type,
        loss_type=process.loss_type,
        rescale_timesteps=process.rescale_timesteps,
        timestep_map=[process.timestep_map[t] for t in kept],
        original_num_steps=process.original_num_steps,
    )
