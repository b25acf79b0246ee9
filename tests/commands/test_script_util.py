"""The factory: every published model, sizes and resolutions, keywords, and its errors."""

from __future__ import annotations

import argparse
import inspect
import json
import shlex
from pathlib import Path

import pytest
import torch as th
from few import few

from guided_diffusion import script_util as su
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "checkpoints.json").read_text())
DEFAULTS = {
    "model": su.model_and_diffusion_defaults,
    "sr": su.sr_model_and_diffusion_defaults,
    "classifier": su.classifier_defaults,
}
UPSTREAM = json.loads((Path(__file__).parents[1] / "golden" / "flags.json").read_text())
TINY = {"num_channels": 32, "num_res_blocks": 1, "num_heads": 1}


def build(kind, **flags):
    flags = {**DEFAULTS[kind](), **flags}
    if kind == "classifier":
        return su.create_classifier(**flags)
    make = su.create_model_and_diffusion if kind == "model" else su.sr_create_model_and_diffusion
    return make(**flags)[0]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_checkpoints_fit_by_name_shape_and_order(name):
    row = PUBLISHED[name]
    with th.device("meta"):
        model = build(row["kind"], **row["flags"])
    ours = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert ours == [(key, shape) for key, shape in row["shapes"].items()]
    assert [name for name, _ in model.named_parameters()] == list(row["shapes"])
    assert sum(p.numel() for p in model.parameters()) == row["parameters"]


SIZES = [8, 16, 28, 32, 64, 96, 128, 224, 256, 512, 1024, "32x64", "96x64"]


@pytest.mark.parametrize("size", few(SIZES, [8, 28, 64, 512, "96x64"]))
@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_sizes_with_sensible_defaults(kind, size):
    with th.device("meta"):
        name = "attention_resolutions" if kind == "model" else "classifier_attention_resolutions"
        model = build(kind, **{"image_size": size, name: ""})
        height, width = (size, size) if isinstance(size, int) else map(int, size.split("x"))
        out = model(th.zeros(1, 3, height, width), th.zeros(1))
    assert out.shape == ((1, 3, height, width) if kind == "model" else (1, 1000))


@pytest.mark.parametrize(
    ("size", "mult", "message"),
    [
        (100, "", "image size 100 is not a multiple of 8, as the 4 levels of channel_mult 1,2,3,4 need: use 96 or 104"),
        (30, "1,2,4", "is not a multiple of 4, as the 3 levels of channel_mult 1,2,4 need: use 28 or 32"),
        ("64x100", "", "image size 100 is not a multiple of 8"),
        (64, "1,b", "channel_mult '1,b' is not a list of positive numbers"),
        (64, "1,0", "channel_mult '1,0' is not a list of positive numbers"),
        (2, "1,2,4", "use 4, or fewer levels"),
    ],
)
def test_sizes_that_do_not_divide(size, mult, message):
    with pytest.raises(ValueError, match=message):
        su.create_model(size, 32, 1, channel_mult=mult, attention_resolutions="")


def test_fractional_multipliers():
    model = su.create_model(32, 64, 1, channel_mult="0.5,1", attention_resolutions="16", num_heads=2)
    assert model.input_blocks[0][0].out_channels == 32
    assert model(th.randn(1, 3, 32, 32), th.zeros(1)).shape == (1, 3, 32, 32)


def attention_blocks(model):
    return sum(type(module).__name__ == "AttentionBlock" for module in model.modules())


def test_attention_that_never_occurs_is_an_error():
    with pytest.raises(
        ValueError, match="32, 16, 8 of '32,16,8' do not occur at size 96: its levels are 96, 48, 24, 12"
    ):
        su.create_model(96, 32, 1, attention_resolutions="32,16,8")


def test_attention_that_partly_occurs_is_a_warning_and_changes_no_keys():
    with pytest.warns(UserWarning, match="attention_resolutions 16 of '24,16' do not occur at size 96"):
        some = su.create_model(96, 32, 1, attention_resolutions="24,16")
    exact = su.create_model(96, 32, 1, attention_resolutions="24")
    assert list(some.state_dict()) == list(exact.state_dict())
    assert attention_blocks(some) > attention_blocks(su.create_model(96, 32, 1, attention_resolutions=""))


@pytest.mark.parametrize("text", ["a", "16,x", "0", "-8", "16.5"])
def test_attention_resolutions_must_be_numbers(text):
    with pytest.raises(ValueError, match="is not a list of resolutions"):
        su.create_model(64, 32, 1, attention_resolutions=text)


