"""The error that stands for a user's mistake, and the sentence that a command prints of an error."""

from __future__ import annotations

from collections.abc import Iterator
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
