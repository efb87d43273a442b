"""Multiple choice, 0 or 1: the set of options that an answer names must equal the set that the gold answer names.

Understood: `B`, `(B)`, `B.`, `B) cat`, `B cat`, `B, cat`, `cat (B)`, `Option B`, `The answer is **B**`, `B is correct`, `A, B`, `A and B`, `AB`,
`A. cat, C. bed`, and an option's own text with or without its letter. Anything else names nothing: there is no search for letters
inside words, and an answer that hedges (`A or B`) or contradicts itself (a letter with another option's text, or with words that are not its own) is
wrong. Where a record holds no options,
capitals in a row are letters only in the alphabet's order and up to H (`ACD`), else a word (`NO`); where it does, they are the option whose text is just
that, if there is one (`AB`, the blood group).
"""
from __future__ import annotations

import re
from collections.abc import Sequence

from sophiavl_fast.rewards.graders import numerical
from sophiavl_fast.rewards.graders.task import Task, clean
from sophiavl_fast.rewards.graders.text import WORD

_LEADS = (
    re.compile(r"(?:so|thus|therefore|hence|then)(?:\s?,)?\s", re.IGNORECASE),
    re.compile(r"(?:it is|it's|it must be|i (?:would )?(?:choose|pick|select))\s", re.IGNORECASE),
    re.compile(r"(?:the )?(?:(?:correct|right|final|best|most likely) ){0,2}(?:answers?|options?|choices?)(?: (?:is|are))?(?:\s?[:=]\s?|\s-\s|\s)",
               re.IGNORECASE),
    re.compile(r"(?:正确)?答案(?:\s?是|\s?为)?\s?:?\s?|(?:我)?选(?:择)?\s?:?\s?"))
_TAIL = re.compile(r"(.{1,200}?)\s(?:is|are) (?:the )?(?:(?:correct|right|best)(?: (?:answer|option|choice|one))?|answer|option|choice)",
                   re.IGNORECASE | re.DOTALL)
_LATEX = re.compile(r"\\(?:text|boxed|mathrm|mathbf|mathsf|textbf|textrm|textit)\{([^{}]*)\}")
_MATH = re.compile(r"\\[()\[\]]")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_LETTER = re.compile(r"""[(\[{<【'"“]{0,2}([A-Za-z])[)\]}>】'"”.:!;]{0,3}""")
_LABELLED = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])\s?[.:)])\s?(.+)", re.DOTALL)
_LOOSE = (re.compile(r"(?P<letter>[A-Za-z])(?:\s[-–—]\s|[–—]|-(?=[^\W\d_])|\s?[,、]\s?|\s?(?=\()|\s)(?P<text>.+)", re.DOTALL),
          re.compile(r"(?P<text>.+?)\s?[(\[](?P<letter>[A-Za-z])[)\]]", re.DOTALL))
_LABEL = re.compile(r"(?<![\w.])(?:(?:option|choice)s? )?(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Z])[.:)](?=[\s,;]|$))", re.IGNORECASE)
_SEPARATOR = re.compile(r"\s?[,;&、+]\s?(?:and\s)?|\sand\s|\s|(?<=[)\]])(?=[(\[])")
_ARTICLE = re.compile(r"^(?:the|an?)\s")
_HEDGES = frozenset("or not no nor neither none wrong false incorrect isn except but either maybe instead rather cannot 不 非 或 错".split())  # noqa: SIM905
_REASON = re.compile(r"[,;.:]?\s(?:because|since)\s", re.IGNORECASE)
_LAST_OF_RUN = "H"
_LONGEST = 4096
_LONGEST_TEXT = 512     # of an option, where its words are compared


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
    asked = wanted(task.gold, task.options)
    return float(asked is not None and named(answer, texts) == asked)


def wanted(gold: str, options: Sequence[str]) -> frozenset[int] | None:
    """The options that a gold answer names, by index, or None."""
    return named(_plain(gold), _texts(options), strict=False)


def named(answer: str, texts: Sequence[str], *, strict: bool = True) -> frozenset[int] | None:
    """The options an answer names, by index (A is 0), or None. `texts`: the options without letters, casefolded; may be empty, "" where one is unknown.

    strict: words beside a letter must be its option's own (a gold answer's need not)."""
    if (found := _verbatim(answer, texts)) is not None:
        return found
    answer = _stripped(answer)
    found = _verbatim(answer, texts) or _letters(answer, texts)
    if found is None:
        found = _listed(answer, texts) or _labelled(answer, texts, strict=strict) or _loosely(answer, texts) or _by_text(answer, texts)
    if found is None and (reason := _REASON.search(answer)):
        return named(answer[:reason.start()], texts, strict=strict)
    return found


def _stripped(answer: str) -> str:
    """Without what leads up to the letter or follows it: `So the correct answer is`, `is correct`."""
    for _ in range(3):
        for lead in _LEADS:
            if (match := lead.match(answer)) and match.end() < len(answer):
                answer = answer[match.end():].strip(" .*\"'“”")
    match = _TAIL.fullmatch(answer)
    return match[1] if match else answer


