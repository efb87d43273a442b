"""The table at the end of a run: accuracy before and after, by problem type."""
from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sophiavl_fast.monitor import jsonl


def before_after(run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation in metrics.jsonl (the same twice where there is one, empty where there is none)."""
    found = [line for line in jsonl.read(run_dir / "metrics.jsonl") if line.get("eval/accuracy") is not None]
    return (found[0], found[-1]) if found else ({}, {})


def print_table(run_dir: str | Path, console: Console | None = None) -> None:
    """Print accuracy and sound reasoning before and after the run; nothing where the run never evaluated."""
    first, last = before_after(Path(run_dir))
    if not first:
        return
    table = Table(title=f"held-out answers, greedy: step {first['step']} and step {last['step']} ({int(last.get('eval/count', 0))} questions)")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for what in ("accuracy", "reasoning"):
        keys = [f"eval/{what}", *sorted(k for k in last if k.startswith(f"eval/{what}/"))]
        for key in (k for k in keys if last.get(k) is not None and first.get(k) is not None):
            name = what if key == f"eval/{what}" else f"  {key.rsplit('/', 1)[1]}"
            table.add_row(name, f"{first[key]:.3f}", f"{last[key]:.3f}", f"{100 * (last[key] - first[key]):+.1f}", style="bold" if name == what else "")
    (console or Console()).print(table)


def print_eval(metrics: dict[str, float], console: Console | None = None) -> None:
    """Print one evaluation."""
    table = Table(title=f"greedy answers on {int(metrics.get('eval/count', 0))} questions")
    table.add_column("")
    table.add_column("value", justify="right")
    for key in sorted(key for key, value in metrics.items() if not math.isnan(value)):
        table.add_row(key.removeprefix("eval/"), f"{metrics[key]:.4g}")
    (console or Console()).print(table)
