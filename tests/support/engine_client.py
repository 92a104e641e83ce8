"""A client of an engine in this process: a thread takes the place of the models' process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import AsyncIterator

from fastapi import FastAPI

from lora_hf.serving.app import ServerState, build_app
from lora_hf.serving.client import EngineClient
from lora_hf.serving.engine import Engine
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.model_process import EngineConnection
from lora_hf.serving.wire import receive


class ThreadClient(EngineClient):
    """Connects anew each time that an application starts."""

    def __init__(self, engine: Engine, metrics: Metrics | None = None) -> None:
        super().__init__(socket.socket(), engine.limits, metrics or Metrics())
        self.connection.close()
        self.engine = engine

    async def connect(self) -> None:
        self.connection, theirs = socket.socketpair()
        threading.Thread(target=_serve, args=(self.engine, theirs), daemon=True).start()
        await super().connect()
        await self.call("waiting", size=0)  # the list of adapters arrives before


def app_of(client: EngineClient, state: ServerState) -> FastAPI:
    """The application, which connects to the engine when it starts."""

    @contextlib.asynccontextmanager
    async def connected(_: FastAPI) -> AsyncIterator[None]:
        await client.connect()
        yield
        client.disconnect()

    return build_app(client, state, connected)


def _serve(engine: Engine, connection: socket.socket) -> None:
    with connection:
        EngineConnection(connection).serve(engine, receive(connection))
