"""A thinking reward model behind vLLM's OpenAI-compatible server: its process, from start to end.

Two start one: `reward serve` until it is interrupted, and a trainer (`thinking.serve: true`) for the length of its run. On loopback unless
told otherwise, behind a token on every route, under the rollout's supervisor: whatever ends the process that started it, the server and its
workers end too.
"""
from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from sophiavl_fast.config import Config
from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.rollout.arguments import CPU_KV_CACHE_BYTES, MAX_IMAGES, as_flags, model_limit
from sophiavl_fast.rollout.environment import child_environment
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.server import end, pick_port

if TYPE_CHECKING:
    from sophiavl_fast.policy import Policy  # `reward serve` must not pay for it

LONGEST = 32768   # tokens, as the published judge is served
KEY_VARIABLE = "OPENAI_API_KEY"
TAIL_LINES = 12
CALL_S = 120.0
ENDING_S = 8.0    # between the end of a worker and its supervisor's


@dataclass(frozen=True)
class Serving:
    """How a judge is served. `dtype` auto: the folder's, float32 on a CPU; `gpus`: which the server may see, () for those of this process."""

    host: str = "127.0.0.1"
    port: int = 0
    name: str = "thinking-reward-model"
    dtype: str = "auto"
    tensor_parallel: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 64
    gpu_memory: float = 0.9
    gpus: Sequence[int] = ()


class JudgeServer:
    """Starts at once; use it once `wait_ready` has returned. key: what every caller must show, "" for a fresh one. Raises UserError for a taken port."""

    def __init__(self, model: Path, how: Serving, *, device: str, log: Path, key: str = "") -> None:
        self.how, self.log = how, log
        self.key = key or secrets.token_urlsafe(32)
        self.address = f"http://{how.host}:{free_port(how.host, how.port)}"
        self.url = f"{self.address}/v1"
        self._asleep = False
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", how.host, "--port", self.address.rpartition(":")[2],
                   "--served-model-name", how.name, "--middleware", "sophiavl_fast.rollout.middleware.TokenMiddleware", "--disable-uvicorn-access-log",
                   *as_flags(arguments(model, how, device))]
        extra = {TOKEN_VARIABLE: self.key} | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, how.gpus))} if how.gpus and device != "cpu" else {})
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = subprocess.Popen([sys.executable, "-m", "sophiavl_fast.rollout.supervisor", *command], stdin=subprocess.PIPE, stdout=file,
                                             stderr=subprocess.STDOUT, env=child_environment(device, os.environ, extra), start_new_session=True)
        self.title = f"judge server {self.address} (pid {self._process.pid})"

    def wait_ready(self, timeout_s: float) -> None:
        """Until /health answers and /v1/models names the model. Raises EngineError with the log's end."""
        began = time.monotonic()
        with self._client(5.0) as client:
            while True:
                self.refuse_dead("its start")
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if time.monotonic() - began > timeout_s:
                    raise EngineError(f"{self.title} did not answer within {timeout_s:g} s of its start{self._tail()}")
                time.sleep(0.2)
            served = [model["id"] for model in client.get("/v1/models").json()["data"]]
        if self.how.name not in served:
            raise EngineError(f"{self.title} serves {', '.join(served)}, not {self.how.name}")

    def wait(self) -> None:
        """Until it ends by itself, which it should not."""
        self._process.wait()

    def refuse_dead(self, phase: str, within_s: float = 0.0) -> None:
        """Raise EngineError where the server has ended, or ends within that time: a worker's end takes its server along some seconds later."""
        deadline = time.monotonic() + within_s
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if (code := self._process.poll()) is not None:
            raise EngineError(f"{self.title} ended during {phase} (exit code {code}){self._tail()}")

    def sleep(self) -> None:
        """Leave the GPU's memory to others until `wake`: weights to host memory, key-value cache given up. No call may be under way."""
        if not self._asleep:
            self._asleep = True
            self._post("/sleep?level=1", "falling asleep")

    def wake(self) -> None:
        if self._asleep:
            self._post("/wake_up", "waking")
            self._asleep = False

    def close(self) -> None:
        """End server and supervisor."""
        end(self._process)

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _client(self, timeout_s: float) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers={"Authorization": f"Bearer {self.key}"}, timeout=timeout_s, trust_env=False)

    def _post(self, route: str, phase: str) -> None:
        try:
            with self._client(CALL_S) as client:
                client.post(route).raise_for_status()
        except httpx.HTTPError as error:
            self.refuse_dead(phase, ENDING_S)
            raise EngineError(f"{self.title} failed while {phase}: {' '.join(str(error).split()) or type(error).__name__}") from error

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return f"; last lines of {self.log}:\n  " + "\n  ".join(lines) if lines else f"; {self.log} is empty"


