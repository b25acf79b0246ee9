"""Class labels: the check of their range, and lists of them as a user writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from .errors import UserError, nearest, printable, refuse

SHOWN_NAMES = 32  # of an error message

_ID = re.compile(r"-?\d{1,18}")


def check_labels(labels: Iterable[int], num_classes: float) -> None:
    """Refuse labels outside of 0 .. num_classes - 1."""
    for label in labels:
        if not 0 <= label < num_classes:
            allowed = f"0 .. {num_classes - 1}" if num_classes < math.inf else "0 or more"
            raise UserError(f"class {label} does not exist: the classes are {allowed}")


def parse_classes(text: str, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Class ids from "207,360" or from names; a number always is an id.

    Names may hold commas themselves: of several names that fit, the longest counts.

    :param names: names by class id, as in classes.json.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    refuse((not words, f"classes {text!r} names no class: write ids or names with commas in between"))
    ids = {tuple(map(str.strip, name.split(","))): label for label, name in reversed([*enumerate(names)])}
    longest, labels, start = max(map(len, ids), default=1), list[int](), 0
    while start < len(words):
        label, count = _first(words[start : start + longest], ids)
        if label is None:
            shown = ", ".join(map(printable, names[:SHOWN_NAMES]))
            known = f"the names are {shown}" if names else "there is no classes.json with names: give ids"
            raise UserError(
                f"class {printable(words[start])!r} is unknown{nearest(words[start], names) or f': {known}'}"
            )
        labels.append(label)
        start += count
    check_labels(labels, num_classes)
    return labels


def _first(words: Sequence[str], ids: Mapping[tuple[str, ...], int]) -> tuple[int | None, int]:
    """The class that words begin with, None where they begin with none, and the number of its words."""
    if _ID.fullmatch(words[0]):
        return int(words[0]), 1
    counts = [count for count in range(1, len(words) + 1) if tuple(words[:count]) in ids]
    return (ids[tuple(words[: counts[-1]])], counts[-1]) if counts else (None, 1)
