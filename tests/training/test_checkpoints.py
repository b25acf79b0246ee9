"""Files of a run: whole or absent, found by any of their names, refused with a sentence."""

import argparse
import json
import os
import types

import numpy as np
import pytest
import safetensors.torch
import torch as th
from runs import load_weights

from guided_diffusion import logger
from guided_diffusion.config import ClassifierConfig, UNetConfig
from guided_diffusion.runtime.files import write_json
from guided_diffusion.script_util import build_classifier, build_unet
from guided_diffusion.training import checkpoints

TINY = UNetConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="")


def tiny(**flags):
    return build_unet(UNetConfig(**{**vars(TINY), **flags}), learn_sigma=False)


def write_set(folder, step, *, kinds=("model", "ema_0.99_", "ema_0.9999_", "opt", "state")):
    for kind in kinds:
        checkpoints.save(os.path.join(folder, f"{kind}{step:06d}.pt"), {"step": step})


def test_a_write_that_fails_leaves_the_old_file_and_no_debris(tmp_path):
    path = str(tmp_path / "run" / "model000001.pt")
    checkpoints.save(path, {"a": th.ones(3)})
    with pytest.raises(TypeError):
        write_json(path, {"not json": object()})
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save(path, {"a": th.zeros(3), "b": lambda: 0})
    assert th.equal(checkpoints.load(path)["a"], th.ones(3))
    assert os.listdir(tmp_path / "run") == ["model000001.pt"]


def test_safetensors_hold_the_same_weights(tmp_path):
    model = tiny()
    path = str(tmp_path / "ema_0.99_000007.safetensors")
    safetensors.torch.save_file(model.state_dict(), path)
    other = tiny()
    load_weights(other, checkpoints.open_checkpoint(str(tmp_path)).path)
    assert all(th.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class NotATensor:
    pass


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"hello\n", b"<html>", None])
def test_a_damaged_file_is_refused_with_its_size(tmp_path, content):
    path = tmp_path / "model000001.pt"
    if content is None:
        checkpoints.save(str(path), {"a": th.ones(1000)})
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model000001.pt \({len(content)} bytes\) cannot be read"):
        checkpoints.load(str(path))
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoints.load(str(tmp_path / "w.safetensors"))


