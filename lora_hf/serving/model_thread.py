"""The thread that runs the operators of all models.

OpenMP gives each thread that runs large operators a team of its own, with one thread per core, and keeps the team until
that thread ends. Once there are more threads than cores, teams sleep between two operators instead of spinning, and a
step takes twice as long. So the batches of all bases take turns on one thread. Rare and long calls, such as loading a
base, run on a thread of their own, which then ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from lora_hf.lora.precision import flush_denormals

T = TypeVar("T")
Calls: TypeAlias = "SimpleQueue[tuple[Future, Callable[[], Any]] | None]"


class ModelThread:
    """Runs calls one after another. Its thread ends with the last reference to it, and keeps no process alive."""

    def __init__(self) -> None:
        self._calls: Calls = SimpleQueue()
        _start(_run_all, self._calls)
        weakref.finalize(self, self._calls.put, None)

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls `function(*arguments)` on the thread, waits, and returns or raises what it does."""
        future: Future[T] = Future()
        self._calls.put((future, partial(function, *arguments)))
        return future.result()


@flush_denormals()
def _run_all(calls: Calls) -> None:
    while call := calls.get():
        complete(*call)
        del call  # and with it the model


def run_apart(function: Callable[..., T], *arguments: Any) -> T:
    """As `ModelThread.run`, on a new thread that has ended when this returns."""
    future: Future[T] = Future()
    _start(flush_denormals()(complete), future, partial(function, *arguments)).join()
    return future.result()


def complete(future: Future, function: Callable[[], Any]) -> None:
    """Gives a future the result of `function`, or what it raises."""
    try:
        future.set_result(function())
    except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the future
        future.set_exception(error)


def _start(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, name="lora_hf model", daemon=True)
    thread.start()
    return thread
