"""Sounds and volumes: the code of docs/shapes.md runs, and what it trains makes data like its own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch as th
from test_docs import run, snippets

pytestmark = pytest.mark.slow  # the page trains two networks


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that are left when the page is run from top to bottom."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {"folder": folder, **run("\n".join(snippets("docs/shapes.md")))}


def power(sounds: th.Tensor) -> th.Tensor:
    """Share of each frequency, 0 .. 16 periods."""
    spectrum = th.fft.rfft(sounds[:, 0]).abs() ** 2
    return spectrum.mean(dim=0) / spectrum.mean()  # of white noise 1 everywhere


def test_sounds_have_the_pitch_and_the_decay_of_the_data(page: dict[str, Any]) -> None:
    sounds, (data, _) = page["sounds"], next(page["Tones"](500))
    assert sounds.shape == (64, 1, 32)
    assert sounds.mean() == pytest.approx(0, abs=0.05)
    envelope, theirs = (x.std(dim=0).squeeze().view(4, 8).mean(dim=1) for x in (sounds, data))
    assert th.allclose(envelope, theirs, atol=0.12)
    assert envelope[0] > 2 * envelope[3]
    inside = power(sounds)[3:7].sum() / 17
    assert inside == pytest.approx(float(power(data)[3:7].sum() / 17), abs=0.15)
    assert inside > 0.7  # and 4 / 17 of white noise
    assert th.isfinite(sounds).all()


def test_volumes_have_the_size_that_their_labels_say(page: dict[str, Any]) -> None:
    volumes, labels, (data, keywords) = page["volumes"], page["labels"], next(page["Balls"](400))
    assert volumes.shape == (16, 1, 4, 8, 8)
    for label in (0, 1):
        ours, theirs = volumes[labels == label], data[keywords["y"] == label]
        assert ours.mean() == pytest.approx(float(theirs.mean()), abs=0.1)
        assert (ours.mean(dim=0) - theirs.mean(dim=0)).abs().mean() < 0.2  # they lie in the middle too
        inside, wanted = ((x > 0).flatten(1).sum(dim=1).float().mean() for x in (ours, theirs))
        assert inside == pytest.approx(float(wanted), rel=0.35)


def test_the_losses_fall(page: dict[str, Any]) -> None:
    for name in ("tones", "balls"):
        rows = (page["folder"] / "runs" / name / "progress.csv").read_text().splitlines()
        column = rows[0].split(",").index("loss")
        first, last = (float(row.split(",")[column]) for row in (rows[1], rows[-1]))
        assert last < 0.85 * first


def test_the_runs_are_like_any_other(page: dict[str, Any]) -> None:
    """Their checkpoints are whole, and hold where the data stood; samples are labelled and in an npz."""
    for name, steps in (("tones", 200), ("balls", 100)):
        run_folder = page["folder"] / "runs" / name
        files = {path.name for path in run_folder.iterdir()}
        assert {f"model{steps:06d}.pt", f"opt{steps:06d}.pt", f"set{steps:06d}.json", "config.json"} <= files
        state = th.load(run_folder / f"state{steps:06d}.pt", weights_only=True)
        assert steps in state["data"].values() if "data" in state else str(steps) in json.dumps(str(state))
    with np.load(page["folder"] / page["path"]) as arrays:
        assert arrays["arr_0"].shape == (6, 4, 8, 8, 1)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]
        filled = (arrays["arr_0"] > 127).reshape(6, -1).sum(axis=1)
    assert filled[1::2].min() > filled[0::2].max()