def test_objects_other_than_tensors_are_never_unpickled(tmp_path):
    th.save(NotATensor(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        checkpoints.load(str(tmp_path / "model.pt"))


def test_a_missing_file_is_answered_with_those_beside_it(tmp_path):
    write_set(tmp_path, 5)
    with pytest.raises(FileNotFoundError, match=r"model000006.pt' does not exist; beside it lie .*model000005.pt"):
        checkpoints.open_checkpoint(str(tmp_path / "model000006.pt"))
    for path in ("", "nowhere.pt"):
        with pytest.raises(FileNotFoundError, match=r"does not exist: give the path of a checkpoint, or the folder"):
            checkpoints.open_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"model000006.pt does not exist"):
        checkpoints.load(str(tmp_path / "model000006.pt"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoints.find_set(str(tmp_path / "nowhere" / "model000006.pt"))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("model070000.pt", 70000),
        ("gs://bucket/run/opt000010.pt", 10),
        ("a/ema_0.9999_1234567.pt", 1234567),
        ("model_070000.pt", 70000),
        ("state000003.pt", 3),
        ("256x256_diffusion_uncond.pt", None),
        ("model070000.txt", None),
    ],
)
def test_names_tell_the_step_or_nothing(name, step):
    assert checkpoints.step_of(name) == step


@pytest.mark.parametrize("name", ["model000020.pt", "ema_0.99_000020.pt", "opt000020.pt", "state000020.pt"])
def test_any_file_of_a_set_finds_the_others(tmp_path, name):
    write_set(tmp_path, 10)
    write_set(tmp_path, 20)
    found = checkpoints.find_set(str(tmp_path / name))
    assert found.step == 20
    assert sorted(map(os.path.basename, found.files)) == sorted(n for n in os.listdir(tmp_path) if "20.pt" in n)
    assert sorted(found.emas) == ["0.99", "0.9999"]
    assert found.best.endswith("ema_0.9999_000020.pt")


def test_a_folder_means_its_newest_complete_set(tmp_path):
    for step in (10, 9, 100):
        write_set(tmp_path, step)
    os.remove(tmp_path / "state000100.pt")
    assert checkpoints.find_set(str(tmp_path)).step == 10
    for step in (9, 10):
        os.remove(tmp_path / f"state{step:06d}.pt")
    os.remove(tmp_path / "opt000100.pt")
    assert checkpoints.find_set(str(tmp_path)).step == 10  # a run that wrote no states: the optimizer was the last
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no modelNNNNNN"):
        checkpoints.find_set(str(tmp_path / "empty"))


def test_a_set_without_a_model_starts_from_its_average_or_not_at_all(tmp_path):
    write_set(tmp_path, 3, kinds=("ema_0.99_", "opt"))
    assert checkpoints.find_set(str(tmp_path / "ema_0.99_000003.pt")).model.endswith("ema_0.99_000003.pt")
    with pytest.raises(ValueError, match=r"no model000003.pt beside it"):
        checkpoints.find_set(str(tmp_path / "opt000003.pt"))


def test_a_renamed_file_is_weights_of_an_unknown_step(tmp_path):
    checkpoints.save(str(tmp_path / "lsun_cat.pt"), {})
    found = checkpoints.find_set(str(tmp_path / "lsun_cat.pt"))
    assert (found.step, found.model, found.files) == (None, str(tmp_path / "lsun_cat.pt"), [found.model])


def test_sampling_takes_the_newest_average_then_the_newest_model(tmp_path):
    folder = str(tmp_path)
    with pytest.raises(ValueError, match="holds no ema_RATE"):
        checkpoints.open_checkpoint(folder)
    write_set(tmp_path, 9, kinds=("model", "opt"))
    write_set(tmp_path, 1000000, kinds=("model",))
    assert checkpoints.open_checkpoint(folder).path.endswith("model1000000.pt")
    write_set(tmp_path, 10008)
    assert checkpoints.open_checkpoint(folder).path.endswith("ema_0.9999_010008.pt")
    assert checkpoints.open_checkpoint(str(tmp_path / "model000009.pt")).path == str(tmp_path / "model000009.pt")


@pytest.mark.parametrize(
    ("step", "warmed_up", "kinds", "taken"),
    [
        (9999, False, ("model", "ema_0.99_", "ema_0.9999_"), "ema_0.99_009999.pt"),
        (10000, False, ("model", "ema_0.99_", "ema_0.9999_"), "ema_0.9999_010000.pt"),
        (99, False, ("model", "ema_0.99_", "ema_0.9999_"), "model000099.pt"),
        (99, False, ("ema_0.99_", "ema_0.9999_"), "ema_0.9999_000099.pt"),
        (99, True, ("model", "ema_0.99_", "ema_0.9999_"), "ema_0.9999_000099.pt"),
        (9, False, ("model", "ema_1.0_"), "model000009.pt"),
    ],
)
def test_sampling_takes_the_slowest_average_that_is_no_longer_than_the_run(tmp_path, step, warmed_up, kinds, taken):
    write_set(tmp_path, step, kinds=kinds)
    for flags in ({"ema_warmup": warmed_up}, {"ema_start": 9 * warmed_up}):
        write_json(str(tmp_path / "config.json"), {"flags": flags})
        assert checkpoints.open_checkpoint(str(tmp_path)).path == str(tmp_path / taken)


def test_config_and_classes_lie_beside_the_weights(tmp_path):
    write_set(tmp_path, 1)
    path = str(tmp_path / "ema_0.99_000001.pt")
    assert checkpoints.config_beside(path) == {}
    assert checkpoints.classes_beside(path) == ""
    write_json(str(tmp_path / "config.json"), {"command": "image_train", "flags": {"image_size": 8}})
    (tmp_path / "classes.json").write_text("{}")
    for where in (path, str(tmp_path)):
        assert checkpoints.config_beside(where) == {"image_size": 8}
        assert checkpoints.classes_beside(where) == str(tmp_path / "classes.json")
    for damaged in ("{", "[]", json.dumps({"flags": 3})):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="is no config of a run"):
            checkpoints.config_beside(path)


