"""Control plane of a vLLM server: its RLHF routes, each call with a deadline and an error that says who and when."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

from sophiavl_fast.errors import EngineError, EngineLost, UserError
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.server import Server, authorization
from sophiavl_fast.rollout.transfer.control import Part

ENDING_S = 1.0   # between the end of a worker and its server's


class HttpControl:
    """Control over HTTP. server: the spawned one at this address, whose log errors quote; None for one found running."""

    def __init__(self, url: str, token: str, timeout_s: float, server: Server | None) -> None:
        self.name, self._timeout_s, self._server = server.name if server else f"rollout server {url}", timeout_s, server
        self.url = url
        self._client = httpx.Client(base_url=url, headers=authorization(token), timeout=timeout_s, trust_env=False)

    def wait_ready(self, timeout_s: float, on_wait: Callable[[float], None] | None) -> None:
        """Block until a server found running answers. Raises EngineLost when it does not in time."""
        began = time.monotonic()
        while True:
            try:
                if self._client.get("/health", timeout=5.0).status_code in (200, 401):   # whose token is wrong is told by the first real call
                    return
            except httpx.TransportError:
                pass
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise EngineLost(f"{self.name} does not answer: nobody was reached there within {timeout_s:g} s; start it with "
                                 "`python -m sophiavl_fast.rollout.serve`, or leave rollout.urls empty")
            if on_wait:
                on_wait(waited)
            time.sleep(0.2)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return self._post("/collective_rpc", json={"method": method, "args": args, "timeout": self._timeout_s}, step=method).json()["results"]

    def init_transfer(self, info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", json={"init_info": info})

    def start(self) -> None:
        self._post("/start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        self._post("/update_weights", json={"update_info": info})

    def finish(self, label: str) -> None:
        self._post("/finish_weight_update", json={"weight_version": label})

    def label(self, label: str) -> None:
        """Name the weights it holds without sending any."""
        self._post("/update_weight_version", json={"new_version": label})

    def diagnosis(self) -> str:
        return self._server.diagnosis() if self._server else ""

    def reset_caches(self, *, in_flight: bool) -> None:
        if not self._post("/reset_prefix_cache", params={"reset_running_requests": in_flight}).json()["success"]:
            raise EngineError(f"{self.name}: the prefix cache could not be reset, requests are still in flight")
        self._post("/reset_mm_cache")
        self._post("/reset_encoder_cache")

    def pause(self, *, keep: bool) -> None:
        self._post("/pause", params={"mode": "keep" if keep else "wait"})

    def resume(self) -> None:
        self._post("/resume")

    def sleep(self) -> None:
        self._request("POST", "/sleep", "its falling asleep", params={"level": 1})

    def wake(self, part: Part) -> None:
        self._request("POST", "/wake_up", f"its waking ({part})", params={"tags": part})
        if part == "kv_cache" and self._request("GET", "/is_sleeping", "its waking").json()["is_sleeping"]:
            raise EngineError(f"{self.name} still sleeps after it was woken")

    def workers(self) -> int:
        return self._request("GET", "/get_world_size", _phase("get_world_size")).json()["world_size"]

    def close(self) -> None:
        self._client.close()

    def _post(self, route: str, step: str = "", **content: Any) -> httpx.Response:
        return self._request("POST", route, _phase(step or route[1:]), **content)

    def _request(self, method: str, route: str, phase: str, **content: Any) -> httpx.Response:
        try:
            response = self._client.request(method, route, **content)
        except httpx.TimeoutException:
            raise EngineLost(f"{self.name} did not answer {phase} within {self._timeout_s:g} s{self.diagnosis()}") from None
        except RuntimeError:
            if not self._client.is_closed:
                raise
            # the pool has given this engine up meanwhile, in a thread of its own
            raise EngineLost(f"{self.name} was given up before {phase}{self.diagnosis()}") from None
        except httpx.TransportError as error:
            self.ended()
            raise EngineLost(f"{self.name} cannot be reached for {phase} ({error or type(error).__name__}){self.diagnosis()}") from None
        if response.status_code == 401:
            if self._server is None:
                raise UserError(f"{self.name} refused this run's token; {TOKEN_VARIABLE} must be the one the server was started with")
            raise EngineError(f"{self.name} refused this run's token at {phase}")
        if response.status_code != 200:
            kind = EngineLost if self.ended() else EngineError
            raise kind(f"{self.name} failed at {phase} with status {response.status_code}: {response.text[:400]}{self.diagnosis()}")
        return response

    def ended(self) -> bool:
        """Whether a process has ended or is stopped: vLLM answers some requests after its engine has died."""
        return self._server is not None and (self._server.ended_within(ENDING_S) or bool(self._server.trouble()))


def _phase(step: str) -> str:
    return f"weight transfer ({step.removeprefix('sophia_')})"
