"""Folders claimed for a request, and the class labels of jobs."""

from __future__ import annotations

import pytest

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.jobs import RestartableJob

DEFAULTS = {"zero_terminal_snr": False}


@pytest.mark.parametrize(
    ("earlier", "request_now", "message"),
    [
        ({"seed": 1, "labels": [0]}, {"seed": 1, "labels": (0,)}, ""),  # as JSON values
        ({"seed": 1}, {"seed": 1, "zero_terminal_snr": False}, ""),  # a flag that is newer than the folder
        ({"seed": 1}, {"seed": 1, "zero_terminal_snr": True}, "zero_terminal_snr was False and is True"),
        ({"seed": 1}, {"seed": 1, "fingerprint": "abc"}, "fingerprint was None and is abc"),
        ({"zero_terminal_snr": False}, {}, "zero_terminal_snr was False and is None"),
        ({}, {str(number): number for number in range(6)}, "3 was None and is 3, and 2 more"),
    ],
)
def test_a_folder_goes_on_with_its_own_request_alone(tmp_path, earlier, request_now, message):
    job = RestartableJob(out_dir=str(tmp_path), batch_size=1, request_defaults=DEFAULTS)
    assert job.claim(earlier, ["a.npz"]) is False
    (tmp_path / "a.npz").write_bytes(b"")
    if message:
        with pytest.raises(UserError, match=message):
            job.claim(request_now, ["a.npz"])
    else:
        assert job.claim(request_now, ["a.npz"]) is True


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000, b"", b"\xff"], ids=range(7)
)
def test_a_request_that_is_none_is_named(tmp_path, content):
    (tmp_path / "request.json").write_bytes(content)
    with pytest.raises(UserError, match=r"request\.json does not say whose results lie there"):
        RestartableJob(out_dir=str(tmp_path), batch_size=1).claim({"seed": 1}, [])
