"""Class labels: the check of their range, and lists of them as a user writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .errors import UserError
from .files import printable

SHOWN_NAMES = 32  # of an error message

_ID = re.compile(r"-?\d{1,18}")


def check_labels(labels: Iterable[int], num_classes: float) -> None:
    """Refuse labels outside of 0 .. num_classes - 1.

    :raises UserError: naming the first of them and the range.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            allowed = f"0 .. {num_classes - 1}" if num_classes < math.inf else "0 or more"
            raise UserError(f"class {label} does not exist: the classes are {allowed}")


def parse_classes(text: str, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Class ids from "207,360" or from names, which may hold commas themselves; a number always is an id.

    :param names: names by class id, as in classes.json.
    :raises UserError: for an id out of range, an unknown name, no name at all, or commas that can be read in two ways.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"classes {text!r} names no class: write ids or names with commas in between")
    readings = _readings(words, names)
    if not readings:
        unknown = next((word for word in words if not _ID.fullmatch(word) and word not in names), text)
        shown = ", ".join(map(printable, names[:SHOWN_NAMES]))
        known = f"the names are {shown}" if names else "there is no classes.json with names: give ids"
        raise UserError(f"class {printable(unknown)!r} is unknown: {known}")
    if len(readings) > 1:
        one, other = ("".join(f"[{dict(enumerate(names)).get(n, n)}]" for n in labels) for labels in readings)
        raise UserError(f"classes {printable(text)!r} may be {printable(one)} or {printable(other)}: give ids")
    check_labels(readings[0], num_classes)
    return readings[0]


def _readings(words: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """At most two ways to read words as ids and names, of which some are several words with commas in between."""
    ids = {", ".join(map(str.strip, name.split(","))): label for label, name in reversed([*enumerate(names)])}
    longest = max((name.count(",") + 1 for name in names), default=1)
    ways: list[list[Any]] = [[()]]  # to read the last 0, 1, ... words, each as (label, the way to read the rest)
    for start in reversed(range(len(words))):
        longer: list[Any] = []
        for count in range(1, min(longest, len(words) - start) + 1):
            name = ", ".join(words[start : start + count])
            label = int(name) if _ID.fullmatch(name) else ids.get(name)
            longer += [] if label is None else [(label, rest) for rest in ways[-count]]
        ways.append(longer[:2])
    return [list(_unrolled(way)) for way in ways[-1]]


def _unrolled(way: Any) -> Iterator[int]:
    while way:
        label, way = way
        yield label
