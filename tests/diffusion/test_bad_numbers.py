"""Losses, gradients and weights that are not finite: what is skipped, who is named, what stays clean, when it ends."""

import csv
import itertools
import math
import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch as th
from few import few
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.config import DiffusionConfig, UNetConfig
from guided_diffusion.image_datasets import ImageDataset, ImageStream, load_data
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.script_util import build_diffusion, build_unet
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training import bad_steps, checkpoints

DIFFUSION = build_diffusion(DiffusionConfig(diffusion_steps=40))
UNET = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}
NAN, INF = float("nan"), float("inf")


class Stream:
    """Labelled batches of noise with names; `spoil` maps a batch number to {image: value}."""

    def __init__(self, spoil):
        self.spoil, self.count = spoil, 0

    def __iter__(self):
        return self

    def __next__(self):
        images = th.randn(4, 3, 8, 8, generator=th.Generator().manual_seed(self.count)).clamp(-1, 1)
        for image, value in self.spoil.get(self.count, {}).items():
            images[image, 0, 0, 0] = value
        self.count += 1
        return images, {"y": th.arange(4)}

    def names(self):
        return [f"batch{self.count - 1}/{index}.png" for index in range(4)]

    def state_dict(self):
        return {"batches": self.count}

    def load_state_dict(self, state):
        self.count = state["batches"]


def make(folder, data, **options):
    logger.configure(dir=str(folder), format_strs=["csv", "log"])
    th.manual_seed(5)
    usual = {
        "model": build_unet(UNetConfig(**UNET, class_cond=True, num_classes=4), False),
        "diffusion": DIFFUSION,
        "schedule_sampler": LossSecondMomentResampler(DIFFUSION, history_per_term=1),
        "batch_size": 4,
        "microbatch": -1,
        "lr": 1e-3,
        "ema_rate": "0.5,0.9",
        "log_interval": 1,
        "save_interval": 1000,
        "resume_checkpoint": "",
        "max_steps": 5,
    }
    return TrainLoop(data=data, **{**usual, **options})


def text(folder):
    return Path(folder, "log.txt").read_text()


def rows(folder):
    with open(Path(folder, "progress.csv")) as file:
        return list(csv.DictReader(file))


def everything(loop):
    """All tensors that a run carries from step to step."""
    moments = [value for entry in loop.opt.state.values() for value in entry.values()]
    history = loop.schedule_sampler.state_dict()
    return [*loop.mp_trainer.master_params, *moments, *itertools.chain(*loop.ema_params), *history.values()]


@pytest.mark.parametrize(
    ("microbatch", "bad", "precision"),
    few(
        [(*given, precision) for given in ((-1, NAN), (3, INF)) for precision in ("fp32", "fp16", "bf16")],
        lambda row: (row[0] == 3) == (row[2] == "fp16"),
    ),
)
def test_the_images_of_a_step_without_a_finite_loss_are_named(tmp_path, precision, microbatch, bad):
    data = Stream({1: {0: bad, 3: bad}})
    loop = make(tmp_path, data, precision=precision, microbatch=microbatch, max_steps=3, initial_lg_loss_scale=8.0)
    loop.run_loop()
    assert loop.mp_trainer.fault == ""
    t = loop._draw(th.zeros(4, 3, 8, 8), 1).t.tolist()
    said = (
        "step 2 was skipped, as the loss of 2 of its 4 images was not finite: "
        f"batch1/0.png (t {t[0]}, label 0), batch1/3.png (t {t[3]}, label 3)"
    )
    assert said in text(tmp_path)
    assert "step skipped: its loss is not finite" in text(tmp_path)
    assert all(value.isfinite().all() for value in everything(loop))


def test_a_skipped_step_is_counted_and_leaves_no_trace_in_the_log_or_the_run(tmp_path):
    """Two of the three steps of the second line are bad: its losses are those of the good one, not nan."""
    data = Stream({4: {1: NAN}, 5: {2: INF}})
    make(tmp_path / "bad", data, log_interval=3, max_steps=9).run_loop()
    first, second, third = rows(tmp_path / "bad")
    assert (first["skipped_steps"], second["skipped_steps"], third["skipped_steps"]) == ("", "2", "")
    assert all(math.isfinite(float(row[name])) for row in rows(tmp_path / "bad") for name in ("loss", "grad_norm"))
    make(tmp_path / "good", Stream({}), log_interval=3, max_steps=9).run_loop()
    assert "skipped_steps" not in rows(tmp_path / "good")[0]
    single = make(tmp_path / "single", Stream({}), max_steps=4)
    single.run_loop()
    assert float(second["loss"]) == pytest.approx(float(rows(tmp_path / "single")[3]["loss"]))


def test_a_line_whose_steps_were_all_skipped_has_no_loss(tmp_path):
    make(tmp_path, Stream({0: {0: NAN}}), max_steps=2).run_loop()
    first, second = rows(tmp_path)
    assert (first["step"], first["skipped_steps"], first["loss"]) == ("1", "1", "")
    assert float(second["loss"]) > 0


