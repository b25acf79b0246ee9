"""The page: what it refuses and draws, and a person's path through it in a browser, where gradio and a browser are."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import CLASSIFIER, GUIDED, NAMES, UPSAMPLER, Runs

from guided_diffusion import load
from guided_diffusion.commands import page
from guided_diffusion.commands.page_work import (
    PAINTED,
    REGIONS,
    Drawing,
    Settings,
    Shelf,
    View,
    checked,
    from_address,
    mask_of,
    to_address,
)
from guided_diffusion.commands.pipeline import Model
from guided_diffusion.commands.tool_sections import PageConfig
from guided_diffusion.runtime.errors import UserError

SMALL: dict[str, Any] = {"model": "unet", "steps": 3, "num_samples": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    upsampler = replace(UPSAMPLER, large_size=16, small_size=8, attention_resolutions="8")
    return Runs(root, unet=GUIDED, upsampler=upsampler, classifier=CLASSIFIER)


@pytest.fixture(scope="module")
def shelf(runs: Runs) -> Shelf:
    paths = {f"{name}_path": runs[run] for name, run in (("model", "unet"), ("classifier", "classifier"))}
    return Shelf(PageConfig(**paths, device="cpu"))


@pytest.fixture(scope="module")
def model(runs: Runs) -> Model:
    return load(runs["unet"], classifier=runs["classifier"], upsampler=runs["upsampler"])


def picture(size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))


def drawn(shelf: Shelf, folder: Path, image: Any = None, painted: Any = None, **values: Any) -> View:
    """The last view of a drawing."""
    drawing = Drawing(shelf, {**asdict(Settings()), **SMALL, **values}, image, painted, str(folder))
    *_, last = drawing.views()
    return last


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 999}, "Steps: 999 is above the greatest value, 250"),
        ({"steps": 0}, "Steps: 0 is below the least value, 1"),
        ({"steps": 2.5}, "Steps: '2.5' is not of type int"),
        ({"seed": None}, "Seed: nothing is given"),
        ({"seed": 10**12}, "Seed: 1000000000000 is above the greatest value, 2147483647"),
        ({"num_samples": 17}, "Pictures: 17 is above the greatest value, 16"),
        ({"classifier_scale": float("nan")}, "Classifier scale: nan is not a finite number"),
        ({"cfg_scale": 21}, "Classifier-free scale: 21 is above the greatest value, 20"),
        ({"sampler": "ddim_reverse"}, "Sampler: 'ddim_reverse' is none of ddpm, ddim,"),
        ({"task": "train"}, "Task: 'train' is none of sample, sweep, inpaint, redraw, enlarge"),
        ({"prompt": "a" * 1001}, "Prompt: 1001 characters are too many: write at most 1000"),
        ({"scales": "1,x"}, "Scales: '1,x' is no list of different numbers, such as 0,1,2.5"),
        ({"strength": 0}, "Strength: 0 is below the least value, 0.01"),
        ({"model": "/etc/passwd"}, "Model: there is no '/etc/passwd' here, choose one of unet, "),
        ({"classes": "cta"}, "class 'cta' is unknown; did you mean cat?"),
        ({"task": "sweep", "scales": "0,30"}, "Classifier scale: 30 is above the greatest value, 20"),
        ({"task": "sweep", "num_samples": 16, "step_counts": "1,2"}, "2 numbers of steps x 4 scales x 16 pictures are"),
        ({"guide_from": 60, "guide_to": 40}, "Guidance from 60 % to 40 % of the noise is none"),
        ({"task": "redraw"}, "Image: there is none yet; upload one, or take a picture of a result"),
        ({"task": "enlarge"}, "The model unet has no upsampler: choose one that has, or start the page with"),
    ],
)
def test_what_is_out_of_its_limits_is_a_sentence_in_the_page(
    shelf: Shelf, tmp_path: Path, values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    view = drawn(shelf, tmp_path, **values)
    assert view.state == "error"
    assert message in view.text
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_not_too_large_and_a_mask_leaves_something_to_draw(shelf: Shelf, tmp_path: Path) -> None:
    large = Image.new("L", (4097, 4096))
    assert "Image: 4097 x 4096 pixels are more than" in drawn(shelf, tmp_path, large, task="redraw").text
    blank = Image.new("RGBA", (8, 8))
    for painted in (None, blank, Image.new("RGBA", (4, 4), "red")):
        assert "paint over it" in drawn(shelf, tmp_path, picture(), painted, task="inpaint").text


def test_settings_stand_in_the_address() -> None:
    settings = checked({"model": "emoji32", "classes": ["owl", "a, b"], "steps": 30.0, "seed": 7, "prompt": "a&b=<c>"})
    assert from_address(f"?{to_address(settings)}") == (settings, [])
    assert to_address(Settings()) == ""
    assert from_address("?steps=9999&seed=3&__theme=dark&sampler=") == (
        Settings(seed=3),
        [
            "The address is not used for Steps: 9999 is above the greatest value, 250.",
            "The address is not used for Sampler: nothing is given.",
        ],
    )


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_is_a_part_of_the_image(region: str) -> None:
    mask = np.asarray(mask_of(region, (10, 6)))
    assert mask.shape == (6, 10)
    assert 0.25 <= (mask == 0).mean() <= 0.5
    assert {"left half": mask[0, 0] == 0, "the middle": mask[3, 5] == 0}.get(region, True)


def test_pictures_are_those_of_load(shelf: Shelf, model: Model, tmp_path: Path) -> None:
    view = drawn(shelf, tmp_path, classes=["owl", "cat"], seed=3, cfg_scale=1.5, guide_from=0, guide_to=60)
    options = {"classifier_scale": 2.0, "cfg_scale": 1.5, "guidance_interval": "0,24", "sampler": "dpm++2m"}
    expected = model.sample(classes=["owl", "cat"], num_samples=2, seed=3, steps=3, **options)
    assert view.state == "done"
    np.testing.assert_array_equal(view.made[0].images, expected.images)
    npz, png = view.files
    with np.load(npz) as arrays, Image.open(png) as grid:
        np.testing.assert_array_equal(arrays["arr_0"], expected.images)
        np.testing.assert_array_equal(arrays["arr_1"], [2, 0])
        assert arrays["settings"].item() == grid.text["settings"]
        settings = json.loads(grid.text["settings"])
    assert (settings["seed"], settings["classes"], settings["guide_to"]) == (3, "owl,cat", 60)
    assert from_address(settings["address"])[0] == Settings(**{name: settings[name] for name in asdict(Settings())})


def test_a_sweep_has_the_same_noise_in_all_parts(shelf: Shelf, model: Model, tmp_path: Path) -> None:
    view = drawn(shelf, tmp_path, task="sweep", scales="0,5", step_counts="2,4", classes="dog")
    assert [(run.row, run.column) for run in view.runs] == [
        ("2 steps", "scale 0"),
        ("2 steps", "scale 5"),
        ("4 steps", "scale 0"),
        ("4 steps", "scale 5"),
    ]
    for samples, (steps, scale) in zip(view.made, [(2, 0), (2, 5), (4, 0), (4, 5)], strict=True):
        guided = {"classifier_scale": scale} if scale else {}
        expected = model.sample(classes="dog", num_samples=2, steps=steps, sampler="dpm++2m", **guided)
        np.testing.assert_array_equal(samples.images, expected.images)
    free = drawn(shelf, tmp_path, task="sweep", swept="classifier-free", scales="1,3", step_counts="2")
    assert not np.array_equal(free.made[0].images, free.made[1].images)


def test_inpainting_keeps_what_is_not_painted_over(shelf: Shelf, tmp_path: Path) -> None:
    painted = Image.new("RGBA", (8, 8))
    painted.paste("red", (0, 0, 8, 4))
    for region, over in ((PAINTED, painted), ("top half", None)):
        view = drawn(shelf, tmp_path, picture(), over, task="inpaint", region=region, resample=2)
        made = view.made[0].images
        np.testing.assert_array_equal(made[:, 4:], np.asarray(picture())[None, 4:].repeat(2, 0))
        assert not np.array_equal(made[0, :4], np.asarray(picture())[:4])


def test_image_to_image_and_enlarging_are_those_of_load(model: Model, runs: Runs, tmp_path: Path) -> None:
    shelf = Shelf(PageConfig(model_path=runs["unet"], upsampler_path=runs["upsampler"], device="cpu"))
    view = drawn(shelf, tmp_path, picture(), task="redraw", strength=0.5, classes="cat", steps=8)
    options = {"num_samples": 2, "sampler": "dpm++2m", "steps": 8, "classes": "cat", "init_image": picture()}
    np.testing.assert_array_equal(view.made[0].images, model.sample(strength=0.5, **options).images)
    view = drawn(shelf, tmp_path, picture(24), task="enlarge", classes="dog", seed=4)
    blocks = np.asarray(picture(24)).reshape(8, 3, 8, 3, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    expected = model.upsample(blocks, seed=4, steps=3, sampler="dpm++2m", classes="dog")
    assert expected.images.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(view.made[0].images, expected.images, atol=4)  # means are rounded otherwise


def test_a_drawing_ends_before_its_next_step_when_nobody_waits_for_it(shelf: Shelf, tmp_path: Path) -> None:
    for end in ("closed", "stopped"):
        drawing = Drawing(shelf, {**asdict(Settings()), **SMALL, "steps": 250}, None, None, str(tmp_path))
        with closing(drawing.views()) as views:
            seen = [next(views) for _ in range(2)]
            if end == "stopped":
                drawing.stop()
                seen += list(views)
        assert "250" in seen[1].text
        assert drawing.view.text == "Stopped."
        assert list(tmp_path.iterdir()) == []
    assert drawn(shelf, tmp_path).state == "done"


def test_previews_come_while_it_is_drawn(shelf: Shelf, tmp_path: Path) -> None:
    drawing = Drawing(shelf, {**asdict(Settings()), **SMALL, "classes": "owl,cat"}, None, None, str(tmp_path))
    views = list(drawing.views())
    assert {view.made[0].images.shape for view in views if view.made and view.made[0]} == {(2, 8, 8, 3)}
    assert [view.share for view in views] == sorted(view.share for view in views)


def test_the_shelf_says_what_a_model_can(shelf: Shelf, runs: Runs, tmp_path: Path) -> None:
    facts = shelf.facts("unet")
    assert facts.labels == [(name, name) for name in NAMES]
    assert (facts.size, facts.timesteps, facts.free, facts.classifier, facts.upsampler, facts.text) == (
        *((8, 8), 40, True, True),
        *(False, False),
    )
    assert Shelf(PageConfig(preset="emoji32")).names[0] == "emoji32"
    with pytest.raises(UserError, match="there is no model 'emoji23'; did you mean emoji32"):
        Shelf(PageConfig(preset="emoji23"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
SECOND = 1000
PATIENCE = 300 * SECOND  # of a machine that does much else
foreign_warnings = pytest.mark.filterwarnings("ignore")  # of gradio and what it stands on


@pytest.fixture(scope="module")
def server(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A page that answers, `.blocks.local_url` its address."""
    for module in ("gradio", "playwright"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: make test-page installs it")
    if not CHROMIUM:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from guided_diffusion.commands import page_view

        paths = {"model_path": runs["unet"], "classifier_path": runs["classifier"], "upsampler_path": runs["upsampler"]}
        made = page_view.Page(Shelf(PageConfig(**paths, device="cpu")), str(tmp_path_factory.mktemp("page")))
        page_view.start(made.blocks)
        yield made
        made.blocks.close()


@pytest.fixture(scope="module")
def browser(server: Any) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"])
        yield chromium
        chromium.close()


class Tab:
    """A browser of one person, which has opened the page."""

    def __init__(self, browser: Any, server: Any, query: str = "", size: tuple[int, int] = (1280, 900)) -> None:
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, accept_downloads=True)
        self.page, self.addresses = self.context.new_page(), list[str]()
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.set_default_timeout(PATIENCE)
        self.page.goto(f"{server.blocks.local_url}{query}", wait_until="commit")
        self.page.wait_for_selector("#draw:enabled")

    def draw(self) -> str:
        """What the page says when a drawing has ended."""
        self.forget()
        self.page.click("#draw")
        return self.ended()

    def forget(self) -> None:
        """Mark what the page says now, so that `ended` waits for something new."""
        self.page.eval_on_selector_all("#status p", "said => said.forEach(one => one.classList.add('working'))")

    def ended(self) -> str:
        self.page.wait_for_selector("#status p:not(.working)")
        return str(self.page.inner_text("#status p")).strip()

    def images(self) -> list[np.ndarray]:
        """The pictures of the result."""
        sources = self.page.eval_on_selector_all("#result img", "images => images.map(image => image.src)")
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources]

    def paint(self, canvas: Any) -> None:
        """Draw a line over the picture of an editor."""
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 40, y - 40)
        self.page.mouse.down()
        self.page.mouse.move(x + 40, y - 40, steps=8)
        self.page.mouse.up()
        self.page.wait_for_timeout(SECOND)

    def turn_to(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def download(self, selector: str, folder: Path) -> Path:
        with self.page.expect_download() as download:
            self.page.click(selector)
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.05)


