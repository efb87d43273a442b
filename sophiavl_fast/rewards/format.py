"""The response format `<think>reasoning</think> .. <answer>answer</answer> ..` and its parts, in linear time.

Same language as the public code's full match (SophiaVL-R1, verl/utils/reward_score/math.py): text may stand between the
two blocks and after the last one. One difference: white space before `<think>` is tolerated, since chat templates and
decoders differ in whether they keep it. Plain string search: a regular expression with three open gaps is quadratic or
worse on long broken responses.
"""
from __future__ import annotations

from dataclasses import dataclass

THINK, THINK_END, ANSWER, ANSWER_END = "<think>", "</think>", "<answer>", "</answer>"


@dataclass(frozen=True, slots=True)
class Parsed:
    """`ok`: the format holds. `reasoning` and `answer` are stripped, and as good a guess as the text allows where it does not hold."""

    ok: bool
    reasoning: str
    answer: str


def parse(text: str) -> Parsed:
    """Split a response. The answer is the first complete `<answer>` block after the reasoning, never one inside it.

    In a broken response the reasoning is what stands before the first closing or answer tag, and the answer is the first
    complete answer block, or else all that follows `</think>`, or "" where there is neither.
    """
    body = text.lstrip()
    opened = body.startswith(THINK)
    body = body.removeprefix(THINK)
    reasoning, closed, rest = body.partition(THINK_END)
    if not closed:
        reasoning, tag, rest = body.partition(ANSWER)
        rest = tag + rest
    answer = _block(rest)
    ok = opened and bool(closed) and answer is not None
    if answer is None:
        answer = rest if closed else ""
    return Parsed(ok, reasoning.strip(), answer.strip())


def _block(text: str) -> str | None:
    """What stands in the first `<answer>..</answer>` of `text`; None where there is no complete one."""
    start = text.find(ANSWER)
    end = text.find(ANSWER_END, start + len(ANSWER)) if start >= 0 else -1
    return text[start + len(ANSWER):end] if end >= 0 else None
