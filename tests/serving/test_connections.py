"""Raw connections to a server in this process: what is cut off before a request reaches the application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import uvicorn

from lora_hf.serving.connections import ConnectionGuard, connection_limit
from lora_hf.serving.limits import Limits
from lora_hf.serving.server import _Server
from tests.support.waiting import LIMIT, wait_until

# Times that no test waits for; each test lowers the one that it is about.
LIMITS = Limits(max_header_bytes=1000, header_seconds=LIMIT, body_seconds=LIMIT)
SOON = 0.05  # seconds
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"


class Server(_Server):
    """Runs in a thread, which receives no signals."""

    capture_signals = contextlib.nullcontext  # type: ignore[assignment]


async def echo_length(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body; to `/big` with more than a socket takes."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = b" " * 50_000_000 if scope["path"] == "/big" else str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def serving(limits: Limits, app: Any = echo_length) -> Iterator[tuple[str, int]]:
    guard = ConnectionGuard(limits)
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="none", http=guard.protocol)  # type: ignore[arg-type]
    server = Server(config)
    server.guard = guard
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def answers(address: tuple[str, int], sent: bytes) -> bytes:
    """Everything that the server sends until it closes the connection."""
    with socket.create_connection(address, LIMIT) as client:
        client.sendall(sent)
        return read_to_end(client)


def read_to_end(client: socket.socket) -> bytes:
    received = b""
    while piece := client.recv(65536):
        received += piece
    return received


def status_and_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nx: " + b"a" * 1500,
        b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % index for index in range(200)),
        b"GET / HTTP/1.1\r\nx: " + b"a" * 1500 + b"\r\n\r\n",
        b"GET /" + b"a" * 1500 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=["endless", "many", "complete", "path"],
)
def test_a_header_larger_than_the_limit_is_refused(sent: bytes) -> None:
    with serving(LIMITS) as address, socket.create_connection(address, LIMIT) as client:
        client.sendall(sent[:900])
        client.sendall(sent[900:])
        assert status_and_code(read_to_end(client)) == (431, "header_too_large")


def test_an_endless_trailer_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with serving(LIMITS) as address, socket.create_connection(address, LIMIT) as client:
        client.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\nx: ")
        with contextlib.suppress(ConnectionError):
            while "larger than 1000 bytes" not in caplog.text:
                client.sendall(b"a" * 1000)


def test_bodies_and_later_requests_do_not_count_as_header() -> None:
    body = b"b" * 100_000
    request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    last = HEAD + b"connection: close\r\n\r\n"
    with serving(LIMITS) as address:
        received = answers(address, request * 3 + last)
    assert received.count(b"HTTP/1.1 200") == 4
    assert received.count(b"\r\n\r\n100000") == 3


@pytest.mark.parametrize(
    ("limits", "sent", "log"),
    [
        ({"header_seconds": SOON}, b"", "header"),
        pytest.param({"header_seconds": SOON}, b"\r\n", "header", marks=pytest.mark.full),
        pytest.param({"header_seconds": SOON}, HEAD + b"x-a: b", "header", marks=pytest.mark.full),
        ({"body_seconds": SOON}, HEAD + b"content-length: 10\r\n\r\n12345", "body"),
        pytest.param(
            {"body_seconds": SOON},
            HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n12",
            "body",
            marks=pytest.mark.full,
        ),
    ],
)
def test_an_unfinished_request_is_closed_in_time(
    limits: dict[str, float], sent: bytes, log: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(replace(LIMITS, **limits)) as address:
        with socket.create_connection(address, LIMIT) as client:
            client.sendall(sent)
            assert closed(client)
        wait_until(lambda: "connections closed: 1" in caplog.text)
    assert f"the {log} of the request did not arrive" in caplog.text


def test_an_answer_that_nobody_reads_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with serving(replace(LIMITS, body_seconds=SOON)) as address, socket.create_connection(address, LIMIT) as client:
        client.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_until(lambda: "did not read its answer" in caplog.text)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(65536):
                received += len(piece)
        assert received < 50_000_000


def test_silent_connections_make_room_for_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    with serving(replace(LIMITS, max_connections=3)) as address, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, LIMIT)) for _ in range(3)]
        for _ in range(2):
            assert b"200 OK" in answers(address, HEAD + b"connection: close\r\n\r\n")
        assert closed(silent[0]), "the oldest makes room"
        wait_until(lambda: "all 3 connections were in use" in caplog.text)


def test_a_new_connection_is_refused_if_all_others_are_being_answered(caplog: pytest.LogCaptureFixture) -> None:
    arrived, resume = threading.Semaphore(0), threading.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        arrived.release()
        await asyncio.to_thread(resume.wait, LIMIT)
        await echo_length(scope, receive, send)

    with serving(replace(LIMITS, max_connections=2), slow) as address, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(socket.create_connection(address, LIMIT)) for _ in range(2)]
        for client in busy:
            client.sendall(HEAD + b"connection: close\r\n\r\n")
            assert arrived.acquire(timeout=LIMIT)
        with socket.create_connection(address, LIMIT) as client:
            assert closed(client)
        wait_until(lambda: "all 2 connections were in use" in caplog.text)
        resume.set()
        assert all(b"200 OK" in read_to_end(client) for client in busy)


def test_what_is_not_http_gets_an_error_in_the_usual_form() -> None:
    with serving(LIMITS) as address:
        assert status_and_code(answers(address, b"\x16\x03\x01\r\n\r\n")) == (400, "bad_request")


def test_open_files_limit_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for files, wanted in ((300, 200), (64, 32), (100_000, 1000), (resource.RLIM_INFINITY, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert connection_limit(Limits(max_connections=1000)) == wanted


def closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
