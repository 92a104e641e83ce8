"""ASGI middleware: who may ask, body limit, access log and metrics."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

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
        page: the path of the web page, which holds nothing secret and asks for the token itself.
    """

    def __init__(
        self,
        app: Any,
        token: str | None,
        limits: Limits,
        metrics: Metrics,
        hosts: frozenset[str] | None = None,
        page: str | None = None,
    ) -> None:
        self.app, self.token, self.max_bytes, self.metrics = app, token, limits.max_bytes, metrics
        self.hosts, self.page = hosts, page

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
            headers = dict(scope["headers"])
            refusal = self._refusal(scope, headers)
            body = b"" if refusal else await self._read_body(scope, headers, receive)
            if body is None:
                message = f"expected a body of at most {self.max_bytes} bytes; split the request"
                refusal = _error(413, "too_large", message, {"connection": "close"})
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
            seconds = time.perf_counter() - start
            self.metrics.on_response(getattr(scope.get("route"), "path", "other"), status, seconds)
            path = quote(scope["path"][:200])
            logger.info("%s %s %d %.1f ms", scope["method"][:10], path, status, seconds * 1e3)

    def _refusal(self, scope: Any, headers: Mapping[bytes, bytes]) -> Response | None:
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
        is_page = scope["method"] == "GET" and scope["path"] == self.page
        if not is_page and not self._is_authorized(headers.get(b"authorization", b"")):
            message = "expected the header 'Authorization: Bearer TOKEN' with this server's token"
            return _error(401, "unauthorized", message, {"www-authenticate": "Bearer"})
        return None

    def _is_authorized(self, header: bytes) -> bool:
        if self.token is None:
            return True
        scheme, _, token = header.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.token.encode())

    async def _read_body(self, scope: Any, headers: Mapping[bytes, bytes], receive: Any) -> bytes | None:
        """The whole body; None once its header or the bytes read so far exceed the limit."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_bytes:
            return None
        parts, size = [], 0
        async for part in Request(scope, receive).stream():
            parts.append(part)
            size += len(part)
            if size > self.max_bytes:
                return None
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
    return JSONResponse(error_body(code, message, status), status, headers)


def replay(message: Any, receive: Any) -> Any:
    """A `receive` that first returns `message`, which was already received."""
    messages = [message]

    async def replayed() -> Any:
        return messages.pop() if messages else await receive()

    return replayed
