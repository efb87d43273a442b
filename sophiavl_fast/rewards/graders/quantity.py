"""A number as people write it, with what may stand beside it: `1,234.5`, `2 1/2`, `50%`, `3.2×10^{-5} m`, `5 million`, `20 people`, `v = 5 m/s`."""
from __future__ import annotations

import math
import re
from typing import NamedTuple

from sophiavl_fast.rewards.graders import units
from sophiavl_fast.rewards.graders.units import Unit

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s?"
    r"(?:(?P<whole>[0-9]+)\s(?=[0-9]+\s?/))?"
    r"(?P<top>[0-9]{1,3}(?:[, ][0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?P<exp>[eE][+-]?[0-9]{1,4})?"
    r"(?:\s?/\s?(?P<bottom>[0-9]+(?:\.[0-9]+)?))?"
    r"(?P<percent>\s?\\?%)?")
_LONGEST = 128  # characters; longer ones go the slow way
_LONGEST_NUMBER = 64
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "mn": 1e6, "billion": 1e9, "bn": 1e9, "trillion": 1e12, "dozen": 12.0, "百": 1e2,
           "千": 1e3, "万": 1e4, "百万": 1e6, "千万": 1e7, "亿": 1e8}
_LETTERS = {"K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9}
_LETTER_UNITS = {"K": frozenset({("K", 1)})}     # what the letter may mean besides
_INCH = frozenset({("in", 1)})
_SCALE = re.compile(r"([^\W\d_]+)\.?(?:\s|$)|([万亿])(?=[^\W\d_])")
_WORD = r"[^\W\d_]+(?:['’-][^\W\d_]+)?"
_WORDS = re.compile(rf"{_WORD}(?: {_WORD}){{0,7}}\.?")
# what follows a number and is no noun: it changes the number, joins it with another or denies it
_NO_NOUNS = frozenset("""or and to not no never none plus minus over divided multiplied by mod modulo pi sqrt root sin cos tan cot csc log ln exp
    inf infty infinity is are was isn't wrong incorrect false except but vs versus than then below above under negative squared cubed factorial factorials
    half halves third thirds fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths millionths percent percentage
    zero one two three four five six seven eight nine ten eleven twelve hundred thousand million billion trillion dozen hundreds thousands millions billions
    least most minimum maximum max about maybe mil mille unknown impossible""".split())  # noqa: SIM905
_NO_HAN = frozenset("或和与至到以不非无半多余上下十百千万亿萬億零一二三四五六七八九加减乘除约")
_NAME = r"(?:\\(?:m?angle|triangle|theta|alpha|beta|gamma|phi|lambda|mu|Delta|mathrm|text)(?![A-Za-z])|[∠△A-Za-zα-ωΔ'_{}]|\([A-Za-z]\)| )"
_NAMED = re.compile(rf"{_NAME}{{1,48}}[A-Za-z0-9α-ω}})]{{0,3}} ?(?:=|:|\bis\b:?|\bare\b:?|\bequals\b|\bis equal to\b) ?(?=[-+.0-9\\])")
_HAN_NAMED = re.compile("[A-Za-z\u4e00-\u9fff]{0,12}(?:是|为|有|共|等于|答案?):? ?(?=[-+.0-9])")
_NO_NAME = re.compile(r"\b(?:not|never|no|nor|neither|cannot|isn't|aren't|sin|cos|tan|log|ln|lg|exp)\b|[不非没无或]", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|textrm|textit|textbf|mathrm|mathbf|mathit|rm|operatorname|mbox)\s?\{([^{}]*)\}")
_DEGREES = re.compile(r"(?:°|\bdegrees?|\bdeg)\s?(C|F)(?:elsius|ahrenheit)?(?![A-Za-z])", re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\s?(?:\{([0-9]+(?:\.[0-9]+)?)\}\s?\{([0-9]+(?:\.[0-9]+)?)\}|([0-9])([0-9]))")
_POWER_OF_TEN = re.compile(r"(?:(?<=[0-9.])\s?(?:\\times|\\cdot|[x×·⋅*])\s?|(?<![0-9.,}^/*·×] )(?<![0-9.,}^/*·×]))10\s?\^\s?\{\s?([+-]?[0-9]{1,4})\s?\}")


class Quantity(NamedTuple):
    """`integer`: its digits, where it is one; `also`: another reading, good only beside the same unit (3K: 3,000 or 3 kelvin)."""

    value: float
    integer: int | None
    percent: bool
    unit: Unit | None = None
    bare: bool = True      # nothing but the number
    touching: bool = False  # a single letter stands right after the number: 5m is a length or a product
    also: Unit | None = None
    alone: float = math.nan   # the value under `also`


def read(text: str) -> Quantity | None:
    """The quantity that a normalised text is, whole; None where it is anything else."""
    if len(text) > _LONGEST:
        return None
    text = _plain(text)
    match = _NUMBER.match(text)
    if match is None or match.end() > _LONGEST_NUMBER:
        return None
    number, rest = _number(match), text[match.end():]
    if not rest:
        return number
    if number.percent:
        return number._replace(bare=False) if _nouns(rest.strip()) and rest[0] == " " else None
    return _beside(number, rest.lstrip(), spaced=rest[0] == " ")


def _plain(text: str) -> str:
    """LaTeX that is only dress taken off; a name before an equals sign, too."""
    text = _TEXT.sub(r" \1", text).replace("{}", "")
    text = re.sub(r"\s?(?:\^\s?\{\s?\\circ\s?\}|\^?\s?\\circ\b|\\degree\b)\s?", "° ", text).strip()
    text = _DEGREES.sub(lambda m: f"°{m[1].upper()}", text)
    match = _NAMED.match(text) or _HAN_NAMED.match(text)
    if match and not _NO_NAME.search(match[0]):
        text = text[match.end():]
    text = _FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]} ", text)
    text = _POWER_OF_TEN.sub(lambda m: f"{'' if m.start() and text[m.start() - 1] in '0123456789.' else '1'}e{m[1]}", text)
    return " ".join(text.split()).replace("- ", "-", 1) if text.startswith("-") else " ".join(text.split())


