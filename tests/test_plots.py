"""The pictures of evaluations: that they show what the numbers say, and are the same for the same numbers."""

import builtins
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evaluations import clouds, figures, plots
from evaluations.metrics import precision_recall, statistics
from evaluations.scores import FeatureSet


def cloud(n, seed, *, shift=0.0, scale=1.0, d=8):
    values = np.random.default_rng(seed).standard_normal((n, d)) * np.linspace(2, 0.5, d) * scale
    values[:, 0] += shift
    return values.astype(np.float32)


def features(pool, *, images=True):
    return FeatureSet(n=len(pool), pool=pool if images else None, pool_statistics=statistics(pool))


@pytest.fixture
def shown(monkeypatch):
    """The figures that are written, as they are filled."""
    figures_seen = []

    def write(path, width, height, fill):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        fill(figure)
        figure.savefig(io.BytesIO())  # which lays it out
        figures_seen.append(figure)

    for module in (clouds, plots):
        monkeypatch.setattr(module, "write", write)
    return figures_seen


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


# ---- which value is better


@pytest.mark.parametrize(
    ("label", "top"),
    [("FID", 2), ("FD (judge)", 2), ("Precision", 1), ("Classifier Score (judge)", 1), ("KID", 2), ("Coverage", 1)],
)
def test_the_best_row_is_that_of_the_metrics_own_direction(label, top):
    rows = [{"step": 0, label: math.nan}, {"step": 1, label: 5.0}, {"step": 2, label: 3.0}, {"step": 3}]
    assert figures.best(rows, label)["step"] == top
    assert figures.best([rows[0], rows[3]], label) is None
    assert figures.best([{"step": 1, label: 1.0}, {"step": 2, label: 1.0}], label)["step"] == 1


# ---- two sets of images


def test_what_is_marked_as_inside_is_what_precision_and_recall_count(shown):
    reference, samples = cloud(300, 0), cloud(200, 1, shift=5, scale=0.9)
    clouds.draw_comparison(features(reference), features(samples), {"FD (judge)": 12.3456}, "unused.png")
    precision, recall = precision_recall(reference, samples)
    assert 0.05 < precision < 0.95
    assert 0.05 < recall < 0.95
    left, right, table = shown[0].axes
    for axis, share, count in ((left, precision, 200), (right, recall, 300)):
        inside, outside = [c for c in axis.collections if hasattr(c, "get_offsets") and len(c.get_offsets()) > 1]
        assert len(inside.get_offsets()) == round(share * count)
        assert len(outside.get_offsets()) == count - round(share * count)
        assert f"{share:.0%} of them in its manifold" in axis.get_title()
    assert left.get_xlim() == right.get_xlim()
    said = ["200 samples", "300 reference images", "features: judge", "FD", "12.35"]
    assert [text for text in texts(shown[0]) if text] == said
    assert not table.axison


def test_where_precision_and_recall_are_known_they_are_what_is_said(shown):
    results = {"Precision": 0.9444, "Recall": 0.25}
    clouds.draw_comparison(features(cloud(30, 0)), features(cloud(30, 1)), results, "unused.png")
    titles = [axis.get_title().splitlines()[-1] for axis in shown[0].axes[:2]]
    assert titles == ["Precision 0.944", "Recall 0.250"]


def test_the_first_axis_is_the_direction_in_which_the_reference_varies_most(shown):
    """Of points on a line the whole variance is there, and a shift along it shows at its length."""
    line = np.zeros((101, 5), np.float32)
    line[:, 3] = np.linspace(-1, 1, 101)
    moved = line.copy()
    moved[:, 3] += 10
    clouds.draw_comparison(features(line), features(moved), {}, "unused.png")
    axis = shown[0].axes[0]
    assert axis.get_xlabel() == "first principal component (100% of the variance)"
    places = np.concatenate([c.get_offsets() for c in axis.collections if len(c.get_offsets()) > 1])
    np.testing.assert_allclose(np.sort(places[:, 0]), np.linspace(9, 11, 101), atol=1e-6)
    assert "0% of them" in axis.get_title()


def test_a_reference_of_statistics_alone_is_drawn_as_its_gaussian(shown):
    reference = cloud(4000, 0)
    known = replace(features(reference, images=False), n=0)
    clouds.draw_comparison(known, features(cloud(50, 1)), {"FID": 1.0}, "unused.png")
    axis, table = shown[0].axes
    assert [text.get_text() for text in table.texts][:2] == ["50 samples", "statistics of the reference"]
    one, two = (patch.get_xy() for patch in axis.patches)
    np.testing.assert_allclose(np.abs(two).max(axis=0), 2 * np.abs(one).max(axis=0), rtol=1e-9)
    deviations = np.sqrt(np.sort(np.linalg.eigvalsh(np.cov(reference, rowvar=False)))[::-1][:2])
    np.testing.assert_allclose(np.abs(one).max(axis=0), deviations, rtol=1e-3)


