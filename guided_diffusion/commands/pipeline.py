"""A trained model as one object: ``load("runs/mine").sample(classes=["cat"], steps=20)``, as the scripts sample.

The options are the scripts' flags, the functions are those that the scripts call, and so are the images, bit for bit
for the same seed and batch size; but nothing is written, no process group is made, and nothing is printed unless asked.

Shapes: N images, H W space, C channels.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from PIL import Image

from .. import dist_util, logger
from ..config import ClassifierConfig, CompileConfig, ProcessConfig, SuperResConfig, UNetConfig
from ..data.labels import listed_classes
from ..evaluation.likelihood import measured
from ..networks.architecture import GLIDE
from ..runtime import files
from ..runtime.errors import WHY, UserError, as_user_error, nearest, refuse
from ..runtime.npz import PROMPTS, write_arrays
from ..runtime.options import means_not_given, reader_of
from ..runtime.pictures import Pixels, as_picture, draw_each, grid_of_classes, save_picture, to_uint8
from ..sample_util import plain_images, sampled
from ..sampling.guidance import combine
from ..training.checkpoints import CLASSIFIER, UPSAMPLER, Checkpoint, open_checkpoint
from . import editing, image_nll, presets, prompts, sampling
from .common import Plan, Restored, restore
from .flags import COMMANDS, Flags, command_of
from .sections import SEED_STEP, AdapterConfig
from .synonyms import flag_instead

Images = Any  # a path; or uint8 [N, H, W, C] or [H, W, C], float [N, C, H, W] in [-1, 1], a picture, or Samples

SAMPLE, ENLARGE, MEASURE = "classifier_sample", "super_res_sample", "image_nll"
BATCH = 16  # images per pass of the network, unless there are fewer
MANY = 250  # evaluations for a batch, from which on whoever chose neither sampler nor steps is told of fewer
PATHS = ("init_image", "mask", "interpolate", "cond_images", "base_samples", "data_dir")  # where images may be given
TEXTS = "prompts"  # a path where a list may be given
LOOP = ("cond_fn", "cond_fn_with_grad", "callback", "progress")  # what the loop takes beside flags
OF_THE_NETWORK = {
    spec.name
    for section in (UNetConfig, SuperResConfig, ClassifierConfig, AdapterConfig, CompileConfig, ProcessConfig)
    for spec in fields(section)
} | {"learn_sigma", "model_path", "classifier_path", "device", "verbose", "classifier", "upsampler"}
OF_FILES = {"log_dir": ".save(PATH) of the samples", "save_images": ".save(FOLDER) of the samples"}
OF_FILES["save_intermediate"] = "callback=film.collect of a runtime.pictures.Film"


@dataclass(frozen=True)
class Samples:
    """Images, and what they show of: a notebook draws them.

    :param images: uint8 [N, H, W, C].
    :param labels: class ids [N], None where there are none.
    :param classes: names by class id, [] where they are not known.
    :param turns: the classes that were asked for in turn, [] for random ones.
    :param prompts: the texts that they were made for, in turn.
    """

    images: Pixels = field(repr=False)
    labels: npt.NDArray[np.int64] | None = None
    classes: Sequence[str] = ()
    turns: Sequence[int] = ()
    prompts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def pil(self) -> list[Image.Image]:
        """Each image as a picture of PIL."""
        return list(map(as_picture, self.images))

    def grid(self) -> Image.Image:
        """The first 100 in one picture, a row for each class or prompt where they take turns."""
        rows = (range(len(self.prompts)), self.prompts) if self.prompts else (self.turns, self.classes)
        return grid_of_classes(self.images, *rows)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.grid().save(file, format="PNG")
        return file.getvalue()

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write an npz (arr_0, labels as arr_1, prompts), a picture (.png: the grid), or a PNG of each in a folder.

        :return: the path.
        """
        path = files.local(path)
        if path.endswith(".npz"):
            texts = np.asarray([*islice(cycle(self.prompts), len(self))]) if self.prompts else None
            arrays = {"arr_0": self.images, "arr_1": self.labels, PROMPTS: texts}
            write_arrays(path, {name: array for name, array in arrays.items() if array is not None})
        elif path.endswith(".png"):
            save_picture(path, self.grid())
        else:
            draw_each(path, self.images, self.labels, prompts=self.prompts)
        return path


