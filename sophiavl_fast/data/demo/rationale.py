"""What the demo's generative judge writes before its score, in a form that a character model of 2 M parameters learns in minutes.

First its own solution; then a row for each line of the trace, which sets the line beside the judge's own, character by character,
up to the first difference, so that every comparison is between two tokens that stand side by side:

    5 8 3            own solution
    5+8=13
    13+3=16
    a55  88  33;;1   line a: own and shown characters in turns; the same to the end (;), so this is sound line number 1
    b55++88==14x     line b: 13 against 14
    c-               line c is missing

The last row's letter says how many lines count, the last number how many of them are right: the score is their ratio, as in `soundness`.
"""
from __future__ import annotations

import string
from collections.abc import Sequence

from sophiavl_fast.data.demo import soundness, traces
from sophiavl_fast.data.demo.questions import Question

END, WRONG, MISSING = ";", "x", "-"


def rationale(question: Question, reasoning: str) -> str:
    """The judge's reasoning about a trace, one line a row, without tags."""
    own = traces.sound(question).lines
    rows, right = [], 0
    for line, step, met in _beside(reasoning, question, own):
        right += met
        rows.append(_compared(step, line) + (str(right) if met else WRONG))
    rows += [MISSING] * (len(own) - len(rows))
    return "\n".join((*own, *(string.ascii_lowercase[i % 26] + row for i, row in enumerate(rows))))


def _beside(reasoning: str, question: Question, own: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Each line of the trace, the judge's line to set beside it, and whether the rule accepts it.

    A wrong line stands beside the first own step that no line before it took and no later one needs; "" where none is left.
    """
    lines, met = soundness.walk({"kind": question.kind, "digits": question.digits}, reasoning)
    out, free = [], 0
    for i, (line, step) in enumerate(zip(lines, met, strict=True)):
        if step is not None:
            out.append((line, line, True))  # the rule accepts other spellings too, such as 2+5=7 for 5+2=7
            free = step + 1
            continue
        out.append((line, own[free] if free < len(own) else "", False))
        free += free < next((later for later in met[i + 1:] if later is not None), len(own))
    return out


def _compared(own: str, shown: str) -> str:
    """Their characters in turns, up to the first difference."""
    text = ""
    for a, b in zip(own + END, shown + END):
        text += a + b
        if a != b:
            break
    return text
