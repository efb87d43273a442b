"""What a grader gets: plain values that travel to a worker process as JSON."""
from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_DOLLARS = re.compile(r"\$+")
# full-width forms (as in East Asian text) of the printable ASCII characters
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


class Task(NamedTuple):
    """One answer to grade. `kind` is a problem type, `ocr` and `tolerance` are config.rewards' options."""

    kind: str
    answer: str
    gold: str
    options: tuple[str, ...] = ()
    ocr: str = "exp_wer"
    tolerance: float = 1e-6


def clean(text: str) -> str:
    """Dollar signs dropped (as SophiaVL-R1 does before scoring), full-width letters and digits narrowed, accents composed (NFC), white space collapsed."""
    return " ".join(_DOLLARS.sub(" ", unicodedata.normalize("NFC", text).translate(_NARROW)).split())
