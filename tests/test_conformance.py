"""The originals' recorded numbers: same inputs, same seeds, same values to float32 rounding."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
SPEC = importlib.util.spec_from_file_location("golden_conformance", GOLDEN / "conformance.py")
conformance = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(conformance)
conformance.th.set_num_threads(1)
NUMBERS = np.load(GOLDEN / "numbers.npz")
CASES = sorted({name.split("/")[0] for name in NUMBERS.files})


@pytest.mark.parametrize("case", CASES)
def test_numbers_of_the_originals(case):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a linear schedule of 20 steps")
        got = {}
        for key, value, error in conformance.run("shared", {case}):
            if error is not None:
                raise error
            got[key] = np.asarray(value)
    wanted = [name for name in NUMBERS.files if name.split("/")[0] == case]
    assert set(wanted) <= set(got)
    problems = {name: conformance.compare(NUMBERS[name], got[name]) for name in wanted}
    assert {name: problem for name, problem in problems.items() if problem} == {}


def test_all_425_are_there():
    assert len(NUMBERS.files) == 425