def _number(match: re.Match[str]) -> Quantity:
    top = match["sign"] + re.sub("[, ]", "", match["top"])
    bottom = float(match["bottom"]) if match["bottom"] else 1.0
    whole = float(match["sign"] + match["whole"]) if match["whole"] else 0.0
    value = whole + float(top + (match["exp"] or "")) / bottom if bottom else math.nan
    integer = int(top) if re.fullmatch(r"[+-]?[0-9]+", top) and not (match["exp"] or bottom != 1.0 or whole) else None
    return Quantity(value, integer, match["percent"] is not None)


def _beside(number: Quantity, rest: str, *, spaced: bool) -> Quantity | None:
    """The number with its scale (`million`, `K`) and its unit or noun."""
    also, alone = None, math.nan
    if rest[0] + rest[-1] in ("()", "[]"):
        rest, spaced = rest[1:-1].strip() or "?", True
    for _ in range(2):
        match = _SCALE.match(rest)
        word = (match[1] or match[2]) if match else ""
        scale = _SCALES.get(word.casefold()) or (_LETTERS.get(word) if not spaced or word in "MB" else None)
        if not match or scale is None:
            break
        also, alone = (_LETTER_UNITS.get(word), number.value) if match.end() == len(rest) else (None, math.nan)
        integer = number.integer * int(scale) if number.integer is not None else None
        number, rest, spaced = number._replace(value=number.value * scale, integer=integer), rest[match.end():].lstrip(), True
    number = number._replace(bare=False, also=also, alone=alone)
    if not rest:
        return number
    unit, after = units.leading(rest)
    if unit == _INCH and after and after.split()[0] not in ("long", "wide", "tall", "high", "deep", "thick"):
        unit = None   # 5 in total
    if unit is not None and (spaced or units.touching(rest)) and (not after or _nouns(after)):
        short = not spaced and len(rest) == 1 and rest.isascii()
        return number._replace(unit=unit, touching=short)
    han = not rest[0].isascii() and not rest[0].islower()
    return number if (spaced or han) and _nouns(rest) else None


def _nouns(text: str) -> bool:
    """Words alone, of which none changes the number before them."""
    if not _WORDS.fullmatch(text):
        return False
    words = text.rstrip(".").casefold().split()
    if any(w in _NO_NOUNS or "\u0370" <= w[0] <= "\u03ff" or not _NO_HAN.isdisjoint(w) for w in words):
        return False
    return not words[-1].isascii() or len(words[-1]) > 2


def same(answer: Quantity, gold: Quantity, tolerance: float) -> bool:
    """Equal numbers of units that do not contradict each other."""
    for one, other in ((answer, gold), (gold, answer)):
        if one.also and one.also == other.unit and close(one.alone, other.value, tolerance):
            return True
    if units.differ(answer.unit, gold.unit) or (answer.percent != gold.percent and (answer.unit or gold.unit)):
        return False
    if answer.integer is not None and gold.integer is not None and answer.percent == gold.percent:
        return answer.integer == gold.integer
    return any(close(a, b, tolerance) for a, b in _pairs(answer, gold))


def _pairs(left: Quantity, right: Quantity) -> list[tuple[float, float]]:
    """A percent sign on one side only may be read as a unit or as 1/100."""
    if left.percent == right.percent:
        return [(left.value, right.value)]
    bare, percent = (right.value, left.value) if left.percent else (left.value, right.value)
    return [(bare, percent), (bare, percent / 100)]


def close(left: float, right: float, tolerance: float) -> bool:
    """Equal within a relative tolerance; false for what is not finite."""
    return math.isfinite(left) and math.isfinite(right) and math.isclose(left, right, rel_tol=tolerance)
