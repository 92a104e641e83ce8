"""ASGI middleware: authentication, body limit, access log and metrics; and a fast path around the framework."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from lora_hf.core.errors import UserError
from lora_hf.serving.metrics import Metrics

logger = logging.getLogger("lora_hf.serving.access")

JSON = "application/json"
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that went away


def error_body(code: str, message: str) -> dict[str, Any]:
    """The body of every error response."""
    return {"error": {"code": code, "message": message}}


class AccessMiddleware:
    """Checks the token and the body size; logs and counts the response. Bodies, headers and queries are never logged.

    Args:
        token: the bearer token that every path requires; None: no authentication.
        own_login: the path prefix of an app that asks for the token itself, since browsers send no bearer token.
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
        start, status = time.perf_counter(), CLIENT_CLOSED_REQUEST

        async def send_and_note_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._check_and_forward(scope, receive, send_and_note_status)
        except BaseException:
            status = 500 if status == CLIENT_CLOSED_REQUEST else status
            raise
        finally:
            seconds = time.perf_counter() - start
            self.metrics.on_response(getattr(scope.get("route"), "path", "other"), status, seconds)
            path = quote(scope["path"][:200])
            logger.info("%s %s %d %.1f ms", scope["method"][:10], path, status, seconds * 1e3)

    async def _check_and_forward(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if not self._is_authorized(scope["path"], headers.get(b"authorization", b"")):
            message = "expected the header 'Authorization: Bearer TOKEN' with this server's token"
            response = JSONResponse(error_body("unauthorized", message), 401, {"www-authenticate": "Bearer"})
            await response(scope, receive, send)
            return
        body = await self._read_body(headers, receive)
        if body is None:
            message = f"expected a body of at most {self.max_bytes} bytes; split the request"
            response = JSONResponse(error_body("too_large", message), 413, {"connection": "close"})
            await response(scope, receive, send)
            return
        await self.app(scope, replay({"type": "http.request", "body": body, "more_body": False}, receive), send)

    def _is_authorized(self, path: str, header: bytes) -> bool:
        if self.token is None or (self.own_login and f"{path}/".startswith(f"{self.own_login}/")):
            return True
        scheme, _, token = header.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.token.encode())

    async def _read_body(self, headers: Mapping[bytes, bytes], receive: Any) -> bytes | None:
        """The whole body; None once its header or the bytes read so far exceed the limit."""
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


class FastPathMiddleware:
    """Answers valid POSTs of JSON to one path without the framework.

    The framework's own steps cost more than a request's share of a batch, and hold Python's lock while the model's
    thread needs it. Anything unusual goes on to the framework with the body already read, and gets its error there.

    Args:
        model: the pydantic model of the body.
        answer: maps the parsed body and ASGI's `receive` to the JSON value to send.
        error_response: the response to a `UserError` from `answer`.
    """

    def __init__(
        self,
        app: Any,
        path: str,
        model: type[BaseModel],
        answer: Callable[[Any, Any], Awaitable[Any]],
        error_response: Callable[[UserError], Any],
    ) -> None:
        self.app, self.path, self.model = app, path, model
        self.answer, self.error_response = answer, error_response

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        matches = scope["type"] == "http" and scope["path"] == self.path and scope["method"] == "POST"
        if not matches or (b"content-type", JSON.encode()) not in scope["headers"]:
            await self.app(scope, receive, send)
            return
        message = await receive()
        try:
            body = self.model.model_validate_json(message.get("body", b""))
        except ValidationError:
            await self.app(scope, replay(message, receive), send)
            return
        scope["route"] = self  # the metrics read its path, as they do of the framework's routes
        try:
            response = JSONResponse(await self.answer(body, receive))
        except UserError as error:
            response = self.error_response(error)
        await response(scope, receive, send)


def replay(message: Any, receive: Any) -> Any:
    """A `receive` that first returns `message`, which was already received."""
    messages = [message]

    async def replayed() -> Any:
        return messages.pop() if messages else await receive()

    return replayed
