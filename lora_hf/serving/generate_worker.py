"""The worker of a generation base: requests with the same decoding share a batch, each under its own adapter."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from lora_hf.core.errors import AdapterError
from lora_hf.inference.generate import Generator
from lora_hf.serving.requests import GenerateRequest, GenerateResult
from lora_hf.serving.worker import RNG_LOCK, Worker

# Beams * new tokens per batch: `generate` keeps scores over the vocabulary for each of them until the end.
MAX_BEAM_TOKENS = 4096


class GenerateWorker(Worker):
    """The first waiting request sets the decoding; waiting requests with equal settings join its batch.

    A sampling request runs alone with its own seed, so its text matches `scripts/generate.py` whatever else is served.
    """

    verb = "generate"

    def _next_batch(self) -> list[tuple[GenerateRequest, int]]:
        if not self._queue:
            return []
        decoding = self._queue[0].decoding
        size = 1 if decoding.do_sample else max(1, MAX_BEAM_TOKENS // (decoding.num_beams * decoding.max_new_tokens))
        size = min(size, self.limits.max_batch)
        batch: list[tuple[GenerateRequest, int]] = []
        remaining: deque[GenerateRequest] = deque()
        for request in self._queue:
            if len(batch) < size and request.decoding == decoding:
                batch.append((request, 0))
            else:
                remaining.append(request)
        self._queue = remaining
        return batch

    def _run_batch(self, batch: Sequence[tuple[GenerateRequest, int]]) -> int:
        requests = [request for request, _ in batch]
        decoding = requests[0].decoding
        positions = getattr(self.model.config, "max_position_embeddings", 0)
        generator = Generator(self.model, self.tokenizer, requests[0].version.saved.task, positions)  # type: ignore[arg-type]
        prompts = [request.prompt for request in requests]
        # The decoder of an encoder-decoder starts with one token, and not with the prompt.
        width = 1 if self.model.config.is_encoder_decoder else max(map(len, prompts))
        streaming = StreamingCriteria(requests, self.tokenizer, width, decoding.num_beams)
        slots = [request.slot for request in requests]
        with RNG_LOCK if decoding.do_sample else nullcontext(), self._adapters_of_rows(slots):
            if decoding.do_sample:
                torch.manual_seed(decoding.seed)
            texts = list(generator.generate_batch(prompts, decoding, [streaming], finite=False))
        tokens = sum(map(len, prompts))
        for request, generated in zip(requests, texts, strict=True):
            version = None if request.bare else request.version.digest
            tokens += len(self.tokenizer(generated.text)["input_ids"]) + 1  # type: ignore[arg-type] - and the end token
            if request.abandoned:
                request.expire()  # stopped half-way
            elif not math.isfinite(generated.score):
                name = f"{request.version.name} (version {request.version.digest})"
                request.fail(AdapterError(f"{name}: returned logits that are not finite"))
            else:
                request.finish(GenerateResult(request.version.name, version, generated.text, generated.score))
        return tokens


class StreamingCriteria(StoppingCriteria):
    """After each token, streams new text to the clients and stops the rows that nobody waits for.

    Beam search has no text to stream before its end, and stops only when every row is abandoned.
    """

    def __init__(
        self, requests: Sequence[GenerateRequest], tokenizer: PreTrainedTokenizerBase, prompt_width: int, num_beams: int
    ) -> None:
        self.requests, self.tokenizer = requests, tokenizer
        self.prompt_width, self.num_beams = prompt_width, num_beams
        self.streamed = [""] * len(requests)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        abandoned = [request.abandoned for request in self.requests]
        if self.num_beams > 1:
            return torch.full((len(input_ids),), all(abandoned), device=input_ids.device)  # type: ignore[return-value]
        for row, request in enumerate(self.requests):
            if request.on_text is not None and not abandoned[row]:
                self._stream(row, request, input_ids[row, self.prompt_width :])
        return torch.tensor(abandoned, device=input_ids.device)  # type: ignore[return-value]

    def _stream(self, row: int, request: GenerateRequest, tokens: torch.Tensor) -> None:
        words: Any = self.tokenizer.decode(tokens, skip_special_tokens=True)
        text = request.version.saved.task.clean(words)  # type: ignore[attr-defined]
        sent = self.streamed[row]
        # A token may end inside a character, and the next token may change how the text so far is decoded.
        if text.startswith(sent) and not text.endswith("\ufffd") and len(text) > len(sent):
            request.on_text(text[len(sent) :])  # type: ignore[misc]
            self.streamed[row] = text
