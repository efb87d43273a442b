"""Where a result is to be written, looked at before the work begins."""
from __future__ import annotations

import os
from pathlib import Path

from sophiavl_fast.errors import UserError


def refuse_unwritable(out: Path) -> None:
    """UserError for --out that is a folder, or lies in one that is not there or takes no new file."""
    folder = out.absolute().parent
    if os.path.isdir(out):
        raise UserError(f"--out '{out}': is a folder; name a file")
    if not os.path.isdir(folder):
        raise UserError(f"--out '{out}': folder '{out.parent}' does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out '{out}': nothing can be written in folder '{out.parent}'")
