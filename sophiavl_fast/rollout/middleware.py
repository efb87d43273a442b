"""A token on every route of the server.

vLLM's own --api-key guards /v1 and the like only; /pause, /collective_rpc, /update_weights and others answer anybody.
The token comes by environment variable, since command lines are readable by every user of the machine.
"""
from __future__ import annotations

import hmac
import os

from sophiavl_fast import config_checks

TOKEN_VARIABLE = config_checks.TOKEN_VARIABLE


class TokenMiddleware:
    """ASGI middleware (`--middleware`): 401 without `Authorization: Bearer <token>`, whatever the route or protocol."""

    def __init__(self, app) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise RuntimeError(f"{TOKEN_VARIABLE} is not set: refusing to serve without a token")
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan" or hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self._expected):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this server wants its run's token"})
