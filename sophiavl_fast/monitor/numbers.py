"""Numbers as people read them."""
from __future__ import annotations

from collections.abc import Iterable

BLOCKS = "▁▂▃▄▅▆▇█"


def compact(value: float | int | None) -> str:
    """Three significant digits: 0.873, 12.4, 5,210, 3.1e-06; an en dash for a missing value."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1000 or (isinstance(value, int) and not isinstance(value, bool)):
        return f"{value:,.0f}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"


def clock(seconds: float) -> str:
    """A duration: 8.4 s, 2:31, 1:02:10."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Iterable[float]) -> str:
    """A curve in a line of text, from the smallest to the largest value."""
    values = list(values)
    low, high = min(values), max(values)
    return "".join(BLOCKS[int((v - low) / (high - low) * 7) if high > low else 3] for v in values)
