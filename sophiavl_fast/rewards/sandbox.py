"""Graders in processes that can be killed: a persistent pool with time and memory limits.

A symbolic parser can hang or eat all memory on a model's output, and no thread can be stopped. Each worker is a plain
subprocess (no fork of a process that holds CUDA or threads, no pickle, no re-import of the caller's main module) owned by
one thread of a pool; a worker that misses its deadline or dies is killed and replaced, and only its own task is lost.
"""
from __future__ import annotations

import json
import math
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from sophiavl_fast.errors import EngineError
from sophiavl_fast.rewards.graders.task import Task

_START_S = 120.0  # importing sympy on a loaded machine
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")   # of a variable's name: nothing that a grader of a model's words should hold


class Grade(NamedTuple):
    """An outcome; `killed` says why there is none to be had (the outcome is then the worst one), "" otherwise."""

    outcome: float
    killed: str = ""


class Sandbox:
    """`workers` grader processes, started on the first task. Usable from any thread; close() ends every process."""

    def __init__(self, workers: int, timeout_s: float, memory_mb: int) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grader")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(timeout_s, memory_mb) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)

    def submit(self, task: Task, worst: float = 0.0) -> Future[Grade]:
        """Grade in the background; the future never raises for what a grader does. `worst`: the outcome when it is killed."""
        return self._threads.submit(self._grade, task, worst)

    def _grade(self, task: Task, worst: float) -> Grade:
        worker = self._idle.get()
        try:
            found = worker.grade(task)
            return Grade(worst, found) if isinstance(found, str) else Grade(found)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Drop what is waiting, end every worker at once."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.interrupt()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Worker:
    """One grader process, started when needed."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._process: subprocess.Popen[bytes] | None = None

    def grade(self, task: Task) -> float | str:
        """The outcome, or why there is none."""
        process = self._process or self._start()
        try:
            _write(process, json.dumps(task).encode() + b"\n")
            begun, reply = _read_lines(process, _START_S, self._timeout_s)
        except BrokenPipeError:
            begun, reply = b"idle", b""
        if not reply:
            expired = reply is None
            self.kill()
            if not begun:
                how = f"did not begin within {_START_S:g} s" if expired else f"ended before it began (exit code {process.returncode})"
                raise EngineError(f"grader process {how}; see: {sys.executable} -m sophiavl_fast.rewards.worker {self._memory_mb} 10")
            died = f"grader process ended with code {process.returncode} (memory limit {self._memory_mb} MB)"
            return f"grader killed after {self._timeout_s:g} s" if expired else died
        found = json.loads(reply)
        return found if isinstance(found, float) and math.isfinite(found) else f"grader failed: {found}"

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sophiavl_fast.rewards.worker", str(self._memory_mb), str(self._timeout_s)]
        self._process = process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                                   bufsize=0, env=_harmless(os.environ) | _ENVIRONMENT)
        return process

    def kill(self) -> None:
        """End the process and forget it; the next task starts a new one. For the thread that owns the worker."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                pipe.close()  # type: ignore[union-attr]

    def interrupt(self) -> None:
        """End the process from another thread: the owner then reads the end of its output."""
        if self._process is not None:
            self._process.kill()


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(process.stdin.fileno(), left):]  # type: ignore[union-attr]


def _read_lines(process: subprocess.Popen[bytes], start_s: float, seconds: float) -> tuple[bytes | None, bytes | None]:
    """Two lines of the process's output, each with its time; b"" where it has ended, None where the time is over."""
    first, rest = _read_line(process, b"", start_s)
    return (first, _read_line(process, rest, seconds)[0]) if first else (first, first)


def _read_line(process: subprocess.Popen[bytes], data: bytes, seconds: float) -> tuple[bytes | None, bytes]:
    """One line and what came after it; `data` was read before."""
    deadline = time.monotonic() + seconds
    pipe = process.stdout.fileno()  # type: ignore[union-attr]
    ready = select.poll()  # select() knows descriptors below 1024 only; a trainer may have more files open
    ready.register(pipe, select.POLLIN)
    while b"\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0 or not ready.poll(left * 1000):
            return None, data
        chunk = os.read(pipe, 65536)
        if not chunk:
            return b"", data
        data += chunk
    line, _, rest = data.partition(b"\n")
    return line, rest


def _harmless(environment: Mapping[str, str]) -> dict[str, str]:
    """Without whatever is called a key, a token, a secret or a password."""
    return {name: value for name, value in environment.items() if not any(part in name.upper() for part in _SECRET)}
