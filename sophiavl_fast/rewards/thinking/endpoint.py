"""A judge behind an OpenAI-compatible server for the trainer: asked from a background thread while rollouts go on.

Calls start when a group is submitted, so that judging overlaps with the rollout of the groups that follow. How one call is
made, tried again and timed is caller.py's business; a step has `thinking.batch_timeout_s` from the moment it waits. What
fails is NaN with a reason, or, with `thinking.on_error: fail`, a UserError that names the URL and the cause.
"""
from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
from collections.abc import Sequence
from typing import Any

from sophiavl_fast.config import Thinking
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.thinking import Case, Verdict
from sophiavl_fast.rewards.thinking.caller import Caller, Reply
from sophiavl_fast.rewards.thinking.chat import image_part
from sophiavl_fast.rewards.thinking.store import ScoreStore
from sophiavl_fast.rewards.thinking.template import JudgeTemplate

Ticket = list["concurrent.futures.Future[Verdict]"]


class EndpointJudge:
    """Submits calls to its own event loop; close() ends the thread and every connection."""

    def __init__(self, config: Thinking, template: JudgeTemplate, *, key: str = "", longest_wait_s: float = 8.0, rest_s: float = 30.0) -> None:
        self._config, self._template = config, template
        self._down = ""
        self._store = ScoreStore(config.cache) if config.cache else None
        self._caller = Caller(config, template, key=key, longest_wait_s=longest_wait_s, rest_s=rest_s, store=self._store)
        self.url = self._caller.url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="thinking-endpoint", daemon=True)
        self._thread.start()
        if config.on_error == "fail":
            try:
                self.probe()
            except UserError:
                self.close()
                raise

    def submit(self, case: Case) -> Ticket:
        """Begin to ask about every reasoning of a case."""
        images = [image_part(image) for image in case.images]
        return [asyncio.run_coroutine_threadsafe(self._verdict(case, place, images), self._loop) for place in range(len(case.reasonings))]

    def collect(self, tickets: Sequence[Ticket]) -> list[list[Verdict]]:
        """Wait for all, at most thinking.batch_timeout_s. Raises UserError with on_error: fail when the endpoint did not answer."""
        futures = [future for ticket in tickets for future in ticket]
        _, late = concurrent.futures.wait(futures, timeout=self._config.batch_timeout_s)
        for future in late:
            future.cancel()
        if late:
            self._down = f"{len(late)} of {len(futures)} calls unanswered after thinking.batch_timeout_s = {self._config.batch_timeout_s:g}"
        reason, self._down = self._down, ""     # calls of a step ahead may fail meanwhile
        if reason and self._config.on_error == "fail":
            raise UserError(f"thinking.url '{self.url}': {reason}")
        missed = Verdict((math.nan,) * self._config.samples, reason)
        return [[missed if future in late else future.result() for future in ticket] for ticket in tickets]

    async def _verdict(self, case: Case, place: int, images: list[dict[str, Any]]) -> Verdict:
        """All samples of one response; NaN for each that failed."""
        answer = case.answers[place] if self._config.include_answer else ""
        text = self._template.user(case.question, case.reasonings[place], answer)
        seeds: Sequence[int | None] = [None] if self._config.samples == 1 else case.seeds[place]
        replies = await asyncio.gather(*(self._sample(text, images, seed, case.question) for seed in seeds))
        return Verdict(tuple(r.value for r in replies), next((r.reason for r in replies if r.reason), ""))

    async def _sample(self, text: str, images: list[dict[str, Any]], seed: int | None, question: str) -> Reply:
        reply = await self._caller.score(text, images, seed, prefix=question)
        if reply.reason and not reply.reason.startswith("judge's reply"):
            self._down = reply.reason.removeprefix(f"{self.url}: ")
        return reply

    def close(self) -> None:
        """Cancel what is under way, close every connection, end the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()
        if self._store is not None:
            self._store.close()

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._caller.close()

    def probe(self, seconds: float = 5.0) -> None:
        """Raises UserError when nobody listens at the URL, the key is refused or the model is not served; quick, before anything is spent."""
        asyncio.run_coroutine_threadsafe(self._caller.probe(seconds), self._loop).result(timeout=2 * seconds + 5)
