"""The training commands: their files, what they refuse, and that ranks change nothing."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import commands, logger
from guided_diffusion.commands import classifier_train, flags as cli, image_train, super_res_train
from guided_diffusion.commands.common import restore
from guided_diffusion.commands.previews import compare_colours
from guided_diffusion.commands.training import open_streams
from guided_diffusion.runtime.files import write_json
from guided_diffusion.training import checkpoints

ROOT = Path(__file__).parents[2]
EMOJI = str(ROOT / "datasets" / "emoji64.zip")
TINY = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "",
    "diffusion_steps": 40,
    "num_workers": 0,
    "log_interval": 1,
    "ema_rate": 0.5,
}


def command_line(**flags):
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture
def pictures(tmp_path):
    """Eight pictures of two classes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[index % 2]}_{index}.png")
    return str(folder)


def column(folder, name):
    with open(os.path.join(folder, "progress.csv")) as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def refused(capsys, main, *argv, **flags):
    """What a command prints before it ends with code 2 and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*argv, *command_line(**flags)])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
    return errors


def test_colours_of_previews_are_compared_with_the_data(tmp_path, capsys):
    logger.configure(dir=str(tmp_path))
    samples = np.zeros((2, 4, 4, 2), np.uint8)
    samples[..., 1] = 255
    images = th.cat([th.full((3, 1, 4, 4), 0.25), th.tensor([-0.5, 0.5, 0.0]).view(3, 1, 1, 1).expand(3, 1, 4, 4)], 1)
    compare_colours(7, samples, images)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith("channels: samples -1.00/0.00 +1.00/0.00, data +0.25/0.00 +0.00/0.41")


def test_a_run_leaves_everything_that_sampling_needs(tmp_path, pictures, monkeypatch, capsys):
    """With mpi4py out of reach."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    flags = {**TINY, "class_cond": True, "num_classes": 5, "batch_size": 4, "val_data_dir": pictures, "val_interval": 2}
    out = tmp_path / "run"
    more = {"max_steps": 2, "sample_interval": 2, "precision": "bf16", "log_dir": out, "data_dir": pictures}
    image_train.main(command_line(**flags, **more))
    names = ["model000002.pt", "ema_0.5_000002.pt", "opt000002.pt", "state000002.pt", "set000002.json"]
    names += ["config.json", "classes.json"]
    assert set(names) | {"log.txt", "progress.csv", "report.html", "previews"} == set(os.listdir(out))
    config = json.loads((out / "config.json").read_text())
    assert (config["command"], config["flags"]["class_cond"], config["flags"]["lr"]) == ("image_train", True, 1e-4)
    assert json.loads((out / "classes.json").read_text())["classes"] == ["a", "b"]
    with Image.open(out / "previews" / "000002.png") as grid:
        assert grid.width >= 4 * 8
    page = (out / "report.html").read_text()
    shown = ("complete, ", "of 2 steps", "val_loss", "<dt>val_interval<dd>2</div>", 'alt="previews/000002.png"')
    assert [word for word in shown if word not in page] == []
    assert page.count("data:image/png;base64,") == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("the data have 2 classes and the network has 5: give --num_classes 2") for line in lines)
    assert any(line.startswith("preview at step 2, mean/deviation of the channels: samples ") for line in lines)
    assert str(out) in lines[0]
    assert str(out) in lines[-1]
    assert column(out, "val_loss")[-1] > 0

    # going on takes all flags from there but those that are given
    image_train.main(command_line(resume_checkpoint=out, log_dir=tmp_path / "more", max_steps=3, lr=5e-4))
    assert "model000003.pt" in os.listdir(tmp_path / "more")
    assert column(tmp_path / "more", "lr") == [5e-4]
    resumed = checkpoints.config_beside(str(tmp_path / "more"))
    assert (resumed["num_classes"], resumed["precision"], resumed["lr"]) == (5, "bf16", 5e-4)


