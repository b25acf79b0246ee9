"""The pictures of evaluations: that they show what the numbers say, and are the same for the same numbers."""

import builtins
import math

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.evaluation import plots


@pytest.fixture
def shown(monkeypatch):
    """The figures that are written."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure, *args, **keywords):
        save(figure, *args, **keywords)  # which lays it out
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize(
    ("label", "top"),
    [("FID", 2), ("FD (judge)", 2), ("Precision", 1), ("Classifier Score (judge)", 1), ("KID", 2), ("Coverage", 1)],
)
def test_the_best_row_is_that_of_the_metrics_own_direction(label, top):
    rows = [{"step": 0, label: math.nan}, {"step": 1, label: 5.0}, {"step": 2, label: 3.0}, {"step": 3}]
    assert plots.best(rows, label)["step"] == top
    assert plots.best([rows[0], rows[3]], label) is None
    assert plots.best([{"step": 1, label: 1.0}, {"step": 2, label: 1.0}], label)["step"] == 1


def test_the_training_has_a_panel_for_each_metric_and_its_best_step_marked(shown, tmp_path):
    rows = [{"step": 10.0, "FID": 9.0, "Precision": 0.2, "Recall": 0.5, "KID": 1.0, "KID standard error": 0.25}]
    rows += [{"step": 20.0, "FID": 4.0, "Precision": 0.6, "Recall": 0.4, "KID": 0.5, "KID standard error": 0.125}]
    rows += [{"step": 30.0, "FID": 6.0}]
    plots.draw_progress(rows, ["FID", "Precision", "Recall", "KID", "KID standard error"], str(tmp_path / "a.png"))
    panels = [axis for axis in shown[0].axes if axis.axison]
    titles = ["FID (lower is better)", "Precision and Recall (higher is better)", "KID (lower is better)"]
    assert [axis.get_title() for axis in panels] == titles
    names = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in panels[:2]]
    assert names == [["FID, best 4"], ["Precision, best 0.6", "Recall, best 0.5"]]
    curve = panels[0].lines[0]
    assert [*zip(*curve.get_data(), strict=True)] == [(10, 9), (20, 4), (30, 6)]
    (bars,) = panels[2].collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.75, 1.25], [0.375, 0.625]]


def test_many_metrics_go_to_several_rows(shown, tmp_path):
    labels = ["Inception Score", "FID", "sFID", "KID"]
    plots.draw_progress([{"step": 1.0, **dict.fromkeys(labels, 1.0)}], labels, str(tmp_path / "a.png"))
    assert sum(axis.axison for axis in shown[0].axes) == 4
    width, height = shown[0].get_size_inches()
    assert width < 15
    assert height > 6


def sweep_rows():
    for sampler in ("ddim", "dpm++2m"):
        for steps in (10, 25):
            for scale in (4.0, 0.0, 1.0):
                values = {"FID": scale + steps, "Precision": 0.5 + scale / 10, "Recall": 0.7 - scale / 10}
                yield {"sampler": sampler, "steps": steps, "scale": scale, **values}


def test_a_sweep_has_a_line_for_each_sampler_and_number_of_steps_in_the_order_of_scales(shown, tmp_path):
    plots.draw_sweep(
        list(sweep_rows()), ["FID", "Precision", "Recall"], str(tmp_path / "a.png"), scale="classifier scale"
    )
    distance, tradeoff = shown[0].axes
    lines = [line for line in distance.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0, 1, 4]] * 4
    assert [list(line.get_ydata()) for line in lines] == [[10, 11, 14], [25, 26, 29]] * 2
    assert [list(np.round(line.get_xdata(), 6)) for line in tradeoff.lines] == [[0.5, 0.6, 0.9]] * 4
    assert [text.get_text() for text in tradeoff.texts] == ["0", "4"] * 4
    assert distance.get_xlabel() == "classifier scale"
    (legend,) = shown[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["ddim, 10 steps", "ddim, 25 steps", "dpm++2m, 10 steps", "dpm++2m, 25 steps"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 4
    bottom = min(axis.get_tightbbox().y0 for axis in (distance, tradeoff))
    assert legend.get_window_extent().y1 <= bottom  # and so not over what is drawn


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plots.draw_sweep(list(sweep_rows()), ["FID", "Precision", "Recall"], str(tmp_path / name))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 500
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    for draw in (plots.require, lambda: plots.draw_progress([], ["FID"], str(tmp_path / "a.png"))):
        with pytest.raises(ValueError, match=r'run `pip install "guided-diffusion\[eval\]"`'):
            draw()


def test_a_picture_takes_the_place_of_the_one_before_only_when_it_is_whole(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "a.png"
    plots.draw_progress([{"step": 1.0, "FID": 1.0}], ["FID"], str(path))
    before = path.read_bytes()

    def fail(*args, **keywords):
        raise OSError("no room")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no room"):
        plots.draw_progress([{"step": 1.0, "FID": 2.0}], ["FID"], str(path))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
