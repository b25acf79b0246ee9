"""Flags from files: as on the command line, which has the last word."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from guided_diffusion.commands import cascade_sample, flag_files, flags as cli
from guided_diffusion.runtime.options import from_here

YAML = "lr: 2e-4\nchannel_mult: [1, 2]\nclass_cond: yes\nema_rate: 0.9,0.99\nweight_decay: 0.01\n"
JSON = json.dumps({"lr": 2e-4, "channel_mult": "1,2", "class_cond": True, "ema_rate": "0.9,0.99", "weight_decay": 0.01})
WORDS = "--lr 2e-4 --channel_mult 1,2 --class_cond True --ema_rate 0.9,0.99 --weight_decay 0.01".split()


def parsed(*words: object, command: str = "image_train") -> cli.Flags:
    return cli.parse(command, [str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object, command: str = "image_train") -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*words, command=command)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) == 1
    assert printed.startswith(f"{command}.py: error: ")
    return printed.removeprefix(f"{command}.py: error: ")


@pytest.mark.parametrize(
    ("folder", "name", "path", "expected"),
    [
        ("runs/mine", "autoencoder_path", "../first/a.pt", "runs/first/a.pt"),
        ("runs/mine", "autoencoder_path", "a.pt", "runs/mine/a.pt"),
        ("runs/mine", "autoencoder_path", "", ""),
        ("runs/mine", "autoencoder_path", "/elsewhere/a.pt", "/elsewhere/a.pt"),
        ("gs://bucket/mine", "autoencoder_path", "../first/a.pt", "gs://bucket/first/a.pt"),
        ("runs/mine", "autoencoder_path", "gs://bucket/a.pt", "gs://bucket/a.pt"),
        ("", "autoencoder_path", "a.pt", "a.pt"),
        ("runs/mine", "text_encoder", "../clip", "runs/clip"),
        ("runs/mine", "text_encoder", "scratch", "scratch"),
        ("runs/mine", "log_dir", "../other", "../other"),
    ],
)
def test_places_in_a_config_are_those_from_its_folder(folder: str, name: str, path: str, expected: str) -> None:
    assert from_here({name: path, "seed": 3}, folder) == {name: expected, "seed": 3}


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.yml", YAML), ("a.txt", JSON), ("a.json", JSON)])
def test_a_file_says_what_the_command_line_would_have(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert parsed("--config", tmp_path / name) == parsed(*WORDS)


def test_the_command_line_has_the_last_word_and_later_files_come_before_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yml"
    first.write_text("lr: 1\nseed: 1\nbatch_size: 1\nmax_steps: 5")
    second.write_text("seed: 2\nbatch_size: 2")
    expected = parsed(*"--lr 1 --seed 2 --batch_size 3 --max_steps 0".split())
    for order in (
        ["--batch_size", 3, "--max_steps", 0, f"--config={first}", "--config", second],
        ["--config", f"{first},{second}", "--batch_size", 3, "--max_steps", 0],
    ):
        assert parsed(*order) == expected


def test_no_value_on_the_command_line_takes_one_of_a_file_back(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"steps": 20, "sampler": "ddim"}')
    given = parsed("--config", tmp_path / "a.json", "--steps", 0, command="image_sample").given
    assert given == {"sampler": "ddim"}


def test_the_config_of_a_run_says_everything_but_where_it_happened(tmp_path: Path) -> None:
    run = parsed(*WORDS, *"--log_dir old --device cpu --data_dir x --resume_checkpoint auto --seed 5".split())
    (tmp_path / "config.json").write_text(json.dumps({"command": "image_train", "version": "0", "flags": run.values}))
    again = parsed("--config", tmp_path / "config.json", "--data_dir", "y")
    other = {**{name: run.defaults[name] for name in flag_files.OF_A_PROCESS}, "data_dir": again.values["data_dir"]}
    assert again.values == {**run.values, **other}
    assert again.values["data_dir"].endswith("y")


def test_what_a_run_was_given_may_lose_its_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--val_interval is the run's, and not refused without --val_data_dir; a file after it has the last word."""
    run, more = tmp_path / "config.json", tmp_path / "more.yaml"
    values = parsed(*"--val_data_dir x --val_interval 5 --batch_size 3".split()).values
    run.write_text(json.dumps({"command": "image_train", "version": "0", "flags": values}))
    more.write_text("batch_size: 4\n")
    again = parsed("--config", run, "--config", more, "--val_data_dir=", "--seed", 1)
    assert (again.values["val_interval"], again.values["batch_size"], again.values["val_data_dir"]) == (5, 4, "")
    assert parsed("--config", more, "--config", run).values["batch_size"] == 3
    assert "begins a run and --resume_checkpoint goes on" in refused(
        capsys, "--config", run, "--resume_checkpoint", "x"
    )


