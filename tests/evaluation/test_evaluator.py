"""The evaluator and the references it compares with: what is printed, where it comes from, and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.commands import evaluator, make_reference
from guided_diffusion.commands.evaluation import extractor_named
from guided_diffusion.commands.flags import COMMANDS
from guided_diffusion.config import ClassifierConfig
from guided_diffusion.evaluation import metrics
from guided_diffusion.evaluation.evaluator import Report, evaluate, prepare
from guided_diffusion.evaluation.features import Features
from guided_diffusion.evaluation.images import open_images
from guided_diffusion.evaluation.inception import InceptionNetwork
from guided_diffusion.evaluation.references import feature_set, kept_path, write_reference
from guided_diffusion.evaluation.scores import RECORD, STATISTICS, Options
from guided_diffusion.runtime.files import write_json
from guided_diffusion.runtime.options import defaults
from guided_diffusion.script_util import build_classifier
from guided_diffusion.training import checkpoints

ROOT = Path(__file__).parents[2]
EVERYTHING = ("is", "fid", "sfid", "pr", "kid", "dc")
LINES = ["Inception Score", "FID", "sFID", "Precision", "Recall"]

rng = np.random.default_rng(0)
REAL = rng.integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
MADE = (rng.integers(0, 256, (70, 8, 8, 3)) * 0.9 + 12).astype(np.uint8)


@dataclass
class Cheap:
    """Features that a few pixels give, image by image; it counts what it is asked for."""

    name: str = "cheap"
    identity: str = "cheap 1"
    published: bool = False
    parts: tuple[str, ...] = ("spatial", "probs")
    seen: list[int] = field(default_factory=list)

    def __call__(self, images):
        self.seen.append(len(images))
        rows, columns = (np.array([0, side // 2]) for side in images.shape[1:3])
        pixels = images[:, rows][:, :, columns].reshape(len(images), -1).astype(np.float32) / 16
        parts = {"spatial": pixels[:, ::2], "probs": pixels[:, :5] / pixels[:, :5].sum(1, keepdims=True)}
        return Features(pixels, **{name: parts[name] for name in self.parts})


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(folder))
    return folder


@pytest.fixture
def pair(tmp_path):
    np.savez(tmp_path / "ref.npz", REAL)
    np.savez(tmp_path / "made.npz", MADE, np.arange(70) % 3)
    return str(tmp_path / "ref.npz"), str(tmp_path / "made.npz")


def upstream_reference(path, extractor, images=REAL, more=None):
    """A file as the original's references are: images of some, statistics of more, and nothing that says of what."""
    features = extractor(images if more is None else more)
    pool, spatial = features.pool.astype(np.float64), features.spatial.astype(np.float64)
    arrays = {"mu": pool.mean(0), "sigma": np.cov(pool.T), "mu_s": spatial.mean(0), "sigma_s": np.cov(spatial.T)}
    np.savez(path, **arrays, **({} if images is None else {"arr_0": images}))
    return str(path)


def test_the_scores_are_those_of_the_features_of_all_images(pair):
    network = Cheap(name="Inception", identity="inception", published=True)
    report = evaluate(*pair, network, metrics=EVERYTHING, options=Options(dtype="float32"), batch_size=16)
    real, made = network(REAL), network(MADE)
    about = [(x.mean(0, dtype=np.float64), np.cov(x.T.astype(np.float64))) for x in (*real[:2], *made[:2])]
    expected = {
        "Inception Score": metrics.inception_score(made.probs),
        "FID": metrics.frechet_distance(*about[0], *about[2]),
        "sFID": metrics.frechet_distance(*about[1], *about[3]),
        **dict(zip(("Precision", "Recall"), metrics.precision_recall(real.pool, made.pool), strict=True)),
        "KID": metrics.kernel_distance(real.pool, made.pool, subset_size=35)[0],
        "KID standard error": metrics.kernel_distance(real.pool, made.pool, subset_size=35)[1],
        **dict(zip(("Density", "Coverage"), metrics.density_coverage(real.pool, made.pool), strict=True)),
    }
    assert list(report.results) == list(expected)
    assert report.results == pytest.approx(expected, rel=1e-9)
    assert report.lines()[:5] == [f"{name}: {report.results[name]!r}" for name in LINES]
    assert report.omitted == ()


