"""The grid of samplers, steps and scales: the same samples as by hand, the same table after any interruption."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from few import few
from PIL import Image

from guided_diffusion import sample_util
from guided_diffusion.commands import classifier_sample, classifier_train, image_sample, image_train, sweep
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.evaluation import sweep as sweep_module
from guided_diffusion.evaluation.evaluator import evaluate
from guided_diffusion.evaluation.sweep import Cell
from guided_diffusion.training.checkpoints import Checkpoint

IMAGES = {"image_size": 8, "diffusion_steps": 40, "num_workers": 0, "num_classes": 2, "batch_size": 4, "max_steps": 3}
UNET = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "", "ema_rate": 0.5}
CLASSIFIER = {"classifier_width": 64, "classifier_depth": 1, "classifier_channel_mult": "1"}
CLASSIFIER |= {"classifier_attention_resolutions": "8"}
FD = "FD (judge classifier)"
THREE = {"scales": "0,2,4"}  # cells


def command_line(**flags):
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Pictures of two classes, and the runs of a model, of a classifier and of a judge."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "pictures").mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{'ab'[index % 2]}_{index:02}.png")
    data = {**IMAGES, "data_dir": folder / "pictures"}
    image_train.main(
        command_line(**data, **UNET, class_cond=True, class_dropout=0.5, lr=1e-2, log_dir=folder / "model")
    )
    classifier_train.main(command_line(**data, **CLASSIFIER, log_dir=folder / "classifier"))
    classifier_train.main(command_line(**data, **CLASSIFIER, noised=False, seed=1, log_dir=folder / "judge"))
    return folder


@pytest.fixture
def flags(places, monkeypatch, tmp_path):
    """Of a sweep of two cells."""
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return two_cells(places)


def two_cells(places):
    networks = {"model_path": places / "model", "classifier_path": places / "classifier"}
    features = {"reference": places / "pictures", "features": f"classifier:{places / 'judge'}"}
    grid = {"samplers": "ddim", "steps": "3", "scales": "0,4", "num_samples": 10, "batch_size": 4}
    return {**networks, **features, **grid}


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """A sweep of three cells that was not broken off."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUIDED_DIFFUSION_CACHE", str(folder / "cache"))
        sweep.main(command_line(**two_cells(places) | THREE, log_dir=folder / "sweep"))
    return folder / "sweep"


@pytest.fixture
def sampled(monkeypatch):
    """The batches that are sampled."""
    seen, real = [], sample_util._sample_batch

    def counted(process, model, job, batch, *rest):
        seen.append((os.path.basename(job.out_dir), batch))
        return real(process, model, job, batch, *rest)

    monkeypatch.setattr(sample_util, "_sample_batch", counted)
    return seen


def table(folder):
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def images(folder):
    with np.load(folder / "samples_10x8x8x3.npz") as file:
        return file["arr_0"], file["arr_1"]


