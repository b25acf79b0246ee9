"""Measures emoji32: ``python measure.py TRAIN HELD_OUT`` writes emoji32/results.json and its pictures (half an hour).

For each setting of guidance: accuracy (how often the judge, a classifier of clean pictures that guides none, sees the
class that was asked for), the Frechet distance (FD) of the judge's features to the held-out pictures, precision and
recall. For scale: the same of real pictures. For memorisation: how far samples and held-out pictures are from the
nearest training picture.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guided_diffusion import load
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.evaluation.features import Extractor
from guided_diffusion.evaluation.metrics import frechet_distance, inception_score, precision_recall, statistics
from guided_diffusion.image_datasets import load_data
from guided_diffusion.runtime.files import write_json
from guided_diffusion.runtime.pictures import HALF, Film, save_grid

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import pages

HERE = Path(__file__).parent / "emoji32"
EACH, SIZE, SEED = 16, 32, 0  # samples of each class, pixels
SAMPLING = {"sampler": "dpm++2m", "steps": 20}
SETTINGS = {
    "unguided": {},
    "classifier, scale 1": {"classifier_scale": 1.0},
    "classifier, scale 2": {"classifier_scale": 2.0},
    "classifier, scale 4": {"classifier_scale": 4.0},
    "classifier-free, scale 2": {"cfg_scale": 2.0},
    "classifier-free, scale 3": {"cfg_scale": 3.0},
}
# column of a card's table, the key of its number, how it is written
Forms = dict[str, tuple[str, str]]
FORMS: Forms = {
    "n": ("n", "{}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "FD": ("fd", "{:.2f}"),
    "precision": ("precision", "{:.2f}"),
    "recall": ("recall", "{:.2f}"),
}
Pixels = NDArray[np.uint8]


def pictures(path: str, size: int = SIZE) -> tuple[Pixels, NDArray[np.int64]]:
    """All pictures of a zip, uint8 [N, size, size, C], and their classes [N]."""
    options = {"batch_size": 1, "image_size": size, "class_cond": True, "random_flip": False}
    data = load_data(data_dir=path, classes=str(HERE / "classes.json"), rank=0, world_size=1, **options).dataset
    images, labels = zip(
        *[(image, extra["y"]) for image, extra in (data[index] for index in range(len(data)))], strict=True
    )
    pixels = (np.stack(images).transpose(0, 2, 3, 1) + 1) * HALF
    return pixels.round().astype(np.uint8), np.asarray(labels)


def scores(judge: Extractor, reference: Pixels, images: Pixels, labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, FD to the reference, precision, recall, and the inception score by the judge's classes."""
    real, made = judge(reference), judge(images)
    sides = [statistics(features.pool) for features in (real, made)]
    distance = frechet_distance(*[value for side in sides for value in (side.mean, side.cov)])
    precision, recall = precision_recall(real.pool, made.pool)
    accuracy, score = float(np.mean(made.probs.argmax(axis=1) == labels)), inception_score(made.probs)
    values = {"accuracy": accuracy, "fd": distance, "precision": precision, "recall": recall, "score": score}
    return {"n": len(images), **values}


def nearest(images: Pixels, training: Pixels) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest training picture of each image, and its root mean squared distance in levels of 0 .. 255."""
    flat = training.reshape(len(training), -1).astype(np.float32)
    squared = [((image.reshape(-1).astype(np.float32) - flat) ** 2).mean(axis=1) for image in images]
    return np.asarray([each.argmin() for each in squared]), np.sqrt([each.min() for each in squared])


def near(unseen: Pixels, training: Pixels) -> float:
    """The distance within which a twentieth of the unseen pictures have a training picture."""
    return float(np.quantile(nearest(unseen, training)[1], 0.05))


def write_results(folder: Path, facts: dict[str, Any], results: dict[str, dict[str, float]], forms: Forms) -> None:
    """Write results.json and the table of the model's card."""
    write_json(str(folder / "results.json"), {**facts, "results": results})
    rows = [[title, *(form.format(row[key]) for key, form in forms.values())] for title, row in results.items()]
    pages.write(folder / "README.md", "results", pages.table(["", *forms], rows))


def measure(train: str, held_out: str) -> None:
    """Write results.json, its pictures."""
    model = load(str(HERE), classifier=str(HERE / "classifier"))
    judge = extractor_named(f"classifier:{HERE / 'judge'}")
    (known, known_labels), (unseen, unseen_labels) = pictures(train), pictures(held_out)
    order, count = np.random.default_rng(SEED).permutation(len(known)), EACH * len(model.classes)
    halves = known[order[::2]], known[order[1::2]]
    results = {
        "held-out against training pictures": scores(judge, known, unseen, unseen_labels),
        f"{count} training pictures against held-out": scores(
            judge, unseen, known[order[:count]], known_labels[order[:count]]
        ),
        "one half of the training pictures against the other": scores(judge, *halves, known_labels[order[1::2]]),
    }
    limit = near(unseen, known)
    for title, options in SETTINGS.items():
        options = {
            **SAMPLING,
            **options,
            "classes": model.classes,
            "num_samples": count,
            "batch_size": 45,
            "seed": SEED,
        }
        samples = model.sample(**options)
        which, distance = nearest(samples.images, known)
        close = float(np.mean(distance < limit))
        results[title] = scores(judge, unseen, samples.images, samples.labels) | {"close to training": close}
        print(title, results[title], flush=True)
        if title == "classifier, scale 2":
            samples.save(HERE / "samples.png")
            chosen = np.argsort(distance)[:24]
            pairs = np.stack([samples.images[chosen], known[which[chosen]]], axis=1).reshape(-1, SIZE, SIZE, 3)
            save_grid(str(HERE / "neighbours.png"), pairs, 12)
    facts = {"seed": SEED, **SAMPLING, "closest 5% of held-out": limit}
    write_results(HERE, facts, results, FORMS)
    each, film = len(model.classes), Film(2, len(model.classes))
    options = {**SAMPLING, "classes": model.classes, "classifier_scale": 2.0, "seed": SEED, "callback": film.collect}
    model.sample(num_samples=each, batch_size=each, **options)
    film.save(str(HERE / "film.png"), str(HERE / "film.gif"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python measure.py TRAIN HELD_OUT")
    measure(*sys.argv[1:])