@pytest.mark.parametrize("change", ["batch", "order", "folder", "zip", "images"])
def test_nothing_but_the_images_and_the_network_counts(pair, tmp_path, change):
    def scores(reference, samples, batch_size):
        return evaluate(reference, samples, Cheap(), metrics=EVERYTHING, batch_size=batch_size, cache=False).results

    first, path, tolerance = scores(*pair, 64), tmp_path / "other", 0.0
    again = {"batch": 7, "images": 1}.get(change, 64)
    if change == "order":
        np.savez(tmp_path / "other.npz", MADE[::-1])
        path, tolerance = tmp_path / "other.npz", 1e-9
    elif change in ("folder", "zip", "images"):
        path.mkdir()
        for index, image in enumerate(MADE):
            Image.fromarray(image).save(path / f"{index:03d}.png")
        if change == "zip":
            with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
                for file in path.iterdir():
                    archive.write(file, file.name)
            path = tmp_path / "other.zip"
    else:
        path = pair[1]
    second = scores(pair[0], str(path), again)
    assert second == pytest.approx(first, rel=tolerance, abs=tolerance)


def test_paths_stand_for_images_and_a_prepared_side_for_a_reference(pair):
    (reference, samples), network = pair, Cheap()
    expected = evaluate(open_images(reference), open_images(samples), network, metrics=("fid", "kid"), cache=False)
    for one, other in ((Path(reference), Path(samples)), (prepare(reference, network), samples)):
        assert evaluate(one, other, network, metrics="fid,kid", cache=False).results == expected.results
    with pytest.raises(ValueError, match=r"a metric must be one of is, fid, .*got 'fdi'"):
        evaluate(reference, samples, network, metrics=("fdi",))


def test_another_network_gives_numbers_of_other_names(pair):
    report = evaluate(*pair, Cheap(name="emoji32 classifier", parts=("probs",)), metrics=EVERYTHING)
    assert list(report.results) == [
        *("Classifier Score (emoji32 classifier)", "FD (emoji32 classifier)", "Precision", "Recall"),
        *("KD (emoji32 classifier)", "KD standard error (emoji32 classifier)", "Density", "Coverage"),
    ]
    [sentence] = report.omitted
    assert "sFID needs mean and covariance of spatial features, and the reference has none: the network" in sentence


def test_a_reference_gives_its_stored_statistics_and_the_features_of_its_images(tmp_path, pair):
    network = Cheap(name="Inception", identity="inception", published=True)
    more = rng.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    reference = upstream_reference(tmp_path / "stored.npz", network, more=more)
    report = evaluate(reference, pair[1], network, options=Options(dtype="float32"))
    made, stored = network(MADE), network(more)
    about = [(x.mean(0, dtype=np.float64), np.cov(x.T.astype(np.float64))) for x in (stored.pool, made.pool)]
    assert report.results["FID"] == pytest.approx(metrics.frechet_distance(*about[0], *about[1]), rel=1e-9)
    precision, recall = metrics.precision_recall(network(REAL).pool, made.pool)
    assert (report.results["Precision"], report.results["Recall"]) == (precision, recall)
    told = "\n".join(report.notes)
    assert "stored.npz: mean and covariance of features from the file, of an unknown number of images" in told
    assert "stored.npz: features of single images of 90 images, computed now" in told
    assert re.search(r"made.npz: .*mean and covariance of features.* of 70 images, computed now", told)


def test_the_statistics_in_a_file_of_samples_are_never_used(tmp_path, pair):
    network = Cheap(name="Inception", identity="inception", published=True)
    wrong = upstream_reference(tmp_path / "made.npz", network, images=MADE, more=REAL)
    honest = evaluate(*pair, network, metrics=("fid",)).results
    report = evaluate(pair[0], wrong, network, metrics=("fid",))
    assert report.results == honest
    assert any("are not used: those of samples are computed" in note for note in report.notes)