def refusal(tmp_path, model, state, name="model000004.pt", **flags):
    checkpoints.save(str(tmp_path / name), state)
    with pytest.raises(ValueError, match=name) as caught:
        load_weights(model, str(tmp_path / name), **{**vars(TINY), **flags})
    return str(caught.value)


def test_a_mismatch_names_the_flags_that_differ(tmp_path):
    message = refusal(tmp_path, tiny(), tiny(num_channels=64, channel_mult="1,2,2", class_cond=True).state_dict())
    assert "the checkpoint has num_channels 64, you gave 32" in message
    assert "the checkpoint has channel_mult 1,2,2, you gave 1,2" in message
    assert "the checkpoint has class_cond True, you gave False" in message
    assert "num_res_blocks" not in message
    message = refusal(tmp_path, tiny(), tiny(attention_resolutions="4").state_dict())
    assert message.endswith("the checkpoint has attention_resolutions 4, you gave ''")


def test_numbers_of_classes_that_differ_by_one_recall_the_null_class(tmp_path):
    three = tiny(class_cond=True, num_classes=3)
    null = tiny(class_cond=True, num_classes=3, null_class=True)
    hint = " (counting the row that --class_dropout adds)"
    assert refusal(tmp_path, three, null.state_dict()).endswith(f"has num_classes 4, you gave 3{hint}")
    assert refusal(tmp_path, null, three.state_dict()).endswith(f"has num_classes 3, you gave 4{hint}")
    five = tiny(class_cond=True, num_classes=5).state_dict()
    assert refusal(tmp_path, three, five).endswith("has num_classes 5, you gave 3")
    kind = {"classifier_attention_resolutions": "", "classifier_pool": "adaptive", "classifier_width": 64}
    small, large = (build_classifier(ClassifierConfig(image_size=8, num_classes=number, **kind)) for number in (3, 4))
    assert refusal(tmp_path, small, large.state_dict()).endswith("has num_classes 4, you gave 3")


def test_a_classifier_given_as_a_model_is_told_apart(tmp_path):
    flags = {"classifier_pool": "adaptive", "classifier_attention_resolutions": ""}
    classifier = build_classifier(ClassifierConfig(image_size=8, classifier_width=64, **flags))
    assert "another kind of network" in refusal(tmp_path, tiny(), classifier.state_dict())
    assert "another kind of network" in refusal(tmp_path, classifier, tiny().state_dict())


def test_a_mismatch_that_no_flag_explains_names_tensors(tmp_path):
    state = tiny().state_dict()
    state["extra"] = state.pop("out.0.weight")
    state["out.0.bias"] = th.zeros(3)
    message = refusal(tmp_path, tiny(), state)
    assert "missing: out.0.weight" in message
    assert "unknown: extra" in message
    assert "of another shape: out.0.bias [3] instead of [32]" in message


def test_optimizer_state_given_as_a_model_names_the_file_to_use(tmp_path):
    optimizer = th.optim.AdamW(tiny().parameters()).state_dict()
    assert "holds optimizer state: use a file ema_RATE" in refusal(tmp_path, tiny(), optimizer, "opt000004.pt")
    checkpoints.save(str(tmp_path / "model000004.pt"), {})
    checkpoints.save(str(tmp_path / "ema_0.9999_000004.pt"), {})
    message = refusal(tmp_path, tiny(), optimizer, "opt000004.pt")
    assert f"use {tmp_path}/ema_0.9999_000004.pt beside it" in message
    assert "no weights of a network" in refusal(tmp_path, tiny(), {"step": 4}, "state000004.pt")


def test_nothing_is_loaded_from_a_file_that_does_not_fit(tmp_path):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: th.ones_like(value) for name, value in before.items()} | {"extra": th.ones(1)}
    refusal(tmp_path, model, state)
    assert all(th.equal(value, before[name]) for name, value in model.state_dict().items())


