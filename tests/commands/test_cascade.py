"""Cascades: one command that does what the commands of its stages do."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Nursery
from runs import NAMES as CLASSES, NETWORK, PROCESS, SCRIPTS, Runs, scrambled, write_run

from guided_diffusion.commands import cascade_sample, sampling
from guided_diffusion.config import ClassifierConfig, SuperResConfig, UNetConfig
from guided_diffusion.runtime.files import write_json
from guided_diffusion.script_util import build_unet

BASE = UNetConfig(image_size=4, **NETWORK)
FIRST = SuperResConfig(small_size=4, large_size=8, **NETWORK, null_class=True)
LAST = SuperResConfig(
    small_size=8, large_size=16, **{**NETWORK, "class_cond": False, "attention_resolutions": "8"}, cond_aug=0.5
)
CLASSIFIER = ClassifierConfig(
    image_size=4,
    num_classes=3,
    classifier_width=32,
    classifier_depth=1,
    classifier_channel_mult="1,2",
    classifier_attention_resolutions="2",
)
FILES = ["base/samples_5x4x4x3.npz", "up1/samples_5x8x8x3.npz", "up2/samples_5x16x16x3.npz"]


def stages_of(runs: Runs) -> list[str]:
    """Three stages, each with a sampler and guidance of its own."""
    base = f"--base.model_path {runs['base']} --base.classifier_path {runs['classifier']} --base.classifier_scale 2"
    first = f"--up1.model_path {runs['first']} --up1.cfg_scale 2 --up1.sampler dpm++2m --up1.steps 3"
    last = f"--up2.model_path {runs['last']} --up2.use_ddim --up2.cond_aug_level 0.25 --up2.batch_size 3"
    return f"{base} --base.steps 3 {first} {last} --up2.timestep_respacing 2".split()


SHARED = ["--num_samples", "5", "--batch_size", "2", "--seed", "7", "--classes", "owl,cat"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), base=BASE, first=FIRST, last=LAST, classifier=CLASSIFIER)


@pytest.fixture(scope="module")
def made(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cascade leaves."""
    folder = tmp_path_factory.mktemp("cascade") / "out"
    cascade_sample.main([*SHARED, *stages_of(runs), "--save_images", "--log_dir", str(folder)])
    return folder


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cascade_sample.main(argv)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_the_result_is_that_of_the_commands_one_after_another(made: Path, tmp_path: Path) -> None:
    lines = [line for line in (made / "log.txt").read_text().splitlines() if ".py --" in line]
    assert len(lines) == 3
    for line, command in zip(lines, ("classifier_sample", "super_res_sample", "super_res_sample"), strict=True):
        words = shlex.split(line[line.index(f"{command}.py") :])
        argv = [word.replace(str(made), str(tmp_path)) for word in words[1:]]
        import_module(f"guided_diffusion.commands.{command}").main(argv)
    assert contents(tmp_path) == contents(made)


def test_labels_flow_and_every_stage_draws_noise_of_its_own(made: Path) -> None:
    for name in FILES:
        with np.load(made / name) as saved:
            assert saved["arr_1"].tolist() == [2, 0, 2, 0, 2]
    requests = [json.loads((made / stage / "request.json").read_text()) for stage in ("base", "up1", "up2")]
    assert [request["seed"] for request in requests] == [7, 1000007, 2000007]
    assert len({request["sampler"] for request in requests}) == 3
    assert [request["batch_size"] for request in requests] == [2, 2, 3]
    assert not (made / "base" / "images").exists()
    assert sorted(os.listdir(made / "up2" / "images"))[0] == "000000_y2.png"
    log = (made / "log.txt").read_text()
    assert str(made / FILES[2]) in log.splitlines()[-1]


