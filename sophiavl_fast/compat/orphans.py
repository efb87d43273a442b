"""Engine processes that end with the process which started them.

vLLM's engine core outlives a killed API server, as its workers would without a pipe of vLLM's own. The kernel can tell a process of
its parent's end (PR_SET_PDEATHSIG), but each has to ask for it. Ours ask at their start, in any process of a server but the first.
"""
from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

SERVED = "SOPHIAVL_SERVED"    # set in the environment of a server's processes, and only there
_PR_SET_PDEATHSIG = 1


def follow_parents() -> None:
    """In a server's process: what its main thread forks, and what multiprocessing spawns from there, is killed when this process ends, in whatever way."""
    if SERVED not in os.environ:
        return
    prctl = ctypes.CDLL(None).prctl                   # looked up here: a forked child may not, where another thread held a lock
    if "--multiprocessing-fork" in sys.orig_argv and _of_main_thread():     # spawned itself
        _follow(os.getppid(), prctl)
    seen = threading.local()

    def before() -> None:
        # the kernel means the thread that forked: a child of a passing one would end with it
        seen.parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0

    os.register_at_fork(before=before, after_in_child=lambda: _follow(seen.parent, prctl) if seen.parent else None)


def _of_main_thread() -> bool:
    """Whether this process's parent started it from its main thread."""
    parent = os.getppid()
    try:
        return str(os.getpid()) in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:                                   # it has ended already, which `_follow` sees; or the kernel does not tell, and vLLM's are
        return True


def _follow(parent: int, prctl: Callable[..., int]) -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:      # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
