"""A judge by rule behind a real OpenAI-compatible server, for the demo, tests and docs.

    python -m sophiavl_fast.data.demo.judge_server --data data/demo --port 8100

It knows the demo's pictures by their pixels, reads question and reasoning out of the `demo_judge` or `demo_judge_rationale` prompt and
replies with its reasoning (rationale.py) and the share of right lines (soundness.py): `<think>...</think><answer>0.5000</answer>`.
With OPENAI_API_KEY in its environment it wants that key. It can misbehave on purpose:
--errors, --hangs and --garbage are shares of calls, --delay the seconds that every call takes, --slots how many it serves at once.
--judge is how it turns the rule's score into its own (JUDGES): what a trainer does with judges that are wrong in a known way.
"""
from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sophiavl_fast.data.demo import soundness
from sophiavl_fast.data.demo.questions import Question
from sophiavl_fast.data.demo.rationale import rationale

MODEL = "rule-judge"
HANG_S = 3600.0
FLATTERED = 40   # characters of reasoning that earn everything from a judge flattered by length; a sound trace has 5 to 19
LETTERED = "check?"  # how the prompt ends whose lines carry letters and whose characters have a space behind them (demo_judge_rationale)
_TERMS = re.compile(r"[0-9](\+[0-9])+\?")
_QUESTIONS = {"sum?": "sum", "max-min?": "spread", "largest?": "largest", "read": "read", "range?": "range", "trend?": "trend"}


@dataclass(frozen=True)
class Faults:
    """Shares of calls that fail, and how long a good one takes. `slots`: calls served at once, 0 for no limit."""

    errors: float = 0.0
    hangs: float = 0.0
    garbage: float = 0.0
    delay_s: float = 0.0
    slots: int = 0
    seed: int = 0


# name -> the judge's score of (the rule's score, the reasoning, a number in [0, 1) that depends on prompt and seed)
JUDGES: dict[str, Callable[[float, str, float], float]] = {
    "sound": lambda score, text, luck: score,
    "random": lambda score, text, luck: luck,
    "inverted": lambda score, text, luck: 1.0 - score,
    "length": lambda score, text, luck: min(1.0, len(text) / FLATTERED),  # flattered by length
}


class Rule:
    """Scores prompts about the pictures of a demo data folder, as the named judge would."""

    def __init__(self, folder: Path, judge: str = "sound") -> None:
        self._judge = JUDGES[judge]
        self._digits: dict[str, list[int]] = {}
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.open(encoding="utf-8"):
                record = json.loads(line)
                if isinstance(record.get("path"), str) and record["path"] and "digits" in record:
                    self._digits.setdefault(record["path"], record["digits"])
        self._digits = {picture_key((folder / path).read_bytes()): digits for path, digits in self._digits.items()}

    def reply(self, text: str, images: Sequence[bytes], seed: int | None = None) -> str:
        """Rationale and score of one prompt. Raises KeyError for a picture or a question that is not the demo's."""
        luck = random.Random(f"{seed} {text}").random()
        text, _, wish = text.rpartition("\n")
        first, _, rest = text.partition("\n")
        if _TERMS.fullmatch(first):
            question = Question("add", tuple(int(d) for d in first[:-1].split("+")))
        else:
            kind = _QUESTIONS[first]
            if rest.startswith("A. "):
                rest, kind = rest.partition("\n")[2], "tens" if kind == "sum" else kind
            question = Question(kind, tuple(self._digits[picture_key(images[0])]))
        if wish.strip() == LETTERED:
            rest = "\n".join(line[1:] for line in rest[::2].split("\n"))
        score = soundness.check_trace({"kind": question.kind, "digits": question.digits}, rest).score
        return f"<think>{rationale(question, rest)}</think><answer>{self._judge(score, rest, luck):.4f}</answer>"


def picture_key(data: bytes) -> str:
    """The same for every encoding of the same pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return hashlib.blake2b(str(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


class Server:
    """HTTP/1.1 with keep-alive on 127.0.0.1, as small as can be: it must cost less than what asks it."""

    def __init__(self, rule: Any, faults: Faults, key: str = "") -> None:
        self._rule, self._faults, self._key = rule, faults, key
        self._luck = random.Random(faults.seed)
        self._slots = asyncio.Semaphore(faults.slots) if faults.slots else None
        self.calls = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request, *lines = head.split("\r\n")
                headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                status, answer = await self._answer(request, headers, body)
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _answer(self, request: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        if self._key and headers.get("authorization") != f"Bearer {self._key}":
            return 401, b'{"error": {"message": "wrong key"}}'
        method, path, _ = request.split(" ", 2)
        if method == "GET" and path == "/v1/models":
            return 200, json.dumps({"data": [{"id": MODEL}], "calls": self.calls}).encode()
        if method != "POST" or path != "/v1/chat/completions":
            return 404, b"{}"
        self.calls += 1
        luck = self._luck.random()
        if luck < self._faults.errors:
            return 500, b'{"error": {"message": "out of luck"}}'
        if luck < self._faults.errors + self._faults.hangs:
            await asyncio.sleep(HANG_S)
        if luck < self._faults.errors + self._faults.hangs + self._faults.garbage:
            return 200, self._luck.choice((b"<html>oops</html>", b'{"choices": [', _chat("I cannot say"), _chat("")))
        if self._slots is None:
            return await self._judge(body)
        async with self._slots:
            return await self._judge(body)

    async def _judge(self, body: bytes) -> tuple[int, bytes]:
        if self._faults.delay_s:
            await asyncio.sleep(self._faults.delay_s)
        request = json.loads(body)
        if request["model"] != MODEL:
            return 404, json.dumps({"error": {"message": f"model '{request['model']}' does not exist"}}).encode()
        content = request["messages"][-1]["content"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        images = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts if part["type"] == "image_url"]
        try:
            return 200, _chat(self._rule.reply(parts[-1]["text"], images, request.get("seed")))
        except KeyError as error:
            return 400, json.dumps({"error": {"message": f"not of the demo: {error}"}}).encode()


def _chat(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                       "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}}).encode()


async def serve(rule: Any, faults: Faults, port: int, key: str) -> None:
    """Serve until cancelled; prints the address once it listens."""
    server = await asyncio.start_server(Server(rule, faults, key).connection, "127.0.0.1", port, limit=1 << 24, backlog=512)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sophiavl_fast.data.demo.judge_server", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the demo's data folder")
    parser.add_argument("--port", type=int, default=0)
    for name in ("errors", "hangs", "garbage", "delay"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--judge", choices=JUDGES, default="sound")
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    faults = Faults(a.errors, a.hangs, a.garbage, a.delay, a.slots, a.seed)
    asyncio.run(serve(Rule(a.data, a.judge), faults, a.port, os.environ.get("OPENAI_API_KEY", "")))


if __name__ == "__main__":
    main()
