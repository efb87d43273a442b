"""Numbers of the command line, each with its range: what argparse calls on an option's text. Outside of it, one line and exit code 2."""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def _number(kind: type[int] | type[float], inside: Callable[[float], bool], words: str) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}': expected a {'whole ' * (kind is int)}number, which must {words}") from None
        if not inside(value):
            raise argparse.ArgumentTypeError(f"{text}: must {words}")
        return value
    return read


# an engine holds lengths and counts in 32 bits
positive = _number(int, lambda x: 1 <= x < 2**31, "be at least 1, and less than 2^31")
count = _number(int, lambda x: 0 <= x < 2**31, "be at least 0, and less than 2^31")
port = _number(int, lambda x: 0 <= x <= 65535, "lie in [0, 65535]")
seconds = _number(float, lambda x: 0 < x < math.inf, "be greater than 0, and finite")
share = _number(float, lambda x: 0 < x <= 1, "lie in (0, 1]")
share_kept_apart = _number(float, lambda x: 0 <= x < 1, "lie in [0, 1)")
