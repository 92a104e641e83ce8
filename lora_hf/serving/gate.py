"""What every HTTP request passes first: the token, the size of its body, and at its end the log and the metrics."""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from lora_hf.serving.metrics import Metrics

logger = logging.getLogger("lora_hf.serving.access")


def problem(code: str, message: str) -> bytes:
    """The body of every answer that is an error."""
    return json.dumps({"error": {"code": code, "message": message}}).encode()


class Gate:
    """ASGI middleware. Nothing of a body or of a header is ever logged, and no query either.

    Args:
        token: what `Authorization: Bearer` must say, on every path; None: nothing is asked.
        own_login: what lies below this path asks for the token itself, as a browser sends no such header.
    """

    def __init__(
        self, app: Any, token: str | None, max_bytes: int, metrics: Metrics, own_login: str | None = None
    ) -> None:
        self.app, self.token, self.max_bytes, self.metrics = app, token, max_bytes, metrics
        self.own_login = own_login

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 499  # what nginx calls a client that went away

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, watched)
        except BaseException:
            status = 500 if status == 499 else status
            raise
        finally:
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, status, seconds)
            path = quote(scope["path"][:200])
            logger.info("%s %s %d %.1f ms", scope["method"][:10], path, status, seconds * 1e3)

    async def _pass(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        asked = self.token is not None and not self._below_login(scope["path"])
        if asked and not self._knows(headers.get(b"authorization", b"")):
            message = "expected the header 'Authorization: Bearer TOKEN' with this server's token"
            await respond(send, 401, problem("unauthorized", message), {"www-authenticate": "Bearer"})
            return
        body = await self._body(headers, receive)
        if body is None:
            message = f"expected a body of at most {self.max_bytes} bytes; ask several times"
            await respond(send, 413, problem("too_large", message), {"connection": "close"})
            return
        await self.app(scope, again({"type": "http.request", "body": body, "more_body": False}, receive), send)

    def _below_login(self, path: str) -> bool:
        return self.own_login is not None and (path == self.own_login or path.startswith(f"{self.own_login}/"))

    def _knows(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        assert self.token is not None
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token.encode())

    async def _body(self, headers: Mapping[bytes, bytes], receive: Any) -> bytes | None:
        """The whole body; None where it is too large, known from its header or from as much as was read."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_bytes:
            return None
        parts, size = [], 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def again(message: Any, receive: Any) -> Any:
    """A `receive` that begins with a message that was received already."""
    messages = [message]

    async def replayed() -> Any:
        return messages.pop() if messages else await receive()

    return replayed


async def respond(send: Any, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """Sends a whole answer that is JSON."""
    sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    pairs = [(key.encode(), value.encode()) for key, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
