"""A folder of recorded rollouts: the steps that it holds. One JSON-lines file a step and replica; rollout/saved.py writes and reads them."""
from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"step_(\d+)-(\d+)\.jsonl")


def steps(folder: str | Path) -> list[int]:
    """The steps that the folder holds a file of, in order; none where there is no folder."""
    return sorted({int(named[1]) for file in Path(folder).glob("step_*-*.jsonl") if (named := NAME.fullmatch(file.name))})
