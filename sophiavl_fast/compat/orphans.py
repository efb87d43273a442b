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

SERVED = "SOPHIAVL_SERVED"    # set in the environment of a server's processes, and only there
_PR_SET_PDEATHSIG = 1


def follow_parents() -> None:
    """In a server's process: processes that multiprocessing starts here, by fork or spawn, are killed when their parent ends, in whatever way."""
    if SERVED not in os.environ:
        return
    if "--multiprocessing-fork" in sys.orig_argv:     # spawned itself
        _follow(os.getppid())
    seen = [0, False]

    def before() -> None:
        # the kernel means the thread that forked: a child of a passing one would end with it
        seen[:] = os.getpid(), threading.current_thread() is threading.main_thread()

    os.register_at_fork(before=before, after_in_child=lambda: _follow(seen[0]) if seen[1] else None)


def _follow(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:      # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
