"""Waits for the engine's answers on behalf of HTTP clients, which may disconnect, and tells them its errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from lora_hf.core.errors import UserError
from lora_hf.serving.client import Pending
from lora_hf.serving.limits import DeadlinePassedError, RefusalError, error_body

DISCONNECT_CHECK = 0.2  # seconds: asking whether the client is still there costs more than a faster answer
BROKEN_ADAPTER = "broken_adapter"
INTERNAL_ERROR = "the server failed to answer this request; see its log"
EVENTS = {"description": "server-sent events"}  # no type: readers check each event against it, not the whole text
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENTS}}}}


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


class Stream:
    """The pieces of one or several texts, in the order in which they arrive."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, dict[str, Any] | None]] = asyncio.Queue()
        self._accepted: set[int] = set()
        self._changed = asyncio.Event()

    def source(self, index: int) -> Callable[[dict[str, Any] | None], None]:
        """What the client of the engine calls with each piece of a text; None says that the request was accepted."""

        def put(piece: dict[str, Any] | None) -> None:
            self._accepted.add(index)
            self._changed.set()
            if piece is not None:
                self._queue.put_nowait((index, piece))

        return put

    def watch(self, requests: Sequence[Pending]) -> None:
        """Ends the stream of each request with its future."""

        def end(index: int) -> None:
            self._changed.set()
            self._queue.put_nowait((index, None))

        for index, request in enumerate(requests):
            request.future.add_done_callback(lambda _, index=index: end(index))

    async def accepted(self, requests: Sequence[Pending]) -> None:
        """Returns once all requests are accepted; else raises the error of one that is not, and drops the others."""
        try:
            await self._all_accepted(requests)
        except BaseException:
            for request in requests:
                request.drop()
            raise

    async def _all_accepted(self, requests: Sequence[Pending]) -> None:
        while True:
            for index, request in enumerate(requests):
                if index not in self._accepted and request.future.done():
                    request.future.result()
                    self._accepted.add(index)
            if len(self._accepted) == len(requests):
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), min(each.seconds_left for each in requests))
            except asyncio.TimeoutError:
                raise DeadlinePassedError from None

    async def pieces(self, requests: Sequence[Pending]) -> AsyncIterator[tuple[int, dict[str, Any] | None]]:
        """Yields the pieces of the texts, and None after the last of each, or raises the first error."""
        running = len(requests)
        while running:
            try:
                left = min(each.seconds_left for each in requests)
                index, piece = await asyncio.wait_for(self._queue.get(), left)
            except asyncio.TimeoutError:
                raise DeadlinePassedError from None
            if piece is None:
                requests[index].future.result()
                running -= 1
            yield index, piece
