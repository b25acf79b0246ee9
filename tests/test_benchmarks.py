"""The benchmarks of speed: what they compare gives the same results, they say what they measure, and each of them runs.

Nothing here looks at how long something takes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image

import benching
import context
import evaluation
import loader
import network as network_benchmark
import pages
import plain
import precision
import sampling
import startup
import training
from benching import Bench, Turns, in_turns
from cases import EMOJI32, IMAGES64, TINY, Case, count_flops
from guided_diffusion.commands import flags as cli
from guided_diffusion.config import ClassifierConfig, DiffusionConfig
from guided_diffusion.data.crops import center_crop_arr
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.nn import update_ema
from guided_diffusion.resample import UniformSampler
from guided_diffusion.runtime.files import write_json
from guided_diffusion.runtime.options import defaults
from guided_diffusion.sampling.guidance import classifier_guidance
from guided_diffusion.sampling.samplers import SAMPLERS
from guided_diffusion.script_util import build_unet
from guided_diffusion.training import checkpoints
from guided_diffusion.unet import SuperResModel

CPU = th.device("cpu")
OTHER = Case(  # no sigma, other order of heads, strided convolutions, shifts alone
    "other",
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 8,4 --num_heads 2 "
    "--use_scale_shift_norm False --use_new_attention_order True",
    batch=2,
)


def inputs(case: Case) -> tuple[th.Tensor, ...]:
    """For networks with and without classes."""
    return case.inputs(CPU)[: 3 if case.unet.class_cond else 2]


@pytest.mark.parametrize("case", [TINY, OTHER], ids=lambda case: case.name)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_plain_network_and_its_gradients_are_ours(case: Case, recompute: bool) -> None:
    ours = case.make_unet()
    theirs = plain.Plain(ours, recompute_attention=recompute)
    out, expected = theirs(*inputs(case)), ours(*inputs(case))
    assert expected.abs().mean() > 0.01
    th.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for result in (out, expected):
        result.square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        th.testing.assert_close(other.grad, mine.grad, atol=1e-4, rtol=1e-3)


def test_plain_guidance_is_ours() -> None:
    x, timesteps, y = TINY.inputs(CPU)
    classifier = TINY.make_classifier().eval()
    expected = classifier_guidance(classifier, 2.0)(x, timesteps, y=y)
    assert expected is not None
    assert expected.abs().mean() > 1e-5
    found = plain.guidance(plain.Plain(classifier), 2.0)(x, timesteps, y=y)
    th.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


def test_plain_steps_are_those_of_our_trainer() -> None:
    """Two of them: weights, and their moving average."""
    x, _, y = TINY.inputs(CPU)
    process, ours = TINY.make_process(), TINY.make_unet()
    step = plain.PlainTraining(plain.Plain(ours), process, lr=1e-3, ema_rate=0.5)
    trainer = MixedPrecisionTrainer(model=ours)
    averages = [param.detach().clone() for param in ours.parameters()]
    optimizer = th.optim.AdamW(trainer.master_params, lr=1e-3, weight_decay=0.0)
    for seed in (0, 1):
        np.random.seed(seed)
        th.manual_seed(seed)
        step(x, {"y": y})
        np.random.seed(seed)
        th.manual_seed(seed)
        t, weights = UniformSampler(process).sample(len(x), CPU)
        trainer.zero_grad()
        trainer.backward((process.training_losses(ours, x, t, model_kwargs={"y": y})["loss"] * weights).mean())
        trainer.optimize(optimizer)
        update_ema(averages, ours.parameters(), rate=0.5)
    start = TINY.make_unet()
    for found, expected in ((step.masters, trainer.master_params), (step.averages, averages)):
        here, there, before = (
            th.cat([param.detach().flatten() for param in kind]) for kind in (found, expected, start.parameters())
        )
        # Adam turns a gradient that is only rounding into a step
        assert (here - there).norm() < 0.05 * (there - before).norm()
    assert {"loss", "mse", "vb", "grad_norm", "param_norm"} <= set(step.logged)


def test_in_fp16_the_plain_masters_are_two_vectors_that_follow_the_same_gradients() -> None:
    x, _, y = TINY.inputs(CPU)
    process, ours = TINY.make_process(), TINY.make_unet()
    full, half = (plain.PlainTraining(plain.Plain(ours, precision), process, lr=1e-3) for precision in ("fp32", "fp16"))
    for step in (full, half):
        np.random.seed(0)
        th.manual_seed(0)
        step(x, {"y": y})
    assert len(half.masters) == 2
    assert half.model.network.input_blocks[0][0].weight.dtype == th.float16
    assert half.logged["loss"] == pytest.approx(full.logged["loss"], rel=0.01)
    moved = [(param - start).float() for param, start in zip(half.parameters, ours.parameters(), strict=True)]
    assert max(float(change.detach().abs().max()) for change in moved) == pytest.approx(1e-3, rel=0.6)


@pytest.mark.parametrize("sides", [(500, 375), (130, 131), (64, 64), (40, 90)])
def test_plain_pictures_are_our_crops(sides: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*sides[::-1], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    assert np.array_equal(
        plain.picture(str(tmp_path / "picture.png"), 64), center_crop_arr(Image.fromarray(pixels), (64, 64))
    )


def test_only_what_has_a_plain_form_is_given_one() -> None:
    upsampler = SuperResModel(8, 3, 32, 3, 1, ())
    with pytest.raises(TypeError, match="SuperResModel has no plain form"):
        plain.Plain(upsampler)


def test_the_large_case_is_as_large_as_it_is_said_to_be() -> None:
    """312.9 GFLOP for a pass with a batch of 4."""
    with th.device("meta"):
        network = plain.Plain(build_unet(IMAGES64.unet, IMAGES64.learn_sigma))
    given = [tensor.to("meta") for tensor in IMAGES64.inputs(CPU)]
    assert count_flops(network, *given) == pytest.approx(312.9e9, rel=1e-3)


def test_the_small_case_is_the_demos() -> None:
    assert (EMOJI32.size, EMOJI32.batch, EMOJI32.unet.num_classes, EMOJI32.unet.channel_mult) == (32, 32, 9, "1,2,4")
    assert EMOJI32.make_process("10").num_timesteps == 10


def test_ways_take_turns() -> None:
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in "abc"}
    turns = in_turns(ways, rounds=2, warm_up=1, say=lambda _: None)
    assert "".join(order) == "abcabcabc"
    assert {name: len(values) for name, values in turns.rounds.items()} == {"a": 2, "b": 2, "c": 2}
    order.clear()
    turns = in_turns(ways, rounds=2, warm_up=1, lead=1, say=lambda _: None)
    assert "".join(order) == "abcaabbccaabbcc"
    assert [len(values) for values in turns.rounds.values()] == [2, 2, 2]


def test_drifts_cancel_in_ratios() -> None:
    turns = Turns({"slow": [2.0, 8.0, 30.0], "fast": [1.0, 4.0, 10.0]})
    assert turns.seconds("slow") == 8
    assert turns.ratio("slow", "fast") == 2


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the page, which benchmarks write to in place of it."""
    copy = tmp_path / "benchmarks.md"
    shutil.copy(pages.SPEED, copy)
    monkeypatch.setattr(pages, "SPEED", copy)
    return copy


