"""Units that may follow a number: `cm`, `m/s^2`, `square feet`, `miles per hour`, `°C`. They are told apart, never converted."""
from __future__ import annotations

import re
from collections import Counter

# canonical name: its spellings; words of four letters and more also with an s. A name that begins with ? is known, but stands for several units
_SPELLINGS = {
    "mm": "mm millimeter millimetre 毫米", "cm": "cm centimeter centimetre 厘米", "dm": "dm decimeter decimetre", "m": "m meter metre 米",
    "km": "km kilometer kilometre 千米 公里", "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
    "mg": "mg milligram", "g": "g gram gramme 克", "kg": "kg kgs kilo kilogram 千克 公斤", "t": "t tonne", "lb": "lb lbs", "oz": "oz ounce",
    "ms": "ms millisecond", "s": "s sec secs second 秒", "min": "min mins minute 分钟", "h": "h hr hrs hour 小时", "day": "day days 天", "week": "week wk wks",
    "month": "month", "year": "year yr yrs 年", "mL": "ml mL milliliter millilitre 毫升", "L": "l L liter litre 升", "cent": "cent",
    "USD": "USD dollar 美元", "EUR": "EUR euro", "GBP": "GBP", "INR": "INR rupee", "CNY": "CNY RMB yuan 元", "JPY": "JPY yen",
    "deg": "° deg degree 度", "rad": "rad radian", "°C": "°C Celsius", "°F": "°F Fahrenheit", "K": "K kelvin", "N": "N newton", "J": "J joule",
    "kJ": "kJ", "cal": "cal calorie", "W": "W watt", "kW": "kW kilowatt", "MW": "MW", "V": "V volt", "A": "A amp ampere", "Ω": "Ω ohm", "Pa": "Pa pascal",
    "kPa": "kPa", "Hz": "Hz hertz", "kHz": "kHz", "MHz": "MHz", "mol": "mol mole", "?unit": "unit", "?C": "C", "?F": "F"}
_NAMES = {name + s: unit for unit, names in _SPELLINGS.items() for name in names.split() for s in (("", "s") if len(name) > 3 and name.isascii() else ("",))}
_FOLDED = {name.casefold(): unit for name, unit in reversed(_NAMES.items()) if len(name) > 1}
_WHOLE = {"mph": (("mi", 1), ("h", -1)), "kph": (("km", 1), ("h", -1)), "kmh": (("km", 1), ("h", -1)), "kmph": (("km", 1), ("h", -1))}
_DERIVED = {"N": {"kg": 1, "m": 1, "s": -2}, "J": {"kg": 1, "m": 2, "s": -2}, "W": {"kg": 1, "m": 2, "s": -3}, "Pa": {"kg": 1, "m": -1, "s": -2},
            "Hz": {"s": -1}, "V": {"kg": 1, "m": 2, "s": -3, "A": -1}, "Ω": {"kg": 1, "m": 2, "s": -3, "A": -2}, "mL": {"cm": 3}, "L": {"dm": 3}}
_ALONE = frozenset("mgshtlLNJWVAΩ°")   # single letters that need no space after the number
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "cu.": 3, "squared": 2, "cubed": 3}
_NAME = re.compile(r"(?:(square|cubic|sq\.?|cu\.?)\s)?(°[CF](?![A-Za-z])|°|[^\W\d_]{1,16}(?![^\W\d_]))"
                   r"(?:\^?\s?\{(-?[1-9])\}|\^(-?[1-9])|([23])(?![0-9]))?(?:\s(squared|cubed)(?![^\W\d_]))?", re.IGNORECASE)
_JOINT = re.compile(r"\s?(/|·|⋅|\*|\bper\b)\s?\(?|\s(?=[A-Za-z]{1,3}(?:\^|/))")
_MOST = 4   # units in a row

Unit = frozenset[tuple[str, int]]


def leading(text: str) -> tuple[Unit | None, str]:
    """The unit at the start of a text, by name and power, and what follows it; None where there is none."""
    powers: Counter[str] = Counter()
    rest, below = text, False
    for _ in range(_MOST):
        found = _one(rest)
        if found is None:
            break
        parts, end = found
        for name, power in parts:
            powers[name] += -power if below else power
        rest = rest[end:].removeprefix(")")
        joint = _JOINT.match(rest)
        if joint is None or _one(rest[joint.end():]) is None:
            break
        below = below or joint[1] in ("/", "per")
        rest = rest[joint.end():]
    return (frozenset(powers.items()) if powers else None), rest.strip()


def _one(text: str) -> tuple[tuple[tuple[str, int], ...], int] | None:
    match = _NAME.match(text)
    if match is None:
        return None
    name = match[2]
    if name.casefold() in _WHOLE:
        return _WHOLE[name.casefold()], match.end()
    unit = _NAMES.get(name) or (_FOLDED.get(name.casefold()) if len(name) > 1 else None)
    if unit is None:
        return None
    word = match[1] or match[6]
    power = int(match[3] or match[4] or match[5] or (_POWERS[word.casefold()] if word else 1))
    return ((unit, power),), match.end()


def touching(text: str) -> bool:
    """Whether a unit may follow its number without a space: not a single letter that is a variable as well as a rare unit."""
    match = _NAME.match(text)
    return match is not None and (len(match[2]) > 1 or match[2] in _ALONE or not match[2].isascii())


def _derived(unit: Unit) -> Unit:
    """`N` as `kg·m/s^2`."""
    powers: Counter[str] = Counter()
    for name, power in unit:
        for part, times in _DERIVED.get(name, {name: 1}).items():
            powers[part] += power * times
    return frozenset((name, power) for name, power in powers.items() if power)


def differ(left: Unit | None, right: Unit | None) -> bool:
    """Whether two units are both told and not the same; `30 degrees` may be of an angle, of Celsius or of Fahrenheit."""
    if left is None or right is None or left == right or any(name.startswith("?") for name, _ in left | right):
        return False
    left, right = _derived(left), _derived(right)
    if left == right:
        return False
    degree = frozenset({("deg", 1)})
    return not (degree in (left, right) and (left | right) - degree <= {("°C", 1), ("°F", 1)})
