"""Peak memory of the run: the host's, engines and graders included, and the GPU's."""
from __future__ import annotations

import sys
import threading

import psutil

GIB = 2**30


def host_gib() -> float:
    """Resident memory of this process and all its descendants now, in GiB (pages that they share count for each)."""
    total = 0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # ended since it was listed
            continue
    return total / GIB


def gpu_peak_gib() -> float | None:
    """Peak of the memory that this process reserved on its GPU, in GiB; None without one, or before it is used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_reserved() / GIB


class PeakMemory:
    """Watches `host_gib` from a daemon thread, for the peak of a process tree is known to nobody else."""

    def __init__(self, every_s: float = 1.0):
        self._peak = host_gib()
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def metrics(self) -> dict[str, float]:
        """`mem/host_gib` now, `mem/peak_gib` since the start, and `mem/gpu_peak_gib` where a GPU is in use."""
        now = host_gib()
        self._peak = max(self._peak, now)
        gpu = gpu_peak_gib()
        return {"mem/host_gib": now, "mem/peak_gib": self._peak, **({} if gpu is None else {"mem/gpu_peak_gib": gpu})}

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self._peak = max(self._peak, host_gib())
