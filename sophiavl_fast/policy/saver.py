"""Saves a run's checkpoints, in the background where asked: training goes on while they are written."""
from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sophiavl_fast.errors import EngineError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.policy import Policy


class Saver:
    """One for a run; every rank has its own and calls it together.

    In the background, `save` copies this rank's share of the tensors (about 1 / ranks of weights, main weights and moments)
    to host memory and returns; a thread writes it. The first rank's thread waits for the others' and publishes the folder by
    renaming it, so that a crash at any moment leaves the last good checkpoint as it was. One save is under way at a time.
    """

    def __init__(self, policy: Policy, run_dir: str | Path, *, keep: int, background: bool) -> None:
        self._policy, self._run_dir, self._keep, self._background = policy, Path(run_dir), keep, background
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write RUN/checkpoints/step_N, see checkpoint.save. Raises EngineError where the save before this one failed."""
        if not self._background:
            checkpoint.save(self._policy, self._run_dir, step, state, self._keep)
            return
        self.wait()
        draft, target = checkpoint.begin(self._policy, self._run_dir, step)
        held = list(checkpoint.shares(self._policy))
        manifest = checkpoint.manifest(self._policy, step, state)
        self._thread = threading.Thread(target=self._run, args=(held, draft, target, manifest), name=f"checkpoint step {step}")
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

    def _run(self, held: list[tuple[str, Tensor]], draft: Path, target: Path, manifest: dict[str, Any]) -> None:
        try:
            self._write(held, draft, target, manifest)
        except Exception as error:  # whatever it is: nobody else sees this thread's errors
            self._failure = f"checkpoint '{target}' could not be written ({type(error).__name__}: {error}); the one before it stands"

    def _write(self, held: list[tuple[str, Tensor]], draft: Path, target: Path, manifest: dict[str, Any]) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        index = checkpoint.write(held, draft, rank)
        mine = draft / f"index-{rank}.json"
        checkpoint.write_json(mine.with_suffix(".new"), index)
        os.replace(mine.with_suffix(".new"), mine)
        if rank != 0:
            return
        manifest["tensors"] = {name: file for part in self._everyones(draft, ranks) for name, file in part.items()}
        checkpoint.write_json(draft / "manifest.json", manifest)
        checkpoint.publish(draft, target, self._keep)

    def _everyones(self, draft: Path, ranks: int) -> list[dict[str, str]]:
        """The other ranks' indices, as they finish: files, for a collective here would cross with the training's."""
        deadline = time.monotonic() + self._policy.config.policy.control_timeout_s
        while missing := [r for r in range(ranks) if not (draft / f"index-{r}.json").exists()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {missing[0]} has not written its share")
            time.sleep(0.05)
        return [json.loads((draft / f"index-{r}.json").read_text()) for r in range(ranks)]
