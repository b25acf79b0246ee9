"""A minute of the soak; the command takes longer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import finish
from soak import SLACK, WARM_UP, Measured, grown


@pytest.mark.slow
def test_memory_and_handles_stay_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [sys.executable, str(Path(__file__).with_name("soak.py")), "--minutes", "1"]
    code, text = finish(argv, tmp_path / "soak.txt")
    with capsys.disabled():
        print(f"\n{text}")
    assert code == 0, text
    assert text.rstrip().endswith("level")


def test_growth_is_seen_and_noise_is_not() -> None:
    """10 kB a round for 1200 rounds of half an hour, or one file a round for 20."""
    noise = [Measured(300.0 + 5 * (number % 2), 9, 3, 0) for number in range(30)]
    assert grown(noise) == []
    leak = [held._replace(files=held.files + number) for number, held in enumerate(noise[:20])]
    assert grown(leak) == ["files 18.0 -> 28.0"]
    slow = [Measured(300 + 0.03 * number, 9, 3, 0) for number in range(1200)]
    assert grown(slow) == ["megabytes 312.1 -> 336.0"]
    assert WARM_UP > 0
    assert set(SLACK) == set(Measured._fields)
