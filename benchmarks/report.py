"""Tables and the picture of docs/samplers.md, and where they go in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

import pages

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from guided_diffusion.sampling.loop import network_calls
from guided_diffusion.sampling.samplers import SAMPLERS, make_sampler

Rows = Mapping[str, Sequence[tuple[int, float]]]

# colour-blind safe (Okabe & Ito 2008); a colour for each family, a line for each kind
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000 #8a8a8a #e69f00 #56b4e9 #009e73 #0072b2 #d55e00 #cc79a7".split()
)
LOOKS = {
    "ddim": (BLACK, "-", "o"),
    "euler": (BLACK, "--", "o"),
    "plms": (ORANGE, "-", "s"),
    "lms": (SKY, "-", "s"),
    "deis": (GREEN, "-", "D"),
    "dpm++2m": (BLUE, "-", "^"),
    "unipc": (RED, "-", "v"),
    "heun": (PURPLE, "--", "P"),
    "dpm++2s": (BLUE, "--", "^"),
    "dpm2": (GREEN, "--", "X"),
    "dpm3": (ORANGE, "--", "*"),
    "ddpm": (GREY, ":", "o"),
    "ddim, eta 1": (BLACK, ":", "o"),
    "euler_ancestral": (PURPLE, ":", "P"),
    "dpm++2m_sde": (BLUE, ":", "^"),
    "dpm++3m_sde": (SKY, ":", "d"),
    "sa": (RED, ":", "v"),
}
OTHER = (GREY, "-", "p")  # a sampler that is new here
PANELS = [
    ("flow-2d", "plane: distance from the flow"),
    ("flow-2d-guided", "plane, guided: distance from the flow"),
    ("distribution-2d", "plane: distance from the distribution"),
    ("flow-images", "3x32x32: distance from the flow"),
    ("flow-images-guided", "3x32x32, guided: distance from the flow"),
    ("scatter-images", "3x32x32: error of the scatter"),
]
EXACT = "exact samples"
IN_DISTRIBUTION = ("ddim", "dpm++2m", "unipc")  # of the deterministic ones, so that lines can be told apart


def own_grid(sampler: str) -> str:
    """The prefix of a sampler's own step grid."""
    return str(SAMPLERS[sampler].grid)


def number(value: float) -> str:
    """Two significant digits, without an exponent."""
    return np.format_float_positional(value, precision=2, unique=False, fractional=False, trim="-")


def table(rows: Rows, budgets: Sequence[int]) -> str:
    """Errors by sampler and budget, the smallest of each budget in bold."""
    samplers = [row for name, row in rows.items() if name != EXACT]
    best = [min(row[column][1] for row in samplers) for column in range(len(budgets))]
    lines = [["sampler", *map(str, budgets)], ["---", *["--:"] * len(budgets)]]
    for name, row in rows.items():
        marked = (
            _bold(number(error), error == least and name != EXACT) for (_, error), least in zip(row, best, strict=True)
        )
        lines.append([name, *marked])
    return pages.lines(lines)


def grid_table(rows: Mapping[str, Sequence[float]], grids: Sequence[str]) -> str:
    """Errors by sampler and step grid, the smallest of each sampler in bold, and that of its own grid marked."""
    lines = [["sampler", *(f"`{grid}N`" for grid in grids)], ["---", *["--:"] * len(grids)]]
    for name, row in rows.items():
        own = [" (own)" if grid == own_grid(name) else "" for grid in grids]
        lines.append([name, *(_bold(number(e), e == min(row)) + mark for e, mark in zip(row, own, strict=True))])
    return pages.lines(lines)


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def overview(process: Any) -> str:
    """One line for each sampler: its options, its own grid, the calls in as many steps as `process` has, its rule."""
    steps = process.num_timesteps
    lines = [["sampler", "options", "own grid", f"calls in {steps} steps", "what it is"], ["---"] * 3 + ["--:", "---"]]
    for name, kind in SAMPLERS.items():
        options = ", ".join(f"{spec.name} = {spec.default:g}" for spec in fields(kind))
        calls = network_calls(process, make_sampler(name))
        rule = (inspect.getdoc(kind) or "").splitlines()[0]
        lines.append([f"`{name}`", options, f"`{own_grid(name)}N`", str(calls), rule])
    return pages.lines(lines)


def draw(tables: Mapping[str, Rows], path: Path) -> None:
    """Errors by calls of the network, a panel for each of `PANELS`."""
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 9.4), layout="constrained")
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        _panel(axis, tables[key], title, everything=key.startswith("flow"))
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    shown = [name for name in dict.fromkeys((*LOOKS, *lines)) if name in lines]
    figure.legend(
        [lines[name] for name in shown], shown, loc="outside lower center", ncols=6, handlelength=4, frameon=False
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    with Image.open(path) as picture:  # a quarter of the size
        picture.convert("RGB").quantize(128).save(path, optimize=True)


def _panel(axis: Axes, rows: Rows, title: str, *, everything: bool) -> None:
    for name, row in rows.items():
        if name == EXACT:
            axis.axhline(row[0][1], color=GREY, lw=6, alpha=0.3, label=name)
            continue
        colour, line, marker = LOOKS.get(name, OTHER)
        if everything or line == ":" or name in IN_DISTRIBUTION:
            axis.loglog(*zip(*row, strict=True), color=colour, ls=line, marker=marker, ms=4.5, lw=1.4, label=name)
    budgets = [5, 10, 20, 50, 100]
    axis.set_xticks(budgets, list(map(str, budgets)))
    axis.set_xticks([], minor=True)
    axis.set_ylim(top=min(axis.get_ylim()[1], 2.0))
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("calls of the network")
    axis.grid(alpha=0.3)
