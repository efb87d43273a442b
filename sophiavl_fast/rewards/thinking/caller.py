"""One judge behind one or several OpenAI-compatible servers, asked from an asyncio loop, with a deadline for everything.

`thinking.url` may name several replicas, separated by commas. Calls about one picture and question go to one replica, whose
prefix cache then holds them, unless it is busier than the others or gone. A call has `thinking.retries` further tries for
failures that may pass (timeouts, connections, 429, 5xx, and unreadable answers of a server that has worked before); it waits
between them with full jitter, and without holding one of the `thinking.concurrency` slots. The key comes from the environment
(OPENAI_API_KEY) and goes nowhere but into the header.
"""
from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from sophiavl_fast.config import Thinking
from sophiavl_fast.errors import UserError, nearest
from sophiavl_fast.rewards.thinking.answers import HINTS, Answer, CallFailed, cause, decoded, served
from sophiavl_fast.rewards.thinking.breaker import Breaker
from sophiavl_fast.rewards.thinking.chat import completions_url, read_reply, reply_text, request_body
from sophiavl_fast.rewards.thinking.parse import Score
from sophiavl_fast.rewards.thinking.patience import Patience
from sophiavl_fast.rewards.thinking.store import ScoreStore, content_key
from sophiavl_fast.rewards.thinking.template import JudgeTemplate

_LOG = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OWN_FAULT = (400, 413, 422)  # statuses that speak about this request, not about the server


class Reply(NamedTuple):
    """A score in [0, 1], or NaN and the reason; `down`: the server is to blame, not this request; `text`: what the judge said.

    asked: False where the circuit breaker kept the request back.
    """

    value: float
    reason: str = ""
    down: bool = False
    text: str = ""
    asked: bool = True


class BudgetSpent(Exception):
    """No call is left."""


@dataclass
class Budget:
    """Limits on calls (never exceeded) and on tokens (as the servers count them; calls under way still finish)."""

    max_calls: float = math.inf
    max_tokens: float = math.inf
    calls: int = 0
    tokens: int = 0

    def take(self) -> None:
        """Count one call. Raises BudgetSpent instead where that is too many."""
        if self.calls >= self.max_calls or self.tokens >= self.max_tokens:
            raise BudgetSpent
        self.calls += 1


class _Replica:
    def __init__(self, url: str, breaker: Breaker) -> None:
        self.url, self.breaker, self.busy, self.worked = url, breaker, 0, False


