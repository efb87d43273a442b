"""Checks a response to a demo record by rule: every line of its reasoning, and its answer.

Written from the record's digits alone, on purpose without a word of `traces`: it is the oracle of the generator, of the
thinking reward model's labels and of `eval/reasoning`.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

_RESPONSE = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Soundness:
    """`score` is the share of right lines, missing and superfluous ones counted as wrong; `sound` means all of them.

    `flaw`: "" when sound, else format (no think and answer tags), reading (the row is not what the picture shows),
    step (a wrong line), missing (a step left out) or redundant (more lines than steps). The answer plays no part.
    """

    format_ok: bool
    sound: bool
    score: float
    flaw: str


def check(record: Mapping[str, Any], response: str) -> Soundness:
    """Check the reasoning between the think tags of a whole response; a broken format scores 0."""
    match = _RESPONSE.fullmatch(response.strip())
    return check_trace(record, match[1]) if match else Soundness(False, False, 0.0, "format")


def check_trace(record: Mapping[str, Any], trace: str) -> Soundness:
    """Check bare reasoning, one step a line, against the record's `kind` and `digits`."""
    steps = _steps(record["kind"], record["digits"])
    lines, places = walk(record, trace)
    met = [place for place in places if place is not None]
    score = len(met) / max(len(lines), len(steps))
    if score == 1.0:
        flaw = ""
    elif 0 not in met:
        flaw = "reading"
    elif len(met) == len(lines):
        flaw = "missing"
    else:
        flaw = "redundant" if len(met) == len(steps) else "step"
    return Soundness(True, not flaw, score, flaw)


def walk(record: Mapping[str, Any], trace: str) -> tuple[list[str], list[int | None]]:
    """The trace's lines and the step that each of them meets: steps are met in order; a line that meets none of those to come is wrong (None)."""
    steps = _steps(record["kind"], record["digits"])
    lines = [" ".join(line.split()) for line in trace.strip().split("\n") if line.strip()]
    met: list[int | None] = []
    after = 0
    for line in lines:
        met.append(next((i for i in range(after, len(steps)) if line in steps[i]), None))
        after = after if met[-1] is None else met[-1] + 1
    return lines, met


def _steps(kind: str, digits: Sequence[int]) -> list[set[str]]:
    """The steps that a sound trace takes, each as the set of its accepted spellings."""
    low, high = str(min(digits)), str(max(digits))
    match kind:
        case "sum" | "add" | "tens":
            body = [{f"{a}+{d}={b}", f"{d}+{a}={b}"} for (a, b), d in zip(pairwise(accumulate(digits)), digits[1:])]
        case "spread":
            body = [{f"{high}-{low}={max(digits) - min(digits)}"}]
        case "largest":
            body = [{f"max {high}"}]
        case "range":
            body = [{f"min {low}"}, {f"max {high}"}]
        case "read":
            body = [{f"{len(digits)} digits"}]
        case "trend":
            first, last = digits[0], digits[-1]
            body = [{f"{first}{'<=>'[(first > last) + (first >= last)]}{last}"}]
        case _:
            raise ValueError(f"no rule for demo questions of kind '{kind}'")
    return [{" ".join(map(str, digits))}, *body]


def exact_match(record: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer equals the record's solution: as a number, as an option, or as words (case and spaces aside)."""
    gold = re.sub(r"</?answer>", "", record["solution"])
    match record["problem_type"]:
        case "numerical":
            return _number(answer) == _number(gold)
        case "multiple choice":
            return _option(answer, record["options"]) == gold
        case _:
            return answer.casefold().split() == gold.casefold().split()


def answer_of(response: str) -> str | None:
    """What stands between the answer tags of a well-formed response, else None."""
    match = _RESPONSE.fullmatch(response.strip())
    return match[2].strip() if match else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _option(answer: str, options: Sequence[str]) -> str | None:
    """The letter that 'B', '(b)', 'B.', 'B. 7' or '7' names among the options."""
    text = answer.strip(" .()\n").casefold()
    for option in options:
        letter, _, words = option.partition(". ")
        if text in (letter.casefold(), words.casefold(), option.casefold()):
            return letter
    return None
