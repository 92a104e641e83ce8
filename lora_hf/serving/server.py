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

from lora_hf.errors import ConfigError
from lora_hf.serving.app import Door, build_app
from lora_hf.serving.engine import Engine
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.playground import PATH

logger = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.001  # seconds: Python's 5 ms make every answer wait for the thread that computes the next batch


class _Server(uvicorn.Server):
    """uvicorn's, but SIGTERM and SIGINT end it with success once what is in flight is answered."""

    door: Door

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


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's waiting off only where a socket says that it is TCP, and so do those that it accepts: an
    # answer in two packets would come 40 ms later.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ConfigError(f"--host {host} --port {port}: cannot be listened to: {error.strerror or error}") from error
    return listening


def serve(
    engine: Engine,
    adapters: Mapping[str, str],
    metrics: Metrics,
    door: Door,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = 30.0,
    playground: bool = False,
) -> None:
    """Loads `adapters`, folders or hub ids by name, and serves them until SIGTERM or SIGINT.

    Args:
        port: 0 takes a free one.
        grace: seconds that requests in flight have to end in.
        playground: put the page there as well.

    Raises:
        ConfigError: the address cannot be had.
        UserError: an adapter cannot be loaded; the server has ended by then.
    """
    listening = _listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
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
        listening.close()
    if failures:
        raise failures[0]
    logger.info("ended; nothing was left unanswered" if not server.force_exit else "ended at once, as asked")
