"""One base and the one thread that runs it. Requests queue here; adapters load and unload between batches."""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
import math
import platform
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.fit import check_tokenizer
from lora_hf.adapters.save_load import load_adapter
from lora_hf.core.errors import AdapterError
from lora_hf.data.tasks.user_texts import honored_tokens
from lora_hf.lora.fingerprint import fingerprint, store_fingerprint
from lora_hf.lora.inject import lora_layers, merge, set_adapter
from lora_hf.lora.multi_adapter import mix_adapters, unload_adapter, use_adapter
from lora_hf.models.load import quantised_layers
from lora_hf.models.tokenizer_identity import tokenizer_identity
from lora_hf.serving.limits import ClosingError, Limits, QueueFullError
from lora_hf.serving.model_thread import ModelThread, complete
from lora_hf.serving.requests import AdapterVersion, Observer, digest_of

logger = logging.getLogger(__name__)

RNG_LOCK = threading.Lock()  # torch's global generator is shared by all threads: hold this to seed it or draw from it
FREE_MEMORY_EVERY = 10.0  # seconds
SHUTTING_DOWN = "the server is shutting down; retry on another one"


class Worker(ABC):
    """Only `thread` touches the base's model, through `model_thread`; others queue requests and calls for it."""

    def __init__(
        self,
        model_thread: ModelThread,
        base: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        observer: Observer,
        merge: bool = False,
    ) -> None:
        self.model_thread, self.base, self.model, self.tokenizer = model_thread, base, model, tokenizer
        self.limits, self.observer = limits, observer
        self.merges = merge  # whether an adapter is merged while it is the only one
        # For all other threads, which hold the lock: `tokenizer` is for the worker's thread alone.
        self.request_tokenizer, self.tokenizer_lock = copy.deepcopy(tokenizer), threading.Lock()
        if tokens := honored_tokens(tokenizer):
            logger.warning("%s: its tokenizer cannot read %s in a text as text", base, ", ".join(tokens))
        # Nothing else changes this base, so its hash is computed once and not for each adapter.
        store_fingerprint(model, fingerprint(model))
        self.tokenizer_identity = tokenizer_identity(tokenizer)
        self.versions: list[AdapterVersion] = []
        self._changed = threading.Condition()  # guards what follows, up to `_stopping`
        self._queue: deque[Any] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.waiting = 0  # rows in the queue
        self._wake_at = 1  # queued requests that wake the thread
        self._running = self._closed = self._stopping = False
        self._rows_per_second = 0.0  # moving average
        self._merged: str | None = None
        self._unmergeable: str | None = None
        self._stacks: dict[Any, Any] = {}
        self._all_plain = True  # whether every adapter is plain LoRA
        self._freed_at = time.monotonic()
        self._prepare()
        self.thread = threading.Thread(target=self._run, name=f"lora_hf {base}", daemon=True)
        self.thread.start()

    # Methods for other threads.

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._queue and not self._running and not self._calls

    def acquire(self, version: AdapterVersion) -> None:
        """Keeps a version on the model until `release`."""
        with self._changed:
            version.pending += 1

    def release(self, version: AdapterVersion) -> None:
        with self._changed:
            version.pending -= 1
            if version.retired and not version.pending:
                self._changed.notify()

    def retire(self, version: AdapterVersion) -> None:
        """Unloads a version as soon as it has no pending requests."""
        with self._changed:
            version.retired = True
            self._changed.notify()

    def submit(self, request: Any) -> None:
        """Queues a request.

        Raises:
            QueueFullError: its rows do not fit into the queue.
            ClosingError: the worker has been stopped.
        """
        with self._changed:
            if self._stopping:
                raise ClosingError(SHUTTING_DOWN)
            if self.waiting + request.waiting_rows > self.limits.max_queue:
                self._drop_abandoned()
            if self.waiting + request.waiting_rows > self.limits.max_queue:
                seconds = self.waiting / self._rows_per_second if self._rows_per_second else 1.0
                raise QueueFullError(
                    f"the queue is full ({self.waiting} of {self.limits.max_queue} rows); retry later",
                    retry_after=min(max(1, round(seconds)), 60),
                )
            self._queue.append(request)
            self.waiting += request.waiting_rows
            if len(self._queue) >= self._wake_at:
                self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Runs `function` on the thread between two batches.

        Raises:
            ClosingError: the worker has been stopped.
        """
        future: Future = Future()
        with self._changed:
            if self._stopping:
                raise ClosingError(SHUTTING_DOWN)
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def load(self, version: AdapterVersion) -> None:
        """Loads a version onto the model, before any request can use it.

        Raises:
            AdapterError: as `load_adapter`, or the folder changed while it was read. The model is unchanged then.
        """
        self.call(lambda: self._load(version)).result()

    def close(self) -> None:
        """Ends the thread once its last version is unloaded, with every accepted request answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after the current batch; waiting requests fail with `ClosingError`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    # What each kind of base does its own way.

    def _prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Runs before the thread starts."""

    @abstractmethod
    def _step(self) -> None:
        """Takes requests from the queue and runs one batch."""

    @property
    def _running_slots(self) -> Container[str | None]:
        """The adapters of rows that have left the queue and wait for further batches."""
        return ()

    def _drop_running(self, error: BaseException | None) -> None:  # noqa: B027 - a classifier has none
        """Drops the rows that nobody waits for; with an `error` all rows, whose requests get it."""

    def _adapters_of_rows(self, slots: Sequence[str | None]) -> AbstractContextManager[Any]:
        """Runs each row of a batch under its own adapter."""
        if self._merged is not None:
            if all(slot == self._merged for slot in slots):
                return nullcontext()
            set_adapter(self.model, None)  # a row needs the bare base; `_merge_lone_adapter` merges again
            self._merged = None
        if len(set(slots)) == 1:
            return use_adapter(self.model, slots[0])  # with fewer steps for each projection than a mix
        if self._all_plain:
            # Stacking all adapters, whichever this batch needs, means that the stack is built only once.
            return mix_adapters(self.model, slots, self._stacks, [version.slot for version in self.versions])
        return mix_adapters(self.model, slots)

    # The thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = False
                self._changed.wait_for(self._has_work)
                self._running = True
                calls = list(self._calls)
                self._calls.clear()
            for function, future in calls:
                self.model_thread.run(complete, future, function)
            self._drop_running(None)
            self._unload_retired()
            self._free_memory()
            if self._stopping or (not self.versions and self._closed):
                break
            if self.merges:
                self._merge_lone_adapter()
            try:
                self._step()
            except Exception as error:  # the thread must survive, and the clients need an answer
                logger.error("%s: a step failed", self.base, exc_info=error)
                self._drop_running(error)
        ending = ClosingError("the server shut down before it answered this request; retry on another one")
        self._drop_running(ending)
        with self._changed:
            requests, calls = list(self._queue), list(self._calls)
            self._queue.clear()
            self._calls.clear()
            self._stopping, self.waiting, self._running = True, 0, False
        for request in requests:
            request.fail(ending)
        for _, future in calls:
            future.set_exception(ClosingError(SHUTTING_DOWN))

    def _free_memory(self) -> None:
        """Returns free memory to the system now and then, and where an adapter was replaced, as both fragment it.

        This takes about 20 ms.
        """
        now = time.monotonic()
        if now - self._freed_at >= FREE_MEMORY_EVERY:
            self._freed_at = now
            _malloc_trim()(0)

    def _has_work(self) -> bool:
        ending = self._stopping or (self._closed and not self.versions)
        return bool(ending or self._calls or self._queue or self._running_slots or self._unused_versions())

    def _unused_versions(self) -> list[AdapterVersion]:
        running = self._running_slots
        return [each for each in self.versions if each.retired and not each.pending and each.slot not in running]

    def _load(self, version: AdapterVersion) -> None:
        check_tokenizer(version.saved.folder, self.tokenizer_identity)
        with RNG_LOCK:  # LoRA A is initialized at random before the file's values are copied over it
            load_adapter(self.model, version.saved.folder, version.slot, own_head=True)
        self._merged = None  # load_adapter activates what it loads, which unmerges
        self.model.eval()
        if digest_of(version.saved.folder) != version.digest:
            unload_adapter(self.model, version.slot)
            raise AdapterError(f"{version.saved.folder}: changed while it was read; retry once it is complete")
        self.versions = [*self.versions, version]
        self._reset_stacks()

    def _unload_retired(self) -> None:
        with self._changed:
            unused = self._unused_versions()
            self.versions = [version for version in self.versions if version not in unused]
        for version in unused:
            unload_adapter(self.model, version.slot)
            self._merged = None if version.slot == self._merged else self._merged
        if unused:
            self._reset_stacks()
            self._freed_at = -math.inf

    def _reset_stacks(self) -> None:
        """Keeps, of what `mix_adapters` caches, the weights of each adapter that is still here."""
        slots = {version.slot for version in self.versions}
        self._stacks = {key: value for key, value in self._stacks.items() if key[1] in slots}
        self._all_plain = all(
            weights.plain for layer in lora_layers(self.model).values() for weights in layer.adapters.values()
        )

    def _merge_lone_adapter(self) -> None:
        if len(self.versions) != 1 or self._merged is not None or self._running_slots or quantised_layers(self.model):
            return
        slot = self.versions[0].slot
        if slot == self._unmergeable:
            return
        set_adapter(self.model, slot)
        try:
            self.model_thread.run(merge, self.model)
            self._merged = slot
        except Exception as error:  # noqa: BLE001 - the adapter works unmerged as well
            logger.info("%s is served unmerged: %s", self.versions[0].name, error)
            set_adapter(self.model, None)
            self._unmergeable = slot

    def _drop_abandoned(self) -> None:
        abandoned = [request for request in self._queue if request.abandoned]
        if abandoned:
            self._queue = deque(request for request in self._queue if request not in abandoned)
            self.waiting = sum(request.waiting_rows for request in self._queue)
            for request in abandoned:
                request.expire()

    def _record(self, rows: Sequence[str], answered: Sequence[str], tokens: int, start: float) -> None:
        """Records a batch that began at `start`, on the clock of `time.perf_counter`."""
        seconds = time.perf_counter() - start
        rate = len(answered) / max(seconds, 1e-6)
        self._rows_per_second = 0.8 * self._rows_per_second + 0.2 * rate if self._rows_per_second else rate
        self.observer.on_batch(self.base, rows, answered, tokens, seconds)


@functools.cache
def _malloc_trim() -> Callable[[int], Any]:
    """glibc's function that returns free memory to the system; elsewhere one that does nothing."""
    if platform.libc_ver()[0] != "glibc":
        return lambda kept: None
    return ctypes.CDLL(None).malloc_trim
