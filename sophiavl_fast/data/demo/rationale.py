"""What the demo's generative judge writes before its score, in a form that a character model of 2 M parameters learns in minutes.

Its own solution beside the trace, one row for each line, one pair for each character: what the judge would write there, then whether the
trace has the same:

    a:5. .8. .3./A        own line for line a of the trace, which is the same: the first right one (A)
    b:5.+.8.=.1!3!/!x     line b said 5+8=3x or anything else that differs in those places, or ends elsewhere
    c:1.3.+.3.=.1.6./B    line c is the second right one
    d-                    a line that is missing

(without line breaks). The prompt shows every character of the trace followed by a space, and fills the whole up to one length: each pair then lies
as far behind the character it is about as any other, whatever the trace, and every mark is one small decision instead of a line being a large one.
The last lower-case letter says how many lines count, the last capital how many of them are right: the score is their ratio, as in `soundness`.
"""
from __future__ import annotations

import string
from collections.abc import Sequence

from sophiavl_fast.data.demo import soundness, traces
from sophiavl_fast.data.demo.questions import Question

SAME, DIFFERS, WRONG, MISSING, END, NOTHING = ".", "!", "x", "-", "/", "_"


def rationale(question: Question, reasoning: str) -> str:
    """The judge's reasoning about a trace, without tags."""
    own = traces.sound(question).lines
    rows, right = [], 0
    for line, step, met in _beside(reasoning, question, own):
        rows.append(":" + _compared(step, line) + (string.ascii_uppercase[right % 26] if met else WRONG))
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
    """A pair for each character shown and one for the line's end, whose mark is left to the verdict on the line."""
    due = (own + END).ljust(len(shown) + 1, NOTHING)
    return "".join(a + (SAME if a == b else DIFFERS) for a, b in zip(due, shown)) + due[len(shown)]
