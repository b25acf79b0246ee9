"""What the page draws: its settings and their limits, the models that it offers, drawings that stop between two steps.

Nothing here knows of gradio. Shapes: N images, H W space, C channels.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from .. import Samples, __version__, dist_util, load
from ..nn import traits_of
from ..runtime.errors import WHY, UserError, as_user_error, refuse
from ..runtime.labels import parse_classes
from ..runtime.npz import write_arrays
from ..runtime.options import flag, parse_size, reader_of
from ..runtime.pictures import grid, to_uint8
from ..sampling.samplers import SAMPLERS
from . import presets
from .tool_sections import COUNTS, SCALES, PageConfig

if TYPE_CHECKING:
    from .pipeline import Model

TASKS = ("sample", "sweep", "inpaint", "redraw", "enlarge")
KINDS = ("classifier", "classifier-free")
SAMPLER_NAMES = [name for name, sampler in SAMPLERS.items() if not sampler.ascending]  # the others need an image
PAINTED = "what I paint"
REGIONS = {  # left, top, right, bottom in quarters of an image
    "left half": (0, 0, 2, 4),
    "right half": (2, 0, 4, 4),
    "top half": (0, 0, 4, 2),
    "bottom half": (0, 2, 4, 4),
    "the middle": (1, 1, 3, 3),
}
MOST_PICTURES, MOST_PIXELS, LONGEST = 96, 4096**2, 1000  # of a sweep, of an image that is given, characters of a text
PREVIEWS, PREVIEW_SIDE = 20, 160  # of a drawing, and pixels of the side of one


def _text(help: str) -> str:
    def read(text: str) -> str:
        refuse((len(text) > LONGEST, f"{len(text)} characters are too many: write at most {LONGEST}"))
        return text

    return flag("", help, convert=read)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a person may set, as the address of the page holds it: a field is a control."""

    task: str = flag("sample", "", choices=TASKS)
    model: str = _text("")
    classes: str = _text("the pictures take them in turn; none: at random")
    prompt: str = _text("what the pictures show")
    negative_prompt: str = _text("what they shall not show, with classifier-free guidance")
    num_samples: int = flag(8, "", at_least=1, at_most=16)
    seed: int = flag(0, "", at_least=0, at_most=2**31 - 1)
    sampler: str = flag("dpm++2m", "", choices=SAMPLER_NAMES)
    steps: int = flag(20, "", at_least=1, at_most=250)
    classifier_scale: float = flag(2.0, "0: off", at_least=0, at_most=20)
    cfg_scale: float = flag(1.0, "1: off", at_least=0, at_most=20)
    guide_from: int = flag(0, "0: down to the image", at_least=0, at_most=100)
    guide_to: int = flag(100, "100: from the start", at_least=0, at_most=100)
    scales: str = flag("0,1,2,4", "the columns", convert=SCALES)
    step_counts: str = flag("10,20", "the rows", convert=COUNTS)
    swept: str = flag("classifier", "", choices=KINDS)
    region: str = flag(PAINTED, "", choices=(PAINTED, *REGIONS))
    resample: int = flag(1, "how often each stretch of steps is taken, to fit in what is new", at_least=1, at_most=10)
    strength: float = flag(0.6, "share of the way to noise", at_least=0.01, at_most=1)


SPECS = {spec.name: spec for spec in fields(Settings)}
TITLES = {
    **{name: name.replace("_", " ").capitalize() for name in SPECS},
    "num_samples": "Pictures",
    "cfg_scale": "Classifier-free scale",
    "guide_from": "Guide from, % of the noise",
    "guide_to": "Guide to, % of the noise",
    "step_counts": "Numbers of steps",
    "swept": "Scales of",
    "region": "What is made anew",
}


def checked(values: Mapping[str, Any]) -> Settings:
    """Settings from values of a browser, each read as a flag is.

    :raises UserError: with the title of the first that is out of its limits.
    """
    return Settings(**{name: _read(name, value) for name, value in values.items()})


