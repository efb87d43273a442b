"""What an HTTP answer, or its absence, means: a decoded reply, or one line that says what to do, and whether asking again may help."""
from __future__ import annotations

import json
from typing import Any

import httpx

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
HINTS = {
    401: "wrong or missing key, see OPENAI_API_KEY",
    403: "the key in OPENAI_API_KEY may not use this model",
    404: "wrong path, or thinking.model is not the served name (--served-model-name)",
    405: "this is no chat/completions address",
    413: "prompt or images are too large for the server",
    429: "too many requests: lower thinking.concurrency",
}


class CallFailed(Exception):
    """One call came to nothing; the message is one line. `again`: the same call may work a moment later. `status`: HTTP's, 0 without."""

    def __init__(self, message: str, *, again: bool = False, status: int = 0) -> None:
        super().__init__(message)
        self.again, self.status = again, status


def decoded(response: httpx.Response) -> Any:
    """The JSON of an answer. Raises CallFailed for everything else."""
    status = response.status_code
    if response.is_redirect:
        raise CallFailed(f"redirects (HTTP {status}) to {response.headers.get('location', '?')}: set thinking.url to the final address", status=status)
    if not response.is_success:
        hint = HINTS.get(status) or excerpt(response)
        raise CallFailed(f"HTTP {status}: {hint}" if hint else f"HTTP {status}", again=status in _PASSING, status=status)
    try:
        return json.loads(response.content)
    except ValueError:
        kind = "HTML" if b"<html" in response.content[:1000].lower() else "something other than JSON"
        raise CallFailed(f"answers with {kind}: is this an OpenAI-compatible server?", status=status) from None


def excerpt(response: httpx.Response) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(response.text[:160].split())


def cause(error: BaseException) -> str:
    """A transport error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())


def served(response: httpx.Response) -> list[str]:
    """Model names of a /models answer; [] where the server has no such list."""
    try:
        return [str(model["id"]) for model in decoded(response)["data"]]
    except (CallFailed, KeyError, TypeError):
        return []