@pytest.mark.slow
@foreign_warnings
def test_a_path_through_every_tab(browser: Any, server: Any, model: Model, tmp_path: Path) -> None:
    tab = Tab(browser, server, "?classes=owl,cat&steps=3&num_samples=2&seed=3&sampler=ddim&steps=5&bad=1&cfg_scale=99")
    assert "Classifier-free scale: 99 is above" in tab.page.inner_text("#status")
    assert tab.draw() == "2 pictures of 8x8 pixels, seed 3"
    expected = model.sample(classes=["owl", "cat"], num_samples=2, seed=3, steps=5, sampler="ddim", classifier_scale=2)
    np.testing.assert_array_equal(tab.images(), expected.images)
    assert "seed=3" in tab.page.url
    assert "cfg_scale" not in tab.page.url
    with np.load(tab.download("#npz", tmp_path)) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], expected.images)
        assert json.loads(arrays["settings"].item())["seed"] == 3
    with Image.open(tab.download("#png", tmp_path)) as grid:
        assert json.loads(grid.text["settings"])["sampler"] == "ddim"
    tab.turn_to("Sweep")
    tab.page.fill("#scales textarea, #scales input", "0,9")
    tab.page.fill("#step_counts textarea, #step_counts input", "2,3")
    assert tab.draw() == "8 pictures of 8x8 pixels, seed 3"
    assert len(tab.images()) == 8
    assert tab.page.locator("#result th").all_inner_texts() == ["scale 0", "scale 9", "2 steps", "3 steps"]
    before = tab.images()[1]
    tab.page.fill("#number input", "2")
    tab.page.get_by_role("button", name="To inpaint").click()
    canvas = tab.page.locator("#canvas canvas").first
    canvas.wait_for()
    said = nothing_painted = "What is made anew: paint over it, or choose a part of the image"
    while said == nothing_painted:  # the editor takes the picture, and what is painted, in its own time
        tab.paint(canvas)
        said = tab.draw()
    assert said == "2 pictures of 8x8 pixels, seed 3"
    changed = [np.abs(image.astype(int) - before).max(axis=2) > 0 for image in tab.images()]
    assert 0 < sum(changed).astype(bool).sum() < 32
    tab.page.get_by_role("button", name="To image to image").click()
    tab.page.wait_for_selector("#image img")
    assert tab.draw() == "2 pictures of 8x8 pixels, seed 3"
    assert "task=redraw" in tab.page.url
    tab.page.get_by_role("button", name="To enlarge").click()
    tab.page.wait_for_selector("#small img")
    assert tab.draw() == "1 picture of 16x16 pixels, seed 3"
    foreign = [url for url in tab.addresses if not url.startswith((server.blocks.local_url, "data:", "blob:"))]
    assert foreign == []
    tab.context.close()