def _read(name: str, value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    with as_user_error(f"{TITLES[name]}: {WHY if text else 'nothing is given'}", UserError):
        return reader_of(SPECS[name])(text)


def to_address(settings: Settings) -> str:
    """The settings that are not the defaults, as the query of an address."""
    return urlencode({name: value for name, value in asdict(settings).items() if value != SPECS[name].default})


def from_address(query: str) -> tuple[Settings, list[str]]:
    """The settings of an address, and what is wrong with it: of that the default is taken."""
    values, faults = dict[str, Any](), list[str]()
    for name, text in parse_qsl(query.removeprefix("?"), keep_blank_values=True):
        try:
            values |= {name: _read(name, text)} if name in SPECS else {}
        except UserError as error:
            faults.append(f"The address is not used for {error}.")
    return Settings(**values), faults


class Facts(NamedTuple):
    """What the controls need to know of a model.

    size: (H, W). labels: (name to show, name to write) of each class. free: it can be guided without a classifier.
    timesteps: T of the training.
    """

    size: tuple[int, int]
    timesteps: int
    labels: list[tuple[str, str]]
    text: bool
    free: bool
    classifier: bool
    upsampler: bool

    def ids(self, classes: str) -> list[int]:
        """The ids of classes, [] where there are none."""
        names = [name for name, _ in self.labels]
        return parse_classes(classes, len(names), names) if classes and names else []


class Shelf:
    """The models that a browser may choose from, the last one in memory. Work with them is done under `lock`."""

    def __init__(self, config: PageConfig) -> None:
        self.lock = threading.RLock()
        self._device, self._facts, self._open = config.device, dict[str, Facts](), dict[str, "Model"]()
        kinds = {each.name: each.kind for each in presets.all_presets().values() if os.path.exists(each.place)}
        self._sources: dict[str, dict[str, Any]] = {
            name: {"source": name} for name, kind in kinds.items() if kind == presets.DIFFUSION
        }
        if config.model_path:
            others = {"classifier": config.classifier_path, "upsampler": config.upsampler_path}
            name = os.path.basename(config.model_path.rstrip("/"))
            self._sources = {name: {"source": config.model_path, **others}, **self._sources}
        if config.preset and presets.get(config.preset).path:
            self._sources = {config.preset: {"source": config.preset}, **self._sources}
        refuse((not self._sources, "there is no model here: give --model_path, or fetch one that 'models list' names"))

    @property
    def names(self) -> list[str]:
        """Of all models, first the one that the page starts with."""
        return list(self._sources)

    def model(self, name: str) -> Model:
        """The model of a name, read if it is not the one in memory."""
        if name not in self._sources:
            raise UserError(f"Model: there is no {name!r} here, choose one of {', '.join(self._sources)}")
        with self.lock:
            if name not in self._open:
                self._open.clear()  # memory for two may not be there
                self._open[name] = load(**self._sources[name], device=self._device)
            return self._open[name]

    def facts(self, name: str) -> Facts:
        """What there is to know of a model."""
        if name not in self._facts:
            with self.lock:
                self._facts[name] = self._look(self._sources.get(name, {}), self.model(name))
        return self._facts[name]

    def _look(self, source: Mapping[str, str], model: Model) -> Facts:
        config, traits, preset = model.config, traits_of(model.network), presets.find(source["source"])
        beside = [bool(source.get(role) or (preset and preset.companion(role))) for role in ("classifier", "upsampler")]
        names = model.classes or [str(label) for label in range(config["num_classes"])]
        unique = [name if names.count(name) == 1 else str(label) for label, name in enumerate(names)]
        shown = [name if name == label else f"{name} ({label})" for name, label in zip(names, unique, strict=True)]
        labels = list(zip(shown, unique, strict=True)) if config["class_cond"] or beside[0] else []
        text = config["context"] == "text"
        free = text or traits.null_label is not None
        return Facts(parse_size(config["image_size"]), config["diffusion_steps"], labels, text, free, *beside)


class Run(NamedTuple):
    """One call of the model; `row` and `column` are its place in a sweep."""

    settings: Settings
    row: str = ""
    column: str = ""


def runs_of(settings: Settings, facts: Facts) -> list[Run]:
    """The calls that a task takes: of a sweep one for each number of steps and each scale."""
    if settings.task != "sweep":
        return [Run(settings)]
    classifier = facts.classifier and (settings.swept == KINDS[0] or not facts.free)
    name = "classifier_scale" if classifier else "cfg_scale"
    scales = settings.scales.split(",") if classifier or facts.free else ["none"]
    counts = settings.step_counts.split(",")
    total = len(scales) * len(counts) * settings.num_samples
    parts = f"{len(counts)} numbers of steps x {len(scales)} scales x {settings.num_samples} pictures"
    refuse((total > MOST_PICTURES, f"{parts} are {total}: take fewer, at most {MOST_PICTURES} in all"))
    values = [
        {**asdict(settings), "steps": steps} | ({name: scale} if scale != "none" else {})
        for steps in counts
        for scale in scales
    ]
    places = [(f"{steps} steps", f"scale {scale}") for steps in counts for scale in scales]
    return [Run(checked(each), *place) for each, place in zip(values, places, strict=True)]


def options_of(settings: Settings, facts: Facts) -> dict[str, Any]:
    """The options of `Model.sample` that settings stand for."""
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("seed", "num_samples", "sampler", "steps")}
    low, high = settings.guide_from, settings.guide_to
    refuse(
        (facts.text and not settings.prompt.strip(), "Prompt: say what the pictures show"),
        (low >= high, f"Guidance from {low} % to {high} % of the noise is none: give first the smaller number"),
    )
    options |= {"classes": facts.ids(settings.classes) or None, "prompt": settings.prompt if facts.text else None}
    if facts.free and settings.cfg_scale != 1:
        options["cfg_scale"] = settings.cfg_scale
        options["negative_prompt"] = (facts.text and settings.negative_prompt) or None
    if facts.classifier and settings.classifier_scale:
        options["classifier_scale"] = settings.classifier_scale
    if {"cfg_scale", "classifier_scale"} & options.keys() and (low, high) != (0, 100):
        options["guidance_interval"] = ",".join(str(share * facts.timesteps / 100) for share in (low, high))
    return options


