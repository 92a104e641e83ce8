"""ASGI middleware: who may ask, body limit, access log and metrics; and a fast path around the framework."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from lora_hf.core.errors import UserError
from lora_hf.serving.limits import Limits, error_body
from lora_hf.serving.metrics import Metrics

logger = logging.getLogger("lora_hf.serving.access")

JSON = "application/json"
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that went away
SINGLE_HEADERS = (b"host", b"authorization", b"origin", b"content-type", b"content-length")
HOST = re.compile(r"(?P<name>\[[\da-f:.]+\]|[^\s:/@\[\]]+)(:\d*)?")
EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})


class AccessMiddleware:
    """Checks host, token and body size; logs and counts the response. Bodies, headers and queries are never logged.

    Args:
        token: the bearer token that every path requires; None: no authentication.
        hosts: the names by which clients may address the server; None: any. A page of another site can make its own
            name point here (DNS rebinding), and would then read what this server answers.
        playground: the path prefix of the web page, which asks for the token itself: browsers send no bearer token.
    """

    def __init__(
        self,
        app: Any,
        token: str | None,
        limits: Limits,
        metrics: Metrics,
        hosts: frozenset[str] | None = None,
        playground: str | None = None,
    ) -> None:
        self.app, self.token, self.max_bytes, self.metrics = app, token, limits.max_bytes, metrics
        self.hosts, self.playground = hosts, playground
        self.logins = LoginLimit(limits.max_logins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), CLIENT_CLOSED_REQUEST
        on_page = self.playground is not None and f"{scope['path']}/".startswith(f"{self.playground}/")

        async def send_and_note_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if on_page:
                    message["headers"] = [*map(_with_strict_cookie, message["headers"])]
            await send(message)

        try:
            headers = dict(scope["headers"])
            refusal = self._refusal(scope, headers, on_page)
            body = b"" if refusal else await self._read_body(headers, receive)
            if body is None:
                message = f"expected a body of at most {self.max_bytes} bytes; split the request"
                refusal = JSONResponse(error_body("too_large", message), 413, {"connection": "close"})
            if refusal:
                await refusal(scope, receive, send_and_note_status)
                return
            received = {"type": "http.request", "body": body, "more_body": False}
            await self.app(scope, replay(received, receive), send_and_note_status)
        except ClientDisconnect:
            pass
        except BaseException:
            status = 500 if status == CLIENT_CLOSED_REQUEST else status
            raise
        finally:
            if on_page and status == 200 and self._is_login(scope):
                self.logins.forget(_client(scope))
            seconds = time.perf_counter() - start
            self.metrics.on_response(getattr(scope.get("route"), "path", "other"), status, seconds)
            path = quote(scope["path"][:200])
            logger.info("%s %s %d %.1f ms", scope["method"][:10], path, status, seconds * 1e3)

    def _refusal(self, scope: Any, headers: Mapping[bytes, bytes], on_page: bool) -> Response | None:
        """The response to a request that may not be answered, before its body is read."""
        if len(headers) < len(scope["headers"]):
            names = [name for name, _ in scope["headers"]]
            repeated = [name.decode() for name in SINGLE_HEADERS if names.count(name) > 1]
            if repeated:
                return _error(400, "bad_request", f"expected the header {repeated[0]!r} once, found it repeated")
        host = headers.get(b"host", b"").decode("latin-1")
        if host and self.hosts is not None and not is_allowed_host(host, self.hosts):
            message = f"this server does not answer as {host[:100]!r}; start it with --allow-host to allow this name"
            return _error(400, "unknown_host", message)
        if on_page:
            origin = headers.get(b"origin", b"").decode("latin-1")
            if origin and origin.partition("://")[2].lower() != host.lower():
                message = "expected a request of the playground's own page; a proxy must pass the Host header on"
                return _error(403, "foreign_origin", message)
            if self._is_login(scope) and not self.logins.admit(_client(scope)):
                return _error(
                    429, "too_many_logins", "too many failed log-ins; retry in a minute", {"retry-after": "60"}
                )
        elif not self._is_authorized(headers.get(b"authorization", b"")):
            message = "expected the header 'Authorization: Bearer TOKEN' with this server's token"
            return _error(401, "unauthorized", message, {"www-authenticate": "Bearer"})
        return None

    def _is_login(self, scope: Any) -> bool:
        return scope["method"] == "POST" and scope["path"].rstrip("/") == f"{self.playground}/login"

    def _is_authorized(self, header: bytes) -> bool:
        if self.token is None:
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
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def is_allowed_host(header: str, hosts: frozenset[str]) -> bool:
    """Whether a Host header names one of `hosts`. A server on every address also answers to any address."""
    match = HOST.fullmatch(header.lower())
    if match is None:
        return False
    name = match["name"].strip("[]")
    return name in hosts or (not hosts.isdisjoint(EVERY_ADDRESS) and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_body(code, message), status, headers)


def _client(scope: Any) -> str:
    return (scope.get("client") or ("unknown",))[0]


def _with_strict_cookie(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Keeps other sites from using the log-in of a visitor: gradio sets `SameSite=none` for pages in frames."""
    name, value = header
    if name.lower() != b"set-cookie":
        return header
    return name, re.sub(rb";\s*samesite=\w+", b"", value, flags=re.IGNORECASE) + b"; SameSite=strict"


class LoginLimit:
    """Counts the log-ins that have not succeeded, by client; a fixed number per minute is allowed.

    All clients together have ten times as many, because a client behind a trusted proxy can choose its address.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._attempts: deque[tuple[float, str]] = deque()

    def admit(self, client: str) -> bool:
        """Counts an attempt, unless the limit is reached."""
        now = time.monotonic()
        while self._attempts and now - self._attempts[0][0] > 60:
            self._attempts.popleft()
        of_client = sum(other == client for _, other in self._attempts)
        if of_client >= self.limit or len(self._attempts) >= 10 * self.limit:
            logger.warning("refused a log-in to the playground: too many have failed")
            return False
        self._attempts.append((now, client))
        return True

    def forget(self, client: str) -> None:
        self._attempts = deque(attempt for attempt in self._attempts if attempt[1] != client)


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
