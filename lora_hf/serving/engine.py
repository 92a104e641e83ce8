"""Adapters by name, each on the base it shares with others: what a program asks for answers, from any thread."""

from __future__ import annotations

import copy
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

from transformers import PreTrainedTokenizerBase

from lora_hf.adapters.resolve import SavedModel, find_saved_model
from lora_hf.adapters.save_load import load_saved_model
from lora_hf.core.config.fields import build_section
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import AdapterError, DataError, did_you_mean
from lora_hf.data.tasks.generation import TextGeneration
from lora_hf.lora.unpadding import enable_unpadding
from lora_hf.models.load import dequantise
from lora_hf.serving.classifying import Classifier
from lora_hf.serving.limits import (
    BadInputError,
    ClosingError,
    Limits,
    TooLargeError,
    UnknownAdapterError,
    WrongKindError,
)
from lora_hf.serving.requests import Classified, Classify, Request, Version, Write, Written, digest_of, late
from lora_hf.serving.worker import RANDOM, Observer, Worker
from lora_hf.serving.writing import Writer

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
CHUNK = 16_384  # characters that are tokenised at a time, so that a long request does not keep short ones waiting

Text = str | Sequence[str]  # a text, or the texts of a task that reads two


class Base:
    """A base with its worker, and the tokenizer of the threads that ask: the worker's own is its alone."""

    def __init__(self, worker: Worker, tokenizer: PreTrainedTokenizerBase) -> None:
        self.worker, self.tokenizer, self.lock = worker, tokenizer, threading.Lock()


