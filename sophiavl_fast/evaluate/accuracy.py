"""Exact-match accuracy and sound reasoning, as a whole and by problem type.

An answer is right when the format holds and its text equals the gold answer: graded as in training for numerical and
multiple-choice questions (0/1 there), by equality of the normalised text for the graded types (OCR, free-form, text),
whose training rewards are partial. An empty answer is never right. One whose grader had to be killed is wrong, and counted
in eval/grader_killed.
"""
from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from sophiavl_fast.config import Rewards as RewardsConfig
from sophiavl_fast.data.dataset import Example
from sophiavl_fast.errors import UserError, nearest
from sophiavl_fast.rewards.format import parse
from sophiavl_fast.rewards.outcome import OutcomeScorer
from sophiavl_fast.types import Group, Prompt


@dataclass(frozen=True, slots=True)
class Judgement:
    """One held-out answer: right or not, its reasoning sound or not (None: no rule for this record)."""

    id: str
    problem_type: str
    question: str
    gold: str
    response: str
    right: bool
    sound: bool | None
    tokens: int
    truncated: bool
    killed: bool = False    # its grader hung, crashed or ran out of memory


def judge(groups: list[Group], rewards: RewardsConfig) -> list[Judgement]:
    """Judge every response of every group."""
    with OutcomeScorer(rewards) as scorer:
        scores = scorer.score(groups)
    graded = enumerate(scores.outcome.tolist())
    out = []
    for group in groups:
        prompt = group.prompt
        for response in group.responses:
            (row, outcome), found = next(graded), parse(response.text)
            exact = prompt.problem_type in ("numerical", "multiple_choice") and outcome >= 1.0
            right = found.ok and (exact or _equal(found.answer, prompt.gold))
            out.append(Judgement(prompt.id, prompt.problem_type, prompt.question, prompt.gold, response.text, right, sound(prompt, response.text),
                                 len(response.token_ids), response.finish_reason == "length", row in scores.reasons))
    return out


def metrics(judged: Iterable[Judgement]) -> dict[str, float]:
    """eval/accuracy and eval/reasoning, each also as eval/<what>/<problem type>; reasoning only over records with a rule (NaN where none has one).

    eval/grader_killed: answers that count as wrong because their grader hung, crashed or ran out of memory."""
    judged = list(judged)
    if not judged:
        return {}
    out = {"eval/count": len(judged), "eval/truncated": _mean(j.truncated for j in judged), "eval/length_mean": _mean(j.tokens for j in judged),
           "eval/grader_killed": sum(j.killed for j in judged)}
    for what, value in (("accuracy", lambda j: j.right), ("reasoning", lambda j: j.sound)):
        rows = [j for j in judged if value(j) is not None]
        out[f"eval/{what}"] = _mean(value(j) for j in rows) if rows else math.nan
        for kind in sorted({j.problem_type for j in rows}):
            out[f"eval/{what}/{kind}"] = _mean(value(j) for j in rows if j.problem_type == kind)
    return out


def normal(text: str) -> str:
    """Text for exact comparison: case, how accents are composed, outer punctuation and runs of white space do not matter."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().strip(" .\n\t").split())


def _equal(answer: str, gold: str) -> bool:
    """Equal as normal text; where nothing is left of one, as it stands, and an empty answer equals nothing."""
    left, right = normal(answer), normal(gold)
    return left == right if left and right else bool(answer.strip()) and answer.strip() == gold.strip()


def sound(prompt: Prompt, response: str) -> bool | None:
    """Whether every line of the reasoning holds, by the rule that the record names in `reasoning_check`; None without one."""
    rule = prompt.record.get("reasoning_check")
    return None if rule is None else _rule(rule)(prompt.record, response)


def refuse_unknown_rule(record: Example) -> None:
    """UserError where `reasoning_check` names no rule, or one that finds no use for the record: evaluation would fail at the first answer."""
    rule = record.record.get("reasoning_check")
    if rule is None:
        return
    if not isinstance(rule, str):
        raise UserError(f"reasoning_check must be the name of a rule, not {type(rule).__name__}")
    prompt = Prompt(id=record.id, dataset="", problem_type=record.problem_type, question="", gold=record.gold, record=record.record)
    try:
        sound(prompt, "<think></think><answer></answer>")
    except UserError:
        raise
    except Exception as error:  # a rule reads fields of its own
        raise UserError(f"reasoning_check '{rule}' cannot read the record ({type(error).__name__}: {error})") from None


@cache
def _rule(name: str) -> Callable[[dict, str], bool]:
    if name == "demo_digits":
        from sophiavl_fast.data.demo import soundness

        return lambda record, response: soundness.check(record, response).sound
    raise UserError(f"reasoning_check '{name}': no such rule{nearest(name, ['demo_digits'])}")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
