"""The claims of Dhariwal & Nichol (2021), measured on emoji32: ``python paper.py TRAIN HELD_OUT SEEDS`` (hours).

Every setting is sampled once for each seed, and its scores are kept in paper.json, so that a run that was stopped goes
on where it was; then the tables and the picture of docs/paper.md are made anew. A setting is a row of `CLAIMS`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion import load
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.runtime.files import write_json

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from measure import HERE, pictures, scores

import pages

PAGE, RESULTS = pages.DOCS / "paper.md", Path(__file__).parent / "paper.json"
EACH = 16  # samples of a class
MISSING = "Not measured yet; `make paper` fills this in."
SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
FAST = {"sampler": "dpm++2m", "steps": 20}
GUIDED = {"classifier_scale": 2.0}
UNCONDITIONAL = {"cfg_scale": 0.0}  # the network's answer without a label
CLAIMS: dict[str, dict[str, dict[str, Any]]] = {
    "scale, conditional": {f"{scale:g}": {**FAST, "classifier_scale": scale} for scale in SCALES},
    "guidance": {
        "none": FAST,
        "classifier 2": {**FAST, **GUIDED},
        "classifier-free 2": {**FAST, "cfg_scale": 2.0},
        "classifier-free 2, 14 steps": {**FAST, "cfg_scale": 2.0, "steps": 14},
        "classifier 1 and classifier-free 1.5": {**FAST, "classifier_scale": 1.0, "cfg_scale": 1.5},
        "classifier 2, t in 0..500": {**FAST, **GUIDED, "guidance_interval": "0,500"},
        "classifier 2, t in 500..999": {**FAST, **GUIDED, "guidance_interval": "500,999"},
        "classifier-free 2, t in 0..500": {**FAST, "cfg_scale": 2.0, "guidance_interval": "0,500"},
        "classifier-free 2, t in 500..999": {**FAST, "cfg_scale": 2.0, "guidance_interval": "500,999"},
    },
    "scale, unconditional": {f"{scale:g}": {**FAST, **UNCONDITIONAL, "classifier_scale": scale} for scale in SCALES},
}
SAMPLERS: list[tuple[str, int]] = [
    *[("unipc", steps) for steps in (10, 15, 20)],
    *[("dpm++2m", steps) for steps in (10, 15, 20)],
    ("dpm++2m_sde", 20),
    ("ddim", 25),
    ("ddpm", 25),
    ("ddpm", 250),
]
for title, options in (("samplers", {}), ("samplers, guided", GUIDED)):
    CLAIMS[title] = {f"{name}, {steps}": {"sampler": name, "steps": steps, **options} for name, steps in SAMPLERS}
CLAIMS["samplers"]["ddpm, 1000"] = {"sampler": "ddpm", "steps": 1000}
COLUMNS = {
    "fd": "FD",
    "precision": "precision",
    "recall": "recall",
    "score": "classifier score",
    "accuracy": "accuracy",
}
DIGITS = {"fd": "{:.2f}", "precision": "{:.3f}", "recall": "{:.3f}", "score": "{:.2f}", "accuracy": "{:.1%}"}


def settings(seeds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each setting with each seed, under the key of its scores: one seed after another, few steps first."""
    rows = [(f"{claim}|{row}", options) for claim, rows in CLAIMS.items() for row, options in rows.items()]
    for seed in range(seeds):
        for key, options in sorted(rows, key=lambda row: row[1]["steps"]):
            yield f"{key}|{seed}", {**options, "seed": seed}


def known(path: Path) -> dict[str, dict[str, float]]:
    """The scores that a file has already."""
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def measure(train: str, held_out: str, seeds: int) -> None:
    """Sample and score what paper.json does not have yet."""
    found = known(RESULTS)
    model, judge = load(str(HERE), classifier=str(HERE / "classifier")), extractor_named(f"classifier:{HERE / 'judge'}")
    unseen, _ = pictures(held_out)
    keys = {json.dumps(options, sort_keys=True): key for key, options in settings(seeds) if key in found}
    for key, options in settings(seeds):
        same = keys.setdefault(json.dumps(options, sort_keys=True), key)
        if same in found:  # another row of the same setting
            found[key] = found[same]
            continue
        guided = {name: value for name, value in options.items() if name != "classifier_scale" or value}
        samples = model.sample(classes=model.classes, num_samples=EACH * len(model.classes), batch_size=48, **guided)
        found[key] = scores(judge, unseen, samples.images, samples.labels)
        print(key, found[key], flush=True)
        write_json(str(RESULTS), found)
    write_json(str(RESULTS), found)


def write_page() -> None:
    """The tables of docs/paper.md, mean and standard deviation over the seeds, and its picture."""
    found = known(RESULTS)
    for claim, rows in CLAIMS.items():
        lines = []
        for row in rows:
            runs = [values for key, values in found.items() if key.rpartition("|")[0] == f"{claim}|{row}"]
            if runs:
                lines.append([row, *(cell([run[name] for run in runs], name) for name in COLUMNS), len(runs)])
        table = pages.table([claim.partition(",")[0], *COLUMNS.values(), "seeds"], lines)
        pages.write(PAGE, claim, table if lines else MISSING)
    draw(found)


def cell(values: list[float], name: str) -> str:
    """Mean and spread of a column."""
    mean, spread = (
        DIGITS[name].format(np.mean(values)),
        DIGITS[name].format(np.std(values, ddof=1) if values[1:] else 0),
    )
    return f"{mean} ± {spread}" if values[1:] else mean


def draw(found: dict[str, dict[str, float]]) -> None:
    """The scores over the scale of guidance, docs/paper.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), dpi=100, layout="constrained")
    panels = figure.subplots(1, 4)
    for kind, look in (("conditional", "o-"), ("unconditional", "s--")):
        for panel, name in zip(panels, ("fd", "precision", "recall", "accuracy"), strict=True):
            claim = f"scale, {kind}"
            runs = [[v[name] for k, v in found.items() if k.rpartition("|")[0] == f"{claim}|{s:g}"] for s in SCALES]
            points = [(scale, np.mean(each)) for scale, each in zip(SCALES, runs, strict=True) if each]
            if points:
                panel.plot(*zip(*points, strict=True), look, label=kind)
            panel.set(title=COLUMNS[name], xlabel="classifier scale", xscale="symlog", xticks=SCALES)
            panel.set_xticklabels([f"{scale:g}" for scale in SCALES])
    for panel in panels:
        panel.set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    figure.savefig(str(pages.DOCS / "paper.png"))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: python paper.py TRAIN HELD_OUT SEEDS")
    measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    write_page()
