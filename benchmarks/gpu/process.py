"""Child processes that leave nothing behind: a time limit ends the whole tree, not its root alone."""
from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def run(command: list[str], *, seconds: float, env: dict[str, str] | None = None, cwd: Path | None = None, capture: bool = False) -> tuple[int | None, str]:
    """(exit code, or None where the limit ended it; output if captured). Its descendants share its process group and end with it."""
    stream = subprocess.PIPE if capture else None
    child = subprocess.Popen(command, env=env, cwd=cwd, text=True, stdout=stream, stderr=subprocess.STDOUT if capture else None, process_group=0)
    try:
        output, _ = child.communicate(timeout=max(seconds, 0.0))
        return child.returncode, output or ""
    except subprocess.TimeoutExpired:
        return None, _finish(child)
    except BaseException:
        _finish(child)
        raise
    finally:
        _end(child.pid, signal.SIGKILL)


def _finish(child: subprocess.Popen[str]) -> str:
    """Ask first: a child with children in groups of their own ends these."""
    _end(child.pid, signal.SIGTERM)
    try:
        output, _ = child.communicate(timeout=3)
    except subprocess.TimeoutExpired:
        _end(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
    return output or ""


def _end(group: int, how: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, how)
