"""One base, and the one thread that runs it: requests wait here, and adapters come and go between two batches."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.save_load import load_adapter
from lora_hf.core.errors import AdapterError
from lora_hf.lora.fingerprint import fingerprint, store_fingerprint
from lora_hf.lora.inject import lora_layers, merge, set_adapter
from lora_hf.lora.multi_adapter import mix_adapters, unload_adapter
from lora_hf.lora.precision import flush_denormals
from lora_hf.models.load import quantised_layers
from lora_hf.serving.limits import ClosingError, Limits, QueueFullError
from lora_hf.serving.requests import Request, Version, digest_of

logger = logging.getLogger(__name__)

# Where several ask at once, those just answered ask again while the next batch is made up: it waits until as many have
# come as did lately, for at most this share of the last batch's time and this many seconds. Begun earlier it would gain
# nothing, because Python runs one thread at a time: the model's stands still at each product while requests are read.
GATHER_SHARE, GATHER = 0.5, 0.05
RANDOM = threading.Lock()  # torch's own generator is one for all threads: whoever seeds it or draws from it holds this


def _call(function: Callable[[], Any], done: Future) -> None:
    try:
        done.set_result(function())
    except Exception as error:  # noqa: BLE001 - whoever waits for it is told
        done.set_exception(error)


class Observer:
    """Is told what the engine does; this one forgets it."""

    def ran(self, base: str, rows: Sequence[Request], tokens: int, seconds: float) -> None:
        """A batch was answered: its rows (a request once for each), and the tokens it read and wrote."""


class Worker(ABC):
    """The base's model belongs to `thread`; every other thread only leaves requests, and calls to make."""

    kind: ClassVar[str]

    def __init__(
        self, base: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits, observer: Observer
    ) -> None:
        self.base, self.model, self.tokenizer, self.limits, self.observer = base, model, tokenizer, limits, observer
        # Nothing else changes this base, so each adapter need not hash all of it anew to know it.
        store_fingerprint(model, fingerprint(model))
        self.versions: list[Version] = []
        self._changed = threading.Condition()
        self._waiting: deque[Any] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._rows = 0  # that wait
        self._crowd = 0.0  # requests that waited at once, lately
        self._enough = 1  # requests that wake the thread
        self._seconds = 0.0  # of the last batch
        self._rate = 0.0  # rows a second, lately
        self._running = self._closed = self._ending = False
        self._merged: str | None = None
        self._unmergeable: str | None = None
        self._stacks: dict[Any, Any] = {}
        self._plain = True
        self.thread = threading.Thread(target=self._run, name=f"lora_hf {base}", daemon=True)
        self.thread.start()

    # What other threads may call.

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        return self._rows

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._changed:
            return not self._waiting and not self._running and not self._calls

    def hold(self, version: Version) -> None:
        """Keeps a version on the model until `release`."""
        with self._changed:
            version.held += 1

    def release(self, version: Version) -> None:
        """Ends a `hold`."""
        with self._changed:
            version.held -= 1
            if version.retired and not version.held:
                self._changed.notify()

    def retire(self, version: Version) -> None:
        """Lets a version go as soon as nothing holds it."""
        with self._changed:
            version.retired = True
            self._changed.notify()

    def submit(self, request: Any) -> None:
        """Leaves a request.

        Raises:
            QueueFullError: its rows would be more than may wait.
            ClosingError: the worker has been stopped.
        """
        with self._changed:
            if self._ending:
                raise ClosingError("the server is shutting down; ask another one")
            if self._rows + request.rows > self.limits.max_queue:
                self._sweep()
            if self._rows + request.rows > self.limits.max_queue:
                seconds = self._rows / self._rate if self._rate else 1.0
                raise QueueFullError(
                    f"{self._rows} rows wait already, and {self.limits.max_queue} may; try again later",
                    retry_after=min(max(1, round(seconds)), 60),
                )
            self._waiting.append(request)
            self._rows += request.rows
            if len(self._waiting) >= self._enough:
                self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Has the thread call `function` between two batches.

        Raises:
            ClosingError: the worker has been stopped.
        """
        done: Future = Future()
        with self._changed:
            if self._ending:
                raise ClosingError("the server is shutting down")
            self._calls.append((function, done))
            self._changed.notify()
        return done

    def load(self, version: Version) -> None:
        """Puts a version on the model, where no request sees it yet.

        Raises:
            AdapterError: as `load_adapter`; also a folder that somebody is writing to. The model is unchanged then.
        """
        self.call(lambda: self._load(version)).result()

    def close(self) -> None:
        """Ends the thread once its last version is gone: nothing that was accepted is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after the batch that it is at; what waits is told so."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    # What a kind of base does its own way; `_take` has the lock.

    @abstractmethod
    def _take(self) -> list[tuple[Any, int]]:
        """The rows of the next batch, each as its request and its place therein."""

    @abstractmethod
    def _answer(self, batch: Sequence[tuple[Any, int]]) -> int:
        """Answers them; returns the tokens that were read and written."""

    def _adapted(self, slots: Sequence[str | None]) -> AbstractContextManager[Any]:
        """The model with each row under its own adapter."""
        if self._merged is not None:
            if all(slot == self._merged for slot in slots):
                return nullcontext()
            set_adapter(self.model, None)  # a row of the bare base: the next batch of the adapter merges it again
            self._merged = None
        if self._plain:
            # One stack of all adapters, so that whichever meet in a batch it is made once.
            return mix_adapters(self.model, slots, self._stacks, [version.slot for version in self.versions])
        return mix_adapters(self.model, slots)

    # The thread.

    @flush_denormals()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = False
                self._changed.wait_for(self._wanted)
                self._running = True
                calls = list(self._calls)
                self._calls.clear()
            for function, done in calls:
                _call(function, done)
            self._let_go()
            if self._ending or (not self.versions and self._closed):
                break
            self._settle()
            batch = self._gather()
            if batch:
                self._measured(batch)
        with self._changed:
            left, calls = list(self._waiting), list(self._calls)
            self._waiting.clear()
            self._calls.clear()
            self._ending, self._rows, self._running = True, 0, False
        for request in left:
            request.fail(ClosingError("the server shut down before it came to this; ask another one"))
        for _, done in calls:
            done.set_exception(ClosingError("the server is shutting down"))

    def _wanted(self) -> bool:
        over = self._ending or (self._closed and not self.versions)
        return bool(over or self._calls or self._waiting or any(self._unheld()))

    def _unheld(self) -> Iterator[Version]:
        return (version for version in self.versions if version.retired and not version.held)

    def _load(self, version: Version) -> None:
        with RANDOM:  # A is drawn before the file's is copied over it
            load_adapter(self.model, version.saved.folder, version.slot, own_head=True)
        self._merged = None  # load_adapter activates what it loads, which unmerges
        self.model.eval()
        if digest_of(version.saved.folder) != version.digest:
            unload_adapter(self.model, version.slot)
            raise AdapterError(f"{version.saved.folder} changed while it was read; load it again when it is complete")
        self.versions = [*self.versions, version]
        self._renew()

    def _let_go(self) -> None:
        with self._changed:
            going = list(self._unheld())
            self.versions = [version for version in self.versions if version not in going]
        for version in going:
            unload_adapter(self.model, version.slot)
            self._merged = None if version.slot == self._merged else self._merged
        if going:
            self._renew()

    def _renew(self) -> None:
        self._stacks = {}
        self._plain = all(
            weights.plain for layer in lora_layers(self.model).values() for weights in layer.adapters.values()
        )

    def _settle(self) -> None:
        """Merges the adapter that is alone on its base."""
        if len(self.versions) != 1 or self._merged is not None or quantised_layers(self.model):
            return
        slot = self.versions[0].slot
        if slot == self._unmergeable:
            return
        set_adapter(self.model, slot)
        try:
            merge(self.model)
            self._merged = slot
        except Exception as error:  # noqa: BLE001 - it can always be answered beside the base
            logger.info("%s is answered beside its base: %s", self.versions[0].name, error)
            set_adapter(self.model, None)
            self._unmergeable = slot

    def _gather(self) -> list[tuple[Any, int]]:
        with self._changed:
            if 0 < len(self._waiting) < int(self._crowd):
                patience = min(GATHER, GATHER_SHARE * self._seconds)
                self._enough = int(self._crowd)
                self._changed.wait_for(lambda: len(self._waiting) >= self._enough or self._ending, patience)
                self._enough = 1
            self._crowd = max(float(len(self._waiting)), 0.9 * self._crowd)
            self._sweep()
            batch = self._take()
            self._rows -= len(batch)
            return batch

    def _sweep(self) -> None:
        """Drops what nobody waits for any more, before it costs a batch."""
        gone = [request for request in self._waiting if request.given_up]
        if gone:
            self._waiting = deque(request for request in self._waiting if not request.given_up)
            self._rows = sum(request.rows for request in self._waiting)
            for request in gone:
                request.expire()

    def _measured(self, batch: list[tuple[Any, int]]) -> None:
        begin = time.perf_counter()
        tokens = self._attempt(batch)
        seconds = time.perf_counter() - begin
        self._seconds = seconds
        rate = len(batch) / max(seconds, 1e-6)
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        self.observer.ran(self.base, [request for request, _ in batch], tokens, seconds)

    def _attempt(self, batch: list[tuple[Any, int]]) -> int:
        """Answers a batch; where that fails each request alone, so that one does not take the others with it."""
        try:
            return self._answer(batch)
        except Exception as error:  # the thread must outlive it, and whoever waits is told
            requests = list({id(request): request for request, _ in batch}.values())
            if len(requests) > 1:
                logger.warning("a batch of %d requests failed, each is tried alone: %r", len(requests), error)
                return sum(self._attempt([row for row in batch if row[0] is request]) for request in requests)
            logger.error("a request of %s failed", requests[0].version.name, exc_info=error)
            requests[0].fail(error)
            return 0
