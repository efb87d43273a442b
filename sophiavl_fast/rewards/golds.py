"""Reference answers that no response could match: their records would earn a silent 0 for ever."""
from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.graders import choice, quick
from sophiavl_fast.rewards.graders.task import Task


def refuse_unmatchable(problem_type: str, gold: str, options: Sequence[str]) -> None:
    """UserError where nothing is left of a numerical or multiple-choice gold once it is read, or it names none of the options that there are."""
    if problem_type not in ("numerical", "multiple_choice"):
        return
    shown = repr(gold[:80])
    if quick(Task(problem_type, gold, gold, tuple(options))) == 0.0:
        raise UserError(f"the solution {shown} can be matched by no answer: to the grader of '{problem_type}' questions it is empty or too long")
    if problem_type == "multiple_choice" and options and choice.wanted(gold, options) is None:
        raise UserError(f"the solution {shown} names none of the {len(options)} options: expected letters A to {ascii_uppercase[len(options) - 1]}, "
                        "or an option's own text")
