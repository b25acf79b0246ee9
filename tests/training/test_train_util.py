"""The training loop in one process: it learns, it is resumed to the bit, and nothing around it disturbs it."""

import csv
import itertools
import json
import os
import random
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from few import few
from PIL import Image
from torch.overrides import TorchFunctionMode

from guided_diffusion import dist_util, fp16_util, logger, train_util
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, UNetConfig
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import LossSecondMomentResampler, ScheduleSampler
from guided_diffusion.script_util import build_classifier, build_diffusion, build_unet
from guided_diffusion.train_util import ClassifierTrainLoop, Hook, TrainLoop, log_loss_dict
from guided_diffusion.training import batches, checkpoints, gradients, saving
from guided_diffusion.training.batches import Validation

DIFFUSION = build_diffusion(DiffusionConfig(diffusion_steps=40))
UNET = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}


@pytest.fixture
def pictures(tmp_path):
    """Twelve noisy pictures of three colours, their class in front of the name."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, (name, colour) in enumerate(
        [("red", (220, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 220))] * 4
    ):
        pixels = np.clip(np.array(colour) + rng.integers(-30, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}_{index:02d}.png")
    return str(folder)


def stream(pictures, batch_size=4, **options):
    return load_data(data_dir=pictures, batch_size=batch_size, image_size=8, log=lambda line: None, **options)


def make(folder, data, *, kind=TrainLoop, network=None, **options):
    """A loop over a network that is the same every time, with its logs in `folder`."""
    logger.configure(dir=str(folder), format_strs=["csv", "log"])
    th.manual_seed(5)
    model = build_unet(UNetConfig(**UNET, dropout=options.pop("dropout", 0.0)), False) if network is None else network
    usual = {
        "batch_size": 4,
        "microbatch": -1,
        "lr": 1e-3,
        "ema_rate": "0.5",
        "log_interval": 1,
        "save_interval": 1000,
        "resume_checkpoint": "",
        "max_steps": 3,
    }
    return kind(model=model, data=data, **{"diffusion": DIFFUSION, **usual, **options})


def labelled(null_class=True, **options):
    """A network of three classes, the same every time."""
    th.manual_seed(5)
    config = UNetConfig(**UNET, class_cond=True, num_classes=3, null_class=null_class, **options)
    return build_unet(config, False)


def labels_seen(network):
    """A list that fills with (in training?, labels) of every pass of a network, its copies included."""
    seen = []

    def look(module, _, keywords):
        seen.append((module.training, keywords["y"].tolist()))

    network.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def rows(folder):
    with open(os.path.join(folder, "progress.csv")) as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [float(row[name]) for row in rows(folder)]


def text(folder):
    with open(os.path.join(folder, "log.txt")) as file:
        return file.read()


def files(folder, suffix=".pt"):
    return sorted(name for name in os.listdir(folder) if name.endswith(suffix))


def assert_same_files(one, other, step, least=4):
    """Every file of a step's set holds the same bits in both folders."""
    names = [name for name in files(one) if f"{step:06d}" in name]
    assert len(names) >= least
    for name in names:
        a, b = checkpoints.load(os.path.join(one, name)), checkpoints.load(os.path.join(other, name))
        a.pop("rng", None), b.pop("rng", None)
        th.testing.assert_close(a, b, atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_a_tiny_network_overfits_four_images(tmp_path, pictures):
    images = next(stream(pictures, deterministic=True, random_flip=False))[0]
    loop = make(
        tmp_path,
        itertools.repeat((images, {})),
        lr=5e-3,
        max_steps=80,
        log_interval=1000,
        ema_rate="0.9",
        val_data=itertools.repeat((images, {})),
        val_interval=80,
    )
    loop.validate()
    first = logger.getkvs()["val_loss"]
    logger.dumpkvs()
    loop.run_loop()
    assert first > 0.9
    assert float(rows(tmp_path)[-1]["val_loss"]) < 0.15


@pytest.mark.slow
def test_a_classifier_of_three_classes_learns_them(tmp_path, pictures):
    config = ClassifierConfig(
        image_size=8,
        num_classes=3,
        classifier_width=64,
        classifier_depth=1,
        classifier_channel_mult="1",
        classifier_attention_resolutions="",
        classifier_pool="spatial",
    )
    loop = make(
        tmp_path,
        stream(pictures, 6, class_cond=True),
        kind=ClassifierTrainLoop,
        network=build_classifier(config),
        noised=False,
        batch_size=6,
        ema_rate="",
        max_steps=25,
        log_interval=5,
        val_data=stream(pictures, 6, class_cond=True, random_flip=False),
        val_interval=5,
    )
    loop.run_loop()
    assert column(tmp_path, "val_acc@1")[-1] == 1
    assert column(tmp_path, "train_loss")[-1] < 0.1
    assert column(tmp_path, "train_acc@3") == [1] * 5  # of three classes, one is always right
    assert {name for name in rows(tmp_path)[0] if "_q" in name} == {
        f"{part}_{name}_q0" for part in ("train", "val") for name in ("loss", "acc@1", "acc@3")
    }  # clean images are at t = 0
    assert files(tmp_path) == ["model000025.pt", "opt000025.pt", "state000025.pt"]

    straight, parts = tmp_path / "straight", tmp_path / "parts"
    for folder, steps in ((straight, 4), (parts, 2), (parts, 4)):
        data, val_data = (stream(pictures, 6, class_cond=True, random_flip=flip) for flip in (True, False))
        th.manual_seed(6)
        options = {"network": build_classifier(config), "val_data": val_data, "val_interval": 1, "max_steps": steps}
        options["resume_checkpoint"] = str(parts) if (folder, steps) == (parts, 4) else ""
        make(folder, data, kind=ClassifierTrainLoop, batch_size=6, ema_rate="", **options).run_loop()
    assert_same_files(straight, parts, 4, least=3)
    for name in ("train_loss", "val_loss", "val_acc@1"):
        assert column(straight, name) == column(parts, name)

    assert json.loads((tmp_path / "best.json").read_text()) | {"loss": 0} == {
        "step": 25,
        "acc@1": 1.0,
        "loss": 0,
        "quarters": [1.0],
    }
    assert (tmp_path / "confusion.csv").read_text() == "class,blue,green,red\nblue,4,0,0\ngreen,0,4,0\nred,0,0,4\n"
    assert (straight / "confusion.csv").read_bytes() == (parts / "confusion.csv").read_bytes()

    noisy = make(tmp_path / "noisy", loop.data, kind=ClassifierTrainLoop, network=loop.model, ema_rate="", batch_size=6)
    noisy.run_loop()
    assert {f"train_acc@1_q{quarter}" for quarter in range(4)} <= set(rows(tmp_path / "noisy")[0])


@pytest.mark.slow
def test_one_network_learns_the_classes_and_what_all_have_in_common(tmp_path):
    """Bright and dark images: at the noisiest step a label tells which, and the null label gives the mean of both."""
    images = th.tensor([0.8, -0.8]).repeat(8)[:, None, None, None].expand(16, 3, 8, 8)
    network, process = labelled(), build_diffusion(DiffusionConfig(diffusion_steps=40, predict_xstart=True))
    data = itertools.repeat((images, {"y": th.tensor([0, 1]).repeat(8)}))
    options = {"network": network, "diffusion": process, "class_dropout": 0.3, "lr": 3e-3, "log_interval": 1000}
    make(tmp_path, data, batch_size=16, max_steps=60, **options).run_loop()
    with th.no_grad():
        noise = th.randn(8, 3, 8, 8)
        means = [network(noise, th.full((8,), 39), y=th.full((8,), label)).mean() for label in (0, 1, 3)]
    assert means[0] > 0.6
    assert means[1] < -0.6
    assert abs(means[2]) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, pictures, precision):
    """Weights, moving averages, optimizer, loss scale, loss history, data position; with dropout and warm-up.

    The next test has the same and more in the other precisions.
    """

    def run(folder, **options):
        sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=1)
        common = {"dropout": 0.2, "ema_rate": "0.5,0.9", "warmup_steps": 3, "precision": precision}
        loop = make(folder, stream(pictures), schedule_sampler=sampler, **common, **options)
        loop.run_loop()
        return loop

    run(tmp_path / "straight", max_steps=4)
    run(tmp_path / "parts", max_steps=2)
    path = tmp_path / "parts" / "model000002.pt"
    before = path.read_bytes()
    resumed = run(tmp_path / "parts", max_steps=4, resume_checkpoint=str(tmp_path / "parts"))
    assert (resumed.step, resumed.resume_step) == (2, 2)
    assert path.read_bytes() == before
    assert_same_files(tmp_path / "straight", tmp_path / "parts", 4)
    assert column(tmp_path / "straight", "loss") == column(tmp_path / "parts", "loss")
    assert column(tmp_path / "parts", "step") == [1, 2, 3, 4]
    assert "NOT restored" not in text(tmp_path / "parts")
    weights = checkpoints.load(str(path))
    assert {value.dtype for value in weights.values()} == {th.float32}


