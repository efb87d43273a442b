"""What the demo's generative judge writes before its score, in a form that a character model of 2 M parameters learns in minutes.

Its own solution, one row for each line of the trace, and in each row where the trace first differs from it:

    a5 8 3A       own line for line a of the trace, which is the same: the first sound one (A)
    b5+8=13!x     line b said 12 or 5+8=1 or anything else that is no 3 there
    c13+3=16B     line c is the second sound one
    d-            a line that is missing

(without line breaks). As long as the trace is right, a row is as long as the line that the prompt shows under the same letter, and the prompt
fills its lines up to one length: what has to be compared lies at one distance, and every character is one small decision instead of a line being
a large one. The last lower-case letter says how many lines count, the last capital how many of them are right: the score is their ratio, as in
`soundness`.
"""
from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import zip_longest

from sophiavl_fast.data.demo import soundness, traces
from sophiavl_fast.data.demo.questions import Question

DIFFERS, WRONG, MISSING = "!", "x", "-"


def rationale(question: Question, reasoning: str) -> str:
    """The judge's reasoning about a trace, without tags."""
    own = traces.sound(question).lines
    rows, right = [], 0
    for line, step, met in _beside(reasoning, question, own):
        rows.append(_compared(step, line) + (string.ascii_uppercase[right % 26] if met else WRONG))
        right += met
    rows += [MISSING] * (len(own) - len(rows))
    return "".join(string.ascii_lowercase[i % 26] + row for i, row in enumerate(rows))


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
    """The own line, marked after its first character that the shown one does not have there."""
    at = next((i for i, (a, b) in enumerate(zip_longest(own, shown)) if a != b), len(own))
    return own[:at + 1] + DIFFERS + own[at + 1:] if at < len(own) else own
