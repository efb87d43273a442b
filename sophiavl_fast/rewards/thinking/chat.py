"""The OpenAI-compatible chat format: address, request body, and what a reply says about the score."""
from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.thinking.answers import CallFailed
from sophiavl_fast.rewards.thinking.parse import Score, parse_score
from sophiavl_fast.rewards.thinking.template import JudgeTemplate

REPLY_TOKENS = 512
TOP = 20  # alternatives asked for each token, the most that servers give
_ROUNDING = 1e-3  # above a log-probability of 0: 16-bit numbers
_COMPLETE = re.compile(r"(?:0?\.[0-9]+|0\.[0-9]+|1(?:\.0*)?)")


def completions_url(url: str) -> str:
    """The full address from a base URL with or without /v1, or from a full one. Raises UserError for what is no http URL."""
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that hold no address, a port that is no number
        usable = False
    if not usable:
        raise UserError(f"thinking.url = '{url}' is not an http(s) URL; expected for example http://127.0.0.1:8000/v1")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if re.search(r"/v[0-9]+[a-z0-9]*$", path) else "/v1/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def image_part(image: Any) -> dict[str, Any]:
    """A PIL image as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}}


def request_body(model: str, template: JudgeTemplate, text: str, images: Sequence[dict[str, Any]], *, logprobs: bool, seed: int | None) -> dict[str, Any]:
    """One chat request: images before the text, greedy unless a seed asks for a sample."""
    content: Any = [*images, {"type": "text", "text": text}] if images else text
    messages = [{"role": "user", "content": content}]
    if template.system:
        messages.insert(0, {"role": "system", "content": template.system})
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": REPLY_TOKENS, "temperature": 0.0}
    if seed is not None:
        body |= {"temperature": 1.0, "seed": seed}
    return body | ({"logprobs": True, "top_logprobs": TOP} if logprobs else {})


def read_reply(reply: Any, template: JudgeTemplate, *, expected: bool) -> Score:
    """The number in a decoded reply; with `expected`, the mean where it carries log-probs. Raises CallFailed for another format."""
    try:
        choice = reply["choices"][0]
        text, logprobs = choice["message"]["content"] or "", choice.get("logprobs")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CallFailed("the reply is not in the chat/completions format", garbage=True) from None
    if not isinstance(text, str):
        raise CallFailed("the reply is not in the chat/completions format", garbage=True)
    found = parse_score(text, template.before, template.after)
    if math.isnan(found.value) or not (expected and logprobs):
        return found
    try:
        mean = expected_score(logprobs["content"] or [], found.value)
    except (KeyError, TypeError, ValueError, ArithmeticError):  # not in the format: as from a server that sends none
        return found
    return found if mean is None else Score(mean)


def reply_text(reply: Any) -> str:
    """What the judge said, of a reply that `read_reply` could read."""
    return reply["choices"][0]["message"]["content"] or ""


def expected_score(tokens: Sequence[dict[str, Any]], value: float) -> float | None:
    """The mean score over the alternatives at the greedy score's own tokens, or None where they do not tell.

    Only alternatives that fix the score count: after '0.', each digit; before, a '1'. Those that leave it open ('0' beside
    a greedy '1') are left out, and where they weigh more than a tenth the greedy number is the better answer. Raises KeyError,
    TypeError or ValueError for a block that is not in the format.
    """
    span = _score_span(tokens, value)
    if span is None:
        return None
    total = mass = lost = 0.0
    written, path = "", 1.0
    for token in span:
        chosen = token["token"]
        last = token is span[-1]
        for option in token.get("top_logprobs") or []:
            if option["token"] == chosen and not last:
                continue
            weight, candidate = path * _probability(option), (written + option["token"]).strip()
            if _COMPLETE.fullmatch(candidate) and 0.0 <= float(candidate) <= 1.0:
                total, mass = total + weight * float(candidate), mass + weight
            elif candidate in ("0", "0.", "."):
                lost += weight
        written, path = written + chosen, path * _probability(token)
    return total / mass if mass > 9 * lost else None


def _probability(token: dict[str, Any]) -> float:
    if not token["logprob"] <= _ROUNDING:
        raise ValueError(f"{token['logprob']} is no log-probability")
    return math.exp(token["logprob"])


def _score_span(tokens: Sequence[dict[str, Any]], value: float) -> list[dict[str, Any]] | None:
    """The last run of tokens whose text is exactly a number of this value."""
    for end in range(len(tokens), 0, -1):
        for start in range(max(0, end - 6), end):
            text = "".join(t["token"] for t in tokens[start:end]).strip()
            if re.fullmatch(r"[0-9]*\.?[0-9]+", text) and float(text) == value:
                return list(tokens[start:end])
    return None
