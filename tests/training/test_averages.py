"""Averages by power functions: what a run saves, and any other of them, made afterwards, against the sum itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch as th
from test_train_util import files, make, pictures, stream  # noqa: F401 - a fixture

from guided_diffusion.commands import ema
from guided_diffusion.training import averages, checkpoints

UPDATES, EVERY, WIDTHS = 2000, 125, (0.05, 0.1)


def weights_of_updates(updates: int, width: float) -> np.ndarray:
    """The share of each update 1 .. updates in an average."""
    ends = (np.arange(updates + 1) / updates) ** (averages.exponent(width) + 1)
    return np.diff(ends)


def trajectory() -> np.ndarray:
    """Weights [updates, 4] that stand still, drift, swing and walk at random."""
    s = np.arange(1, UPDATES + 1) / UPDATES
    walk = np.random.default_rng(0).normal(size=UPDATES).cumsum() / UPDATES**0.5
    return np.stack([np.ones_like(s), s, np.sin(9 * s), walk], axis=1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with the averages of a run whose weights are known at every update."""
    path = trajectory()
    for step in range(EVERY, UPDATES + 1, EVERY):
        for width in WIDTHS:
            value = th.from_numpy(weights_of_updates(step, width) @ path[:step]).float()
            checkpoints.save(str(tmp_path / f"power_{width}_{step:06d}.pt"), {"w": value, "n": th.tensor(step)})
    return tmp_path


def test_widths_are_those_of_the_paper() -> None:
    # Karras et al. 2024, sec. 3.1: widths of 0.05 and 0.10 are exponents of 16.97 and 6.94
    assert [round(averages.exponent(width), 2) for width in WIDTHS] == [16.97, 6.94]
    share = weights_of_updates(UPDATES, 0.05)
    place = (np.arange(UPDATES) + 0.5) / UPDATES
    assert abs(np.sqrt(share @ place**2 - (share @ place) ** 2) - 0.05) < 1e-6


@pytest.mark.parametrize(("width", "step"), [(0.05, 2000), (0.07, 2000), (0.03, 1500), (0.15, 2000), (0.2, 1500)])
def test_any_profile_is_the_average_that_a_run_would_have_kept(run: Path, width: float, step: int) -> None:
    out = str(run / f"profile_{width:g}_{step:06d}.safetensors")
    ema.main([str(run), "--profile", str(width), "--step", str(step)])
    made = checkpoints.load(out)
    exact = weights_of_updates(step, width) @ trajectory()[:step]
    np.testing.assert_allclose(made["w"].numpy(), exact, atol=0.006)
    assert made["w"][0] == pytest.approx(1, abs=1e-6)  # what stands still stays
    assert made["n"] == step


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--profile", "0.01"], "outside of what the averages up to step 2000 make, 0.022 to 0.2"),
        pytest.param(["--profile", "0.5"], "outside of what the averages up to step 2000 make", marks=pytest.mark.slow),
        (["--step", "7"], "--step 7 is none of 125, 250"),
        (["--out", "x.bin"], "must end in .safetensors or .pt"),
    ],
)
def test_what_cannot_be_made_is_a_sentence(run: Path, words: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit):
        ema.main([str(run), *words])
    assert sentence in capsys.readouterr().err


def test_a_folder_without_averages_or_with_those_of_two_networks_is_refused(run: Path, capsys) -> None:
    (run / "empty").mkdir()
    checkpoints.save(str(run / "power_0.05_002000.pt"), {"other": th.ones(2)})
    cases = {"emptt": "emptt does not exist; did you mean empty?", "empty": "holds no power_WIDTH_NNNNNN.pt"}
    for source, sentence in [*((run / name, fault) for name, fault in cases.items()), (run, "is of another network")]:
        with pytest.raises(SystemExit):
            ema.main([str(source), "--profile", "0.07"])
        assert sentence in capsys.readouterr().err


def test_two_far_widths_of_one_checkpoint_name_both_parts_of_their_range() -> None:
    stored = [(100, 0.01), (100, 0.2)]
    assert ", " in averages.spans(stored, 100)
    assert averages.shares(stored, 100, 0.01)[1] < 1e-6


def flat(folder: Path, kind: str, step: int) -> th.Tensor:
    state = checkpoints.load(str(folder / f"{kind}{step:06d}.pt"))
    return th.cat([value.flatten() for value in state.values()])


def test_a_run_saves_them_goes_on_to_the_bit_and_keeps_them(tmp_path: Path, pictures) -> None:  # noqa: F811
    """Resumed in the middle, with fewer checkpoints kept than averages; a file of them is a network to sample from."""
    options = {"ema_profiles": "0.05,0.25", "save_interval": 1, "ema_rate": "0.5"}
    make(tmp_path / "straight", stream(pictures), max_steps=4, **options).run_loop()
    parts = tmp_path / "parts"
    make(parts, stream(pictures), max_steps=2, **options).run_loop()
    again = make(parts, stream(pictures), max_steps=4, keep_last=2, resume_checkpoint=str(parts), **options)
    again.run_loop()
    for width in (0.05, 0.25):
        steps = th.stack([flat(tmp_path / "straight", "model", step) for step in (1, 2, 3, 4)]).double()
        expected = th.from_numpy(weights_of_updates(4, width)) @ steps
        th.testing.assert_close(flat(parts, f"power_{width}_", 4).double(), expected, rtol=1e-5, atol=1e-6)
        assert th.equal(flat(parts, f"power_{width}_", 4), flat(tmp_path / "straight", f"power_{width}_", 4))
    assert [name for name in files(parts) if name.startswith("model")] == ["model000003.pt", "model000004.pt"]
    assert len([name for name in files(parts) if name.startswith("power")]) == 8
    assert list(checkpoints.sets_in(str(parts))) == [3, 4]
    assert checkpoints.open_checkpoint(str(parts / "power_0.05_000004.pt")).weights.keys() >= {"out.2.bias"}


@pytest.mark.parametrize("widths", ["wide", "0", "0.3", "0.05,-1"])
def test_profiles_need_widths(tmp_path: Path, pictures, widths: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=f"ema_profiles '{widths}' is not a list of widths from 0 to 0.28"):
        make(tmp_path, stream(pictures), ema_profiles=widths)
