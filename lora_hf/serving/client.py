"""The HTTP process's side of the connection to the models. It imports no torch."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lora_hf.core.child_process import ChildProcesses, package_environment
from lora_hf.serving.limits import Limits
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.wire import InternalError, pack, restore_error

logger = logging.getLogger(__name__)

ENGINE = "lora_hf.serving.model_process"
LONG = 1 << 30  # the size of a call that must not keep others waiting


def start_engine(children: ChildProcesses, limits: Limits, **options: Any) -> tuple[socket.socket, Any]:
    """Starts the process of the models, from the main thread: Linux ends a child with the thread that started it.

    Args:
        options: of `Engine`.

    Returns:
        The socket to talk to it, and the process.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", ENGINE, str(theirs.fileno())]
        child = children.start(command, pass_fds=[theirs.fileno()], env=package_environment())
    ours.sendall(pack({"limits": asdict(limits), "options": options}))
    return ours, child


@dataclass(eq=False)
class Pending:
    """A request without an answer; `deadline` is on the clock of `time.monotonic`."""

    future: asyncio.Future[Any]
    deadline: float
    on_piece: Callable[[dict[str, Any]], None] | None = None

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def drop(self) -> None:
        """Ends the request unless it is answered; an error that nobody has asked for is no news then."""
        self.future.cancel()
        if not self.future.cancelled():
            self.future.exception()


class EngineClient(asyncio.Protocol):
    """Sends requests to an engine and receives its answers, all in the event loop's thread.

    Attributes:
        adapters: the adapters served, as `model_process.describe` describes them, sorted by name.
        on_lost: called if the connection ends before `close`.
    """

    def __init__(self, connection: socket.socket, limits: Limits, metrics: Metrics) -> None:
        self.connection, self.limits, self.metrics = connection, limits, metrics
        self.adapters: list[dict[str, Any]] = []
        self.on_lost: Callable[[], None] = lambda: None
        self._numbers = itertools.count()
        self._pending: dict[int, Pending] = {}
        self._unread = b""  # the start of a message
        self._transport: Any = None

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        self.connection.setblocking(False)
        self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self.connection)

    def submit(
        self,
        call: str,
        arguments: dict[str, Any],
        size: int = 0,
        on_piece: Callable[[dict[str, Any]], None] | None = None,
    ) -> Pending:
        """Sends a request for a model; to cancel its future drops it there too.

        Args:
            call: `classify`, `embed` or `generate`.
            arguments: of the engine's method; `deadline` is in seconds from now.
            size: the number of characters to tokenize.
        """
        seconds = min(arguments.get("deadline") or self.limits.deadline, self.limits.deadline)
        return self._send(call, {**arguments, "deadline": seconds}, size, seconds, on_piece)

    async def call(self, call: str, size: int = LONG, **arguments: Any) -> Any:
        """Calls `load`, `remove`, `read_file`, `waiting` or `close`, and waits for the result."""
        return await self._send(call, arguments, size, float("inf"), None).future

    async def close(self, grace: float) -> None:
        """Refuses new requests, spends up to `grace` seconds on the accepted ones, then ends the connection."""
        self.on_lost = lambda: None
        if self._transport is not None and not self._transport.is_closing():
            await self.call("close", grace=grace)
            self.disconnect()

    def disconnect(self) -> None:
        self.on_lost = lambda: None
        if self._transport is not None:
            self._transport.close()

    def _send(self, call: str, arguments: dict[str, Any], size: int, seconds: float, on_piece: Any) -> Pending:
        number = next(self._numbers)
        pending = Pending(asyncio.get_running_loop().create_future(), time.monotonic() + seconds, on_piece)
        if self._transport is None or self._transport.is_closing():
            pending.future.set_exception(InternalError("the model process has ended"))
            return pending
        self._pending[number] = pending
        pending.future.add_done_callback(lambda future: self._forget(number, future))
        self._transport.write(pack({"id": number, "call": call, "arguments": arguments, "size": size}))
        return pending

    def _forget(self, number: int, future: asyncio.Future[Any]) -> None:
        self._pending.pop(number, None)
        if future.cancelled() and not self._transport.is_closing():
            self._transport.write(pack({"cancel": number}))

    # What asyncio calls.

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        for message in map(json.loads, lines):
            if "event" in message:
                self._on_event(message)
                continue
            pending = self._pending.get(message["id"])
            if pending is None or pending.future.done():
                continue
            if "piece" in message:
                if pending.on_piece is not None:
                    pending.on_piece(message["piece"])
            elif "error" in message:
                pending.future.set_exception(restore_error(message["error"]))
            else:
                pending.future.set_result(message["result"])

    def connection_lost(self, exc: Exception | None) -> None:
        for pending in list(self._pending.values()):
            if not pending.future.done():
                pending.future.set_exception(InternalError("the model process has ended"))
        self.on_lost()

    def _on_event(self, message: dict[str, Any]) -> None:
        if message["event"] == "batch":
            self.metrics.on_batch(*message["batch"])
        else:
            self.adapters = message["adapters"]