def test_auto_begins_a_run_and_later_goes_on_with_it(tmp_path, pictures):
    flags = {**TINY, "resume_checkpoint": "auto", "log_dir": tmp_path / "run", "data_dir": pictures, "batch_size": 4}
    for steps in (1, 2):
        image_train.main(command_line(**flags, max_steps=steps))
    assert column(tmp_path / "run", "step") == [1, 2]
    page = (tmp_path / "run" / "report.html").read_text()
    assert [word for word in ("step 1\nloss:", "step 2\nloss:", "of 2 steps") if word not in page] == []


def test_auto_takes_the_newest_complete_checkpoint_and_overwrites_what_is_none(tmp_path, pictures):
    """As processes leave it that were killed while saving, and as a disk leaves it that lost bytes."""
    out = tmp_path / "run"
    flags = {**TINY, "resume_checkpoint": "auto", "log_dir": out, "data_dir": pictures, "batch_size": 4}
    flags |= {"save_interval": 1, "max_steps": 3}
    image_train.main(command_line(**flags))
    whole = {name: (out / name).read_bytes() for name in os.listdir(out) if name.endswith((".pt", ".json"))}

    def rerun(said):
        before = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
        image_train.main(command_line(**flags))
        assert said in (out / "log.txt").read_text().removeprefix(before)
        assert column(out, "step") == [1, 2, 3]
        assert {name: (out / name).read_bytes() for name in whole if name != "config.json"} == {
            name: content for name, content in whole.items() if name != "config.json"
        }

    rerun("nothing to do")
    os.remove(out / "set000003.json")
    os.remove(out / "model000003.pt")
    rerun("the checkpoint of step 3 is passed over: it was not finished")
    (out / "opt000003.pt").write_bytes(bytes(len(whole["opt000003.pt"])))
    rerun("the checkpoint of step 3 is passed over: opt000003.pt was altered")
    for name in [name for name in whole if name.startswith(("set", "model", "opt"))]:
        os.remove(out / name)
    with open(out / "progress.csv", "a") as file:
        file.write("0.5,4")  # a row that was not finished
    rerun("the checkpoint of step 1 is passed over: it has no model file")


def test_a_folder_whose_newest_checkpoint_is_damaged_goes_on_by_its_name_too(tmp_path, pictures, capsys):
    out = tmp_path / "run"
    flags = {**TINY, "log_dir": out, "data_dir": pictures, "batch_size": 4, "async_save": False}
    image_train.main(command_line(**flags, max_steps=2, save_interval=1))
    path = out / "model000002.pt"
    path.write_bytes(path.read_bytes()[:-1])
    message = refused(capsys, image_train.main, **flags, max_steps=3, resume_checkpoint=path)
    assert "belongs to a damaged checkpoint, model000002.pt has" in message
    assert "up to step 2: give --resume_checkpoint" in refused(capsys, image_train.main, **flags, max_steps=3)
    image_train.main(command_line(log_dir=out, max_steps=3, resume_checkpoint=out))
    assert column(out, "step") == [1, 2, 3]
    os.remove(out / "set000001.json"), os.remove(out / "model000003.pt"), path.write_bytes(b"")
    os.remove(out / "model000001.pt")
    message = refused(capsys, image_train.main, log_dir=out, max_steps=3, resume_checkpoint=out)
    assert "holds no complete checkpoint, the checkpoint of step 3 is passed over: model000003.pt is missing" in message


