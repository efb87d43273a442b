"""Life of a spawned vLLM server: start under a supervisor, wait until it answers, quote its log, end it."""
from __future__ import annotations

import atexit
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from sophiavl_fast.config import Config
from sophiavl_fast.errors import EngineLost, UserError
from sophiavl_fast.rollout.arguments import as_flags, engine_arguments
from sophiavl_fast.rollout.environment import child_environment
from sophiavl_fast.rollout.family import Family
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.supervisor import end_orphans

LOG_LINES, TAIL_BYTES = 12, 1 << 16
CLOSE_S = 15.0
LOWEST_PORT, TRIES = 16384, 64


class Server:
    """A vLLM server on 127.0.0.1 that dies with this process. backend: weight transfer backend.

    index: which of all the trainer's servers it is (its port, cores or GPUs); name: of its log in run_dir. The log goes on
    where a server before it, of the same name, left off.
    """

    def __init__(self, config: Config, *, device: str, backend: str, run_dir: str | Path, token: str, name: str = "rollout", index: int = 0) -> None:
        self.token = token
        self.url = f"http://127.0.0.1:{pick_port(config.rollout.port and config.rollout.port + index)}"
        self.log = Path(run_dir) / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = child_environment(device, os.environ, server_variables(token, backend) | placement(config, device, index))
        command = [sys.executable, "-m", "sophiavl_fast.rollout.supervisor", *server_command(config, device, backend, self.url)]
        self._family: Family | None = None
        self._closing = threading.Lock()
        with self.log.open("ab") as log:
            self._began = log.tell()
            self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.name = f"rollout server {self.url} (pid {self._process.pid})"
        atexit.register(self.close)

    def wait_ready(self, timeout_s: float, on_wait: Callable[[float], None] | None = None) -> None:
        """Block until /health answers. Raises EngineLost with the log's last lines when it ends or takes too long."""
        start = time.monotonic()
        with httpx.Client(base_url=self.url, headers=authorization(self.token), timeout=5.0, trust_env=False) as client:
            while True:
                self.refuse_dead("start")
                try:
                    if client.get("/health").status_code == 200:
                        self._family = Family(self._process.pid)
                        self.name = f"rollout server {self.url} (pid {self._family.front})"
                        return
                except httpx.TransportError:
                    pass
                waited = time.monotonic() - start
                if waited > timeout_s:
                    raise EngineLost(f"{self.name} did not answer within {timeout_s:g} s of its start{self.diagnosis()}")
                if on_wait:
                    on_wait(waited)
                time.sleep(0.2)

    def alive(self) -> bool:
        """Whether it and every process of its family live; one that is stopped does."""
        return self._process.poll() is None and not (self._family and self._family.first)

    def refuse_dead(self, phase: str) -> None:
        """Raise EngineLost when the server has ended."""
        if not self.alive():
            raise EngineLost(f"{self.name} ended during {phase}{self.diagnosis()}")

    def ended_within(self, seconds: float) -> bool:
        """Wait that long for it to end; whether it has."""
        if self._family:
            self._family.ended.wait(seconds)
        return not self.alive()

    def trouble(self) -> str:
        """Its process that ended first, or those that are stopped; "" where all run."""
        return self._family.trouble() if self._family else ""

    def diagnosis(self) -> str:
        """Which of its processes ended or is stopped, and what the log says of it, for an error message."""
        lines = self._log_lines()
        if found := self.trouble():
            errors = [line.strip() for line in lines if "Error" in line and not re.search(r"\b(DEBUG|INFO|WARNING)\b", line)]
            return f": {found}; {self.log}" + (f" says: {errors[-1][:300]}" if errors else " says nothing of it")
        code = self._process.poll()
        quoted = f"; last lines of {self.log}:\n  " + "\n  ".join(lines[-LOG_LINES:]) if lines else f"; {self.log} is empty"
        return (f" (exit code {code})" if code is not None else "") + quoted

    def _log_lines(self) -> list[str]:
        """The end of what this server wrote to its log."""
        with self.log.open("rb") as log:
            log.seek(max(self._began, self.log.stat().st_size - TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()

    def close(self) -> None:
        """End server and supervisor; what does not end is killed with its whole process group."""
        atexit.unregister(self.close)
        with self._closing:
            if self._family:
                self._family.close()
            end(self._process)


def end(supervisor: subprocess.Popen) -> None:
    """End a supervised server, which the end of its standard input asks for; what does not end is killed with its whole process group,
    as is what a supervisor left that was killed itself."""
    if supervisor.stdin and not supervisor.stdin.closed:
        supervisor.stdin.close()
    try:
        supervisor.wait(CLOSE_S)
    except subprocess.TimeoutExpired:
        os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.wait()
    if supervisor.returncode < 0:
        end_orphans(supervisor.pid)


def placement(config: Config, device: str, index: int) -> dict[str, str]:
    """Environment that gives each server its GPUs (`rollout.gpus`, or the trainer rank's own), or on a CPU its own cores where there are several."""
    size, count = config.rollout.tensor_parallel, config.rollout.engines
    if device != "cpu":
        visible, first = os.environ.get("CUDA_VISIBLE_DEVICES", ""), int(os.environ.get("LOCAL_RANK", "0"))
        own = visible.split(",")[first:first + size] if visible else range(first, first + size)
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, config.rollout.gpus[index * size:(index + 1) * size] or own))}
    cores = sorted(os.sched_getaffinity(0))
    if count == 1 or size > 1 or len(cores) < count or "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[index % count::count]))}


def server_command(config: Config, device: str, backend: str, url: str) -> list[str]:
    """vLLM's API server as a command line. `vllm serve` looks up its own package's name, which the CPU build changes."""
    host, port = url.removeprefix("http://").split(":")
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", host, "--port", port, "--served-model-name", "policy",
            "--middleware", "sophiavl_fast.rollout.middleware.TokenMiddleware", "--enable-scale-out", "--disable-uvicorn-access-log",
            *as_flags(engine_arguments(config, device, backend))]


def server_variables(token: str, backend: str) -> dict[str, str]:
    """Environment that only a server gets. CUDA IPC handles travel pickled: on loopback, behind the token, or not at all."""
    return {TOKEN_VARIABLE: token} | ({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if backend == "ipc" else {})


def authorization(token: str) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {token}"}


def pick_port(port: int) -> int:
    """The port itself if it is free, a free one for 0; UserError when it is taken.

    The free one lies below those that the system hands out by itself: a server binds it half a minute later, and until then
    any connection of anybody could be given it.
    """
    for candidate in [port] if port else random.SystemRandom().sample(range(LOWEST_PORT, lowest_handed_out()), TRIES):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
                return candidate
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
    raise UserError(f"rollout.port = {port} cannot be had on 127.0.0.1 ({reason}); choose another, or 0 for a free one")


def lowest_handed_out() -> int:
    """The first port that the system gives to whoever asks for any; 32768 where it does not say."""
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        low = 32768
    return low if low >= LOWEST_PORT + TRIES else 32768
