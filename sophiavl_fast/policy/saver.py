"""Saves a run's checkpoints, in the background where asked: training goes on while they are written."""
from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sophiavl_fast.errors import EngineError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.policy import Policy


class Saver:
    """One for a run; every rank has its own, makes it and calls it together.

    In the background, `save` copies this rank's share of the tensors (about 1 / ranks of weights, main weights and moments)
    to host memory and returns; a thread writes it. The threads meet on a process group of their own, and the first rank's
    publishes the folder by renaming it, so that a crash at any moment leaves the last good checkpoint as it was. Where one
    rank cannot write, all of them are told. One save is under way at a time.
    """

    def __init__(self, policy: Policy, run_dir: str | Path, *, keep: int, background: bool) -> None:
        self._policy, self._run_dir, self._keep, self._background = policy, Path(run_dir), keep, background
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        deadline = timedelta(seconds=policy.config.policy.control_timeout_s)   # a collective of these threads must not cross with the training's
        self._group = dist.new_group(backend="gloo", timeout=deadline) if background else None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write RUN/checkpoints/step_N, see checkpoint.save. Raises EngineError where the save before this one failed."""
        if not self._background:
            checkpoint.save(self._policy, self._run_dir, step, state, self._keep)
            return
        self.wait()
        draft = checkpoint.begin(self._policy, self._run_dir, step, state, copied=True)
        self._thread = threading.Thread(target=self._run, args=(draft,), name=f"checkpoint step {step}")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way. Raises EngineError where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise EngineError(failure)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def _run(self, draft: checkpoint.Draft) -> None:
        try:
            parts = self._met(draft.part.write)
            self._met(lambda: draft.finish(parts, self._keep) if dist.get_rank() == 0 else None)   # nobody's `wait` ends before it has its name
        except Exception as error:  # whatever it is: nobody else sees this thread's errors
            self._failure = f"checkpoint '{draft.target}' could not be written ({type(error).__name__}: {error}); the one before it stands"

    def _met(self, work: Callable[[], Any]) -> list[Any]:
        """Do this rank's work, then hear of everyone's: what each gave. Raises on every rank where one of them failed, so that none waits for it."""
        given, failure = None, None
        try:
            given = work()
        except Exception as error:
            failure = error
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (given, failure and f"{type(failure).__name__}: {failure}"), group=self._group)
        if failure:
            raise failure
        if failed := [(rank, told) for rank, (_, told) in enumerate(found) if told]:
            raise RuntimeError(f"rank {failed[0][0]}: {failed[0][1]}")
        return [given for given, _ in found]
