"""Requests of folders: what may go on where something lies already."""

from __future__ import annotations

import pytest

from guided_diffusion.runtime.results import read_request, refuse_another


def test_a_flag_that_is_newer_than_the_folder_had_its_default_then():
    there = {"seed": 1, "image_size": 32}
    usual = {"zero_terminal_snr": False}
    refuse_another(there, {**there, "zero_terminal_snr": False}, "runs/a", defaults=usual)
    with pytest.raises(ValueError, match="zero_terminal_snr was False and is True"):
        refuse_another(there, {**there, "zero_terminal_snr": True}, "runs/a", defaults=usual)


def test_what_no_flag_is_has_no_default():
    with pytest.raises(ValueError, match="fingerprint was None and is abc"):
        refuse_another({"seed": 1}, {"seed": 1, "fingerprint": "abc"}, "runs/a")
    with pytest.raises(ValueError, match="zero_terminal_snr was False and is None"):
        refuse_another({"zero_terminal_snr": False}, {}, "runs/a")


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"a": 1, "a": 2}'])
def test_a_request_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "request.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"request\.json does not say whose samples lie there"):
        read_request(str(path))
