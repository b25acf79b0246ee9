"""report.html: one file that needs nothing else, with the whole history of a run, and the charts in it."""

from __future__ import annotations

import itertools
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.training import charts, report

ROWS = "loss,step,loss_q0,loss_q3,lr,mse,mse_q0,images_per_second,samples,data_wait,eval_fid\n"


class Page(HTMLParser):
    """The addresses in a page, and whether every element that is opened is closed."""

    FREE = ("meta", "img", "path", "circle", "dt", "dd", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.open = list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.FREE:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def run_folder(tmp_path: Path, steps: int = 40) -> Path:
    lines = [
        f"{1 / step},{step},{2 / step},{3 / step},1e-4,0.5,0.25,20,{8 * step},0.25,3" for step in range(1, steps + 1)
    ]
    (tmp_path / "progress.csv").write_text(ROWS + "\n".join([*lines, "nan,41", "torn"]) + "\n")
    return tmp_path


def written(folder: Path, outcome: str = "") -> str:
    flags = {"lr": 1e-4, "data_dir": "<b>", "seed": 0}
    report.Report(str(folder / "progress.csv"), flags, {"lr": 1e-4, "seed": 1}, limit=80).write(outcome)
    return (folder / "report.html").read_text()


def grids(folder: Path, count: int, side: int = 12) -> None:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")


def test_the_page_is_one_file_of_whole_elements(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    grids(folder / "previews", 3)
    (folder / "previews" / "images.png").write_bytes(b"no step")
    (folder / "evaluation.csv").write_text("step,samples,FID,FID standard error\n5,9,80,\n10,10,50,1\n20,10,40,1\n")
    page = Page(text := written(folder))
    assert page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert all(link.startswith("data:image/png;base64,") or (folder / link).exists() for link in page.links)
    assert sum(link.startswith("data:") for link in page.links) == 3
    titles = re.findall("<h3>(.*?)</h3>", text)
    assert titles[:3] == ["Loss", "Loss per quarter of the timesteps", "Learning rate"]
    assert titles[-1] == "FID"
    assert {"mse", "mse_q0"} < set(titles)
    assert not {"eval_fid", "samples", "step"} & set(titles)
    assert "step 5\nFID" not in text  # of another number of samples
    assert "step 10\nFID: 50" in text


def test_it_says_how_far_the_run_is(tmp_path: Path) -> None:
    text = written(run_folder(tmp_path))
    for shown in (
        "<b>41</b><span>of 80 steps",
        "<b>25%</b>",
        "<dt>data_dir<dd>&lt;b&gt;</div>",
        'http-equiv="refresh"',
    ):
        assert shown in text
    changed = text[text.index("<h2>Flags") : text.index("<summary>all 3 flags")]
    assert re.findall("<dt>(.*?)<", changed) == ["data_dir", "seed"]
    text = written(tmp_path, "interrupted")
    assert "interrupted, 2" in text
    assert "refresh" not in text
    assert "to go" not in text


def test_a_run_without_a_row_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("")
    assert Page(written(tmp_path)).open == []


def test_the_grids_are_few_and_small(tmp_path: Path) -> None:
    """The last in its size where it is not too large, of the others some; one that is no picture is left out."""
    folder = run_folder(tmp_path)
    grids(folder / "previews", 16, 420)
    (folder / "previews" / "000000.png").write_bytes(b"torn")
    text = written(folder)
    steps = [int(number) for number in re.findall("<figcaption>step (.*?)<", text)]
    assert len(steps) == report.SHOWN - 1
    assert (steps[0], min(steps)) == (15, 1)
    assert len(text) < 16 * (folder / "previews" / "000001.png").stat().st_size / 4
    grids(folder / "reconstructions", 1)
    assert 'alt="reconstructions/000000.png" class=tiny' in written(folder)


def test_reports_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on by 0.4 s at every look: so long does a report take, and a row that writes none."""
    clock, reports = itertools.count(), list[float]()
    looks = SimpleNamespace(monotonic=lambda: 0.4 * next(clock), strftime=time.strftime)
    monkeypatch.setattr(report, "time", looks)
    kept, page = report.Report(str(run_folder(tmp_path, 3) / "progress.csv"), {}, {}), tmp_path / "report.html"
    for row in range(700):
        kept.writekvs({})
        if page.exists():
            reports.append(0.4 * row)
            page.unlink()
    assert np.diff(reports) == pytest.approx(0.4 / report.SHARE, abs=1)
    assert len(reports) == 4


def test_there_is_none_without_a_table(tmp_path: Path) -> None:
    logger.configure(dir=str(tmp_path), format_strs=["json"])
    with report.reporting({}, {}):
        logger.logkv("step", 1)
        logger.dumpkvs()
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def heights(chart: str) -> list[float]:
    path = re.search('class="curve c0" d="M(.*?)"', chart)
    assert path
    return [float(place.split()[1]) for place in path[1].split("L")]


@pytest.mark.parametrize("count", [1, 2, 119, 120, 121, 100_000])
def test_a_curve_has_a_point_for_each_stretch_and_stays_in_its_frame(count: int) -> None:
    points = [(float(step), math.sin(step / count * 9)) for step in range(count)]
    chart = charts.chart("a", [("b", points)])
    assert len(heights(chart)) == min(count, charts.STRETCHES)
    assert all(charts.TOP <= height <= charts.HEIGHT - charts.BOTTOM for height in heights(chart))
    assert len(chart) < 25_000
    assert ("band" in chart) == (count > 120)
    assert chart.count("<circle") == (count if count <= charts.MARKED else 0)


def test_an_axis_is_logarithmic_where_values_are_far_apart() -> None:
    """1, 0.1, 0.01: equal steps; with "linear" not."""
    points = [(1.0, 1.0), (2.0, 0.1), (3.0, 0.01)]
    logarithmic = np.diff(heights(charts.chart("a", [("b", points)])))
    assert logarithmic[0] == pytest.approx(logarithmic[1], abs=0.2)
    linear = np.diff(heights(charts.chart("a", [("b", points)], scale="linear")))
    assert linear[0] > 5 * linear[1]
    assert ">0</text>" in charts.chart("a", [("b", points)], scale="zero")


def test_values_that_are_no_numbers_break_nothing() -> None:
    assert charts.chart("a", [("b", [(1.0, math.nan)])]) == ""
    chart = charts.chart("a<", [("b&", [(1.0, 2.0), (2.0, math.inf), (3.0, 3.0)]), ("none", [])])
    assert len(heights(chart)) == 2
    assert "a&lt;" in chart
    assert "b&amp;" in chart


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.03125, "0.0312"), (1.5e-5, "1.5e-5"), (-2e-4, "-2e-4"), (999.0, "999"), (1234.0, "1,234")),
        *((12_000.0, "12k"), (1_250_000.0, "1.25M"), (3e9, "3G"), (math.nan, "nan")),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert charts.short(value) == text
