"""What `make docs` renders: pages and what they link to, at their places in the repository, notebooks, and the API.

MkDocs knows one folder of pages. These hooks of it give it the repository's own tree instead, so that links are the
same here, in an editor and on a host of repositories.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "guided_diffusion"
FOLDERS = ("docs", "datasets", "models", "notebooks", "benchmarks")
SHOWN = {".md", ".png", ".svg", ".css", ".py"}
LINKED = ("LICENSE", "CITATION.cff", "tests/evaluation/test_likelihood.py")
ONLY = {"commands": ["pipeline"]}  # modules of a room that are called from Python; of all others, all
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Pages, pictures and scripts of the repository, notebooks as pages, and a page for each room of the package."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SHOWN]
    paths += [*ROOT.glob("*.md"), *map(ROOT.joinpath, LINKED)]
    found = [File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)) for path in sorted(paths)]
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        found += _notebook(notebook, config)
    pages = {f"api/{room}.md": text for room, text in _reference().items()}
    found += [File.generated(config, name, content=text) for name, text in pages.items()]
    of_the_theme = [file for file in files if file.src_dir != config["docs_dir"]]
    return Files([*of_the_theme, *found])


def _notebook(path: Path, config: Any) -> list[File]:
    """The page of a notebook, and its pictures."""
    exporter = MarkdownExporter()
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    text, resources = exporter.from_filename(str(path), resources={"unique_key": path.stem})
    pictures = resources["outputs"].items()
    page = File.generated(config, f"notebooks/{path.stem}.md", content=text)
    return [page, *(File.generated(config, f"notebooks/{name}", content=content) for name, content in pictures)]


def _reference() -> dict[str, str]:
    """By room, a page whose blocks mkdocstrings fills; `modules` are those at the top of the package."""
    rooms = {room.parent.name: room.parent for room in sorted(PACKAGE.glob("*/__init__.py"))}
    return {name: _page(folder, ONLY.get(name, [])) for name, folder in ({"modules": PACKAGE} | rooms).items()}


def _page(folder: Path, only: list[str]) -> str:
    names = only or sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
    package = ".".join(folder.relative_to(ROOT).parts)
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    about = "" if only else ast.get_docstring(tree) or ""
    return "\n\n".join([f"# {package}", about, *(f"::: {package}.{name}" for name in names)]) + "\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to their pages."""
    return re.sub(r"(\]\([^)\s]+)\.ipynb\)", r"\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw themselves."""
    return MATH.sub(lambda match: convert(_plain(match[2]), display="block" if match[1] == "div" else "inline"), html)


def _plain(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()
