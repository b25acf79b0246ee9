"""Parameters split over ranks: what is learned, saved and seen is what a whole run learns, saves and sees."""

import copy
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import test_train_util as training
import torch as th
from few import few

from guided_diffusion import dist_util
from guided_diffusion.config import ClassifierConfig, SuperResConfig, UNetConfig
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.networks.blocks import WIDE
from guided_diffusion.script_util import build_classifier, build_unet, build_upsampler
from guided_diffusion.train_util import Hook
from guided_diffusion.training import checkpoints, lora, sharded_files, sharding
from guided_diffusion.training.gradients import AveragingTrainer
from guided_diffusion.training.sharding import ShardedTrainer

PRECISIONS = ("fp32", "bf16", "fp16")
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_sharding as tests
tests.dist_util.run(tests.on_a_rank, Path(sys.argv[2]), *sys.argv[3:])
"""
X, T, Y = th.linspace(-1, 1, 192).view(1, 3, 8, 8), th.tensor([7.0]), th.tensor([1])


def network(precision):
    """One in which nothing is at zero; for fp16 with adapters, and frozen weights below them."""
    model = training.labelled(dropout=0.1)
    for parameter in model.parameters():
        th.nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    if precision == "fp16":
        lora.attach(model, rank=2, train=["out.2.weight"])
    return model


class Seen(list):
    """What networks that are looked at make of an image."""

    def __call__(self, model, step):
        self.append(model(X, T, y=Y))


def run(folder, pictures, precision, *, batch_size=2, data=None, **options):
    """A loop that has run to its end, with all in use that a file can hold or that looks at the network."""
    usual = {"network": network(precision), "precision": precision, "grad_clip": 1.0, "weight_decay": 0.01}
    usual |= {"initial_lg_loss_scale": 10.0, "microbatch": 1, "max_steps": 2}
    usual |= {"val_data": training.stream(pictures, batch_size, class_cond=True, seed=1), "val_interval": 2}
    data = data or training.stream(pictures, batch_size, class_cond=True)
    loop = training.make(folder, data, **{"batch_size": batch_size, **usual, **options})
    loop.run_loop()
    return loop


def on_a_rank(folder, pictures, precision):
    warnings.simplefilter("error")
    th.set_num_threads(1)
    dist_util.setup_dist(device="cpu")
    for kind in ("whole", "split"):
        seen, path = Seen(), folder / f"{kind}_{precision}"
        hooks = [Hook(2, seen), Hook(2, seen, on_all_ranks=True)]
        loop = run(path, pictures, precision, fsdp=kind == "split", hooks=hooks)
        th.save(th.cat(seen), path / f"seen.{dist_util.rank()}")
        if precision == "fp32":
            share = held(loop) / sum(param.numel() for param in loop.model.parameters())
            print(f"rank {dist_util.rank()} holds {share:.2f} of {kind}", flush=True)
    if precision == "fp32":
        few_rows()
    else:
        fall_and_go_on(folder / f"parts_{precision}", pictures, precision)


def held(loop):
    """How many numbers a rank keeps in masters, moments and averages."""
    moments = [value for entry in loop.opt.state.values() for value in entry.values() if value.ndim]
    averages = [value for values in loop.ema_params for value in values]
    return sum(value.untyped_storage().nbytes() // 4 for value in [*loop.mp_trainer.master_params, *moments, *averages])


def fall_and_go_on(path, pictures, precision):
    data = training.stream(pictures, 2, class_cond=True)
    with pytest.raises(KeyboardInterrupt):
        run(path, pictures, precision, fsdp=True, save_interval=1, data=training.Doomed(data, 1, training.fall))
    loop = run(path, pictures, precision, fsdp=True, resume_checkpoint=str(path))
    assert loop.resume_step == 1


def few_rows():
    """Fewer rows than ranks, and a loss that is finite on one rank alone."""
    models = [th.nn.Sequential(th.nn.Linear(4, 3), th.nn.Linear(3, 1, bias=False)) for _ in range(2)]
    dist_util.sync_params(models[0].parameters())
    models[1].load_state_dict(models[0].state_dict())
    trainers = [AveragingTrainer(model=models[0]), ShardedTrainer(model=models[1])]
    inputs, faults = th.linspace(-1, 1, 8).view(2, 4) + dist_util.rank(), []
    for trainer, model in zip(trainers, models, strict=True):
        opt = th.optim.AdamW(trainer.master_params, lr=0.01, fused=True)
        for factor in (1.0, 2.0, 1.0 if dist_util.rank() else float("inf"), 1.0):
            trainer.zero_grad()
            trainer.backward((factor * model(inputs)).mean())
            trainer.optimize(opt)
            faults.append(trainer.fault)
    assert faults == ["", "", "loss", ""] * 2
    whole, split = (trainer.master_params_to_state_dict(trainer.master_params) for trainer in trainers)
    th.testing.assert_close(dict(split), {name: value.detach() for name, value in whole.items()})


HYBRID = """
import os, socket, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
socket.gethostname = lambda: f"machine{int(os.environ['SLURM_PROCID']) // 2}"
import test_sharding as tests
tests.dist_util.run(tests.on_machines, Path(sys.argv[2]), sys.argv[3])
"""


def on_machines(folder, pictures):
    warnings.simplefilter("error")
    th.set_num_threads(1)
    dist_util.setup_dist(device="cpu")
    usual = {"batch_size": 1, "ema_profiles": "0.1", "save_interval": 1, "val_data": None, "ema_rate": "0.5"}
    run(folder / "whole", pictures, "fp32", **usual)
    split = {**usual, "fsdp": True, "checkpoint_format": "sharded", "async_save": True}
    loop = run(folder / "split", pictures, "fp32", **split)
    mesh, copies = loop.mp_trainer.mesh, dist_util.world_size() // 2
    expected = {"copies": copies, "split": 2} if copies > 1 else {"split": 2}
    assert dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)) == expected
    print(f"{held(loop) / sum(param.numel() for param in loop.model.parameters()):.2f}", flush=True)
    run(folder / "again", pictures, "fp32", resume_checkpoint=str(folder / "split" / "shards000001"), **split)


def made_by_ranks(program, nursery, folder, *words, **options):
    """A folder in which ranks did what a program says, their pictures, and what they printed."""
    pictures = training.pictures.__wrapped__(folder)
    (folder / "program.py").write_text(program)
    done = nursery.run([folder / "program.py", Path(__file__).parent, folder, pictures, *words], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, pictures, done.stdout


@pytest.fixture(scope="module", params=few([2, 4], [2]))
def parts(request, ranks, tmp_path_factory):
    """The folder of `on_machines`, its pictures, and the number of ranks."""
    count = request.param
    folder, pictures, said = made_by_ranks(HYBRID, ranks, tmp_path_factory.mktemp("parts"), ranks=count, timeout=900)
    # masters, two moments, an average: half of each
    assert [line for line in said.splitlines() if line.startswith("2.")] == ["2.00"] * count
    return folder, pictures, count


def test_machines_that_hold_copies_learn_what_one_network_learns(parts):
    folder, *_ = parts
    whole = checkpoints.load(str(folder / "whole" / "model000002.pt"))
    origin = {name: value.detach() for name, value in network("fp32").state_dict().items()}
    read = checkpoints.load(str(folder / "split" / "shards000002"))
    assert distance(read["model"], whole, origin) < 0.02
    average = checkpoints.load(str(folder / "whole" / "power_0.1_000002.pt"))
    assert distance(read["power_0.1"], average, origin) < 0.02
    assert set(read) == {"model", "ema_0.5", "power_0.1"}


def test_parts_are_read_by_any_number_of_ranks(parts, tmp_path):
    """By those that wrote them to the bit; by one process, split or not; and to sample from."""
    folder, pictures, count = parts
    one, two = (checkpoints.load(str(folder / name / "shards000002")) for name in ("split", "again"))
    for part, values in one.items():
        assert all(th.equal(value, two[part][name]) for name, value in values.items()), part
    opened = checkpoints.open_checkpoint(str(folder / "split"))
    assert opened.step == 2
    assert all(th.equal(value, one["ema_0.5"][name]) for name, value in opened.weights.items())
    first = folder / "split" / "shards000001"
    loop = run(
        tmp_path,
        pictures,
        "fp32",
        batch_size=count,
        max_steps=1,
        ema_profiles="0.1",
        ema_rate="0.5",
        resume_checkpoint=str(first),
    )
    log = training.text(tmp_path)
    assert "optimizer restored" in log
    assert "NOT restored" not in log.replace("global generators NOT restored", "")
    moments = [loop.opt.state[param]["exp_avg"] for param in loop.mp_trainer.master_params]
    taken = {"model": loop.mp_trainer.master_params, "ema_0.5": loop.ema_params[0], "power_0.1": loop.powers.values[0]}
    saved = checkpoints.load(str(first))
    names = [name for name, _ in loop.model.named_parameters()]
    for part, values in taken.items():
        assert all(th.equal(value, saved[part][name]) for name, value in zip(names, values, strict=True)), part
    opt = sharded_files.read(str(first), "opt".__eq__)["opt"]
    assert all(th.equal(value, opt[f"{index}.exp_avg"]) for index, value in enumerate(moments))
    assert loop.resume_step == 1


def test_parts_that_are_cut_changed_or_more_than_tensors_are_refused(parts, tmp_path):
    source = tmp_path / "run"
    shutil.copytree(parts[0] / "split", source)
    index = source / "shards000002" / ".metadata"
    whole = index.read_bytes()
    for content, sentence in (
        (whole[: len(whole) // 2], "cannot be read as a sharded checkpoint"),
        (pickle.dumps(os.system), "it names posix.system"),
        (pickle.dumps({"a": 1}), "it is no index"),
    ):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            checkpoints.load(str(index.parent))
        assert checkpoints.newest(str(source))[0].step == 1  # by the manifest
    index.write_bytes(whole)
    assert checkpoints.newest(str(source))[0].step == 2
    part = next(index.parent.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-9])
    assert checkpoints.newest(str(source))[0].step == 1
    (source / "set000002.json").unlink()
    assert checkpoints.newest(str(source))[1] == [
        "the checkpoint of step 2 is passed over: it was not finished: it has no manifest"
    ]
    checkpoints.remove(checkpoints.sets_in(str(source))[1])
    assert not (source / "shards000001").exists()


@pytest.fixture(scope="module")
def runs(request, ranks, tmp_path_factory):
    """The folder in which two ranks did what `on_a_rank` says in a precision, their pictures, and what they printed."""
    return made_by_ranks(PROGRAM, ranks, tmp_path_factory.mktemp("sharding"), request.param)


def distance(one, two, origin):
    """How far apart two sets of weights are, as a share of how far they have come."""
    apart, far = (sum((one[n] - other[n]).double().square().sum() for n in one) for other in (two, origin))
    return float((apart / far).sqrt())


def both(runs, precision, read):
    """The same of a split and a whole run."""
    return (read(runs[0] / f"{kind}_{precision}") for kind in ("split", "whole"))


NEAR = few([("fp32", "fp32", 1e-5), ("bf16", "bf16", 5e-2), ("fp16", "fp16", 1e-3)], ["fp32"])


@pytest.mark.parametrize(("runs", "precision", "near"), NEAR, indirect=["runs"], scope="module")
def test_a_split_run_writes_the_files_of_the_whole_one_within_rounding(runs, precision, near):
    """The same names, types, layouts and, but for sums in another order, numbers."""
    origin = lora.merged(network(precision), network(precision).state_dict())
    names, others = both(runs, precision, training.files)
    assert names == others
    for name in names:
        one, two = both(runs, precision, lambda folder, name=name: checkpoints.load(str(folder / name)))
        if name.startswith(("model", "ema")):
            assert distance(one, two, origin) < 0.01 + 2 * near  # Adam's first steps are as long for the least gradient
            assert layouts(one) == layouts(two)
        elif name.startswith("opt"):
            assert one["param_groups"] == two["param_groups"]
            for key in ("exp_avg", "exp_avg_sq"):
                moments, others = ({i: entry[key] for i, entry in opt["state"].items()} for opt in (one, two))
                assert distance(moments, others, dict.fromkeys(others, 0)) < near
                assert layouts(moments) == layouts(others)
        elif name.startswith("state"):
            assert one["precision"] == two["precision"]


def layouts(tensors):
    return {name: (value.dtype, value.shape, value.stride()) for name, value in tensors.items()}


LIKE = few([("fp32", "fp32", 1e-5), ("bf16", "bf16", 2e-2), ("fp16", "fp16", 1e-3)], ["fp32"])


@pytest.mark.parametrize(("runs", "precision", "near"), LIKE, indirect=["runs"], scope="module")
def test_a_split_run_sees_what_the_whole_one_sees(runs, precision, near):
    """Losses, the first one to the bit; norms; validation; hooks, on one rank or on both."""
    losses, others = both(runs, precision, lambda folder: training.column(folder, "loss"))
    assert losses[0] == others[0]
    assert losses == pytest.approx(others, rel=near)
    for name in ("grad_norm", "param_norm"):
        one, two = both(runs, precision, lambda folder, name=name: training.column(folder, name))
        assert one == pytest.approx(two, rel=near)
    one, two = both(runs, precision, lambda folder: float(training.rows(folder)[-1]["val_loss"]))
    assert one == pytest.approx(two, rel=near)
    for rank, looks in ((0, 2), (1, 1)):
        one, two = both(runs, precision, lambda folder, rank=rank: th.load(folder / f"seen.{rank}"))
        assert len(one) == looks
        th.testing.assert_close(one, two, atol=10 * near * float(two.std()), rtol=0)
        assert th.equal(one[0], one[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "precision"), [(name, name) for name in PRECISIONS[1:]], indirect=["runs"], scope="module"
)
def test_a_split_run_that_falls_goes_on_to_the_bit(runs, precision):
    straight, parts = (runs[0] / f"{kind}_{precision}" for kind in ("split", "parts"))
    for name in training.files(straight):
        assert (straight / name).read_bytes() == (parts / name).read_bytes(), name


@pytest.mark.parametrize("runs", ["fp32"], indirect=True)
def test_each_of_two_ranks_holds_half_of_masters_moments_and_averages(runs):
    """Four numbers for each parameter, and here all sizes are even."""
    for rank in (0, 1):
        assert f"rank {rank} holds 4.00 of whole" in runs[2]
        assert f"rank {rank} holds 2.00 of split" in runs[2]


@pytest.mark.parametrize("runs", ["fp32"], indirect=True)
def test_any_number_of_ranks_goes_on_split_or_whole(runs, tmp_path):
    dist_util.setup_dist(device="cpu")
    losses = {}
    for begun in ("split", "whole"):
        for fsdp in (False, True):
            path = tmp_path / f"{begun}_{fsdp}"
            options = {"batch_size": 4, "max_steps": 3, "resume_checkpoint": str(runs[0] / f"{begun}_fp32")}
            loop = run(path, runs[1], "fp32", fsdp=fsdp, **options)
            assert loop.resume_step == 2
            assert training.text(path).count("NOT restored") == 1  # the generators of another number of ranks
            losses[path.name] = training.column(path, "loss")[-1]
    assert losses["split_True"] == losses["split_False"]
    assert losses["whole_True"] == losses["whole_False"]
    assert losses["split_True"] == pytest.approx(losses["whole_True"], rel=1e-4)


TINY = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}
CLASSIFIER = {"classifier_depth": 1, "classifier_channel_mult": "1,2", "classifier_attention_resolutions": "4"}
LOW = {"low_res": X[:, :, ::2, ::2], "low_res_level": th.tensor([0.3])}
NETWORKS = {
    "recomputed": (lambda: build_unet(UNetConfig(image_size=8, use_checkpoint=True, **TINY), True), X, {}),
    "of lines": (lambda: build_unet(UNetConfig(image_size=8, dims=1, **TINY), True), X[..., 0], {}),
    "upsampler": (
        lambda: build_upsampler(SuperResConfig(large_size=8, small_size=4, cond_aug=True, **TINY), True),
        *(X, LOW),
    ),
    "classifier": (  # whose output is a view
        lambda: build_classifier(ClassifierConfig(image_size=8, classifier_width=32, **CLASSIFIER)),
        *(X, {}),
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_split_network_computes_to_the_bit_what_it_did(kind):
    """In bf16, where casts and layouts would tell; gradients to rounding, as three of them add up in another order."""
    dist_util.setup_dist(device="cpu")
    outputs, gradients = [], []
    for trainer_class in (MixedPrecisionTrainer, ShardedTrainer):
        build, images, keywords = NETWORKS[kind]
        th.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            th.nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
        trainer = trainer_class(model=model, precision="bf16")
        outputs.append(model(images, T, **keywords))
        trainer.backward(outputs[-1].square().mean())
        gradients.append(dict(enumerate(trainer.gradients.finish()[0])))
    assert th.equal(*outputs)
    assert distance(*gradients, dict.fromkeys(gradients[0], 0)) < 0.02


@pytest.mark.parametrize("width", [32, WIDE])
def test_the_copy_without_values_lies_as_a_network_with_values_would(width):
    dist_util.setup_dist(device="cpu")
    model = build_unet(
        UNetConfig(image_size=8, **{**TINY, "num_channels": width, "channel_mult": "1", "attention_resolutions": "8"}),
        True,
    )
    real = copy.deepcopy(model)
    real.convert_to("bf16")
    trainer = ShardedTrainer(model=model, precision="bf16")
    layout = [(param.dtype, param.stride()) for param in real.parameters()]
    assert [(param.dtype, param.stride()) for param in trainer._plain.parameters()] == layout
    assert all(param.is_contiguous() for param in real.parameters()) == (width < WIDE)


def test_splitting_needs_a_group_and_a_torch_that_can(monkeypatch):
    with pytest.raises(ValueError, match="process group has not been initialized"):
        ShardedTrainer(model=th.nn.Linear(2, 2))
    monkeypatch.setattr(sharding, "OLDEST_TORCH", "99")
    with pytest.raises(ValueError, match="fsdp needs torch 99 or newer, and this is"):
        ShardedTrainer(model=th.nn.Linear(2, 2))


def test_what_is_not_laid_out_in_blocks_of_fp32_is_refused():
    class Lowered(th.nn.Linear):
        def convert_to(self, precision):
            self.bfloat16()

    dist_util.setup_dist(device="cpu")
    with pytest.raises(ValueError, match="Lowered has 2 parameters in bf16 outside of its blocks"):
        ShardedTrainer(model=Lowered(2, 2), precision="bf16")
    with pytest.raises(ValueError, match=r"the model has some of torch\.float16: convert them first"):
        ShardedTrainer(model=th.nn.Linear(2, 2).half())
    with pytest.raises(ValueError, match="on cpu or cuda, not on meta"):
        ShardedTrainer(model=th.nn.Linear(2, 2, device="meta"))


def test_a_step_is_not_begun_anew_on_one_of_many_ranks(tmp_path):
    with pytest.raises(ValueError, match="microbatch auto does not go with fsdp"):
        training.make(tmp_path, iter(()), fsdp=True, microbatch="auto")