def refused(capsys, **flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        sweep.main(command_line(**flags))
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors


def test_a_cell_is_what_the_commands_make_of_the_same_flags(flags, places, tmp_path):
    sweep.main(command_line(**{**flags, "samplers": "ddim,dpm++2m"}, log_dir=tmp_path / "sweep", seed=3))
    rows = table(tmp_path / "sweep")
    assert list(rows[0]) == ["sampler", "steps", "scale", "evaluations", "samples", FD, "Precision", "Recall"]
    cells = [(row["sampler"], row["steps"], row["scale"]) for row in rows]
    assert cells == [("ddim", "3", "0.0"), ("ddim", "3", "4.0"), ("dpm++2m", "3", "0.0"), ("dpm++2m", "3", "4.0")]
    assert {(row["evaluations"], row["samples"]) for row in rows} == {("3", "10")}

    by_hand = {name: flags[name] for name in ("model_path", "classifier_path", "num_samples", "batch_size")}
    by_hand |= {"sampler": "dpm++2m", "steps": 3, "seed": 3}
    classifier_sample.main(command_line(**by_hand, classifier_scale=4, log_dir=tmp_path / "guided"))
    own = tmp_path / "sweep" / "dpm++2m_3_scale_4"
    for ours, theirs in zip(images(own), images(tmp_path / "guided"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    extractor = extractor_named(flags["features"])
    report = evaluate(str(places / "pictures"), str(own), extractor, metrics=["fid", "pr"])
    assert {name: float(rows[3][name]) for name in report.results} == dict(report.results)

    unguided = {name: value for name, value in by_hand.items() if name != "classifier_path"}
    image_sample.main(command_line(**unguided, log_dir=tmp_path / "unguided"))
    zero = images(tmp_path / "sweep" / "dpm++2m_3_scale_0")
    np.testing.assert_array_equal(zero[0], images(tmp_path / "unguided")[0])
    assert (zero[0] != images(own)[0]).any()

    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [row[FD] for row in results["rows"]] == [float(row[FD]) for row in rows]
    assert (results["guidance"], results["seed"], results["reference_images"]) == ("classifier", 3, 12)
    with Image.open(tmp_path / "sweep" / "sweep.png") as picture:
        assert picture.width > 1200


@pytest.mark.slow
def test_a_model_guides_itself_and_at_scale_1_not_at_all(flags, tmp_path):
    options = {name: value for name, value in flags.items() if name != "classifier_path"} | {"scales": "1,9"}
    sweep.main(command_line(**options, guidance="cfg", guidance_interval="5,30", log_dir=tmp_path / "sweep"))
    by_hand = {name: flags[name] for name in ("model_path", "num_samples", "batch_size")}
    by_hand |= {"sampler": "ddim", "steps": 3}
    for scale, more in (("1", {}), ("9", {"cfg_scale": 9, "guidance_interval": "5,30"})):
        image_sample.main(command_line(**by_hand, **more, log_dir=tmp_path / scale))
        ours, theirs = images(tmp_path / "sweep" / f"ddim_3_scale_{scale}"), images(tmp_path / scale)
        np.testing.assert_array_equal(ours[0], theirs[0])
    assert (images(tmp_path / "1")[0] != images(tmp_path / "9")[0]).any()
    assert [row["scale"] for row in table(tmp_path / "sweep")] == ["1.0", "9.0"]


def test_networks_are_loaded_once(flags, tmp_path, monkeypatch):
    loaded, real = [], Checkpoint.fitting

    def counted(checkpoint, *rest):
        loaded.append(os.path.basename(os.path.dirname(checkpoint.path)))
        return real(checkpoint, *rest)

    monkeypatch.setattr(Checkpoint, "fitting", counted)
    sweep.main(command_line(**flags, log_dir=tmp_path / "sweep"))
    assert len(table(tmp_path / "sweep")) == 2
    assert sorted(loaded) == ["classifier", "judge", "model"]


@pytest.mark.parametrize("killed_in", few(["sampling", "measuring", "writing"], ["measuring"]))
def test_a_sweep_that_was_killed_comes_to_the_same_table(flags, tmp_path, monkeypatch, sampled, whole, killed_in):
    options, batches = flags | THREE, 9
    place = {"sampling": (sample_util, "save_npz"), "measuring": (sweep_module, "evaluate")}
    target, name = place.get(killed_in, (sweep_module, "write_json"))
    real, calls = getattr(target, name), []

    def killed(*args, **keywords):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, killed)
        with pytest.raises(SystemExit):
            sweep.main(command_line(**options, log_dir=tmp_path / "broken"))
    assert 0 < len(sampled) < batches
    sweep.main(command_line(**options, log_dir=tmp_path / "broken"))
    lost = 1 if killed_in == "sampling" else 0  # the batch that was sampled and not yet written
    assert len(sampled) == batches + lost
    for file in ("results.csv", "sweep.png"):
        assert (tmp_path / "broken" / file).read_bytes() == (whole / file).read_bytes()


def test_what_is_there_is_neither_sampled_nor_measured_again(flags, tmp_path, monkeypatch, sampled, whole):
    folder, flags = tmp_path / "sweep", flags | THREE
    shutil.copytree(whole, folder)
    before = (folder / "results.csv").read_bytes()
    measured, real = [], sweep_module.evaluate

    def counted(*args, **keywords):
        measured.append(args[1])
        return real(*args, **keywords)

    monkeypatch.setattr(sweep_module, "evaluate", counted)
    sweep.main(command_line(**flags, log_dir=folder))
    assert (sampled, measured) == ([], [])
    assert (folder / "results.csv").read_bytes() == before

    (folder / "ddim_3_scale_4" / "result.json").write_text("{")  # as a full disk may leave it
    sweep.main(command_line(**flags, log_dir=folder))
    assert (len(sampled), len(measured)) == (0, 1)
    assert (folder / "results.csv").read_bytes() == before

    sweep.main(command_line(**{**flags, "scales": "0,2,4,5"}, log_dir=folder))
    assert ({name for name, _ in sampled}, len(measured)) == ({"ddim_3_scale_5"}, 2)


def test_another_reference_is_measured_anew_with_the_same_samples(flags, places, tmp_path, sampled, whole):
    shutil.copytree(whole, tmp_path / "sweep")
    first, flags = table(tmp_path / "sweep"), flags | THREE
    fewer = tmp_path / "fewer"
    shutil.copytree(places / "pictures", fewer)
    os.remove(fewer / "a_00.png")
    sweep.main(command_line(**{**flags, "reference": fewer}, log_dir=tmp_path / "sweep"))
    assert sampled == []
    assert all(one[FD] != other[FD] for one, other in zip(first, table(tmp_path / "sweep"), strict=True))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"reference": ""}, "--reference is missing"),
        ({"reference": "nowhere"}, "'nowhere' does not exist"),
        ({"reference": "{one}"}, "one image has no covariance: take 2 images or more"),
        ({"model_path": ""}, "--model_path is missing"),
        ({"classifier_path": ""}, "--classifier_path is missing"),
        ({"guidance": "cfg"}, "--classifier_path has no effect without --guidance classifier"),
        ({"guidance": "both"}, "'both' is none of classifier, cfg"),
        ({"samplers": "ddim,ddmi"}, "sampler 'ddmi' is unknown"),
        ({"steps": "10,0"}, "'10,0' is no list of different whole numbers above 0"),
        ({"scales": "1,one"}, "'1,one' is no list of different numbers"),
        ({"scales": "1,1.0"}, "'1,1.0' is no list of different numbers"),
        ({"metrics": "fid,prec"}, "'prec' in 'fid,prec' is no metric"),
        ({"timestep_respacing": "7"}, "--steps and --timestep_respacing exclude each other"),
        ({"guidance_interval": "9"}, "'9' is no range"),
        ({"classes": "2"}, "class 2 does not exist"),
        ({"num_samples": 9}, "below the least value, 10"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(flags, tmp_path, capsys, changed, sentence):
    np.savez(tmp_path / "one.npz", np.full((1, 8, 8, 3), 99, np.uint8))
    changed = {name: str(value).format(one=tmp_path / "one.npz") for name, value in changed.items()}
    errors = refused(capsys, **{**flags, "log_dir": tmp_path / "run", **changed})
    assert sentence in errors.splitlines()[-1]
    assert not list(tmp_path.glob("run/*/samples*"))


def test_the_samples_of_another_sweep_stay(flags, tmp_path, capsys, whole):
    shutil.copytree(whole, tmp_path / "sweep")
    message = refused(capsys, **flags, seed=1, log_dir=tmp_path / "sweep")
    assert "holds the samples of another request (seed was 0 and is 1)" in message


def test_a_cell_says_what_it_is():
    assert str(Cell("ddim", 10, 2.5)) == "ddim, 10 steps, scale 2.5"
    assert Cell("ddim", 10, 2.5).folder == "ddim_10_scale_2.5"