def test_an_image_that_cannot_be_read_costs_no_step(tmp_path, pictures, capsys):
    """Of the second batch; once it is repaired, the run goes on to the bytes of one that never met it."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = {**TINY, "data_dir": pictures, "batch_size": 4, "max_steps": 3, "resume_checkpoint": "auto"}
    image_train.main(command_line(**flags, log_dir=whole))
    name = sorted(os.listdir(pictures))[np.random.default_rng([0, 0]).permutation(8)[5]]
    content = (Path(pictures) / name).read_bytes()
    (Path(pictures) / name).write_bytes(content[:-30])
    with pytest.raises(SystemExit) as caught:
        image_train.main(command_line(**flags, log_dir=out))
    assert caught.value.code == 2
    assert f"error: cannot read image '{pictures}/{name}'" in capsys.readouterr().err
    assert checkpoints.sets_in(str(out)).keys() == {1}
    assert f"ended by an error: cannot read image &#x27;{pictures}/{name}" in (out / "report.html").read_text()
    (Path(pictures) / name).write_bytes(content)
    image_train.main(command_line(**flags, log_dir=out))
    for file in (name for name in os.listdir(whole) if name.endswith("000003.pt")):
        assert (whole / file).read_bytes() == (out / file).read_bytes()
    assert column(whole, "loss") == column(out, "loss")


@pytest.mark.parametrize("command", ["image_train", "classifier_train", "super_res_train"])
def test_fewer_validation_images_than_a_batch_are_measured(tmp_path, pictures, command):
    few = tmp_path / "few"
    few.mkdir()
    for name in sorted(os.listdir(pictures))[:3]:
        (few / name).write_bytes((Path(pictures) / name).read_bytes())
    flags = {**TINY, "num_classes": 2, "val_interval": 1}
    if command == "super_res_train":
        flags |= {"large_size": flags.pop("image_size"), "small_size": 4}
    if command == "classifier_train":
        names = ("image_size", "diffusion_steps", "num_workers", "log_interval", "num_classes")
        flags = {name: flags[name] for name in names} | {"eval_interval": 1, "classifier_width": 64}
        flags |= {"classifier_depth": 1, "classifier_channel_mult": "1", "classifier_attention_resolutions": "8"}
    places = {"data_dir": pictures, "val_data_dir": few, "log_dir": tmp_path / "run"}
    main = importlib.import_module(f"guided_diffusion.commands.{command}").main
    main(command_line(**flags, **places, batch_size=4, max_steps=2))
    losses = column(tmp_path / "run", "val_loss")
    assert len(losses) == 2
    assert min(losses) > 0


@pytest.mark.parametrize(("low", "high", "narrow"), [(-1, 1, False), (0, 1, True), (-1, -0.875, True)])
def test_the_range_of_the_images_is_said_and_a_narrow_one_is_doubted(tmp_path, low, high, narrow):
    """Floats of [0, 1], or 12 bits in 16: files that hold less than a format says that they may."""
    for index in range(4):
        values = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
        np.save(tmp_path / f"{index}.npy", values)
    out = tmp_path / "run"
    image_train.main(command_line(**TINY, image_channels=1, data_dir=tmp_path, log_dir=out, batch_size=2, max_steps=2))
    said = (out / "log.txt").read_text()
    assert said.count(f"images of the first batch, {low:.3g} to {high:.3g} of -1 to 1") == 1
    assert ("--data_range" in said) == narrow


def test_a_classifier_is_trained_and_measured(tmp_path, pictures):
    flags = {
        "classifier_width": 64,
        "classifier_depth": 1,
        "classifier_channel_mult": "1",
        "classifier_attention_resolutions": "8",
        **{name: TINY[name] for name in ("image_size", "diffusion_steps", "num_workers", "log_interval")},
    }
    out = tmp_path / "run"
    places = {"data_dir": pictures, "val_data_dir": pictures, "log_dir": out}
    classifier_train.main(
        command_line(**flags, **places, batch_size=8, max_steps=2, eval_interval=1, num_classes=2, anneal_lr=True)
    )
    assert checkpoints.sets_in(str(out)).keys() == {2}
    assert checkpoints.config_beside(str(out))["iterations"] == 2
    assert column(out, "lr") == pytest.approx([3e-4, 1.5e-4])
    assert all(0 <= value <= 1 for value in column(out, "val_acc@1") + column(out, "train_acc@1"))
    assert len(column(out, "val_acc@2")) == 2
    rows = list(csv.reader((out / "confusion.csv").read_text().splitlines()))
    assert rows[0] == ["class", "a", "b"]
    assert [(row[0], sum(map(int, row[1:]))) for row in rows[1:]] == [("a", 4), ("b", 4)]
    right = (int(rows[1][1]) + int(rows[2][2])) / 8
    best = json.loads((out / "best.json").read_text())
    assert (best["step"], best["acc@1"]) == (2, right)
    assert len(best["quarters"]) == 4
    assert f"all 8 validation images after 2 steps: acc@1 {right:.4f}" in (out / "log.txt").read_text()


@pytest.mark.parametrize(("cpus", "asked", "workers"), [(1, -1, 1), (3, -1, 3), (20, -1, 8), (3, 0, 0)])
def test_images_are_decoded_by_as_many_processes_as_there_are_processors(
    tmp_path, pictures, monkeypatch, cpus, asked, workers
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    logger.configure(dir=str(tmp_path), format_strs=[])
    flags = cli.parse("image_train", command_line(data_dir=pictures, image_size=8, num_workers=asked))
    stream, _ = open_streams(flags, image_size=8, class_cond=False)
    assert stream.num_workers == workers


def test_an_upsampler_is_trained(tmp_path, pictures):
    flags = {name: value for name, value in TINY.items() if name != "image_size"}
    sizes = {"large_size": 8, "small_size": 4, "class_cond": True, "class_dropout": 0.5}
    out = tmp_path / "run"
    places = {"data_dir": pictures, "log_dir": out}
    super_res_train.main(command_line(**flags, **sizes, **places, batch_size=4, max_steps=1, sample_interval=1))
    assert checkpoints.sets_in(str(out)).keys() == {1}
    assert (out / "previews" / "000001.png").exists()
    assert restore(cli.parse("super_res_sample", command_line(model_path=out))).network.null_label == 1000


def test_dropping_classes_leaves_a_network_that_sampling_knows_by_its_null_class(tmp_path, pictures, capsys):
    """Resumed with the same rate, resumed with none, and read from its bare weights."""
    labels, out = {"class_cond": True, "num_classes": 2}, tmp_path / "run"
    image_train.main(
        command_line(**TINY, **labels, data_dir=pictures, log_dir=out, batch_size=4, max_steps=1, class_dropout=0.1)
    )
    for steps, more in ((2, {}), (3, {"class_dropout": 0})):
        saved = checkpoints.config_beside(str(out))
        assert (saved["null_class"], saved["class_dropout"], saved["num_classes"]) == (True, 0.1, 2)
        image_train.main(command_line(resume_checkpoint=out, log_dir=out, max_steps=steps, **more))
    saved = checkpoints.config_beside(str(out))
    assert (saved["null_class"], saved["class_dropout"]) == (True, 0)
    network = restore(cli.parse("image_sample", command_line(model_path=out))).network
    assert (network.num_classes, network.null_label, len(network.label_emb.weight)) == (2, 2, 3)

    bare = tmp_path / "bare.pt"
    bare.write_bytes((out / "model000003.pt").read_bytes())
    flags = {"model_path": bare, "image_size": 8}
    network = restore(cli.parse("image_sample", command_line(**flags, num_classes=2, null_class=True))).network
    assert (network.num_classes, network.null_label) == (2, 2)
    network = restore(cli.parse("image_sample", command_line(**flags))).network
    assert (network.num_classes, network.null_label) == (3, None)
    for more, gave in (({"num_classes": 2}, 2), ({"null_class": True}, 4)):
        message = rf"has num_classes 3, you gave {gave} \(counting the row that --class_dropout adds\)"
        with pytest.raises(ValueError, match=message):
            restore(cli.parse("image_sample", command_line(**flags, **more)))


def test_a_run_without_a_null_class_does_not_begin_to_drop_classes(tmp_path, pictures, capsys):
    flags = {**TINY, "class_cond": True, "num_classes": 2, "data_dir": pictures, "batch_size": 4}
    out = tmp_path / "run"
    image_train.main(command_line(**flags, log_dir=out, max_steps=1))
    assert checkpoints.config_beside(str(out))["null_class"] is False
    for more in ({}, {"null_class": True}):
        resumed = {"resume_checkpoint": out, "log_dir": out, "max_steps": 2, "class_dropout": 0.1, **more}
        message = refused(capsys, image_train.main, **resumed)
        assert f"--class_dropout 0.1 needs a null class, and the network of {out} has none" in message


def test_respacing_in_training_is_pointed_out(tmp_path, pictures):
    flags = {**TINY, "timestep_respacing": 20, "max_steps": 1, "data_dir": pictures, "log_dir": tmp_path / "run"}
    image_train.main(command_line(**flags))
    assert "timestep_respacing 20 in training" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_is_not_overwritten(tmp_path, pictures, capsys):
    out = tmp_path / "run"
    flags = {**TINY, "data_dir": pictures, "log_dir": out}
    image_train.main(command_line(**flags, max_steps=2, save_interval=1))
    there = {name: (out / name).read_bytes() for name in os.listdir(out)}
    message = refused(capsys, image_train.main, **flags, max_steps=2)
    assert f"holds the checkpoints of a run, up to step 2: give --resume_checkpoint {out}" in message
    message = refused(capsys, image_train.main, **flags, resume_checkpoint=out / "model000001.pt")
    assert "holds the checkpoints of a run, up to step 2" in message
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == there


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"data_dir": ""}, "--data_dir is missing"),
        ({"data_dir": "nowhere"}, "'nowhere'"),
        ({"image_size": 30, "channel_mult": "1,2,2"}, "use 28 or 32"),
        ({"attention_resolutions": "3"}, "attention_resolutions 3 of '3' do not occur at size 8"),
        ({"class_cond": True, "num_classes": 1}, "classes"),
        ({"batch_size": 9}, "8 images are fewer than one global batch of 9"),
        ({"precision": "bf16", "use_fp16": True}, "precision bf16 contradicts use_fp16 True"),
        ({"resume_checkpoint": "model000007.pt"}, "the checkpoint 'model000007.pt' does not exist: give"),
        ({"resume_checkpoint": "CLASSIFIER"}, "classifier is a classifier: give the checkpoint of a diffusion model"),
        ({"init_from": "nowhere"}, "--init_from 'nowhere' does not exist: give"),
        ({"val_data_dir": "nowhere"}, "--val_data_dir: data_dir 'nowhere'"),
        ({"schedule_sampler": "unifrom"}, "did you mean uniform?"),
        ({"image_channels": 2, "sample_interval": 1}, "--sample_interval draws images of 1, 3 or 4 channels"),
        ({"dropout": 2}, "--dropout: 2 is above the greatest value, 1"),
        ({"ema_rate": "often"}, "ema_rate 'often' is not a list of rates"),
        ({"dims": 3}, "--dims 3 does not fit pictures"),
        ({"null_class": True}, "null_class needs a network with classes: give num_classes (by flags: class_cond True)"),
        ({"lr": "fast"}, "'fast' is not of type float"),
        ({"nmu_channels": 32}, "did you mean --num_channels?"),
    ],
)
def test_mistakes_are_answered_with_one_sentence(tmp_path, pictures, capsys, flags, sentence):
    usual = {**TINY, "data_dir": pictures, "max_steps": 1, "log_dir": tmp_path / "run", "batch_size": 2}
    other = tmp_path / "classifier"
    checkpoints.save(str(other / "model000001.pt"), {})
    write_json(str(other / "config.json"), {"flags": {"image_size": 8, "classifier_width": 32}})
    flags = {name: other if value == "CLASSIFIER" else value for name, value in flags.items()}
    assert sentence in refused(capsys, image_train.main, **{**usual, **flags})


def test_a_resumed_run_leaves_the_checkpoints_of_others_alone(tmp_path, pictures, capsys):
    usual = {**TINY, "data_dir": pictures, "batch_size": 2}
    for name, steps in (("one", 2), ("other", 1)):
        image_train.main(command_line(**usual, max_steps=steps, log_dir=tmp_path / name))
    config = (tmp_path / "other" / "config.json").read_bytes()
    flags = {**usual, "max_steps": 3, "resume_checkpoint": tmp_path / "one", "log_dir": tmp_path / "other"}
    assert "holds the checkpoints of a run, up to step 1" in refused(capsys, image_train.main, **flags)
    assert (tmp_path / "other" / "config.json").read_bytes() == config


def test_a_seed_may_be_larger_than_a_word(tmp_path, pictures):
    flags = {**TINY, "data_dir": pictures, "batch_size": 2, "max_steps": 1, "log_dir": tmp_path / "run"}
    image_train.main(command_line(**flags, seed=2**70))
    assert (tmp_path / "run" / "model000001.pt").exists()


def test_the_flags_that_differ_from_the_checkpoint_are_named(tmp_path, pictures, capsys):
    flags = {**TINY, "data_dir": pictures, "max_steps": 1}
    image_train.main(command_line(**flags, log_dir=tmp_path / "run"))
    wide = {**flags, "num_channels": 64, "resume_checkpoint": tmp_path / "run", "log_dir": tmp_path / "new"}
    assert "the checkpoint has num_channels 32, you gave 64" in refused(capsys, image_train.main, **wide)


def test_the_console_command_lists_its_commands_and_corrects_typos(capsys):
    commands.main([])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in ("image_train", "classifier_sample", "super_res_train"))
    with pytest.raises(SystemExit) as caught:
        commands.main(["imge_train", "--lr", "1"])
    assert caught.value.code == 2
    assert "unknown command imge_train; did you mean image_train?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        commands.main(["image_train", "--help"])
    assert caught.value.code == 0
    assert "--max_steps" in capsys.readouterr().out
    for name in commands.COMMANDS:
        assert callable(importlib.import_module(f"guided_diffusion.commands.{name}").main)


def test_help_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from guided_diffusion.commands import main\n"
        "for name in ('image_train', 'classifier_train', 'super_res_train'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 3


CHECKED_RUN = '''
"""The command, in a loop that compares all ranks at its end, bit by bit."""
import sys
import torch as th
from guided_diffusion import dist_util, train_util
from guided_diffusion.commands import image_train


class Checked(train_util.TrainLoop):
    def run_loop(self):
        super().run_loop()
        moments = [value for entry in self.opt.state.values() for value in entry.values() if value.ndim]
        averages = [value for params in self.ema_params for value in params]
        for values in (list(self.model.parameters()), averages, moments):
            assert len(values) > 10
            first, *others = dist_util.gather(th.cat([value.detach().flatten() for value in values])[None])
            assert len(others) == 1 and all(th.equal(first, other) for other in others)
        print(f"rank {dist_util.rank()} agrees", flush=True)


train_util.TrainLoop = Checked
image_train.main(sys.argv[1:])
'''


def launch(tmp_path, ranks, **flags):
    program = tmp_path / "checked_run.py"
    program.write_text(CHECKED_RUN)
    done = ranks.run([program, *command_line(**flags)], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert f"rank {rank} agrees" in done.stdout


def test_two_ranks_train_what_one_process_trains(tmp_path, ranks):
    """Two begin, and two others go on; one process makes all the steps at once, with the same global batch."""
    flags = {**TINY, "data_dir": EMOJI, "lr": 1e-3, "schedule_sampler": "loss-second-moment", "random_crop": True}
    flags |= {"class_cond": True, "num_classes": 9, "class_dropout": 0.5}
    image_train.main(command_line(**flags, batch_size=6, max_steps=4, log_dir=tmp_path / "one"))
    launch(tmp_path, ranks, **flags, batch_size=3, microbatch=2, max_steps=2, log_dir=tmp_path / "two")
    launch(tmp_path, ranks, resume_checkpoint=tmp_path / "two", log_dir=tmp_path / "two", max_steps=4)

    for name in ("loss", "grad_norm", "samples"):
        assert column(tmp_path / "two", name) == pytest.approx(column(tmp_path / "one", name), rel=1e-4)
    for name in ("model", "ema_0.5_"):
        one, two = (checkpoints.load(str(tmp_path / run / f"{name}000004.pt")) for run in ("one", "two"))
        difference = th.cat([(one[key] - two[key]).abs().flatten() for key in one])
        assert difference.mean() < 1e-6  # of steps of 1e-3: Adam amplifies the rounding of its first, tiny gradients
        assert difference.max() < 5e-4
    assert "NOT restored" not in (tmp_path / "two" / "log.txt").read_text()
    assert (tmp_path / "two" / "log-rank001.txt").exists()
