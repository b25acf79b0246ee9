"""What a refused input is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from guided_diffusion import dist_util


def sentence_of(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The ValueError or OSError of this package's own that a call raises, one line of printable text."""
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args, **options)
    assert dist_util.exit_of(caught.value)[0] == 2, "raised by other code than the package's own"
    text = str(caught.value)
    assert text
    assert text.isprintable(), text
    return text
