"""The HTTP server: it reports that it is not ready while it loads, and stops without losing an answer.

Importing this module does not import torch, so that `listen` can fail at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import uvicorn

from lora_hf.core.errors import ConfigError
from lora_hf.serving.connections import ConnectionGuard

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lora_hf.serving.app import ServerState
    from lora_hf.serving.engine import Engine
    from lora_hf.serving.metrics import Metrics

logger = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.001  # seconds; at Python's default of 5 ms every answer waits for the thread of the next batch


class _Server(uvicorn.Server):
    """On SIGTERM or SIGINT, exits with success once the requests in flight are answered."""

    state: ServerState
    guard: ConnectionGuard

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # uvicorn calls this ten times a second
            self.guard.sweep(self.server_state.connections)
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.state.draining = True
        super().handle_exit(sig, frame)


def serve(
    engine: Engine,
    adapters: Mapping[str, str],
    metrics: Metrics,
    state: ServerState,
    listener: socket.socket,
    grace: float = 30.0,
    playground: bool = False,
) -> None:
    """Loads `adapters`, folders or hub ids by name, and serves them until SIGTERM or SIGINT.

    Args:
        listener: from `listen`.
        grace: seconds for accepted requests to finish after the signal.

    Raises:
        UserError: an adapter cannot be loaded; the server has stopped by then.
    """
    from lora_hf.serving.app import PLAYGROUND, build_app

    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    failures: list[BaseException] = []

    def load() -> None:
        try:
            for name, adapter in adapters.items():
                engine.load(name, adapter)
            state.ready = True
            logger.info("ready: %d adapters on %s%s", len(adapters), url, PLAYGROUND if playground else "")
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            if not state.draining:
                failures.append(error)
            server.should_exit = True

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=load, name="lora_hf load", daemon=True).start()
        yield
        await asyncio.to_thread(engine.close, grace)

    app = build_app(engine, state, metrics, lifespan, playground)
    guard = ConnectionGuard(engine.limits)
    server = _Server(
        uvicorn.Config(
            app,
            http=guard.protocol,  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=max(1, round(grace)),
            server_header=False,
        )
    )
    server.state, server.guard = state, guard
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    logger.info("listening on %s, loading %d adapters", url, len(adapters))
    try:
        server.run(sockets=[listener])
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]
    logger.info(
        "stopped at once, as requested" if server.force_exit else "stopped; every accepted request was answered"
    )


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket; port 0 picks a free port.

    Raises:
        ConfigError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle's algorithm only where the protocol is given as TCP, which accepted sockets inherit. With
    # Nagle's algorithm an answer in two packets takes 40 ms longer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason += "; choose another port, or port=0 for a free one"
        raise ConfigError(f"host={host} port={port}: cannot listen: {reason}") from error
    return listener
