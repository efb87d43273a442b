"""Questions about a row of digits: all five problem types of SophiaVL-R1, and sums that come without a picture."""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

LETTERS = "ABCD"


@dataclass(frozen=True)
class Kind:
    """One way to ask. `wording` may hold {terms}, the digits joined by '+'; `truth` maps digits to the answer in words."""

    problem_type: str
    wording: str
    truth: Callable[[Sequence[int]], str]
    share: float            # of a dataset's records
    pictured: bool = True   # False: the question itself holds the digits


def trend(digits: Sequence[int]) -> str:
    """rising, falling, or mixed where neither holds for every neighbour."""
    if all(a < b for a, b in pairwise(digits)):
        return "rising"
    return "falling" if all(a > b for a, b in pairwise(digits)) else "mixed"


KINDS: dict[str, Kind] = {
    "sum": Kind("numerical", "sum?", lambda d: str(sum(d)), 0.20),
    "spread": Kind("numerical", "max-min?", lambda d: str(max(d) - min(d)), 0.14),
    "largest": Kind("multiple choice", "largest? ", lambda d: str(max(d)), 0.11),
    "smallest": Kind("multiple choice", "smallest? ", lambda d: str(min(d)), 0.09),
    "read": Kind("OCR", "read", lambda d: " ".join(map(str, d)), 0.12),
    "range": Kind("free-form", "range?", lambda d: f"from {min(d)} to {max(d)}", 0.13),
    "trend": Kind("text", "trend?", trend, 0.13),
    "add": Kind("numerical", "{terms}?", lambda d: str(sum(d)), 0.08, pictured=False),
}


@dataclass(frozen=True)
class Question:
    """A kind asked about one row of digits; `options` only for multiple choice."""

    kind: str
    digits: tuple[int, ...]
    options: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        return KINDS[self.kind].wording.format(terms="+".join(map(str, self.digits)))

    @property
    def answer(self) -> str:
        """The gold answer; the letter for multiple choice."""
        return self.answer_for(KINDS[self.kind].truth(self.digits))

    def answer_for(self, value: str) -> str:
        """How `value` is answered: the letter of its option where there are options."""
        return LETTERS[self.values.index(value)] if self.options else value

    @property
    def values(self) -> list[str]:
        """The options without their letters."""
        return [option.removeprefix(f"{letter}. ") for letter, option in zip(LETTERS, self.options)]


def ask(kind: str, digits: Sequence[int], rng: random.Random) -> Question:
    """A question of this kind; multiple choice offers every digit of the row and fills up with others."""
    if KINDS[kind].problem_type != "multiple choice":
        return Question(kind, tuple(digits))
    offered = sorted(set(digits))
    offered += rng.sample([d for d in range(10) if d not in offered], len(LETTERS) - len(offered))
    rng.shuffle(offered)
    return Question(kind, tuple(digits), tuple(f"{letter}. {value}" for letter, value in zip(LETTERS, offered)))


def draw_digits(rng: random.Random) -> tuple[int, ...]:
    """Three digits, or two in one row of five."""
    return tuple(rng.randrange(10) for _ in range(2 if rng.random() < 0.2 else 3))


def draw_kind(rng: random.Random, *, pictured: bool | None = None) -> str:
    """A kind by its share; `pictured` narrows to questions with or without a picture."""
    names = [name for name, kind in KINDS.items() if pictured in (None, kind.pictured)]
    return rng.choices(names, weights=[KINDS[name].share for name in names])[0]
