"""Numerical answers, 0 or 1: as text, as plain numbers, and only then as LaTeX by math-verify.

Plain numbers are decided here, quickly and surely. What needs a parser is left to `grade`, which may take for ever on
hostile input (`9^{9^{9}}`) and therefore runs in a killable worker only. math-verify is called without its own timeouts:
they use signal.alarm, which raises off the main thread.
"""
from __future__ import annotations

import math
import re
from typing import Any

from sophiavl_fast.rewards.graders.task import Task, clean

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s?"
    r"(?:(?P<whole>[0-9]+)\s(?=[0-9]+\s?/))?"
    r"(?P<top>[0-9]{1,3}(?:[, ][0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?P<exp>[eE][+-]?[0-9]{1,4})?"
    r"(?:\s?/\s?(?P<bottom>[0-9]+(?:\.[0-9]+)?))?"
    r"\s?(?P<percent>\\?%)?")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]+)(?![A-Za-z0-9])")
_SIGNS = {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8"} | dict.fromkeys("£€¥₹\u00a0\u2009\u202f", " ")
_WRITTEN = str.maketrans(_SIGNS | {"−": "-", "–": "-", "—": "-"})
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LOWERED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_ABOUT = re.compile(r"(?:[≈~∼≃]|\\(?:approx|sim)\b|(?:about|around|roughly|approx(?:imately|\.)?|ca\.)(?= ))\s?", re.IGNORECASE)
_CURRENCY = re.compile(r"(?:US|USD|EUR|GBP|INR|CNY|RMB|JPY)\s?(?=[-+.0-9])")
_TIMES_TEN = re.compile(r"(?<=[0-9])\s?[x×]\s?(?=10\s?(?:\^|\*\*))")
_PERCENT = re.compile(r"\s?\bper\s?cent\b", re.IGNORECASE)
_UNIT = (r"(?:(?:square|cubic|sq\.?|cu\.?) )?(?:mm|cm|dm|km|m|in|inch(?:es)?|ft|feet|yd|mi|miles?"
         r"|(?:kilo|centi|milli)?met(?:er|re)s?|mg|kg|g|t|lbs?|oz|(?:kilo)?grams?|ms|s|sec|min|h|hr|hrs|seconds?|minutes?|hours?|days?|weeks?|months?|years?|ml|mL|l|L|lit(?:er|re)s?|cents?|dollars?|euros?|USD|EUR|GBP|INR|CNY|RMB"
         r"|JPY|degrees?|deg|°\s?[CFK]?|[NJWVAΩK]|kW|MW|Hz|kHz|MHz|mol|units?)(?:\^\{?-?[1-9]\}?)?")
_MEASURED = re.compile(rf"(?P<number>.{{0,64}}[0-9.])\s?{_UNIT}(?:\s?(?:[/·*]|per)\s?{_UNIT}){{0,3}}")
# a sum, a difference or a product still to be worked out; 3 x 10^4 is a way to write a number
_UNDONE = re.compile(r"[0-9)}]\s?(?:[-+]|(?:\*|×|·|\\times|\\cdot)(?!\s?10\s?(?:\^|\*\*)))\s?[0-9(\\]")
_MARKUP = " *_`"
_LONGEST = 64  # characters of a plain number; longer ones go the slow way


class Number:
    """A plain number as written: its value, whether a percent sign follows, and its digits if it is an integer."""

    __slots__ = ("integer", "percent", "value")

    def __init__(self, match: re.Match[str]) -> None:
        top = match["sign"] + re.sub("[, ]", "", match["top"])
        bottom = float(match["bottom"]) if match["bottom"] else 1.0
        whole = float(match["sign"] + match["whole"]) if match["whole"] else 0.0
        self.value = whole + float(top + (match["exp"] or "")) / bottom if bottom else math.nan
        self.percent = match["percent"] is not None
        self.integer = int(top) if re.fullmatch(r"[+-]?[0-9]+", top) and not (match["exp"] or match["bottom"]) else None


def quick(task: Task) -> float | None:
    """1 or 0 where text or plain numbers decide it, None where a parser must."""
    answer, gold = _normal(task.answer), _normal(task.gold)
    if not answer or not gold:
        return 0.0
    if answer.casefold() == gold.casefold():
        return 1.0
    left, right = _number(answer), _number(gold)
    if left is None and right is not None and (measured := _MEASURED.fullmatch(answer)):
        left = _number(measured["number"])    # a unit that the reference leaves out
    if right is not None and _UNDONE.search(answer.rpartition("=")[2]):
        return 0.0   # the question's own sum is no answer to it
    if left is None or right is None:
        return None
    return float(_same(left, right, task.tolerance))


def grade(task: Task) -> float:
    """1 or 0. May hang or exhaust memory: call it in a worker."""
    decided = quick(task)
    if decided is not None:
        return decided
    from math_verify import verify

    answer, gold = (_expressions(_normal(text)) for text in (task.answer, task.gold))
    if not answer or not gold:
        return 0.0
    left, right = _value(answer), _value(gold)
    if left is not None and right is not None:
        return float(close(left, right, task.tolerance))
    return float(verify(gold, answer, timeout_seconds=None))


def prepare() -> None:
    """Import the parser and let it build its grammar (a quarter of a second)."""
    _value(_expressions("x=1"))


def close(left: float, right: float, tolerance: float) -> bool:
    """Equal within a relative tolerance; false for what is not finite."""
    return math.isfinite(left) and math.isfinite(right) and math.isclose(left, right, rel_tol=tolerance)


def _normal(text: str) -> str:
    """As plain as it can be written: one line, powers as ^{...}, no dollar signs, no `about`, several lines of LaTeX as a list."""
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text.translate(_WRITTEN))
    text = clean(text).strip(_MARKUP).rstrip("." + _MARKUP).replace("{,}", ",")
    for opening, closing in (("\\[", "\\]"), ("\\(", "\\)")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2].strip(_MARKUP)
    if "\\begin" not in text:
        text = text.replace("\\\\", " , ")
    for prefix in (_ABOUT, _CURRENCY):
        if match := prefix.match(text):
            text = text[match.end():]
    return _TIMES_TEN.sub(r"\\times ", _PERCENT.sub("%", text))


def _number(text: str) -> Number | None:
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    return Number(match) if match else None


def _same(left: Number, right: Number, tolerance: float) -> bool:
    """Two integers must be equal to the last digit; a percent sign on one side only may be read as a unit or as 1/100."""
    if left.integer is not None and right.integer is not None and left.percent == right.percent:
        return left.integer == right.integer
    if left.percent == right.percent:
        return close(left.value, right.value, tolerance)
    bare, percent = (right, left) if left.percent else (left, right)
    return close(bare.value, percent.value, tolerance) or close(bare.value, percent.value / 100, tolerance)


def _expressions(text: str) -> list[Any]:
    from math_verify import parse

    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    return parse(f"${text}$", parsing_timeout=None)


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
