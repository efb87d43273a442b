"""Between trainer and server: runs the server, and ends everything it started once the trainer is gone.

`python -m sophiavl_fast.rollout.supervisor COMMAND...`, started by the trainer in a session of its own with a pipe as standard
input. The pipe's end, or another parent, means that the trainer has ended, by whatever signal. vLLM's engine and
worker processes outlive a killed API server, so as a subreaper the supervisor inherits them and kills them too. Should the
supervisor itself be killed, the kernel kills the API server, and with it the engine's processes (compat/orphans.py).
Imports nothing heavy: it lives as long as the run.
"""
from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

POLL_S = 0.2
GRACE_S = 5.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(command: list[str]) -> int:
    """Run the command until it ends or the parent does; returns its exit code (0 when the parent ended)."""
    parent = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    try:
        while child.poll() is None and os.getppid() == parent:
            if select.select([0], [], [], POLL_S)[0] and not os.read(0, 1):
                break
        return child.poll() or 0
    finally:
        end_family(child)


def end_family(child: subprocess.Popen) -> None:
    """Ask the server to end, then kill what is left of it, grandchildren included; last the trackers, which unlink the others' shared memory."""
    if child.poll() is None:
        child.terminate()
    deadline = time.monotonic() + GRACE_S
    while (family := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        _, alive = psutil.wait_procs(family, timeout=POLL_S)
        if child.poll() is not None and alive:
            break                      # the server has ended and left these behind
    kill_all(lambda: psutil.Process().children(recursive=True))


def end_orphans(supervisor: int) -> None:
    """Kill what a supervisor that was killed left behind: its process group, which only its own processes are in."""
    kill_all(lambda: [p for p in psutil.process_iter() if _group(p) == supervisor])


def kill_all(living: Callable[[], list[psutil.Process]]) -> None:
    """Kill them, the trackers after the others, whose shared memory they unlink."""
    kill([p for p in living() if not is_tracker(p)])
    _wait(living)
    kill(living())
    _wait(living)


def _wait(living: Callable[[], list[psutil.Process]]) -> None:
    """Until none lives, GRACE_S at most."""
    deadline = time.monotonic() + GRACE_S
    while (left := living()) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=POLL_S)


def _group(process: psutil.Process) -> int:
    """Its process group; -1 for one that has ended, be it a zombie still: a container's first process may never ask for its orphans."""
    try:
        return os.getpgid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else -1
    except (ProcessLookupError, psutil.Error):
        return -1


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def is_tracker(process: psutil.Process) -> bool:
    """Python's own, or joblib's: it ends when nobody holds its pipe any more, and unlinks what they have not."""
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
