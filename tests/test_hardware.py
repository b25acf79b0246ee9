"""The precision that "auto" becomes, and what is said of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch as th

from guided_diffusion import cli
from guided_diffusion.commands import _performance as performance
from guided_diffusion.hardware import fastest_precision
from guided_diffusion.script_util import classifier_defaults, create_classifier, create_model


@pytest.fixture(params=[True, False])
def matrix_unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU with or without."""
    monkeypatch.setattr(th.cpu, "_is_amx_tile_supported", lambda: request.param)
    return bool(request.param)


def test_a_cpu_takes_bf16_where_it_has_a_unit_for_it(matrix_unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    precision, reason = fastest_precision("cpu")
    assert precision == ("bf16" if matrix_unit else "fp32")
    assert "AMX" in reason
    monkeypatch.setattr(th.backends.mkldnn, "is_available", lambda: False)
    assert fastest_precision("cpu").precision == "fp32"
    monkeypatch.delattr(th.cpu, "_is_amx_tile_supported")
    assert fastest_precision("cpu").precision == "fp32"


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_takes_fp16_where_bf16_would_be_emulated(
    native: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(th.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(th.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(th.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    choice = fastest_precision("cuda:1")
    assert choice.precision == precision
    assert choice.reason.startswith("GPU 1 ")


def test_nothing_is_guessed_of_other_devices() -> None:
    assert fastest_precision("mps") == ("fp32", "nothing is known of lower precisions on mps")


def test_flags_have_a_precision_in_place_of_auto(matrix_unit: bool) -> None:
    flags = cli.parse("classifier_sample", ["--precision=auto", "--classifier_precision=fp16", "--seed=3"])
    settled, lines = performance.with_precision(flags)
    expected = "bf16" if matrix_unit else "fp32"
    assert settled.given == {"precision": expected, "classifier_precision": "fp16", "seed": 3}
    assert [line.partition(", because this CPU has ")[0] for line in lines] == [f"precision auto: {expected}"]
    assert performance.with_precision(settled) == (settled, [])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--precision auto --use_fp16 True", "precision auto contradicts use_fp16 True"),
        ("--precision bf16 --use_fp16 True", "precision bf16 contradicts use_fp16 True"),
    ],
)
def test_contradictions_are_refused(words: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        performance.settled("precision", cli.parse("image_train", words.split()).values)


def test_networks_are_built_in_the_precision_of_the_device(matrix_unit: bool) -> None:
    expected = th.bfloat16 if matrix_unit else th.float32
    options: dict[str, Any] = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1"}
    assert create_model(**options, attention_resolutions="", precision="auto").dtype == expected
    own = {"image_size": 8, "classifier_width": 64, "classifier_depth": 1, "classifier_channel_mult": "1"}
    own |= {"classifier_attention_resolutions": "", "classifier_precision": "auto"}
    assert create_classifier(**{**classifier_defaults(), **own}).dtype == expected
