"""Waits for the engine's answers on behalf of HTTP clients, which may disconnect, and tells them its errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette.responses import StreamingResponse

from lora_hf.core.errors import UserError
from lora_hf.serving.client import EngineClient, Pending
from lora_hf.serving.limits import DeadlinePassedError, RefusalError, error_body

DISCONNECT_CHECK = 0.2  # seconds: asking whether the client is still there costs more than a faster answer
BROKEN_ADAPTER = "broken_adapter"
INTERNAL_ERROR = "the server failed to answer this request; see its log"
EVENTS = {"description": "server-sent events"}  # no type: readers check each event against it, not the whole text
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENTS}}}}
ACCEPTED, END = None, object()  # what the engine sends instead of a first piece, and what follows the last one


async def answer_of(receive: Any, pending: Pending) -> Any:
    """The answer to a request, which is dropped if its client disconnects or its deadline passes."""
    future, disconnect = pending.future, None
    try:
        await asyncio.wait([future], timeout=min(DISCONNECT_CHECK, pending.seconds_left))
        if not future.done():
            disconnect = asyncio.ensure_future(receive())
            await asyncio.wait({future, disconnect}, timeout=pending.seconds_left, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        raise DeadlinePassedError
    finally:
        if disconnect is not None:
            disconnect.cancel()
        pending.drop()


def problem_of(error: Exception) -> dict[str, Any]:
    """The body for an error after the response has begun."""
    if isinstance(error, RefusalError):
        return error_body(error.code, str(error), error.status)
    if isinstance(error, UserError):
        return error_body(BROKEN_ADAPTER, str(error), 500)
    return error_body("internal", INTERNAL_ERROR, 500)


class Texts:
    """The generated texts that one HTTP request asks for, one for each request to the engine; whole or in pieces."""

    def __init__(self, client: EngineClient, stream: bool) -> None:
        self.client, self.stream = client, stream
        self.requests: list[Pending] = []
        self._arrived: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()  # the number of a text, and what came of it
        self._early: list[tuple[int, Any]] = []  # what came before all requests were accepted

    def submit(self, arguments: dict[str, Any], size: int) -> None:
        """Requests another text, as `EngineClient.submit`."""
        put = partial(self._put, len(self.requests))
        pending = self.client.submit("generate", {**arguments, "stream": self.stream}, size, put)
        pending.future.add_done_callback(lambda _: put(END))
        self.requests.append(pending)

    def _put(self, index: int, piece: Any) -> None:
        self._arrived.put_nowait((index, piece))

    async def results(self, receive: Any) -> list[dict[str, Any]]:
        """Waits for all texts, as `answer_of`."""
        try:
            return await asyncio.gather(*(answer_of(receive, request) for request in self.requests))
        finally:
            self._drop()

    async def response(
        self, events: AsyncIterator[bytes], failure: Callable[[dict[str, Any]], bytes]
    ) -> StreamingResponse:
        """Sends `events` made of `pieces`, after which `failure` describes an error.

        Returns once all requests are accepted; else raises the error of one that is not, and drops the others.
        """
        try:
            while len({index for index, _ in self._early}) < len(self.requests):
                self._early.append(await self._next())
        except BaseException:
            self._drop()
            raise
        guarded = self._guarded(events, failure)
        return StreamingResponse(guarded, media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def pieces(self) -> AsyncIterator[tuple[int, dict[str, Any] | None]]:
        """Yields the pieces in the order in which they arrive, and None after the last of each text.

        Raises the first error.
        """
        running = len(self.requests)
        while running:
            index, piece = self._early.pop(0) if self._early else await self._next()
            if piece is END:
                running -= 1
                yield index, None
            elif piece is not ACCEPTED:
                yield index, piece

    async def _next(self) -> tuple[int, Any]:
        try:
            left = min(each.seconds_left for each in self.requests)
            index, piece = await asyncio.wait_for(self._arrived.get(), left)
        except asyncio.TimeoutError:
            raise DeadlinePassedError from None
        if piece is END:
            self.requests[index].future.result()
        return index, piece

    async def _guarded(
        self, events: AsyncIterator[bytes], failure: Callable[[dict[str, Any]], bytes]
    ) -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except Exception as error:  # noqa: BLE001 - the response has begun
            yield failure(problem_of(error))
        finally:
            self._drop()  # stops generating if the client is gone

    def _drop(self) -> None:
        for request in self.requests:
            request.drop()