def test_tables_go_to_the_file_and_to_the_page(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    bench = Bench.begin("about", "network", ["--threads=1", "--write", "--json", str(path)], parts=["a", "b"])
    assert (bench.wants("a"), bench.wants("c")) == (True, False)
    bench.add("How fast", ["way", "ms"], [["ours", 3]], seconds={"ours": [0.003]})
    bench.note("Said.")
    bench.finish()
    found = json.loads(path.read_text())
    assert found["tables"] == [
        {"title": "How fast", "columns": ["way", "ms"], "rows": [["ours", 3]], "seconds": {"ours": [0.003]}}
    ]
    assert (found["command"], found["machine"]["threads"]) == ("python benchmarks/network.py --threads=1", 1)
    table = "| way | ms |\n| --- | --: |\n| ours | 3 |"
    assert table in capsys.readouterr().out
    text, before = page.read_text(), (Path(pages.__file__).parent.parent / "docs" / "benchmarks.md").read_text()
    written = text.split("<!-- network -->\n")[1].split("\n<!-- end of network -->")[0]
    command, about, title, rows = written.split("\n\n")
    assert (command, title, rows) == ("    python benchmarks/network.py --threads=1", "How fast:", table)
    assert about.startswith(f"Said. {benching.cpu_model()}")
    assert text.split("<!-- end of network -->")[1] == before.split("<!-- end of network -->")[1]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--only forwards", "forwards is no part of this: name some of forward,backward"),
        ("--rounds 0", "--rounds 0 measures nothing"),
        ("--quick --write", "--write contradicts --quick"),
    ],
)
def test_what_makes_no_sense_is_refused(words: str, answer: str) -> None:
    with pytest.raises(SystemExit, match=answer):
        Bench.begin("about", "network", words.split(), parts=["forward", "backward"])


