"""Rollouts that run ahead of the policy (`rollout.staleness`): the engines sample the next steps while the trainer updates.

At staleness k, step s + k is being sampled while step s is trained on, and weights are swapped in the middle of it: the
engines pause, keep what is in flight, recompute its cache under the new weights and go on, so that every token was drawn from
exactly the weights whose version it carries. The importance weights of the loss correct for the rest.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from sophiavl_fast.data.loader import Loader
from sophiavl_fast.types import Group, Prompt

TEND_S = 0.5
Generate = Callable[[list[Prompt], int], list[Group]]
Found = TypeVar("Found")


def awaited(asked: Future[Found], tend: Callable[[], None]) -> Found:
    """The result; `tend` is called now and then until it is there: an engine that was started anew wants the weights, which only this thread may read."""
    while not wait([asked], timeout=TEND_S).done:
        tend()
    return asked.result()


class Ahead:
    """Groups of each step, asked for `depth` steps before they are taken; nothing beyond step `last`.

    draw: a step's prompts of this replica, from `loader`, called in the taker's thread only. generate: prompts, step -> groups,
    called in threads of its own.
    """

    def __init__(self, loader: Loader, draw: Callable[[], list[Prompt]], generate: Generate, *, depth: int, first: int, last: int) -> None:
        self._loader, self._draw, self._generate = loader, draw, generate
        self._depth, self._last, self._asked = depth, last, first - 1
        self._threads = ThreadPoolExecutor(depth, "rollout")
        self._running: dict[int, Future[tuple[list[Group], float, float]]] = {}
        self._counted = 0.0     # engines' work until then was an earlier step's
        self._states: dict[int, dict[str, Any]] = {}

    def take(self, step: int, tend: Callable[[], None]) -> tuple[list[Group], float]:
        """The groups of `step` and the seconds that the engines took for them, those left out in which they were at an earlier step's too; asks for
        the steps up to `step + depth`.

        tend: called now and then while they are not there, in this thread, which may read the policy's weights."""
        self._ask(step)
        groups, began, ended = awaited(self._running.pop(step), tend)
        self._ask(step + self._depth)
        busy = max(0.0, ended - max(began, self._counted))
        self._counted = max(self._counted, ended)
        return groups, busy

    def loader_state(self, step: int) -> dict[str, Any]:
        """The loader's state after `step` was drawn and before the next was: what a checkpoint of `step` goes on from."""
        self._states = {s: kept for s, kept in self._states.items() if s >= step}
        return self._states[step]

    def close(self) -> None:
        """Ask for nothing more; what is in flight ends with the engine."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, until: int) -> None:
        while self._asked < min(until, self._last):
            self._asked += 1
            prompts = self._draw()
            self._states[self._asked] = self._loader.state()
            self._running[self._asked] = self._threads.submit(self._timed, prompts, self._asked)

    def _timed(self, prompts: list[Prompt], step: int) -> tuple[list[Group], float, float]:
        """The groups, and when they were begun and ended."""
        began = time.perf_counter()
        return self._generate(prompts, step), began, time.perf_counter()