def usable(image: Image.Image | None) -> Image.Image:
    """An image that a browser sent, without transparency."""
    if image is None:
        raise UserError("Image: there is none yet; upload one, or take a picture of a result")
    width, height = image.size
    refuse((width * height > MOST_PIXELS, f"Image: {width} x {height} pixels are more than {MOST_PIXELS}: scale it"))
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def mask_of(region: str, size: tuple[int, int], painted: Image.Image | None = None) -> Image.Image:
    """The mask of an image of this (width, height): white is kept, black is made anew.

    :param painted: of the same size; opaque where a person painted.
    """
    (width, height), keep = size, np.full(size[::-1], 255, np.uint8)
    if region in REGIONS:
        left, top, right, bottom = REGIONS[region]
        keep[top * height // 4 : bottom * height // 4, left * width // 4 : right * width // 4] = 0
    elif painted is not None and painted.size == size:
        keep[np.asarray(painted.convert("RGBA"))[..., 3] > 0] = 0
    refuse((keep.all(), f"{TITLES['region']}: paint over it, or choose a part of the image"))
    return Image.fromarray(keep)


class Stopped(Exception):
    """Nobody waits for the drawing any more."""


class View(NamedTuple):
    """What there is to see of a drawing.

    made: the pictures of each run, previews of the one that is drawn; None before it begins. text: how far it is, or
    what is wrong with it. share: of the work that is done. state: working, done, stopped or error. files: an npz and a
    PNG.
    """

    runs: Sequence[Run] = ()
    made: Sequence[Samples | None] = ()
    text: str = "Preparing ..."
    share: float = 0.0
    state: str = "working"
    files: tuple[str, str] | None = None


class Drawing:
    """A task that is done in a thread of its own.

    :param values: of the settings, as a browser sends them.
    :param image: that it starts from; `painted` is opaque where a person painted over it.
    :param folder: where its files go.
    :ivar view: how it looks now.
    """

    def __init__(
        self,
        shelf: Shelf,
        values: Mapping[str, Any],
        image: Image.Image | None,
        painted: Image.Image | None,
        folder: str,
    ) -> None:
        self._shelf, self._values, self._image, self._painted, self._folder = shelf, values, image, painted, folder
        self._stop, self._news, self.view = threading.Event(), SimpleQueue[View](), View()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def stop(self) -> None:
        """End the work before its next step."""
        self._stop.set()

    def views(self) -> Generator[View, None, None]:
        """Do it, and tell how it looks after its steps; the last view is finished or says what is wrong.

        Closing the iterator ends the work.
        """
        yield self.view
        self._thread.start()
        try:
            view = self._news.get()
            while view.state == "working":
                yield view
                view = self._news.get()
                while not self._news.empty():  # those that nobody can see any more
                    view = self._news.get()
            yield view
        finally:
            self.stop()
            self._thread.join()  # the work of others starts when this has ended

    def _show(self, **changes: Any) -> None:
        self.view = self.view._replace(**changes)
        self._news.put(self.view)

    def _work(self) -> None:
        try:
            with self._shelf.lock:
                self._draw(checked(self._values))
        except Stopped:
            self._show(state="stopped", text="Stopped.")
        except BaseException as error:  # the page stays, whatever happens to a drawing
            sentence = dist_util.exit_of(error)[1]
            if not sentence:
                traceback.print_exception(error, file=sys.stderr)
            text = sentence.removeprefix("error: ") or f"{type(error).__name__}: the terminal of the page says where"
            self._show(state="error", text=text)

    def _draw(self, settings: Settings) -> None:
        model, facts = self._shelf.model(settings.model), self._shelf.facts(settings.model)
        runs, made = runs_of(settings, facts), list[Samples]()
        self.view = View(runs, [None] * len(runs))
        for run in runs:
            ids, start = facts.ids(settings.classes), list[int]()

            def each(t: int, output: Mapping[str, Any], ids: list[int] = ids, start: list[int] = start) -> None:
                if self._stop.is_set():
                    raise Stopped
                start.append(t)
                done, steps = max(start) - t + 1, max(start) + 1
                if t % (steps // PREVIEWS + 1) == 0:
                    x = output["pred_xstart"]
                    pixels = to_uint8(x) if settings.task == "enlarge" else model.pixels(x)
                    thin = max(1, min(pixels.shape[1:3]) // PREVIEW_SIDE)
                    labels = np.resize(ids, len(pixels)) if ids else None
                    seen = [*made, Samples(pixels[:, ::thin, ::thin], labels, model.classes)]
                    text = f"Step {done} of {steps}" + (f", part {len(seen)} of {len(runs)}" if len(runs) > 1 else "")
                    rest = [None] * (len(runs) - len(seen))
                    self._show(made=[*seen, *rest], text=text, share=(len(made) + done / steps) / len(runs))

            made.append(self._sampled(model, facts, run.settings, each))
        count, size = sum(map(len, made)), "x".join(map(str, made[0].images.shape[2:0:-1]))
        text = f"{count} picture{'s' * (count > 1)} of {size} pixels, seed {settings.seed}"
        self._show(made=made, text=text, state="done", files=write_files(self._folder, settings, runs, made))

    def _sampled(self, model: Model, facts: Facts, settings: Settings, callback: Any) -> Samples:
        if settings.task in ("sample", "sweep"):
            return model.sample(callback=callback, **options_of(settings, facts))
        if settings.task == "enlarge":
            remedy = "choose one that has, or start the page with --model_path and --upsampler_path"
            refuse((not facts.upsampler, f"The model {settings.model} has no upsampler: {remedy}"))
            small = ImageOps.fit(usable(self._image), facts.size[::-1], Image.Resampling.BOX)
            ids = np.asarray(facts.ids(settings.classes)[:1])
            options: dict[str, Any] = {name: getattr(settings, name) for name in ("sampler", "steps", "seed")}
            return model.upsample(
                Samples(np.asarray(small)[None], ids if len(ids) else None), callback=callback, **options
            )
        image = usable(self._image)
        edit: dict[str, Any] = {"strength": settings.strength}
        if settings.task == "inpaint":
            edit = {"mask": mask_of(settings.region, image.size, self._painted), "resample": settings.resample}
        return model.sample(init_image=image, callback=callback, **edit, **options_of(settings, facts))


def write_files(folder: str, settings: Settings, runs: Sequence[Run], made: Sequence[Samples]) -> tuple[str, str]:
    """An npz of all pictures of a drawing and a PNG that shows them, both with the settings inside, as JSON."""
    facts = {"version": __version__, "address": f"?{to_address(settings)}", **asdict(settings)}
    text = np.asarray([json.dumps(facts)])
    arrays = {"arr_0": np.concatenate([samples.images for samples in made]), "settings": text}
    labels = [samples.labels for samples in made if samples.labels is not None]
    arrays |= {"arr_1": np.concatenate(labels)} if labels else {}
    stem = os.path.join(tempfile.mkdtemp(dir=folder), f"{settings.model}-{settings.task}-seed{settings.seed}")
    write_arrays(f"{stem}.npz", dict(sorted(arrays.items())))
    info = PngInfo()
    info.add_text("settings", text.item())
    if len(made) > 1:
        rows, columns = [list(dict.fromkeys(names)) for names in ([run[1] for run in runs], [run[2] for run in runs])]
        picture = grid(arrays["arr_0"], len(arrays["arr_0"]) // len(rows), rows, titles=columns)
    else:
        picture = made[0].grid() if len(made[0]) > 1 else made[0].pil()[0]
    picture.save(f"{stem}.png", format="PNG", pnginfo=info)
    return f"{stem}.npz", f"{stem}.png"
