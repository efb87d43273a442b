"""Free-form and short-text answers: the mean of ROUGE-1, ROUGE-2 and ROUGE-L F-measures, with stemming.

Exactly the published formula: a one-word answer has no ROUGE-2, so even the right one earns 2/3 (above trust.threshold).
rouge-score's own tokenizer keeps only a-z and 0-9, so that a right answer in Chinese or Greek would score a silent 0.
Ours is the same on ASCII text and takes words of any script besides; scripts without spaces go by character.
"""
from __future__ import annotations

import re
from functools import cache
from typing import Any

from sophiavl_fast.rewards.graders.task import Task, clean

_QUICK = 60_000  # character pairs: the longest common subsequence takes about a millisecond
_KANA_AND_HAN = "\u3041-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[{_KANA_AND_HAN}]|[^\\W_{_KANA_AND_HAN}]+")
_MEASURES = ("rouge1", "rouge2", "rougeL")


def quick(task: Task) -> float | None:
    """The grade of a short answer, None for a long one."""
    return grade(task) if len(task.answer) * len(task.gold) <= _QUICK else None


def grade(task: Task) -> float:
    """Mean of the three F-measures, in [0, 1]; without any word on one side, 1 for equal texts and else 0; nothing is never right."""
    answer, gold = clean(task.answer), clean(task.gold)
    if not (WORD.search(answer) and WORD.search(gold)):
        return float(bool(answer) and answer == gold)
    found = _scorer().score(gold, answer)
    return sum(found[m].fmeasure for m in _MEASURES) / len(_MEASURES)


def prepare() -> None:
    """Import rouge-score (a second, most of it NLTK)."""
    _scorer()


class Tokenizer:
    """Lower-case words of any script; words of more than three letters are stemmed, as rouge-score does."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(w) if len(w) > 3 else w for w in WORD.findall(text.lower())]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(_MEASURES, tokenizer=Tokenizer())