def test_statistics_alone_give_frechet_distances_and_say_what_they_cannot_give(tmp_path, pair):
    network = Cheap(name="Inception", identity="inception", published=True)
    alone = upstream_reference(tmp_path / "stats.npz", network, images=None, more=REAL)
    report = evaluate(alone, pair[1], network)
    whole = evaluate(*pair, network).results
    assert list(report.results) == ["Inception Score", "FID", "sFID"]
    assert report.results == pytest.approx({name: whole[name] for name in report.results}, rel=1e-9)
    [sentence] = report.omitted
    assert "and the reference has none: there are statistics alone" in sentence
    with pytest.raises(ValueError, match="nothing can be computed: Precision and Recall need"):
        evaluate(alone, pair[1], network, metrics=("pr",))
    with pytest.raises(ValueError, match="statistics and no images, and samples must be images"):
        evaluate(pair[0], alone, network)


def test_statistics_of_another_network_are_refused(tmp_path, pair):
    inception = Cheap(name="Inception", identity="inception", published=True)
    theirs = upstream_reference(tmp_path / "theirs.npz", inception)
    with pytest.raises(
        ValueError, match="statistics of the features of Inception, and the samples' are those of cheap"
    ):
        evaluate(theirs, pair[1], Cheap())
    own = str(tmp_path / "own.npz")
    write_reference(open_images(pair[0]), own, Cheap(), size=8)
    assert evaluate(own, pair[1], Cheap()).results == evaluate(*pair, Cheap()).results
    with pytest.raises(ValueError, match="of cheap with other weights: give the images themselves"):
        evaluate(own, pair[1], Cheap(identity="cheap 2"))
    with pytest.raises(ValueError, match="of cheap, and the samples' are those of Inception"):
        evaluate(own, pair[1], inception)
    write_reference(open_images(pair[0]), own, inception, size=8)
    report = evaluate(own, pair[1], replace(inception, identity="in bf16"), metrics=("fid",))
    assert "with other weights of Inception or in another precision" in report.warnings[0]
    assert evaluate(own, pair[1], Cheap(), metrics=("pr",)).results  # for which its images are enough


@pytest.mark.parametrize("kind", ["pool", "spatial"])
def test_statistics_of_another_number_of_features_are_refused(tmp_path, pair, kind):
    network = Cheap(name="Inception", identity="inception", published=True)
    sizes = {"pool": 12, "spatial": 6, kind: 8}
    arrays = {name: np.zeros(sizes[part]) for part, (name, _) in STATISTICS.items()}
    arrays |= {name: np.eye(sizes[part]) for part, (_, name) in STATISTICS.items()}
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=r"mu1, sigma1, mu2, sigma2 have shapes \[\[8\], \[8, 8\]"):
        evaluate(str(tmp_path / "stats.npz"), pair[1], network)


def test_features_are_kept_by_content_and_network(pair, tmp_path, own_cache):
    network = Cheap()
    first = evaluate(*pair, network)
    assert sum(network.seen) == 90 + 70
    copy = tmp_path / "renamed.npz"
    np.savez_compressed(copy, x=MADE)
    network.seen.clear()
    second = evaluate(pair[0], str(copy), network)
    assert network.seen == []
    assert second.results == first.results
    assert "computed now" in first.notes[0]
    assert all("kept from an earlier run" in note for note in (second.notes[0], second.notes[-1]))
    other = Cheap(identity="cheap 2")
    evaluate(*pair, other)
    assert sum(other.seen) == 90 + 70


def test_only_fields_that_are_not_kept_are_computed(pair):
    network, source = Cheap(), open_images(pair[0])
    assert feature_set(source, network, needs=["pool_statistics"]).pool is None
    both = feature_set(source, network, needs=["probs", "pool_statistics"])
    assert both.probs.shape == (90, 5)
    assert both.pool_statistics.n == 90
    assert both.kept == ("pool_statistics",)
    network.seen.clear()
    assert feature_set(source, network, needs=["probs", "pool_statistics"]).kept == ("probs", "pool_statistics")
    assert network.seen == []
    blind = Cheap(identity="blind", parts=())
    for _ in range(2):
        assert feature_set(source, blind, needs=["probs", "pool"]).probs is None
    assert sum(blind.seen) == 90  # the network is not asked twice for features that it does not give


