"""A base that writes: requests with the same decoding go through it together, each under its own adapter."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from lora_hf.inference.generate import Generator
from lora_hf.serving.requests import Write, Written
from lora_hf.serving.worker import RANDOM, Worker

STEP_ROWS = 4096  # beams times tokens of a batch: each leaves a score for every word of the vocabulary until the end


class Writer(Worker):
    """The first request that waits chooses the decoding; those that want the same come along.

    A request that samples runs alone, from its own seed: its text is that of `scripts/generate.py`, whatever else the
    server does.
    """

    kind = "causal-lm"

    def _take(self) -> list[tuple[Write, int]]:
        if not self._waiting:
            return []
        decoding = self._waiting[0].decoding
        room = 1 if decoding.do_sample else max(1, STEP_ROWS // (decoding.num_beams * decoding.max_new_tokens))
        room = min(room, self.limits.max_batch)
        batch: list[tuple[Write, int]] = []
        left: deque[Write] = deque()
        for request in self._waiting:
            if len(batch) < room and request.decoding == decoding:
                batch.append((request, 0))
            else:
                left.append(request)
        self._waiting = left
        return batch

    def _answer(self, batch: Sequence[tuple[Write, int]]) -> int:
        requests = [request for request, _ in batch]
        decoding = requests[0].decoding
        positions = getattr(self.model.config, "max_position_embeddings", 0)
        generator = Generator(self.model, self.tokenizer, requests[0].version.saved.task, positions)  # type: ignore[arg-type]
        prompts = [request.prompt for request in requests]
        watch = Watch(requests, self.tokenizer, max(map(len, prompts)), decoding.num_beams)
        with RANDOM if decoding.do_sample else nullcontext(), self._adapted([request.slot for request in requests]):
            if decoding.do_sample:
                torch.manual_seed(decoding.seed)
            texts = list(generator.generate_batch(prompts, decoding, [watch]))
        tokens = sum(map(len, prompts))
        for request, made in zip(requests, texts, strict=True):
            version = None if request.bare else request.version.digest
            tokens += len(self.tokenizer(made.text)["input_ids"]) + 1  # type: ignore[arg-type] - and the end
            if request.given_up:
                request.expire()  # it was stopped half-way
            else:
                request.finish(Written(request.version.name, version, made.text, made.score))
        return tokens


class Watch(StoppingCriteria):
    """After each token: hands on what is new, and stops the rows that nobody waits for any more.

    Beams have no text to hand on before the end, and stop only together.
    """

    def __init__(
        self, requests: Sequence[Write], tokenizer: PreTrainedTokenizerBase, width: int, num_beams: int
    ) -> None:
        self.requests, self.tokenizer, self.width, self.num_beams = requests, tokenizer, width, num_beams
        self.told = [""] * len(requests)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        gone = [request.given_up for request in self.requests]
        if self.num_beams > 1:
            return torch.full((len(input_ids),), all(gone), device=input_ids.device)  # type: ignore[return-value]
        for row, request in enumerate(self.requests):
            if request.on_text is not None and not gone[row]:
                self._tell(row, request, input_ids[row, self.width :])
        return torch.tensor(gone, device=input_ids.device)  # type: ignore[return-value]

    def _tell(self, row: int, request: Write, tokens: torch.Tensor) -> None:
        words: Any = self.tokenizer.decode(tokens, skip_special_tokens=True)
        text = " ".join(words.split())
        # A token may end within a letter, and the words so far may be written otherwise with the next.
        if text.startswith(self.told[row]) and not text.endswith("\ufffd") and len(text) > len(self.told[row]):
            request.on_text(text[len(self.told[row]) :])  # type: ignore[misc]
            self.told[row] = text
