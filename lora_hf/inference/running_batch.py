"""Generates texts for rows that join and leave a running batch, each with its own adapter and sampling settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_hf.core.config.schema import GenerateConfig
from lora_hf.inference.row_cache import RowCache
from lora_hf.lora.unpadding import cache_argument

Adapters = Callable[[Sequence[Any]], AbstractContextManager[Any]]  # runs each row of a batch under its own adapter


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, the log-probability that the model gave it, and the most probable tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


# A token, its log-probability after temperature, top_p and top_k, and what to record of it.
Choice = tuple[int, float, TokenLogprob | None]


@dataclass(eq=False)
class Row:
    """A prompt to continue.

    Attributes:
        prompt: its tokens.
        adapter: its adapter, as the batch's `adapters` takes it.
        decoding: greedy search or sampling, with a seed of its own; the text does not depend on the other rows.
        top_logprobs: how many of the most probable tokens to record at each position; None: no log-probabilities.
        end_tokens: tokens that end the text besides those of the batch.
        tokens: the tokens generated so far, the end token included.
        log_probability: the sum over these tokens, after temperature, top_p and top_k.
        finish_reason: `stop` after an end token, `length` at `max_new_tokens`, `broken` if logits were not finite.
    """

    prompt: list[int]
    adapter: Any
    decoding: GenerateConfig
    top_logprobs: int | None = None
    end_tokens: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    log_probability: float = 0.0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.processors = list(_processors(self.decoding))
        self.generator = torch.Generator().manual_seed(self.decoding.seed) if self.decoding.do_sample else None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def score(self) -> float:
        """As `GeneratedText.score`."""
        return self.log_probability / max(1, len(self.tokens)) ** self.decoding.length_penalty


def _processors(decoding: GenerateConfig) -> list[LogitsProcessor]:
    """What transformers' `generate` applies for these settings, in its order; n-grams are those of the new tokens."""
    processors: list[LogitsProcessor] = []
    if decoding.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
    if decoding.do_sample and decoding.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.do_sample and decoding.top_k:
        processors.append(TopKLogitsWarper(decoding.top_k))
    if decoding.do_sample and decoding.top_p < 1.0:
        processors.append(TopPLogitsWarper(decoding.top_p))
    return processors