def damaged(content):
    """The bytes of a file of features in every state that a reader must refuse."""
    yield content[:-30]
    middle = len(content) // 2
    yield content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for array in (np.zeros(3), np.array([{}], dtype=object)):
        buffer = io.BytesIO()
        np.savez(buffer, rows=array)
        yield buffer.getvalue()


def test_damaged_files_of_features_are_computed_again(pair, capsys):
    first = evaluate(*pair, Cheap()).results
    path = Path(kept_path(open_images(pair[0]), Cheap(), "pool"))
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        network = Cheap()
        assert evaluate(*pair, network).results == first
        assert sum(network.seen) == 90
        assert "cannot be used" in capsys.readouterr().out
    network.seen.clear()
    assert evaluate(*pair, network).results == first
    assert network.seen == []


def test_nothing_is_kept_where_it_is_not_wanted_or_cannot_be(pair, own_cache, monkeypatch, tmp_path, capsys):
    evaluate(*pair, Cheap(), cache=False)
    assert list(own_cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "file"))
    assert evaluate(*pair, Cheap()).results
    assert "the features are not kept" in capsys.readouterr().out


def test_few_images_and_other_sizes_are_warned_of(pair, tmp_path):
    np.savez(tmp_path / "large.npz", MADE.repeat(2, 1).repeat(2, 2))
    told = evaluate(pair[0], str(tmp_path / "large.npz"), Cheap(), metrics=("fid",)).warnings
    assert len(told) == 3
    assert "ref.npz: 90 images are fewer than 2048:" in told[0]
    assert "large.npz: 70 images are fewer than 2048:" in told[1]
    assert "8x8x3 and those of the samples 16x16x3:" in told[2]
    np.savez(tmp_path / "few.npz", MADE[:5])
    told = evaluate(pair[0], str(tmp_path / "few.npz"), Cheap(), metrics=("fid",)).warnings
    assert "5 images (of 12 features, so that their covariance is singular) are fewer than 2048" in told[1]
    many = np.zeros((2048, 2, 2, 3), np.uint8)
    many[...] = rng.integers(1, 256, (2048, 1, 1, 1))
    np.savez(tmp_path / "many.npz", many)
    assert evaluate(*[str(tmp_path / "many.npz")] * 2, Cheap(), metrics=("fid",)).warnings == ()


@pytest.mark.parametrize("part", ["pool", "spatial", "probs"])
def test_features_that_are_no_numbers_name_the_image(pair, part):
    class Broken(Cheap):
        def __call__(self, images):
            features = super().__call__(images)
            values = getattr(features, part).copy()
            values[(images == REAL[77]).all((1, 2, 3))] = np.nan
            return features._replace(**{part: values})

    with pytest.raises(ValueError, match=r"ref.npz: image 77 has features by cheap that are not finite") as refusal:
        evaluate(*pair, Broken(), batch_size=32)
    assert "--eval_precision fp32" in str(refusal.value)
    assert not os.path.exists(kept_path(open_images(pair[0]), Broken(), "pool"))


def test_a_side_is_prepared_once_for_many_samples(pair):
    network = Cheap()
    side = prepare(pair[0], network, cache=False)
    network.seen.clear()
    reports = [evaluate(side, path, network, cache=False) for path in pair]
    assert sum(network.seen) == 90 + 70
    assert isinstance(reports[0], Report)
    assert reports[0].results["Precision"] == 1


