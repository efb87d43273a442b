"""Where every rank is, and one line when the job fails: which rank it was, in which phase.

Each rank of a job of several keeps a small file in run.dir/ranks: process, host, step, phase, and a pulse that a thread
advances. When the job falls, whoever notices reads the others' files: a rank that is gone, that says what it failed of, or
whose pulse stands still is the culprit, and the first to look writes the line. The thread needs nothing of the main one,
which may be stuck in a collective: it acts on torchrun's SIGTERM, on torchrun's own end, and on a neighbour whose pulse
stands still for policy.control_timeout_s.
"""
from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from sophiavl_fast.errors import UserError

PULSE_S = 1.0
SILENT_PULSES = 5.0      # so many without a change, while everything falls, and a rank counts as gone
CLOCKS_S = 2.0           # by which clocks of hosts, and of a shared file system, may differ
LAUNCHER = "the end of its launcher"
BLAMELESS = {             # why a job falls without a rank to blame
    LAUNCHER: "the launcher (pid {}, torchrun or another) ended without a word (killed?)",
    "SIGTERM": "SIGTERM from the launcher (pid {}), which was told to end (scancel, a time limit) or saw another node fail",
}
LEAVE_S = 20.0           # a failed rank that cannot end its cleanup by then (a collective without its peers) is ended