def test_the_script_for_a_gpu_names_parts_and_flags_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, script = Bench.begin, Path(pages.__file__).parents[1] / "scripts" / "gpu_checks.sh"

    def only_begin(*args: Any, **keywords: Any) -> None:
        begin(*args, **keywords)
        raise InterruptedError

    monkeypatch.setattr(Bench, "begin", only_begin)
    lines = re.findall(r"benchmarks/(\w+)\.py (.*)", script.read_text())
    assert {name for name, _ in lines} == {"network", "sampling", "training"}
    for name, words in lines:
        with pytest.raises(InterruptedError):
            importlib.import_module(name).main(words.split())
    assert sum(map(int, re.findall(r"^part (\d+)", script.read_text(), re.MULTILINE))) < 600


def test_the_page_has_a_place_for_every_benchmark() -> None:
    text = pages.SPEED.read_text()
    for key in ("network", "sampling", "training", "loader", "evaluation", "startup", "precision"):
        assert pages.replaced(text, key, "block") != text
        assert (Path(pages.__file__).parent / f"{key}.py").exists()


def measured(main: Callable[[list[str]], object], folder: Path, *words: str) -> list[dict[str, Any]]:
    """The tables of a benchmark."""
    path = folder / "found.json"
    main(["--quick", "--threads", "1", "--device", "cpu", "--json", str(path), *words])
    return list(json.loads(path.read_text())["tables"])


@pytest.mark.slow
def test_the_network_is_measured(tmp_path: Path) -> None:
    tables = measured(network_benchmark.main, tmp_path, "--no-diffusers")
    assert [table["title"].split(",")[0] for table in tables] == [
        "U-Net forward",
        "U-Net forward and backward",
        "U-Net training step",
        "Classifier",
    ]
    for table in tables:
        assert [row[0] for row in table["rows"]] == ["plain fp32", "ours fp32", "ours bf16"]
        assert table["rows"][0][2] == "1.00x"
    forward, both, step, _ = (table["flops"] for table in tables)
    assert both == step == pytest.approx(3 * forward, rel=0.1)


def test_passes_with_texts_are_measured(tmp_path: Path) -> None:
    (table,) = measured(context.main, tmp_path, "--only", "attention")
    assert (table["rows"][0][2], len(table["rows"])) == ("1.00x", 4)


@pytest.mark.slow
def test_the_memory_of_texts_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, in place of one for each way: the second finds the memory of the first."""
    monkeypatch.setattr(context, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    (table,) = measured(context.main, tmp_path, "--only", "memory")
    ours, theirs = table["rows"]
    assert ours[1] == theirs[1] != "0"


@pytest.mark.slow
def test_sampling_is_measured(tmp_path: Path) -> None:
    tables = measured(sampling.main, tmp_path, "--no-diffusers")
    assert len(tables) == 5
    assert [row[0] for row in tables[2]["rows"]][-1] == "ours bf16, unipc, 2 steps"
    assert [row[0] for row in tables[3]["rows"]] == [f"`{name}`" for name in sampling.MEASURED[:3]]
    assert {*sampling.MEASURED, "ddim_reverse"} == set(SAMPLERS)


@pytest.mark.slow
def test_training_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, in place of one for each way."""
    monkeypatch.setattr(training, "in_a_process", training.measure)
    monkeypatch.setattr(training, "WORKERS", 0)
    (table,) = measured(training.main, tmp_path)
    ways = ["plain fp32", "plain fp32 (attention recomputed)", "ours fp32", "ours bf16"]
    assert [row[0] for row in table["rows"]] == ways
    for (run,) in table["runs"].values():
        assert 0 <= run["waited"] < run["seconds"]


