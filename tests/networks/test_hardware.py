"""The precision that "auto" becomes: what was measured decides, and is said."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch as th

from guided_diffusion.commands import flags as cli, training
from guided_diffusion.commands.common import precision_of
from guided_diffusion.networks import hardware
from guided_diffusion.networks.hardware import fastest_precision
from guided_diffusion.script_util import classifier_defaults, create_classifier, create_model

WIDTHS = (32, 64, 128, 224, 256)


def measured(monkeypatch: pytest.MonkeyPatch, bf16: float) -> None:
    """Let this process have measured so many seconds, where fp32 takes 50 ms."""
    for width in WIDTHS:
        monkeypatch.setitem(hardware.MEASURED, width, {"fp32": 0.05, "bf16": bf16})


@pytest.fixture(params=[True, False])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether bf16 was found to be faster here."""
    measured(monkeypatch, 0.01 if request.param else 0.1)
    return bool(request.param)


@pytest.mark.parametrize(("bf16", "precision"), [(0.01, "bf16"), (0.04, "bf16"), (0.048, "fp32"), (0.2, "fp32")])
def test_a_cpu_takes_bf16_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, bf16: float, precision: str
) -> None:
    measured(monkeypatch, bf16)
    for width in (16, 32, 33, 64, 250, 1024):
        choice = fastest_precision("cpu", width)
        assert choice.precision == precision
        assert f" channels took {1e3 * bf16:g} ms in bf16 and 50 ms in fp32 on this CPU" in choice.reason


def test_a_width_is_measured_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "MEASURED", {})
    state = th.get_rng_state()
    first = fastest_precision("cpu", 32)
    assert th.equal(th.get_rng_state(), state)
    seconds = hardware.MEASURED[32]
    assert min(seconds["fp32"], seconds["bf16"]) > 0
    assert first.precision == ("bf16" if seconds["bf16"] * hardware.GAIN < seconds["fp32"] else "fp32")
    assert fastest_precision("cpu", 32) == first
    assert list(hardware.MEASURED) == [32]


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


def test_flags_have_a_precision_in_place_of_auto(fast: bool) -> None:
    given = {"precision": "auto", "seed": 3}
    flags = cli.Flags("image_train", given)
    settled, lines = training.with_precision(flags)
    expected = "bf16" if fast else "fp32"
    assert settled.given == {**given, "precision": expected}
    assert [line.partition(", because a block of ")[0] for line in lines] == [f"precision auto: {expected}"]
    assert training.with_precision(settled) == (settled, [])


def test_a_resumed_run_keeps_the_precision_that_auto_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.2)
    (tmp_path / "model000001.pt").write_bytes(b"weights")
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"precision": "bf16", "use_fp16": False}}))
    words = [f"--resume_checkpoint={tmp_path / 'model000001.pt'}", "--data_dir=pictures"]
    for given, expected in (([], "bf16"), (["--precision=auto"], "bf16"), (["--precision=fp16"], "fp16")):
        flags = training.resolved(cli.parse("image_train", [*words, *given]))
        assert training.with_precision(flags)[0].values["precision"] == expected
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"precision": ""}}))
    flags = training.resolved(cli.parse("image_train", [*words, "--precision=auto"]))
    assert training.with_precision(flags)[0].values["precision"] == "fp32"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--precision auto --use_fp16 True", "precision auto contradicts use_fp16 True"),
        ("--precision bf16 --use_fp16 True", "precision bf16 contradicts use_fp16 True"),
    ],
)
def test_contradictions_are_refused(words: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        precision_of(cli.parse("image_train", words.split()).values)


def test_networks_are_built_in_the_precision_of_the_device(fast: bool) -> None:
    expected = th.bfloat16 if fast else th.float32
    options: dict[str, Any] = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1"}
    assert create_model(**options, attention_resolutions="", precision="auto").dtype == expected
    own = {"image_size": 8, "classifier_width": 64, "classifier_depth": 1, "classifier_channel_mult": "1"}
    own |= {"classifier_attention_resolutions": "", "classifier_precision": "auto"}
    assert create_classifier(**{**classifier_defaults(), **own}).dtype == expected
