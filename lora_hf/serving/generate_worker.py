"""The worker of a generation base: rows join and leave a running batch, each under its own adapter."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Container, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from lora_hf.core.errors import AdapterError
from lora_hf.inference.generate import Generator, base_end_tokens
from lora_hf.inference.running_batch import Row, RunningBatch
from lora_hf.serving.model_thread import run_apart
from lora_hf.serving.requests import GenerateRequest, GenerateResult, Piece, Token
from lora_hf.serving.worker import RNG_LOCK, Worker

logger = logging.getLogger(__name__)

# Beams * new tokens per batch: `generate` keeps scores over the vocabulary for each of them until the end.
MAX_BEAM_TOKENS = 4096
# Prompt tokens that join at a time: the texts that are being generated wait while prompts are read.
MAX_PROMPT_TOKENS = 512


class GenerateWorker(Worker):
    """Greedy and sampled texts run in one batch, whatever their settings.

    Beam searches, and the texts of encoder-decoders, run whole between its steps.
    """

    def _prepare(self) -> None:
        self._texts: dict[Row, RunningText] = {}  # of the rows in the batch
        ends = base_end_tokens(self.model, self.tokenizer)
        pad: Any = self.tokenizer.pad_token_id
        self._batch = RunningBatch(self.model, ends, pad or 0, self._adapters_of_rows)
        self._just_joined = False

    @property
    def _running_slots(self) -> Container[str | None]:
        return [row.adapter for row in list(self._texts)]

    def _drop_running(self, error: BaseException | None) -> None:
        dropped = [row for row, text in self._texts.items() if error is not None or text.request.abandoned]
        for row in dropped:
            request = self._texts.pop(row).request
            request.expire() if error is None else request.fail(error)
        self._remove(dropped)

    def _step(self) -> None:
        requests: list[GenerateRequest] = []
        if not self._just_joined or not self._texts:  # after each join the texts in the batch get their next token
            with self._changed:
                self._drop_abandoned()
                requests = self._next_requests()
                self.waiting -= len(requests)
        self._just_joined = bool(requests)
        if requests and self._runs_whole(requests[0]):
            self._generate_whole(requests)
        elif requests:
            rows = [Row(each.prompt, each.slot, each.decoding, each.top_logprobs, each.end_tokens) for each in requests]
            for row, request in zip(rows, requests, strict=True):
                self._texts[row] = RunningText(request, self.tokenizer)
            self._advance(rows)
        elif self._texts:
            self._advance([])

    def _next_requests(self) -> list[GenerateRequest]:
        """The requests that join the batch now, in their order, or those of the next whole batch."""
        if self._queue and self._runs_whole(self._queue[0]):
            return self._next_whole()
        requests: list[GenerateRequest] = []
        used = sum(len(row.prompt) + row.decoding.max_new_tokens for row in self._texts)
        prompts = 0
        while self._queue and len(self._texts) + len(requests) < self.limits.max_batch:
            request: GenerateRequest = self._queue[0]
            used += len(request.prompt) + request.decoding.max_new_tokens
            prompts += len(request.prompt)
            full = (used > self.limits.max_tokens and (self._texts or requests)) or (
                prompts > MAX_PROMPT_TOKENS and requests
            )
            if full or self._runs_whole(request):
                break
            requests.append(self._queue.popleft())
        return requests

    def _runs_whole(self, request: GenerateRequest) -> bool:
        """Whether the request shares a batch from its first to its last token, instead of joining the running one."""
        return request.decoding.num_beams > 1 or self.model.config.is_encoder_decoder

    def _next_whole(self) -> list[GenerateRequest]:
        """Requests of one task with equal settings; a sampled one alone, with its own seed."""
        decoding, key = self._queue[0].decoding, _whole_key(self._queue[0])
        size = 1 if decoding.do_sample else max(1, MAX_BEAM_TOKENS // (decoding.num_beams * decoding.max_new_tokens))
        size = min(size, self.limits.max_batch)
        requests: list[GenerateRequest] = []
        remaining: deque[GenerateRequest] = deque()
        for request in self._queue:
            takes = len(requests) < size and _whole_key(request) == key
            (requests if takes else remaining).append(request)
        self._queue = remaining
        return requests

    def _advance(self, joining: list[Row]) -> None:
        """Generates a token for the rows that join, or else for those in the batch, and answers those that end."""
        start = time.perf_counter()
        if joining:
            rows = self._run_isolating_failures(joining)
            tokens = sum(row.length for row in rows)
        else:
            rows = list(self._batch.rows)
            tokens = len(rows)
            try:
                self.model_thread.run(self._batch.step)
            except Exception as error:  # noqa: BLE001 - the thread must survive, and the clients need an answer
                logger.warning("a step of %d rows failed; reading each of them again: %r", len(rows), error)
                self.model_thread.run(self._batch.clear)
                rows = [row for each in rows for row in self._run_isolating_failures([each])]
        names = [self._texts[row].request.version.name for row in rows]
        ended = []
        for row in rows:
            text = self._texts[row]
            try:
                text.update(row)
                if text.ended:
                    text.finish(row)
            except Exception as error:  # noqa: BLE001 - the other texts go on
                text.ended = True
                _fail(text.request, error)
            if text.ended:
                ended.append(row)
        self._remove(ended)
        answered = [self._texts.pop(row).request.version.name for row in ended]
        self._record(names, answered, tokens, start)

    def _remove(self, rows: list[Row]) -> None:
        if rows:
            self.model_thread.run(self._batch.remove, rows)

    def _run_isolating_failures(self, rows: list[Row]) -> list[Row]:
        """Lets rows join the batch; if that fails, each of them alone. Returns those that have joined."""
        try:
            self.model_thread.run(self._batch.join, rows)
            return rows
        except Exception as error:  # noqa: BLE001 - the thread must survive, and the client needs an answer
            if len(rows) > 1:
                logger.warning("%d rows could not join; retrying each alone: %r", len(rows), error)
                return [row for each in rows for row in self._run_isolating_failures([each])]
            _fail(self._texts.pop(rows[0]).request, error)
            return []

    def _generate_whole(self, requests: Sequence[GenerateRequest]) -> None:
        start = time.perf_counter()
        try:
            tokens = run_apart(self._run_whole, requests)
        except Exception as error:  # noqa: BLE001 - as in `_run_isolating_failures`
            if len(requests) > 1:
                logger.warning("%d texts failed; retrying each alone: %r", len(requests), error)
                for request in requests:
                    self._generate_whole([request])
                return
            _fail(requests[0], error)
            return
        names = [request.version.name for request in requests]
        self._record(names, names, tokens, start)

    def _run_whole(self, requests: Sequence[GenerateRequest]) -> int:
        decoding, saved = requests[0].decoding, requests[0].version.saved
        generator = Generator(self.model, self.tokenizer, saved.task, saved.max_length)  # type: ignore[arg-type]
        prompts = [request.prompt for request in requests]
        # The decoder of an encoder-decoder starts with one token, and not with the prompt.
        width = 1 if self.model.config.is_encoder_decoder else max(map(len, prompts))
        criteria = WholeBatchCriteria(requests, self.tokenizer, width, decoding.num_beams)
        slots = [request.slot for request in requests]
        ends, first = requests[0].end_tokens, requests[0].first_token
        with RNG_LOCK if decoding.do_sample else nullcontext(), self._adapters_of_rows(slots):
            if decoding.do_sample:
                torch.manual_seed(decoding.seed)
            outputs = generator.generate_tokens(prompts, decoding, ends, first, stopping=[criteria])
        total = sum(map(len, prompts))
        for request, (tokens, score) in zip(requests, outputs, strict=True):
            total += len(tokens)
            try:
                self._answer_whole(request, tokens, score)
            except Exception as error:  # noqa: BLE001 - the other texts are right
                _fail(request, error)
        return total

    def _answer_whole(self, request: GenerateRequest, tokens: list[int], score: float) -> None:
        if request.abandoned:
            request.expire()  # stopped half-way
            return
        if not math.isfinite(score):
            request.fail(_not_finite(request))
            return
        decoded = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        end = _stop_place(decoded, request.stop)
        text = request.clean(decoded[:end])
        ended = tokens[-1] in (*self._batch.end_tokens, *request.end_tokens)
        reason = "stop" if end is not None or ended else "length"
        rest = text[len(request.streamed) :]
        if request.on_text is not None and request.decoding.num_beams == 1 and rest:
            request.on_text(Piece(rest))
        request.finish(_result(request, text, round(score, 4), reason, len(tokens)))


class WholeBatchCriteria(StoppingCriteria):
    """After each token, streams new text to the clients and stops the rows that nobody waits for or that have ended.

    Beam search has no text to stream before its end, and stops only when every row is abandoned.
    """

    def __init__(
        self, requests: Sequence[GenerateRequest], tokenizer: PreTrainedTokenizerBase, prompt_width: int, num_beams: int
    ) -> None:
        self.requests, self.tokenizer = requests, tokenizer
        self.prompt_width, self.num_beams = prompt_width, num_beams

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        ended = [request.abandoned for request in self.requests]
        if self.num_beams > 1:
            return torch.full((len(input_ids),), all(ended), device=input_ids.device)  # type: ignore[return-value]
        for row, request in enumerate(self.requests):
            if not ended[row] and (request.stop or request.on_text is not None):
                try:
                    ended[row] = self._update(request, input_ids[row, self.prompt_width :])
                except Exception as error:  # noqa: BLE001 - the other texts go on
                    ended[row] = True
                    _fail(request, error)
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]

    def _update(self, request: GenerateRequest, tokens: torch.Tensor) -> bool:
        """Streams the text so far; returns whether a stop string ends it."""
        decoded = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        end = _stop_place(decoded, request.stop)
        new = _new_text(request, decoded, end, request.streamed)
        if request.on_text is not None and new:
            request.on_text(Piece(new))
            request.streamed += new
        return end is not None


class RunningText:
    """The text of a row: what has been streamed of it, and whether a stop string ends it."""

    def __init__(self, request: GenerateRequest, tokenizer: PreTrainedTokenizerBase) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.ended = False
        self._stopped_at: int | None = None  # the length of the decoded text before a stop string
        self._sent, self._sent_tokens = "", 0

    def update(self, row: Row) -> None:
        """Looks for stop strings in the text so far, and streams what no further token can change."""
        self.ended = row.finish_reason is not None
        if self.request.stop or (self.request.on_text is not None and not self.ended):
            decoded = self._decode(row)
            self._stopped_at = _stop_place(decoded, self.request.stop)
            if self._stopped_at is not None:
                self.ended = True
            elif self.request.on_text is not None and not self.ended:
                self._stream(row, decoded)

    def finish(self, row: Row) -> None:
        """Answers the request, after the rest of its text."""
        request = self.request
        if row.finish_reason == "broken":
            request.fail(_not_finite(request))
            return
        text = request.clean(self._decode(row)[: self._stopped_at])
        reason = "stop" if self._stopped_at is not None else row.finish_reason or "stop"
        tokens = self._tokens(row)
        if request.on_text is not None and (len(text) > len(self._sent) or len(tokens) > self._sent_tokens):
            request.on_text(Piece(text[len(self._sent) :], tokens[self._sent_tokens :]))
        request.finish(_result(request, text, round(row.score, 4), reason, len(row.tokens), tokens))

    def _decode(self, row: Row) -> str:
        return str(self.tokenizer.decode(row.tokens, skip_special_tokens=True))

    def _stream(self, row: Row, decoded: str) -> None:
        new = _new_text(self.request, decoded, None, self._sent)
        if new:
            tokens = self._tokens(row)[self._sent_tokens :]
            self.request.on_text(Piece(new, tokens))  # type: ignore[misc]
            self._sent, self._sent_tokens = self._sent + new, self._sent_tokens + len(tokens)

    def _tokens(self, row: Row) -> tuple[Token, ...]:
        """The recorded tokens that the text is made of: neither an end token nor what follows a stop string."""
        tokens, length = [], 0
        for each in row.logprobs:
            text = self._name(each.token)
            if self._stopped_at is not None and length >= self._stopped_at:
                break
            length += len(text)
            top = tuple((self._name(token), logprob) for token, logprob in each.top)
            tokens.append(Token(text, each.logprob, top))
        ended = row.finish_reason == "stop" and self._stopped_at is None
        return tuple(tokens[:-1] if ended else tokens)

    def _name(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _fail(request: GenerateRequest, error: Exception) -> None:
    logger.error("a request for %s failed", request.version.name, exc_info=error)
    request.fail(error)


def _whole_key(request: GenerateRequest) -> tuple[Any, ...]:
    """What requests have in common that share a whole batch. A prompt for the bare base has no part of a task."""
    return request.decoding, request.version.saved.task, request.end_tokens, request.first_token


def _stop_place(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins; None if there is none."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)


def _new_text(request: GenerateRequest, decoded: str, end: int | None, sent: str) -> str:
    """What follows `sent` in the text so far, which ends at `end`, and no further token can change."""
    if end is None:
        end = len(decoded) - max((_overlap(decoded, stop) for stop in request.stop), default=0)
    text = request.clean(decoded[:end])
    # A token may end inside a character, and the next token may change how the text so far is decoded.
    return text[len(sent) :] if text.startswith(sent) and not text.endswith("\ufffd") else ""


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the start of `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


def _not_finite(request: GenerateRequest) -> AdapterError:
    version = request.version
    return AdapterError(f"{version.name} (version {version.digest}): returned logits that are not finite")


def _result(
    request: GenerateRequest, text: str, score: float, reason: str, count: int, tokens: tuple[Token, ...] = ()
) -> GenerateResult:
    version = None if request.bare else request.version.digest
    return GenerateResult(request.version.name, version, text, score, reason, len(request.prompt), count, tokens)