class Doomed:
    """A stream that gives so many batches, and then does `end`."""

    def __init__(self, data, count, end):
        self.data, self.count, self.end = data, count, end
        self.state_dict, self.load_state_dict = data.state_dict, data.load_state_dict

    def __iter__(self):
        return self

    def __next__(self):
        if self.count == 0:
            self.end()
        self.count -= 1
        return next(self.data)


def fall():
    raise KeyboardInterrupt


def train_at_once_and_in_parts(folder, pictures, *, batch_size=4, **options):
    """Six steps in folder/straight; in folder/parts they end after three and after five, and go on from two and four.

    Everything that a run can hold is in use.
    """

    def train(name, data, **more):
        sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=1)
        sampler._loss_counts[:] = 1  # it draws by losses from the first step on
        sampler._loss_history[:] = np.linspace(1, 2, 40)[:, None]
        usual = {
            "ema_rate": "0.5,0.9,0.999",
            "ema_warmup": True,
            "ema_start": 3,
            "warmup_steps": 2,
            "lr_anneal_steps": 9,
            "max_steps": 6,
        }
        usual |= {"save_interval": 2, "class_dropout": 0.3, "weight_decay": 0.01, "grad_clip": 1.0, "keep_last": 2}
        usual |= {"network": labelled(dropout=0.2), "batch_size": batch_size, "microbatch": batch_size - 1}
        usual |= {"val_data": stream(pictures, batch_size, class_cond=True, seed=1), "val_interval": 2}
        loop = make(folder / name, data, schedule_sampler=sampler, **usual, **options, **more)
        loop.run_loop()
        return loop

    def data():
        return stream(pictures, batch_size, class_cond=True)

    train("straight", data())
    for resume in ("", str(folder / "parts")):
        with pytest.raises(KeyboardInterrupt):
            train("parts", Doomed(data(), 3, fall), resume_checkpoint=resume)
    return train("parts", data(), resume_checkpoint=str(folder / "parts"))


def assert_same_bytes(one, other):
    """Every checkpoint of a folder, manifests included, and the numbers of the log."""
    names = files(one) + files(one, ".json")
    assert len(names) == 2 * 7
    assert names == files(other) + files(other, ".json")
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("step", "samples", "loss", "mse", "lr", "grad_norm", "param_norm"):
        assert column(one, name) == column(other, name)


@pytest.mark.parametrize(("precision", "async_save"), few([("fp32", False), ("fp16", True), ("bf16", False)], ["fp16"]))
def test_a_run_that_falls_and_goes_on_twice_leaves_the_bytes_of_an_unbroken_one(
    tmp_path, pictures, precision, async_save
):
    loop = train_at_once_and_in_parts(tmp_path, pictures, precision=precision, async_save=async_save)
    assert loop.resume_step == 4
    assert_same_bytes(tmp_path / "straight", tmp_path / "parts")
    assert "NOT restored" not in text(tmp_path / "parts")
    assert column(tmp_path / "parts", "step") == [1, 2, 3, 4, 5, 6]


def channels_last(network):
    """A network whose weights are all channels-last where they are converted."""
    convert = network.convert_to
    network.convert_to = lambda precision: (convert(precision), network.to(memory_format=th.channels_last))
    return network


