"""Saves a run's checkpoints, in the background where asked: training goes on while they are written."""
from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

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
        self._failure: Exception | None = None
        deadline = timedelta(seconds=policy.config.policy.control_timeout_s)   # a collective of these threads must not cross with the training's
        self._group: ProcessGroup = dist.new_group(backend="gloo", timeout=deadline) if background else policy.layout.control

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write RUN/checkpoints/step_N, see checkpoint.save. In the background, raises what kept the save before this one from being written."""
        if not self._background:
            checkpoint.save(self._policy, self._run_dir, step, state, self._keep)
            return
        self.wait()
        draft = checkpoint.begin(self._policy, self._run_dir, step, state, copied=True)
        self._thread = threading.Thread(target=self._run, args=(draft,), name=f"checkpoint step {step}")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way. Raises what kept it from being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def _run(self, draft: checkpoint.Draft) -> None:
        try:
            draft.publish(self._group, self._keep)
        except Exception as error:  # whatever it is: nobody else sees this thread's errors
            self._failure = error
