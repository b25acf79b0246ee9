"""Samples of one job made in parts by jobs that do not know each other, and put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from few import few
from runs import CLASSIFIER, SAMPLING, UNET, UPSAMPLER, Runs

from guided_diffusion.commands import classifier_sample, image_sample, npz_tool, super_res_sample
from guided_diffusion.commands.flags import parse
from guided_diffusion.evaluation.images import open_images, read_statistics
from guided_diffusion.evaluation.metrics import statistics
from guided_diffusion.evaluation.references import statistics_arrays
from guided_diffusion.runtime.npz import save_npz, write_arrays


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), unet=UNET, classifier=CLASSIFIER, upsampler=UPSAMPLER)


def sampled(main: Any, folder: Path, *words: str) -> Path:
    main([*words, "--log_dir", str(folder)])
    [path] = folder.glob("samples_*.npz")
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """A context in which a command ends with a sentence."""

    @contextmanager
    def ends_with(sentence: str) -> Iterator[None]:
        with pytest.raises(SystemExit) as stop:
            yield
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err.strip().splitlines()[-1]

    return ends_with


WAYS: dict[str, tuple[list[str], list[list[str]]]] = {
    "shards": (["--classes", "0,2"], [["--shard", "1/2"], ["--shard", "2/2"]]),
    "indices": ([], [["--start_index", "2", "--num_samples", "3"], ["--num_samples", "2", "--start_index", "0"]]),
}


@pytest.mark.parametrize("way", few(WAYS, ["indices"]))
def test_parts_are_merged_to_the_file_of_one_job(runs: Runs, tmp_path: Path, way: str) -> None:
    """Byte for byte, also with what a sampler, a class and a guide draw at random."""
    more, parts = WAYS[way]
    words = ["--model_path", runs["unet"], "--classifier_path", runs["classifier"], *SAMPLING, *more, "--save_images"]
    whole = sampled(classifier_sample.main, tmp_path / "whole", *words)
    for number, part in enumerate(parts):
        sampled(classifier_sample.main, tmp_path / f"part{number}", *words, *part)
    npz_tool.main(["merge", f"{tmp_path}/part{{0..1}}", str(tmp_path / "merged.npz")])
    assert (tmp_path / "merged.npz").read_bytes() == whole.read_bytes()
    names = [sorted(path.name for path in (tmp_path / f"part{n}" / "images").iterdir()) for n in (0, 1)]
    assert sorted([*names[0], *names[1]]) == sorted(path.name for path in (tmp_path / "whole" / "images").iterdir())


def test_images_are_enlarged_in_parts(runs: Runs, tmp_path: Path) -> None:
    base = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    save_npz(str(tmp_path / "base.npz"), base, np.array([0, 1, 2, 0, 1]))
    words = ["--model_path", runs["upsampler"], "--base_samples", f"{tmp_path}/base.npz", *SAMPLING]
    whole = sampled(super_res_sample.main, tmp_path / "whole", *words)
    for number in (1, 2, 3):
        sampled(super_res_sample.main, tmp_path / f"run{number}", *words, "--shard", f"{number}/3")
    npz_tool.main(["merge", f"{tmp_path}/run{{1..3}}", str(tmp_path / "merged.npz")])
    assert (tmp_path / "merged.npz").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("shard", ["3/2", "0/2", "1", "a/b", "1/-2", "1/2/3"])
def test_what_is_no_part_is_refused(capsys: pytest.CaptureFixture[str], shard: str) -> None:
    with pytest.raises(SystemExit):
        parse("image_sample", ["--shard", shard])
    assert f"{shard!r} is no part I/N of a job: write 1/8 to 8/8 for eight jobs" in capsys.readouterr().err


def test_parts_that_do_not_fit_are_named(runs: Runs, tmp_path: Path, refused: Any) -> None:
    words = ["--model_path", runs["unet"], *SAMPLING]
    with refused("part 4 of 9 would be empty: of 3 batches of 2 there are at most 3 parts"):
        sampled(image_sample.main, tmp_path / "empty", *words, "--shard", "4/9")
    for number in (1, 2, 3):
        sampled(image_sample.main, tmp_path / f"run{number}", *words, "--shard", f"{number}/3")
    sampled(image_sample.main, tmp_path / "other", *words, "--shard", "2/3", "--seed", "1")
    sampled(image_sample.main, tmp_path / "whole", *words)

    def merge(*names: str) -> None:
        npz_tool.main(["merge", ",".join(f"{tmp_path}/{name}" for name in names), str(tmp_path / "merged.npz")])

    for names, sentence in (
        (("run1", "run3"), "run3 begins at image 4, and those from 2 on are missing: make that part too"),
        (("run1", "run2"), "the images from 4 to 5 are missing: make that part too"),
        (
            ("run1", "run2", "run2", "run3"),
            "run2 begins at image 2, and others before it go to 4: leave one of them out",
        ),
        (("run1", "other", "run3"), "are of two jobs: they differ in seed"),
        (("run1", "whole"), "whole begins at image 0, and others before it go to 2: leave one of them out"),
        (("run1",), "are no npz files of parts: write run1,run2"),
    ):
        with refused(sentence):
            merge(*names)
    assert not (tmp_path / "merged.npz").exists()


def test_statistics_of_parts_are_those_of_the_whole(tmp_path: Path, refused: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 6))
    for name, part in {"a": rows[:31], "b": rows[31:], "whole": rows}.items():
        record = {"extractor": "x", "identity": "x 1", "n": len(part)}
        write_arrays(str(tmp_path / f"{name}.npz"), statistics_arrays({"pool": statistics(part)}, record))
    npz_tool.main(["merge", f"{tmp_path}/a.npz,{tmp_path}/b.npz", str(tmp_path / "merged.npz")])
    merged, record = read_statistics(open_images(tmp_path / "merged.npz"))
    expected, _ = read_statistics(open_images(tmp_path / "whole.npz"))
    assert (merged["pool"].n, record["n"]) == (50, 50)
    np.testing.assert_allclose(merged["pool"].mean, expected["pool"].mean, rtol=1e-12)
    np.testing.assert_allclose(merged["pool"].cov, expected["pool"].cov, rtol=1e-10, atol=1e-12)
    write_arrays(
        str(tmp_path / "c.npz"),
        statistics_arrays({"pool": statistics(rows)}, {"extractor": "y", "identity": "y", "n": 50}),
    )
    with refused("do not say that they are of one network"):
        npz_tool.main(["merge", f"{tmp_path}/a.npz,{tmp_path}/c.npz", str(tmp_path / "d.npz")])