@pytest.mark.slow
def test_a_channels_last_run_leaves_contiguous_files_and_goes_on_from_them_to_the_bit(tmp_path, pictures):
    def run(name, steps, **options):
        network = channels_last(labelled(dropout=0.2))
        data = stream(pictures, class_cond=True)
        loop = make(tmp_path / name, data, network=network, precision="bf16", max_steps=steps, **options)
        loop.run_loop()
        return loop

    straight = run("straight", 4)
    assert not all(param.is_contiguous() for param in straight.model.parameters())
    run("parts", 2, async_save=True)
    parts = run("parts", 4, resume_checkpoint=str(tmp_path / "parts"), async_save=True)
    for name in files(tmp_path / "straight"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
        saving.map_tensors(checkpoints.load(str(tmp_path / "parts" / name)), check_contiguous)
    for loop in (straight, parts):
        moments = [loop.opt.state[master]["exp_avg"] for master in loop.mp_trainer.master_params]
        for tensors in (loop.mp_trainer.master_params, loop.ema_params[0], moments):
            pairs = zip(tensors, loop.model.parameters(), strict=True)
            assert all(gradients.laid_out_as(tensor, param) is tensor for tensor, param in pairs)


def check_contiguous(tensor):
    assert tensor.is_contiguous()
    return tensor


def test_the_newest_checkpoint_is_damaged_and_the_one_before_is_taken(tmp_path, pictures):
    make(tmp_path / "straight", stream(pictures), max_steps=4, save_interval=2).run_loop()
    make(tmp_path / "parts", stream(pictures), max_steps=4, save_interval=2).run_loop()
    path = tmp_path / "parts" / "opt000004.pt"
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    loop = make(tmp_path / "parts", stream(pictures), max_steps=4, resume_checkpoint=str(tmp_path / "parts"))
    assert loop.resume_step == 2
    loop.run_loop()
    assert "the checkpoint of step 4 is passed over: opt000004.pt was altered" in text(tmp_path / "parts")
    assert_same_files(tmp_path / "straight", tmp_path / "parts", 4)
    assert column(tmp_path / "parts", "step") == [1, 2, 3, 4]


def test_the_global_generators_go_on(tmp_path, pictures):
    """Data of a foreign iterator may come from them."""

    def random_data():
        while True:
            yield th.randn(4, 3, 8, 8) + random.random() + np.random.rand(), {}

    def train(name, steps, **options):
        loop = make(tmp_path / name, random_data(), max_steps=steps, **options)
        loop.run_loop()

    random.seed(1), np.random.seed(1)
    train("straight", 4)
    random.seed(1), np.random.seed(1)
    train("parts", 2)
    random.seed(2), np.random.seed(2)
    train("parts", 4, resume_checkpoint=str(tmp_path / "parts"))
    assert column(tmp_path / "straight", "loss") == column(tmp_path / "parts", "loss")
    assert (tmp_path / "straight" / "state000004.pt").read_bytes() == (
        tmp_path / "parts" / "state000004.pt"
    ).read_bytes()


def compare_gradients(folder, pictures):
    """On one of several ranks: what they have together is the mean of what each has alone, and was sent on the way."""
    sent, all_reduce = [], dist.all_reduce

    def send(tensor, **options):
        sent.append(tensor.numel())
        return all_reduce(tensor, **options)

    dist.all_reduce, gradients.BUCKET = send, 2**14
    network = channels_last(labelled())
    for param in network.parameters():  # a new network has layers of zeros, before which there are no gradients
        th.nn.init.normal_(param, std=0.1)
    loop = make(folder / "averaged", iter([]), network=network, batch_size=2, microbatch=1, precision="bf16")
    batch, cond = next(stream(pictures, 2, class_cond=True))
    loop.forward_backward(batch, cond)
    on_the_way = len(sent)
    together, _ = loop.mp_trainer._gradients()
    assert on_the_way == len(sent) > 5, (on_the_way, len(sent))
    loop.mp_trainer = fp16_util.MixedPrecisionTrainer(model=loop.model, precision="bf16")
    loop.forward_backward(batch, cond)
    alone, _ = loop.mp_trainer._gradients()
    pairs = [dist_util.gather(own.contiguous()) for own in alone]
    assert all(th.equal(mean, (one + other) / 2) for mean, (one, other) in zip(together, pairs, strict=True))
    assert not any(th.equal(one, other) for one, other in pairs)
    dist.all_reduce = all_reduce


ON_TWO_RANKS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_train_util as tests
from guided_diffusion import dist_util
from guided_diffusion.training import interruption

folder, pictures = Path(sys.argv[2]), sys.argv[3]


def interrupt_rank_1():
    if dist_util.rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


def main():
    dist_util.setup_dist(device="cpu")
    tests.compare_gradients(folder, pictures)
    loop = tests.train_at_once_and_in_parts(folder, pictures, batch_size=2, async_save=True)
    assert loop.resume_step == 4
    interruption.ASK_EVERY = 0.0
    tests.logger.configure(dir=str(folder / "stopped"), format_strs=[])
    data = tests.Doomed(tests.stream(pictures, 2), 3, interrupt_rank_1)
    loop = tests.make(folder / "stopped", data, batch_size=2, max_steps=0)
    try:
        loop.run_loop()
    except SystemExit as end:
        print(f"rank {dist_util.rank()} ends with {end.code} after {loop.updates}", flush=True)


dist_util.run(main)
"""


def test_two_ranks_fall_and_go_on_to_the_bit_and_stop_together(tmp_path, pictures, ranks):
    """One of two ranks gets a signal: both stop after the same step, saved. One rank goes on with the work of two."""
    program = tmp_path / "program.py"
    program.write_text(ON_TWO_RANKS)
    done = ranks.run([program, Path(__file__).parent, tmp_path, pictures])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_bytes(tmp_path / "straight", tmp_path / "parts")
    assert len(checkpoints.load(str(tmp_path / "parts" / "state000006.pt"))["rng"]) == 2
    for rank in (0, 1):
        assert f"rank {rank} ends with {128 + signal.SIGUSR1} after 4" in done.stdout
    assert files(tmp_path / "stopped") == sorted(f"{kind}000004.pt" for kind in ("model", "ema_0.5_", "opt", "state"))

    for name, size in (("one", 4), ("smaller", 2)):
        folder = tmp_path / name
        options = {"resume_checkpoint": str(tmp_path / "stopped"), "batch_size": size, "max_steps": 5}
        make(folder, stream(pictures, size), **options).run_loop()
        assert "the number of ranks is 1 instead of 2: with the same global batch" in text(folder)
        assert ("the global batch is 2 instead of 4" in text(folder)) == (name == "smaller")
        assert "global generators NOT restored" in text(folder)
    make(tmp_path / "whole", stream(pictures), max_steps=5).run_loop()
    assert column(tmp_path / "one", "loss")[-1] == pytest.approx(column(tmp_path / "whole", "loss")[-1], rel=1e-5)


def failing(error, at):
    """A function that raises an error when it is called for the `at`-th time."""
    calls = itertools.count(1)

    def act(*_):
        if next(calls) == at:
            raise error

    return act


class Breaking(Doomed):
    """A stream that raises an error in place of a batch, and can take the last one back."""

    def __init__(self, data, count, error):
        super().__init__(data, count, failing(error, 1))
        self.give_back, self.dataset = data.give_back, data.dataset


class FullDisk(logger.CSVOutputFormat):
    """A table that takes two rows."""

    def writekvs(self, kvs):
        if kvs["step"] == 3:
            raise FULL
        super().writekvs(kvs)


FULL = OSError("the disk is full")
MISSING = ModuleNotFoundError("No module named 'judge'")


def break_down(kind, loop):
    """Let something around the third of a loop's steps go wrong; returns the error."""
    if kind == "data":
        loop.supply._iterator = Breaking(loop.data, 3, FULL)
    elif kind == "worker":
        error = RuntimeError("DataLoader worker (pid 7) exited unexpectedly")
        loop.supply._iterator = Breaking(loop.data, 3, error)
        return error
    elif kind == "preview":
        loop.hooks = [Hook(1, failing(FULL, 3))]
    elif kind == "evaluation":
        loop.hooks = [Hook(3, failing(MISSING, 1), on_all_ranks=True)]
        return MISSING
    elif kind == "validation":
        loop.validation, loop.val_interval = Validation(Breaking(loop.data, 0, FULL), 1), 3
    elif kind == "log":
        writers = logger.get_current().output_formats
        writers[0] = FullDisk(writers[0].filename)
    elif kind == "memory":
        Small(loop.model, 0, ON_A_CPU, backward=True).images = 8
        error = failing(ON_A_CPU, 4)
        loop.model.register_forward_hook(lambda *_: error())
        return ON_A_CPU
    return FULL


KINDS = ["data", "worker", "preview", "evaluation", "validation", "log", "memory"]


def make_for_errors(folder, pictures, **more):
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=1)
    return make(folder, stream(pictures), dropout=0.2, schedule_sampler=sampler, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("whole")
    make_for_errors(folder / "run", pictures.__wrapped__(folder)).run_loop()
    return folder / "run"


@pytest.mark.parametrize("kind", few(KINDS, ["data", "validation", "memory"]))
def test_an_error_between_steps_costs_no_step(tmp_path, pictures, whole, kind):
    """It is raised when everything is saved: after three steps, as a run that was to make three leaves it."""
    loop = make_for_errors(tmp_path / "broken", pictures, max_steps=9, async_save=True)
    error = break_down(kind, loop)
    with pytest.raises(type(error), match=re.escape(str(error))):
        loop.run_loop()
    assert loop.updates == 3
    assert f"{error}; the run ends here" in text(tmp_path / "broken")
    assert_same_files(whole, tmp_path / "broken", 3)
    if kind != "log":
        assert column(whole, "loss") == column(tmp_path / "broken", "loss")


def test_an_error_in_the_middle_of_an_update_or_before_the_first_saves_nothing(tmp_path, pictures):
    loop = make(tmp_path, stream(pictures))
    loop._update_ema = failing(FULL, 2)
    with pytest.raises(OSError, match="the disk is full"):
        loop.run_loop()
    loop = make(tmp_path, stream(pictures))
    loop.supply._iterator = Breaking(loop.data, 0, FULL)
    with pytest.raises(OSError, match="the disk is full"):
        loop.run_loop()
    assert files(tmp_path) == []


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_hides_no_earlier_error(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(saving, "write_set", lambda *_: failing(FULL, 1)())
    for hooks, error in ([], FULL), ([Hook(2, failing(MISSING, 1))], MISSING):
        loop = make(tmp_path, stream(pictures), save_interval=2, hooks=hooks)
        with pytest.raises(type(error), match=str(error)):
            loop.run_loop()
        assert loop.updates == 2
        assert f"{FULL}; the run ends here" in text(tmp_path)
    assert files(tmp_path) == []


FAILING_RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_train_util as tests
from guided_diffusion import dist_util
from guided_diffusion.training import gradients

folder, pictures = Path(sys.argv[2]), sys.argv[3]


def main():
    dist_util.setup_dist(device="cpu")
    gradients.BUCKET = 2**14

    def train(name, way, **more):
        data = tests.stream(pictures, 2, class_cond=True)
        more |= {"class_dropout": 0.3, "fsdp": way == "fsdp", "precision": "fp16" if way == "fp16" else "fp32"}
        return tests.make(folder / f"{name} {way}", data, network=tests.labelled(), batch_size=2, **more)

    for count in (5, 3, 1):
        print(count, tests.measured(folder / f"few {count}", pictures, count, 2), flush=True)
    for way in ("fp32", "fp16", "fsdp"):
        train("whole", way).run_loop()
    for broken, kind, way in eval(sys.argv[4]):
        loop = train(kind, way, async_save=way == "fp32", max_steps=9)
        if dist_util.rank() == broken or kind == "preview":
            tests.break_down(kind, loop)
        elif kind == "validation":
            loop.validation, loop.val_interval = tests.Validation(loop.data, 1), 3
        try:
            loop.run_loop()
        except Exception as error:
            print(f"rank {dist_util.rank()}, {kind} {way}: {error}", flush=True)
        assert loop.updates == 3


dist_util.run(main)
"""


def test_ranks_measure_what_one_does_and_save_together_when_one_of_them_has_failed(tmp_path, pictures, ranks):
    """Whichever it is, also where each has a part of everything."""
    program = tmp_path / "program.py"
    program.write_text(FAILING_RANKS)
    cases = [(0, "preview", "fp32"), (0, "validation", "fp32"), (1, "log", "fp32")]
    cases += [(1, "data", "fp16"), (1, "data", "fsdp")]
    done = ranks.run([program, Path(__file__).parent, tmp_path, pictures, repr(cases)], timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for count in (5, 3, 1):  # smaller than the batch of both, or no multiple of it
        assert f"{count} {measured(tmp_path / str(count), pictures, count, 4)}" in done.stdout
    for broken, kind, way in cases:
        for rank, words in (
            (broken, "the disk is full"),
            (1 - broken, f"rank {broken} has failed (the disk is full), and all ranks end"),
        ):
            assert f"rank {rank}, {kind} {way}: {words}\n" in done.stdout
        assert_same_files(tmp_path / f"whole {way}", tmp_path / f"{kind} {way}", 3)


@pytest.mark.parametrize("name", ["opt000002.pt", "set000002.json"])
def test_any_file_of_the_set_resumes_the_run(tmp_path, pictures, name):
    make(tmp_path, stream(pictures), max_steps=2).run_loop()
    loop = make(tmp_path, stream(pictures), resume_checkpoint=str(tmp_path / name))
    assert loop.resume_step == 2
    expected = checkpoints.load(str(tmp_path / "model000002.pt"))
    assert all(th.equal(value, expected[key]) for key, value in loop.model.state_dict().items())


def test_max_steps_is_the_total_and_a_finished_run_is_left_alone(tmp_path, pictures):
    make(tmp_path, stream(pictures)).run_loop()
    there = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    loop = make(tmp_path, stream(pictures), resume_checkpoint=str(tmp_path))
    loop.run_loop()
    assert loop.step == 0
    assert "nothing to do: 3 updates are made and the limit is 3" in text(tmp_path)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)} == there


def test_what_is_missing_is_said(tmp_path, pictures):
    make(tmp_path / "run", stream(pictures)).run_loop()
    os.rename(tmp_path / "run" / "model000003.pt", tmp_path / "cat.pt")
    loop = make(tmp_path / "new", iter([]), resume_checkpoint=str(tmp_path / "cat.pt"))
    assert loop.updates == 0
    said = text(tmp_path / "new")
    assert "the step of" in said
    assert "cat.pt is unknown" in said
    assert said.count("NOT restored") == 3  # average, optimizer, data
    assert all(th.equal(a, b) for a, b in zip(loop.ema_params[0], loop.model.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match=r"model000004.pt' does not exist; beside it lie ema_0.5_000003.pt"):
        make(tmp_path / "new", iter([]), resume_checkpoint=str(tmp_path / "run" / "model000004.pt"))


def test_the_learning_rate_that_is_given_wins_and_none_takes_the_files(tmp_path, pictures):
    make(tmp_path, stream(pictures), lr=3e-3, warmup_steps=100).run_loop()
    options = {"lr": 1e-5, "weight_decay": 0.1, "max_steps": 4}
    given = make(tmp_path, stream(pictures), resume_checkpoint=str(tmp_path), **options)
    given.run_loop()
    said = "optimizer restored with lr 1e-05 instead of its 0.003 and weight_decay 0.1 instead of its 0;"
    assert said in text(tmp_path)
    assert checkpoints.load(str(tmp_path / "opt000004.pt"))["param_groups"][0]["weight_decay"] == 0.1
    assert column(tmp_path, "lr")[-1] == pytest.approx(1e-5)
    taken = make(tmp_path, stream(pictures), lr=None, resume_checkpoint=str(tmp_path / "model000003.pt"))
    assert taken.lr == 3e-3
    with pytest.raises(ValueError, match="lr is None"):
        make(tmp_path, stream(pictures), lr=None)


def test_the_flat_optimizer_file_of_an_older_fp16_run_is_understood(tmp_path, pictures):
    """Made here from the file of a new run, in the layout of the two flat masters and without a state file."""
    make(tmp_path, stream(pictures), max_steps=2, save_interval=2).run_loop()
    path = str(tmp_path / "opt000002.pt")
    new = checkpoints.load(path)
    model = build_unet(UNetConfig(**UNET), False)
    names = [name for name, _ in model.named_parameters()]

    def flat(key, group, shape):
        return th.cat([new["state"][names.index(name)][key].flatten() for name, _ in group]).view(shape)

    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    state = {
        i: {key: flat(key, group, shape) for key in ("exp_avg", "exp_avg_sq")} | {"step": 2}
        for i, (group, shape) in enumerate(groups)
    }
    checkpoints.save(path, {"state": state, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]})
    for name in ("state000002.pt", "set000002.json"):
        os.remove(tmp_path / name)
    loop = make(tmp_path, stream(pictures), resume_checkpoint=str(tmp_path), precision="bf16")
    th.testing.assert_close(loop.opt.state_dict()["state"], new["state"], atol=0, rtol=0)


def test_weights_of_other_flags_are_refused(tmp_path, pictures):
    make(tmp_path, stream(pictures), max_steps=1).run_loop()
    wide = build_unet(UNetConfig(**{**UNET, "num_channels": 64}), False)
    with pytest.raises(ValueError, match="the checkpoint has num_channels 32, you gave 64"):
        make(tmp_path, stream(pictures), network=wide, resume_checkpoint=str(tmp_path))


def gradients_of(loop, batch):
    loop.forward_backward(batch, {})
    return [param.grad.clone() for param in loop.mp_trainer.master_params]


@pytest.mark.parametrize("microbatch", [1, 3])
def test_microbatches_of_any_size_give_the_gradient_of_the_batch(tmp_path, pictures, microbatch):
    batch, _ = next(stream(pictures, deterministic=True))
    whole = gradients_of(make(tmp_path, iter([])), batch)
    parts = gradients_of(make(tmp_path, iter([]), microbatch=microbatch), batch)
    assert max(grad.abs().max() for grad in whole) > 1e-2
    th.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_the_gradient_is_that_of_the_importance_weighted_mean(tmp_path, pictures):
    class Skewed(ScheduleSampler):
        def weights(self):
            return np.arange(1.0, 41.0)

    batch, _ = next(stream(pictures, deterministic=True))
    loop = make(tmp_path, iter([]), schedule_sampler=Skewed())
    found = gradients_of(loop, batch)
    draw = loop._draw(batch, 0)
    assert th.allclose(draw.weights, 40 * 41 / 2 / 40 / (draw.t + 1))
    loop.model.zero_grad()
    losses = DIFFUSION.training_losses(loop.model, batch, draw.t, noise=draw.noise)["loss"]
    (losses * draw.weights).mean().backward()
    th.testing.assert_close(found, [param.grad for param in loop.model.parameters()], atol=1e-6, rtol=1e-4)


class Small:
    """A network's forward pass, or its backward pass, in a memory that holds so many images and no more."""

    def __init__(self, network, images, error, *, backward):
        self.images, self.error, self.backward = images, error, backward
        self.seen = []
        network.register_forward_hook(self.look)

    def look(self, module, args, output):
        self.seen.append(len(output))
        if len(output) > self.images and self.backward:
            output.register_hook(self.fail)
        elif len(output) > self.images:
            raise self.error

    def fail(self, gradient):
        raise self.error


ON_A_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to 1 TB")


@pytest.mark.parametrize(
    ("precision", "error", "backward", "images"),
    few(
        [
            ("fp32", ON_A_CPU, False, 2),
            ("bf16", RuntimeError("could not create a primitive"), True, 1),
            ("fp16", th.cuda.OutOfMemoryError("CUDA out of memory"), True, 2),
        ],
        ["fp16"],
    ),
)
def test_an_automatic_microbatch_is_the_half_that_fits_to_the_bit(
    tmp_path, pictures, precision, error, backward, images
):
    """With dropout, and of five images: the first step is done again and the others begin with what fitted."""

    def train(name, network, microbatch, batch_size=5):
        options = {"network": network, "batch_size": batch_size, "class_dropout": 0.3, "precision": precision}
        options |= {"max_steps": 2, "initial_lg_loss_scale": 8.0}
        loop = make(tmp_path / name, stream(pictures, 5, class_cond=True), microbatch=microbatch, **options)
        loop.run_loop()
        return loop

    train("number", labelled(dropout=0.3), images)
    network = labelled(dropout=0.3)
    small = Small(network, images, error, backward=backward)
    loop = train("auto", network, "auto")
    assert_same_files(tmp_path / "number", tmp_path / "auto", 2)
    assert column(tmp_path / "number", "loss") == column(tmp_path / "auto", "loss")
    assert loop.microbatch == images
    tried = [5, 3, 2] if images == 2 else [5, 3, 2, 1]
    passes = {2: [2, 2, 1], 1: [1] * 5}[images]
    assert small.seen == [*tried[:-1], *passes * 2]
    lines = [line for line in text(tmp_path / "auto").splitlines() if "out of memory" in line]
    assert lines == [f"out of memory: the step is repeated in microbatches of {size}" for size in tried[1:]]


def test_memory_is_given_back_without_the_gradients_of_what_did_not_fit(tmp_path, pictures, monkeypatch):
    """Of two microbatches the first has fitted."""
    network, held = labelled(), []
    loop = make(tmp_path, stream(pictures, class_cond=True), network=network, microbatch="auto", precision="bf16")
    attempt = loop.forward_backward

    def once(batch, cond):
        attempt(batch, cond)
        if loop.microbatch == 4:
            held.append(sum(master.grad is not None for master in loop.mp_trainer.master_params))
            raise ON_A_CPU

    def collect():
        held.append(sum(master.grad is not None for master in loop.mp_trainer.master_params))

    monkeypatch.setattr(loop, "forward_backward", once)
    monkeypatch.setattr(batches, "gc", SimpleNamespace(collect=collect))
    loop.run_step(*next(iter(loop.data)))
    assert held[0] > 0
    assert held[1:] == [0]


@pytest.mark.parametrize(("microbatch", "tried"), [("auto", [4, 2, 1]), (-1, [4])])
def test_memory_for_not_even_one_image_is_the_error_itself(tmp_path, pictures, microbatch, tried):
    network = labelled()
    small = Small(network, 0, ON_A_CPU, backward=False)
    loop = make(tmp_path, stream(pictures, class_cond=True), network=network, microbatch=microbatch)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        loop.run_loop()
    assert small.seen == tried
    other = Small(network, 8, None, backward=False)
    small.error = RuntimeError("a shape does not fit")
    loop = make(tmp_path, stream(pictures, class_cond=True), network=network, microbatch="auto")
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        loop.run_loop()
    assert other.seen == []
    assert small.seen == [*tried, 4]
    with pytest.raises(ValueError, match="'some' is no number of images"):
        make(tmp_path, iter([]), microbatch="some")


class HostReads(TorchFunctionMode):
    """The names of all calls by which a program would wait for a GPU."""

    WAITING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.WAITING:
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_step_reads_from_its_device_once(tmp_path, pictures, precision):
    """The loss and the norms, by which it is skipped or clipped; a sampler that follows the losses reads them too."""
    options = {"class_dropout": 0.5, "grad_clip": 0.1, "ema_rate": "0.9,0.5", "microbatch": 2, "warmup_steps": 5}
    options |= {"precision": precision, "initial_lg_loss_scale": 8.0}
    for sampler, reads in ((None, 1), (LossSecondMomentResampler(DIFFUSION), 2)):
        loop = make(tmp_path, iter([]), network=labelled(dropout=0.1), schedule_sampler=sampler, **options)
        batch, cond = next(stream(pictures, class_cond=True))
        with HostReads() as mode:
            loop.run_step(batch, cond)
        assert mode.calls == ["tolist"] * reads
        assert logger.getkvs()["grad_norm"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_without_a_finite_gradient_leaves_no_trace(tmp_path, pictures, precision):
    sampler = LossSecondMomentResampler(DIFFUSION)
    loop = make(tmp_path, stream(pictures), precision=precision, schedule_sampler=sampler, max_steps=1)
    loop.run_loop()
    loop.save()
    broken = th.full((4, 3, 8, 8), float("nan"))
    loop.run_step(broken, {})
    logger.configure(dir=str(tmp_path / "after"), format_strs=[])
    loop.save()
    assert_same_files(tmp_path, tmp_path / "after", 1)
    loop.bad_steps.in_a_row = 49
    with pytest.raises(ValueError, match="the last 50 steps up to step 2 were skipped, as the loss was not finite"):
        loop.run_step(broken, {})


def test_the_learning_rate_rises_and_falls_and_the_run_ends_with_it(tmp_path, pictures):
    make(tmp_path, stream(pictures), lr=1.0e-4, warmup_steps=4, lr_anneal_steps=8, max_steps=0).run_loop()
    expected = [1e-4 * min(1, (i + 1) / 4) * (1 - i / 8) for i in range(8)]
    assert column(tmp_path, "lr") == pytest.approx(expected)
    assert column(tmp_path, "samples") == [4 * (i + 1) for i in range(8)]


def test_files_hold_exactly_as_many_updates_as_their_names_say(tmp_path, pictures):
    """Nothing at step 0, the last step always; the average follows the weights by its rate."""
    make(tmp_path, stream(pictures), save_interval=2, max_steps=5, ema_rate="0.25").run_loop()
    assert files(tmp_path) == sorted(
        f"{kind}{step:06d}.pt" for step in (2, 4, 5) for kind in ("model", "ema_0.25_", "opt", "state")
    )
    for step in (2, 4, 5):
        state = checkpoints.load(str(tmp_path / f"opt{step:06d}.pt"))["state"]
        assert {int(entry["step"]) for entry in state.values()} == {step}

    def weights(kind, step):
        return checkpoints.load(str(tmp_path / f"{kind}{step:06d}.pt"))

    before, model = weights("ema_0.25_", 4), weights("model", 5)
    for name, value in weights("ema_0.25_", 5).items():
        follows = 0.25 * before[name] + 0.75 * model[name]
        th.testing.assert_close(value, follows)


def test_an_average_with_warm_up_follows_faster_at_first(tmp_path, pictures):
    make(tmp_path, stream(pictures), save_interval=1, max_steps=3, ema_rate="0.15,0.999", ema_warmup=True).run_loop()

    def weights(kind, step):
        state = checkpoints.load(str(tmp_path / f"{kind}{step:06d}.pt"))
        return th.cat([value.flatten() for value in state.values()])

    for step in (2, 3):
        for rate in (0.15, 0.999):
            now, kind = min(rate, step / (9 + step)), f"ema_{rate}_"
            follows = now * weights(kind, step - 1) + (1 - now) * weights("model", step)
            th.testing.assert_close(weights(kind, step), follows)
    assert "EMA [0.15, 0.999], warmed up" in text(tmp_path)
    assert "averages over about" not in text(tmp_path)


def test_until_an_average_starts_it_is_the_weights_themselves(tmp_path, pictures):
    for warmed_up in (False, True):
        folder = tmp_path / str(warmed_up)
        options = {"save_interval": 1, "max_steps": 4, "ema_rate": "0.5", "ema_warmup": warmed_up, "ema_start": 2}
        make(folder, stream(pictures), **options).run_loop()
        model, average = (
            [
                th.cat([*map(th.flatten, checkpoints.load(str(folder / f"{kind}{step:06d}.pt")).values())])
                for step in (1, 2, 3, 4)
            ]
            for kind in ("model", "ema_0.5_")
        )
        assert th.equal(average[0], model[0])
        assert th.equal(average[1], model[1])
        for index, n in ((2, 0), (3, 1)):
            rate = (1 + n) / (10 + n) if warmed_up else 0.5
            th.testing.assert_close(average[index], rate * average[index - 1] + (1 - rate) * model[index])
        assert "from step 2" in text(folder)


def test_the_best_checkpoint_is_kept(tmp_path):
    for step in (1, 2, 3, 4):
        list(saving.write_set(str(tmp_path), step, {"model": {}}))
    checkpoints.keep_last(str(tmp_path), 1, best=2)
    assert files(tmp_path) == ["model000002.pt", "model000004.pt"]


def test_only_the_last_checkpoints_are_kept(tmp_path, pictures):
    make(tmp_path, stream(pictures), save_interval=1, max_steps=4, keep_last=2, ema_rate="").run_loop()
    assert files(tmp_path) == [f"{kind}{step:06d}.pt" for kind in ("model", "opt", "state") for step in (3, 4)]


def test_the_environment_ends_a_run_after_its_first_checkpoint(tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    make(tmp_path, stream(pictures), save_interval=2, max_steps=0, ema_rate="").run_loop()
    assert files(tmp_path) == ["model000002.pt", "opt000002.pt", "state000002.pt"]


def test_a_signal_ends_a_run_with_everything_saved(tmp_path, pictures):
    def interrupt(model, step):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    loop = make(tmp_path, stream(pictures), max_steps=0, hooks=[Hook(2, interrupt)], ema_rate="")
    with pytest.raises(SystemExit) as caught:
        loop.run_loop()
    assert caught.value.code == 128 + signal.SIGTERM
    assert files(tmp_path) == ["model000002.pt", "opt000002.pt", "state000002.pt"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_neither_microbatches_nor_resuming_change_which_labels_are_dropped(tmp_path, pictures):
    batches = list(itertools.islice(stream(pictures, class_cond=True), 4))
    found = []
    for microbatch, first in ((-1, 4), (1, 2), (3, 1)):
        network, folder = labelled(), tmp_path / str(first)
        seen = labels_seen(network)
        options = {"network": network, "class_dropout": 0.5, "microbatch": microbatch, "seed": 1}
        make(folder, iter(batches[:first]), max_steps=first, **options).run_loop()
        make(folder, iter(batches[first:]), max_steps=4, resume_checkpoint=str(folder), **options).run_loop()
        found.append([label for _, labels in seen for label in labels])
    assert found[0] == found[1] == found[2]
    given = [label for _, cond in batches for label in cond["y"].tolist()]
    assert 3 not in given
    assert 2 <= found[0].count(3) <= 14
    assert all(label in (kept, 3) for label, kept in zip(found[0], given, strict=True))


def test_dropping_labels_changes_nothing_else(tmp_path, pictures):
    """Dropping all of them is training with the null label: timesteps, noise, dropout and updates are the same."""
    batches = list(itertools.islice(stream(pictures, class_cond=True), 3))
    nulls = [(images, {"y": th.full_like(cond["y"], 3)}) for images, cond in batches]
    make(tmp_path / "dropped", iter(batches), network=labelled(dropout=0.3), class_dropout=1.0).run_loop()
    make(tmp_path / "nulls", iter(nulls), network=labelled(dropout=0.3), class_dropout=0.0).run_loop()
    assert_same_files(tmp_path / "dropped", tmp_path / "nulls", 3)
    assert column(tmp_path / "dropped", "loss") == column(tmp_path / "nulls", "loss")


def test_without_dropout_a_null_class_changes_nothing_and_learns_nothing(tmp_path, pictures):
    plain, null = labelled(null_class=False), labelled()
    state = plain.state_dict()
    null.load_state_dict({**state, "label_emb.weight": th.cat([state["label_emb.weight"], th.ones(1, 128)])})
    for name, network in (("plain", plain), ("null", null)):
        make(tmp_path / name, stream(pictures, class_cond=True), network=network).run_loop()
    assert column(tmp_path / "plain", "loss") == column(tmp_path / "null", "loss")
    assert (null.label_emb.weight[3] == 1).all()
    for (name, one), other in zip(plain.named_parameters(), null.parameters(), strict=True):
        assert th.equal(one, other[:3] if name == "label_emb.weight" else other)


def test_validation_drops_no_label(tmp_path, pictures):
    network = labelled()
    seen = labels_seen(network)
    val_data = stream(pictures, class_cond=True, seed=1)
    options = {"class_dropout": 1.0, "val_data": val_data, "val_interval": 3}
    make(tmp_path, stream(pictures, class_cond=True), network=network, **options).run_loop()
    trained, measured = ({label for mode, y in seen for label in y if mode is training} for training in (True, False))
    assert trained == {3}
    assert measured == {0, 1, 2}


def test_a_network_without_a_null_class_is_refused(tmp_path, pictures):
    data = stream(pictures, class_cond=True)
    for kind in (TrainLoop, ClassifierTrainLoop):
        with pytest.raises(ValueError, match=r"class_dropout 0\.1 needs a network that knows 'no class'"):
            make(tmp_path, data, kind=kind, network=labelled(null_class=False), class_dropout=0.1)


def test_previews_and_validation_leave_the_training_alone(tmp_path, pictures):
    """Whatever they draw, even if the data come from the same generator; and they see the slowest average."""
    seen = []

    def random_data():
        while True:
            yield th.randn(4, 3, 8, 8), {}

    def preview(model, step):
        th.manual_seed(step)
        th.randn(100)
        seen.append((step, model.training, {name: value.clone() for name, value in model.state_dict().items()}))

    options = {"dropout": 0.3, "max_steps": 4, "save_interval": 2, "ema_rate": "0.9,0.5"}
    make(tmp_path / "plain", random_data(), **options).run_loop()
    loop = make(
        tmp_path / "busy",
        random_data(),
        hooks=[Hook(2, preview)],
        val_data=stream(pictures, seed=1),
        val_interval=1,
        progress=True,
        **options,
    )
    loop.run_loop()
    assert_same_files(tmp_path / "plain", tmp_path / "busy", 4)
    assert column(tmp_path / "plain", "loss") == column(tmp_path / "busy", "loss")
    assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False)]
    for step, _, weights in seen:
        average = checkpoints.load(str(tmp_path / "busy" / f"ema_0.9_{step:06d}.pt"))
        assert all(th.equal(weights[name], value) for name, value in average.items())
    assert loop.model.training


@pytest.mark.parametrize("rate", few(["0.5", ""], ["0.5"]))
def test_validation_repeats_itself_for_the_same_weights(tmp_path, pictures, rate):
    data = stream(pictures, seed=1)
    loop = make(tmp_path, stream(pictures), lr=0.0, ema_rate=rate, val_data=data, val_interval=1, precision="bf16")
    loop.run_loop()
    losses = column(tmp_path, "val_loss")
    assert len(set(losses)) == 1
    assert len(set(column(tmp_path, "loss"))) == 3
    assert "validation on the same 12 images every time, in batches of 4, with the same noise" in text(tmp_path)
    assert data.state_dict()["batches"] == 3  # one pass, read once
    quarters = [column(tmp_path, f"val_loss_q{quarter}")[0] for quarter in range(4)]
    assert np.mean(quarters) == pytest.approx(losses[0], rel=1e-5)  # three images in each


class Means(TrainLoop):
    """Of which the loss of an image is its mean, and a little of its noise and step."""

    def compute_losses(self, batch, cond, draw, model=None):
        return {"loss": batch.mean(dim=(1, 2, 3)) + draw.noise.mean(dim=(1, 2, 3)) + draw.t, "mean": batch[:, 0, 0, 0]}


def few(pictures, count):
    """A folder of the first images of another one."""
    folder = Path(pictures).parent / f"few{count}"
    folder.mkdir(exist_ok=True)
    for name in sorted(os.listdir(pictures))[:count]:
        (folder / name).write_bytes((Path(pictures) / name).read_bytes())
    return str(folder)


def measured(folder, pictures, count, batch_size):
    """The losses of a set of so many images."""
    val_data = stream(few(pictures, count), batch_size, few=True, random_flip=False)
    make(folder, iter([]), kind=Means, val_data=val_data, batch_size=batch_size).validate()
    return {name: logger.getkvs()[name] for name in ("val_loss", "val_mean")}


@pytest.mark.parametrize(("count", "batches"), [(5, "batches of 4"), (4, "batches of 4"), (3, "batches of 3")])
def test_validation_counts_every_image_once_whatever_the_batch(tmp_path, pictures, count, batches):
    """Sets that no batch divides, or smaller than one."""
    found = measured(tmp_path, pictures, count, 4)
    images = next(stream(few(pictures, count), count, random_flip=False))[0]
    assert found["val_mean"] == pytest.approx(images[:, 0, 0, 0].mean().item(), rel=1e-5)
    assert f"validation on the same {count} images every time, in {batches}, with the same noise" in text(tmp_path)


def test_the_seed_decides_the_draws_and_no_global_generator(tmp_path, pictures):
    for number, (name, seed) in enumerate([("a", 0), ("b", 0), ("c", 1)]):
        loop = make(tmp_path / name, stream(pictures), seed=seed, dropout=0.5)
        th.manual_seed(number)
        np.random.seed(number)
        loop.run_loop()
    assert column(tmp_path / "a", "loss") == column(tmp_path / "b", "loss")
    assert column(tmp_path / "a", "loss") != column(tmp_path / "c", "loss")


def test_the_log_has_a_mean_and_four_quarters_of_each_loss(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=[])
    t = th.tensor([0, 9, 10, 25, 39])
    values = th.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    log_loss_dict(DIFFUSION, t, {"loss": values, "mse": values * 2})
    log_loss_dict(DIFFUSION, t[:1], {"loss": th.tensor([6.0])})
    row = dict(logger.getkvs())
    assert row == pytest.approx(
        {
            "loss": (4 + 6) / 2,
            "loss_q0": (1 + 2 + 6) / 3,
            "loss_q1": 3,
            "loss_q2": 4,
            "loss_q3": 10,
            "mse": 8,
            "mse_q0": 3,
            "mse_q1": 6,
            "mse_q2": 8,
            "mse_q3": 20,
        }
    )


def test_the_log_says_once_what_its_columns_are(tmp_path, pictures):
    make(tmp_path, stream(pictures), max_steps=3).run_loop()
    said = (
        "columns of the log: loss is what is minimised, mse is the squared error of the prediction; NAME_q0 .. NAME_q3"
    )
    assert text(tmp_path).count(said) == 1
    assert text(tmp_path).count("columns of the log") == 1


def test_a_line_is_the_mean_over_its_steps(tmp_path, pictures):
    options = {"max_steps": 4, "precision": "fp16", "schedule_sampler": LossSecondMomentResampler(DIFFUSION)}
    make(tmp_path / "each", stream(pictures), **options).run_loop()
    make(tmp_path / "pair", stream(pictures), log_interval=2, **options).run_loop()
    for name in ("loss", "mse", "grad_norm", "param_norm", "lg_loss_scale"):
        each, pair = column(tmp_path / "each", name), column(tmp_path / "pair", name)
        assert pair == pytest.approx([np.mean(each[:2]), np.mean(each[2:])], rel=1e-5)
    assert {"images_per_second", "data_wait", "lr", "samples"} <= set(rows(tmp_path / "pair")[0])
    assert 0 <= column(tmp_path / "pair", "data_wait")[0] <= 1


@pytest.mark.parametrize("async_save", [False, True])
def test_the_log_says_how_long_training_stood_still_for_a_checkpoint(tmp_path, pictures, async_save):
    make(tmp_path, stream(pictures), max_steps=4, save_interval=2, async_save=async_save).run_loop()
    assert [row["save_stall"] != "" for row in rows(tmp_path)] == [False, False, True, False]
    assert 0 < float(rows(tmp_path)[2]["save_stall"]) < 10
    assert text(tmp_path).count("saved ") == 2 * 5


def test_an_average_longer_than_the_run_is_pointed_out(tmp_path, pictures):
    make(tmp_path, stream(pictures), ema_rate="0.9999", max_steps=1).run_loop()
    assert "EMA 0.9999 averages over about 10000 updates and the run has 1" in text(tmp_path)


def test_a_foreign_iterator_will_do_and_its_end_is_an_error(tmp_path, pictures):
    batch = next(stream(pictures))
    loop = make(tmp_path, (batch for _ in range(2)))
    with pytest.raises(ValueError, match="the data ended after 2 updates"):
        loop.run_loop()
    assert "model000002.pt" in files(tmp_path)
    assert "a resumed run will not know its position" in text(tmp_path)


def test_a_subclass_with_its_own_step_trains(tmp_path, pictures):
    """Written against the public attributes of the originals' loop."""

    class Fork(TrainLoop):
        def forward_backward(self, batch, cond):
            self.mp_trainer.zero_grad()
            assert not self.use_ddp
            for images in batch.split(self.microbatch):
                t, weights = self.schedule_sampler.sample(len(images), images.device)
                terms = self.diffusion.training_losses(self.ddp_model, images, t, model_kwargs={})
                log_loss_dict(self.diffusion, t, terms)
                self.mp_trainer.backward((terms["loss"] * weights).mean())

        def run_step(self, batch, cond):
            self.forward_backward(batch, cond)
            if self.mp_trainer.optimize(self.opt):
                self._update_ema()
            self.log_step()

    loop = make(tmp_path, stream(pictures), kind=Fork, microbatch=2)
    start = [param.detach().clone() for param in loop.model.parameters()]
    loop.run_loop()
    assert not any(th.equal(a, b) for a, b in zip(start, loop.model.parameters(), strict=True))
    assert not any(th.equal(a, b) for a, b in zip(start, loop.ema_params[0], strict=True))
    assert loop.global_batch == 4
    assert "model000003.pt" in files(tmp_path)
    assert column(tmp_path, "step") == [1, 2, 3]
    assert min(column(tmp_path, "loss")) > 0


@pytest.mark.parametrize("rate", ["often", "2", "0.9,-0.1", "nan"])
def test_averages_need_rates_from_0_to_1(tmp_path, pictures, rate):
    with pytest.raises(ValueError, match=f"ema_rate '{rate}' is not a list of rates from 0 to 1"):
        make(tmp_path, stream(pictures), ema_rate=rate)


def test_the_places_to_resume_from_and_to_save_to_can_be_replaced(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(train_util, "get_blob_logdir", lambda: str(tmp_path / "bucket"))
    config = {"command": "image_train", "version": "0", "flags": {"lr": 1.0}}
    make(tmp_path / "logs", stream(pictures), config=config).run_loop()
    assert files(tmp_path / "logs") == []
    assert checkpoints.config_beside(str(tmp_path / "bucket")) == {"lr": 1.0}
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: str(tmp_path / "bucket" / "model000003.pt"))
    assert make(tmp_path / "logs", stream(pictures)).resume_step == 3
    found = train_util.find_ema_checkpoint(str(tmp_path / "bucket" / "model000003.pt"), 3, "0.5")
    assert found == str(tmp_path / "bucket" / "ema_0.5_000003.pt")
    assert train_util.find_ema_checkpoint(found, 3, 0.9) is None
    assert train_util.find_ema_checkpoint(None, 3, 0.9) is None
    assert train_util.parse_resume_step_from_filename(found) == 3
    assert train_util.parse_resume_step_from_filename("cat.pt") == 0


ATTRIBUTES = {
    "use_fp16": False,
    "fp16_scale_growth": 1e-3,
    "use_ddp": False,
    "ema_rate": [0.5, 0.9],
    "microbatch": 2,
    "batch_size": 4,
    "global_batch": 4,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "lr_anneal_steps": 0,
    "log_interval": 1,
    "save_interval": 2,
    "step": 0,
    "resume_step": 2,
    "sync_cuda": th.cuda.is_available(),
}
METHODS = (
    "_load_and_sync_parameters _load_ema_parameters _load_optimizer_state run_step forward_backward _update_ema "
    "_anneal_lr log_step save"
).split()
FUNCTIONS = (
    "get_blob_logdir find_resume_checkpoint parse_resume_step_from_filename find_ema_checkpoint log_loss_dict"
).split()


def test_what_forks_of_the_loop_read_override_and_replace(tmp_path, pictures, monkeypatch):
    options = {"ema_rate": "0.5,0.9", "save_interval": 2, "microbatch": 2}
    make(tmp_path, stream(pictures), max_steps=2, **options).run_loop()
    called = []

    def recording(name, function):
        def call(*args, **keywords):
            called.append(name)
            return function(*args, **keywords)

        return call

    Fork = type("Fork", (TrainLoop,), {name: recording(name, getattr(TrainLoop, name)) for name in METHODS})
    for name in FUNCTIONS:
        monkeypatch.setattr(train_util, name, recording(name, getattr(train_util, name)))
    loop = make(tmp_path, stream(pictures), kind=Fork, resume_checkpoint=str(tmp_path / "model000002.pt"), **options)
    assert {name: getattr(loop, name) for name in ATTRIBUTES} == ATTRIBUTES
    assert loop.ddp_model is loop.model is loop.mp_trainer.model
    assert loop.resume_checkpoint == str(tmp_path / "model000002.pt")
    assert [len(params) for params in loop.ema_params] == [len(list(loop.model.parameters()))] * 2
    assert isinstance(loop.opt, th.optim.AdamW)
    loop.run_loop()
    assert {name: called.count(name) > 0 for name in METHODS + FUNCTIONS} == dict.fromkeys(METHODS + FUNCTIONS, True)
    assert called.count("_load_ema_parameters") == 2


def test_forks_that_load_for_themselves_are_not_loaded_over(tmp_path, pictures):
    """In the originals' way: the step from the name, the weights by load_state_dict, and nothing returned."""
    make(tmp_path / "run", stream(pictures), max_steps=2).run_loop()
    model = str(tmp_path / "run" / "model000002.pt")

    class Weights(TrainLoop):
        def _load_and_sync_parameters(self):
            self.resume_step = train_util.parse_resume_step_from_filename(self.resume_checkpoint)
            self.model.load_state_dict(dist_util.load_state_dict(self.resume_checkpoint, map_location="cpu"))
            dist_util.sync_params(self.model.parameters())

    class All(Weights):
        def _load_and_sync_parameters(self):
            self.resume_step = 7

        def _load_ema_parameters(self, rate):
            return [th.full_like(master, rate) for master in self.mp_trainer.master_params]

        def _load_optimizer_state(self):
            self.opt.param_groups[0]["weight_decay"] = 0.25

    def resumed(kind, path):
        return make(tmp_path / "logs", stream(pictures), kind=kind, resume_checkpoint=path)

    ours, theirs = resumed(TrainLoop, model), resumed(Weights, model)
    for loop in (ours, theirs):
        assert loop.resume_step == 2
    th.testing.assert_close(theirs.ema_params, ours.ema_params, atol=0, rtol=0)
    th.testing.assert_close(list(theirs.model.parameters()), list(ours.model.parameters()), atol=0, rtol=0)
    th.testing.assert_close(theirs.opt.state_dict(), ours.opt.state_dict(), atol=0, rtol=0)
    for path in ("", model):
        loop = resumed(All, path)
        assert (loop.updates, loop.opt.param_groups[0]["weight_decay"]) == (7, 0.25)
        assert all((average == 0.5).all() for average in loop.ema_params[0])
