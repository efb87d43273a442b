"""Graders by problem type. `quick` runs in the calling process and cannot hang; `grade` runs in a killable worker."""
from __future__ import annotations

from types import ModuleType

from sophiavl_fast.errors import UserError, nearest
from sophiavl_fast.rewards.graders import choice, numerical, ocr, text
from sophiavl_fast.rewards.graders.task import Task

GRADERS: dict[str, ModuleType] = {"numerical": numerical, "multiple_choice": choice, "ocr": ocr, "free_form": text, "text": text}
LONGEST_QUICK = 65_536  # characters; longer answers always go to a worker


def grader(kind: str) -> ModuleType:
    """The grader of a normalised problem type. Raises UserError for an unknown one: nothing falls back to numerical."""
    if kind not in GRADERS:
        raise UserError(f"problem_type '{kind}' has no grader{nearest(kind, GRADERS)}")
    return GRADERS[kind]


def prepare(kind: str) -> None:
    """Import what grading this type needs, so that a deadline counts grading only."""
    module = grader(kind)
    if hasattr(module, "prepare"):
        module.prepare()


def quick(task: Task) -> float | None:
    """The outcome where it can be had at once, None where a worker must find it."""
    module = grader(task.kind)
    return module.quick(task) if len(task.answer) + len(task.gold) <= LONGEST_QUICK else None


def grade(task: Task) -> float:
    """The outcome, at any cost: for workers."""
    module = grader(task.kind)
    return module.grade(task) if hasattr(module, "grade") else module.quick(task)
