"""A collective and the remote call that makes an engine join it, with one deadline and the right culprit."""
from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

from sophiavl_fast.errors import EngineError, EngineLost
from sophiavl_fast.rollout.transfer.control import Control

ANSWER_S = 2.0   # a broken connection shows before the engine's own account of why


def together(own: Callable[[], Any], call: Callable[[], Any], control: Control, *, phase: str, timeout_s: float) -> Any:
    """Run `own` (the trainer's side) while the remote call to the engine `control` runs; returns own's result.

    A failed remote call ends the wait at once: its engine has left the collective and `own` would block until its timeout.
    Threads are daemons, since what blocks in a broken collective cannot be ended. Raises EngineError naming engine and
    phase, EngineLost where the engine has ended or is silent.
    """
    mine, theirs = _spawn(own), _spawn(call)
    wait([mine, theirs], timeout=timeout_s, return_when=FIRST_EXCEPTION)
    if mine.done() and mine.exception():
        wait([theirs], timeout=ANSWER_S)
    if theirs.done() and (error := theirs.exception()):
        raise error if isinstance(error, EngineError) else EngineError(f"{control.name} failed at {phase}: {error}") from error
    if mine.done() and (error := mine.exception()):
        raise EngineLost(f"{control.name} left the {phase}: {str(error).splitlines()[0]}{control.diagnosis()}") from error
    if not mine.done() or not theirs.done():
        raise EngineLost(f"{control.name} did not answer the {phase} within {timeout_s:g} s{control.diagnosis()}")
    return mine.result()


def _spawn(call: Callable[[], Any]) -> Future:
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
