"""Transcriptions by word error rate: exp(-WER) in (0, 1] (the public code), or -WER (the paper's wording).

-WER is never above 0, so such a response never reaches trust.threshold 0.5 and every group counts as all wrong.
"""
from __future__ import annotations

import math

from sophiavl_fast.rewards.graders.task import Task, clean

_QUICK = 1_000_000  # character pairs that rapidfuzz aligns in under a millisecond


def quick(task: Task) -> float | None:
    """The grade of a short transcription, None for a long one."""
    return grade(task) if len(task.answer) * len(task.gold) <= _QUICK else None


def grade(task: Task) -> float:
    """exp(-WER) or -WER."""
    rate = word_error_rate(clean(task.gold), clean(task.answer))
    return math.exp(-rate) if task.ocr == "exp_wer" else -rate


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Edits per reference word; every word counts as one edit where the reference is empty (jiwer refuses that case)."""
    if not reference:
        return float(len(hypothesis.split()))
    import jiwer

    return jiwer.wer(reference, hypothesis)
