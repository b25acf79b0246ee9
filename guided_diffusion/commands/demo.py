"""Sample from the bundled model in a minute: without and with guidance, a film of one batch, numbers, a page."""

from __future__ import annotations

import os
import time
from typing import Any

from .entry import entry
from .flags import Flags
from .sections import DemoConfig

MODEL, SHOWN = "emoji32", 4  # columns for each setting
SAMPLING = {"sampler": "dpm++2m", "steps": 20}
SETTINGS: dict[str, dict[str, Any]] = {
    "unguided": {},
    "classifier, scale 1": {"classifier_scale": 1.0},
    "classifier, scale 3": {"classifier_scale": 3.0},
    "classifier-free, scale 2": {"cfg_scale": 2.0},
}
FILM_STEPS = 2  # from one frame to the next
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>guided-diffusion: {model}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100%; image-rendering: pixelated }}
td, th {{ padding: .2rem 1rem .2rem 0; text-align: right }} td:first-child, th:first-child {{ text-align: left }}
</style>
<h1>{model}: {count} samples in {seconds:.0f} seconds</h1>
<p>{sampler}, {steps} steps, seed {seed}. A row is a class; a column has the same noise in all parts.</p>
<img src="demo.png" alt="samples of each class, without guidance and with it">
<table><tr><th>samples<th>accuracy<th>FD<th>seconds</tr>
{rows}</table>
<p>Accuracy: how often a classifier of clean pictures, which guides none, sees the class that was asked for. FD: Frechet
distance of its features to those of held-out pictures, which is larger the fewer samples there are.</p>
<h2>From noise to pictures</h2>
<img src="film.png" alt="the predicted pictures after every second step">
</html>
"""


def show(flags: Flags) -> None:
    """Sample under every setting, print how good the samples are, and write pictures, results.json and index.html."""
    import numpy as np

    from .. import load, logger
    from ..evaluation.images import open_images, read_statistics
    from ..evaluation.metrics import frechet_distance, statistics
    from ..runtime.files import write_json
    from ..runtime.pictures import Film, save_grid
    from . import evaluation, presets

    config, where = flags.part(DemoConfig), presets.BUNDLED / MODEL
    logger.configure(dir=config.log_dir, format_strs=[])
    model, film = load(MODEL), Film(FILM_STEPS)
    judge = evaluation.extractor_named(f"classifier:{where}/judge")
    real = read_statistics(open_images(where / "held-out.npz"))[0]["pool"]
    classes, results, columns = model.classes, dict[str, Any](), []
    print(f"{'samples of ' + MODEL:28} accuracy     FD  seconds")
    for title, options in SETTINGS.items():
        began, count = time.perf_counter(), len(classes) * SHOWN
        options = {**SAMPLING, **options} | ({} if results else {"callback": film.collect})
        samples = model.sample(classes=classes, num_samples=count, batch_size=count, seed=config.seed, **options)
        seconds, features = time.perf_counter() - began, judge(samples.images)
        assert features.probs is not None
        made, guesses = statistics(features.pool), features.probs.argmax(axis=1)
        distance = frechet_distance(real.mean, real.cov, made.mean, made.cov)
        accuracy = float(np.mean(guesses == samples.labels))
        results[title] = {"accuracy": accuracy, "fd": distance, "seconds": round(seconds, 1)}
        print("{:28} {accuracy:8.1%} {fd:6.2f} {seconds:8.1f}".format(title, **results[title]), flush=True)
        columns.append(np.stack([samples.images[samples.labels == label] for label in range(len(classes))]))
    grid = np.concatenate(columns, axis=1)
    save_grid(
        f"{config.log_dir}/demo.png", grid.reshape(-1, *grid.shape[2:]), grid.shape[1], classes, titles=[*SETTINGS]
    )
    film.save(f"{config.log_dir}/film.png", f"{config.log_dir}/film.gif")
    write_json(f"{config.log_dir}/results.json", {"seed": config.seed, **SAMPLING, "samples": results})
    write_page(config, results, len(grid) * grid.shape[1])
    print(f"\nLook at {os.path.abspath(config.log_dir)}/index.html, or at demo.png and film.gif there.")


def write_page(config: DemoConfig, results: dict[str, Any], count: int) -> None:
    """index.html beside the pictures."""
    row = "<tr><td>{}<td>{accuracy:.1%}<td>{fd:.2f}<td>{seconds:.1f}</tr>\n"
    facts = {**SAMPLING, "model": MODEL, "seed": config.seed, "count": count}
    facts |= {"rows": "".join(row.format(title, **values) for title, values in results.items())}
    facts |= {"seconds": sum(values["seconds"] for values in results.values())}
    with open(os.path.join(config.log_dir, "index.html"), "w", encoding="utf-8") as file:
        file.write(PAGE.format(**facts))


main = entry("demo", show)
