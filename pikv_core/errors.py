"""Errors meant for users: one message, one hint, and the exit code of the command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PiKVError(Exception):
    """Stop with one clear message; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PiKVError):
    """Report a mistake on the command line or in the call."""

    exit_code = 2


class RecipeError(UsageError):
    """Report every problem of a recipe at once."""

    def __init__(self, problems: list[str], hint: str | None = None):
        super().__init__("\n".join(problems), hint)
        self.problems = problems


def closest(word: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest allowed word, or nothing."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""
