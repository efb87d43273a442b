"""JSON Lines files that survive `kill -9`: strict JSON, one flushed line a record, a torn last line is never data."""
from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sophiavl_fast.errors import UserError


def plain(value: Any) -> Any:
    """The value as strict JSON holds it: NaN and infinities become None, 0-d tensors and numpy scalars become numbers.

    Integers and booleans stay what they are; mappings and sequences are converted throughout.
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def line(record: dict[str, Any]) -> str:
    """One record as a line of strict JSON. Raises TypeError for a value that JSON has no form for."""
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def shown(value: Any) -> str:
    """A value of a record as an error names it: on one line, and short."""
    text = " ".join(json.dumps(value).split())
    return text if len(text) <= 60 else f"{text[:60]} …"


def is_number(value: Any) -> bool:
    """A finite number, or null for one that could not be had; booleans count as 0 and 1."""
    return value is None or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max)


def scan(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (first byte, end, record) of every whole line; a last line torn by a kill is left out.

    Streams, so that a file may be larger than memory. Raises UserError for a broken line that is not the last, and for a record without its step.
    """
    with path.open("rb") as file:
        start, broken = 0, 0
        for number, raw in enumerate(file, 1):
            if broken:
                raise UserError(f"{path}: line {broken} is not a JSON object")
            record = _parse(raw)
            if record is None:
                broken = number
            elif type(record.get("step")) is not int:
                raise UserError(f"{path}: line {number}: " + (f"step = {shown(record['step'])}: expected a whole number" if "step" in record else "no step"))
            else:
                yield start, start + len(raw), record
            start += len(raw)


def read(path: Path) -> list[dict[str, Any]]:
    """Every record of the file, [] where there is none."""
    return [record for _, _, record in scan(path)] if path.exists() else []


def at(path: Path, starts: list[int]) -> Iterator[dict[str, Any]]:
    """The records that start at these bytes, as `scan` reported them."""
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            yield json.loads(file.readline())


def cut(path: Path, last_step: int) -> int | None:
    """Drop every record whose `step` is beyond last_step, and a torn last line. Returns the last step kept, None for none.

    Records stand in the order of their steps, so what goes is the file's tail: one truncate, which a kill cannot halve.
    """
    if not path.exists():
        return None
    keep, kept_step = 0, None
    for _, end, record in scan(path):
        if record["step"] > last_step:
            break
        keep, kept_step = end, record["step"]
    with path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())
    return kept_step


def _parse(raw: bytes) -> dict[str, Any] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not strict JSON")
