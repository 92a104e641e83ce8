"""Adapters by name, each on a base that it shares with others, answering requests from any thread."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_hf.adapters.resolve import SavedModel, find_saved_model
from lora_hf.adapters.save_load import load_saved_model
from lora_hf.core.errors import AdapterError, did_you_mean
from lora_hf.inference.classify import model_inputs
from lora_hf.lora.fingerprint import fingerprint, store_fingerprint
from lora_hf.lora.unpadding import enable_unpadding
from lora_hf.models.load import dequantise, load_tokenizer
from lora_hf.serving.classify_worker import ClassifyWorker
from lora_hf.serving.generate_worker import GenerateWorker
from lora_hf.serving.inputs import (
    Prompt,
    Text,
    can_embed,
    check_rows,
    decoding_settings,
    encode_prompt,
    encode_rows,
    encode_texts,
    has_template,
    read_file,
)
from lora_hf.serving.limits import (
    BadInputError,
    ClosingError,
    DeadlinePassedError,
    Limits,
    UnknownAdapterError,
    WrongKindError,
)
from lora_hf.serving.model_thread import ModelThread, run_apart
from lora_hf.serving.requests import (
    AdapterVersion,
    ClassifyRequest,
    ClassifyResult,
    EmbedRequest,
    GenerateRequest,
    GenerateResult,
    Observer,
    Piece,
    Request,
    digest_of,
)
from lora_hf.serving.worker import RNG_LOCK, SHUTTING_DOWN, Worker

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


class Engine:
    """Serves many adapters of any number of bases from one process, with each base in memory once.

    Every method may be called from any thread. The version of an adapter that accepts a request answers it, even if the
    adapter is replaced meanwhile; the result names that version.

    Args:
        precision: of the bases, as in a config; default: that of the run of a base's first adapter. A quantized
            base stays quantized.
        model: where the base of all adapters is now, a folder or a hub id; by default where each adapter says.
        exact: run in fp32, and dequantize a quantized base.
        merge: merge an adapter into its base while no other one is on it: faster, but another copy of the weights.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        precision: str | None = None,
        observer: Observer | None = None,
        model: str | None = None,
        exact: bool = False,
        merge: bool = False,
    ) -> None:
        self.limits, self._model = limits or Limits(), model
        self.precision, self.exact, self.merge = "fp32" if exact else precision, exact, merge
        self._observer = observer or Observer()
        self._model_thread = ModelThread()
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
                f"adapter name {name!r}: expected at most 64 letters, digits, '-', '_' and '.', the first "
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
                worker = run_apart(self._load_base, saved)
            generates = isinstance(worker, GenerateWorker)
            version.chat = generates and has_template(version, worker)
            version.embeds = not generates and can_embed(worker.model)
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

    def read_file(self, adapter: str, name: str, content: bytes) -> list[list[str]]:
        """The texts of each row of a file called `name`, as the task of a served adapter reads them."""
        with self._lock:
            version, _ = self._find(adapter)
        return read_file(version.saved.task, name, content)

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
        with self._acquired(adapter, ClassifyWorker) as (version, worker, bare):
            if bare:
                raise WrongKindError(f"{adapter} is a base, which has no trained head; ask one of its adapters")
            columns = check_rows(version, inputs, self.limits)
            encoded, truncated = encode_rows(version, worker, columns)
            entries = model_inputs(encoded, worker.request_tokenizer)
            request = ClassifyRequest(
                version, self._deadline(deadline), rows=columns, encoded=encoded, inputs=entries, truncated=truncated
            )
            return self._submit(request, worker)

    def submit_embed(self, model: str, inputs: Sequence[str], deadline: float | None = None) -> Request:
        """As `submit_classify`; the `future` gets an `EmbedResult`, with a vector for each text.

        Args:
            model: an adapter on an encoder, or the name of such a base, which then runs alone.
        """
        with self._acquired(model, ClassifyWorker, embeds=True) as (version, worker, bare):
            if not can_embed(worker.model):
                kind = worker.model.config.model_type
                raise WrongKindError(f"{model}: {kind} reads from left to right; expected an adapter of an encoder")
            entries = encode_texts(version, worker, inputs, self.limits)
            return self._submit(EmbedRequest(version, self._deadline(deadline), inputs=entries, bare=bare), worker)

    def submit_generate(
        self,
        adapter: str,
        prompt: Prompt,
        decoding: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        bare: bool = False,
        on_text: Callable[[Piece], None] | None = None,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
        fit: bool = False,
    ) -> Request:
        """Tokenizes in this thread and queues a request, whose cancellable `future` gets a `GenerateResult`.

        Args:
            adapter: its name, or that of a base, which then runs alone.
            prompt: a text, in the form of the adapter's task; chat messages with `role` and `content`; or tokens.
            decoding: fields of `GenerateConfig` that override those of the adapter's run. `temperature`, `top_p` or
                `top_k` turn on sampling; a temperature below 0.01 turns it off.
            deadline: as for `submit_classify`.
            bare: generate with the base alone, without the adapter.
            on_text: called with each new piece of text in the engine's thread; never under beam search.
            stop: strings that end the text, which does not contain them.
            top_logprobs: record the log-probability of each token and of so many of the most probable ones.
            fit: generate fewer tokens if the prompt leaves no space for `max_new_tokens`.

        Raises:
            RefusalError: as `submit_classify`.
        """
        with self._acquired(adapter, GenerateWorker) as (version, worker, is_base):
            settings = decoding_settings(version.saved, decoding or {}, self.limits, worker.model)
            if settings.num_beams > 1 and (stop or top_logprobs is not None):
                raise BadInputError("num_beams: expected 1 with stop strings or log-probabilities")
            if top_logprobs is not None and worker.model.config.is_encoder_decoder:
                raise BadInputError("logprobs: not available for an encoder-decoder")
            encoded = encode_prompt(version, worker, prompt, settings, self.limits, is_base, fit)
            request = GenerateRequest(
                version,
                self._deadline(deadline),
                prompt=encoded.tokens,
                decoding=replace(settings, max_new_tokens=min(settings.max_new_tokens, encoded.most)),
                bare=bare or is_base,
                on_text=on_text,
                stop=tuple(stop),
                top_logprobs=top_logprobs,
                clean=encoded.clean,
                end_tokens=encoded.end_tokens,
                first_token=encoded.first_token,
            )
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

    def _find_model(self, name: str) -> tuple[AdapterVersion, Worker, bool]:
        """The adapter of this name, or any adapter of the base of this name, and whether it is a base."""
        if name not in self._current:
            for version, worker in self._current.values():
                if version.base == name:
                    return version, worker, True
        return *self._find(name), False

    @contextmanager
    def _acquired(
        self, name: str, kind: type[Worker], embeds: bool = False
    ) -> Iterator[tuple[AdapterVersion, Worker, bool]]:
        """The current version of an adapter, kept on its base until its request is answered or refused."""
        with self._lock:
            if self._closing:
                raise ClosingError(SHUTTING_DOWN)
            version, worker, is_base = self._find_model(name)
            if not isinstance(worker, kind):
                if embeds:
                    raise WrongKindError(f"{name} generates text; expected an adapter of an encoder for embeddings")
                verb = "generate" if isinstance(worker, GenerateWorker) else "classify"
                raise WrongKindError(f"{name} was trained for {version.saved.task.name}; use {verb} instead")
            worker.acquire(version)
        try:
            yield version, worker, is_base
        except BaseException:
            worker.release(version)
            raise

    def _submit(self, request: Any, worker: Worker) -> Request:
        worker.submit(request)
        request.future.add_done_callback(lambda _: worker.release(request.version))
        return request

    def _deadline(self, seconds: float | None) -> float:
        return time.monotonic() + min(seconds or self.limits.deadline, self.limits.deadline)

    def _load_base(self, saved: SavedModel) -> Worker:
        generates = saved.task.verb == "generate"
        with RNG_LOCK:
            model, tokenizer = load_saved_model(saved, self.precision or saved.model.precision, adapted=False)
        if getattr(saved.task, "chat_template", None):  # of this adapter alone; others share the tokenizer
            tokenizer.chat_template = load_tokenizer(saved.model).chat_template
        if self.exact:  # the adapters know the weights as they were before they were packed
            original = fingerprint(model)
            store_fingerprint(dequantise(model), original)
        if not generates:
            enable_unpadding(model)
        worker = GenerateWorker if generates else ClassifyWorker
        return worker(self._model_thread, saved.model.name, model, tokenizer, self.limits, self._observer, self.merge)

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
