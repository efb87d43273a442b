"""Errors that a user caused and can mend: one clear line, exit code 2, never a traceback."""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and the nearest valid choice, on one line."""


class EngineError(RuntimeError):
    """An engine or process that failed or did not answer by its deadline; the message names it and the phase."""


class EngineLost(EngineError):
    """A process that has ended or is silent, where another in its place may do: a rollout server can be started again."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'rollout'?``, or the list of valid names where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(names)}" if names else ""