@pytest.mark.parametrize(("channels", "learn"), [(1, False), (3, True), (4, True), (7, False)])
def test_channels_and_classes(channels, learn):
    flags = {**TINY, "image_size": 16, "attention_resolutions": "8", "class_cond": True, "num_classes": 9}
    model = build("model", **flags, image_channels=channels, learn_sigma=learn)
    out = model(th.randn(2, channels, 16, 16), th.zeros(2), y=th.tensor([0, 8]))
    assert out.shape == (2, channels * (2 if learn else 1), 16, 16)
    assert model.label_emb.weight.shape[0] == model.num_classes == 9
    classifier = build(
        "classifier", image_size=16, image_channels=channels, num_classes=9, classifier_attention_resolutions="8"
    )
    assert classifier(th.randn(2, channels, 16, 16), th.zeros(2)).shape == (2, 9)


@pytest.mark.parametrize(("size", "ratio"), [(64, 4), (32, 2), (48, 3)])
def test_upsamplers_of_any_ratio(size, ratio):
    model = build("sr", **TINY, large_size=size, small_size=size // ratio, attention_resolutions="")
    low = th.randn(1, 3, size // ratio, size // ratio)
    assert model(th.randn(1, 3, size, size), th.zeros(1), low_res=low).shape == (1, 3, size, size)


@pytest.mark.parametrize("kind", ["model", "sr"])
def test_a_null_class_is_a_row_and_no_class(kind):
    flags = {**TINY, "attention_resolutions": "", "class_cond": True, "num_classes": 9}
    with th.device("meta"):
        plain, null = build(kind, **flags), build(kind, **flags, null_class=True)
    shapes, more = ({k: list(v.shape) for k, v in model.state_dict().items()} for model in (plain, null))
    assert list(more) == list(shapes)
    assert more == {**shapes, "label_emb.weight": [10, shapes["label_emb.weight"][1]]}
    assert (null.num_classes, null.null_label, plain.null_label) == (9, 9, None)
    with pytest.raises(ValueError, match="null_class needs a network with classes"):
        build(kind, **{**flags, "class_cond": False}, null_class=True)


def test_a_null_class_is_given_by_keyword_and_never_to_a_classifier():
    for make in (su.create_model, su.create_model_and_diffusion, su.sr_create_model, su.sr_create_model_and_diffusion):
        parameter = inspect.signature(make).parameters["null_class"]
        assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, False)
    with pytest.raises(TypeError, match="create_classifier has no keyword 'null_class'"):
        build("classifier", null_class=True)


def test_factories_of_networks_alone_and_with_their_process_build_the_same():
    flags = {**su.classifier_and_diffusion_defaults(), "image_size": 16, "classifier_attention_resolutions": "8"}
    both, process = su.create_classifier_and_diffusion(**{**flags, "diffusion_steps": 50})
    alone = su.create_classifier(**{name: flags[name] for name in su.classifier_defaults()})
    assert process.num_timesteps == 50
    assert list(both.state_dict()) == list(alone.state_dict())
    flags = {**su.sr_model_and_diffusion_defaults(), **TINY, "large_size": 32, "small_size": 16, "class_cond": True}
    both, process = su.sr_create_model_and_diffusion(**{**flags, "timestep_respacing": "ddim25"})
    process_flags = set(su.diffusion_defaults()) - {"learn_sigma"}
    alone = su.sr_create_model(**{name: value for name, value in flags.items() if name not in process_flags})
    assert process.num_timesteps == 25
    assert list(both.state_dict()) == list(alone.state_dict())


@pytest.mark.parametrize(
    ("flags", "loss", "mean", "var"),
    [
        ({}, "MSE", "EPSILON", "FIXED_LARGE"),
        ({"sigma_small": True}, "MSE", "EPSILON", "FIXED_SMALL"),
        ({"learn_sigma": True}, "MSE", "EPSILON", "LEARNED_RANGE"),
        ({"learn_sigma": True, "rescale_learned_sigmas": True}, "RESCALED_MSE", "EPSILON", "LEARNED_RANGE"),
        ({"use_kl": True, "rescale_learned_sigmas": True}, "RESCALED_KL", "EPSILON", "FIXED_LARGE"),
        ({"predict_xstart": True}, "MSE", "START_X", "FIXED_LARGE"),
    ],
)
def test_flags_of_the_process(flags, loss, mean, var):
    process = su.create_gaussian_diffusion(steps=50, timestep_respacing="10", **flags)
    assert process.loss_type is LossType[loss]
    assert process.model_mean_type is ModelMeanType[mean]
    assert process.model_var_type is ModelVarType[var]
    assert process.num_timesteps == 10
    assert su.create_gaussian_diffusion(steps=50).num_timesteps == 50


def test_a_precision_asked_for_by_name_is_given():
    model = build("model", **TINY, image_size=16, attention_resolutions="8", precision="bf16")
    assert model.dtype == th.bfloat16
    assert build("model", **TINY, image_size=16, attention_resolutions="8").dtype == th.float32


def test_keyword_sets_of_both_originals():
    old = {k: v for k, v in su.model_and_diffusion_defaults().items() if k in UPSTREAM["image_sample"]}
    flags = {**old, **TINY, "image_size": 16, "attention_resolutions": "8"}
    for more in ({}, {"use_neighborhood_attention": False}):
        assert su.create_model_and_diffusion(**flags, **more)[1].num_timesteps == 1000


def test_wrong_keywords():
    with pytest.raises(TypeError, match="create_model has no keyword 'num_chanels'; did you mean num_channels"):
        su.create_model(16, num_chanels=3, num_res_blocks=1)
    with pytest.raises(TypeError, match="missing a required argument: 'num_res_blocks'"):
        su.create_model(16, 32)
    with pytest.raises(TypeError, match="too many positional arguments"):
        su.create_classifier(*range(9))


def test_dictionaries_become_flags_and_come_back():
    parser = argparse.ArgumentParser()
    own = {"data_dir": "", "lr": 1e-4, "steps": 3, "flag": True, "nothing": None}
    su.add_dict_to_argparser(parser, own | su.model_and_diffusion_defaults())
    args = parser.parse_args(shlex.split("--lr 0.5 --flag no --nothing x --image_size 8x16 --class_cond true"))
    assert su.args_to_dict(args, own) == {"data_dir": "", "lr": 0.5, "steps": 3, "flag": False, "nothing": "x"}
    assert args.image_size == "8x16"
    assert args.class_cond is True
    assert args.num_channels == 128
    assert "betas over t" in parser.format_help()


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("F", False), ("1", True), ("off", False), (True, True)])
def test_str2bool(word, value):
    assert su.str2bool(word) is value


