"""Adapters by name, each on a base that it shares with others, answering requests from any thread."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_hf.adapters.resolve import SavedModel, find_saved_model
from lora_hf.adapters.save_load import load_saved_model
from lora_hf.core.config.fields import build_section
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import AdapterError, DataError, did_you_mean
from lora_hf.data.tasks.generation import TextGeneration
from lora_hf.inference.classify import model_inputs
from lora_hf.inference.generate import prompt_limit, resolve_decoding, text_limit
from lora_hf.lora.unpadding import enable_unpadding
from lora_hf.models.align import check_tokens
from lora_hf.models.load import dequantise
from lora_hf.serving.classify_worker import ClassifyWorker
from lora_hf.serving.generate_worker import GenerateWorker
from lora_hf.serving.limits import (
    BadInputError,
    ClosingError,
    DeadlinePassedError,
    Limits,
    TooLargeError,
    UnknownAdapterError,
    WrongKindError,
)
from lora_hf.serving.requests import (
    AdapterVersion,
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
    Request,
    digest_of,
)
from lora_hf.serving.worker import RNG_LOCK, SHUTTING_DOWN, Observer, Worker

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
CHUNK = 16_384  # characters to tokenize at a time, so that a long request does not block short ones

Text = str | Sequence[str]  # one text, or the texts of a task that reads two


class Engine:
    """Serves many adapters of any number of bases from one process, with each base in memory once.

    Every method may be called from any thread. The version of an adapter that accepts a request answers it, even if the
    adapter is replaced meanwhile; the result names that version.

    Args:
        precision: of classification bases, as in a config; default: that of the run of a base's first adapter.
            Generation always runs in fp32, as `Generator` does.
        model: where the base of all adapters is now, a folder or a hub id; by default where each adapter says.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        precision: str | None = None,
        observer: Observer | None = None,
        model: str | None = None,
    ) -> None:
        self.limits, self.precision, self._model = limits or Limits(), precision, model
        self._observer = observer or Observer()
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._workers: dict[Any, Worker] = {}
        self._current: dict[str, tuple[AdapterVersion, Worker]] = {}
        self._slot_numbers = itertools.count()
        self._closing = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Adapters.

    def load(
        self, name: str, adapter: str | Path, revision: str | None = None, new_base: bool = True
    ) -> AdapterVersion:
        """Serves an adapter as `name`, replacing any other of that name once it is loaded.

        Args:
            adapter: a folder or hub id.
            revision: a branch, tag or commit on the hub.
            new_base: whether a base may be loaded that no other adapter uses yet.

        Raises:
            AdapterError: an invalid name, a damaged adapter, a whole model, or another base without `new_base`.
            ModelError, HubError: as `load_saved_model`.
            ClosingError: the engine is shutting down.
        """
        if not NAME.fullmatch(name):
            raise AdapterError(
                f"{name!r} cannot name an adapter: expected at most 64 letters, digits, '-', '_' and '.', the first "
                "a letter or digit"
            )
        saved = find_saved_model(adapter, revision, self._model)
        if saved.is_full_model:
            raise AdapterError(f"{adapter}: expected an adapter, found a whole model, which cannot share its base")
        with self._loading:
            version = AdapterVersion(name, f"version_{next(self._slot_numbers)}", digest_of(saved.folder), saved)
            key = _base_key(saved)
            worker = self._workers.get(key)
            if worker is None:
                if not new_base:
                    raise AdapterError(f"{adapter}: its base {saved.model.name} is not served here")
                worker = self._load_base(saved)
            try:
                worker.load(version)
            except BaseException:
                if key not in self._workers:
                    worker.stop()
                raise
            with self._lock:
                if self._closing:
                    worker.stop()
                    raise ClosingError("the engine is shutting down")
                self._workers[key] = worker
                replaced = self._current.get(name)
                self._current[name] = (version, worker)
            if replaced is not None:
                self._retire(*replaced)
        return version

    def remove(self, name: str) -> AdapterVersion:
        """Stops serving `name`, but answers what it has accepted. A base is freed with its last adapter.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        with self._loading:
            with self._lock:
                version, worker = self._find(name)
                del self._current[name]
            self._retire(version, worker)
        return version

    def adapters(self) -> list[AdapterVersion]:
        """The adapters served now, sorted by name."""
        with self._lock:
            return [self._current[name][0] for name in sorted(self._current)]

    def waiting(self) -> dict[str, int]:
        """The number of waiting rows by base."""
        with self._lock:
            return {worker.base: worker.waiting for worker in self._workers.values()}

    # Requests.

    def classify(self, adapter: str, inputs: Sequence[Text], deadline: float | None = None) -> ClassifyResult:
        """Submits a request and waits for its result; see `submit_classify` and `wait`."""
        return self.wait(self.submit_classify(adapter, inputs, deadline))

    def generate(self, adapter: str, prompt: str, deadline: float | None = None, **decoding: Any) -> GenerateResult:
        """Submits a request and waits for its result; see `submit_generate` and `wait`."""
        return self.wait(self.submit_generate(adapter, prompt, decoding, deadline))

    def submit_classify(self, adapter: str, inputs: Sequence[Text], deadline: float | None = None) -> Request:
        """Tokenizes in this thread and queues a request, whose cancellable `future` gets a `ClassifyResult`.

        Args:
            inputs: texts; two each for a task of sentence pairs.
            deadline: seconds from now; the limits set the maximum and the default.

        Raises:
            UnknownAdapterError, WrongKindError, BadInputError, TooLargeError: the request is invalid.
            QueueFullError, ClosingError: the server cannot take it now.
        """
        with self._acquired(adapter, ClassifyWorker.verb) as (version, worker):
            columns = self._columns(version, inputs)
            encoded, truncated = self._encode(version, worker, columns)
            entries = model_inputs(encoded, worker.request_tokenizer)
            request = ClassifyRequest(
                version, self._deadline(deadline), rows=columns, encoded=encoded, inputs=entries, truncated=truncated
            )
            return self._submit(request, worker)

    def submit_generate(
        self,
        adapter: str,
        prompt: str,
        decoding: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        bare: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Request:
        """Tokenizes in this thread and queues a request, whose cancellable `future` gets a `GenerateResult`.

        Args:
            decoding: fields of `GenerateConfig` that override those of the adapter's run. `temperature`, `top_p` or
                `top_k` turn on sampling.
            deadline: as for `submit_classify`.
            bare: generate with the base alone, without the adapter.
            on_text: called with each new piece of text in the engine's thread; never under beam search.

        Raises:
            RefusalError: as `submit_classify`.
        """
        with self._acquired(adapter, GenerateWorker.verb) as (version, worker):
            self._check_text(prompt, "prompt")
            settings = self._settings(version.saved, decoding or {}, worker.model)
            task: TextGeneration = version.saved.task  # type: ignore[assignment]
            limit = prompt_limit(worker.model, text_limit(worker.model, version.saved.max_length), settings)
            try:
                context = task.context(prompt)
                with worker.tokenizer_lock:
                    tokens = task.prompts([context], worker.request_tokenizer, limit)[0]
                    check_tokens(task, [tokens], worker.request_tokenizer, worker.model)
            except DataError as error:
                raise BadInputError(str(error)) from error
            request = GenerateRequest(version, self._deadline(deadline), Future(), tokens, settings, bare, on_text)
            return self._submit(request, worker)

    def wait(self, request: Request) -> Any:
        """Returns the result of a submitted request.

        Raises:
            DeadlinePassedError: it was not ready in time; the request is dropped.
        """
        try:
            return request.future.result(max(0.0, request.deadline - time.monotonic()))
        except FutureTimeout:
            request.future.cancel()
            raise DeadlinePassedError from None

    def close(self, grace: float = 30.0) -> None:
        """Refuses new requests, spends up to `grace` seconds on the accepted ones, then ends the threads."""
        with self._lock:
            self._closing = True
            workers = list(self._workers.values())
        end = time.monotonic() + grace
        while not all(worker.idle for worker in workers) and time.monotonic() < end:
            time.sleep(0.01)
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.thread.join(timeout=max(0.0, end - time.monotonic()) + 1)

    def _find(self, name: str) -> tuple[AdapterVersion, Worker]:
        if name not in self._current:
            served = ", ".join(sorted(self._current)) or "none"
            raise UnknownAdapterError(f"no adapter {name!r}{did_you_mean(name, self._current)}; served: {served}")
        return self._current[name]

    @contextmanager
    def _acquired(self, name: str, verb: str) -> Iterator[tuple[AdapterVersion, Worker]]:
        """The current version of an adapter, kept on its base until its request is answered or refused."""
        with self._lock:
            if self._closing:
                raise ClosingError(SHUTTING_DOWN)
            version, worker = self._find(name)
            if version.verb != verb:
                other = "generate" if version.verb == GenerateWorker.verb else "classify"
                raise WrongKindError(f"{name} was trained for {version.saved.task.name}; use {other} instead")
            worker.acquire(version)
        try:
            yield version, worker
        except BaseException:
            worker.release(version)
            raise

    def _submit(self, request: Any, worker: Worker) -> Request:
        worker.submit(request)
        request.future.add_done_callback(lambda _: worker.release(request.version))
        return request

    def _deadline(self, seconds: float | None) -> float:
        return time.monotonic() + min(seconds or self.limits.deadline, self.limits.deadline)

    def _columns(self, version: AdapterVersion, inputs: Sequence[Text]) -> dict[str, list[str]]:
        names = version.saved.task.text_columns
        if isinstance(inputs, str) or not inputs:
            raise BadInputError("inputs: expected a list with at least one text")
        if len(inputs) > self.limits.max_inputs:
            raise TooLargeError(
                f"inputs: expected at most {self.limits.max_inputs}, found {len(inputs)}; split the request"
            )
        rows: list[list[str]] = [[row] if isinstance(row, str) else list(row) for row in inputs]
        for index, row in enumerate(rows):
            if len(row) != len(names):
                expected = "one text" if len(names) == 1 else f"{len(names)} texts"
                raise BadInputError(
                    f"inputs[{index}]: {version.name} reads {expected} ({', '.join(names)}), found {len(row)}"
                )
            for text in row:
                self._check_text(text, f"inputs[{index}]")
        return {name: [row[column] for row in rows] for column, name in enumerate(names)}

    def _check_text(self, text: str, field: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise BadInputError(f"{field}: expected a text, found an empty one")
        if len(text) > self.limits.max_characters:
            raise TooLargeError(f"{field}: expected at most {self.limits.max_characters} characters, found {len(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(f"{field}: character {error.start} is an unpaired surrogate") from error

    def _encode(
        self, version: AdapterVersion, worker: Worker, columns: Mapping[str, list[str]]
    ) -> tuple[dict[str, list], list[int]]:
        """What the task encodes of the rows, and the indices of the rows cut to the adapter's `max_length`."""
        task, rows = version.saved.task, len(next(iter(columns.values())))
        lengths = [sum(len(texts[row]) for texts in columns.values()) for row in range(rows)]
        limit = min(version.saved.max_length, worker.request_tokenizer.model_max_length)
        whole: dict[str, list] = {}
        truncated: list[int] = []
        start = 0
        while start < rows:
            stop = start + 1
            while stop < rows and sum(lengths[start : stop + 1]) <= CHUNK:
                stop += 1
            with worker.tokenizer_lock:
                chunk = {name: texts[start:stop] for name, texts in columns.items()}
                try:
                    encoded, cut = task.encode_and_flag(chunk, worker.request_tokenizer, limit)
                except DataError as error:
                    raise BadInputError(str(error)) from error
            for name, values in encoded.items():
                whole.setdefault(name, []).extend(values)
            truncated += [start + row for row, lost in enumerate(cut) if lost]
            start = stop
        with worker.tokenizer_lock:
            try:
                check_tokens(task, whole["input_ids"], worker.request_tokenizer, worker.model)
            except DataError as error:
                raise BadInputError(str(error)) from error
        return whole, truncated

    def _settings(self, saved: SavedModel, overrides: Mapping[str, Any], model: PreTrainedModel) -> GenerateConfig:
        values = {key: value for key, value in overrides.items() if value is not None}
        if values.keys() & {"temperature", "top_p", "top_k"}:
            values = {"num_beams": 1, **values, "do_sample": True}
        _, problems = build_section(GenerateConfig, values)
        if problems:
            raise BadInputError("; ".join(problems))
        limits = self.limits
        settings = resolve_decoding(saved.generate.override(**values, batch_size=1), model)
        if "max_new_tokens" not in values:
            settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, limits.max_new_tokens))
        for key, limit in (("max_new_tokens", limits.max_new_tokens), ("num_beams", limits.max_beams)):
            if getattr(settings, key) > limit:
                raise TooLargeError(f"{key}: expected at most {limit}, found {getattr(settings, key)}")
        if settings.do_sample and settings.num_beams > 1:
            raise BadInputError(f"num_beams: expected 1 with sampling, found {settings.num_beams}")
        return settings if settings.do_sample else replace(settings, seed=0, temperature=1.0, top_p=1.0, top_k=0)

    def _load_base(self, saved: SavedModel) -> Worker:
        generates = saved.task.verb == GenerateWorker.verb
        with RNG_LOCK:
            precision = "fp32" if generates else self.precision or saved.model.precision
            model, tokenizer = load_saved_model(saved, precision, adapted=False)
        if generates:
            dequantise(model)
        else:
            enable_unpadding(model)
        worker = GenerateWorker if generates else ClassifyWorker
        return worker(saved.model.name, model, tokenizer, self.limits, self._observer)

    def _retire(self, version: AdapterVersion, worker: Worker) -> None:
        """Unloads a version that is not served anymore, and the base with its last adapter."""
        worker.retire(version)
        with self._lock:
            if not any(other is worker for _, other in self._current.values()):
                self._workers = {key: each for key, each in self._workers.items() if each is not worker}
                worker.close()


def _base_key(saved: SavedModel) -> tuple[Any, ...]:
    """What two adapters must have in common to share a base."""
    model = replace(saved.model, precision="auto", dropout=None)
    return model, saved.task.model_kind, saved.seed if model.init == "random" else 0
