"""A folder of recorded rollouts: the steps that it holds, and those that a replay would miss.

One JSON-lines file a step and replica; rollout/saved.py writes and reads them.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sophiavl_fast.errors import UserError

NAME = re.compile(r"step_(\d+)-(\d+)\.jsonl")


def steps(folder: str | Path) -> list[int]:
    """The steps that the folder holds a file of, in order; none where there is no folder."""
    return sorted({int(named[1]) for file in Path(folder).glob("step_*-*.jsonl") if (named := NAME.fullmatch(file.name))})


def refuse_missing(folder: str | Path, wanted: Sequence[int] = ()) -> None:
    """UserError for a folder of debug.replay without a recorded step, or without one of those wanted."""
    if not (found := steps(folder)):
        raise UserError(f"debug.replay = '{folder}' holds no recorded step (a run with debug.record writes them)")
    if missing := sorted(set(wanted) - set(found)):
        cure = f"set run.steps={missing[0] - 1}" if missing[0] > wanted[0] else f"replay a folder that holds {in_words(wanted)}"
        raise UserError(f"debug.replay = '{folder}': step {missing[0]} was not recorded, the last one is {found[-1]}; {cure}")


def in_words(numbers: Sequence[int]) -> str:
    """These steps in words: the first and the last."""
    return f"steps {numbers[0]} to {numbers[-1]}" if numbers[0] < numbers[-1] else f"step {numbers[0]}"
