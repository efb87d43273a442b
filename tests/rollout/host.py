"""An inline engine in a process of its own, driven by functions sent to it: vLLM changes much of the process that holds it."""
from __future__ import annotations

import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sophiavl_fast.config import build
from tests.rollout import tiny

WAIT_S = 900   # an engine starts in ten seconds, on a machine that has nothing else to do
CONFIG = {"data": {"max_prompt_tokens": 400}, "rollout": {"engine": "inline", "max_new_tokens": 24, "max_num_seqs": 64}}


def config(folder: Path, **rollout: Any):
    tree = CONFIG | {"model": {"path": str(folder), "dtype": "float32"}}
    return build(tree | {"rollout": CONFIG["rollout"] | rollout})


def open_engine(folder: Path, run_dir: Path, **rollout: Any):
    """The engine of `config`, with the tiny model's stop ids and bans."""
    from sophiavl_fast.rollout import open_rollout

    decode = lambda ids: tiny.processor(folder).tokenizer.decode(ids, skip_special_tokens=True)
    return open_rollout(config(folder, **rollout), stop_ids=tiny.STOP, banned_ids=tiny.BANNED, vocab_size=tiny.VOCAB, decode=decode,
                        device="cpu", run_dir=run_dir)


class Host:
    """`call(fn, *args)` runs fn(state, *args) over there and returns or raises what it did; state: dict with `engine`."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, folder, run_dir), daemon=True)
        self._process.start()

    def call(self, function, *args: Any) -> Any:
        self._pipe.send((function, args))
        if not self._pipe.poll(WAIT_S):
            raise TimeoutError(f"{function.__name__} took longer than {WAIT_S} s")
        ok, result = self._pipe.recv()
        if not ok:
            raise result
        return result

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(30)
        self._process.kill()


def _serve(pipe: Connection, folder: Path, run_dir: Path) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    state: dict[str, Any] = {"folder": folder, "run_dir": run_dir}
    while (message := pipe.recv()) is not None:
        function, args = message
        try:
            pipe.send((True, function(state, *args)))
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send((False, error))
    if "engine" in state:
        state["engine"].close()