def test_a_resumed_run_skips_what_the_unbroken_one_skips(tmp_path):
    spoil = {1: {0: NAN}, 3: {2: INF}}
    make(tmp_path / "straight", Stream(spoil), max_steps=5).run_loop()
    make(tmp_path / "parts", Stream(spoil), max_steps=3).run_loop()
    make(tmp_path / "parts", Stream(spoil), max_steps=5, resume_checkpoint=str(tmp_path / "parts")).run_loop()
    for name in ("model", "ema_0.5_", "ema_0.9_", "opt"):
        one, other = (checkpoints.load(str(tmp_path / run / f"{name}000005.pt")) for run in ("straight", "parts"))
        th.testing.assert_close(one, other, atol=0, rtol=0)
    columns = [[(row["loss"], row["skipped_steps"]) for row in rows(tmp_path / run)] for run in ("straight", "parts")]
    assert columns[0] == columns[1]


@pytest.mark.parametrize(("limit", "saved", "rest"), [(3, 2, "go on with --resume_checkpoint {}"), (4, 1000, "anew")])
def test_after_so_many_in_a_row_the_run_ends_with_the_last_checkpoint_named(tmp_path, limit, saved, rest):
    spoil = {number: {0: NAN} for number in (1, 3, 4, 5, 6, 7)}
    loop = make(tmp_path, Stream(spoil), max_steps=20, max_bad_steps=limit, save_interval=saved, async_save=True)
    with pytest.raises(ValueError, match=f"the last {limit} steps up to step {limit + 3} were skipped") as caught:
        loop.run_loop()
    newest = checkpoints.newest(str(tmp_path))[0]
    assert (newest is None) == (saved == 1000)
    assert rest.format(newest.model if newest else "") in str(caught.value)
    assert "as the loss was not finite: remove or repair the images named above" in str(caught.value)
    if newest is not None:
        assert newest.step == 4  # the one of step 6 would follow the step at which it ends
        assert all(value.isfinite().all() for value in checkpoints.load(newest.model).values())
        again = make(tmp_path, Stream({}), max_steps=newest.step + 1, resume_checkpoint=newest.model)
        again.run_loop()
        assert again.bad_steps.in_a_row == 0


@pytest.mark.slow
def test_without_a_limit_it_never_ends(tmp_path):
    data = Stream({number: {0: NAN} for number in range(60)})
    loop = make(tmp_path, data, max_bad_steps=0, max_steps=60, log_interval=100, ema_rate="")
    loop.run_loop()
    assert loop.bad_steps.in_a_row == 60
    assert rows(tmp_path)[0]["skipped_steps"] == "60"


def test_an_earlier_folder_is_named_where_this_one_has_nothing_yet(tmp_path):
    make(tmp_path / "old", Stream({}), max_steps=1).run_loop()
    old = str(tmp_path / "old" / "model000001.pt")
    loop = make(tmp_path / "new", Stream({1: {0: NAN}}), max_bad_steps=1, resume_checkpoint=old)
    with pytest.raises(ValueError, match=rf"go on with --resume_checkpoint {old}"):
        loop.run_loop()


def test_a_gradient_alone_that_is_not_finite_is_traced_to_the_batch(tmp_path):
    loop = make(tmp_path, Stream({}), max_steps=2, schedule_sampler=None)

    def spoil(gradient):
        return gradient * NAN if loop.updates == 0 else gradient

    next(loop.model.parameters()).register_hook(spoil)
    before = [value.clone() for value in everything_but_history(loop)]
    batch, cond = next(loop.data)
    loop.run_step(batch, cond)
    assert loop.mp_trainer.fault == "gradient"
    assert all(th.equal(a, b) for a, b in zip(before, everything_but_history(loop), strict=True))
    assert "step 1 was skipped, as the gradient was not finite: batch0/0.png (t " in text(tmp_path)
    assert text(tmp_path).count(".png") == 4


def everything_but_history(loop):
    return [*loop.mp_trainer.master_params, *itertools.chain(*loop.ema_params)]


def test_the_search_for_the_loss_scale_is_neither_counted_nor_blamed_on_images(tmp_path):
    loop = make(tmp_path, Stream({}), precision="fp16", initial_lg_loss_scale=26.0, max_bad_steps=2, max_steps=12)
    loop.run_loop()
    skipped = sum(int(row["skipped_steps"] or 0) for row in rows(tmp_path))
    assert 3 <= skipped < 12
    assert ".png" not in text(tmp_path)
    assert loop.mp_trainer.lg_loss_scale == pytest.approx(26 - skipped + 0.001 * (12 - skipped))
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path))  # these losses are good


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_run_away_are_stopped_while_they_are_finite(tmp_path, precision):
    loop = make(tmp_path, Stream({}), precision=precision, lr=1e18, max_steps=20, max_bad_steps=3)
    with pytest.raises(ValueError, match="as the weight norm was not finite: go back to a checkpoint before"):
        loop.run_loop()
    assert all(value.isfinite().all() for value in everything(loop))