def test_a_file_of_stages_says_the_same_and_the_command_line_has_the_last_word(
    runs: Runs, made: Path, tmp_path: Path
) -> None:
    stages = {
        "base": {"model_path": runs["base"], "classifier_path": runs["classifier"], "classifier_scale": 2, "steps": 3},
        "up1": {"model_path": runs["first"], "cfg_scale": 1.5, "sampler": "dpm++2m", "steps": 3},
        "up2": {"model_path": runs["last"], "use_ddim": True, "cond_aug_level": 0.25, "timestep_respacing": "2"},
    }
    for file in ("stages.json", "stages.yaml"):
        (tmp_path / file).write_text(json.dumps(stages))
    by_words = cascade_sample.parse_stages([*SHARED, *stages_of(runs)])[1]
    for file in ("stages.json", "stages.yaml"):
        argv = [*SHARED, "--stages", str(tmp_path / file), "--up1.cfg_scale=2", "--up2.batch_size", "3"]
        assert cascade_sample.parse_stages(argv)[1] == by_words
    cascade_sample.main([*argv, "--log_dir", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(made)


@pytest.mark.slow
def test_an_interrupted_cascade_goes_on_where_it_stopped(
    runs: Runs, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*SHARED, *stages_of(runs), "--log_dir", str(tmp_path)]
    whole, calls = sampling.enlarge, []

    def interrupted(flags: Any) -> str:
        calls.append(flags)
        if len(calls) == 2:
            raise ValueError("stopped")
        return whole(flags)

    monkeypatch.setattr(sampling, "enlarge", interrupted)
    with pytest.raises(SystemExit):
        cascade_sample.main(argv)
    before = [os.stat(tmp_path / name).st_mtime_ns for name in FILES[:2]]
    monkeypatch.setattr(sampling, "enlarge", whole)
    cascade_sample.main(argv)
    assert [os.stat(tmp_path / name).st_mtime_ns for name in FILES[:2]] == before
    assert contents(tmp_path) == contents(made)


@pytest.mark.slow
def test_two_ranks_make_the_files_of_one(runs: Runs, made: Path, tmp_path: Path, ranks: Nursery) -> None:
    flags = [*SHARED, *stages_of(runs), "--log_dir", tmp_path, "--device", "cpu"]
    result = ranks.run([SCRIPTS / "cascade_sample.py", *flags])
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == contents(made)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "--up2.model_path RUNS/first --up2.cond_aug_level 0",
            "stage up2: the upsampler enlarges images of 4x4 with 3 channels, and the stage before makes 8x8 with 3",
        ),
        ("--up1.model_path RUNS/base", "stage up1: --model_path"),
        ("--base.model_path RUNS/nowhere", "stage base: "),
        ("--up2.steps 4", "stage up2: error: --steps and --timestep_respacing exclude each other"),
        ("--up2.timestep_respacing 99", "stage up2: timestep_respacing cannot take 99 steps"),
        ("--up2.cond_aug_level 0.75", "stage up2: --cond_aug_level 0.75 is above 0.5"),
        ("--up1.classes owl", "stage up1: --classes owl has no effect, as the images have labels of their own"),
        ("--up1.classifier_path RUNS/nowhere", "stage up1: "),
        ("--up2.stpes 4", "stage up2: error: unknown flag --stpes; did you mean --steps?"),
        ("--up2.batch_size 0", "stage up2: error: argument --batch_size: 0 is below the least value, 1"),
        ("--up1.num_samples 3", "stage up1 has no num_samples of its own: write --num_samples"),
        ("--up1.base_samples x", "stage up1 has no base_samples of its own: each stage takes its images from the one "),
        ("--up3.large_size 32", "stage up3: --model_path is missing"),
        (
            "--up4.steps 3",
            "the stages are base, up1, up2, up3, and up3 is missing: give its flags, as --up3.model_path",
        ),
        ("--upp.steps 3", "the stages are base, up1, up2, up3, and up3 is missing"),
        ("--numsamples 3", "cascade_sample.py: error: unknown flag --numsamples; did you mean --num_samples?"),
        ("--stages nowhere.yaml", "--stages nowhere.yaml does not exist: give a file of flags"),
    ],
)
def test_mistakes_are_seen_before_anything_is_sampled(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    words = [word.replace("RUNS", str(runs.root)) for word in more.split()]
    assert message in refused([*SHARED, *stages_of(runs), *words, "--log_dir", str(tmp_path)], capsys)
    assert not list(tmp_path.rglob("*.npz"))
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "cannot be used ("),
        ("a.json", "[1]", "cannot be used ("),
        ("a.json", '{"base": 1}', "base is no stage: write for example up1: {model_path: run}"),
        ("a.json", '{"base": {"steps": [1, 2]}, "up1": {}}', "argument --steps: '1,2' is not of type int"),
        ("a.yaml", "[base\n", "cannot be used ("),
        ("a.yaml", "\x00", "cannot be used ("),
        ("a.json", '{"base": {"model_path": "x"}, "base2": {}}', "base2 is none of these"),
        ("a.json", '{"up1": {"model_path": "x"}}', "base is missing: give its flags, as --base.model_path"),
        ("a.json", '{"base": {"model_path": "x"}}', "up1 is missing"),
        ("a.json", '{"base": {"classifier_scale": 2}, "up1": {}}', "has no effect without --classifier_path"),
        (
            "a.json",
            '{"base": {"steps": "x"}, "up1": {}}',
            "stage base: error: argument --steps: 'x' is not of type int",
        ),
        ("a.json", "[" * 100000, "cannot be used ("),
    ],
)
def test_files_of_stages_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert message in refused(["--stages", str(tmp_path / name), "--log_dir", str(tmp_path / "out")], capsys)


def test_classes_must_be_there_and_the_same(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = UNetConfig(**{**asdict(BASE), "class_cond": False})
    write_run(tmp_path / "unlabelled", "image_train", scrambled(build_unet(config, True)), config, PROCESS)
    write_run(tmp_path / "other", "image_train", scrambled(build_unet(BASE, True)), BASE, PROCESS)
    table = {"classes": [*CLASSES[:2], "cow"], "class_from": "filename", "counts": [1, 1, 1]}
    write_json(str(tmp_path / "other" / "classes.json"), table)
    up = ["--up1.model_path", runs["first"], "--up1.timestep_respacing", "1", "--num_samples", "2"]
    for name, message in (
        ("unlabelled", "stage up1: the upsampler is class-conditional and the images have no labels"),
        (
            "other",
            "stage up1: the upsampler has classes ['cat', 'dog', 'owl'], and the stage before ['cat', 'dog', 'cow']",
        ),
    ):
        argv = ["--base.model_path", str(tmp_path / name), *up, "--log_dir", str(tmp_path / "out")]
        assert message in refused(argv, capsys)
    assert not (tmp_path / "out" / "base").exists()
    argv = ["--base.model_path", str(tmp_path / "unlabelled"), "--base.steps", "1", *up, "--up1.classes", "dog"]
    cascade_sample.main([*argv, "--log_dir", str(tmp_path / "out")])
    with np.load(tmp_path / "out" / "up1" / "samples_2x8x8x3.npz") as saved:
        assert saved["arr_1"].tolist() == [1, 1]


def test_a_wrong_flag_of_a_stage_is_refused_before_torch_is_imported() -> None:
    code = "import sys; from guided_diffusion.commands import cascade_sample\n"
    code += "try: cascade_sample.main(['--base.modle_path', 'x', '--up1.model_path', 'y'])\n"
    code += "except SystemExit as end: sys.exit(40 + end.code + 100 * ('torch' in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 42
    assert "stage base: error: unknown flag --modle_path; did you mean --model_path?" in result.stderr
