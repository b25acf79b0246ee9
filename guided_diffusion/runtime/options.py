"""Flags as dataclass fields, their limits, and the readers of their texts. No torch.

A field made by `flag` carries its help text and limits, from which command lines and the checks of saved settings come.
"""

from __future__ import annotations

import math
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from .errors import WHY, UserError, as_user_error, nearest, refuse

T = TypeVar("T")
WIDEST_PROFILE = 0.28  # all updates alike are 1 / sqrt(12)
HERE = (f".{os.sep}", f"..{os.sep}")  # what relative paths begin with that are those from the folder of a config.json
Size = int | str | Sequence[int]  # 64, "64", "64x128", (64, 128): height before width


def flag(
    default: T,
    help: str,
    *,
    choices: Iterable[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    runtime: bool = False,
    alias: str = "",
    convert: Callable[[str], Any] | None = None,
    positional: bool | str = False,
    needs: str = "",
    excludes: str = "",
) -> T:
    """A dataclass field that is also a flag.

    :param runtime: True for what may change between training and sampling (precision, memory): never taken from a
        checkpoint's config.
    :param convert: text -> value where the type of the default does not say it.
    :param positional: True for a word that a command always needs, written without a name, in the order of the fields;
        "?" for one that may be left out.
    :param needs: conditions on other flags without which this one has no effect: NAME, NAME=a,b or NAME!=a,b; "x|y" is
        met by one of the two, "x&y" by both, and all of several words have to be met. A section's own `NEEDS` are those
        of each of its flags. Flags that a command does not have are left out.
    :param excludes: conditions on other flags that contradict this one.
    """
    extra = {name: value for name, value in locals().items() if name != "default"}
    return field(default=default, metadata={**extra, "choices": tuple(choices)})


def share_flag(help: str, default: float = 0.0, at_least: float = 0, **options: Any) -> float:
    """The flag of a number from 0 to 1."""
    return flag(default, help, at_least=at_least, at_most=1, **options)


def str2bool(v: str | bool) -> bool:
    """The boolean that a word on the command line stands for."""
    if isinstance(v, bool):
        return v
    yes = v.lower() in ("yes", "true", "t", "y", "1", "on")
    no = v.lower() in ("no", "false", "f", "n", "0", "off")
    refuse((not yes and not no, f"boolean value expected: {v!r} is neither True nor False"))
    return yes


def defaults(*sections: type[Any]) -> dict[str, Any]:
    """Flag -> default of the given config classes, as plain JSON values."""
    return {spec.name: spec.default for section in sections for spec in fields(section)}


def check_keywords(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise a TypeError for a keyword that `where` does not know, naming the one most like it."""
    for name in names:
        if name not in known:
            raise TypeError(f"{where} has no keyword {name!r}{nearest(name, known)}")


def from_here(flags: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The flags of a config.json in a folder, with the paths that begin there.

    That is the autoencoder's, and that of a text encoder if it is no name, but begins with ./ or ../.
    """
    way, (scheme, mark, top) = posixpath if "://" in folder else os.path, folder.rpartition("://")
    found = {name: str(flags.get(name) or "") for name in ("autoencoder_path", "text_encoder")}
    found = {name: path for name, path in found.items() if path and "://" not in path and not os.path.isabs(path)}
    if not found.get("text_encoder", "").startswith(HERE):
        found.pop("text_encoder", None)
    return {**flags, **{name: f"{scheme}{mark}{way.normpath(way.join(top, path))}" for name, path in found.items()}}


def parse_size(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as 64, "64", "64x128" or a pair."""
    try:
        sides = size.lower().split("x") if isinstance(size, str) else [size] if isinstance(size, int) else list(size)
        numbers = [int(side) for side in sides]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers, default=0) < 1:
        raise UserError(f"image size {size!r} is not a size: write 64, or HEIGHTxWIDTH such as 64x128")
    return numbers[0], numbers[-1]


def size_flag(text: Size) -> int | str:
    """The plain JSON form of a size: an int for squares, else the text HxW."""
    height, width = parse_size(text)
    return height if height == width else f"{height}x{width}"


def _numbers(text: str) -> list[float]:
    """The numbers in a list with commas, [] of ''; [nan] of any other text."""
    try:
        return [float(word) for word in text.split(",")] if text else []
    except ValueError:
        return [math.nan]


def parse_rates(text: str | float) -> list[float]:
    """The rates of moving averages in "0.999,0.9999"; [] of ''."""
    rates, remedy = _numbers(str(text).strip(" ,")), "write 0.9999 or 0.999,0.9999"
    sound = all(0 <= rate <= 1 for rate in rates)
    refuse((not sound, f"ema_rate {text!r} is not a list of rates from 0 to 1: {remedy}"))
    return rates


def parse_profiles(text: str) -> list[float]:
    """The widths of averages by power functions in "0.05,0.1"; [] of ''."""
    widths = _numbers(str(text).strip(" ,"))
    if not all(0 < width <= WIDEST_PROFILE for width in widths):
        raise UserError(f"ema_profiles {text!r} is not a list of widths from 0 to {WIDEST_PROFILE}: write 0.05,0.1")
    return widths


def parse_microbatch(text: str) -> int | str:
    """A number of images, or "auto"."""
    if not re.fullmatch("auto|-1|[0-9]+", text):
        raise UserError(f"{text!r} is no number of images: write a number, -1 for the whole batch, or auto")
    return text if text == "auto" else int(text)


def parse_range(text: str, example: str = "0,4095 or 0,1") -> tuple[float, float] | None:
    """(LOW, HIGH) of "LOW,HIGH"; None of ''."""
    numbers = _numbers(text)
    if not numbers:
        return None
    if len(numbers) != 2 or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise UserError(f"{text!r} is no range: write LOW,HIGH, such as {example}")
    return numbers[0], numbers[1]


def range_flag(text: str) -> str:
    """The same text, if it is a range or ''."""
    parse_range(text)
    return text


def interval_flag(text: str) -> str:
    """The same text, if it is a range of timesteps or ''."""
    parse_range(text, "100,800")
    return text


def list_of(pattern: str, what: str, *, repeated: bool = False) -> Callable[[str], str]:
    """A reader of numbers separated by commas, different ones or not, which returns the text that it is given."""

    def read(text: str) -> str:
        words = text.split(",")
        sound = all(re.fullmatch(pattern, word, re.ASCII) for word in words)
        if not sound or (not repeated and len({*map(float, words)}) < len(words)):
            raise UserError(f"{text!r} is no list of {'' if repeated else 'different '}{what}")
        return text

    return read


def kind_of(names: Sequence[str]) -> Callable[[str], str]:
    """A reader of one of these names, perhaps with details after a colon, which returns the text that it is given."""

    def read(text: str) -> str:
        if text.partition(":")[0] not in names:
            raise UserError(f"{text!r} is none of {', '.join(names)}{nearest(text, names)}")
        return text

    return read


def names_of(names: Sequence[str], what: str) -> Callable[[str], str]:
    """A reader of names separated by commas, which returns the text that it is given."""

    def read(text: str) -> str:
        for word in text.split(","):
            if word not in names:
                hint = nearest(word, names)
                raise UserError(f"{word!r} in {text!r} is no {what}: name some of {','.join(names)}{hint}")
        return text

    return read


def share_of_job(text: str) -> str:
    """The same text, if it is a part of a job."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if text and not (match and 1 <= int(match[1]) <= int(match[2])):
        raise UserError(f"{text!r} is no part I/N of a job: write 1/8 to 8/8 for eight jobs")
    return text


def shuffle_flag(text: str) -> str:
    """The same text, if it is a way to shuffle."""
    if not re.fullmatch(r"all|shards(:0*[1-9]\d{0,8})?", text):
        raise UserError(f"{text!r} is no way to shuffle: write all, shards or shards:16")
    return text


def reader_of(spec: Field[Any]) -> Callable[[str], Any]:
    """text -> value of one flag, with its checks; the default always passes, such as -1 for "not given"."""

    def read(text: str) -> Any:
        value = spec.default if text == str(spec.default) else _converted(spec, text)
        if value != spec.default:
            _check_limits(spec, text, value)
        return value

    return read


def _converted(spec: Field[Any], text: str) -> Any:
    kind: type[Any] = type(spec.default)
    convert = spec.metadata["convert"] or (str2bool if kind is bool else kind)
    told = spec.metadata["convert"] or kind is bool
    with as_user_error(WHY if told else f"{text!r} is not of type {kind.__name__}", ValueError):
        return convert(text)


def _check_limits(spec: Field[Any], text: str, value: Any) -> None:
    choices, low, high = (spec.metadata[name] for name in ("choices", "at_least", "at_most"))
    faults = [
        (isinstance(value, float) and not math.isfinite(value), f"{text} is not a finite number"),
        (choices and str(value) not in choices, f"{text!r} is none of {', '.join(c or repr('') for c in choices)}"),
        (low is not None and value < low, f"{text} is below the least value, {low}"),
        (high is not None and value > high, f"{text} is above the greatest value, {high}"),
    ]
    for applies, fault in faults:
        if applies:
            raise UserError(f"{fault}{nearest(text, choices)}")


def means_not_given(spec: Field[Any], value: Any) -> bool:
    """Whether a value is a default that no other value could be: --steps 0, --eta -1, --image_size ''."""
    try:
        _check_limits(spec, str(value), _converted(spec, str(value)))
    except UserError:
        return bool(value == spec.default)
    return False


def saved_values(saved: Mapping[str, Any], *sections: type[Any]) -> dict[str, Any]:
    """Of the flags saved with a checkpoint those of the given config classes, checked; without runtime flags."""
    known = {spec.name: spec for section in sections for spec in fields(section)}
    taken = {k: v for k, v in saved.items() if k in known and not known[k].metadata["runtime"]}
    for name, value in taken.items():
        spec = known[name]
        kinds = f"{spec.type} int" if "float" in spec.type else spec.type
        says = f"the checkpoint's config.json says {name} {value!r:.200}"
        with as_user_error(f"{says}, which cannot be used: {WHY}", ValueError):
            refuse((type(value).__name__ not in kinds.replace("|", "").split(), f"it should be of type {spec.type}"))
            reader_of(spec)(str(value))
    return taken
