"""Starting from trained networks: what is taken, how the rest grows, what stays frozen, and that it can be resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from few import few
from PIL import Image
from ranks import Nursery

from guided_diffusion import logger
from guided_diffusion.commands import (
    classifier_train,
    flags as cli,
    image_sample,
    image_train,
    super_res_train,
)
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, SuperResConfig, UNetConfig
from guided_diffusion.networks.architecture import Weights
from guided_diffusion.script_util import build_classifier, build_diffusion, build_unet, build_upsampler
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training import checkpoints, finetuning
from guided_diffusion.training.checkpoints import CLASSIFIER, UNET, UPSAMPLER, Checkpoint
from guided_diffusion.training.finetuning import flags_for, freeze, initialise

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "",
    "num_head_channels": 32,
}
COMMAND = {"num_workers": 0, "log_interval": 100, "diffusion_steps": 40, "batch_size": 2}
X, T = th.linspace(-1, 1, 2 * 4 * 64).view(2, 4, 8, 8).sin(), th.tensor([3.0, 17.0])


def filled(model: th.nn.Module, seed: int = 1) -> th.nn.Module:
    """The network with every weight different from zero and from each other."""
    th.manual_seed(seed)
    for parameter in model.parameters():
        th.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def unet(learn_sigma: bool = False, **more: Any) -> Any:
    return filled(build_unet(UNetConfig(image_size=8, **{**TINY, **more}), learn_sigma))


def fresh(model: Any) -> Any:
    return filled(model, 2)


def upsampler(**more: Any) -> Any:
    """As it is built: some layers start at zero."""
    th.manual_seed(2)
    return build_upsampler(SuperResConfig(large_size=8, small_size=4, **{**TINY, **more}), False).eval()


def classifier(**more: Any) -> Any:
    usual = {"image_size": 8, "classifier_width": 64, "classifier_depth": 1, "classifier_channel_mult": "1"}
    usual |= {"classifier_attention_resolutions": "", "classifier_pool": "adaptive", "num_classes": 2}
    return fresh(build_classifier(ClassifierConfig(**{**usual, "classifier_resblock_updown": False, **more})))


def source(model: Any, classes: str = "", **flags: Any) -> Checkpoint:
    """A checkpoint that has been read."""
    read = Checkpoint(None, path="old.pt")
    vars(read).update(picked=Weights(model.state_dict(), {}, ""), flags=flags, classes=list(classes))
    return read


def out(model: Any, channels: int = 3, **keywords: Any) -> th.Tensor:
    with th.no_grad():
        return model(X[:, :channels], T, **keywords)


def labels(*values: int) -> dict[str, th.Tensor]:
    return {"y": th.tensor(values)}


@pytest.mark.parametrize("cond_aug", [0.0, 0.5])
def test_an_upsampler_begins_as_the_base_model_whatever_it_is_shown(cond_aug: float) -> None:
    base, model = unet(), upsampler(cond_aug=cond_aug)
    report = initialise(model, source(base), mismatch="inflate")
    level = {"low_res_level": th.tensor([0.2, 0.9])} if cond_aug else {}
    for low_res in (th.zeros(2, 3, 4, 4), th.randn(2, 3, 4, 4)):
        th.testing.assert_close(out(model, low_res=low_res, **level), out(base), rtol=0, atol=1e-6)
    changed = [name for name in report.changed if not name.startswith("low_res_embed.")]
    assert changed == ["input_blocks.0.0.weight"]
    assert report.changed[changed[0]] == "6 inputs from 3, the others start at 0"
    assert (len(report.changed) == 5) == bool(cond_aug)


def test_a_learned_variance_leaves_eps_as_it_was() -> None:
    base, model = unet(), fresh(unet(True))
    report = initialise(model, source(base), mismatch="inflate")
    assert th.equal(out(model)[:, :3], out(base))
    assert not out(model)[:, 3:].any()
    assert set(report.changed) == {"out.2.weight", "out.2.bias"}
    again = fresh(unet())
    initialise(again, source(model), mismatch="inflate")
    assert th.equal(out(again), out(base))


def test_a_fourth_channel_keeps_the_variance_of_the_other_three() -> None:
    base, model = unet(True), fresh(unet(True, image_channels=4))
    initialise(model, source(base), mismatch="inflate")
    old, new = out(base), out(model, 4)
    th.testing.assert_close(new[:, [0, 1, 2, 4, 5, 6]], old, rtol=0, atol=1e-6)
    assert not new[:, [3, 7]].any()


def test_a_network_that_learns_of_classes_begins_without_regard_to_them() -> None:
    base, model = unet(), fresh(unet(class_cond=True, num_classes=4, null_class=True))
    initialise(model, source(base), mismatch="inflate", classes="abcd")
    assert th.equal(out(model, **labels(1, 4)), out(base))


def test_rows_of_classes_are_found_by_name() -> None:
    base = unet(class_cond=True, num_classes=3, null_class=True)
    model = fresh(unet(class_cond=True, num_classes=5, null_class=True))
    old = source(base, "cat", null_class=True, num_classes=3)
    report = initialise(model, old, mismatch="inflate", classes="tack")
    table, rows = base.label_emb.weight, model.label_emb.weight
    assert th.equal(rows[[0, 1, 2]], table[[2, 1, 0]])
    assert th.equal(rows[[3, 4]], table[:3].mean(dim=0).expand(2, -1))
    assert th.equal(rows[5], table[3])
    assert th.equal(out(model, **labels(0, 5)), out(base, **labels(2, 3)))
    assert report.changed == {
        "label_emb.weight": "4 of 6 rows taken by name, the others are the mean of the checkpoint's"
    }


@pytest.mark.parametrize(("new", "taken"), [(2, [0, 1]), (4, [0, 1, 2])])
def test_rows_without_names_are_found_by_id(new: int, taken: list[int]) -> None:
    base, model = unet(class_cond=True, num_classes=3), fresh(unet(class_cond=True, num_classes=new))
    report = initialise(model, source(base, "abc"), mismatch="inflate")
    assert th.equal(model.label_emb.weight[: len(taken)], base.label_emb.weight[taken])
    assert "rows taken by id, as one side has no classes.json" in report.changed["label_emb.weight"]


def test_other_classes_in_the_same_number_are_not_mistaken_for_the_same() -> None:
    base, model = unet(class_cond=True, num_classes=3), fresh(unet(class_cond=True, num_classes=3))
    with pytest.raises(
        ValueError, match="its classes are c, a, t, without a null class, and those of the data a, c, t"
    ):
        initialise(model, source(base, "cat"), classes="act")
    initialise(model, source(base, "cat"), mismatch="inflate", classes="act")
    assert th.equal(model.label_emb.weight, base.label_emb.weight[[1, 0, 2]])
    own = fresh(unet(class_cond=True, num_classes=3)).label_emb.weight
    report = initialise(model := fresh(model), source(base, "cat"), mismatch="reinit", classes="act")
    assert th.equal(model.label_emb.weight, own)
    assert report.changed == {"label_emb.weight": "starts anew, as the classes are others"}
    null = fresh(unet(class_cond=True, num_classes=2, null_class=True))  # as many rows, of another meaning
    with pytest.raises(ValueError, match="does not fit"):
        initialise(null, source(base, num_classes=3, null_class=False))


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_a_classifier_finds_its_classes_by_name(pool: str) -> None:
    base, model = (classifier(classifier_pool=pool, num_classes=count) for count in (2, 3))
    filled(base)
    initialise(model, source(base, "ab"), mismatch="inflate", classes="xba")
    old, new = out(base), out(model)
    th.testing.assert_close(new[:, [2, 1]], old, rtol=0, atol=1e-5)
    th.testing.assert_close(new[:, 0], old.mean(dim=1), rtol=0, atol=1e-5)


def test_a_classifier_takes_the_encoder_of_a_diffusion_model() -> None:
    base, model = unet(class_cond=True, num_classes=2, num_channels=64), classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise(model, source(base), mismatch="reinit")
    assert {name.split(".")[0] for name in report.taken} == {"time_embed", "input_blocks", "middle_block"}
    assert set(report.changed) == {name for name in before if name.startswith("out.")}
    assert {name.split(".")[0] for name in report.unused} == {"label_emb", "output_blocks", "out"}
    for name, value in model.state_dict().items():
        assert th.equal(value, base.state_dict()[name] if name in report.taken else before[name])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            {},
            {"image_channels": 1},
            r"input_blocks.0.0.weight does not fit, as it was \[32, 3, 3, 3\] and is \[32, 1, 3, 3\]",
        ),
        ({}, {"num_res_blocks": 2}, r"input_blocks.2.0.in_layers.0.weight does not fit, as the checkpoint has none"),
        ({}, {"num_channels": 64}, r"time_embed.0.weight does not fit, as it was \[128, 32\] and is \[256, 64\]"),
    ],
)
def test_what_cannot_grow_is_refused_and_leaves_the_network_alone(old: Any, new: Any, said: str) -> None:
    base, model = unet(**old), fresh(unet(**new))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"cannot be inflated: {said}; give --init_mismatch reinit, or the flags"):
        initialise(model, source(base), mismatch="inflate")
    assert all(th.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"does not fit the network: .*; give --init_mismatch inflate"):
        initialise(model, source(base))


def test_an_upsampler_cannot_become_blind() -> None:
    with pytest.raises(ValueError, match=r"cannot be inflated: input_blocks\.0\.0\.weight"):
        initialise(fresh(unet()), source(upsampler()), mismatch="inflate")


def test_flags_are_the_configs_or_read_off_the_weights() -> None:
    base = unet(channel_mult="1,2", attention_resolutions="4")
    saved = {"image_size": 8, "channel_mult": "", "attention_resolutions": "4", "num_heads": 7}
    assert flags_for(source(base, **saved), UNET, None, 64)["channel_mult"] == ""
    larger = flags_for(source(base, **saved), UNET, 32, 64)
    assert (larger["channel_mult"], larger["attention_resolutions"], larger["num_heads"]) == ("1,2", "16", 7)
    bare = flags_for(source(base), UNET, None, 16)
    assert (bare["attention_resolutions"], bare["num_channels"], "num_heads" in bare) == ("8", 32, False)
    up = flags_for(source(base, **saved), UPSAMPLER, None, 64)
    assert (up["channel_mult"], up["attention_resolutions"], up["num_heads"]) == ("1,2", "32", 7)
    judge = flags_for(source(base, **saved), CLASSIFIER, None, 64)
    assert (judge["classifier_width"], judge["classifier_depth"]) == (32, 1)
    assert (judge["classifier_channel_mult"], judge["classifier_attention_resolutions"]) == ("1,2", "4")


def test_kinds_that_cannot_follow_each_other() -> None:
    for model, kind in ((classifier(), UNET), (upsampler(), UNET), (upsampler(), CLASSIFIER)):
        with pytest.raises(ValueError, match=f"from which no {kind} can start"):
            flags_for(source(model), kind, None, 8)


def test_adapters_are_named_rightly(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse("image_train", ["--lora_on", "atention"])
    assert (
        "no layer that carries adapters: name some of attention,convolutions; did you mean attention?"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("input_block.*", "--freeze input_block.* matches no parameter; did you mean input_blocks.*?"),
        ("out.*,midle_block.1.qkv.weight", "did you mean middle_block.1.qkv.weight?"),
        ("xyz", "--freeze xyz matches no parameter: there are time_embed.*, input_blocks.*, middle_block.*"),
        (" , ", "--freeze  ,  matches no parameter"),
    ],
)
def test_patterns_that_make_no_sense(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        freeze(unet(), text)


def stream(count: int = 4) -> Any:
    images = th.linspace(-1, 1, count * 192).view(count, 3, 8, 8)
    while True:
        yield images, {}


def train(folder: Path, model: Any, steps: int, **options: Any) -> None:
    logger.configure(dir=str(folder), format_strs=["log"])
    usual: dict[str, Any] = {"batch_size": 4, "microbatch": 2, "lr": 1e-2, "ema_rate": "0.5", "weight_decay": 0.3}
    more: dict[str, Any] = {"log_interval": 100, "save_interval": 1, "resume_checkpoint": ""}
    process = build_diffusion(DiffusionConfig(diffusion_steps=40))
    TrainLoop(model=model, diffusion=process, data=stream(), max_steps=steps, **{**usual, **more, **options}).run_loop()


@pytest.mark.parametrize("precision", few(["fp32", "bf16", "fp16"], ["bf16"]))
def test_frozen_parameters_stay_what_they_are(tmp_path: Path, precision: str) -> None:
    """No update, no decay, no drift of the average; and a resumed run is the unbroken one."""
    before = unet().state_dict()
    for folder, parts in (("whole", [2]), ("parts", [1, 2])):
        for steps in parts:
            model = unet() if steps == parts[0] else fresh(unet())
            frozen = freeze(model, "input_blocks.*, time_embed.[02].bias")
            resumed = "" if steps == parts[0] else str(tmp_path / folder)
            options = {"precision": precision, "initial_lg_loss_scale": 8.0, "resume_checkpoint": resumed}
            train(tmp_path / folder, model, steps, **options)
    assert {name.split(".")[0] for name in frozen} == {"input_blocks", "time_embed"}
    for kind in ("model", "ema_0.5_"):
        one, two = (checkpoints.load(str(tmp_path / folder / f"{kind}000002.pt")) for folder in ("whole", "parts"))
        assert {name for name in one if th.equal(one[name], before[name])} == set(frozen)
        assert all(th.equal(one[name], two[name]) for name in one)
    saved = checkpoints.load(str(tmp_path / "parts" / "opt000002.pt"))
    names = [name for name, _ in unet().named_parameters()]
    assert saved["param_groups"][0]["params"] == list(range(len(names)))
    assert [names[index] for index in sorted(saved["state"])] == [name for name in names if name not in frozen]


def command_line(**flags: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Eight pictures of the classes a and b."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[index % 2]}_{index}.png")
    return str(folder)


@pytest.fixture
def trained(tmp_path: Path, pictures: str) -> Path:
    """The folder of a run of one step, whose average is not its model."""
    folder, flags = (
        tmp_path / "base",
        {"image_size": 8, "class_cond": True, "num_classes": 2, "noise_schedule": "cosine"},
    )
    more = {"log_dir": folder, "data_dir": pictures, "max_steps": 1, "lr": 0.01, "ema_rate": 0.5, "null_class": True}
    image_train.main(command_line(**COMMAND, **TINY, **flags, **more))
    return folder


def loaded(folder: Path, name: str) -> dict[str, th.Tensor]:
    return checkpoints.load(str(folder / name))


def equal(one: dict[str, th.Tensor], two: dict[str, th.Tensor]) -> bool:
    return set(one) == set(two) and all(th.equal(one[name], two[name]) for name in one)


def test_a_run_starts_from_another_and_goes_on_without_it(tmp_path: Path, pictures: str, trained: Path) -> None:
    flags = {**COMMAND, "data_dir": pictures, "init_from": trained, "ema_rate": 0.5, "resume_checkpoint": "auto"}
    image_train.main(command_line(**flags, log_dir=tmp_path / "still", max_steps=1, lr=0))
    start = loaded(trained, "model000001.pt")  # as the average is longer than the run
    assert not equal(start, loaded(trained, "ema_0.5_000001.pt"))
    assert equal(start, loaded(tmp_path / "still", "model000001.pt"))
    assert equal(start, loaded(tmp_path / "still", "ema_0.5_000001.pt"))
    said = json.loads((tmp_path / "still" / "init.json").read_text())
    assert (said["path"], len(said["taken"]), said["changed"]) == (
        str(trained / "model000001.pt"),
        said["total"],
        {},
    )
    config = checkpoints.config_beside(str(tmp_path / "still"))
    assert {name: config[name] for name in TINY} == TINY
    assert (config["noise_schedule"], config["null_class"]) == ("cosine", True)

    flags |= {"freeze": "input_blocks.*", "lr": 0.01, "save_interval": 2}
    image_train.main(command_line(**flags, log_dir=tmp_path / "whole", max_steps=3))
    image_train.main(command_line(**flags, log_dir=tmp_path / "parts", max_steps=2))
    shutil.rmtree(trained)
    image_train.main(command_line(**flags, log_dir=tmp_path / "parts", max_steps=3))
    for name in ("model000003.pt", "ema_0.5_000003.pt"):
        assert equal(loaded(tmp_path / "whole", name), loaded(tmp_path / "parts", name))
        kept = {key for key, value in loaded(tmp_path / "whole", name).items() if th.equal(value, start[key])}
        assert kept == {key for key in start if key.startswith("input_blocks.")}
    assert "init_from" not in (tmp_path / "parts" / "log.txt").read_text().split("resuming at step 2")[1]


def test_a_network_without_labels_starts_from_one_with_labels(tmp_path: Path, pictures: str, trained: Path) -> None:
    flags = {**COMMAND, "data_dir": pictures, "init_from": trained, "init_mismatch": "reinit", "class_cond": False}
    image_train.main(command_line(**flags, log_dir=tmp_path / "next", max_steps=1, lr=0))
    start, after = loaded(trained, "model000001.pt"), loaded(tmp_path / "next", "model000001.pt")
    assert equal({name: start[name] for name in start if name != "label_emb.weight"}, after)


def test_adapters_through_the_commands(tmp_path: Path, pictures: str, trained: Path) -> None:
    flags = {**COMMAND, "data_dir": pictures, "init_from": trained, "ema_rate": 0.5, "lr": 0.05, "save_interval": 1}
    flags |= {"lora_rank": 2, "lora_alpha": 4, "lora_on": "convolutions", "lora_train": "label_emb.*"}
    image_train.main(command_line(**flags, log_dir=tmp_path / "tuned", max_steps=3))
    image_train.main(command_line(**flags, log_dir=tmp_path / "parts", max_steps=2))
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    image_train.main(command_line(resume_checkpoint=tmp_path / "moved", log_dir=tmp_path / "on", max_steps=3))
    for name in ("model000003.pt", "ema_0.5_000003.pt"):
        assert equal(loaded(tmp_path / "tuned", name), loaded(tmp_path / "on", name))

    sampling = {"num_samples": 2, "batch_size": 2, "timestep_respacing": 3}
    ways: dict[str, dict[str, Any]] = {
        "base": {"model_path": trained},
        "merged": {"model_path": tmp_path / "tuned"},
        "applied": {"model_path": trained, "lora_path": tmp_path / "tuned"},
        "none": {"model_path": trained, "lora_path": tmp_path / "tuned" / "lora000003", "lora_scale": 0},
    }
    for name, way in ways.items():
        image_sample.main(command_line(**sampling, **way, log_dir=tmp_path / name))
    base, merged, applied, none = (np.load(tmp_path / name / "samples_2x8x8x3.npz")["arr_0"] for name in ways)
    assert (applied == merged).all()
    assert (none == base).all()
    assert (merged != base).any()


def refused(capsys: pytest.CaptureFixture[str], main: Any, **flags: Any) -> str:
    """What a command prints before it ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(command_line(**flags))
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(errors.strip().splitlines()) == 1
    return errors


