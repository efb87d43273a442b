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

# vLLM gives its processes names; the first without one of these answers HTTP
ROLES, FRONT = {"VLLM::EngineCor": "engine core", "VLLM::Worker": "engine worker", "resource_tracker": "resource tracker"}, "API server"


class Family:
    """All descendants of the process `supervisor` at this moment, which is when the server first answers: all are there."""

    def __init__(self, supervisor: int) -> None:
        self.members = [p for p in psutil.Process(supervisor).children(recursive=True) if _role(p) != "resource tracker"]
        self.roles = {p.pid: f"{_role(p)} (pid {p.pid})" for p in self.members}
        self.front = next((pid for pid, role in self.roles.items() if role.startswith(FRONT)), supervisor)
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
        poll, roles = select.poll(), {}
        with contextlib.ExitStack() as stack:
            for pid, role in self.roles.items():
                try:
                    handle = os.pidfd_open(pid)
                except ProcessLookupError:
                    self._note(role)
                    return
                stack.callback(os.close, handle)
                poll.register(handle, select.POLLIN)
                roles[handle] = role
            while not self._closed.is_set():
                if found := poll.poll(500):   # milliseconds
                    self._note(roles[found[0][0]])
                    return

    def _note(self, role: str) -> None:
        if not self._closed.is_set():
            self.first = f"{role} ended"
            self.ended.set()


def _role(process: psutil.Process) -> str:
    try:
        name = f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        name = ""
    return next((role for part, role in ROLES.items() if part in name), FRONT)


def _stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
