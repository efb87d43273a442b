"""Numerical answers, 0 or 1: as text, as quantities (quantity.py), and only then as LaTeX by math-verify.

Quantities are decided here, quickly and surely. What needs a parser is left to `grade`, which may take for ever on
hostile input (`9^{9^{9}}`) and therefore runs in a killable worker only. math-verify is called without its own timeouts:
they use signal.alarm, which raises off the main thread. It drops what it cannot read, so that such texts never reach it.
"""
from __future__ import annotations

import re
from typing import Any

from sophiavl_fast.rewards.graders import notation, quantity, units
from sophiavl_fast.rewards.graders.quantity import Quantity, close
from sophiavl_fast.rewards.graders.task import Task
from sophiavl_fast.rewards.graders.units import Unit

_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]+)(?![A-Za-z0-9])")
# a sum, a difference, a product or a division sign still to be worked out; 3 x 10^4 is a way to write a number
_UNDONE = re.compile(r"[0-9)}]\s?(?:[-+÷]|\\div\b|(?:\*|×|·|\\times|\\cdot)(?!\s?10\s?\^))\s?[0-9(\\]")
_ENDS_IN_UNIT = re.compile(r"(?<=[0-9)}πi°])\s?(?=[A-Za-z°Ω])")
_TEXT = re.compile(r"\\(?:text|textrm|mathrm|rm)\s?\{([^{}]*)\}")
_COMMAND = re.compile(r"\\[A-Za-z]+|\b[0-9.]{0,32}(?:pi|sqrt)\b")
_LONGEST_UNIT = 40


def quick(task: Task) -> float | None:
    """1 or 0 where text or quantities decide it, None where a parser must."""
    answer, gold = notation.normal(task.answer), notation.normal(task.gold)
    if not answer or not gold:
        return 0.0
    if answer.casefold() == gold.casefold():
        return 1.0
    signs, (answer, gold) = zip(*(notation.relation(text) for text in (answer, gold)), strict=True)
    left, right = _readings(answer, gold)
    if signs[0] != signs[1]:   # `> 5` is no 5; `x > 3` may be an interval
        return 0.0 if all(signs) or (left and right) else None
    if left and right:
        return float(quantity.same(left, right, task.tolerance))
    if right is not None and _UNDONE.search(answer.rpartition("=")[2]):
        return 0.0   # the question's own sum is no answer to it
    if (not left and notation.unreadable(answer, gold)) or (not right and notation.unreadable(gold, answer)):
        return float(notation.squeezed(answer) == notation.squeezed(gold))
    return None


def grade(task: Task) -> float:
    """1 or 0. May hang or exhaust memory: call it in a worker."""
    decided = quick(task)
    if decided is not None:
        return decided
    from math_verify import verify

    answer, gold = notation.normal(task.answer), notation.normal(task.gold)
    if bool(notation.relation(answer)[0]) == bool(notation.relation(gold)[0]):
        answer, gold = notation.relation(answer)[1], notation.relation(gold)[1]
    left, right = _readings(answer, gold)
    sides = [_bare(text) for text in (answer, gold)]
    if units.differ(*(q.unit if q else unit for q, (_, unit) in zip((left, right), sides, strict=True))):
        return 0.0
    parsed = [_expressions(_rendered(q) if q else text) for q, (text, _) in zip((left, right), sides, strict=True)]
    if not all(parsed):
        return 0.0
    values = [_values(q, found) for q, found in zip((left, right), parsed, strict=True)]
    if all(values):
        return float(any(close(a, b, task.tolerance) for a in values[0] for b in values[1]))
    if any(q and not q.bare for q in (left, right)):
        parsed = [_expressions(text) for text in (answer, gold)]
    return float(verify(parsed[1], parsed[0], timeout_seconds=None))


def prepare() -> None:
    """Import the parser and let it build its grammar (a quarter of a second)."""
    _value(_expressions("x=1"))


def _readings(answer: str, gold: str) -> tuple[Quantity | None, Quantity | None]:
    """Both sides as quantities. In a gold answer `5m` beside a bare number or none, the letter may as well be a factor: it is left to the parser."""
    left, right = quantity.read(answer), quantity.read(gold)
    if right is not None and right.touching and (left is None or left.unit is None):
        right = None
    return left, right


def _bare(text: str) -> tuple[str, Unit | None]:
    """A constant (`5\\sqrt{2} cm`) without the unit at its end; anything with a variable as it is."""
    plain = _TEXT.sub(r" \1", text)
    start = max(0, len(plain) - _LONGEST_UNIT)
    for match in _ENDS_IN_UNIT.finditer(plain, start):
        number, tail = plain[:match.start()], plain[match.end():]
        unit, rest = units.leading(tail)
        short = match.end() == match.start() and not tail[1:2].isalpha()   # 5t may be a product
        if unit is not None and not rest and not short and not re.search("[A-Za-z]", _COMMAND.sub("", number)):
            return number, unit
    return text, None


def _rendered(quantity: Quantity) -> str:
    return str(quantity.integer) if quantity.integer is not None else repr(quantity.value)


def _expressions(text: str) -> list[Any]:
    from math_verify import parse

    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", notation.latex(text))
    return parse(f"${text}$", parsing_timeout=None)


def _values(quantity: Quantity | None, parsed: list[Any]) -> list[float]:
    """What a side may stand for: a percentage for itself or its hundredth."""
    if quantity is not None:
        return [quantity.value, quantity.value / 100] if quantity.percent else [quantity.value]
    value = _value(parsed)
    return [] if value is None else [value]


def _value(parsed: list[Any]) -> float | None:
    """The real number that an expression stands for (x = 3 stands for 3), None for sets, intervals and words."""
    from sympy import Eq, Expr

    found = parsed[0]
    if isinstance(found, Eq) and found.lhs.is_Symbol:
        found = found.rhs
    if isinstance(found, Expr):
        # the parser leaves products undone; asking what 1*0 is before it is worked out can contradict itself inside sympy
        found = found.doit()
    return float(found.evalf()) if isinstance(found, Expr) and found.is_number and found.is_real else None