def load(
    source: str | os.PathLike[str],
    *,
    classifier: str | os.PathLike[str] = "",
    upsampler: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    device: str = "",
    verbose: bool = False,
    **options: Any,
) -> Model:
    """A trained model, ready to sample from.

    :param source: a name that ``guided-diffusion models list`` prints, the folder of a run, or a checkpoint: a
        diffusion model or an upsampler.
    :param classifier: of noisy images, to guide with: its name, run or checkpoint; '' for that of a named model.
    :param upsampler: those that `upsample` goes through, in this order: their names, runs or checkpoints; () for that
        of a named model.
    :param device: cpu, cuda, cuda:1 or mps; '' takes a GPU where there is one.
    :param verbose: print what the scripts log; else only their warnings are shown, by the module warnings.
    :param options: further flags of the sampling scripts, such as precision="bf16", which hold for every call.
    :raises UserError: naming what to give instead.
    """
    several = [upsampler] if isinstance(upsampler, str | os.PathLike) else upsampler
    guide, enlargers, path = os.fspath(classifier), [os.fspath(each) for each in several if each], os.fspath(source)
    preset = presets.get(options["preset"]) if options.get("preset") else presets.find(path)
    if preset is not None:
        options = {**preset.flags, **options, "preset": preset.name}
        path = preset.path if presets.find(path) == preset else path
        guide = guide or preset.companion("classifier")
        enlargers = enlargers or [each for each in [preset.companion("upsampler")] if each]
    with _logging(verbose), dist_util.computing_on(device):
        checkpoint = _opened(path)
        kind = preset.kind if preset and preset.file else checkpoint.kind
        if kind == CLASSIFIER:
            other = "give it as classifier= beside a diffusion model"
            raise UserError(f"{path} is a classifier, which guides others: {other}")
        enlargers = enlargers or _upsampler_beside(checkpoint)
        flags = _flags_of(ENLARGE if kind == UPSAMPLER else SAMPLE, {**options, "model_path": path})
        return Model(restore(flags, checkpoint=checkpoint), guide, enlargers, verbose)


def _opened(path: str) -> Checkpoint:
    if not files.exists(path):
        hint = nearest(path, presets.all_presets()) or ": 'guided-diffusion models list' prints the names"
        raise UserError(f"{path!r} is no file, no folder, and no model that has a name{hint}")
    return open_checkpoint(path, "the model")


def _upsampler_beside(checkpoint: Checkpoint) -> list[str]:
    """The upsampler in the folder of a base network of GLIDE, by the names that they are published under."""
    folder, name = os.path.split(checkpoint.path)
    path = files.join(folder or ".", name.replace("base", "upsample"))
    return [path] if checkpoint.flags.get("text_encoder") == GLIDE and "base" in name and files.exists(path) else []


def _flags_of(name: str, values: Mapping[str, Any], others: Sequence[str] = ()) -> Flags:
    """The flags of a command from values of Python, each read as its text on a command line is; None is not given.

    :param values: a list stands for its items with commas between them.
    :param others: further words to mean by a misspelt one.
    :raises UserError: for a name that is no flag of the command, or a value out of the flag's limits.
    """
    command = command_of(name)
    specs, given = command.flags(), dict[str, Any]()
    for word, value in values.items():
        if word not in specs:
            hint = flag_instead(word, [*command.words(), *others], f"; those of {name}.py --help are")
            raise UserError(f"{word!r} is no option{hint.replace('mean --', 'mean ')}")
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            with as_user_error(f"{word}: {WHY}", UserError):
                given[word] = reader_of(specs[word])(text)
    return Flags(name, {word: value for word, value in given.items() if not means_not_given(specs[word], value)})


