"""What docs/samplers.md says: the comparison in small, the measures behind it, and that it knows every sampler."""

import math
import runpy
from pathlib import Path

import pytest
import torch as th
from few import few
from oracle import GaussianData, make_process

import mixture
import pages
import report
import samplers as benchmark
from guided_diffusion.sampling.loop import network_calls
from guided_diffusion.sampling.samplers import SAMPLERS, make_sampler

TEXT = (Path(__file__).parent.parent / "docs" / "samplers.md").read_text()
DATA = {"plane": mixture.ring(), "images": mixture.images(8)}


def problem(data="plane", schedule="linear", scale=0.0, count=128):
    return benchmark.Problem(DATA[data], schedule, scale, count)


@pytest.mark.parametrize("scale", few([0.0, 2.0], [2.0]))
@pytest.mark.parametrize("data", few(DATA, ["plane"]))
def test_20_calls_of_the_best_solver_beat_100_of_ddim(data, scale):
    case = problem(data, "linear", scale, 64)
    (calls, best), (ddim_calls, ddim) = (
        (calls, benchmark.distance_from_flow(case, sample))
        for sample, calls in (benchmark.run("unipc", case, 20), benchmark.run("ddim", case, 100))
    )
    assert (calls, ddim_calls) == (20, 100)
    assert best < ddim / 1.5


@pytest.mark.parametrize("name", benchmark.ALL)
def test_a_budget_is_used_and_kept_to(name):
    kind, options = benchmark.ALL[name]
    sampler = make_sampler(kind, **options)
    steps = benchmark.steps_within(sampler, 25)
    calls, more = (network_calls(make_process(respacing=str(n)), sampler) for n in (steps, steps + 1))
    assert calls <= 25 < more
    assert benchmark.run(name, problem(count=2), 25)[1] == calls


def test_every_sampler_is_measured():
    assert {kind for kind, _ in benchmark.ALL.values()} == set(SAMPLERS) - {"ddim_reverse"}
    assert set(benchmark.ALL) == set(report.LOOKS)


def test_the_flow_of_one_gaussian_is_affine():
    case = benchmark.Problem(mixture.Mixture(th.full((1, 3, 2, 2), 0.3), 0.5), "cosine", 0.0, 4)
    process = make_process(name="cosine")
    data = GaussianData(process)
    x = data.flow(case.start()[0], process.alphas_cumprod[-1], process.alphas_cumprod[0])
    expected = case.data.denoise(x, float(process.level(0.0)))
    assert th.allclose(benchmark.flow(case, 400), expected, atol=1e-6)


@pytest.mark.parametrize("scale", few([0.0, 2.0], [2.0]))
def test_the_flow_is_solved_finely_enough(scale):
    case = problem(scale=scale)
    assert (benchmark.flow(case, 250) - benchmark.flow(case, 500)).abs().max() < 1e-5


def test_moved_points_are_as_far_as_they_were_moved():
    """By d in one direction: by d |cos| in each, which is 2 d / pi on average."""
    x, _ = DATA["plane"].sample(20000, th.Generator().manual_seed(0))
    assert benchmark.sliced_distance(x, DATA["plane"]) < 0.01
    x[:, 0] += 0.5
    assert benchmark.sliced_distance(x, DATA["plane"]) == pytest.approx(1 / math.pi, abs=0.02)


def test_scatter_that_is_10_percent_too_large_is_seen_as_such():
    case = problem("images")
    x, component = case.data.sample(400, th.Generator().manual_seed(0))
    means = case.data.means[component].view_as(x)
    assert benchmark.error_of_scatter(case, x) < 0.02
    assert benchmark.error_of_scatter(case, means + 1.1 * (x - means)) == pytest.approx(0.1, abs=0.02)


def test_a_table_marks_the_best():
    rows = {"a": [(5, 0.125), (10, 0.5)], "b": [(5, 0.25), (9, 0.004321)], report.EXACT: [(5, 0.001), (10, 0.001)]}
    _, _, *lines = report.table(rows, (5, 10)).splitlines()
    assert lines == ["| a | **0.12** | 0.5 |", "| b | 0.25 | **0.0043** |", "| exact samples | 0.001 | 0.001 |"]


def test_blocks_are_replaced_between_their_markers():
    text = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter"
    assert pages.replaced(text, "a", "new\\1\nlines") == text.replace("old", "new\\1\nlines")
    with pytest.raises(ValueError, match="no place for b: write '<!-- b -->'"):
        pages.replaced(text, "b", "new")


def test_the_overview_is_that_of_the_samplers_as_they_are():
    block = report.overview(benchmark.make_process("cosine", "20"))
    assert pages.replaced(TEXT, "overview", block) == TEXT, "run python benchmarks/samplers.py"
    for name in SAMPLERS:
        assert f"| `{name}` |" in block


@pytest.mark.slow
def test_the_picture_is_drawn(tmp_path):
    rows = {name: [(5, 0.5), (10, 0.05)] for name in [*report.LOOKS, report.EXACT]}
    report.draw({key: rows for key, _ in report.PANELS}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("--quik", 2)])
def test_asking_for_help_measures_nothing(word, status, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["samplers.py", word])
    monkeypatch.setattr(report, "overview", lambda process: pytest.fail("it measured"))
    monkeypatch.setattr("guided_diffusion.sampling.samplers.make_sampler", lambda *_, **__: pytest.fail("it measured"))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(benchmark.__file__)), run_name="__main__")
    assert end.value.code == status
    assert "samplers.py" in "".join(capsys.readouterr())
