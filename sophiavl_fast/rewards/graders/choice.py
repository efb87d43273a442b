"""Multiple choice, 0 or 1: the set of options that an answer names must equal the set that the gold answer names.

Understood: `B`, `b`, `(B)`, `B.`, `B) cat`, `B cat`, `cat (B)`, `Option B`, `The answer is B`, `Answer:B`, `A, B`, `A、B`, `A and B`, `AB`, and an
option's own text with or without its letter. Anything else names nothing: there is no search for letters inside words, and an answer that
hedges (`A or B`) or contradicts itself (a letter with another option's text) is wrong. Where a record holds no options,
capitals in a row are letters only in the alphabet's order and up to H (`ACD`), else a word (`NO`); where it does, they are the option whose text is just
that, if there is one (`AB`, the blood group).
"""
from __future__ import annotations

import re
from collections.abc import Sequence

from sophiavl_fast.rewards.graders.task import Task, clean

_LEAD = re.compile(r"(?:the )?(?:(?:correct|right|final|best) )?(?:answers?|options?|choices?)(?: (?:is|are))?(?:\s?:\s?|\s)", re.IGNORECASE)
_LATEX = re.compile(r"\\(?:text|boxed|mathrm|mathbf|textbf)\{([^{}]*)\}")
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:]{0,2}")
_LABELLED = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])\s?[.:)])\s?(.+)", re.DOTALL)
_LOOSE = re.compile(r"([A-Za-z])\s(?:[-–—]\s)?(.+)|(.+?)\s?[(\[]([A-Za-z])[)\]]", re.DOTALL)
_SEPARATOR = re.compile(r"\s?[,;&、]\s?(?:and\s)?|\sand\s|\s")
_LAST_OF_RUN = "H"
_LONGEST = 4096


def quick(task: Task) -> float:
    """1 if answer and gold are the same text or name the same options, else 0."""
    if max(len(task.answer), len(task.gold)) > _LONGEST:
        return 0.0
    texts = _texts(task.options)
    answer, gold = (_plain(t) for t in (task.answer, task.gold))
    if not answer:
        return 0.0
    if answer.casefold() == gold.casefold():
        return 1.0
    wanted = named(gold, texts)
    return float(wanted is not None and named(answer, texts) == wanted)


def named(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """The options an answer names, by index (A is 0), or None. `texts`: the options without letters, casefolded; may be empty."""
    answer = _LEAD.sub("", answer, count=1) if _LEAD.match(answer) else answer
    return _letters(answer, texts) or _labelled(answer, texts) or _loosely(answer, texts) or _by_text(answer, texts)


def _letters(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """`A`, `(A)`, `A, B`, `A and B`, or capitals in a row (`ABD`) that are no word."""
    count = len(texts) or 26
    parts = [p for p in _SEPARATOR.split(answer) if p]
    run = parts[0].strip("()[].") if len(parts) == 1 else ""
    if len(run) > 1 and run.isascii() and run.isalpha() and run.isupper() and len(set(run)) == len(run):
        word = run.casefold() in texts if texts else list(run) != sorted(run) or run[-1] > _LAST_OF_RUN
        return None if word else _indices(run, count)
    matches = [_LETTER.fullmatch(p) for p in parts]
    return _indices([m[1] for m in matches if m], count) if matches and all(matches) else None


def _labelled(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """`B. cat`: the letter counts, unless the text is another option's."""
    match = _LABELLED.fullmatch(answer)
    if not match:
        return None
    found = _indices(match[1] or match[2], len(texts) or 26)
    other = _by_text(match[3], texts)
    return found if other is None or other == found else None


def _loosely(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """`B cat`, `B - cat`, `cat (B)`: a letter without its mark counts only beside its own option's text."""
    match = _LOOSE.fullmatch(answer)
    if not match:
        return None
    found = _indices(match[1] or match[4], len(texts) or 26)
    return found if found is not None and found == _by_text(match[2] or match[3], texts) else None


def _by_text(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """An option's own text, or several separated by commas or semicolons."""
    text = answer.casefold()
    if text in texts:
        return frozenset({texts.index(text)})
    parts = [p.strip() for p in re.split("[;,、]", text)]
    return frozenset(texts.index(p) for p in parts) if len(parts) > 1 and all(p in texts for p in parts) else None


def _indices(letters: Sequence[str], count: int) -> frozenset[int] | None:
    found = frozenset(ord(x.upper()) - ord("A") for x in letters)
    return found if max(found) < count else None


def _texts(options: Sequence[str]) -> list[str]:
    """Options without their letters: `A. cat`, `(A) cat` and `cat` are all `cat`; the letter must be the option's own place."""
    out = []
    for index, option in enumerate(_plain(o) for o in options):
        match = _LABELLED.fullmatch(option)
        own = match and (match[1] or match[2]).upper() == chr(ord("A") + index)
        out.append((match[3] if match and own else option).strip(" .").casefold())
    return out


def _plain(text: str) -> str:
    return _LATEX.sub(r"\1", clean(text)).strip(" .*_`\"'")
