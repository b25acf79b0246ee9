"""The page itself, of gradio: controls that are the fields of `page_work.Settings`, and what happens by them."""

from __future__ import annotations

import base64
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from .. import Samples
from ..runtime.errors import UserError, as_user_error
from ..runtime.pictures import Pixels
from . import page_work as work
from .page_work import SPECS, TITLES, Drawing, Facts, Shelf, View
from .tool_sections import PageConfig

HOST, WAITING = "127.0.0.1", 20  # drawings in the queue
TABS = {
    "sample": ("Sample", "New pictures from noise."),
    "sweep": ("Sweep", "The same noise at several scales of guidance and numbers of steps."),
    "inpaint": ("Inpaint", "Paint over what shall be made anew; the rest of the image stays."),
    "redraw": ("Image to image", "From an image, made noisy up to the strength."),
    "enlarge": ("Enlarge", "By the model's upsampler, which takes sampler, steps and seed."),
}
OF_IMAGES = ("inpaint", "redraw", "enlarge")
BY_MODEL = ("classes", "prompt", "negative_prompt", "classifier_scale", "cfg_scale", "scales", "swept")
CSS = """
.gradio-container { max-width: 1240px !important; margin: auto }
#result .cards { display: flex; flex-wrap: wrap; gap: 10px }
#result figure { margin: 0; width: var(--side); max-width: 100% }
#result img { width: 100%; image-rendering: pixelated; border-radius: 6px; display: block; background: white }
#result figcaption { font-size: 12px; overflow-wrap: anywhere; opacity: .8; margin-top: 2px }
#result .sweep { overflow-x: auto } #result :is(table, tr, th, td) { border: 0 !important; background: none }
#result th { padding: 4px 10px 4px 0; text-align: left; font-weight: 600; white-space: nowrap }
#result td { padding: 0 16px 14px 0; vertical-align: top } #further { align-items: end }
#result td .cards { width: max-content; max-width: 420px; gap: 4px }
#status p { margin: 0; padding: 8px 12px; border-radius: 6px; background: var(--background-fill-secondary) }
#status p.error { background: #fee2e2; color: #7f1d1d }
#status progress { width: 100%; height: 6px; accent-color: var(--primary-500); display: block; margin-top: 6px }
"""
WRITE_ADDRESS = "query => { history.replaceState(null, '', query || location.pathname) }"


