"""The error that stands for a user's mistake, and the words of messages: names, reasons, the nearest right word."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

SHOWN = 200  # characters of a name in a message
WHY = "<why>"  # in a sentence of `as_user_error`
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError)  # what the content of a foreign file leads to


class UserError(ValueError, argparse.ArgumentTypeError):
    """A wrong flag, file or argument: its message says what to give instead, and commands print nothing else.

    argparse prints it as it is too.
    """


def sentence(error: BaseException) -> str:
    """The message of an error; of one that the system raised, with the file it is about."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r} cannot be used ({error.strerror}): look at its path and its permissions"
    return str(error)


@contextmanager
def as_user_error(sentence: str, *kinds: type[Exception]) -> Iterator[None]:
    """Make a UserError of the errors of some kinds that are raised inside the block.

    :param sentence: with `WHY` where the reason is to stand.
    :param kinds: every Exception where none is named.
    """
    taken = kinds or (Exception,)
    try:
        yield
    except taken as error:
        why = str(error) if isinstance(error, UserError) else reason(error)
        raise UserError(sentence.replace(WHY, why)) from error


def nearest(word: str, words: Iterable[str]) -> str:
    """``; did you mean X?`` for the word most like `word`, or nothing when none is close."""
    matcher, close, most = difflib.SequenceMatcher(b=word), "", 0.599
    for each in words:  # of several that are as near the first; there may be a million
        matcher.set_seq1(each)
        if min(matcher.real_quick_ratio(), matcher.quick_ratio()) > most and matcher.ratio() > most:
            close, most = each, matcher.ratio()
    return f"; did you mean {close}?" if close else ""


def refuse(*cases: tuple[object, str]) -> None:
    """Raise a UserError with the sentence of the first case whose condition holds."""
    for applies, sentence in cases:
        if applies:
            raise UserError(sentence)


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a value that is none of those allowed."""
    words = list(allowed)
    if value not in words:
        names = ", ".join(word or repr(word) for word in words)
        raise UserError(f"{name} must be one of {names}, got {value!r}{nearest(value, words)}")


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    every = list(names)
    return ", ".join(every[:most]) + f", and {len(every) - most} more" * (len(every) > most)


def quoted(text: str) -> str:
    """A name between quotation marks: control characters and undecodable bytes escaped, a long name cut."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def printable(text: str) -> str:
    """The same without quotation marks where nothing needs to be escaped."""
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return text if text.isprintable() else repr(text)


def reason(error: BaseException) -> str:
    """One printable line of an error that another program raised."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    return printable(text) or type(error).__name__