def test_plugins_of_a_file_run_before_the_flags_are_read(tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text("import sys\nsys.seen_by_a_test = True\n")
    (tmp_path / "a.json").write_text(json.dumps({"plugin": str(tmp_path / "plug.py")}))
    parsed("--config", tmp_path / "a.json")
    assert sys.__dict__.pop("seen_by_a_test")


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("a.yaml", "learning_rate: 1", "a.yaml: unknown flag --learning_rate=1; did you mean --lr?"),
        ("a.yaml", "num_chanels: 1", "a.yaml: unknown flag --num_chanels=1; did you mean --num_channels?"),
        ("a.json", '{"lr": "fast"}', "a.json: argument --lr: 'fast' is not of type float"),
        ("a.json", '{"config": "b.json"}', "a.json: unknown flag --config=b.json"),
        ("a.json", '{"help": "all"}', "a.json: unknown flag --help=all"),
        ("a.yaml", "channel_mult:", "channel_mult has no value: write '' for none"),
        ("a.yaml", "lr:\n  x: 1", "lr has a table for its value: write a number, a text or a list"),
        ("a.yaml", "- lr", "a.yaml cannot be used (it holds no table): write NAME: VALUE lines, or a JSON object"),
        ("a.yaml", "lr: [1", "a.yaml cannot be used (no YAML: expected ',' or ']', but got '<stream end>' in line 1)"),
        ("a.yaml", "lr: !!python/name:os.system", "a.yaml cannot be used (no YAML: could not determine a constructor"),
        ("a.toml", "lr = 1", "a.toml cannot be used (it holds no table): write NAME: VALUE lines, or a JSON object"),
        ("a.json", "{", "a.json cannot be used (Expecting property name"),
        ("a.json", "[" * 100_000, "a.json cannot be used ("),
        ("a.json", "\udcff", "a.json cannot be used ('utf-8' codec can't decode byte 0xff"),
        ("a.json", None, "a.json does not exist: give a file of flags, .yaml or .json"),
        ("a.json", '{"eval_samples": 20}', "--eval_samples has no effect without --eval_interval"),
    ],
)
def test_a_wrong_file_is_answered_by_a_sentence(
    name: str, text: str | None, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    assert answer in refused(capsys, "--config", tmp_path / name)


def test_yaml_needs_a_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "YAML needs a package: run `pip install pyyaml`" in refused(capsys, "--config", tmp_path / "a.yaml")


def test_words_without_a_name_are_not_for_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"metrics": "fid", "seed": 3}')
    given = parsed("real", "made", "--config", tmp_path / "a.json", command="evaluator").given
    assert (given["metrics"], given["seed"]) == ("fid", 3)
    (tmp_path / "a.json").write_text('{"reference": "x"}')
    said = refused(capsys, "real", "made", "--config", tmp_path / "a.json", command="evaluator")
    assert "unknown flag --reference=x" in said


def test_the_stages_of_a_cascade_are_read_the_same_way(tmp_path: Path) -> None:
    shared, base, stages = tmp_path / "shared.yaml", tmp_path / "base.yaml", tmp_path / "stages.yaml"
    stages.write_text("base: {model_path: a, steps: 3}\nup1: {model_path: b, classes: [1, 2]}\n")
    shared.write_text(f"num_samples: 7\nstages: {stages}\n")
    base.write_text("eta: 0.5\nsteps: 4\n")
    words = "--num_samples 7 --base.model_path a --base.steps 3 --base.eta 0.5 --up1.model_path b --up1.classes 1,2"
    got = cascade_sample.parse_stages(["--config", str(shared), "--base.config", str(base)])
    assert got[1] == cascade_sample.parse_stages(words.split())[1]
