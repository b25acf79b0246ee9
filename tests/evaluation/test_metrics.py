"""The scores against the published evaluator's numbers, closed forms and plain formulas; what no score depends on.

What holds for every score is tested over the table of them, a new one too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import evaluation as benchmark
from guided_diffusion.evaluation import metrics
from guided_diffusion.evaluation.metrics import (
    RunningStatistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_radii,
    precision_recall,
    statistics,
)
from guided_diffusion.evaluation.scores import DEFAULT_METRICS, METRICS, FeatureSet, Options, rehearse

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")


def rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def features(name, n, d, shift=0.0, scale=1.0):
    """As the published evaluator was given them."""
    r = rng(name)
    mix = r.standard_normal((d, d)) / np.sqrt(d)
    return np.maximum(r.standard_normal((n, d)) * scale @ mix + shift, 0).astype(np.float32)


CASES = {
    "near": (features("a", 700, 64), features("a2", 500, 64, 0.1)),
    "far": (features("b", 600, 128), features("b2", 600, 128, 0.6, 1.3)),
    "collapsed": (features("c", 500, 32), features("c2", 400, 32, 0.4, 0.15)),
    "few": (features("d", 90, 100), features("d2", 80, 100, 0.05)),
}
cases = pytest.mark.parametrize("case", CASES)


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def squared(x, y):
    """All distances by their definition, float64."""
    return np.array([np.square(row.astype(np.float64) - y).sum(axis=1) for row in x])


def distance_of(first, second):
    one, two = statistics(first), statistics(second)
    return frechet_distance(one.mean, one.cov, two.mean, two.cov)


def normal(name, n, d=16):
    return rng(name).standard_normal((n, d)).astype(np.float32)


@cases
def test_frechet_distance_is_the_published(case):
    assert distance_of(*CASES[case]) == pytest.approx(float(GOLDEN[f"{case}/fid"]), rel=1e-7)


@cases
@pytest.mark.parametrize("block", [1000, 64])
def test_precision_recall_and_radii_in_float16_are_the_published_to_the_last_bit(case, block):
    reference, samples = CASES[case]
    assert np.array_equal(manifold_radii(reference, 3, dtype="float16", block=block), GOLDEN[f"{case}/radii"])
    assert precision_recall(reference, samples, 3, "float16", block=block) == tuple(GOLDEN[f"{case}/precision_recall"])


def test_radii_of_2048_features_are_those_of_tensorflow_to_the_last_bit():
    """TensorFlow 2.21 on a CPU, which adds up as many terms as these in two halves."""
    expected = [1334, 1348, 1354, 1279, 1298, 1356, 1325, 1263, 1350, 1276, 1300, 1418]
    assert manifold_radii(features("wide", 12, 2048), dtype="float16").tolist() == expected


@cases
def test_inception_score_is_the_published(case):
    probs = softmax(CASES[case][1][:, :20])
    expected = float(GOLDEN[f"{case}/inception_score_split150"])
    assert inception_score(probs, 150) == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_frechet_distance_of_commuting_covariances(d, missing, seed):
    """In common axes it is that of the standard deviations, of which some may be 0."""
    r = np.random.default_rng(seed)
    axes = np.linalg.qr(r.standard_normal((d, d)))[0]
    one, two = r.random(d) + 0.1, r.random(d) + 0.1
    one[: min(missing, d)] = 0
    first, second = (axes * np.square(deviations) @ axes.T for deviations in (one, two))
    shift = r.standard_normal(d)
    got = frechet_distance(np.zeros(d), first, shift, second)
    assert got == pytest.approx(np.square(shift).sum() + np.square(one - two).sum(), rel=1e-6, abs=1e-6)
    assert got == pytest.approx(frechet_distance(shift, second, np.zeros(d), first), rel=1e-6, abs=1e-6)


def test_frechet_distance_is_that_of_a_matrix_square_root():
    one, two = (statistics(features(name, 400, 48, shift)) for name, shift in (("e", 0.0), ("e2", 0.2)))
    expected = benchmark.plain_frechet(one, two)
    assert frechet_distance(one.mean, one.cov, two.mean, two.cov) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("n", "fade"), [(40, 0), (400, 0), (400, 0.15), (101, 0.15), (3, 0)])
def test_frechet_distance_of_a_set_from_itself(n, fade):
    """With fewer images than features; and with variances over 13 orders of magnitude, which eigenvalues alone lose."""
    x = normal("self", n, 100) * 10 * np.exp(-fade * np.arange(100))
    x = x @ np.linalg.qr(rng("axes").standard_normal((100, 100)))[0]
    assert distance_of(x, x) < 1e-9


def test_frechet_distance_of_sets_without_spread():
    assert distance_of(np.ones((4, 9)), np.zeros((4, 9))) == pytest.approx(9)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4000, 500])
def test_frechet_distance_of_2048_features_from_themselves(n):
    x = rng("wide").standard_normal((n, 2048))
    assert distance_of(x, x) < 1e-6


def test_frechet_distance_refuses_what_is_no_mean_and_covariance():
    mean, cov = np.zeros(3), np.eye(3)
    wrong = {
        "give \\[D\\], \\[D, D\\]": [(mean, cov, mean[:2], cov[:2, :2]), (mean, cov[:2, :2], mean, cov), (cov,) * 4],
        "mu2 is not finite": [(mean, cov, np.array([0, np.nan, 0]), cov)],
        "sigma1 is not finite": [(mean, np.full((3, 3), np.inf), mean, cov)],
        "sigma2 is .*not symmetric": [(mean, cov, mean, np.triu(np.ones((3, 3))))],
        "a covariance has the eigenvalue -1": [(mean, np.diag([1.0, 1.0, -1.0]), mean, cov)],
    }
    for sentence, calls in wrong.items():
        for call in calls:
            with pytest.raises(ValueError, match=sentence):
                frechet_distance(*call)


@given(st.lists(st.integers(0, 1500), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_statistics_are_the_same_for_batches_shards_and_any_order(sizes, seed):
    r = np.random.default_rng(seed)
    x = (r.standard_normal((sum(sizes) + 2, 5)) * 3 + 1000).astype(np.float32)
    parts = np.split(x, np.cumsum(sizes))
    whole, batches = statistics(x), statistics(iter(parts))
    assert np.array_equal(whole.mean, batches.mean)
    assert np.array_equal(whole.cov, batches.cov)
    shards = [statistics(part) for part in parts if len(part)]
    for order in (shards, shards[::-1]):
        joined = order[0]
        for shard in order[1:]:
            joined = joined + shard
        assert joined.n == whole.n == len(x)
        assert np.allclose(joined.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
        assert np.allclose(joined.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11, atol=1e-11)
    shuffled = statistics(r.permutation(x))
    assert np.allclose(shuffled.cov, whole.cov, rtol=1e-12, atol=1e-12 * np.abs(whole.cov).max())


def test_one_image_has_a_mean_and_no_spread():
    one = statistics(np.array([[1.0, 2.0]]))
    assert (one.n, one.mean.tolist(), one.cov.tolist()) == (1, [1, 2], [[0, 0], [0, 0]])
    both = one + statistics(np.array([[3.0, 2.0]]))
    assert (both.n, both.mean.tolist(), both.cov.tolist()) == (2, [2, 2], [[2, 0], [0, 0]])


def test_a_running_result_leaves_the_run_as_it_was():
    x, running = normal("running", 3000, 3), RunningStatistics()
    for batch in np.array_split(x, 7):
        running.add(batch)
        running.result()
    assert np.array_equal(running.result().cov, statistics(x).cov)


def test_statistics_name_the_row_that_is_not_finite_and_refuse_what_does_not_fit():
    x = np.ones((2100, 3))
    x[2051, 1] = np.nan
    for given_ in (x, np.array_split(x, 11)):
        with pytest.raises(ValueError, match="row 2051 of the features is not finite"):
            statistics(given_)
    for bad, sentence in (
        ([], "no features"),
        (np.ones(3), "give real numbers"),
        (np.ones((2, 2), complex), "give real numbers"),
        (np.full((2, 2), 1e300), "not finite in float32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            statistics(bad)


def test_statistics_of_an_unknown_number_of_images_cannot_be_joined():
    known = statistics(normal("known", 9, 3))
    with pytest.raises(ValueError, match="do not add up"):
        known + replace(known, n=0)


def test_inception_score_of_certain_classes_is_their_number_and_of_equal_images_1():
    assert inception_score(np.eye(7)[np.arange(70) % 7]) == pytest.approx(7)
    assert inception_score(np.full((9, 5), 0.2)) == pytest.approx(1)
    split = np.eye(4)[[0, 1, 2, 3, 0, 1, 0, 0]]  # of 4, 2 and 1 classes
    assert inception_score(split, 4) == pytest.approx((4 + np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4))) / 2)
    assert inception_score(split[:5], 4) == pytest.approx((4 + 1) / 2)  # the last split is shorter


@pytest.mark.parametrize("probs", [np.eye(3) * 5, np.full((2, 2), np.nan), np.array([[2.0, -1.0]]), np.zeros(3)])
def test_inception_score_refuses_what_is_no_distribution(probs):
    with pytest.raises(ValueError, match="the class probabilities"):
        inception_score(probs)


@cases
def test_manifolds_are_the_plain_formulas(case):
    """With features far from 0, too: their mean must not cost digits."""
    reference, samples = CASES[case]
    distances = squared(reference, samples)
    ours, theirs = (np.sort(squared(x, x), axis=1) for x in (reference, samples))
    for k, block in ((1, 77), (3, 1000), (7, 77)):
        assert np.allclose(manifold_radii(reference + 30, k, block=block), ours[:, k], rtol=1e-5)
    inside = (distances <= ours[:, 3, None]).any(axis=0).mean(), (distances <= theirs[:, 3]).any(axis=1).mean()
    assert precision_recall(reference, samples, block=129) == pytest.approx(inside, abs=1e-12)
    near = distances < ours[:, 5, None]
    expected = near.sum() / (5 * len(samples)), near.any(axis=1).mean()
    assert density_coverage(reference, samples, block=101) == pytest.approx(expected, abs=1e-12)
    for k, block in ((1, 77), (3, 1000)):
        nearest = metrics.nearest_neighbours(samples + 30, reference + 30, k, block=block)
        assert np.allclose(nearest[0], np.sqrt(np.sort(distances, axis=0)[:k].T), rtol=1e-4)
        assert np.allclose(np.take_along_axis(distances.T, nearest[1], axis=1), nearest[0] ** 2, rtol=1e-4)


@pytest.mark.parametrize("dtype", metrics.DTYPES)
def test_collapsed_samples_are_precise_and_noisy_ones_recall(dtype):
    """One mode of a reference; and samples spread over far more than the reference is."""
    reference = normal("modes", 400, 24)
    collapsed = reference[:1] * 0.1 + 0.05 * normal("one mode", 300, 24)
    noisy = 4 * normal("noise", 300, 24)
    precision, recall = precision_recall(reference, collapsed, 3, dtype)
    assert precision > 0.95
    assert recall < 0.05
    precision, recall = precision_recall(reference, noisy, 3, dtype)
    assert precision < 0.05
    assert recall > 0.95


def test_coverage_is_the_share_of_the_modes_that_samples_have():
    modes = 50 * np.eye(4, dtype=np.float32)
    reference = modes[np.arange(400) % 4] + normal("four modes", 400, 4)
    two, four = (modes[np.arange(400) % count] + normal("some modes", 400, 4) for count in (2, 4))
    assert density_coverage(reference, two)[1] == pytest.approx(0.5, abs=0.03)
    assert density_coverage(reference, four) == pytest.approx((1, 1), abs=0.06)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 17.0])
def test_float16_rounds_as_numpy_rounds(scale):
    """Half a million float32, and all halves and the middles between them, where a tie goes to the even one."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.unique(halves[np.isfinite(halves)]).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate([rng("halves").standard_normal(1 << 19).astype(np.float32) * scale, halves, middles])
    assert np.array_equal(metrics._Half().rounded(values.copy()), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("scale", [20, 45, 60, 1e5])
def test_where_float16_overflows_distances_are_float32(scale):
    """Distances, products or norms above its largest number; at half of the scale nothing is."""
    x, y = (scale * normal(name, 200, 24) / 0.4 for name in ("large", "large too"))
    assert np.array_equal(manifold_radii(x, dtype="float16"), manifold_radii(x))
    assert precision_recall(x, y, 3, "float16") == precision_recall(x, y, 3, "float32")
    small = x / scale
    assert not np.array_equal(manifold_radii(small, dtype="float16"), manifold_radii(small))


def test_only_the_blocks_that_overflow_are_float32(monkeypatch):
    monkeypatch.setattr(metrics, "PUBLISHED_BLOCK", 100)
    x = normal("partly", 300, 24)
    x[250] *= 1000
    mixed, single = (manifold_radii(x, dtype=dtype, block=64) for dtype in ("float16", "float32"))
    assert mixed[250] == pytest.approx(single[250], rel=1e-6)
    near = np.sort(squared(x[:200], x[:200]), axis=1)[:, 3] * 1.01 < squared(x[:200], x[200:]).min(axis=1)
    assert near.sum() > 10  # whose neighbours are in blocks that do not overflow
    assert np.array_equal(mixed[:200][near], manifold_radii(x[:200], dtype="float16")[near])
    assert not np.array_equal(mixed[:200][near], single[:200][near])


def test_distances_refuse_what_they_cannot_measure():
    x = normal("refused", 6, 4)
    for call, sentence in (
        (lambda: manifold_radii(x, 6), "k must be at least 1 and less than the 6 images, got 6"),
        (lambda: manifold_radii(x, 0), "k must be .* got 0"),
        (lambda: manifold_radii(x, dtype="float64"), "must be one of float32, float16, got 'float64'"),
        (lambda: manifold_radii(x * np.float32(1e25)), "too large for distances"),
        (lambda: precision_recall(x, x[:, :3]), "are of two networks"),
        (lambda: precision_recall(x, x[:3]), "6 and 3 images are too few: take 4 or more of each"),
        (lambda: precision_recall(np.where(x == x[2, 1], np.nan, x), x), "row 2 of the reference's features"),
        (lambda: density_coverage(x, np.where(x == x[5, 1], np.inf, x), 2), "row 5 of the samples' features"),
        (lambda: kernel_distance(x, x, subset_size=7), "KID needs 2 subsets or more, of 2 to 6 images, got 100 of 7"),
        (lambda: kernel_distance(x, x, subsets=1, subset_size=3), "got 1 of 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def plain_mmd(x, y):
    kernel = lambda a, b: (float(a.astype(float) @ b.astype(float)) / len(a) + 1) ** 3  # noqa: E731
    n = len(x)
    own = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j)
    return own / (n * (n - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_kernel_distance_of_all_images_is_the_plain_formula():
    x, y = normal("x", 12, 5), 1.5 * normal("y", 12, 5)
    value, error = kernel_distance(x, y, subsets=3, subset_size=12)
    assert value == pytest.approx(plain_mmd(x, y), rel=1e-12)
    assert error == pytest.approx(0, abs=1e-12)  # every subset is all


def test_kernel_distance_has_the_standard_error_of_a_mean_over_subsets():
    """The first two of three subsets are those of a call with two."""
    (two, gap), (three, error) = (
        kernel_distance(normal("x", 9), normal("y", 9), subsets=subsets, subset_size=4) for subsets in (2, 3)
    )
    values = two - gap, two + gap, 3 * three - 2 * two
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))


def test_kernel_distance_of_equal_distributions_is_0_on_average():
    """Over independent sets, so that their spread is the true one; a biased estimate would be off by far more."""
    sets = [normal(f"kid {i}", 60, 8) for i in range(120)]
    values = np.array([metrics._squared_mmd(*pair) for pair in zip(sets[::2], sets[1::2], strict=True)])
    assert abs(values.mean()) < 4 * values.std(ddof=1) / np.sqrt(len(values))
    diagonal = np.mean([np.square(x).sum(axis=1).mean() / 8 for x in sets])
    assert values.std(ddof=1) / np.sqrt(len(values)) < ((diagonal + 1) ** 3 - 1) / 60  # what the diagonal would add
    assert kernel_distance(sets[0], sets[1] + 1, subset_size=30)[0] > 0.5


def test_kernel_distance_depends_on_the_seed_alone():
    x, y = normal("x", 50), normal("y", 40)
    first, again, other = (kernel_distance(x, y, subsets=5, subset_size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def feature_set(pool, spatial, probs):
    return FeatureSet(len(pool), pool, statistics(pool), statistics(spatial), probs)


def arrays(name, n=160, shift=0.0):
    pool = normal(f"{name} pool", n, 12) + np.float32(shift)
    probs = softmax(2 * normal(f"{name} logits", n, 6)).astype(np.float32)
    return pool, normal(f"{name} spatial", n, 20) + np.float32(shift), probs


OPTIONS = Options(subsets=20)
every_metric = pytest.mark.parametrize("name", METRICS)


def compute(name, reference, samples, options=OPTIONS):
    values = METRICS[name].compute(feature_set(*reference), feature_set(*samples), options)
    assert len(values) == len(METRICS[name].labels)
    assert all(type(value) is float for value in values)
    return values


@every_metric
def test_no_score_depends_on_the_order_of_images(name):
    reference, samples = arrays("reference"), arrays("samples", 140, 0.2)
    expected = compute(name, reference, samples)
    for seed in range(3):
        orders = [np.random.default_rng(seed).permutation(len(of[0])) for of in (reference, samples)]
        moved = [[array[order] for array in of] for of, order in zip((reference, samples), orders, strict=True)]
        assert compute(name, *moved) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every_metric
def test_no_score_depends_on_the_size_of_blocks(name, monkeypatch):
    reference, samples = arrays("reference"), arrays("samples", 140, 0.2)
    expected = compute(name, reference, samples)
    for function in (manifold_radii, precision_recall, density_coverage):
        monkeypatch.setitem(function.__kwdefaults__, "block", 33)
    monkeypatch.setattr(metrics, "ROWS", 17)
    assert compute(name, reference, samples) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every_metric
def test_every_score_of_a_set_against_itself_is_a_perfect_one(name):
    perfect = {"FID": 0, "sFID": 0, "Precision": 1, "Recall": 1, "Density": 1, "Coverage": 1}
    own = arrays("own")
    scores = dict(zip(METRICS[name].labels, compute(name, own, own), strict=True))
    for label, value in scores.items():
        if label in perfect:
            assert value == pytest.approx(perfect[label], abs=0.21 if label == "Density" else 1e-9)  # ties are 1 in 5
    assert scores.get("KID", -1) < 0  # pairs of an image with itself count on one side alone


@every_metric
def test_every_score_is_worse_for_samples_that_are_moved_away(name):
    """But the inception score, which no reference enters: it tells one class from many."""
    reference, near, far = arrays("reference"), arrays("samples", 150), arrays("samples", 150, 2.0)
    far = (*far[:2], np.roll(np.sort(far[2], axis=1), 1, axis=0))  # all of one class
    better, worse = (compute(name, reference, samples)[0] for samples in (near, far))
    assert worse > better if name in ("fid", "sfid", "kid") else worse < better


@every_metric
def test_a_score_says_what_it_lacks(name):
    metric, whole = METRICS[name], feature_set(*arrays("whole"))
    blind = replace(whole, **{metric.field: None})
    assert metric.lacks(whole, whole) == ""
    for side, pair in (("reference has", (blind, whole)), ("samples have", (whole, blind))):
        if side == "reference has" and not metric.compares:
            continue
        with pytest.raises(ValueError, match=f"{metric.labels[0]}.* needs? .*, and the {side} none") as error:
            metric.compute(*pair, OPTIONS)
        assert str(error.value) == metric.lacks(*pair)


def test_statistics_alone_give_the_frechet_distances_and_a_sentence_for_the_others():
    whole = feature_set(*arrays("whole"))
    alone = replace(whole, n=0, pool=None, probs=None)
    lacking = {name: metric.lacks(alone, whole) for name, metric in METRICS.items()}
    assert [name for name in lacking if not lacking[name]] == ["is", "fid", "sfid"]
    assert lacking["pr"] == (
        "Precision and Recall need features of single images, and the reference has none: there are statistics alone"
    )


@pytest.mark.parametrize(("name", "least"), [("fid", 2), ("pr", 4), ("kid", 4), ("dc", 6)])
def test_a_reference_of_too_few_images_is_noticed_without_samples(name, least):
    for count in (least - 1, least, 99):
        features = np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)
        reference = FeatureSet(count, features, statistics(features))
        if count < least:
            with pytest.raises(ValueError, match="take"):
                rehearse(reference, [METRICS[name]], OPTIONS)
        else:
            rehearse(reference, [METRICS[name], METRICS["is"]], OPTIONS)


def test_the_table_is_in_the_published_order_and_starts_with_the_published_scores():
    labels = [label for metric in METRICS.values() for label in metric.labels]
    assert labels[:5] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert tuple(METRICS)[: len(DEFAULT_METRICS)] == DEFAULT_METRICS
    assert len(set(labels)) == len(labels)


def test_published_numbers_through_the_table():
    reference, samples = CASES["near"]
    first, second = (feature_set(x, x, softmax(x[:, :20]).astype(np.float32)) for x in (reference, samples))
    found = [METRICS[name].compute(first, second, Options(split_size=150)) for name in DEFAULT_METRICS]
    fid = float(GOLDEN["near/fid"])
    expected = [float(GOLDEN["near/inception_score_split150"]), fid, fid, *GOLDEN["near/precision_recall"]]
    assert [value for values in found for value in values] == pytest.approx(expected, rel=1e-6)


def test_metrics_work_as_a_lone_file(tmp_path):
    (tmp_path / "metrics.py").write_bytes(Path(metrics.__file__).read_bytes())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import metrics, numpy as np\n"
        "x = np.random.default_rng(0).random((30, 4)); print(metrics.precision_recall(x, x, 3, 'float16'))\n"
        "print({name.split('.')[0] for name in sys.modules} & {'torch', 'guided_diffusion', 'evaluations', 'scipy'})"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True
    )
    assert found.stdout == "(1.0, 1.0)\nset()\n"


def test_the_plain_formulas_of_the_benchmark_are_the_scores():
    reference, samples = CASES["near"]
    assert benchmark.plain_precision_recall(reference, samples, "float32") == precision_recall(reference, samples)
    near_published = benchmark.plain_precision_recall(reference, samples, "float16")
    assert near_published == pytest.approx(GOLDEN["near/precision_recall"], abs=5e-3)


@pytest.mark.slow
def test_the_benchmark_prints_what_it_measures_in_other_processes_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK", benchmark.Sizes(features=24, images=40, batch=1, batches=1))
    path = tmp_path / "numbers.json"
    benchmark.main(["--quick", "--only", "frechet,manifolds", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert capsys.readouterr().out.splitlines() == [benchmark.line(row) for row in rows]
    assert [row["what"].split(",")[0] for row in rows] == ["Frechet distance", *["precision and recall"] * 2]
    assert [row["difference"] < bound for row, bound in zip(rows, (1e-9, 1e-9, 0.1), strict=True)] == [True] * 3
    assert all(row["bytes"] > 1e7 and row["plain_seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_the_benchmark_of_the_network_measures_what_bf16_changes(monkeypatch):
    def here(name, *arguments):
        return {"result": benchmark.MEASURED[name](*arguments), "seconds": 0.5}

    monkeypatch.setattr(benchmark, "measured", here)
    row = benchmark.measure_extractor(1, 2)
    assert row["fp32_per_second"] == 4
    assert 0 < row["change"] < 0.05
    assert row["change"] < row["change_of_spread"]
