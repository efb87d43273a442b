"""Texts of numerical answers, written as plainly as they can be, and those that no parser may be shown since it drops what it cannot read."""
from __future__ import annotations

import re
import unicodedata

from sophiavl_fast.rewards.graders.task import clean

_VULGAR = {chr(code): " " + unicodedata.normalize("NFKC", chr(code)).replace("\u2044", "/") for code in (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F), 0x2189)}
_SIGNS = {"−": "-", "–": "-", "—": "-", "\u2044": "/", "∕": "/", "∶": ":", "º": "°",
          "˚": "°", "℃": "°C", "℉": "°F", "′": "'", "’": "'", "″": '"', "”": '"', "“": '"',
          "\u2126": "Ω", "⋅": "·",
          "。": ".", "、": ",", "…": "...", "\u2010": "-", "\u2011": "-", "∣": "|", "≅": "≈", "≒": "≈", "∴": " ", "¢": " cents",
          "㎡": "m^2", "㎠": "cm^2", "㎥": "m^3", "㎜": "mm", "㎝": "cm", "㎞": "km", "㎏": "kg"} | dict.fromkeys("\u200b\u200d\ufeff", "")
_WRITTEN = str.maketrans(_VULGAR | _SIGNS | dict.fromkeys("£€¥₹￥₩₽₺₫\u00a0\u2009\u202f", " "))
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LOWERED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_SUNK = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED_CIRCLE = re.compile(r"(?<=[0-9])(?<![x×·*]10)(?<![x×·*] 10)⁰(?![⁰¹²³⁴⁵⁶⁷⁸⁹])")
_DOUBLED = re.compile(r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|text(?:bf|rm)?|math(?:rm|bf)|pi|times|cdot|left|right|boxed|circ|degree|infty|pm|theta|angle|approx)"
                      "(?![A-Za-z])|%)")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,;:! ]|~)(?=[0-9]{3}(?![0-9]))")
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]|(?<=[0-9A-Za-z)}])~|~(?=\\)")
_ROOT = re.compile(r"√\s?(?:\(([^()]{1,64})\)|\{([^{}]{1,64})\}|([0-9]{1,32}(?:\.[0-9]{1,32})?|[A-Za-zπ]))")
_STARS = re.compile(r"(?<=[0-9A-Za-z)}])\*\*(?=[-(0-9{])")
_EXPONENT = re.compile(r"\^\s?\(?([-+]?[0-9]{1,32})\)?(?![0-9])")
_TIMES_TEN = re.compile(r"(?<=[0-9])\s?[x×·*]\s?(?=10\s?\^)")
_PERCENT = re.compile(r"\s?\bper\s?cent\b", re.IGNORECASE)
_ABOUT = re.compile(r"(?:[≈~∼≃]|\\(?:approx|sim)\b|(?:about|around|roughly|approx(?:imately|\.)?|ca\.)(?= )|大?约)\s?", re.IGNORECASE)
_CURRENCY = re.compile(r"(?:US|USD|EUR|GBP|INR|CNY|RMB|JPY|Rs\.?)\s?(?=[-+.0-9])")
_MARKUP = " *_`"

_RELATION = re.compile(r"(?:[A-Za-z]\s?)?(≠|≥|≤|≯|≮|>=|<=|>|<|!=|¬|\\(?:neq?|not|neg|lnot|ge|geq|geqslant|gt|le|leq|leqslant|lt)(?![A-Za-z])\s?=?)\s?")
_RELATIONS = {"≥": ">=", "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "≤": "<=", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "\\gt": ">", "\\lt": "<",
              "≠": "!=", "\\ne": "!=", "\\neq": "!=", "\\not=": "!="}
_DENIED = re.compile(r"\b(?:not|never|neither|nor|cannot|isn't|wrong|incorrect"
                     r"|or (?:more|less|fewer|higher|lower|so)|at (?:least|most)|(?:more|less|fewer|greater|other) than)\b", re.IGNORECASE)
# characters that the parser reads, or that are read for it
_READ = {"π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "±": "\\pm ", "≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ",
         "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
         "÷": "\\div ", "°": "^\\circ ", "≈": "\\approx ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ", "ℝ": "\\mathbb{R}",
         "∅": "\\emptyset "}
_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_LATEX = str.maketrans(_READ)
# digits that a parser would cut off: 5_6, 5|6, 5°30', 5'6", 5&6, 5..6, 5+, 5^, 5?
_CUT = re.compile(r"[0-9}]\s?_\s?\{?[0-9A-Za-z]{0,8}\}?|[0-9}]\s?\|+\s?[0-9\\]|°\s?[0-9]|['\"&@#`]\s?[0-9\\]|\.\.|[-+*/^=]$|\\?sqrt\s?$|\?")


def normal(text: str) -> str:
    """One line, powers as ^{...}, no dollar signs, no `about`, no LaTeX spacing; several lines of LaTeX as a list."""
    text = _RAISED_CIRCLE.sub("°", text.translate(_WRITTEN))
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text)
    text = _SUBSCRIPT.sub(lambda match: f"_{{{match[0].translate(_SUNK)}}}", text)
    text = clean(text).strip(_MARKUP).rstrip("." + _MARKUP).replace("{,}", ",")
    for opening, closing in (("\\[", "\\]"), ("\\(", "\\)")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2].strip(_MARKUP)
    text = unboxed(text)
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text).replace("\\\\", " , ")
    text = " ".join(_SPACING.sub(" ", _THOUSANDS.sub("", text)).split())
    for prefix in (_ABOUT, _CURRENCY):
        if match := prefix.match(text):
            text = text[match.end():]
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    text = _EXPONENT.sub(r"^{\1}", _STARS.sub("^", text).replace("**", ""))
    return _TIMES_TEN.sub(r"\\times ", _PERCENT.sub("%", text)).strip(_MARKUP)


def unboxed(text: str) -> str:
    """The inside of a \\boxed{...} that is the whole text."""
    inside = text[7:-1] if text.startswith("\\boxed{") and text.endswith("}") else None
    if inside is None:
        return text
    depth = 0
    for sign in inside:
        depth += (sign == "{") - (sign == "}")
        if depth < 0:
            return text
    return inside.strip(_MARKUP) if depth == 0 else text


def relation(text: str) -> tuple[str, str]:
    """`\\geq 5` as (`>=`, `5`); "" where a text begins with no relation."""
    match = _RELATION.match(text)
    if match is None:
        return "", text
    sign = match[1].replace(" ", "")
    return _RELATIONS.get(sign, sign), text[match.end():]


def unreadable(text: str, other: str) -> bool:
    """Whether a parser would drop part of a text, or all that denies it; what the other side has too is weighed as text there."""
    if any(not (c.isascii() or c in _READ or _latin_or_greek(c)) for c in text):
        return True
    return any(found[0] not in other for pattern in (_CUT, _DENIED) for found in pattern.finditer(text))


def squeezed(text: str) -> str:
    """For comparing what cannot be read: case, spaces and braces do not matter."""
    return re.sub(r"[\s{}]", "", text).casefold()


def latex(text: str) -> str:
    """Symbols as LaTeX commands."""
    return _PI.sub(r"\\pi ", text.translate(_LATEX))


def _latin_or_greek(char: str) -> bool:
    return char.isalpha() and (char <= "\u024f" or "\u0370" <= char <= "\u03ff")
