"""The error that stands for a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong flag, file or argument: its message says what to give instead, and commands print nothing else."""
