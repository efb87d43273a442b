"""The heap of a long run on a CPU: in huge pages, and without what oneDNN keeps for shapes that never come back.

A step's tensors come from the heap and their pages go back to the system after it (`monitor.memory.release`), so every step
faults them in again: 140,000 faults of 4 KiB in a step of `benchmarks/rl_step.py`, an eighth of that in huge pages. glibc
reads the switch before a program's first line, so the program starts itself again, as the same process.

oneDNN, and torch's bridge to it, keep the last 1,024 kernels compiled for a shape. Rows differ in length every step, so
those were 0.7 GiB of the demo's memory after 60 steps; within a step a few dozen shapes come again and again.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Start this program again with TUNABLE in its environment (its children inherit it), once; returns where that is of no use:
    with a GPU, where the user has set GLIBC_TUNABLES to something of his own, and on systems without transparent huge pages."""
    if "GLIBC_TUNABLES" in os.environ or Path("/dev/nvidiactl").exists() or not _available():
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLE
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def bound_caches() -> None:
    """Keep CACHES small unless the environment says otherwise; they are read at the first product."""
    for name, entries in CACHES.items():
        os.environ.setdefault(name, entries)


def _available() -> bool:
    try:
        return "[never]" not in MODE.read_text()
    except OSError:
        return False