def test_what_does_not_fit_is_said_before_anything_is_trained(
    tmp_path: Path, pictures: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**COMMAND, "data_dir": pictures, "log_dir": tmp_path / "out", "init_from": trained, "max_steps": 1}
    said = refused(capsys, image_train.main, **flags, learn_sigma=True)
    assert "the checkpoint has learn_sigma False, you gave True; give --init_mismatch inflate" in said
    said = refused(capsys, image_train.main, **flags, num_classes=5, init_mismatch="reinit", lora_rank=2)
    assert (
        "label_emb.weight is not the checkpoint's, and adapters would leave it as it is: name it in --lora_tr" in said
    )
    said = refused(capsys, image_train.main, **flags, resume_checkpoint=trained)
    assert "--init_from starts a run and --resume_checkpoint goes on with one" in said
    said = refused(capsys, image_train.main, **{**flags, "init_from": trained / "opt000001.pt"})
    assert "holds optimizer state: use" in said
    checkpoints.save(str(tmp_path / "odd.pt"), {"weight": th.zeros(2)})
    said = refused(capsys, image_train.main, **{**flags, "init_from": tmp_path / "odd.pt"})
    assert "is no U-Net, upsampler or classifier" in said
    assert not any(name.endswith(".pt") for name in os.listdir(tmp_path / "out"))