@contextmanager
def served(config: Config, policy: Policy) -> Iterator[tuple[JudgeServer | None, str]]:
    """With `thinking.serve`: the judge of `thinking.path` for the length of the block, one for all replicas, which learn its URL and key here.

    Yields the server, in the hands of the first replica's lead (None for everybody else), and the key that this run made for it ("" without
    `thinking.serve`). For leads among leads. Raises UserError where they are on several machines: the server answers on loopback only.
    """
    thinking = config.thinking
    if not thinking.serve or config.algorithm.name == "grpo":
        yield None, ""
        return
    machines = set(policy.gather_replicas(socket.gethostname()))
    if len(machines) > 1:
        raise UserError(f"thinking.serve: true answers on one machine, but the leads of the replicas are on {len(machines)}; start `sophiavl-fast reward serve "
                        f"{thinking.path} --host ADDRESS` and set thinking.url")
    with ExitStack() as stack:
        server, told = None, None
        if policy.replica == 0:
            how = Serving(name=thinking.model, gpu_memory=thinking.gpu_memory, gpus=thinking.gpus, tensor_parallel=max(1, len(thinking.gpus)))
            server = stack.enter_context(JudgeServer(Path(thinking.path), how, device=policy.device.type, log=Path(config.run.dir) / "judge.log"))
            server.wait_ready(config.rollout.start_timeout_s)
            told = (server.url, server.key)
        thinking.url, key = next(filter(None, policy.gather_replicas(told)))
        yield server, key


@dataclass(slots=True)
class Doubt:
    """`unscored`: something went wrong that the judge's end would explain."""

    unscored: bool = False


@contextmanager
def judging(server: JudgeServer | None) -> Iterator[Doubt]:
    """Around scoring: where the run's own judge has ended, its end is the error, whatever the client made of it (thinking.on_error is for judges of others)."""
    doubt = Doubt()
    try:
        yield doubt
    except Exception:
        if server:
            server.refuse_dead("scoring", ENDING_S)
        raise
    if server:
        server.refuse_dead("scoring", ENDING_S * doubt.unscored)


def arguments(model: Path, how: Serving, device: str) -> dict[str, Any]:
    """vLLM's arguments. Greedy scores must be the model's own: generation_config of the folder never enters."""
    length = how.max_model_len or min(LONGEST, model_limit(str(model)))
    found: dict[str, Any] = {
        "model": str(model), "dtype": how.dtype if how.dtype != "auto" or device != "cpu" else "float32", "max_model_len": length,
        "max_num_seqs": how.max_num_seqs, "max_num_batched_tokens": max(8192, length), "tensor_parallel_size": how.tensor_parallel,
        "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0}, "generation_config": "vllm"}
    if device == "cpu":
        found |= {"enforce_eager": True, "worker_extension_cls": "sophiavl_fast.rollout.worker.EngineExtension"}   # its import mends seeded samples
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            found["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    else:
        found |= {"gpu_memory_utilization": how.gpu_memory, "enable_sleep_mode": True}  # a trainer on the same GPU may put it to sleep
    return found


def free_port(host: str, port: int) -> int:
    """The port itself if it is free, a free one for 0. Raises UserError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port {port} cannot be had on {host} ({(error.strerror or str(error)).lower()}); choose another, or 0 for a free one") from None
    return port or pick_port(0)
