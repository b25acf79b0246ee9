"""Flags read off weights: of the published checkpoints, and of any network that the factory builds."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch as th
from hypothesis import given, settings, strategies as st

from guided_diffusion.config import ClassifierConfig, SuperResConfig, UNetConfig
from guided_diffusion.networks.architecture import architecture
from guided_diffusion.script_util import build_classifier, build_unet, build_upsampler

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "checkpoints.json").read_text())
READABLE = {
    "num_channels",
    "num_res_blocks",
    "use_scale_shift_norm",
    "resblock_updown",
    "learn_sigma",
    "class_cond",
    "image_channels",
    "dims",
    "channel_mult",
    "attention_resolutions",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_tell_their_flags(name):
    entry = PUBLISHED[name]
    state = {key: th.zeros(shape, device="meta") for key, shape in entry["shapes"].items()}
    flags = entry["flags"]
    if entry["kind"] == "classifier":
        expected = {**asdict(ClassifierConfig()), **flags}
        found = architecture(state)  # the attention pool tells the size
        unreadable = {
            "latent_factor",
            "latent_channels",
            "classifier_norm_groups",
            "classifier_use_fp16",
            "classifier_precision",
            "classifier_channel_mult",
        }
        assert {key: found.get(key) for key in expected if key not in unreadable} == {
            key: value for key, value in expected.items() if key not in unreadable
        }
        return
    found = architecture(state, flags.get("large_size", flags.get("image_size")))
    wanted = {key: value for key, value in flags.items() if key in READABLE}
    assert {key: found[key] for key in wanted} == wanted
    assert found["dims"] == 2
    assert found["image_channels"] == 3
    assert found.get("num_classes") == (1000 if flags["class_cond"] else None)


networks = st.fixed_dictionaries(
    {
        "image_size": st.just(32),
        "num_channels": st.sampled_from([64, 128]),
        "num_res_blocks": st.integers(1, 3),
        "channel_mult": st.sampled_from(["1", "1,1", "1,2", "1,1,2", "2,1,1,3", "1,1.5,2"]),
        "attention_resolutions": st.sampled_from(["", "32"]),
        "class_cond": st.booleans(),
        "num_classes": st.sampled_from([3, 1000]),
        "image_channels": st.sampled_from([1, 3, 4]),
        "dims": st.sampled_from([1, 2]),
        "use_scale_shift_norm": st.booleans(),
        "resblock_updown": st.booleans(),
    }
)


@settings(max_examples=15, deadline=None)
@given(networks, st.booleans())
def test_a_network_tells_the_flags_that_built_it(flags, learn_sigma):
    with th.device("meta"):
        model = build_unet(UNetConfig(**flags, num_head_channels=32), learn_sigma)
    found = architecture(model.state_dict(), flags["image_size"])
    expected = {**flags, "learn_sigma": learn_sigma}
    if not flags["class_cond"]:
        del expected["num_classes"]
    if "," not in flags["channel_mult"]:
        del expected["resblock_updown"]  # there is nothing to resample
    del expected["image_size"]
    assert found == expected


def test_a_null_class_looks_like_one_more_class():
    with th.device("meta"):
        flags = {"image_size": 32, "num_channels": 32, "attention_resolutions": "", "class_cond": True}
        model = build_unet(UNetConfig(**flags, num_classes=3, null_class=True), False)
    found = architecture(model.state_dict(), 32)
    assert (found["num_classes"], found["class_cond"], "null_class" in found) == (4, True, False)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("updown", [True, False])
def test_a_classifier_tells_its_pool(pool, dims, updown):
    config = ClassifierConfig(
        image_size=32,
        dims=dims,
        num_classes=7,
        classifier_pool=pool,
        classifier_width=64,
        classifier_depth=2,
        classifier_channel_mult="1,2,2",
        classifier_attention_resolutions="16,8",
        classifier_resblock_updown=updown,
    )
    with th.device("meta"):
        state = build_classifier(config).state_dict()
    found = architecture(state, 32)
    assert found == {key: value for key, value in asdict(config).items() if key in found}
    unseen = {"image_size", "latent_factor", "latent_channels", "classifier_use_fp16", "classifier_precision"}
    unseen |= {"classifier_norm_groups"}
    assert set(asdict(config)) - set(found) == unseen
    assert architecture(state).get("image_size") == (32 if pool == "attention" and dims == 2 else None)


def test_an_upsampler_of_colour_images_is_known_by_its_six_channels():
    config = SuperResConfig(large_size=32, small_size=8, num_channels=32, attention_resolutions="")
    for learn_sigma in (True, False):
        with th.device("meta"):
            found = architecture(build_upsampler(config, learn_sigma).state_dict(), 32)
        assert (found["image_channels"], found["learn_sigma"]) == (3, learn_sigma)


def test_where_several_depths_fit_none_is_claimed():
    """Four blocks of one width: two levels of depth 1, or one of depth 3."""
    flags = {"classifier_pool": "spatial", "classifier_attention_resolutions": "", "classifier_width": 64}
    with th.device("meta"):
        model = build_classifier(ClassifierConfig(classifier_depth=1, classifier_channel_mult="1,1", **flags))
    found = architecture(model.state_dict())
    assert found["classifier_width"] == 64
    assert not {"classifier_depth", "classifier_channel_mult", "classifier_resblock_updown"} & set(found)


def test_other_networks_tell_nothing():
    assert architecture(th.nn.Linear(2, 2).state_dict()) == {}


@pytest.mark.parametrize("name", ["out.2.weight", "middle_block.0.emb_layers.1.weight", "input_blocks.1.0.in_layers.0"])
def test_a_part_of_a_network_tells_nothing(name):
    flags = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "attention_resolutions": ""}
    with th.device("meta"):
        state = build_unet(UNetConfig(**flags), False).state_dict()
    whole = architecture(state, 16)
    found = architecture({key: value for key, value in state.items() if not key.startswith(name)}, 16)
    assert found != whole