class Engine:
    """Serves many adapters of any number of bases from one process; each base is in memory once.

    Every method may be called from any thread. A request is answered by the adapter as it was when the request was
    accepted, also where it is replaced meanwhile, and the answer names that version.

    Args:
        limits: of what is taken on.
        precision: of the bases of classifiers, as in a config; without it that of the first adapter's run. Texts are
            written in fp32, as `Generator` does.
    """

    def __init__(
        self, limits: Limits | None = None, precision: str | None = None, observer: Observer | None = None
    ) -> None:
        self.limits, self.precision = limits or Limits(), precision
        self._observer = observer or Observer()
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._bases: dict[Any, Base] = {}
        self._current: dict[str, tuple[Version, Base]] = {}
        self._numbers = itertools.count()
        self._closing = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Adapters.

    def load(self, name: str, place: str | Path, revision: str | None = None, new_base: bool = True) -> Version:
        """Serves the adapter in `rank`, a folder or a hub id, as `name`; one of that name is replaced.

        The old one answers until the new one is whole, and stays where the new one cannot be loaded.

        Args:
            new_base: whether a base may be loaded that no other adapter is served on.

        Raises:
            AdapterError: not a name, a damaged adapter, a whole model, or, without `new_base`, one of another base.
            ModelError, HubError: as `load_saved_model`.
            ClosingError: the engine shuts down.
        """
        if not NAME.fullmatch(name):
            raise AdapterError(
                f"{name!r} cannot name an adapter: expected at most 64 letters, digits, '-', '_' and '.', the first "
                "a letter or a digit"
            )
        saved = find_saved_model(place, revision)
        if saved.whole:
            raise AdapterError(f"{place}: a whole model; expected an adapter, which shares its base with others")
        with self._loading:
            version = Version(name, f"version_{next(self._numbers)}", digest_of(saved.folder), saved)
            key = _key(saved)
            base = self._bases.get(key)
            if base is None:
                if not new_base:
                    raise AdapterError(f"{place}: its base {saved.model.name} is not one of those served here")
                base = self._load_base(saved)
            try:
                base.worker.load(version)
            except BaseException:
                if key not in self._bases:
                    base.worker.stop()
                raise
            with self._lock:
                if self._closing:
                    base.worker.stop()
                    raise ClosingError("the engine is shutting down")
                self._bases[key] = base
                old = self._current.get(name)
                self._current[name] = (version, base)
            self._retire(old)
        return version

    def remove(self, name: str) -> Version:
        """Serves `name` no more; what was accepted for it is still answered. A base without adapters is let go.

        Raises:
            UnknownAdapterError: there is none.
        """
        with self._loading:
            with self._lock:
                found = self._find(name)
                del self._current[name]
            self._retire(found)
        return found[0]

    def adapters(self) -> list[Version]:
        """What is served now, by name."""
        with self._lock:
            return [self._current[name][0] for name in sorted(self._current)]

    def waiting(self) -> dict[str, int]:
        """How many rows wait, by the name of their base."""
        with self._lock:
            bases = list(self._bases.values())
        return {base.worker.base: base.worker.waiting for base in bases}

    # Answers.

    def classify(self, adapter: str, inputs: Sequence[Text], deadline: float | None = None) -> Classified:
        """`submit_classify`, and its answer.

        Raises:
            DeadlinePassedError: the answer was not there in time; and as `submit_classify`.
        """
        return self.wait(self.submit_classify(adapter, inputs, deadline))

    def generate(self, adapter: str, prompt: str, deadline: float | None = None, **decoding: Any) -> Written:
        """`submit_generate`, and its text.

        Raises:
            DeadlinePassedError: the text was not there in time; and as `submit_generate`.
        """
        return self.wait(self.submit_generate(adapter, prompt, decoding, deadline))

    def submit_classify(self, adapter: str, inputs: Sequence[Text], deadline: float | None = None) -> Request:
        """Tokenises in this thread and queues; the request's `future` becomes a `Classified`, and may be cancelled.

        Args:
            inputs: texts; for a task of sentence pairs two texts each.
            deadline: seconds from now; at most, and without it, that of the limits.

        Raises:
            UnknownAdapterError, WrongKindError, BadInputError, TooLargeError: a request that cannot be answered.
            QueueFullError, ClosingError: one that cannot be answered now.
        """
        with self._held(adapter, Classifier.kind) as (version, base):
            columns = self._columns(version, inputs)
            request = Classify(version, self._deadline(deadline), inputs=self._encode(version, base, columns))
            return self._submit(request, base.worker)

    def submit_generate(
        self,
        adapter: str,
        prompt: str,
        decoding: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        bare: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Request:
        """Tokenises in this thread and queues; the request's `future` becomes a `Written`, and may be cancelled.

        Args:
            decoding: what differs from the decoding of the adapter's run, by the names of `GenerateConfig`. A
                temperature, `top_p` or `top_k` samples.
            bare: let the base answer without the adapter.
            on_text: called with each piece of the text in the engine's thread; beams have none before the end.

        Raises:
            UnknownAdapterError, WrongKindError, BadInputError, TooLargeError: a request that cannot be answered.
            QueueFullError, ClosingError: one that cannot be answered now.
        """
        with self._held(adapter, Writer.kind) as (version, base):
            self._check_text(prompt, "prompt")
            settings = self._settings(version.saved, decoding or {})
            task: TextGeneration = version.saved.task  # type: ignore[assignment]
            positions = getattr(base.worker.model.config, "max_position_embeddings", version.saved.max_length)
            try:
                context = task.context(prompt)
                with base.lock:
                    tokens = task.prompts([context], base.tokenizer, positions - settings.max_new_tokens)[0]
            except DataError as error:
                raise BadInputError(str(error)) from error
            request = Write(version, self._deadline(deadline), Future(), tokens, settings, bare, on_text)
            return self._submit(request, base.worker)

    def wait(self, request: Request) -> Any:
        """The answer of a request that was submitted.

        Raises:
            DeadlinePassedError: it was not there in time; the request is dropped.
        """
        try:
            return request.future.result(max(0.0, request.deadline - time.monotonic()))
        except FutureTimeout:
            request.future.cancel()
            raise late() from None

    def close(self, grace: float = 30.0) -> None:
        """Takes on nothing more, answers for up to `grace` seconds what it has taken on, and ends its threads."""
        with self._lock:
            self._closing = True
            workers = [base.worker for base in self._bases.values()]
        end = time.monotonic() + grace
        while not all(worker.idle for worker in workers) and time.monotonic() < end:
            time.sleep(0.01)
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.thread.join(timeout=max(0.0, end - time.monotonic()) + 1)

    # Inside.

    def _find(self, name: str) -> tuple[Version, Base]:
        if name not in self._current:
            known = ", ".join(sorted(self._current)) or "none"
            raise UnknownAdapterError(
                f"no adapter {name!r} is served{did_you_mean(name, self._current)}; there is: {known}"
            )
        return self._current[name]

    @contextmanager
    def _held(self, name: str, kind: str) -> Iterator[tuple[Version, Base]]:
        """The current version of an adapter, which stays on its base until its request is answered, or refused."""
        with self._lock:
            if self._closing:
                raise ClosingError("the server is shutting down; ask another one")
            version, base = self._find(name)
            if version.kind != kind:
                verb = "generate" if version.kind == Writer.kind else "classify"
                raise WrongKindError(f"{name} was trained for {version.saved.task.name}; use {verb} instead")
            base.worker.hold(version)
        try:
            yield version, base
        except BaseException:
            base.worker.release(version)
            raise

    def _submit(self, request: Any, worker: Worker) -> Request:
        worker.submit(request)
        request.future.add_done_callback(lambda _: worker.release(request.version))
        return request

    def _deadline(self, seconds: float | None) -> float:
        return time.monotonic() + min(seconds or self.limits.deadline, self.limits.deadline)

    def _columns(self, version: Version, inputs: Sequence[Text]) -> dict[str, list[str]]:
        names = version.saved.task.text_columns
        if isinstance(inputs, str) or not inputs:
            raise BadInputError("inputs: expected a list of texts with at least one in it")
        if len(inputs) > self.limits.max_inputs:
            raise TooLargeError(
                f"inputs: expected at most {self.limits.max_inputs}, found {len(inputs)}; ask several times"
            )
        rows: list[list[str]] = [[row] if isinstance(row, str) else list(row) for row in inputs]
        for place, row in enumerate(rows):
            if len(row) != len(names):
                wanted = "one text" if len(names) == 1 else f"{len(names)} texts"
                raise BadInputError(
                    f"inputs[{place}]: {version.name} reads {wanted} ({', '.join(names)}), found {len(row)}"
                )
            for text in row:
                self._check_text(text, f"inputs[{place}]")
        return {name: [row[column] for row in rows] for column, name in enumerate(names)}

    def _check_text(self, text: str, where: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise BadInputError(f"{where}: expected a text, found nothing in it")
        if len(text) > self.limits.max_characters:
            raise TooLargeError(f"{where}: expected at most {self.limits.max_characters} characters, found {len(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(
                f"{where}: character {error.start} is half of a surrogate pair, which is no text"
            ) from error

    def _encode(self, version: Version, base: Base, columns: Mapping[str, list[str]]) -> list[dict[str, list[int]]]:
        task, rows = version.saved.task, len(next(iter(columns.values())))
        lengths = [sum(len(texts[row]) for texts in columns.values()) for row in range(rows)]
        limit = min(version.saved.max_length, base.tokenizer.model_max_length)
        inputs: list[dict[str, list[int]]] = []
        start = 0
        while start < rows:
            stop = start + 1
            while stop < rows and sum(lengths[start : stop + 1]) <= CHUNK:
                stop += 1
            with base.lock:
                chunk = {name: texts[start:stop] for name, texts in columns.items()}
                encoded = task.encode(chunk, base.tokenizer, limit)
            inputs += [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
            start = stop
        return inputs

    def _settings(self, saved: SavedModel, given: Mapping[str, Any]) -> GenerateConfig:
        values = {key: value for key, value in given.items() if value is not None}
        if values.keys() & {"temperature", "top_p", "top_k"}:
            values = {"num_beams": 1, **values, "do_sample": True}
        _, problems = build_section(GenerateConfig, values)
        if problems:
            raise BadInputError("; ".join(problems))
        limits = self.limits
        tokens = min(saved.generate.max_new_tokens, limits.max_new_tokens)
        settings = replace(saved.generate, **{"max_new_tokens": tokens, **values, "batch_size": 1})
        if settings.max_new_tokens > limits.max_new_tokens:
            raise TooLargeError(
                f"max_new_tokens: expected at most {limits.max_new_tokens}, found {settings.max_new_tokens}"
            )
        if settings.num_beams > limits.max_beams:
            raise TooLargeError(f"num_beams: expected at most {limits.max_beams}, found {settings.num_beams}")
        if settings.do_sample and settings.num_beams > 1:
            raise BadInputError("num_beams: expected 1 where a text is sampled")
        return settings if settings.do_sample else replace(settings, seed=0, temperature=1.0, top_p=1.0, top_k=0)

    def _load_base(self, saved: SavedModel) -> Base:
        writes = saved.task.model_kind == Writer.kind
        with RANDOM:
            precision = "fp32" if writes else self.precision or saved.model.precision
            model, tokenizer = load_saved_model(saved, precision, adapted=False)
        if writes:
            tokenizer.padding_side = "left"
            dequantise(model)
        else:
            enable_unpadding(model)
        kind = Writer if writes else Classifier
        return Base(kind(saved.model.name, model, tokenizer, self.limits, self._observer), copy.deepcopy(tokenizer))

    def _retire(self, old: tuple[Version, Base] | None) -> None:
        """Lets a version go that is served no more, and with its last adapter the base."""
        if old is None:
            return
        version, base = old
        base.worker.retire(version)
        with self._lock:
            if not any(other is base for _, other in self._current.values()):
                self._bases = {key: each for key, each in self._bases.items() if each is not base}
                base.worker.close()


def _key(saved: SavedModel) -> tuple[Any, ...]:
    """What two adapters must have in common to share a base."""
    model = replace(saved.model, precision="auto", dropout=None)
    return model, saved.task.model_kind, saved.seed if model.init == "random" else 0
