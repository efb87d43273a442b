"""Memory of the run: the host's, engines and graders included, and the GPU's."""
from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

GIB = 2**30


def host_gib() -> float:
    """Resident memory of this process and all its descendants now, in GiB (pages that they share count for each)."""
    return _tree_kib("VmRSS") / 2**20


def peak_gib() -> float:
    """The same at its peak, in GiB: the sum of each living process's own high-water mark, kept by the kernel."""
    return _tree_kib("VmHWM") / 2**20


def gpu_peak_gib() -> float | None:
    """Peak of the memory that this process reserved on its GPU, in GiB; None without one, or before it is used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_reserved() / GIB


def release() -> None:
    """Give freed heap pages back to the system. Rows differ in size every step, and without this glibc's heap creeps upwards by gigabytes,
    though nothing leaks. The next step faults the pages in again, see compat.heap. Does nothing where the C library has no malloc_trim."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def released_meanwhile() -> Iterator[None]:
    """`release` in a thread beside the block, which waits for others most of the time; over when the block is."""
    thread = threading.Thread(target=release, name="release")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def metrics() -> dict[str, float]:
    """`mem/host_gib` now, `mem/peak_gib` so far, and `mem/gpu_peak_gib` where a GPU is in use."""
    gpu = gpu_peak_gib()
    return {"mem/host_gib": host_gib(), "mem/peak_gib": peak_gib(), **({} if gpu is None else {"mem/gpu_peak_gib": gpu})}


def _tree_kib(field: str) -> int:
    me = psutil.Process()
    return sum(_kib(process.pid, field) for process in (me, *me.children(recursive=True)))


def _kib(pid: int, field: str) -> int:
    """A field of /proc/PID/status in KiB; 0 for a process that has ended (a zombie has no memory lines)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")), 0)
