"""The error that stands for a user's mistake, what to say instead of a wrong word, and the sentence of an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A wrong flag, file or argument: its message says what to give instead, and commands print nothing else."""


def sentence(error: BaseException) -> str:
    """The message of an error; of one that the system raised, with the file it is about."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r} cannot be used ({error.strerror}): look at its path and its permissions"
    return str(error)


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Make UserErrors of the ValueErrors of a module that stands alone, where its input comes from a user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn an error of the system inside the block into a sentence about the file that was to be written."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # a sentence already
            raise
        refusal = OSError(f"{path} cannot be written ({error.strerror}): make room there, or choose another folder")
        refusal.errno = error.errno
        raise refusal from error


def nearest(word: str, words: Iterable[str]) -> str:
    """``; did you mean X?`` for the word most like `word`, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def refuse(*cases: tuple[object, str]) -> None:
    """Raise a UserError with the sentence of the first case whose condition holds."""
    for applies, sentence in cases:
        if applies:
            raise UserError(sentence)