@pytest.mark.slow
@foreign_warnings
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, server: Any) -> None:
    tab = Tab(browser, server, "?steps=2", (390, 844))
    for name in ("Sweep", "Inpaint", "Image to image", "Enlarge", "Sample"):
        tab.turn_to(name)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.draw() == "8 pictures of 8x8 pixels, seed 0"
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    tab.context.close()


@pytest.mark.slow
@foreign_warnings
def test_by_keyboard_alone(browser: Any, server: Any, model: Model) -> None:
    tab = Tab(browser, server, "?steps=2")
    press = tab.page.keyboard.press

    def go_to(selector: str) -> None:
        for _ in range(60):
            press("Tab")
            if tab.page.evaluate("s => document.activeElement.closest(s) !== null", selector):
                return
        raise AssertionError(f"{selector} is not reached by the Tab key")

    go_to("#classes")
    tab.page.keyboard.type("owl")
    tab.page.wait_for_selector("[role=option].active[aria-label=owl]")  # lists of other controls stay in the page
    press("Enter")
    tab.page.wait_for_selector("#classes .token")
    press("Escape")
    go_to("#seed")
    press("Control+a")
    tab.page.keyboard.type("5")
    go_to("[role=tab]")
    go_to("#draw")
    tab.forget()
    press("Enter")
    assert tab.ended() == "8 pictures of 8x8 pixels, seed 5"
    assert tab.page.locator("#result figcaption").all_inner_texts() == [f"{number} owl" for number in range(1, 9)]
    expected = model.sample(classes="owl", num_samples=8, seed=5, steps=2, sampler="dpm++2m", classifier_scale=2)
    np.testing.assert_array_equal(tab.images(), expected.images)
    tab.context.close()


