"""The server engine: samples groups from one or more vLLM servers over HTTP."""
from __future__ import annotations

import asyncio
import base64
import io
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch

from sophiavl_fast.config import Config, Rollout
from sophiavl_fast.errors import EngineError, EngineLost, UserError
from sophiavl_fast.rollout import identity
from sophiavl_fast.rollout.arguments import max_model_len
from sophiavl_fast.rollout.engine import Collected, Decode, OnGroup, OnProgress, Sample, Sampling, check_fits, check_prompt_ids
from sophiavl_fast.rollout.machine import own_address
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.pool import Picked, Pool
from sophiavl_fast.rollout.server import Server, authorization
from sophiavl_fast.rollout.transfer import Transfer
from sophiavl_fast.rollout.transfer.control import Channel
from sophiavl_fast.rollout.transfer.http import HttpControl
from sophiavl_fast.types import Group, Prompt, WeightSource

WATCH_S, PICK_S = 0.5, 0.05
RETRIES = 2


class ServerRollout:
    """RolloutEngine over HTTP: servers spawned here, or those of `rollout.urls` (token in SOPHIAVL_ROLLOUT_TOKEN)."""

    def __init__(self, config: Config, *, urls: list[str], stop_ids: list[int], banned_ids: list[int], decode: Decode, device: str,
                 nonce: str, run_dir: str | Path, on_wait: Callable[[float], None] | None, replica: int = 0) -> None:
        self.version = 0
        self._config, self._nonce, self._stop_ids, self._decode = config.rollout, nonce, stop_ids, decode
        self._limit = max_model_len(config)
        self._sender = threading.get_ident()
        c, first = config.rollout, replica * config.rollout.engines
        backend = transfer_backend(c, device, found=bool(urls))
        gpu = torch.cuda.current_device() if device == "cuda" else None   # asked here: a thread that starts an engine anew has device 0 for its own
        self._token = os.environ.get(TOKEN_VARIABLE, "") if urls else secrets.token_urlsafe(32)
        if not self._token:
            raise UserError(f"rollout.urls is set, but not the environment variable {TOKEN_VARIABLE} with the servers' token")

        def start(index: int) -> Server:
            name = f"rollout{f'-{first + index}' if first + index else ''}"
            return Server(config, device=device, backend=backend, run_dir=run_dir, token=self._token, name=name, index=first + index)

        self._transfer = Transfer(nonce=nonce, checksums=c.checksum, in_flight=c.staleness > 0)
        self._pool = Pool(c.engines, urls, start=start, control=lambda e: HttpControl(e.url, self._token, c.transfer_timeout_s, e.server),
                          channel=lambda control: open_channel(backend, control, c, gpu), compare=lambda control: identity.refuse_other(config, control),
                          nonce=nonce, banned_ids=banned_ids, max_restarts=c.max_restarts, start_timeout_s=c.start_timeout_s)
        try:
            self._pool.open(on_wait)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: list[Prompt], *, n: int, step: int, seed: int, temperature: float, max_new_tokens: int,
                 on_group: OnGroup | None = None, on_progress: OnProgress | None = None) -> list[Group]:
        self._transfer.refuse_broken()
        self._pool.check("the time before generate")
        self._pool.wake(self._transfer)
        self._pool.pick()    # raises where nothing will answer
        check_fits(prompts, max_new_tokens, self._limit)
        sampling = Sampling(n, step, seed, temperature, max_new_tokens)
        collected = Collected(prompts, sampling, self._decode, on_group, on_progress)
        asyncio.run(self._generate(prompts, sampling, collected))
        return collected.groups()

    def send(self, source: WeightSource, version: int) -> dict[str, float]:
        self._sender = threading.get_ident()
        times = self._pool.send(self._transfer, source, version)
        self.version = version
        return times

    def sleep(self) -> None:
        if self._config.sleep:
            self._pool.check("the time before its sleep")
            self._pool.sleep(self._transfer)

    def tend(self) -> None:
        self._pool.check("the time between requests")
        self._pool.tend(self._transfer)

    def counters(self) -> dict[str, float]:
        return self._pool.counters()

    def close(self) -> None:
        self._transfer.close()
        self._pool.close()

    async def _generate(self, prompts: list[Prompt], sampling: Sampling, collected: Collected) -> None:
        """All prompts at once, as many in flight as the engines hold, each to the engine with the fewest unanswered."""
        slots = asyncio.Semaphore(len(self._pool.engines) * (self._config.max_num_seqs // sampling.n + 4))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(headers=authorization(self._token), timeout=self._config.request_timeout_s, limits=limits,
                                     trust_env=False) as client:

            async def one(number: int) -> None:
                async with slots:
                    collected.add(number, await self._ask(client, prompts[number], sampling))

            try:
                async with asyncio.TaskGroup() as group:
                    watch = group.create_task(self._watch())
                    asks = [group.create_task(one(i)) for i in range(len(prompts))]
                    await asyncio.gather(*asks)
                    watch.cancel()
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    async def _watch(self) -> None:
        """A dead engine is left out at once, not at the request's deadline, and one started anew gets its weights.

        Reading weights is for the thread that sends them; rollouts that run ahead leave it to that one (`tend`).
        """
        while True:
            self._pool.refuse_closed()
            self._pool.check("generate")
            if threading.get_ident() == self._sender:
                self._pool.tend(self._transfer)
            await asyncio.sleep(WATCH_S)

    async def _ask(self, client: httpx.AsyncClient, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        """A prompt's samples, from whichever engine lives to answer: seeds make every one of them answer alike."""
        while True:
            while (picked := self._pool.pick()) is None:
                await asyncio.sleep(PICK_S)
            self._pool.carry(picked, 1)
            try:
                return await self._ask_engine(client, picked, prompt, sampling)
            except EngineLost as why:
                self._pool.lose(picked.engine, picked.life, why)
                self._pool.redo()
            finally:
                self._pool.carry(picked, -1)

    async def _ask_engine(self, client: httpx.AsyncClient, picked: Picked, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        body = {"model": "policy", "token_ids": prompt.token_ids, "return_token_ids": True,
                "sampling_params": sampling.arguments(prompt, self._stop_ids)}
        if prompt.images:
            body["content_parts"] = [{"type": "image_url", "url": data_url(image)} for image in prompt.images]
        answer = await self._post(client, picked, prompt, body)
        check_prompt_ids(prompt, answer["prompt_token_ids"])
        return [self._sample(choice, picked.control.url) for choice in sorted(answer["choices"], key=lambda c: c["index"])]

    async def _post(self, client: httpx.AsyncClient, picked: Picked, prompt: Prompt, body: dict[str, Any]) -> dict[str, Any]:
        """Seeds make a request repeatable, so a broken connection is tried again; a deadline or an error status is not."""
        engine, life, control = picked
        name = control.name
        for attempt in range(RETRIES + 1):
            try:
                response = await client.post(f"{control.url}/inference/v1/generate", json=body)
            except httpx.TimeoutException:
                raise EngineLost(f"{name} did not answer prompt '{prompt.id}' within {self._config.request_timeout_s:g} s "
                                 f"during generate{control.diagnosis()}") from None
            except httpx.TransportError as error:
                await asyncio.sleep(WATCH_S)
                if attempt == RETRIES or engine.life != life or (engine.server and not engine.server.alive()):
                    raise EngineLost(f"{name} cannot be reached during generate ({error or type(error).__name__}){control.diagnosis()}") from None
                continue
            if response.status_code != 200:
                kind = EngineLost if await asyncio.to_thread(control.ended) else EngineError
                raise kind(f"{name} refused prompt '{prompt.id}' with status {response.status_code} during generate: "
                           f"{response.text[:400]}{control.diagnosis()}")
            return response.json()
        raise AssertionError("unreachable")

    def _sample(self, choice: dict[str, Any], url: str) -> Sample:
        versions: list[int] = []
        for span in choice["weight_versions"] or ():
            nonce, _, version = span["version"].rpartition(":")
            if nonce != self._nonce:
                raise EngineError(f"rollout server {url} sampled with weights of another run ('{span['version']}'); it serves somebody else too")
            versions += [int(version)] * (span["end"] - span["start"])
        return Sample(token_ids=choice["token_ids"], logprobs=[t["logprob"] for t in choice["logprobs"]["content"]],
                      finish_reason=choice["finish_reason"], weight_versions=versions)


def transfer_backend(rollout: Rollout, device: str, *, found: bool) -> str:
    """auto: gloo on a CPU; ipc to a server spawned on the trainer's own GPU; nccl to servers elsewhere."""
    if rollout.transfer != "auto":
        if rollout.transfer in ("nccl", "ipc") and device == "cpu":
            raise UserError(f"rollout.transfer = {rollout.transfer} needs a GPU; on a CPU use gloo (or auto)")
        return rollout.transfer
    return "gloo" if device == "cpu" else "nccl" if found or rollout.gpus else "ipc"


def open_channel(backend: str, control: HttpControl, rollout: Rollout, gpu: int | None) -> Channel:
    """The trainer side of a backend, to one engine; `gpu`: the trainer's device, None on a CPU."""
    host, timeout_s = rollout.transfer_host or own_address(control.url), rollout.transfer_timeout_s
    if backend == "ipc":
        from sophiavl_fast.rollout.transfer.ipc import IpcChannel

        if control.workers() > 1:
            raise UserError("rollout.transfer = ipc reaches an engine of one GPU, the trainer's; use nccl")
        assert gpu is not None, "transfer_backend refuses it on a CPU"
        return IpcChannel(control, gpu)
    if backend == "nccl":
        from sophiavl_fast.rollout.transfer.nccl import NcclChannel

        assert gpu is not None, "transfer_backend refuses it on a CPU"
        return NcclChannel(control, host, timeout_s, gpu)
    from sophiavl_fast.rollout.transfer.gloo import GlooChannel

    return GlooChannel(control, host, timeout_s)


def data_url(image: Any) -> str:
    """A PIL image as a lossless data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
