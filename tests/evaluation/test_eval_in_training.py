"""Metrics during the training: what they measure, that they disturb nothing, and how they go on with a resumed run."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.commands import classifier_train, image_sample, image_train
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.evaluation.evaluator import evaluate
from guided_diffusion.evaluation.images import open_images
from guided_diffusion.evaluation.training import TrainingImages
from guided_diffusion.image_datasets import ImageDataset

IMAGES = {"image_size": 8, "diffusion_steps": 40, "num_workers": 0, "log_interval": 1}
TINY = {**IMAGES, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}
TINY |= {"ema_rate": 0.5, "batch_size": 4}
SHAPES = {"classifier_width": 64, "classifier_depth": 1, "classifier_channel_mult": "1"}
FD = "FD (judge classifier)"


def command_line(**flags):
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of pictures, three of one class and nine of another, and one of a classifier of them."""
    folder = tmp_path_factory.mktemp("places")
    pictures, judge = folder / "pictures", folder / "judge"
    pictures.mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{'a' if index < 3 else 'b'}_{index:02}.png")
    flags = {**IMAGES, **SHAPES, "classifier_attention_resolutions": "8", "num_classes": 2, "noised": False}
    classifier_train.main(command_line(**flags, data_dir=pictures, log_dir=judge, batch_size=4, max_steps=1))
    return pictures, judge


@pytest.fixture
def flags(places):
    """Of a training with evaluations."""
    pictures, judge = places
    own = {"eval_interval": 1, "eval_samples": 10, "eval_steps": 3, "eval_batch_size": 4}
    return {**TINY, "data_dir": pictures, **own, "features": f"classifier:{judge}"}


def without_evaluation(flags):
    return {name: value for name, value in flags.items() if not name.startswith("eval_") and name != "features"}


def table(folder, name="evaluation.csv"):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


def refused(capsys, **flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        image_train.main(command_line(**flags))
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert len(errors.strip().splitlines()) == 1, errors
    return errors


def test_the_numbers_are_those_of_sampling_and_evaluating_by_hand(places, flags, tmp_path, capsys):
    pictures, judge = places
    run, samples = tmp_path / "run", tmp_path / "samples"
    image_train.main(command_line(**flags, eval_metrics="pr,fid", max_steps=2, lr=1e-2, log_dir=run))
    said = capsys.readouterr().out
    options = {"sampler": "dpm++2m", "steps": 3, "num_samples": 10, "batch_size": 4, "log_dir": samples}
    image_sample.main(command_line(model_path=run, **options))
    extractor = extractor_named(f"classifier:{judge}")
    report = evaluate(open_images(str(pictures), 8), str(samples), extractor, metrics=["fid", "pr"], cache=False)
    first, last = table(run)
    assert list(first) == ["step", "samples", FD, "Precision", "Recall"]
    assert (first["step"], last["step"], last["samples"]) == ("1", "2", "10")
    assert first[FD] != last[FD]
    for name, value in report.results.items():
        assert float(last[name]) == pytest.approx(value, rel=1e-6)
    logged = table(run, "progress.csv")
    assert [row["eval_fd_judge_classifier"] for row in logged] == [first[FD], last[FD]]
    best = min((first, last), key=lambda row: float(row[FD]))
    assert f"the best {FD} so far is {float(best[FD]):.4g}, at step {best['step']}" in said
    with Image.open(run / "evaluation.png") as picture:
        assert picture.width > 1000
    assert not (run / "samples.png").exists()


def test_the_reference_is_the_training_data_cropped_and_never_mirrored(places):
    pictures, _ = places
    paths = sorted(str(path) for path in pictures.iterdir())
    data = ImageDataset(8, paths, random_flip=True, random_crop=True)
    found = np.concatenate(list(TrainingImages(data, 6).batches(4)))
    expected = np.concatenate(list(open_images(str(pictures), 8).batches(12)))
    np.testing.assert_array_equal(found, expected[::2])


def test_labels_are_drawn_in_the_shares_of_the_data(flags, tmp_path, monkeypatch):
    seen = []

    def sampled(process, model, job, **options):
        seen.append(list(job.labels))
        yield from []

    monkeypatch.setattr("guided_diffusion.evaluation.training.sampled", sampled)
    monkeypatch.setattr(
        "guided_diffusion.evaluation.training.evaluate", lambda side, samples, *_, **__: list(samples.batches(4))
    )
    monkeypatch.setattr("guided_diffusion.evaluation.training.Evaluation._record", lambda *_: None)
    options = {"class_cond": True, "num_classes": 2, "eval_samples": 40, "max_steps": 1}
    image_train.main(command_line(**{**flags, **options}, log_dir=tmp_path))
    assert (seen[0].count(0), seen[0].count(1)) == (10, 30)
    assert seen[0] != sorted(seen[0])


def test_evaluations_leave_the_training_alone(flags, tmp_path):
    options = {"max_steps": 3, "save_interval": 2, "dropout": 0.3, "class_cond": True, "num_classes": 2}
    image_train.main(command_line(**without_evaluation(flags), **options, log_dir=tmp_path / "plain"))
    more = {"eval_metrics": "fid,kid,pr,dc,is", "sample_interval": 2, "eval_interval": 2}
    image_train.main(command_line(**{**flags, **options, **more}, log_dir=tmp_path / "busy"))
    names = sorted(name for name in os.listdir(tmp_path / "plain") if name.endswith(".pt"))
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "busy" / name).read_bytes()
    assert not (tmp_path / "plain" / "evaluation.csv").exists()


