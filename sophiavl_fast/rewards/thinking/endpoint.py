"""A judge behind an OpenAI-compatible server: asked concurrently from a background thread, with a deadline for everything.

Calls start when a group is submitted, so that judging overlaps with the rollout of the groups that follow. A call has
`thinking.timeout_s` a try and `thinking.retries` further tries, only for failures that may pass (timeouts, connections,
429, 5xx); a step has `thinking.batch_timeout_s` from the moment it waits. What fails is NaN with a reason, or, with
`thinking.on_error: fail`, a UserError that names the URL and the cause. The key comes from OPENAI_API_KEY and goes nowhere else.
"""
from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import os
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from sophiavl_fast.config import Thinking
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.thinking import Case, Verdict
from sophiavl_fast.rewards.thinking.answers import HINTS, CallFailed, cause, decoded, served
from sophiavl_fast.rewards.thinking.breaker import Breaker
from sophiavl_fast.rewards.thinking.chat import completions_url, image_part, read_reply, request_body
from sophiavl_fast.rewards.thinking.parse import Score
from sophiavl_fast.rewards.thinking.template import JudgeTemplate

_LOG = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
Ticket = list["concurrent.futures.Future[Verdict]"]


class EndpointJudge:
    """Submits calls to its own event loop; close() ends the thread and every connection."""

    def __init__(self, config: Thinking, template: JudgeTemplate, *, longest_wait_s: float = 8.0, rest_s: float = 30.0) -> None:
        self._config, self._template = config, template
        self.url = completions_url(config.url)
        self._wait = wait_random_exponential(multiplier=longest_wait_s / 16, max=longest_wait_s)
        self._breaker = Breaker(limit=max(8, config.concurrency), rest_s=rest_s)
        self._logprobs = config.score == "expected" and config.samples == 1
        self._down = ""
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(config.concurrency)
        self._thread = threading.Thread(target=self._loop.run_forever, name="thinking-endpoint", daemon=True)
        self._thread.start()
        self._client = self._open_client()
        if config.on_error == "fail":
            try:
                self.probe()
            except UserError:
                self.close()
                raise

    def _open_client(self) -> httpx.AsyncClient:
        key = os.environ.get("OPENAI_API_KEY", "")
        limits = httpx.Limits(max_connections=self._config.concurrency, max_keepalive_connections=self._config.concurrency)
        return httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"} if key else {}, limits=limits, timeout=self._config.timeout_s,
                                 trust_env=urlsplit(self.url).hostname not in _LOOPBACK)  # a proxy never leads to this machine

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
        if self._down and self._config.on_error == "fail":
            raise UserError(f"thinking.url '{self.url}': {self._down}")
        reason, self._down = self._down, ""
        missed = Verdict((math.nan,) * self._config.samples, reason)
        return [[missed if future in late else future.result() for future in ticket] for ticket in tickets]

    async def _verdict(self, case: Case, place: int, images: list[dict[str, Any]]) -> Verdict:
        """All samples of one response; NaN for each that failed."""
        answer = case.answers[place] if self._config.include_answer else ""
        text = self._template.user(case.question, case.reasonings[place], answer)
        seeds: Sequence[int | None] = [None] if self._config.samples == 1 else case.seeds[place]
        scores = await asyncio.gather(*(self._sample(text, images, seed) for seed in seeds))
        return Verdict(tuple(s.value for s in scores), next((s.reason for s in scores if s.reason), ""))

    async def _sample(self, text: str, images: list[dict[str, Any]], seed: int | None) -> Score:
        async with self._slots:
            if refusal := self._breaker.refusal():
                return self._failed(refusal)
            try:
                score = read_reply(await self._ask(text, images, seed), self._template, expected=self._logprobs)
            except CallFailed as failure:
                self._breaker.failed(str(failure))
                return self._failed(str(failure))
        self._breaker.succeeded()
        return score

    def _failed(self, cause: str) -> Score:
        self._down = cause
        return Score(math.nan, f"{self.url}: {cause}")

    async def _ask(self, text: str, images: list[dict[str, Any]], seed: int | None) -> Any:
        """One decoded reply, with retries; without log-probs from then on where the server refuses them."""
        retrying = AsyncRetrying(stop=stop_after_attempt(self._config.retries + 1), wait=self._wait, reraise=True,
                                 retry=retry_if_exception(lambda e: isinstance(e, CallFailed) and e.again))
        body = request_body(self._config.model, self._template, text, images, logprobs=self._logprobs, seed=seed)
        try:
            return await retrying(self._post, body)
        except CallFailed as failure:
            if "logprobs" not in body or failure.status not in (400, 422):
                raise
        plain = {key: value for key, value in body.items() if "logprobs" not in key}
        reply: Any = await retrying(self._post, plain)
        if self._logprobs:
            self._logprobs = False
            _LOG.warning("%s refuses logprobs: thinking scores are read from its replies", self.url)
        return reply

    async def _post(self, body: dict[str, Any]) -> Any:
        try:
            async with asyncio.timeout(self._config.timeout_s):  # the whole call: httpx's own limits are for each read
                response = await self._client.post(self.url, json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise CallFailed(f"no answer within thinking.timeout_s = {self._config.timeout_s:g}", again=True) from None
        except httpx.TransportError as error:
            raise CallFailed(f"{cause(error)} (endpoint down?)", again=True) from None
        return decoded(response)

    def close(self) -> None:
        """Cancel what is under way, close every connection, end the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def probe(self, seconds: float = 5.0) -> None:
        """Raises UserError when nobody listens at the URL, the key is refused or the model is not served; quick, before anything is spent."""
        models = self.url.removesuffix("/chat/completions") + "/models"
        try:
            response = asyncio.run_coroutine_threadsafe(self._client.get(models, timeout=seconds), self._loop).result(timeout=seconds + 1)
        except (httpx.TransportError, concurrent.futures.TimeoutError) as error:
            raise UserError(f"thinking.url '{self.url}': {cause(error)} (endpoint down?)") from None
        if response.status_code in (401, 403):
            raise UserError(f"thinking.url '{self.url}': HTTP {response.status_code}: {HINTS[response.status_code]}")
        names = served(response)
        if names and self._config.model not in names:
            raise UserError(f"thinking.model '{self._config.model}' is not served at '{self.url}'; it serves: {', '.join(names[:8])}")
