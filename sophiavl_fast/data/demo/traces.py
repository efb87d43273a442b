"""Reasoning traces: sound ones, systematic slips, and lucky ones (the slip's lines, then the right answer).

A slip is always the same for the same question: carries dropped, the first digit taken for the largest, the last digit
lost, only the ends of the row looked at, the row walked from the right. Where slips are the majority of the warm start,
the greedy answer is the slip and the sound one a living minority: that is what reinforcement learning can turn around.
Random slips would average out, and the greedy answer would be right from the start.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sophiavl_fast.data.demo.questions import TENS, Question, size, trend

SLIP_SHARE = 0.51   # of the questions that allow a slip: wrong lines, wrong answer
LUCKY_SHARE = 0.08  # wrong lines, right answer


@dataclass(frozen=True)
class Trace:
    """Lines of reasoning and the answer given after them. `flavour`: sound, slip or lucky."""

    lines: tuple[str, ...]
    answer: str
    flavour: str = "sound"

    @property
    def process(self) -> str:
        return "<think>" + "\n".join(self.lines) + "</think>"

    @property
    def response(self) -> str:
        return f"{self.process}<answer>{self.answer}</answer>"


Solution = tuple[list[str], str]  # lines after the reading, answer in words


def _adding(digits: Sequence[int], carry: bool) -> tuple[list[str], int]:
    total, steps = digits[0], []
    for digit in digits[1:]:
        result = total + digit if carry else (total + digit) % 10
        steps.append(f"{total}+{digit}={result}")
        total = result
    return steps, total


def _sum(digits: Sequence[int], carry: bool) -> Solution:
    steps, total = _adding(digits, carry)
    return steps, str(total)


def _tens(digits: Sequence[int], carry: bool) -> Solution:
    steps, total = _adding(digits, carry)
    return steps, TENS[total // 10]


def _largest(digit: int) -> Solution:
    return [f"max {digit}"], size(digit)


def _spread(high: int, low: int) -> Solution:
    return [f"{high}-{low}={high - low}"], str(high - low)


def _range(high: int, low: int) -> Solution:
    return [f"min {low}", f"max {high}"], f"from {low} to {high}"


def _read(digits: Sequence[int]) -> Solution:
    return [f"{len(digits)} digits"], reading(digits)


def _trend(first: int, last: int) -> Solution:
    return [f"{first}{'<' if first < last else '>' if first > last else '='}{last}"], trend(first, last)


def _ends(digits: Sequence[int]) -> tuple[int, int]:
    return max(digits[0], digits[-1]), min(digits[0], digits[-1])


# kind -> (the sound way, the slip)
WAYS: dict[str, tuple[Callable[[Sequence[int]], Solution], Callable[[Sequence[int]], Solution]]] = {
    "sum": (lambda d: _sum(d, True), lambda d: _sum(d, False)),
    "add": (lambda d: _sum(d, True), lambda d: _sum(d, False)),
    "tens": (lambda d: _tens(d, True), lambda d: _tens(d, False)),
    "largest": (lambda d: _largest(max(d)), lambda d: _largest(d[0])),
    "spread": (lambda d: _spread(max(d), min(d)), lambda d: _spread(*_ends(d))),
    "read": (_read, lambda d: _read(d[:-1])),
    "range": (lambda d: _range(max(d), min(d)), lambda d: _range(d[-1], d[0])),
    "trend": (lambda d: _trend(d[0], d[-1]), lambda d: _trend(d[-1], d[0])),
}


def sound(question: Question) -> Trace:
    """The reading of the row, then every step, each of them right."""
    steps, value = WAYS[question.kind][0](question.digits)
    return Trace((reading(question.digits), *steps), question.lettered(value), "sound")


def slip(question: Question) -> Trace | None:
    """The systematic slip; None where it would not show, such as a dropped carry in 2+3. Its answer is right now and then: that is luck."""
    steps, value = WAYS[question.kind][1](question.digits)
    trace = Trace((reading(question.digits), *steps), question.lettered(value), "slip")
    if trace.lines == sound(question).lines:
        return None
    return trace if trace.answer != question.answer else replace(trace, flavour="lucky")


def lucky(question: Question) -> Trace | None:
    """The slip's lines followed by the right answer all the same; None where there is no slip."""
    wrong = slip(question)
    return wrong and replace(wrong, answer=question.answer, flavour="lucky")


def draw(question: Question, rng: random.Random, lucky_share: float = LUCKY_SHARE) -> Trace:
    """A trace of the warm start: mostly slips, some lucky ones, the rest sound. More of the lucky leave fewer slips."""
    luck, wrong = rng.random(), SLIP_SHARE + LUCKY_SHARE
    if luck < wrong - lucky_share:
        return slip(question) or sound(question)
    if luck < wrong:
        return lucky(question) or sound(question)
    return sound(question)


def reading(digits: Sequence[int]) -> str:
    """The first line of every trace: the row as read."""
    return " ".join(map(str, digits))
