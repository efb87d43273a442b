"""samples.jsonl by groups: an index of the whole file, gamma over mixed groups, and an even choice of groups to show."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import jsonl

NUMBERS = ("outcome", "thinking", "total", "gamma", "trust_weight", "advantage", "response_tokens", "weight_version")


@dataclass(slots=True)
class GroupIndex:
    """The responses of one prompt in one step: where they stand in the file, and the little that statistics need."""

    step: int
    starts: list[int] = field(default_factory=list)
    outcomes: list[float] = field(default_factory=list)
    gammas: list[float] = field(default_factory=list)
    scored: int = 0

    def mixed(self, threshold: float) -> bool:
        """Some responses are correct and some are wrong: only there does gamma differ from 1."""
        right = [outcome >= threshold for outcome in self.outcomes]
        return any(right) and not all(right)


def index(path: Path) -> list[GroupIndex]:
    """Every group of samples.jsonl in the order of the file; [] where there is no such file. Raises UserError, naming the line, for a damaged one."""
    found: dict[tuple[Any, ...], GroupIndex] = {}
    for number, (start, _, record) in enumerate(jsonl.scan(path) if path.exists() else (), 1):
        if wrong := _wrong(record):
            raise UserError(f"{path}: line {number}: {wrong}")
        group = found.setdefault((record["step"], record.get("group"), record["id"]), GroupIndex(record["step"]))
        group.starts.append(start)
        if record.get("outcome") is not None:
            group.outcomes.append(record["outcome"])
        if record.get("gamma") is not None:
            group.gammas.append(record["gamma"])
        group.scored += record.get("thinking") is not None
    return list(found.values())


def _wrong(record: dict[str, Any]) -> str:
    """What a sample lacks of all that the report reads, or holds of another kind; "" where nothing is amiss."""
    if "id" not in record:
        return "no id"
    images = record.get("images") or []
    fits = {"id": isinstance(record["id"], (str, int)), "group": isinstance(record.get("group"), (int, str, type(None))),
            "response": isinstance(record.get("response"), (str, type(None))), "images": isinstance(images, list) and all(isinstance(i, str) for i in images),
            **{key: jsonl.is_number(record.get(key)) for key in NUMBERS}}
    words = {"id": "a name or number", "group": "a name or number", "response": "a text", "images": "a list of paths"}
    return next((f"{key} = {jsonl.shown(record[key])}: expected {words.get(key, 'a number or null')}" for key, fit in fits.items() if not fit), "")


def spread(groups: list[GroupIndex], responses: int) -> list[GroupIndex]:
    """Whole groups, evenly over the run, first and last included, that hold about `responses` responses at most."""
    size = max((len(g.starts) for g in groups), default=1)
    count = min(len(groups), max(2, responses // size))
    if count == len(groups):
        return groups
    return [groups[round(i * (len(groups) - 1) / (count - 1))] for i in range(count)]


@dataclass(frozen=True, slots=True)
class GammaView:
    """gamma over mixed groups: how many, how far below 1. `bins` are (lower edge, upper edge, groups with gamma below 1)."""

    groups: int
    mixed: int
    below: int
    mean_below: float | None
    lowest: float
    bins: tuple[tuple[float, float, int], ...]


def gamma_view(groups: list[GroupIndex], threshold: float, width: float = 0.05) -> GammaView | None:
    """The distribution of each mixed group's mean gamma; None where no thinking score entered any mixed group."""
    mixed = [g for g in groups if g.mixed(threshold) and g.gammas]
    if not any(g.scored for g in mixed):
        return None
    values = [sum(g.gammas) / len(g.gammas) for g in mixed]
    below = [v for v in values if v < 1 - 1e-6]
    def bin_of(value: float) -> int:
        return math.floor(value / width + 1e-9)  # 0.95 belongs to the bin that starts there

    bottom = bin_of(min(math.exp(-1), *values))
    edges = range(bottom, round(1 / width))
    counts = dict.fromkeys(edges, 0)
    for value in below:
        counts[min(bin_of(value), edges[-1])] += 1
    bins = tuple((round(i * width, 10), round((i + 1) * width, 10), counts[i]) for i in edges)
    return GammaView(len(groups), len(mixed), len(below), sum(below) / len(below) if below else None, min(values), bins)
