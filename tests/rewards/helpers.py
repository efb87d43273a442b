"""Groups made by hand, and a real HTTP server that judges by a rule and can be told to misbehave."""
from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sophiavl_fast.types import Group, Prompt, Response


def wrap(answer: str, reasoning: str = "because") -> str:
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def group(kind: str, gold: str, answers: list[str], *, options: tuple[str, ...] = (), raw: bool = False, images: tuple = (), name: str = "d:1",
          reasonings: list[str] | None = None) -> Group:
    """A group whose responses give `answers` (whole texts with raw=True)."""
    reasonings = reasonings or ["because"] * len(answers)
    texts = answers if raw else [wrap(a, r) for a, r in zip(answers, reasonings, strict=True)]
    prompt = Prompt(id=name, dataset="d", problem_type=kind, question="What is it?", gold=gold, options=list(options), images=list(images))
    return Group(prompt=prompt, responses=[Response(token_ids=[1], logprobs=[0.0], text=t, finish_reason="stop", seed=0, weight_versions=[0]) for t in texts])


Behaviour = Callable[["Handler", dict[str, Any], int], None]


class Handler(BaseHTTPRequestHandler):
    """POST: the behaviour answers; GET /v1/models: the served name."""

    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.paths.append(self.path)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            number = len(self.server.bodies) - 1
        try:
            self.server.behaviour(self, body, number)
        except OSError:
            self.close_connection = True  # the client went away
        finally:
            with self.server.lock:
                self.server.now -= 1

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "judge"}]})

    def reply(self, value: Any, status: int = 200, kind: str = "application/json", headers: dict[str, str] | None = None) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self) -> None:
        """Promise a body, send half of it, close."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{\"choices\"")
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour, self.lock, self.over = behaviour, threading.Lock(), threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def judge_server(behaviour: Behaviour) -> Iterator[JudgeServer]:
    server = JudgeServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


def chat(text: str, logprobs: list[dict] | None = None) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": {"content": logprobs} if logprobs else None}
    return {"choices": [choice]}


def prompt_text(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def honest(handler: Handler, body: dict[str, Any], number: int) -> None:
    """A judge by rule: the score is the number after 'quality' in the prompt."""
    handler.reply(chat(f"<answer>{re.search(r'quality ([0-9.]+)', prompt_text(body))[1]}</answer>"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
