"""Questions about a row of digits: all five problem types of SophiaVL-R1, and sums that come without a picture."""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LETTERS = "ABC"


@dataclass(frozen=True)
class Kind:
    """One way to ask. `wording` may hold {terms}, the digits joined by '+'; `truth` maps digits to the answer in words.

    `choices` are the options of multiple choice, in ascending order.
    """

    problem_type: str
    wording: str
    truth: Callable[[Sequence[int]], str]
    share: float            # of a dataset's records
    choices: tuple[str, ...] = ()
    pictured: bool = True   # False: the question itself holds the digits


TENS = ("0-9", "10-19", "20-27")
SIZES = ("0-5", "6-7", "8-9")


def size(digit: int) -> str:
    """The choice of SIZES that holds a digit."""
    return SIZES[(digit >= 6) + (digit >= 8)]


def trend(first: int, last: int) -> str:
    """Where a row goes from its first to its last digit."""
    return "rising" if first < last else "falling" if first > last else "level"


KINDS: dict[str, Kind] = {
    "sum": Kind("numerical", "sum?", lambda d: str(sum(d)), 0.16),
    "spread": Kind("numerical", "max-min?", lambda d: str(max(d) - min(d)), 0.14),
    "tens": Kind("multiple choice", "sum?", lambda d: TENS[sum(d) // 10], 0.10, TENS),
    "largest": Kind("multiple choice", "largest?", lambda d: size(max(d)), 0.10, SIZES),
    "read": Kind("OCR", "read", lambda d: " ".join(map(str, d)), 0.12),
    "range": Kind("free-form", "range?", lambda d: f"from {min(d)} to {max(d)}", 0.13),
    "trend": Kind("text", "trend?", lambda d: trend(d[0], d[-1]), 0.17),
    "add": Kind("numerical", "{terms}?", lambda d: str(sum(d)), 0.08, pictured=False),
}


@dataclass(frozen=True)
class Question:
    """A kind asked about one row of digits."""

    kind: str
    digits: tuple[int, ...]

    @property
    def problem(self) -> str:
        return KINDS[self.kind].wording.format(terms="+".join(map(str, self.digits)))

    @property
    def options(self) -> list[str]:
        """The choices with their letters, as the record holds them."""
        return [f"{letter}. {choice}" for letter, choice in zip(LETTERS, KINDS[self.kind].choices)]

    @property
    def answer(self) -> str:
        """The gold answer; the letter for multiple choice."""
        return self.lettered(KINDS[self.kind].truth(self.digits))

    def lettered(self, value: str) -> str:
        """How `value` is answered: the letter of its choice where there are choices."""
        choices = KINDS[self.kind].choices
        return LETTERS[choices.index(value)] if choices else value


def draw_digits(rng: random.Random) -> tuple[int, ...]:
    """Three digits, or two in one row of six."""
    return tuple(rng.randrange(10) for _ in range(2 if rng.random() < 1 / 6 else 3))


def draw_kind(rng: random.Random, *, pictured: bool | None = None) -> str:
    """A kind by its share; `pictured` narrows to questions with or without a picture."""
    names = [name for name, kind in KINDS.items() if pictured in (None, kind.pictured)]
    return rng.choices(names, weights=[KINDS[name].share for name in names])[0]