def test_names_and_values_of_metrics_have_room(shown):
    results = {"KID": 0.0012345, "KID standard error": 0.00012345, "Inception Score": 215.83}
    clouds.draw_comparison(features(cloud(60, 0)), features(cloud(40, 1)), results, "unused.png")
    boxes = {text.get_text(): text.get_window_extent() for text in shown[0].axes[-1].texts}
    assert boxes["KID standard error"].x1 + 10 < boxes["0.0001234"].x0
    assert boxes["0.0001234"].x1 <= shown[0].bbox.x1


def test_without_features_there_is_no_comparison(tmp_path):
    bare = FeatureSet(n=3)
    with pytest.raises(ValueError, match="compares features, and there are none"):
        clouds.draw_comparison(features(cloud(9, 0)), bare, {}, str(tmp_path / "a.png"))
    assert list(tmp_path.iterdir()) == []


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        clouds.draw_comparison(features(cloud(60, 0)), features(cloud(40, 1)), {"FID": 2.0}, str(tmp_path / name))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 500
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


# ---- over the training


def test_the_training_has_a_panel_for_each_metric_and_its_best_step_marked(shown):
    rows = [{"step": 10.0, "FID": 9.0, "Precision": 0.2, "Recall": 0.5, "KID": 1.0, "KID standard error": 0.25}]
    rows += [{"step": 20.0, "FID": 4.0, "Precision": 0.6, "Recall": 0.4, "KID": 0.5, "KID standard error": 0.125}]
    rows += [{"step": 30.0, "FID": 6.0}]
    plots.draw_progress(rows, ["FID", "Precision", "Recall", "KID", "KID standard error"], "unused.png")
    panels = [axis for axis in shown[0].axes if axis.axison]
    titles = ["FID (lower is better)", "Precision and Recall (higher is better)", "KID (lower is better)"]
    assert [axis.get_title() for axis in panels] == titles
    assert [text.get_text() for text in panels[0].texts] == ["4"]
    assert [text.get_text() for text in panels[1].texts] == []
    names = [text.get_text() for text in panels[1].get_legend().get_texts()]
    assert names == ["Precision, best 0.6", "Recall, best 0.5"]
    curve = panels[0].lines[0]
    assert [*zip(*curve.get_data(), strict=True)] == [(10, 9), (20, 4), (30, 6)]
    (bars,) = panels[2].collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.75, 1.25], [0.375, 0.625]]


def test_many_metrics_go_to_several_rows(shown):
    labels = ["Inception Score", "FID", "sFID", "KID"]
    plots.draw_progress([{"step": 1.0, **dict.fromkeys(labels, 1.0)}], labels, "unused.png")
    assert sum(axis.axison for axis in shown[0].axes) == 4
    width, height = shown[0].get_size_inches()
    assert width < 15
    assert height > 6


# ---- over the scale of guidance


def sweep_rows():
    for sampler in ("ddim", "dpm++2m"):
        for steps in (10, 25):
            for scale in (4.0, 0.0, 1.0):
                values = {"FID": scale + steps, "Precision": 0.5 + scale / 10, "Recall": 0.7 - scale / 10}
                yield {"sampler": sampler, "steps": steps, "scale": scale, **values}


def test_a_sweep_has_a_line_for_each_sampler_and_number_of_steps_in_the_order_of_scales(shown):
    plots.draw_sweep(list(sweep_rows()), ["FID", "Precision", "Recall"], "unused.png", scale="classifier scale")
    distance, tradeoff = shown[0].axes
    lines = [line for line in distance.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0, 1, 4]] * 4
    assert [list(line.get_ydata()) for line in lines] == [[10, 11, 14], [25, 26, 29]] * 2
    assert [list(np.round(line.get_xdata(), 6)) for line in tradeoff.lines] == [[0.5, 0.6, 0.9]] * 4
    assert [text.get_text() for text in tradeoff.texts] == ["0", "4"] * 4
    sizes = [list(points.get_sizes()) for points in tradeoff.collections]
    assert len(sizes) == 4
    assert all(row == sorted(set(row)) for row in sizes)
    assert distance.get_xlabel() == "classifier scale"
    assert [text.get_text() for text in distance.get_xticklabels()] == ["0", "1", "4"]
    (legend,) = shown[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["ddim, 10 steps", "ddim, 25 steps", "dpm++2m, 10 steps", "dpm++2m, 25 steps"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 4
    bottom = min(axis.get_tightbbox().y0 for axis in (distance, tradeoff))
    assert legend.get_window_extent().y1 <= bottom  # and so not over what is drawn


# ---- what it needs


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    for draw in (figures.require, lambda: plots.draw_progress([], ["FID"], str(tmp_path / "a.png"))):
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
