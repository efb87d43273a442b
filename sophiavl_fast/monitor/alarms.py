"""Signs that a policy games its judge, read from the metrics alone.

Each alarm compares the mean of the latest WINDOW steps with that of the WINDOW before. They stop nothing: they are metrics
(`alarm/NAME`, 1 while it sounds), lines in the terminal when they begin, and spans of steps in the report.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

WINDOW = 10
RISE, FALL = 0.03, 0.02  # of rewards in [0, 1], between two windows: a few standard errors of the demo's step means
DRIFT = 1.4              # of the mean response length, either way
UNSCORED = 0.2           # share of thinking scores that could not be had

History = Sequence[dict[str, Any]]


def sounding(history: History) -> dict[str, str]:
    """The alarms that sound at the end of `history` (metrics of successive steps): name -> one line that says why."""
    steps = [m for m in history if m.get("reward/total") is not None]
    if len(steps) < 2 * WINDOW:
        return {}
    before, now = steps[-2 * WINDOW:-WINDOW], steps[-WINDOW:]
    return {name: said for name, alarm in ALARMS.items() if (said := alarm(before, now))}


def spans(metrics: History) -> list[dict[str, Any]]:
    """When each alarm of a run sounded: name, first and last step in a row, and what it said at first."""
    found: list[dict[str, Any]] = []
    open_now: dict[str, dict[str, Any]] = {}
    steps = [m for m in metrics if m.get("reward/total") is not None]
    for i, record in enumerate(steps):
        said = sounding(steps[max(0, i + 1 - 2 * WINDOW):i + 1])
        for name, line in said.items():
            if name in open_now:
                open_now[name]["last"] = record["step"]
            else:
                open_now[name] = {"name": name, "first": record["step"], "last": record["step"], "said": line}
                found.append(open_now[name])
        open_now = {name: span for name, span in open_now.items() if name in said}
    return found


def _hacking(before: History, now: History) -> str:
    thinking, outcome = _means(before, now, "reward/thinking"), _means(before, now, "reward/outcome")
    if thinking and outcome and thinking[1] - thinking[0] > RISE and outcome[0] - outcome[1] > FALL:
        return (f"the thinking reward rises ({thinking[0]:.2f} to {thinking[1]:.2f}) while the outcome falls ({outcome[0]:.2f} to {outcome[1]:.2f}): "
                "the judge may be gamed; read samples with a high thinking reward and a wrong answer")
    return ""


def _length(before: History, now: History) -> str:
    length = _means(before, now, "response/length_mean")
    if length and length[0] > 0 and not 1 / DRIFT < length[1] / length[0] < DRIFT:
        return f"responses went from {length[0]:.0f} to {length[1]:.0f} tokens within {2 * WINDOW} steps; look at response/truncated and at the longest samples"
    return ""


def _unscored(before: History, now: History) -> str:
    share = _means(before, now, "reward/unscored")
    if share and share[1] > UNSCORED:
        return f"{share[1]:.0%} of the thinking scores could not be had: their groups are trained on outcomes alone (thinking.quorum)"
    return ""


ALARMS: dict[str, Callable[[History, History], str]] = {"hacking": _hacking, "length": _length, "unscored": _unscored}


def _means(before: History, now: History, key: str) -> tuple[float, float] | None:
    """Means of both windows; None where one has no value at all."""
    found = [[m[key] for m in part if m.get(key) is not None] for part in (before, now)]
    return (fmean(found[0]), fmean(found[1])) if all(found) else None