def before_it() -> None:
    """Let the launcher's SIGTERM wait until this rank has joined, seconds of imports later: a peer that fell meanwhile is told of then."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


@contextmanager
def refusals(run_dir: str | Path) -> Iterator[None]:
    """Around what a rank may refuse before it joins: bad input that only a later rank has, such as a folder missing on its node, must be told too."""
    try:
        yield
    except UserError as error:
        if not Muster(Path(run_dir), 0.0).refused(error):
            raise SystemExit(2) from None
        raise


class Muster:
    """This rank among all. Use it around the whole job; `phase` around each phase, which may nest."""

    def __init__(self, run_dir: Path, deadline_s: float) -> None:
        environ = os.environ
        self.rank, self.size, self._deadline_s = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1")), deadline_s
        # one attempt of one job: a requeued job has another port or restart count
        self._job = "-".join(environ.get(k, "") for k in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"))
        self._folder, self._parent = run_dir / "ranks", os.getppid()
        self._told = self._folder / f".told-{self._job}"
        # what lies in the folder from before this process is an earlier attempt's: with a fixed port all attempts have one name
        self._born = psutil.Process().create_time() - CLOCKS_S
        self._host, self._stack, self._lock, self._ended = socket.gethostname(), ["the start"], threading.Lock(), False
        self._note: dict[str, Any] = {"job": self._job, "rank": self.rank, "pid": os.getpid(), "host": self._host, "step": 0, "phase": "the start",
                                      "pulse": 0, "failed": "", "left": ""}

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Note that this rank is in the phase; an exception that leaves it is noted at once, before any cleanup."""
        self._stack.append(name)
        self._write(phase=name, step=step)
        try:
            yield
        except BaseException as error:
            if not self._note["failed"]:
                self._write(failed=" ".join(f"{type(error).__name__}: {error}".split())[:2000])
            raise
        finally:
            self._stack.pop()
            if not self._note["failed"]:
                self._write(phase=f"{self._stack[-1]} (after {name})" if len(self._stack) == 1 else self._stack[-1])

    def __enter__(self) -> Muster:
        if self.size > 1:
            self._stack[0] = "between phases"
            self._open()
            self._write()
            self._read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            signal.signal(signal.SIGTERM, lambda *_: None)     # what acts is the thread
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})   # see before_it
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        """A failure that no other rank began is told here and ends the process; the first rank's bad input is the command line's to tell."""
        if self.size > 1:
            self._ended = kind is None
            if kind and not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
                if not self._note["failed"]:
                    self._write(failed=" ".join(f"{kind.__name__}: {error}".split())[:2000])
                self.tell()
                raise SystemExit(1)
            self._write(left="done" if kind is None else "told")
            if isinstance(error, UserError) and self.rank == 0:
                self._first()

    def refused(self, error: UserError) -> bool:
        """Note bad input met before joining; whoever has joined tells of it. The first rank's is the command line's to tell: False where another's was told."""
        if self.size == 1:
            return True
        with suppress(OSError):
            self._open()
        if self.rank == 0:
            return self._first()
        self._write(failed=" ".join(f"{type(error).__name__}: {error}".split())[:2000], left="told")
        return True

    def tell(self) -> None:
        """Write the job's one line, unless another rank has."""
        culprit = self._culprit()
        if culprit and self._first():
            who = f"rank {culprit['rank']}" + (f" (pid {culprit['pid']} on {culprit['host']})" if culprit["pid"] else "")
            where = f"in {culprit['phase']}" + (f" of step {culprit['step']}" if culprit["step"] else "")
            how = f"failed {where}: {culprit['failed']}" if culprit["failed"] else f"{culprit['how']}, last seen {where}"
            self._say(f"{who} {how}")

    def _say(self, what: str) -> None:
        print(f"sophiavl-fast: {what}; the job ends, `train` with run.resume=auto goes on from the newest checkpoint", file=sys.stderr, flush=True)

    def _culprit(self) -> dict[str, Any] | None:
        """The rank that fell first: one that ended without a word, one that failed of itself, one whose pulse stands still, one never seen, this one."""
        first, began = self._others(), time.monotonic()
        while True:
            others = self._others()
            for note in others:
                if not note["left"] and not note["failed"] and note["host"] == self._host and _gone(note["pid"]):
                    return note | {"how": "ended without a word (killed?)"}
            failed = [n for n in (*others, self._note) if n["failed"]]
            own = [n for n in failed if not _of_others(n["failed"])]
            if own:
                return min(own, key=lambda n: n["failed_at"])
            if time.monotonic() - began > SILENT_PULSES * PULSE_S:
                break
            time.sleep(0.1)
        pulses = {n["rank"]: n["pulse"] for n in first}
        still = [n for n in others if not n["left"] and not n["failed"] and n["pulse"] == pulses.get(n["rank"])]
        if still:
            return still[0] | {"how": "is silent"}
        absent = set(range(1, self.size)) - {self.rank} - {n["rank"] for n in others}
        if absent and self._note["step"] <= 1:    # later on all have joined
            how = f"had not joined the run: no note of it in '{self._folder}' (has it the same configuration and run.dir?)"
            return {"rank": min(absent), "pid": 0, "failed": "", "how": how, "phase": "the start", "step": 0}
        return min(failed, key=lambda n: n["failed_at"]) if failed else None

    def _open(self) -> None:
        """Make the folder, and forget what an earlier attempt told."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            if self._told.stat().st_mtime < self._born:
                self._told.unlink()

    def _others(self) -> list[dict[str, Any]]:
        found = []
        for rank in range(self.size):
            with suppress(OSError, ValueError):
                file = self._folder / f"rank-{rank}.json"
                note = json.loads(file.read_text())
                if note["job"] == self._job and rank != self.rank and file.stat().st_mtime >= self._born:
                    found.append(note)
        return found

    def _write(self, **news: Any) -> None:
        if self.size == 1:
            return
        with self._lock, suppress(OSError):
            self._note |= news | ({"failed_at": time.time()} if "failed" in news else {})
            fresh = self._folder / f".rank-{self.rank}.json"
            fresh.write_text(json.dumps(self._note))
            fresh.replace(self._folder / f"rank-{self.rank}.json")

    def _first(self) -> bool:
        """Whether nobody has told of this job's end yet."""
        try:
            os.close(os.open(self._told, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _watch(self) -> None:
        """The thread: pulse, signals, the launcher, the next rank; and the end of a rank that cannot end itself."""
        poll, seen, since, failed_since = select.poll(), None, time.monotonic(), 0.0
        poll.register(self._read_end, select.POLLIN)
        while not self._ended:
            if poll.poll(PULSE_S * 1000) and signal.SIGTERM in os.read(self._read_end, 64):
                self._leave("SIGTERM", 143)
            if os.getppid() != self._parent:
                self._leave(LAUNCHER, 1)
            self._write(pulse=self._note["pulse"] + 1)
            now = time.monotonic()
            if self._note["failed"]:
                failed_since = failed_since or now
                if now - failed_since > LEAVE_S + SILENT_PULSES * PULSE_S:
                    self._leave("its own failure", 1)
            pulse = next(((n["pulse"], n["phase"], n["left"]) for n in self._others() if n["rank"] == (self.rank + 1) % self.size), None)
            if pulse != seen or (pulse and pulse[2]):
                seen, since = pulse, now
            elif seen and now - since > self._deadline_s:
                self._leave(f"{now - since:.0f} s of silence", 1)

    def _leave(self, why: str, code: int) -> None:
        """End this process at once, whatever its main thread waits for; what hangs on it (servers, graders) ends with it."""
        if not self._note["failed"]:
            self._write(left=why)
        self.tell()
        if why in BLAMELESS and self._first():
            step = f" of step {self._note['step']}" * bool(self._note["step"])
            self._say(f"{BLAMELESS[why].format(self._parent)}; rank {self.rank} was last seen in {self._note['phase']}{step}")
        os._exit(code)


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _of_others(message: str) -> bool:
    """Whether an error only says that a peer has left or is late."""
    return any(sign in message for sign in ("onnection", "closed by peer", "imed out", "did not answer", "in vain", "NCCL", "Broken pipe"))
