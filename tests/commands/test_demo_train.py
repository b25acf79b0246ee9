"""The demonstration: its parts here, all of it with few steps among the slow tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.commands import demo_train as demo
from guided_diffusion.commands.sections import DemoTrainConfig
from guided_diffusion.runtime.pictures import planes

ROOT = Path(__file__).parents[2]


def test_accuracy_counts_the_labels_that_the_classifier_gives():
    """A classifier that sees whether an image is bright gets the bright and the dark ones right."""
    images = planes(np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 10, 250, 255)]))
    assert images.amin() == -1
    assert images.amax() == 1

    def classifier(x, timesteps):
        assert not timesteps.any()
        brightness = x.mean(dim=(1, 2, 3))
        return th.stack([-brightness, brightness], dim=1)

    assert demo.accuracy(classifier, images, np.array([0, 0, 1, 1])) == 1.0
    assert demo.accuracy(classifier, images, np.array([0, 1, 1, 0])) == 0.5


def test_without_the_bundled_pictures_a_sentence_says_where_they_are(tmp_path, monkeypatch, capsys):
    """As in a folder with nothing but the installed package."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        demo.main([])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: --data_dir datasets/emoji64.zip does not exist: the pictures come with a checkout")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_demo_ends_with_a_command_that_fails(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        demo.launch(
            "Training", "image_train", "--data_dir", "absent", "--batch_size", "none", "--log_dir", str(tmp_path)
        )
    assert ended.value.code == 2
    assert any("error: " in line and "--batch_size" in line for line in capfd.readouterr().err.splitlines())


@pytest.mark.slow
def test_the_demo_trains_samples_judges_draws_and_does_it_once(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    real = demo.launch

    def launch(title, command, *flags):
        real(
            title,
            command,
            *[{"600": "3", "300": "2", "250": "2", "200": "2", "20": "3"}.get(word, word) for word in flags],
        )

    monkeypatch.setattr(demo, "launch", launch)
    demo.show(DemoTrainConfig(log_dir=str(tmp_path / "demo")))
    said = capfd.readouterr().out
    assert said.count("%") == len(demo.SCALES)
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert min(picture.size) > 9 * 32
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.npz")}
    assert len(before) == len(demo.SCALES)
    demo.show(DemoTrainConfig(log_dir=str(tmp_path / "demo")))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.npz")}
    assert (tmp_path / "demo" / "diffusion" / "model000003.pt").exists()