class Caller:
    """Create it anywhere; use it from one running loop, and `close` it there.

    ask_again: further calls where a reply holds no score; learn: cut tries that take far longer than calls do (patience.py);
    read: what a reply's text means, where it is no score of the template.
    """

    def __init__(self, config: Thinking, template: JudgeTemplate, *, key_variable: str = "OPENAI_API_KEY", key: str = "", longest_wait_s: float = 8.0,
                 rest_s: float = 30.0, ask_again: int = 0, learn: bool = False, store: ScoreStore | None = None, budget: Budget | None = None,
                 read: Callable[[str], Score] | None = None) -> None:
        self._config, self._template, self._store, self.budget = config, template, store, budget or Budget()
        self._replicas = [_Replica(completions_url(url), Breaker(max(8, config.concurrency), rest_s)) for url in config.url.split(",") if url.strip()]
        if not self._replicas:
            completions_url(config.url)  # says what a URL looks like
        self._longest_wait_s, self._ask_again, self._read = longest_wait_s, ask_again, read
        self._patience = Patience(config.timeout_s, learn=learn)
        self._logprobs = config.score == "expected" and config.samples == 1 and read is None
        self._slots = asyncio.Semaphore(config.concurrency)
        self._key = key or os.environ.get(key_variable, "")
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        return ",".join(replica.url for replica in self._replicas)

    async def score(self, text: str, images: Sequence[dict[str, Any]], seed: int | None = None, *, prefix: str = "", fresh: bool = False) -> Reply:
        """The judge's score of one prompt. Raises BudgetSpent; every other failure is a Reply with its reason.

        prefix: what prompts of one replica should share beside the pictures, such as the question; fresh: whatever the store says.
        """
        pictures = [image["image_url"]["url"] for image in images]
        key = b"" if self._store is None else content_key((
            self._config.model, self._config.score, self._template.system, self._template.reply, text, str(seed), *pictures))
        if self._store is not None and not fresh and (kept := self._store.get(key)):
            return Reply(kept[0], text=kept[1])
        reply = await self._score(text, images, seed, prefix=hash((prefix, *pictures)))
        if self._store is not None and not math.isnan(reply.value):
            self._store.put(key, reply.value, reply.text)
        return reply

    async def _score(self, text: str, images: Sequence[dict[str, Any]], seed: int | None, prefix: int) -> Reply:
        tries = unsure = 0
        while True:
            async with self._slots:
                replica = self._choose(prefix, tries)
                if refusal := replica.breaker.refusal():
                    return Reply(math.nan, f"{replica.url}: {refusal}", down=True, asked=False)
                last = tries >= self._config.retries
                try:
                    score, said = await self._try(replica, text, images, seed, self._patience.limit(tries, last=last))
                except CallFailed as failure:
                    if not failure.cut:
                        replica.breaker.failed(str(failure))
                    if last or not (failure.again or (failure.garbage and replica.worked)):
                        return Reply(math.nan, f"{replica.url}: {failure}", down=failure.status not in _OWN_FAULT)
                    wait_s = failure.wait_s or self._longest_wait_s / 16 * 2 ** tries
                else:
                    replica.breaker.succeeded()
                    replica.worked = True
                    if not score.reason or unsure >= self._ask_again:
                        return Reply(score.value, score.reason, text=said)
                    unsure, wait_s = unsure + 1, 0.0
            tries += 1
            await asyncio.sleep(random.uniform(0.0, min(wait_s, self._longest_wait_s)))  # the slot is free meanwhile

    def _choose(self, prefix: int, tries: int) -> _Replica:
        """The replica whose cache may hold the prefix; another one after a failure, or where that one is much busier."""
        if len(self._replicas) == 1:
            return self._replicas[0]
        count = len(self._replicas)
        order = [self._replicas[(prefix + tries + i) % count] for i in range(count)]
        open_ = [replica for replica in order if not replica.breaker.refuses()] or order
        fair = sum(replica.busy for replica in self._replicas) / count
        return open_[0] if open_[0].busy <= 1.5 * fair + 2 else min(open_, key=lambda replica: replica.busy)

    async def _try(self, replica: _Replica, text: str, images: Sequence[dict[str, Any]], seed: int | None, limit_s: float) -> tuple[Score, str]:
        """One try: the score read from the reply, and the reply. Without log-probs from then on where the server refuses them."""
        expected = self._logprobs
        body = request_body(self._config.model, self._template, text, images, logprobs=expected, seed=seed)
        try:
            reply = await self._post(replica, body, limit_s)
        except CallFailed as failure:
            if not expected or failure.status not in (400, 422):
                raise
            reply = await self._post(replica, {key: value for key, value in body.items() if "logprobs" not in key}, limit_s)
            if self._logprobs:
                self._logprobs = False
                _LOG.warning("%s refuses logprobs: thinking scores are read from its replies", replica.url)
        score, said = read_reply(reply, self._template, expected=expected), reply_text(reply)
        return (score if self._read is None else self._read(said)), said

    async def _post(self, replica: _Replica, body: dict[str, Any], limit_s: float) -> Any:
        self.budget.take()
        replica.busy += 1
        began = time.perf_counter()
        try:
            async with asyncio.timeout(limit_s), self._http().post(replica.url, data=json.dumps(body).encode(), allow_redirects=False) as response:
                answer = Answer(response.status, response.headers, await response.read())
        except TimeoutError:
            if cut := limit_s < self._config.timeout_s:
                self._patience.cut()
            raise CallFailed(f"no answer within thinking.timeout_s = {self._config.timeout_s:g}", again=True, cut=cut) from None
        except (aiohttp.ClientError, OSError) as error:
            raise CallFailed(f"{cause(error)} (endpoint down?)", again=True) from None
        finally:
            replica.busy -= 1
        reply = decoded(answer)
        self._patience.answered(time.perf_counter() - began)
        usage = reply.get("usage") if isinstance(reply, dict) else None
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        self.budget.tokens += tokens if isinstance(tokens, int) else 0
        return reply

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
            remote = any(urlsplit(replica.url).hostname not in _LOOPBACK for replica in self._replicas)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=self._config.concurrency), headers=headers,
                                                  timeout=aiohttp.ClientTimeout(total=None), trust_env=remote)  # a proxy never leads to this machine
        return self._session

    async def probe(self, seconds: float = 5.0, *, strict: bool = True) -> None:
        """Raises UserError when nobody listens at a URL, the key is refused or the model is not served; quick, before anything is spent.

        Not strict: silence or a broken answer to this question alone is no reason, since chat calls may still work.
        """
        for replica in self._replicas:
            models = replica.url.removesuffix("/chat/completions") + "/models"
            try:
                async with asyncio.timeout(seconds), self._http().get(models, allow_redirects=False) as response:
                    answer = Answer(response.status, response.headers, await response.read())
            except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
                if not strict and not isinstance(error, aiohttp.ClientConnectorError):
                    continue
                raise UserError(f"thinking.url '{replica.url}': {cause(error)} (endpoint down?)") from None
            if answer.status in (401, 403):
                raise UserError(f"thinking.url '{replica.url}': HTTP {answer.status}: {HINTS[answer.status]}")
            names = served(answer)
            if names and self._config.model not in names:
                hint = nearest(self._config.model, names[:8]) if len(names) > 8 else f"; it serves: {', '.join(names)}"
                raise UserError(f"thinking.model '{self._config.model}' is not served at '{replica.url}'{hint}")

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