@pytest.mark.slow
def test_the_loader_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No epoch of the originals' way ends meanwhile, as it would start its worker anew."""
    epochs: list[int] = []

    def batches(images: plain.PlainImages, size: int) -> Any:
        epochs.append(len(images) // size)
        return plain.plain_batches(images, size)

    monkeypatch.setattr(loader, "plain_batches", batches)
    photographs, emoji = measured(loader.main, tmp_path)
    assert min(epochs) > loader.QUICK.batches + 2
    assert (len(photographs["rows"]), len(emoji["rows"])) == (7, 4)
    for table in (photographs, emoji):
        assert table["rows"][0][0] == "originals' way"
        assert all(float(row[1].replace(",", "")) > 0 for row in table["rows"])
    (note,) = json.loads((tmp_path / "found.json").read_text())["notes"]
    assert 0.5 < float(note.split(" by ")[1].split()[0]) < 10  # of other pixels, but not of other pictures


@pytest.mark.slow
def test_shards_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", "")  # which it sets
    for table in measured(loader.main, tmp_path, "--only", "shards"):
        assert [row[0] for row in table["rows"]] == ["folder", "zip", "tars", "tars, server", "tars, server, copied"]
        assert all(float(row[1].replace(",", "")) > 0 for row in table["rows"])


def test_start_up_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for outcome in ("true", "false"):  # in place of Python
        monkeypatch.setattr(startup.sys, "executable", shutil.which(outcome))
        if outcome == "false":
            with pytest.raises(subprocess.CalledProcessError):
                measured(startup.main, tmp_path)
        else:
            (table,) = measured(startup.main, tmp_path)
            assert [row[0].split()[-1] for row in table["rows"]] == ["pass`", "torch'`", "--help`"]


def write_run(folder: Path, command: str, network: th.nn.Module, *configs: Any) -> str:
    """A folder as training leaves it."""
    flags = defaults(*cli.COMMANDS[command].sections)
    for config in configs:
        flags |= {name: value for name, value in asdict(config).items() if name in flags}
    checkpoints.save(str(folder / "ema_0.5_000100.pt"), network.state_dict())
    write_json(str(folder / "config.json"), {"command": command, "version": "0", "flags": flags})
    return str(folder)


@pytest.mark.slow
def test_precisions_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = DiffusionConfig(learn_sigma=True)
    model = write_run(tmp_path / "model", "image_train", TINY.make_unet(), TINY.unet, process)
    words = ["--data_dir", "-", "--image_size", "8", *TINY.classifier.split()]
    config = cli.parse("classifier_train", words).part(ClassifierConfig)
    judge = write_run(tmp_path / "judge", "classifier_train", TINY.make_classifier(), config, process)
    real = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "real.npz", real)
    asked = ["--model_path", model, "--classifier_path", judge, "--data_dir", str(tmp_path / "real.npz")]
    (table,) = measured(precision.main, tmp_path, *asked, "--seeds", "3,4", "--ddpm", "2")
    full, half, ddpm = table["runs"].values()
    assert list(table["runs"]) == ["fp32, unipc, 2 steps", "bf16, unipc, 2 steps", "fp32, ddpm, 2 steps"]
    assert [run["away"] for run in full] == [0, 0]
    for one, other, third in zip(full, half, ddpm, strict=True):
        assert one["FD"] > 0
        assert 0 < other["away"] < 3 < third["away"]
    assert full[0]["FD"] != full[1]["FD"]
    assert "bf16 moves the mean FD by" in capsys.readouterr().out


def test_paths_in_the_repository_are_short_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named as from its root, and others as they are."""
    (tmp_path / "tree" / "runs").mkdir(parents=True)
    monkeypatch.setattr(precision, "ROOT", tmp_path / "tree")
    inside, outside, data = str(tmp_path / "tree" / "runs"), str(tmp_path), "gs://a/b"
    given = argparse.Namespace(model_path=inside, classifier_path=outside, data_dir=data)
    command = f"python --model_path={inside} --model_path {inside} --classifier_path {outside} --data_dir {data}"
    expected = f"python --model_path=runs --model_path runs --classifier_path {outside} --data_dir {data}"
    assert precision.near(command, given) == expected


def test_a_part_of_the_evaluators_section_is_not_written(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page.read_text()
    with pytest.raises(SystemExit):
        evaluation.main(["--only", "frechet", "--write"])
    assert "--write contradicts --only" in capsys.readouterr().err
    assert page.read_text() == before


def test_a_verdict_sets_the_change_beside_chance() -> None:
    found = {"fp32": [{"FD": 1.0}, {"FD": 1.2}, {"FD": 1.4}], "bf16": [{"FD": 1.1}, {"FD": 1.3}, {"FD": 1.5}]}
    expected = "bf16 moves the mean FD by +0.100; the seeds of fp32 differ from each other by 0.200."
    assert precision.verdict(found) == expected


def test_the_evaluators_rows_become_a_table_and_sentences() -> None:
    compared = {"what": "distance", "seconds": 2.0, "plain_seconds": 5.0, "bytes": 1e8, "plain_bytes": 4e8}
    network = {"what": "Inception", "fp32_per_second": 9.0, "bf16_per_second": 23.0}
    block = evaluation.block([compared | {"difference": 1e-15}, network | {"change": 0.004, "change_of_spread": 0.04}])
    assert "| distance | 2.00 | 5.00 | 2.50x | 100 | 400 | 4.00x | 1e-15 |" in block
    assert block.endswith("which moves features by 0.40%, and by 4.00% of their spread.")