def test_a_reference_holds_images_of_some_and_statistics_of_all(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    photos = rng.integers(0, 256, (41, 20, 24, 3), dtype=np.uint8)
    for index, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{index:03d}.png")
    network, out = Cheap(), str(tmp_path / "sub" / "ref.npz")
    said = write_reference(open_images(str(folder), 8), out, network, size=8, num_samples=7)
    assert said == [f"{out}: 7 images, mean and covariance of the features of 41 by cheap"]
    cropped = np.concatenate(list(open_images(str(folder), 8).batches(64)))
    features = network(cropped)
    with np.load(out) as stored:
        assert set(stored) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", RECORD}
        np.testing.assert_array_equal(stored["arr_0"], cropped[np.arange(7) * 41 // 7])
        assert stored["arr_0"].dtype == np.uint8
        np.testing.assert_allclose(stored["mu"], features.pool.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(stored["sigma"], np.cov(features.pool.T.astype(np.float64)), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stored["mu_s"], features.spatial.mean(0, dtype=np.float64), rtol=1e-12)
        assert stored["sigma_s"].shape == (6, 6)
        assert json.loads(stored[RECORD].tobytes()) == {"extractor": "cheap", "identity": "cheap 1", "n": 41}
    notes = evaluate(out, out, network, metrics=("fid", "pr")).notes
    assert f"{out}: mean and covariance of features from the file, of 41 images" in notes
    write_reference(open_images(str(folder), 8), out, None, size=8, num_samples=0)
    with np.load(out) as stored:
        assert list(stored) == ["arr_0"]
        np.testing.assert_array_equal(stored["arr_0"], cropped)


def test_a_reference_of_an_npz_keeps_its_labels_and_its_size(tmp_path, pair):
    out = str(tmp_path / "out.npz")
    write_reference(open_images(pair[1], 8), out, Cheap(parts=()), size=8, num_samples=10)
    with np.load(out) as stored:
        np.testing.assert_array_equal(stored["arr_1"], (np.arange(70) % 3)[np.arange(10) * 7])
        assert "mu_s" not in stored
    with pytest.raises(ValueError, match="images of 8x8, and those of an npz are not scaled"):
        write_reference(open_images(pair[1], 16), out, None, size=16)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match="statistics and no images"):
        write_reference(open_images(str(tmp_path / "stats.npz")), out, None, size=8)


def classifier_run(folder):
    """A run of an untrained classifier of the colours of 8x8 images in 3 classes, for --features."""
    config = ClassifierConfig(
        image_size=8, num_classes=3, classifier_width=64, classifier_depth=1, classifier_attention_resolutions="4"
    )
    config = replace(config, classifier_channel_mult="1,1")
    folder.mkdir()
    th.manual_seed(0)
    network = build_classifier(config)
    for parameter in network.parameters():
        th.nn.init.normal_(parameter, std=0.1)  # where some begin as zeros, all images would look the same
    checkpoints.save(str(folder / "model000010.pt"), network.state_dict())
    saved = {name: getattr(config, name) for name in defaults(ClassifierConfig)}
    write_json(str(folder / "config.json"), {"flags": saved})
    return f"classifier:{folder}"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return classifier_run(tmp_path_factory.mktemp("runs") / "judge")


def test_the_command_ends_with_the_scores_and_writes_all_it_knows(pair, tmp_path, judge, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    np.savez(folder / "samples_70x8x8x3.npz", MADE, np.arange(70) % 3)
    request = {"steps": 25, "seed": 3, "sampler": "DDIM()", "model_path weights": "0123456789abcdef"}
    (folder / "request.json").write_text(json.dumps(request))
    out, log = tmp_path / "deep" / "result.json", tmp_path / "log"
    words = [pair[0], str(folder), "--features", judge, "--json", str(out), "--log_dir", str(log)]
    evaluator.main([*words, "--metrics", "is,fid,sfid,pr", "--distances", "float32"])
    told = capsys.readouterr().out.splitlines()
    facts = json.loads(out.read_text())
    names = ["Classifier Score (judge classifier)", "FD (judge classifier)", "Precision", "Recall"]
    assert told[-4:] == [f"{name}: {facts['metrics'][name]!r}" for name in names]
    assert sum(line.startswith("warning: ") for line in told) == len(facts["warnings"]) == 2
    assert (log / "log.txt").read_text().splitlines()[-4:] == told[-4:]
    assert facts["samples"]["run"] == request
    assert (facts["samples"]["images"], facts["samples"]["classes"], facts["samples"]["shape"]) == (70, 3, [8, 8, 3])
    assert facts["samples"]["sha256"] == open_images(pair[1]).scanned.digest
    assert facts["reference"]["statistics"]["pool_statistics"] == {"n": 90, "features": 64}
    assert facts["extractor"]["name"] == "judge classifier"
    assert facts["options"]["dtype"] == "float32"
    assert "sFID" in facts["omitted"][0]
    np.savez(tmp_path / "plain.npz", MADE)
    evaluator.main([pair[0], str(tmp_path / "plain.npz"), "--features", judge, "--distances", "float32"])
    again = capsys.readouterr().out.splitlines()
    assert again[-4:] == told[-4:]
    assert any("kept from an earlier run" in line for line in again)


def test_copies_are_the_nearest_neighbours(pair, tmp_path, judge, capsys):
    copies = MADE.copy()
    copies[[41, 5]] = REAL[[17, 60]]
    np.savez(tmp_path / "copies.npz", copies)
    out, picture = tmp_path / "result.json", tmp_path / "pictures" / "near.png"
    words = [str(tmp_path / "copies.npz"), "--features", judge, "--metrics", "fid", "--neighbours", str(picture)]
    evaluator.main([pair[0], *words, "--json", str(out)])
    facts = json.loads(out.read_text())["neighbours"]
    assert {near["sample"]: near["reference"][0] for near in facts["nearest"][:2]} == {41: 17, 5: 60}
    assert facts["nearest"][1]["distances"][0] < 0.01 * facts["median"]
    assert len(facts["nearest"]) == 16
    assert facts["nearer"] >= 2
    assert f"{picture}: the 16 samples nearest to the reference" in capsys.readouterr().out
    with Image.open(picture) as grid:
        assert grid.width > grid.height / 16
    upstream_reference(tmp_path / "statistics.npz", Cheap(), images=None, more=REAL)
    with pytest.raises(SystemExit) as stop:
        evaluator.main([str(tmp_path / "statistics.npz"), *words])
    assert stop.value.code == 2
    assert "--neighbours needs 3 images or more on either side" in capsys.readouterr().err


def test_folders_are_cropped_where_that_is_asked_for(pair, tmp_path, judge, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(70):
        Image.fromarray(rng.integers(0, 256, (20 + index % 3, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    words = ["--features", judge, "--metrics", "fid", "--cache", "False"]
    evaluator.main([str(folder), pair[1], *words, "--image_size", "8"])
    assert "FD (judge classifier): " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ending:
        evaluator.main([*pair, *words, "--image_size", "8"])
    assert ending.value.code == 2
    assert "--image_size 8 has no effect" in capsys.readouterr().err


def test_bad_input_is_one_sentence_and_exit_code_2(pair, tmp_path, judge, capsys):
    good, bad, inside = pair[1], str(tmp_path / "bad.npz"), str(tmp_path / "inside.zip")
    content = Path(good).read_bytes()
    Path(bad).write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile(inside, "w") as archive:
        archive.writestr("samples.npz", content)
    objects, empty, nans, other = (str(tmp_path / name) for name in ("o.npz", "empty.npz", "nans.npz", "other.pth"))
    np.savez(objects, np.array([os, None], dtype=object)[1:])
    np.savez(empty, MADE[:0])
    np.savez(nans, np.full((9, 8, 8, 3), np.nan))
    th.save({"fc.weight": th.zeros(3, 3)}, other)
    inception = ["--features", "inception"]
    for words, sentence in (
        ([good, bad], "bad.npz is no npz"),
        ([inside, good], "holds no images, skipped 1 (.npz: 1)"),
        ([good, objects], "an array of type object"),
        ([empty, good], "holds no images"),
        ([good, nans], "some of them not finite"),
        ([good, str(tmp_path / "missing")], "does not exist"),
        ([good, good, *inception, "--inception_weights", other], "other.pth"),
        ([good, good, *inception], "weights of the Inception network are missing"),
        ([good, good, "--json", str(tmp_path)], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as ending:
            evaluator.main([*([] if "--features" in words else ["--features", judge]), *words])
        assert ending.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert sentence in line


def test_features_that_are_no_numbers_end_the_command(pair, tmp_path, capsys):
    features = classifier_run(tmp_path / "broken")
    path = str(tmp_path / "broken" / "model000010.pt")
    state = checkpoints.load(path)
    state["out.0.weight"].fill_(3e38)  # which overflows in the network
    os.remove(path)
    checkpoints.save(path, state)
    with pytest.raises(SystemExit) as ending:
        evaluator.main([*pair, "--features", features])
    assert ending.value.code == 2
    assert "ref.npz: image 0 has features by broken classifier that are not finite" in capsys.readouterr().err


def test_the_command_makes_references(pair, tmp_path, judge, capsys):
    folder, out = tmp_path / "photos", tmp_path / "ref8.npz"
    folder.mkdir()
    for index, image in enumerate(REAL):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    make_reference.main([str(folder), str(out), "--image_size", "8", "--features", judge, "--num_samples", "0"])
    assert "90 images, mean and covariance of the features of 90 by judge classifier" in capsys.readouterr().out
    words = ["--features", judge, "--metrics", "fid,pr"]
    for reference in (str(out), pair[0]):
        evaluator.main([reference, pair[1], *words])
    told = capsys.readouterr().out.splitlines()
    scores = [line for line in told if re.match(r"(FD|Precision|Recall)\b.*: ", line)]
    assert scores[:3] == scores[3:]
    for wrong, sentence in (([str(out.with_suffix(""))], "ends in .npz"), ([f"{pair[0]}/x.npz"], "cannot be written")):
        with pytest.raises(SystemExit):
            make_reference.main([str(folder), *wrong, "--features", judge])
        assert sentence in capsys.readouterr().err


def test_any_number_of_ranks_gives_the_same_numbers(pair, tmp_path, judge, monkeypatch, ranks):
    names, out = ("is", "fid", "pr", "kid", "dc"), tmp_path / "many.json"
    words = [*pair, "--features", judge, "--metrics", ",".join(names), "--json", str(out), "--cache", "False"]
    words += ["--eval_batch_size", "9"]
    monkeypatch.delenv("PYTHONPATH")  # the originals' file is called from anywhere
    done = ranks.run([ROOT / "evaluations" / "evaluator.py", *words], ranks=3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = evaluate(*pair, extractor_named(judge), metrics=names, cache=False, batch_size=9)
    assert json.loads(out.read_text())["metrics"] == alone.results
    assert done.stdout.splitlines()[-2:] == alone.lines()[-2:]
    assert done.stdout.count("FD (judge classifier): ") == 1


def test_the_page_on_evaluation_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    names = {"__name__": "page"}
    exec(compile(code, "docs/evaluation.md", "exec", dont_inherit=True), names)
    assert names["report"].results["FD (colours)"] > 0
    told = re.findall(r"^\| `--(\w+)", page, re.MULTILINE)
    assert set(told) <= {*COMMANDS["evaluator"].flags(), *COMMANDS["image_train"].flags()}


@pytest.mark.slow
@pytest.mark.parametrize("metrics", ["is,pr", "is,fid,sfid,pr"])
def test_inception_prints_the_lines_of_the_original(pair, tmp_path, capsys, metrics):
    th.manual_seed(0)
    network = InceptionNetwork()
    th.save(network.state_dict(), tmp_path / "inception.pth")
    for name, images in (("a", REAL[:4]), ("b", MADE[:4])):
        np.savez(tmp_path / f"{name}.npz", images)
    words = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), "--inception_weights", str(tmp_path / "inception.pth")]
    evaluator.main([*words, "--metrics", metrics])
    expected = [line for line in LINES if line in ("Inception Score", "Precision", "Recall") or "fid" in metrics]
    told = capsys.readouterr().out.splitlines()[-len(expected) :]
    assert [line.partition(": ")[0] for line in told] == expected
    assert all(repr(float(line.partition(": ")[2])) == line.partition(": ")[2] for line in told)