def _verbatim(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """An option's text to the letter, whatever it looks like (`A and B`), alone or with its own letter (`A. A and B`)."""
    if answer.casefold() in texts and not _LETTER.fullmatch(answer):
        return frozenset({texts.index(answer.casefold())})
    pairs = [(m[1] or m[2], m[3]) for m in [_LABELLED.fullmatch(answer)] if m]
    pairs += [(m["letter"], m["text"]) for m in (pattern.fullmatch(answer) for pattern in _LOOSE) if m]
    for letter, text in pairs:
        text, index = text.strip(" .").casefold(), _index(letter)
        if index < len(texts) and (texts[index] == text if len(text) > 1 else text == letter.casefold() and not texts[index]):
            return frozenset({index})
    return None


def _letters(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """`A`, `(A)`, `A, B`, `A and B`, or capitals in a row (`ABD`) that are no word."""
    count = len(texts) or 26
    parts = [p for p in _SEPARATOR.split(answer) if p]
    run = parts[0].strip("()[].") if len(parts) == 1 else ""
    if len(run) > 1 and run.isascii() and run.isalpha() and run.isupper() and len(set(run)) == len(run):
        word = run.casefold() in texts if texts else list(run) != sorted(run) or run[-1] > _LAST_OF_RUN
        return None if word else _indices(run, count)
    if len(parts) > 2 and parts[0].casefold() == "both":
        parts = parts[1:]
    parts = [p for i, p in enumerate(parts) if i == len(parts) - 1 or p.casefold() not in ("option", "options", "choice")]
    matches = [_LETTER.fullmatch(p) for p in parts]
    return _indices([m[1] for m in matches if m], count) if matches and all(matches) else None


def _listed(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """`A. cat, C. bed`: each label with its option's own text or nothing."""
    labels = list(_LABEL.finditer(answer))
    if not 2 <= len(labels) <= 26 or labels[0].start():
        return None
    ends = [label.start() for label in labels[1:]] + [len(answer)]
    found = _indices([label[1] or label[2] for label in labels], len(texts) or 26)
    segments = [answer[label.end():end].rstrip(" ,;、&").removesuffix(" and").strip(" ,;、&") for label, end in zip(labels, ends, strict=True)]
    segments = ["" if s == "and" else s for s in segments]
    own = all(not s or _is_own(s, _index(label[1] or label[2]), texts) for s, label in zip(segments, labels, strict=True))
    return found if own else None


def _labelled(answer: str, texts: Sequence[str], *, strict: bool) -> frozenset[int] | None:
    """`B. cat`: the letter counts where the text is its own, or no option's and unknown."""
    match = _LABELLED.fullmatch(answer)
    if not match:
        return None
    found = _indices(match[1] or match[2], len(texts) or 26)
    if not strict:
        other = _by_text(match[3], texts)
        return found if other is None or other == found else None
    return found if found is not None and _is_own(match[3], min(found), texts) else None


def _loosely(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """`B cat`, `B - cat`, `B (cat)`, `cat (B)`: a letter without its mark counts only beside its own option's text."""
    for match in filter(None, (pattern.fullmatch(answer) for pattern in _LOOSE)):
        found, text = _indices(match["letter"], len(texts) or 26), match["text"]
        if text.startswith("(") and text.endswith(")"):
            text = text[1:-1]
        if found is not None and found == _by_text(text, texts):
            return found
    return None


def _by_text(answer: str, texts: Sequence[str]) -> frozenset[int] | None:
    """An option's own text, but for an article or the way a number is written, or several separated by commas or semicolons."""
    text = answer.strip(" .").casefold()
    if not text:
        return None
    if text in texts:
        return frozenset({texts.index(text)})
    near = [i for i, own in enumerate(texts) if own and _alike(text, own)]
    if len(near) == 1:
        return frozenset(near)
    parts = [p.strip() for p in re.split("[;,、]", text)]
    return frozenset(texts.index(p) for p in parts) if len(parts) > 1 and all(p and p in texts for p in parts) else None


def _alike(text: str, own: str) -> bool:
    if _ARTICLE.sub("", text) == _ARTICLE.sub("", own):
        return True
    numbers = len(text) <= _LONGEST_TEXT and re.search("[0-9]", text) and re.search("[0-9]", own)
    return bool(numbers) and numerical.quick(Task("numerical", text, own)) == 1.0


def _is_own(text: str, index: int, texts: Sequence[str]) -> bool:
    """Whether the words beside a letter are its option's, and more like it than like any other; no hedge, no other option's, no other letter."""
    text = text.strip(" .").casefold()
    known = texts[index] if index < len(texts) else ""
    named = _by_text(text, texts)
    if named is not None:
        return named == frozenset({index})
    words, own = _words(text), _words(known)
    if words & (_HEDGES - own) or _LABEL.search(text) or (len(text) == 1 and text.isascii() and text.isalpha() and _index(text) != index):
        return False
    if not own:
        return True   # nothing to compare with
    like = _likeness(words, own)
    others = [_words(other) for i, other in enumerate(texts) if i != index]
    return like > max((_likeness(words, other) for other in others), default=0.0) or (like > 0 and words <= own and (words == own or words not in others))


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))


def _words(text: str) -> frozenset[str]:
    return frozenset(WORD.findall(text[:_LONGEST])) - {"the", "a", "an"}


def _index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _indices(letters: Sequence[str], count: int) -> frozenset[int] | None:
    found = frozenset(_index(x) for x in letters)
    return found if max(found) < count else None


def _texts(options: Sequence[str]) -> list[str]:
    """Options without their letters: `A. cat`, `(A) cat` and `cat` are all `cat`; the letter must be the option's own place, and alone it is no text."""
    out = []
    for index, option in enumerate(_plain(o) for o in options):
        letter = chr(ord("A") + index)
        match, alone = _LABELLED.fullmatch(option), _LETTER.fullmatch(option)
        own = match and (match[1] or match[2]).upper() == letter
        text = (match[3] if match and own else option).strip(" .").casefold()
        out.append("" if alone and alone[1].upper() == letter else text)
    return out


def _plain(text: str) -> str:
    text = _MATH.sub(" ", clean(text))
    for _ in range(4):
        text, count = _LATEX.subn(r"\1", text)
        if not count:
            break
    return " ".join(_BOLD.sub(r"\1", text).split()).strip(" .*_`\"'“”‘’")