# as programs save them: with an EMA beside the weights, or inside of what trained them, or among notes of the run
def behind(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


NOTES = {
    "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.99)),
    "best_fid": np.float64(12.5),
    "history": np.arange(3),
    "config": {"image_size": 8, "dtype": np.dtype("f4")},
    "epoch": 3,
}
WRAPPERS = {
    "state_dict": lambda plain, ema: {"state_dict": ema, **NOTES},
    "with an optimizer": lambda plain, ema: {"model": plain, "ema": ema, "opt": {"state": {}, "param_groups": []}},
    "timm": lambda plain, ema: {"state_dict": plain, "state_dict_ema": ema, **NOTES},
    "k-diffusion": lambda plain, ema: {
        "model": behind("inner_model.", plain),
        "model_ema": behind("inner_model.", ema),
    },
    "lucidrains": lambda plain, ema: {
        "step": 3,
        "model": behind("model.", plain),
        "ema": {
            "initted": th.tensor([True]),
            "step": th.tensor([9]),
            **behind("online_model.model.", plain),
            **behind("ema_model.model.", ema),
        },
        "version": "1.0",
    },
    "latent-diffusion": lambda plain, ema: {
        "state_dict": {**behind("model.diffusion_model.", ema), "first_stage_model.encoder.weight": th.ones(2)},
        "hyper_parameters": argparse.Namespace(**NOTES),
        "callbacks": {Exception: {"best": np.float32(1)}},
    },
    "compiled": lambda plain, ema: behind("module._orig_mod.", ema),
    "with a step": lambda plain, ema: {**ema, "step": 4},
    "rates": lambda plain, ema: {"params": plain, "params_ema": behind("module.", ema)},
    "net": lambda plain, ema: {"net": ema, "acc": np.int64(3)},
    "legacy": lambda plain, ema: {"net": ema, "epoch": 3},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_weights_that_other_programs_wrapped_are_found_and_the_average_preferred(tmp_path, name):
    ema, path = tiny(), str(tmp_path / "theirs.pt")
    plain = {key: value + 1 for key, value in ema.state_dict().items()}
    th.save(WRAPPERS[name](plain, ema.state_dict()), path, _use_new_zipfile_serialization=name != "legacy")
    logger.configure(str(tmp_path), ["log"])
    model = tiny()
    load_weights(model, path)
    assert all(th.equal(a, b) for a, b in zip(model.parameters(), ema.parameters(), strict=True))
    said = (tmp_path / "log.txt").read_text()
    assert (f"of {path} the weights at " in said) == (name != "with a step")
    assert ("are taken, not those at " in said) == (
        name in ("with an optimizer", "timm", "k-diffusion", "lucidrains", "rates")
    )


def test_a_file_without_weights_is_answered_by_what_it_holds(tmp_path):
    whole = types.SimpleNamespace(weight=th.ones(1))
    for content, sentence in (
        (
            {"epoch": 3, "log": [1, 2], **NOTES},
            "but 'epoch', 'log', 'args', 'best_fid', 'history', 'config': save the state_dict()",
        ),
        (whole, "but one object (types.SimpleNamespace): save the state_dict() of its network"),
        ([1, 2], "but one object (builtins.list)"),
        ({f"layer{i}": {"w": th.ones(1)} for i in range(20)}, "'layer11', and 8 more"),
    ):
        th.save(content, tmp_path / "theirs.pt")
        with pytest.raises(ValueError, match="holds no weights of a network") as caught:
            load_weights(tiny(), str(tmp_path / "theirs.pt"))
        assert sentence in str(caught.value)
        assert "again" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = tiny().state_dict()
    state["out.0.bias"] = th.full((32,), value)
    message = refusal(tmp_path, tiny(), state)
    assert f"not finite, in 1 of its {len(state)} tensors (out.0.bias is the first)" in message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\n<!DOCTYPE html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "the pointer that Git LFS leaves"),
        (b"", "it is an empty file"),
        (b"torn", "it is damaged, cut short, or no file of weights"),
        (b"PK\x03\x04 torn", "it is damaged, cut short, or no file of weights"),
    ],
)
def test_files_that_are_no_checkpoints_are_told_apart(tmp_path, content, what):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=what):
        checkpoints.load(str(tmp_path / "model.pt"))


def test_weights_saved_from_inside_a_data_parallel_wrapper(tmp_path):
    model, path = th.nn.Linear(2, 3), str(tmp_path / "wrapped.pt")
    checkpoints.save(path, {f"module.{name}": value + 1 for name, value in model.state_dict().items()})
    expected = {name: value + 1 for name, value in model.state_dict().items()}
    load_weights(model, path)
    assert all(th.equal(value, expected[name]) for name, value in model.state_dict().items())
