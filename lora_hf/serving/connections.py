"""Limits that hold before a request reaches the application: connections, header size, and time to send a request."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lora_hf.serving.limits import Limits, error_body

logger = logging.getLogger(__name__)

RESERVED_FILES = 100  # file descriptors that stay free for adapters, uploads and connections not yet counted


def connection_limit(limits: Limits) -> int:
    """`max_connections`, or fewer if the process may not open as many files (`ulimit -n`)."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return limits.max_connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return limits.max_connections
    return min(limits.max_connections, max(files - RESERVED_FILES, files // 2))


class ConnectionGuard:
    """Closes the connections that exceed a limit, and logs how many, at most once per `sweep`."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.max_connections = limits, connection_limit(limits)
        self._closed: Counter[str] = Counter()

    def protocol(self, **arguments: Any) -> GuardedProtocol:
        """What uvicorn calls for each new connection."""
        return GuardedProtocol(self, **arguments)

    def note(self, reason: str) -> None:
        self._closed[reason] += 1

    def make_room(self, connections: set[Any]) -> None:
        """Closes the connection that has gone longest without sending a request; if all are busy, the newest."""
        waiting = [each for each in connections if each.phase == "header"]
        self.note(f"all {self.max_connections} connections were in use; max_connections and 'ulimit -n' limit them")
        min(waiting, key=lambda each: each.since).transport.abort()

    def sweep(self, connections: set[Any]) -> None:
        """Closes what is overdue; called every second. Timers of each request would cost more."""
        now = time.monotonic()
        for connection in list(connections):
            connection.close_if_overdue(now)
        for reason, count in self._closed.items():
            logger.warning("%s; connections closed: %d", reason, count)
        self._closed.clear()


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with a bound on headers and on the time that each part of an exchange may take."""

    def __init__(self, guard: ConnectionGuard, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.guard, self.since = guard, time.monotonic()
        self._seen: Any = ("header", None, 0)
        self._unparsed = 0  # bytes that have not completed a header section or added to a body
        self._refusal = (400, "bad_request", "the request is not valid HTTP/1.1")

    @property
    def phase(self) -> str:
        """What the connection waits for: a request's `header` or `body`, the `answer`, or the client `reading` it."""
        if self.flow.write_paused or self.transport.is_closing():
            return "reading"
        if self.cycle is None or self.cycle.response_complete:
            return "header"
        return "body" if self.cycle.more_body and not self.pipeline else "answer"

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.guard.max_connections:
            self.guard.make_room(self.connections)

    def close_if_overdue(self, now: float) -> None:
        phase, limits = self.phase, self.guard.limits
        seen = (phase, self.cycle, self.transport.get_write_buffer_size())
        if seen != self._seen:
            self._seen, self.since = seen, now
        seconds = limits.header_seconds if phase == "header" else limits.body_seconds
        if phase == "answer" or now - self.since <= seconds:
            return
        if phase == "reading":
            self.guard.note(f"the client did not read its answer within {seconds:g} seconds")
        else:
            self.guard.note(f"the {phase} of the request did not arrive within {seconds:g} seconds")
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > self.guard.limits.max_header_bytes and not self.transport.is_closing():
            self._refuse(*self._header_too_large())

    def on_headers_complete(self) -> None:
        limit = self.guard.limits.max_header_bytes
        if (
            self._unparsed > limit
            and len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > limit
        ):
            self._refusal = self._header_too_large()
            raise ValueError  # uvicorn then calls `send_400_response`
        self._unparsed = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(*self._refusal)

    def _header_too_large(self) -> tuple[int, str, str]:
        limit = self.guard.limits.max_header_bytes
        self.guard.note(f"a request's header was larger than {limit} bytes")
        return 431, "header_too_large", f"expected a header of at most {limit} bytes"

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Sends an error in the form of the application's, unless an answer has begun, and closes the connection."""
        body = json.dumps(error_body(code, message, status)).encode()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
