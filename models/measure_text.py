"""Measures emoji32-text: ``python measure_text.py TRAIN HELD_OUT PAIR`` writes its results.json and texts.png.

Samples of 144 captions that the model was trained on and of 144 that it has never seen, at several scales of
classifier-free guidance: how often the own caption is the nearest of twenty (`retrieval`), and the Frechet distance of
the judge's features to the held-out pictures, and how many are nearer to a training picture than held-out pictures are.
Real pictures are measured beside them.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from measure import HERE, SAMPLING, SEED, Forms, near, nearest, write_results
from retrieval import captioned, open_pair, retrieval

from guided_diffusion import load
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.commands.pipeline import Model, Samples
from guided_diffusion.evaluation.features import frechet

FORMS: Forms = {
    "n": ("n", "{}"),
    "retrieval": ("retrieval", "{:.0%}"),
    "FD": ("fd", "{:.2f}"),
    "close to training": ("close to training", "{:.0%}"),
}
OWN, COUNT, SCALES, SHOWN = HERE.parent / "emoji32-text", 144, (1.0, 2.0, 4.0, 7.0), 4.0
# of emoji that it was trained on (to the first blank line), of emoji that it has never seen, of things that are none
PROMPTS = """grinning face\nblue heart\nfrance flag\nred apple\ndog face\npolice officer\nfire\nlarge purple square
automobile\nsunflower\nprincess

orange heart\nlarge green circle\nnicaragua flag\nevergreen tree\nrobot face

blue apple\nangry apple\ngreen dog face\npink fish\nsquare sun\nred frog face\nflag with a heart\npurple automobile"""


def samples_of(model: Model, prompts: Sequence[str], scale: float) -> Samples:
    """A sample for each prompt."""
    options: dict[str, Any] = {**SAMPLING, "cfg_scale": scale, "seed": SEED, "batch_size": 48}
    return model.sample(prompt=[*prompts], num_samples=len(prompts), **options)


def measure(train: str, held_out: str, pair_file: str) -> None:
    """Write results.json and texts.png."""
    model, pair = load(str(OWN)), open_pair(pair_file)
    distance, unseen = frechet(extractor_named(f"classifier:{HERE / 'judge'}")), captioned(held_out)[0]
    known = captioned(train)[0]
    limit = near(unseen, known)
    results = dict[str, dict[str, float]]()
    for side, path in (("training", train), ("held-out", held_out)):
        images, texts = captioned(path)
        first = {each[0]: row for row, each in enumerate(texts)}  # a picture of each name
        names = np.random.default_rng(SEED).permutation(sorted(first))[:COUNT].tolist()
        real = images[[first[name] for name in names]]
        made = {f"scale {scale:g}": samples_of(model, names, scale).images for scale in SCALES}
        for title, pictures in {"real": real, **made}.items():
            values = {"retrieval": retrieval(pair, pictures, names), "fd": distance(unseen, pictures)[1]}
            values["close to training"] = float(np.mean(nearest(pictures, known)[1] < limit))
            results[f"{side} captions, {title}"] = {"n": len(names), **values}
            print(side, title, values, flush=True)
    samples_of(model, [line for line in PROMPTS.splitlines() if line], SHOWN).save(OWN / "texts.png")
    write_results(OWN, {"seed": SEED, **SAMPLING}, results, FORMS)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: python measure_text.py TRAIN HELD_OUT PAIR")
    measure(*sys.argv[1:])