class RunningBatch:
    """The rows that are being generated now.

    Args:
        end_tokens: the tokens that end a text.
        pad_token: any token, for the padding in front of shorter prompts.
        adapters: runs each row under its `adapter`.
    """

    def __init__(self, model: PreTrainedModel, end_tokens: Sequence[int], pad_token: int, adapters: Adapters) -> None:
        self.model, self.end_tokens, self.pad_token, self.adapters = model, frozenset(end_tokens), pad_token, adapters
        self.rows: list[Row] = []
        self.cache = RowCache()
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions, self._takes_kept = "position_ids" in parameters, "logits_to_keep" in parameters
        # A state that is not keys and values has no rows to move: each step then reads its rows from their start.
        is_linear = any(DynamicCache(config=model.config).is_linear)
        self._cache_argument = None if is_linear else cache_argument(model)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Reads the prompts of further rows, with the tokens that they already have, and generates one token each.

        If it fails, the batch and the texts of the rows are as they were before.
        """
        cache = DynamicCache() if self._cache_argument else None
        choices = _choose(rows, self._read(rows, cache))
        if cache is not None:
            self.cache.join(cache, len(rows))
        self.rows += rows
        self._append(rows, choices)

    @torch.inference_mode()
    def step(self) -> None:
        """Generates the next token of each row. Rows that have finished must have been removed."""
        if not self._cache_argument:
            self._append(self.rows, _choose(self.rows, self._read(self.rows, None)))
            return
        self.cache.make_room()
        lengths = torch.tensor([row.length for row in self.rows])
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[row.tokens[-1]] for row in self.rows]),
            "attention_mask": _mask(lengths, self.cache.width + 1),
        }
        if self._takes_positions:
            inputs["position_ids"] = lengths[:, None] - 1
        logits = self._forward(self.rows, inputs, self.cache)
        self.cache.advance()
        self._append(self.rows, _choose(self.rows, logits))

    @torch.inference_mode()
    def remove(self, rows: Sequence[Row]) -> None:
        """Takes rows out of the batch, wherever they stand in it."""
        if not rows:
            return
        leaving = set(map(id, rows))
        kept = [index for index, row in enumerate(self.rows) if id(row) not in leaving]
        order = _fill_gaps(kept, len(self.rows))
        self.rows = [self.rows[index] for index in order]
        if self._cache_argument:
            # The cache holds all tokens but the last of each row.
            self.cache.keep(order, max((row.length - 1 for row in self.rows), default=0))

    def clear(self) -> None:
        self.remove(self.rows)

    def _read(self, rows: Sequence[Row], cache: DynamicCache | None) -> Tensor:
        """The logits `(rows, vocabulary)` after all tokens of the rows, which are padded in front."""
        texts = [[*row.prompt, *row.tokens] for row in rows]
        lengths = torch.tensor(list(map(len, texts)))
        width = int(lengths.max())
        padded = [[self.pad_token] * (width - len(text)) + text for text in texts]
        inputs: dict[str, Any] = {"input_ids": torch.tensor(padded), "attention_mask": _mask(lengths, width)}
        if self._takes_positions:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_(min=0)
        return self._forward(rows, inputs, cache)

    def _forward(self, rows: Sequence[Row], inputs: dict[str, Any], cache: Any) -> Tensor:
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        if self._cache_argument:
            inputs |= {self._cache_argument: cache, "use_cache": cache is not None}
        if self._takes_kept:
            inputs["logits_to_keep"] = 1
        with self.adapters([row.adapter for row in rows]):
            return self.model(**inputs).logits[:, -1].float().cpu()

    def _append(self, rows: Sequence[Row], choices: Sequence[Choice | None]) -> None:
        """Appends to each row its next token; a row without one is broken."""
        for row, choice in zip(rows, choices, strict=True):
            if choice is None:
                row.finish_reason = "broken"
                continue
            token, log_probability, recorded = choice
            row.tokens.append(token)
            row.log_probability += log_probability
            if recorded is not None:
                row.logprobs.append(recorded)
            if token in self.end_tokens or token in row.end_tokens:
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.decoding.max_new_tokens:
                row.finish_reason = "length"


def _choose(rows: Sequence[Row], logits: Tensor) -> list[Choice | None]:
    """The next token of each row, from the logits `(rows, vocabulary)`; None where they are not finite.

    Processors can make them so too: a temperature that overflows, n-grams that ban all tokens.
    """
    finite = logits.amax(1).isfinite()
    recorded = {
        index: logits[index].log_softmax(0)
        for index, row in enumerate(rows)
        if row.top_logprobs is not None and finite[index]
    }
    for index, row in enumerate(rows):
        for processor in row.processors:
            generated = torch.tensor([row.tokens], dtype=torch.long)
            logits[index] = processor(generated, logits[index : index + 1])[0]  # type: ignore[arg-type]
    finite &= logits.amax(1).isfinite()
    totals, likeliest = logits.logsumexp(1).tolist(), logits.argmax(1).tolist()
    choices: list[Choice | None] = []
    for index, row in enumerate(rows):
        if not finite[index]:
            choices.append(None)
            continue
        token = likeliest[index]
        if row.generator is not None:
            chances = logits[index : index + 1].softmax(1)
            token = int(torch.multinomial(chances, 1, generator=row.generator))
        logprob = _logprob(recorded[index], token, row.top_logprobs or 0) if index in recorded else None
        choices.append((token, float(logits[index, token]) - totals[index], logprob))
    return choices


def _mask(lengths: Tensor, width: int) -> Tensor:
    """The attention mask `(rows, width)` of rows that are padded in front."""
    return (torch.arange(width) >= width - lengths[:, None]).long()


def _fill_gaps(kept: list[int], count: int) -> list[int]:
    """`kept` in an order that moves few rows: the last ones go where others have left."""
    order, last = [], len(kept) - 1
    staying = set(kept)
    for place in range(len(kept)):
        if place in staying:
            order.append(place)
        else:
            order.append(kept[last])
            last -= 1
    return order


def _logprob(logprobs: Tensor, token: int, count: int) -> TokenLogprob:
    values, tokens = logprobs.topk(count)
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