def test_upsamplers_and_classifiers_start_from_a_bare_file(tmp_path: Path, pictures: str, trained: Path) -> None:
    bare = tmp_path / "bare" / "ours.pt"  # as the originals' files come: nothing beside it
    bare.parent.mkdir()
    shutil.copy(trained / "model000001.pt", bare)
    weights, flags = checkpoints.load(str(bare)), {**COMMAND, "data_dir": pictures, "init_from": bare, "lr": 0}
    flags |= {"max_steps": 1, "num_classes": 3}
    sizes = {"large_size": 8, "small_size": 4, "init_mismatch": "inflate", "num_head_channels": 32}
    super_res_train.main(command_line(**flags, **sizes, log_dir=tmp_path / "up"))
    up = loaded(tmp_path / "up", "model000001.pt")
    assert th.equal(up["input_blocks.0.0.weight"][:, :3], weights["input_blocks.0.0.weight"])
    assert not up["input_blocks.0.0.weight"][:, 3:].any()
    assert {name for name in up if not th.equal(up[name], weights[name])} == {"input_blocks.0.0.weight"}

    checkpoints.save(str(bare), unet(num_channels=64).state_dict())
    head = {"init_mismatch": "reinit", "classifier_pool": "spatial", "image_size": 8}
    classifier_train.main(command_line(**flags, **head, log_dir=tmp_path / "judge"))
    judge, weights = loaded(tmp_path / "judge", "model000001.pt"), checkpoints.load(str(bare))
    assert all(name.startswith("out.") or th.equal(judge[name], weights[name]) for name in judge)
    said = (tmp_path / "judge" / "log.txt").read_text()
    assert "of the checkpoint, not used: output_blocks.0.0.in_layers.0.weight" in said


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(tmp_path: Path, pictures: str, trained: Path, ranks: Nursery) -> None:
    flags = {**COMMAND, "data_dir": pictures, "init_from": trained, "max_steps": 2, "lr": 0.01, "ema_rate": 0.5}
    flags |= {"lora_rank": 2, "batch_size": 4}
    image_train.main(command_line(**flags, log_dir=tmp_path / "one"))
    words = command_line(**{**flags, "batch_size": 2, "log_dir": tmp_path / "two"})
    done = ranks.run([ROOT / "scripts" / "image_train.py", *words])
    assert done.returncode == 0, done.stderr
    base = loaded(trained, "model000001.pt")  # the average is longer than the run
    for name in ("model000002.pt", "ema_0.5_000002.pt"):
        one, two = (loaded(tmp_path / folder, name) for folder in ("one", "two"))
        th.testing.assert_close(one, two, rtol=0, atol=2e-3)
        frozen = {key for key in one if th.equal(one[key], base[key])}
        assert frozen == {key for key in two if th.equal(two[key], base[key])}
        assert 0 < len(one) - len(frozen) == len(checkpoints.load(str(tmp_path / "one" / "state000002.pt"))["base"])
    assert finetuning.open_source(str(tmp_path / "two")).kind == UNET


def test_the_pages_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "finetuning.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec", dont_inherit=True), names)
    assert "out.2.weight, out.2.bias: 6 outputs from 3, the others start at 0" in capsys.readouterr().out
    assert set(names["plain"]) == set(names["base"].state_dict())
