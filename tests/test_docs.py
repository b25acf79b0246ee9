"""What README and docs show in Python runs, and does what the text says."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from oracle import GaussianData, make_process
from PIL import Image

from guided_diffusion.commands.cascade_sample import parse_stages
from guided_diffusion.commands.flags import COMMANDS, parse
from guided_diffusion.sampling.loop import network_calls
from guided_diffusion.sampling.samplers import DDIM, SAMPLERS, make_sampler

ROOT = Path(__file__).parent.parent


def snippets(path: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(code, "snippet", "exec", dont_inherit=True), names)
    return names


@pytest.mark.slow
def test_the_guidance_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("\n".join(snippets("docs/guidance.md")))
    assert names["images"].shape == (2, 3, 32, 32)
    assert th.isfinite(names["images"]).all()
    assert (tmp_path / "film.gif").stat().st_size > 0


@pytest.mark.slow
def test_the_three_lines_of_the_readme_make_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("\n".join(snippets("README.md")))
    assert names["images"].images.shape == (8, 32, 32, 3)
    with Image.open(tmp_path / "emoji.png") as picture:
        assert picture.width > picture.height > 32


def test_the_page_about_text_runs_from_top_to_bottom() -> None:
    names = run("\n".join(snippets("docs/text.md")))
    assert names["images"].shape == (2, 3, 16, 16)
    assert th.isfinite(names["images"]).all()


def test_the_sampler_to_begin_with_is_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataclass of under 20 lines and one entry: loop, guidance, masks and command line have it."""
    monkeypatch.setattr("guided_diffusion.sampling.samplers.SAMPLERS", dict(SAMPLERS))
    (code,) = [code for code in snippets("CONTRIBUTING.md") if "SAMPLERS[" in code]
    body = code[code.index("@dataclass") :]
    assert len([line for line in body.splitlines() if line.strip()]) < 20
    run(code)
    (name,) = re.findall(r'SAMPLERS\["(\w+)"\]', code)
    sampler = make_sampler(name)

    process = make_process(1000, "linspace40")
    data, noise = GaussianData(process), th.randn(2, 3, 4, 4, dtype=th.float64)
    options: dict[str, Any] = {"noise": noise, "device": "cpu", "clip_denoised": False}
    exact = data.flow(noise, process.alphas_cumprod[-1], 1.0)
    ours, ddim = (process.sample_loop(kind, data, noise.shape, **options) for kind in (sampler, DDIM()))
    assert (ours - exact).abs().max() < (ddim - exact).abs().max() / 2
    assert network_calls(process, sampler) == 40

    def uphill(x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return th.ones_like(x)

    assert process.sample_loop(sampler, data, noise.shape, cond_fn=uphill, **options).mean() > ours.mean()
    mask, image = th.zeros(1, 1, 4, 4), th.zeros(2, 3, 4, 4, dtype=th.float64)
    mask[..., 0] = 1
    painted = process.sample_loop(sampler, data, noise.shape, init_image=image, mask=mask, **options)
    assert (painted[..., 0] == 0).all()

    from guided_diffusion.commands import common, flags as cli

    flags = cli.parse("image_sample", ["--sampler", name, "--steps", "7"])
    assert repr(sampler) in repr(common.sampler_of(flags))


def test_the_page_of_the_architecture_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = [name for name in re.findall(r"`([\w/]+\.(?:py|md|svg))`", page) if "NAME" not in name]
    assert [name for name in named if not any((ROOT / top / name).exists() for top in ("guided_diffusion", "."))] == []
    for life in re.findall(r"^## The life of .*?(?=^## )", page, re.MULTILINE | re.DOTALL):
        assert 4 <= len(set(re.findall(r"`([\w/]+\.py)`", life))) <= 8
    assert len(page.splitlines()) < 100
    picture = (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "guided_diffusion").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "guided_diffusion").glob("[a-z]*.py")}
    assert [name for name in rooms if f"{name}/" not in picture] == []
    assert [name for name in modules if name not in picture] == []


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "models").rglob("*.md"),
    *(ROOT / "notebooks").glob("*.md"),
    ROOT / "datasets/README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    text = re.sub(r"^(```.*?^```|    .*?$)", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


OF_OTHERS = r"\$|\.\.\.|--plugin|--preset|--stages|N_ROW"  # shell variables, files that are not there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_have_flags_and_values_that_there_are(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for name, words in re.findall(r"^    .*(?:scripts/|guided-diffusion )(\w+)(?:\.py)?( .*)$", text, re.MULTILINE):
        if name in COMMANDS and not re.search(OF_OTHERS, words):
            argv = shlex.split(words, comments=True)
            parse_stages(argv) if name == "cascade_sample" else parse(name, argv)


def size_of(program: str) -> tuple[int, int, int]:
    """Lines, imported names, and names that one must know to write it."""
    nodes = list(ast.walk(ast.parse(program)))
    imported = [name.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    keywords = {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
    lines = [line for line in program.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 120
    return len(lines), len(imported), len({*imported, *attributes, *keywords})


def test_the_comparison_counts_its_programs_and_ours_are_the_shortest() -> None:
    page = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```py(?:thon)?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\|.*\| (ours|diffusers|azula) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == ["ours", "diffusers", "azula"] * 3
    sizes = [size_of(program) for program in programs]
    assert [tuple(map(int, counts)) for _, *counts in rows] == sizes
    for ours, *others in (sizes[start : start + 3] for start in (0, 3, 6)):
        assert all(mine < theirs for other in others for mine, theirs in zip(ours, other, strict=True))


@pytest.mark.slow
def test_our_programs_of_the_comparison_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Image.fromarray(pixels[..., 0] // 128 * 255).save("mask.png")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/pets").symlink_to(ROOT / "models/emoji32")
    for program in snippets("docs/comparison.md"):
        run(program)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "photo.png",
        "mask.png",
        "guided.png",
        "painted.png",
        "grid.png",
    }


def test_the_site_shows_every_page() -> None:
    """A page that is in no navigation would fail `make docs`."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"- (?:[^:\n]*: )?(\S+\.md)$", navigation, re.MULTILINE))
    pages = {str(page.relative_to(ROOT)) for page in PAGES}
    pages |= {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    rooms = {path.parent.name for path in (ROOT / "guided_diffusion").glob("*/__init__.py")} | {"modules"}
    assert listed == pages | {f"api/{room}.md" for room in rooms}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    """As `make docs` builds it, where its extra is installed. Pages may link to other hosts, but load nothing there."""
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    assert {"index.html", "docs/concepts.html", "notebooks/quick_start.html", "api/sampling.html"} <= pages.keys()
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\"\s>]+)", page)
        loaded += re.findall(r"<link\b[^>]*\brel=\"?(?:stylesheet|preconnect|icon)\b[^>]*\bhref=\"?([^\"\s>]+)", page)
        assert [url for url in loaded if "//" in url] == [], name
        local = [url.partition("#")[0] for url in loaded if not url.startswith("data:")]
        assert [
            url for url in local if name != "404.html" and not (tmp_path / name).parent.joinpath(url).exists()
        ] == [], name
    assert "<math" in pages["docs/concepts.html"]
    assert "arithmatex" not in pages["docs/concepts.html"]
    assert "Parameters:" in pages["api/sampling.html"]
    assert ":param" not in pages["api/sampling.html"]
