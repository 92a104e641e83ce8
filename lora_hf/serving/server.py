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
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import uvicorn

from lora_hf.core.child_process import ChildProcesses
from lora_hf.core.errors import ConfigError, UserError
from lora_hf.serving.connections import ConnectionGuard

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lora_hf.serving.app import ServerState
    from lora_hf.serving.limits import Limits

logger = logging.getLogger(__name__)


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
    adapters: Mapping[str, str],
    limits: Limits,
    state: ServerState,
    listener: socket.socket,
    grace: float = 30.0,
    **options: Any,
) -> None:
    """Loads `adapters`, folders or hub ids by name, and serves them until SIGTERM or SIGINT.

    Args:
        listener: from `listen`.
        grace: seconds for accepted requests to finish after the signal.
        options: of `Engine`.

    Raises:
        UserError: an adapter cannot be loaded, or the model's process ended; the server has stopped by then.
    """
    from lora_hf.serving.app import build_app
    from lora_hf.serving.client import EngineClient, start_engine
    from lora_hf.serving.metrics import Metrics

    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    failures: list[BaseException] = []

    async def load() -> None:
        try:
            for name, adapter in adapters.items():
                await client.call("load", name=name, adapter=adapter)
            state.ready = True
            logger.info("ready: %d adapters on %s", len(adapters), url)
        except Exception as error:  # noqa: BLE001 - raised again after the server has stopped
            if not state.draining:
                failures.append(error)
            server.should_exit = True

    def lost() -> None:
        code = child.wait()
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        failures.insert(0, UserError(f"the model process has ended ({reason}); it may need more memory"))
        server.should_exit = True

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await client.connect()
        client.on_lost = lost
        loading = asyncio.create_task(load())
        yield
        await client.close(grace)
        loading.cancel()

    with ChildProcesses() as children:
        connection, child = start_engine(children, limits, **options)
        client = EngineClient(connection, limits, Metrics())
        guard = ConnectionGuard(limits)
        server = _Server(
            uvicorn.Config(
                build_app(client, state, lifespan),
                http=guard.protocol,  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=max(1, round(grace)),
                server_header=False,
            )
        )
        server.state, server.guard = state, guard
        logger.info("listening on %s, loading %d adapters", url, len(adapters))
        server.run(sockets=[listener])
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