@pytest.mark.slow
@foreign_warnings
def test_two_browsers_at_once_get_each_their_own(browser: Any, server: Any, model: Model) -> None:
    tabs = {seed: Tab(browser, server, f"?seed={seed}&steps=100&num_samples=2&classes=cat") for seed in (1, 2)}
    for tab in tabs.values():
        tab.page.click("#draw")
    for seed, tab in tabs.items():
        tab.page.wait_for_selector("#status p.done")
        expected = model.sample(
            classes="cat", num_samples=2, seed=seed, steps=100, sampler="dpm++2m", classifier_scale=2
        )
        np.testing.assert_array_equal(tab.images(), expected.images)
        tab.context.close()


@pytest.mark.slow
@foreign_warnings
@pytest.mark.parametrize("way", ["cancel", "close"])
def test_work_ends_when_nobody_waits_for_it(browser: Any, server: Any, way: str) -> None:
    tab = Tab(browser, server, "?task=sweep&step_counts=250,249,248&num_samples=8")
    tab.page.click("#draw")
    tab.page.wait_for_selector("#result img")
    [drawing] = server.drawings.values()
    assert drawing.view.state == "working"
    if way == "cancel":
        tab.page.click("#cancel")
        tab.page.wait_for_selector("#status p.stopped")
        wait_for(lambda: drawing.view.state != "working")
        tab.page.wait_for_timeout(SECOND)  # whatever the drawing says at its end comes after the button's answer
        assert tab.page.inner_text("#status p.stopped") == "Stopped."
    else:
        tab.context.close()
    wait_for(lambda: drawing.view.state != "working")
    assert drawing.view.text == "Stopped."
    again = Tab(browser, server, "?steps=2")
    assert again.draw() == "8 pictures of 8x8 pixels, seed 0"
    again.context.close()
    tab.context.close()


@pytest.mark.slow
@foreign_warnings
def test_a_wrong_word_is_answered_in_the_page(browser: Any, server: Any) -> None:
    tab = Tab(browser, server, "?steps=2")
    tab.page.fill("#seed input", "99999999999")
    assert tab.draw() == "Seed: 99999999999 is above the greatest value, 2147483647"
    assert tab.page.get_attribute("#status p", "role") == "alert"
    tab.page.fill("#seed input", "1")
    assert tab.draw() == "8 pictures of 8x8 pixels, seed 1"
    tab.context.close()


def test_without_gradio_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        page.main([])
    assert end.value.code == 2
    assert "the page needs gradio: pip install 'guided-diffusion[demo]'" in capsys.readouterr().err
