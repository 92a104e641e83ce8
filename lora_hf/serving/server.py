"""The application on a socket: it says that it is not ready while it loads, and ends without losing an answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI

from lora_hf.serving.app import ServerState, build_app
from lora_hf.serving.engine import Engine
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.playground import PATH

logger = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.001  # seconds: Python's 5 ms make every answer wait for the thread that computes the next batch


class _Server(uvicorn.Server):
    """uvicorn's, but SIGTERM and SIGINT end it with success once what is in flight is answered."""

    door: ServerState

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.door.draining = True
        super().handle_exit(sig, frame)


def serve(
    engine: Engine,
    adapters: Mapping[str, str],
    metrics: Metrics,
    door: ServerState,
    listening: socket.socket,
    grace: float = 30.0,
    playground: bool = False,
) -> None:
    """Loads `adapters`, folders or hub ids by name, and serves them until SIGTERM or SIGINT.

    Args:
        listening: from `listen`.
        grace: seconds that requests in flight have to end in.
        playground: put the page there as well.

    Raises:
        UserError: an adapter cannot be loaded; the server has ended by then.
    """
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    failures: list[BaseException] = []

    def load() -> None:
        try:
            for name, place in adapters.items():
                engine.load(name, place)
            door.open = True
            logger.info("ready: %d adapters on %s%s", len(adapters), address, PATH if playground else "")
        except BaseException as error:  # noqa: BLE001 - it is raised again in the main thread
            if not door.draining:
                failures.append(error)
            server.should_exit = True

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=load, name="lora_hf load", daemon=True).start()
        yield
        await asyncio.to_thread(engine.close, grace)

    app = build_app(engine, door, metrics, lifespan, playground)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=max(1, round(grace)), server_header=False
    )
    server = _Server(config)
    server.door = door
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    logger.info("listening on %s, loading %d adapters", address, len(adapters))
    try:
        server.run(sockets=[listening])
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]
    logger.info("ended; nothing was left unanswered" if not server.force_exit else "ended at once, as asked")