def serve(config: PageConfig) -> None:
    """Serve the page on this machine until it is interrupted."""
    with tempfile.TemporaryDirectory(prefix="guided-diffusion-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = Page(Shelf(config), folder).blocks
        start(blocks, config.port)
        print(f"The page is at {blocks.local_url}, for browsers of this machine; Ctrl-C ends it.", flush=True)
        blocks.block_thread()


def start(blocks: Any, port: int = 0) -> None:
    """Let a page answer, and return.

    :raises UserError: if the port is taken.
    """
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Soft(primary_hue="indigo", font=font, font_mono=["ui-monospace", "monospace"]).set(
        block_title_background_fill="transparent", block_title_padding="0", block_title_text_color="*body_text_color"
    )
    options: dict[str, Any] = {"quiet": True, "share": False, "prevent_thread_lock": True, "footer_links": []}
    options |= {"theme": theme, "css": CSS, "max_file_size": "20mb", "ssr_mode": False}
    with as_user_error(f"--port {port} of {HOST} cannot be used: give another, or 0 for any that is free", OSError):
        blocks.queue(max_size=WAITING).launch(server_name=HOST, server_port=port or None, **options)


class Page:
    """The controls, and what they do. A browser has one drawing at a time; all browsers' wait in one queue.

    :param folder: for files of results, and of images that browsers send.
    """

    def __init__(self, shelf: Shelf, folder: str) -> None:
        self.shelf, self.folder, self.drawings = shelf, folder, dict[str, Drawing]()
        self.controls: dict[str, Any] = {}
        with gr.Blocks(title="guided-diffusion", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            gr.HTML("<h1>guided-diffusion</h1>")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._settings(shelf.facts(shelf.names[0]))
                with gr.Column(scale=3, min_width=320):
                    self._tasks()
                    self._results()
            self._events()

    def _control(self, name: str, kind: Any, **options: Any) -> None:
        spec = SPECS[name]
        low, high = spec.metadata["at_least"], spec.metadata["at_most"]
        if kind is gr.Slider:
            whole = isinstance(spec.default, int)
            options = {"minimum": low, "maximum": high, "step": 1 if whole else 0.1 if high > 1 else 0.01, **options}
        options = {"value": spec.default, "label": TITLES[name], "info": spec.metadata["help"] or None, **options}
        self.controls[name] = kind(elem_id=name, **options)

    def _settings(self, facts: Facts) -> None:
        self._control("model", gr.Dropdown, choices=self.shelf.names, value=self.shelf.names[0], info=None)
        self._control("classes", gr.Dropdown, choices=facts.labels, value=[], multiselect=True)
        for name in ("prompt", "negative_prompt"):
            self._control(name, gr.Textbox, visible=facts.text, max_lines=3)
        with gr.Row():
            self._control("num_samples", gr.Slider, min_width=140)
            self._control("seed", gr.Number, precision=0, min_width=140, info=None)
        with gr.Row():
            self._control("sampler", gr.Dropdown, choices=work.SAMPLER_NAMES, min_width=140)
            self._control("steps", gr.Slider, min_width=140)
        with gr.Row():
            self._control("classifier_scale", gr.Slider, visible=facts.classifier, min_width=140)
            self._control("cfg_scale", gr.Slider, visible=facts.free, min_width=140)
        with gr.Accordion("Guide in a part of the steps only", open=False), gr.Row():
            self._control("guide_from", gr.Slider, min_width=140)
            self._control("guide_to", gr.Slider, min_width=140)

    def _tasks(self) -> None:
        self.controls["task"] = gr.Textbox("sample", visible=False)
        parts = {task: getattr(self, f"_{task}") for task in TABS if task != "sample"}
        with gr.Tabs(selected="sample", overflow_behavior="wrap") as self.tabs:
            for task, (name, about) in TABS.items():
                with gr.Tab(name, id=task, render_children=True) as tab:
                    gr.Markdown(about)
                    parts.get(task, bool)()
                    tab.select(None, None, [self.controls["task"]], js=f"() => ['{task}']")
        with gr.Row():
            self.button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=140, interactive=False)
            self.cancel = gr.Button("Cancel", elem_id="cancel", min_width=100)

    def _sweep(self) -> None:
        with gr.Row():
            self._control("scales", gr.Textbox, min_width=140)
            self._control("step_counts", gr.Textbox, min_width=140)
        self._control("swept", gr.Radio, choices=list(work.KINDS), info=None)

    def _inpaint(self) -> None:
        brush = gr.Brush(default_size=60, colors=["#4f46e5"], color_mode="fixed")
        options: dict[str, Any] = {"layers": False, "transforms": (), "sources": ("upload", "clipboard")}
        options |= {"brush": brush, "format": "png", "canvas_size": (512, 512), "type": "pil", "height": 420}
        self.canvas = gr.ImageEditor(label="Image and what is painted", elem_id="canvas", **options)
        self._control("region", gr.Radio, choices=[work.PAINTED, *work.REGIONS])
        self._control("resample", gr.Slider)

    def _redraw(self) -> None:
        self.image = self._upload("image")
        self._control("strength", gr.Slider)

    def _enlarge(self) -> None:
        self.small = self._upload("small")

    def _upload(self, name: str) -> Any:
        options: dict[str, Any] = {"type": "pil", "image_mode": "RGBA", "format": "png", "height": 300}
        return gr.Image(label="Image", elem_id=name, sources=["upload", "clipboard"], **options)

    def _results(self) -> None:
        self.status = gr.HTML(elem_id="status")
        self.result = gr.HTML(elem_id="result")
        self.kept = gr.State([])
        with gr.Row():
            self.npz = gr.DownloadButton("Download npz", visible=False, elem_id="npz", size="sm", min_width=120)
            self.png = gr.DownloadButton("Download PNG", visible=False, elem_id="png", size="sm", min_width=120)
        with gr.Row(visible=False, elem_id="further") as self.further:
            self.number = gr.Number(1, label="Picture no.", precision=0, minimum=1, elem_id="number", min_width=120)
            self.takers = {
                task: gr.Button(f"To {TABS[task][0].lower()}", size="sm", min_width=100) for task in OF_IMAGES
            }

    def _events(self) -> None:
        controls, query = list(self.controls.values()), gr.Textbox(visible=False)
        images = [self.canvas, self.image, self.small]
        shown = [self.status, self.result, self.npz, self.png, self.further, self.kept]
        quick: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        slow: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": [self.status]}
        slow |= {"concurrency_limit": 1, "concurrency_id": "drawing", "api_visibility": "private"}
        click, leaf = self.button.click, [self.controls["task"], self.tabs]
        self.blocks.load(
            self.fill, [query], [self.tabs, *controls, self.status, self.button], js="() => location.search", **quick
        )
        described = [self.controls[name] for name in BY_MODEL]
        self.controls["model"].input(self.describe, [self.controls["model"]], described, **quick)
        click(self.address, controls, [query], **quick).then(None, [query], None, js=WRITE_ADDRESS)
        drawing = click(self.draw, [*controls, *images], shown, scroll_to_output=True, **slow)
        self.cancel.click(self.halt, None, [self.status], cancels=[drawing], **quick)
        self.blocks.unload(self.leave)
        for (task, button), image in zip(self.takers.items(), images, strict=True):
            chosen = [self.kept, self.number, self.controls["model"]]
            taken = button.click(self.take, chosen, [image, self.controls["classes"]], **quick)
            taken.success(partial(self.turn_to, task), None, leaf, **quick)

    def _values(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.controls, values, strict=True))

    def fill(self, query: str) -> list[Any]:
        """The controls as the address of the page has them."""
        settings, faults = work.from_address(query)
        names = self.shelf.names
        if settings.model not in names:
            faults += [f"There is no model {settings.model!r} here."] if settings.model else []
            settings = replace(settings, model=names[0])
        facts = self.shelf.facts(settings.model)
        values: dict[str, Any] = asdict(settings)
        try:
            values["classes"] = [facts.labels[label][1] for label in facts.ids(settings.classes)]
        except UserError as error:
            values["classes"], faults = [], [*faults, f"The address is not used for Classes: {error}"]
        updates = [gr.update(value=values[name], **_look_of(name, facts)) for name in self.controls]
        fault = _message(" ".join(faults), "error" if faults else "done")
        return [gr.Tabs(selected=settings.task), *updates, fault, gr.update(interactive=True)]

    def describe(self, model: str) -> list[Any]:
        """The controls that depend on the model, for another one."""
        facts = self.shelf.facts(model)
        value: dict[str, Any] = {"value": []}
        return [gr.update(**_look_of(name, facts), **(value if name == "classes" else {})) for name in BY_MODEL]

    def address(self, *values: Any) -> str:
        """The query of the settings, '' where they are out of their limits."""
        try:
            return f"?{work.to_address(work.checked(self._values(values)))}"
        except UserError:
            return ""

    def draw(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """How a drawing looks after each step; what is wrong is a message in the page."""
        count = len(self.controls)
        settings, (canvas, image, small) = self._values(values[:count]), values[count:]
        layers = (canvas or {}).get("layers") or [None]
        background = (canvas or {}).get("background")
        start = {"inpaint": background, "redraw": image, "enlarge": small}.get(settings["task"])
        drawing = Drawing(self.shelf, settings, start, layers[0], self.folder)
        self.drawings[str(request.session_hash)] = drawing
        with closing(drawing.views()) as views:
            for view in views:
                yield _updates(view)
        self.leave(request)

    def halt(self, request: gr.Request) -> str:
        """End the drawing of this browser."""
        return _message("Stopped." if self.leave(request) else "Nothing is drawn now.", "stopped")

    def leave(self, request: gr.Request) -> bool:
        """The same, whether there is one or not."""
        drawing = self.drawings.pop(str(request.session_hash), None)
        if drawing is not None:
            drawing.stop()
        return drawing is not None

    def take(self, kept: list[tuple[Any, str]], number: int, model: str) -> list[Any]:
        """A picture of the result, and its class."""
        if not 1 <= (number or 0) <= len(kept):
            raise gr.Error(f"Picture no. {number} is not there: give one of 1 to {len(kept)}")
        image, label = kept[number - 1]
        known = label in dict(self.shelf.facts(model).labels).values()
        return [_enlarged(image), [label] if known else gr.skip()]

    def turn_to(self, task: str) -> list[Any]:
        """Another tab."""
        return [task, gr.Tabs(selected=task)]


def _look_of(name: str, facts: Facts) -> dict[str, Any]:
    if name not in BY_MODEL:
        return {}
    guided, both = facts.classifier or facts.free, facts.classifier and facts.free
    needs = dict(
        zip(BY_MODEL, (facts.labels, facts.text, facts.text, facts.classifier, facts.free, guided, both), strict=True)
    )
    return {"visible": bool(needs[name])} | ({"choices": facts.labels} if name == "classes" else {})


def _updates(view: View) -> list[Any]:
    finished, files = view.state == "done", view.files or (None, None)
    buttons = [gr.update(value=file, visible=finished) for file in files]
    result = gr.skip() if view.state in ("error", "stopped") else _pictures(view)
    kept = [pair for samples in view.made if samples for pair in _labelled(samples)] if finished else []
    return [_message(view.text, view.state, view.share), result, *buttons, gr.update(visible=finished), kept]


def _message(text: str, state: str, share: float = -1) -> str:
    if not text:
        return ""
    bar = f'<progress value="{share:.3f}" aria-label="progress"></progress>' if state == "working" else ""
    role = "alert" if state == "error" else "status"
    return f'<p class="{state}" role="{role}">{escape(text)}{bar}</p>'


def _enlarged(image: Pixels, side: int = 512) -> Image.Image:
    """A picture [H, W, C] with each pixel as large as fits into a side."""
    zoom = max(1, side // max(image.shape[:2]))
    [picture] = Samples(image[None].repeat(zoom, axis=1).repeat(zoom, axis=2)).pil()
    return picture


def _labelled(samples: Samples) -> list[tuple[Any, str]]:
    """Each picture with the name of its class, '' where it has none."""
    labels = [None] * len(samples) if samples.labels is None else samples.labels.tolist()
    names = dict(enumerate(samples.classes))
    words = ["" if label is None else names.get(label, str(label)) for label in labels]
    return list(zip(samples.images, words, strict=True))


def _pictures(view: View) -> str:
    """The pictures, of a sweep in a table with a row for each number of steps."""
    cells, number = list[str](), 1
    for samples in view.made:
        cells.append(_cards(samples, number, 72 if len(view.made) > 1 else 140))
        number += len(samples or ())
    if len(cells) < 2:
        return "".join(cells)
    columns = list(dict.fromkeys(run.column for run in view.runs))
    lines = ["<tr><td></td>", *(f"<th scope=col>{escape(name)}</th>" for name in columns), "</tr>"]
    for start in range(0, len(cells), len(columns)):
        row = "".join(f"<td>{cell}</td>" for cell in cells[start : start + len(columns)])
        lines.append(f"<tr><th scope=row>{escape(view.runs[start].row)}</th>{row}</tr>")
    return f'<div class="sweep" tabindex="0"><table>{"".join(lines)}</table></div>'


def _cards(samples: Samples | None, number: int, side: int) -> str:
    figures = []
    for index, (image, label) in enumerate(_labelled(samples) if samples else ()):
        file, name = io.BytesIO(), f"{number + index} {label}".strip()
        [picture] = Samples(image[None]).pil()
        picture.save(file, format="PNG", compress_level=1)
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        figures.append(
            f'<figure><img src="{source}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        )
        side = max(side, min(256, image.shape[1]) if len(figures) == 1 else side)
    return f'<div class="cards" style="--side: {side}px">{"".join(figures)}</div>'
