"""The processes of a spawned server, watched: which of them ended first.

A killed worker takes the whole server along within a second, and a stopped one answers nobody: an error that only says
"the server is gone" sends its reader to the wrong process. The kernel tells a thread of each end as it happens (pidfd).
"""
from __future__ import annotations

import contextlib
import os
import select
import threading

import psutil

# vLLM gives its processes names; the supervisor's own child answers HTTP
ROLES, FRONT = {"VLLM::EngineCor": "engine core", "VLLM::Worker": "engine worker"}, "API server"


class Family:
    """The process `supervisor`, its child and that one's engine processes at this moment, which is when the server first answers: all are there.

    Helpers (a compiler, a tracker of shared memory) are none of it: one that has done its work ends.
    """

    def __init__(self, supervisor: int) -> None:
        first = psutil.Process(supervisor)
        front = sorted(first.children(), key=psutil.Process.create_time)[:1]      # later ones are orphans that it has adopted
        engine = [(p, role) for p in first.children(recursive=True) if p not in front and (role := _role(p))]
        roles = [(first, "supervisor"), *((p, FRONT) for p in front), *engine]
        self.members, self.roles = [p for p, _ in roles], {p.pid: f"{role} (pid {p.pid})" for p, role in roles}
        known = {p.pid: p for p in self.members}
        self._parents = {p.pid: known.get(_parent(p)) for p in self.members[1:]}
        self.front = (front or [first])[0].pid
        """Process id of the one that answers HTTP."""
        self.first = ""
        """The first process that ended, for an error message; "" while all live."""
        self.ended = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def trouble(self) -> str:
        """The first process that ended, or else those that are stopped now; "" where all run."""
        stopped = [self.roles[p.pid] for p in self.members if _stopped(p)]
        return self.first or (f"{' and '.join(stopped)} stopped" if stopped else "")

    def close(self) -> None:
        """Stop watching: what ends from now on ends on purpose."""
        self._closed.set()

    def _watch(self) -> None:
        poll, pids = select.poll(), {}
        with contextlib.ExitStack() as stack:
            for pid in self.roles:
                try:
                    handle = os.pidfd_open(pid)
                except ProcessLookupError:
                    self._note(pid)
                    return
                stack.callback(os.close, handle)
                poll.register(handle, select.POLLIN)
                pids[handle] = pid
            while not self._closed.is_set():
                if found := poll.poll(500):   # milliseconds
                    self._note(pids[found[0][0]])
                    return

    def _note(self, pid: int) -> None:
        """What a process starts ends with it, and may be gone while the last threads of the process itself still end."""
        while (up := self._parents.get(pid)) and _over(up):
            pid = up.pid
        if not self._closed.is_set():
            self.first = f"{self.roles[pid]} ended"
            self.ended.set()


def _role(process: psutil.Process) -> str:
    """Of an engine's process; "" for any other, and for one that has ended."""
    try:
        name = process.name()
    except psutil.Error:
        name = ""
    return next((role for part, role in ROLES.items() if part in name), "")


def _parent(process: psutil.Process) -> int:
    """Its parent's process id; 0 for one that has ended meanwhile."""
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def _over(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