@pytest.mark.slow
def test_a_resumed_run_makes_the_same_table_as_an_unbroken_one(flags, tmp_path):
    options = {"lr": 1e-3, "save_interval": 1, "resume_checkpoint": "auto"}
    image_train.main(command_line(**flags, **options, max_steps=3, log_dir=tmp_path / "whole"))
    broken = tmp_path / "broken"
    image_train.main(command_line(**flags, **options, max_steps=2, log_dir=broken))
    os.remove(broken / "set000002.json")
    os.remove(broken / "model000002.pt")  # as if it had been killed after the evaluation at step 2
    with open(broken / "evaluation.csv", "a") as file:
        file.write("3,1")
    image_train.main(command_line(**flags, **options, max_steps=3, log_dir=broken))
    assert [row["step"] for row in table(broken)] == ["1", "2", "3"]
    assert (broken / "evaluation.csv").read_bytes() == (tmp_path / "whole" / "evaluation.csv").read_bytes()


@pytest.mark.slow
def test_two_ranks_come_to_the_numbers_of_one(flags, tmp_path, ranks):
    """At a learning rate of 0, so that it is the samples and their features alone that are shared out."""
    options = {**flags, "lr": 0, "max_steps": 1, "eval_metrics": "fid,kid,pr"}
    image_train.main(command_line(**options, log_dir=tmp_path / "one"))
    script = Path(__file__).parents[2] / "scripts" / "image_train.py"
    done = ranks.run([script, *command_line(**{**options, "batch_size": 2}, log_dir=tmp_path / "two")], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "two" / "evaluation.csv").read_bytes() == (tmp_path / "one" / "evaluation.csv").read_bytes()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"eval_interval": 0}, "--eval_samples has no effect without --eval_interval"),
        ({"eval_sampler": "ddmi"}, "sampler 'ddmi' is unknown"),
        ({"eval_sampler": "ddim_reverse"}, "--eval_sampler ddim_reverse turns images to noise"),
        ({"eval_metrics": "fdi"}, "'fdi' in 'fdi' is no metric"),
        (
            {"eval_metrics": "fid,sfid"},
            "sfid needs mean and covariance of spatial features, and judge classifier gives none",
        ),
        ({"eval_sampler": "ddim", "eval_steps": 41}, "41"),
        ({"eval_samples": 1}, "below the least value, 10"),
        ({"features": "inception"}, "the weights of the Inception network are missing"),
        ({"features": "classifier:nowhere"}, "nowhere"),
        ({"eval_reference": "nowhere.npz"}, "'nowhere.npz' does not exist"),
        ({"image_channels": 4}, "--eval_interval compares images of 1 or 3 channels, not 4"),
        ({"timestep_respacing": "20"}, "--eval_interval has steps of its own"),
    ],
)
def test_mistakes_are_answered_before_the_first_step(flags, tmp_path, monkeypatch, capsys, changed, sentence):
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    message = refused(capsys, **{**flags, "max_steps": 1, "log_dir": tmp_path / "run", **changed})
    assert sentence in message
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_reference_of_too_few_images_is_refused_before_the_first_step(flags, tmp_path, capsys):
    np.savez(tmp_path / "one.npz", np.full((1, 8, 8, 3), 99, np.uint8))
    flags |= {"eval_interval": 2, "eval_reference": tmp_path / "one.npz", "log_dir": tmp_path / "run"}
    with pytest.raises(SystemExit) as end:
        image_train.main(command_line(**flags, max_steps=2, save_interval=1))
    assert end.value.code == 2
    assert "one.npz cannot be the reference: one image has no covariance" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_reference_of_statistics_alone_gives_distances_and_no_precision(flags, places, tmp_path, capsys):
    _, judge = places
    reference = tmp_path / "statistics.npz"
    features = extractor_named(f"classifier:{judge}")
    pool = features(np.random.default_rng(0).integers(0, 256, (99, 8, 8, 3), dtype=np.uint8)).pool
    record = f'{{"extractor": "{features.name}", "identity": "{features.identity}", "n": 99}}'
    arrays = {"mu": pool.mean(axis=0), "sigma": np.cov(pool, rowvar=False)}
    np.savez(reference, record=np.frombuffer(record.encode(), np.uint8), **arrays)
    options = {**flags, "eval_reference": reference, "max_steps": 1}
    message = refused(capsys, **options, eval_metrics="fid,pr", log_dir=tmp_path / "refused")
    assert "cannot be the reference: Precision and Recall need features of single images" in message
    image_train.main(command_line(**options, eval_metrics="fid", log_dir=tmp_path / "run"))
    assert list(table(tmp_path / "run")[0]) == ["step", "samples", FD]


def test_without_matplotlib_the_training_does_not_begin(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "guided-diffusion[eval]" in refused(capsys, **flags, max_steps=1, log_dir=tmp_path / "run")
    image_train.main(command_line(**without_evaluation(flags), max_steps=1, log_dir=tmp_path / "plain"))


def test_validation_of_classifiers_keeps_its_own_interval(places, tmp_path, capsys):
    pictures, _ = places
    options = {**IMAGES, **SHAPES, "classifier_attention_resolutions": "8", "num_classes": 2, "eval_interval": 1}
    with pytest.raises(SystemExit):
        classifier_train.main(command_line(**options, data_dir=pictures, log_dir=tmp_path, max_steps=1))
    assert "--eval_interval has no effect without --val_data_dir" in capsys.readouterr().err