def test_an_image_of_a_foreign_iterator_is_named_by_its_place(tmp_path):
    images = th.zeros(4, 3, 8, 8)
    images[2] = NAN
    loop = make(tmp_path, iter([(images, {"y": th.arange(4)})]), max_steps=1)
    loop.run_loop()
    assert "image 2 of rank 0 (t " in text(tmp_path)


def test_of_many_bad_images_the_first_are_shown():
    images = [(f"{index}.png (t {index})", index % 2 == 0) for index in range(40)]
    shown = bad_steps.blamed(images, "loss")
    assert shown.startswith("the loss of 20 of its 40 images was not finite: 1.png (t 1), 3.png (t 3), ")
    assert shown.endswith("15.png (t 15), and 12 more")


def test_a_loss_that_is_not_finite_never_enters_the_distribution_of_timesteps():
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=1)
    sampler.update_with_all_losses(list(range(40)), [1.0] * 40)
    before = sampler.weights()
    sampler.update_with_all_losses([3, 4, 5], [NAN, INF, -INF])
    assert np.array_equal(sampler.weights(), before)
    sampler.update_with_all_losses([3], [2.0])
    assert sampler.weights()[3] > before[3]


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures, each of its own grey."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(7):
        Image.new("RGB", (8, 8), (30 * index,) * 3).save(folder / f"{index}.png")
    return str(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_stream_tells_the_files_of_its_last_batch(pictures, num_workers, deterministic):
    """Across epochs, for each of two ranks, with batches decoded ahead, and after going to a position."""
    usual = {"image_size": 8, "log": lambda line: None, "num_workers": num_workers, "deterministic": deterministic}
    for rank in (0, 1):
        data = load_data(data_dir=pictures, batch_size=3, rank=rank, world_size=2, **usual)
        for _ in range(5):
            check_names(data)
        position = data.state_dict()
        expected = check_names(data)
        data.load_state_dict(position)
        assert check_names(data) == expected
        data.close()


def check_names(data):
    images, _ = next(data)
    names = [os.path.basename(name) for name in data.names()]
    assert names == [f"{round((float(image.mean()) + 1) * 127.5 / 30)}.png" for image in images]
    return names


def test_a_stream_over_its_own_arrays_trains_with_names(tmp_path, pictures):
    """The real stream in the real loop: the bad image is made bad on its way."""

    class Spoiled(ImageDataset):
        def _crop(self, index, draws):
            image, _ = super()._crop(index, draws)
            return (image * NAN if self.local_images[index].endswith("3.png") else image), {"y": np.array(index % 4)}

    paths = [os.path.join(pictures, f"{index}.png") for index in range(7)]
    loop = make(tmp_path / "run", ImageStream(Spoiled(8, paths), 4), max_steps=4)
    loop.run_loop()
    blamed = [line for line in text(tmp_path / "run").splitlines() if "was skipped, as" in line]
    assert 1 <= len(blamed) <= 4
    assert all("the loss of 1 of its 4 images was not finite" in line and "3.png (t " in line for line in blamed)


TWO_RANKS = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from guided_diffusion import dist_util, logger
    from test_bad_numbers import NAN, Stream, everything, make

    class Halves(Stream):
        def names(self):
            return [f"rank{dist_util.rank()}/{name}" for name in super().names()]

    def work(folder):
        dist_util.setup_dist(device="cpu")
        spoil = {1: {2: NAN}, **{number: {0: NAN} for number in (3, 4, 5)}} if dist_util.rank() == 1 else {}
        loop = make(folder, Halves(spoil), max_steps=9, max_bad_steps=3, save_interval=3)
        loop.run_step(*next(loop.data))
        before = [value.detach().clone() for value in everything(loop)]
        loop.step = 1
        loop.run_step(*next(loop.data))
        assert loop.mp_trainer.fault == "loss"
        assert all((a == b).all() for a, b in zip(before, everything(loop), strict=True))
        loop.step = 2
        print(f"rank {dist_util.rank()} is clean", flush=True)
        loop.run_loop()

    dist_util.run(work, sys.argv[1])
"""


def test_the_image_of_one_rank_stops_the_step_of_all_and_every_log_names_it(tmp_path, ranks):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    job = ranks.run([script, tmp_path / "run", Path(__file__).parent])
    assert job.returncode == 2, job.stdout + job.stderr
    for rank in (0, 1):
        assert f"rank {rank} is clean" in job.stdout
    for name in ("log.txt", "log-rank001.txt"):
        said = Path(tmp_path, "run", name).read_text()
        assert "step 2 was skipped, as the loss of 1 of its 8 images was not finite: rank1/batch1/2.png (t " in said
    assert "error: the last 3 steps up to step 6 were skipped" in job.stderr
    assert f"go on with --resume_checkpoint {tmp_path / 'run' / 'model000003.pt'}" in job.stderr