def test_str2bool_refuses_other_words():
    with pytest.raises(argparse.ArgumentTypeError, match="boolean value expected"):
        su.str2bool("maybe")


WITH_FLAGS = {
    "image_train": (su.model_and_diffusion_defaults, su.create_model_and_diffusion),
    "super_res_train": (su.sr_model_and_diffusion_defaults, su.sr_create_model_and_diffusion),
    "classifier_train": (su.classifier_and_diffusion_defaults, su.create_classifier_and_diffusion),
}
SHORT = {"num_channels": 32, "num_res_blocks": 1, "classifier_width": 64, "classifier_depth": 1, "learn_sigma": True}


@pytest.mark.parametrize("command", WITH_FLAGS)
def test_flags_that_the_originals_do_not_have_may_be_missing(command):
    defaults_of, create = WITH_FLAGS[command]
    keys = [*defaults_of(), "mine"]
    theirs = {name: default for name, (default, _) in UPSTREAM[command].items() if name in keys}
    args = argparse.Namespace(**{**theirs, **{k: v for k, v in SHORT.items() if k in theirs}, "mine": 3})
    flags = su.args_to_dict(args, iter(keys))
    assert list(flags) == keys
    assert flags.pop("mine") == 3
    added = {name: value for name, value in flags.items() if name not in theirs}
    assert added == {name: defaults_of()[name] for name in added}
    assert "num_classes" in added
    with th.device("meta"):
        assert create(**flags)[0].out_channels == (1000 if command == "classifier_train" else 6)
    for name in theirs:
        with pytest.raises(AttributeError, match=name):
            su.args_to_dict(argparse.Namespace(**{k: v for k, v in theirs.items() if k != name}), defaults_of())


def test_parsers_are_made_of_the_originals_dictionaries_and_more_keys():
    theirs = {name: default for name, (default, _) in UPSTREAM["image_sample"].items()}
    parser = argparse.ArgumentParser()
    su.add_dict_to_argparser(parser, {**theirs, "prompt": None, "cutn": 16, "steps": [], "save": False, "tv": 0.5})
    given = parser.parse_args(shlex.split("--image_size 128 --prompt 'a cat' --save yes --tv 1"))
    assert (given.image_size, given.prompt, given.cutn, given.save, given.tv) == (128, "a cat", 16, True, 1.0)
    assert vars(parser.parse_args([])).items() >= theirs.items()


def test_a_network_predicts_one_thing() -> None:
    with pytest.raises(ValueError, match=r"predict_v and predict_xstart are both True, .*: give one"):
        su.create_gaussian_diffusion(predict_v=True, predict_xstart=True)
