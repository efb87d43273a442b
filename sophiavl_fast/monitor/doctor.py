"""`doctor [CONFIG]`: what this machine can run, in one table, and what to do about what it cannot."""
from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sophiavl_fast.config import Config
from sophiavl_fast.monitor import checks, fit

STYLE = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


def doctor(config: Config | None, console: Console | None = None, also: Callable[[Config], list[checks.Row]] | None = None) -> int:
    """Check the machine, and the configuration where one is given; print the table. Returns 1 if anything FAILs, else 0.

    also: more rows about the configuration, of rooms that this one does not know. Engines are imported in processes of their own under a deadline: one
    that crashes or hangs is a row.
    """
    console = console or Console()
    with console.status("importing the engines"):
        found = checks.machine(config)
    rows = found.rows + (fit.rows(config, found.gpus) + (also(config) if also else []) if config else [])
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(Text(row.status, STYLE[row.status]), row.name, Text(row.found), Text(row.hint, "dim"))
    console.print(table)
    failed = sum(row.status == "FAIL" for row in rows)
    warned = sum(row.status == "WARN" for row in rows)
    console.print(f"{len(rows)} checks, {failed} failed, {warned} to look at", style="bold red" if failed else "green")
    return int(failed > 0)