class _Warnings(logger.SeqWriter):
    def writeseq(self, seq: Iterable[str]) -> None:
        warnings.warn(" ".join(seq), stacklevel=5)


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Let the log go to stdout inside the block, or nothing but its warnings to the module warnings."""
    before = logger.Logger.CURRENT
    inside = logger.Logger(dir="", output_formats=[logger.HumanOutputFormat(sys.stdout) if verbose else _Warnings()])
    inside.set_level(logger.INFO if verbose else logger.WARN)
    logger.Logger.CURRENT = inside
    try:
        yield
    finally:
        logger.Logger.CURRENT = before


@contextmanager
def _as_paths(options: Mapping[str, Any], labels: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """The options with paths in place of images and lists of prompts, which are there as long as the block lasts."""
    texts = options.get("prompt")
    options = {**options, "prompt": None, TEXTS: texts} if isinstance(texts, list | tuple) else options
    given = {name: options.get(name) for name in (*PATHS, TEXTS)}
    images = {name: value for name, value in given.items() if not isinstance(value, str | os.PathLike | None)}
    if not images:
        yield dict(options)
        return
    with tempfile.TemporaryDirectory(prefix="guided-diffusion-") as folder:
        paths = {name: os.path.join(folder, f"{name}.{'txt' if name == TEXTS else 'npz'}") for name in images}
        for name, path in paths.items():
            _write(path, name, images[name], labels)
        yield {**options, **paths}


def _write(path: str, name: str, value: Any, labels: Sequence[int] | None) -> None:
    if name == TEXTS:
        lines = [" ".join(text.split()) for text in value]
        refuse((not all(lines), "a text of prompt is empty: leave it out"))
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        return
    ids = None if labels is None else np.asarray(labels, np.int64)
    (value if isinstance(value, Samples) else Samples(_pixels(value, name), ids)).save(path)


def _pixels(value: Images, name: str) -> Pixels:
    """Images as an npz holds them: uint8 [N, H, W, C], or [N, H, W] of masks."""
    if isinstance(value, Samples):
        return value.images
    if isinstance(value, list | tuple):
        return np.concatenate([_pixels(each, name) for each in value])
    if isinstance(value, th.Tensor) and value.ndim in (3, 4):
        return to_uint8(value if value.ndim == 4 else value[None])
    if isinstance(value, Image.Image):
        value = value.convert("L" if name == "mask" else value.mode if value.mode in ("L", "RGBA") else "RGB")
    array = np.asarray(value)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    several = array.ndim == 4 or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4))
    forms = "a path, a picture of PIL, uint8 [H, W, C] or [N, H, W, C], or a float tensor [N, C, H, W] in [-1, 1]"
    odd = array.dtype != np.uint8 or array.ndim not in (2, 3, 4)
    refuse((odd, f"{name} {array.dtype} {list(array.shape)} is no image: give {forms}"))
    return array if several else array[None]


class Model:
    """A trained network with its process, and the classifier and upsamplers that go with it. `load` makes it.

    :ivar network: in evaluation mode, on its device.
    :ivar diffusion: the process, as the options of `load` have it.
    :ivar classes: names of its classes by id, [] where they are not known.
    :ivar path: of the checkpoint.
    """

    def __init__(self, restored: Restored, classifier: str, upsamplers: Sequence[str], verbose: bool) -> None:
        self._restored, self._verbose, self._device = restored, verbose, str(dist_util.dev())
        self._guide: str | Restored = classifier
        self._upsamplers: list[str | Model] = list(upsamplers)
        self.network, self.diffusion = restored.network, restored.process
        self.classes, self.path = restored.classes, restored.path

    def __repr__(self) -> str:
        values = self._restored.flags.values
        size = values.get("large_size", values.get("image_size"))
        return f"{type(self).__name__}({self.path!r}, image_size={size}, device={self._device!r})"

    @property
    def config(self) -> dict[str, Any]:
        """Every flag of the scripts that sample, as it holds for this model."""
        return self._restored.flags.values

    @property
    def classifier(self) -> th.nn.Module | None:
        """The network of its classifier, read when it is first asked for; None where it has none."""
        if not self._guide:
            return None
        with self._running():
            classifier: th.nn.Module = self._classifier().network
        return classifier

    def to(self, device: str | th.device) -> Model:
        """The same model, moved: all that it computes from now on is computed there."""
        with dist_util.computing_on(str(device)):
            self._device = str(dist_util.dev())
        parts = (self._restored, self._guide, *self._upsamplers)
        for part in parts:
            if isinstance(part, Model):
                part.to(self._device)
            elif not isinstance(part, str):
                part.network.to(self._device)
        return self

    @contextmanager
    def _running(self) -> Iterator[None]:
        with _logging(self._verbose), dist_util.computing_on(self._device):
            yield

    def _classifier(self) -> Restored:
        refuse((not self._guide, "classifier_scale needs a classifier: give load(..., classifier=PATH)"))
        if isinstance(self._guide, str):
            flags = self._restored.flags.with_values(**presets.classifier_flags(self._guide))
            self._guide = sampling.restore_guide(replace(self._restored, flags=flags))
        return self._guide

    def _guide_of(self, model: Restored) -> Restored | None:
        return self._classifier() if model.flags.values["classifier_path"] else None

    def _with(self, options: Mapping[str, Any], command: str = "") -> Restored:
        """The network under further flags, of its own command or of another one's."""
        for name in [name for name in options if name in OF_THE_NETWORK | OF_FILES.keys()]:
            raise UserError(f"{name} is no option here: use {OF_FILES.get(name, f'load(..., {name}=...)')}")
        flags, command = self._restored.flags, command or self._restored.flags.command
        known = COMMANDS[command].flags()
        given = {name: value for name, value in flags.given.items() if name in known}
        given |= _flags_of(command, options, LOOP).given
        if options.get("classifier_scale") is not None:
            given["classifier_path"] = self._classifier().path
        return replace(self._restored, flags=Flags(command, given, flags.saved)).with_flags()

    def pixels(self, x: th.Tensor) -> Pixels:
        """Images uint8 [N, H, W, C] of what a callback of `sample` gets, such as output["pred_xstart"]."""
        stage = self._restored.first_stage
        return to_uint8(x if stage is None else stage.decode(x))

    def sample(self, *, start: th.Tensor | None = None, **options: Any) -> Samples:
        """Images, as image_sample makes them, or classifier_sample where classifier_scale is given.

        :param start: [N, C, H, W], the noise to start from, such as `invert` returns.
        :param options: flags of these scripts, with num_samples as many as classes or prompts, else 1, and batch_size
            at most 16; init_image, mask, interpolate and cond_images may be images themselves: see `Images`; prompt a
            list, which the images take in turn; and of the loop cond_fn, cond_fn_with_grad, callback and progress.
        """
        enlarges = self._restored.flags.command == ENLARGE
        refuse((enlarges, f"{self.path} is an upsampler: give .upsample(IMAGES) what it is to enlarge"))
        turns = [len(options[name]) for name in ("classes", "prompt") if isinstance(options.get(name), list | tuple)]
        options = {"num_samples": max(turns, default=1 if start is None else len(start)), **options}
        options.setdefault("batch_size", min(BATCH, options["num_samples"]))
        with self._running(), _as_paths(options) as options:
            loop = {name: options.pop(name) for name in LOOP if name in options}
            model = self._with(options)
            plan = sampling.drawing(model, self._guide_of(model))
            if start is not None:
                refuse(
                    ("start" in plan.job, "start and init_image exclude each other: give one"),
                    (len(start) != options["num_samples"], f"start is noise of {len(start)} images: give num_samples"),
                )
                plan.job["start"] = lambda rows, _: {"start": start[list(rows)].to(self._device)}
            return self._drawn(model, plan, loop)

    def _drawn(self, model: Restored, plan: Plan, loop: dict[str, Any]) -> Samples:
        guides = [guide for guide in (plan.loop.get("cond_fn"), loop.get("cond_fn")) if guide is not None]
        job, options, calls = sampling.prepare(model, plan)
        if calls >= MANY and not model.flags.given.keys() & {"sampler", "steps", "timestep_respacing"}:
            logger.warn(f"{calls} evaluations of the network for each batch: sampler='dpm++2m', steps=20 take 20")
        options |= loop | ({"cond_fn": combine(*guides)} if len(guides) > 1 else {})
        images, labels = list[Pixels](), list[th.Tensor]()
        for batch, (x, y) in enumerate(sampled(model.process, plan.network, job, **options)):
            if doubt := plain_images(x, batch):
                logger.warn(doubt)
            images.append(to_uint8(x))
            labels += [] if y is None else [y.cpu()]
        ids = th.cat(labels).numpy() if labels else None
        names = job.class_names or model.classes
        return Samples(np.concatenate(images), ids, names, list(job.labels), list(job.prompts))

    def upsample(self, images: Images, *, seed: int = SEED_STEP, **options: Any) -> Samples:
        """The images enlarged by its upsamplers one after another, or by itself if it is one, as super_res_sample does.

        :param seed: of the first; each takes 1000000 more than the one before, as cascade_sample has it.
        :param options: flags of super_res_sample, and of the loop as for `sample`.
        """
        stages = [self] if self._restored.flags.command == ENLARGE else self._stages()
        refuse((not stages, f"{self.path} has no upsampler: give load(..., upsampler=PATH)"))
        for number, stage in enumerate(stages):
            enlarged = images = stage._enlarged(images, {**options, "seed": seed + number * SEED_STEP})
        return enlarged

    def _stages(self) -> list[Model]:
        stages = [
            load(each, device=self._device, verbose=self._verbose) if isinstance(each, str) else each
            for each in self._upsamplers
        ]
        self._upsamplers = [*stages]
        return stages

    def _enlarged(self, images: Images, options: dict[str, Any]) -> Samples:
        with self._running(), _as_paths({**options, "base_samples": images}) as options:
            loop = {name: options.pop(name) for name in LOOP if name in options}
            model = self._with(options)
            return self._drawn(model, sampling.enlarging(model, self._guide_of(model)), loop)

    def encode(self, images: Images) -> th.Tensor:
        """What the network works on [N, C, H, W]: the most probable latents of images, else images in [-1, 1]."""
        with self._running(), _as_paths({"init_image": images}) as paths:
            model = self._with(paths)
            return editing.starts_of(model, editing.images_of(model, model.flags.values["init_image"]))

    def invert(self, images: Images, *, classes: Any = "", strength: float = 1.0, **options: Any) -> th.Tensor:
        """The noise [N, C, H, W] that the unguided process without randomness turns images to, for `sample(start=...)`.

        :param classes: of the images, in turn, as flag or list.
        :param strength: how far to go: 1 is noise.
        :param options: flags of image_sample, such as steps, and the prompt of the images.
        """
        with self._running(), _as_paths({**options, "init_image": images}) as paths:
            model = self._with({**paths, "classes": classes or None})
            images = editing.starts_of(model, editing.images_of(model, model.flags.values["init_image"]))
            config, indices = model.flags.part(UNetConfig), range(len(images))
            text, count = model.flags.values["classes"], len(self.classes) or config.num_classes
            turns = listed_classes(text, count, self.classes) if text else []
            labels = th.tensor([turns[index % len(turns)] for index in indices]) if turns else None
            prompts.extend(plan := Plan(model.network), model)
            beside = plan.job["conditioning"](indices) if "conditioning" in plan.job else {}
            return editing.noise_of(model, images, labels, beside, strength)

    def bits_per_dim(
        self, images: Images, labels: Sequence[int] | None = None, **options: Any
    ) -> npt.NDArray[np.float64]:
        """What image_nll measures of each image: [N], in bits per dimension.

        :param images: also a folder or zip, with labels as training reads them.
        :param labels: class ids [N] of images that are no path, for a class-conditional model.
        """
        with self._running(), _as_paths({"num_samples": 10**9, **options, "data_dir": images}, labels) as options:
            survey = image_nll.survey_of(self._with(options, MEASURE))
            return np.concatenate([measured(survey, batch)[0][:, 0] for batch in range(survey.batches)])
