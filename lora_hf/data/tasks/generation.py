"""The base class of generation tasks: training rows, prompts, and groups of references to score with.

A row becomes `context <eos> " completion" <eos>`: the linearized input, the tokenizer's end-of-text token as separator,
a space and the reference, and the same token as its end (microsoft/LoRA, examples/NLG/src/gpt2_encode.py). Only the
completion and its end have a loss. Several references of one input are several rows for training and one group for
scoring.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_hf.core.errors import DataError, ModelError, TrainingError
from lora_hf.core.formatting import cut
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.readers import read_texts
from lora_hf.data.tasks.base import TRUNCATED, ModelKind, Task
from lora_hf.data.tasks.row_checks import check_columns, check_text
from lora_hf.data.tasks.user_texts import encode_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """An input as the model reads it, its references, and its subset (one of the task's `subsets`)."""

    context: str
    references: tuple[str, ...]
    subset: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextGeneration(Task):
    """Generates a text for an input.

    `metric` names the task whose official scorer is used; `subsets` are parts of a test split with their own scores.
    """

    verb: ClassVar[Literal["predict", "generate"]] = "generate"

    metric: str
    model_kind: ModelKind = "causal-lm"
    best_metric: str = "perplexity"
    greater_is_better: bool = False
    subsets: tuple[str, ...] = ()
    reads_text: ClassVar[bool] = True  # whether all columns hold text

    @abstractmethod
    def context(self, prompt: str) -> str:
        """Returns the model's context for an input on one line.

        Raises:
            DataError: it does not parse, with the position and what was expected.
        """

    @abstractmethod
    def _example(self, *values: Any) -> Example:
        """Returns the example of one row from the values of its `text_columns`, or raises a ValueError."""

    def check(self, rows: Dataset, split: str, origin: str) -> None:
        """Raises a DataError for no rows, a missing column, or a malformed row; warns about rows without a text."""
        check_text(rows, origin, self.text_columns if self.reads_text else ())
        check_columns(rows.column_names, self.text_columns, origin)
        without = sum(not example.references for example in self.examples(rows, origin))
        if without == len(rows):
            raise DataError(f"{origin}: none of the {without} rows has a reference text")
        if without:
            _log.warning("%s: left out %d of %d rows without a reference text", origin, without, len(rows))

    def examples(self, rows: Mapping[str, list] | Dataset, origin: str = "") -> Iterator[Example]:
        """Yields the example of each row, in order; its references may be empty.

        Raises:
            DataError: a malformed row.
        """
        columns = [rows[column][:] for column in self.text_columns]
        for index, values in enumerate(zip(*columns, strict=True)):
            try:
                example = self._example(*values)
            except ValueError as error:
                raise DataError(f"{origin or self.name}: row {index} (counting from 0): {error}") from error
            yield example

    def pairs(self, rows: Mapping[str, list]) -> list[tuple[str, str]]:
        """Returns the context of each row with each of its references."""
        return [(example.context, text) for example in self.examples(rows) for text in example.references]

    def groups(self, rows: Mapping[str, list] | Dataset) -> list[Example]:
        """Returns an example for each distinct context, in order of first appearance, with the references of its rows.

        As in the paper's code, rows with the same context are the same input. Inputs without references are left out.
        """
        grouped: dict[str, Example] = {}
        for example in self.examples(rows):
            if example.references:
                previous = grouped.get(example.context)
                references = (*previous.references, *example.references) if previous else example.references
                grouped[example.context] = Example(example.context, references, example.subset)
        return list(grouped.values())

    def clean(self, text: str) -> str:
        """Returns a generated text as it is shown and scored: on one line, whatever the model wrote."""
        return one_line(text)

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Returns the tokens that end a text besides those of the tokenizer and the model."""
        return []

    def read_prompts(self, path: Path) -> list[tuple[Any, str]]:
        """Returns the prompts of a file as they are shown, and their contexts.

        Raises:
            DataError: the file cannot be read, or has no such column.
        """
        column = self.text_columns[0] if self.reads_text else "prompt"
        texts = read_texts(path, (column,), {column: ("prompt",)})[column]
        return [(text, self.context(text)) for text in texts]

    def shown_context(self, context: str) -> Any:
        """Returns a context as output files hold it."""
        return context

    def truncated_part(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return "the start of their prompts"

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns input_ids, attention_mask and labels, one entry for each reference of each row.

        Context and separator have the label `IGNORE_INDEX`: the separator predicts the completion's first token, and
        its last token predicts the end. A row of more than `max_length` tokens is truncated at the start of its
        context.

        Raises:
            DataError: a completion so long that no token of context would remain.
            ModelError: the tokenizer has no end-of-text token.
        """
        end = _end_token(tokenizer)
        pairs = self.pairs(rows)
        contexts = _tokens(tokenizer, [context for context, _ in pairs])
        completions = _tokens(tokenizer, [f" {text}" for _, text in pairs])
        entries = []
        for (_, text), context, completion in zip(pairs, contexts, completions, strict=True):
            answer = [*completion, end]
            longest = max_length - len(answer) - 1
            if longest < 1:
                raise DataError(
                    f"{self.name}: a reference of {len(answer)} tokens, its end included, leaves no space for the "
                    f"input within {max_length} tokens (task.max_length, or the model's own limit): {shown(text)}. "
                    "Set a greater task.max_length, or leave the row out."
                )
            prompt = [*context[-longest:], end]
            entries.append((prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, len(context) > longest))
        return causal_inputs(entries)

    def prompts(self, contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
        """Returns the tokens to generate from, unpadded: each context with the separator.

        Raises:
            DataError: a prompt longer than `max_length` tokens.
            ModelError: the tokenizer has no end-of-text token.
        """
        prompts = self.prompt_tokens(contexts, tokenizer)
        for index, prompt in enumerate(prompts):
            if len(prompt) > max_length:
                raise DataError(
                    f"{self.name}: prompt {index} (counting from 0) has {len(prompt)} tokens, special ones included; "
                    f"the model reads at most {max_length} before it answers: {shown(contexts[index])}. Shorten it, "
                    f"or set a smaller generate.max_new_tokens."
                )
        return prompts

    def prompt_tokens(self, contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Returns the tokens of each context with the separator, however many they are."""
        end = _end_token(tokenizer)
        return [[*tokens, end] for tokens in _tokens(tokenizer, contexts)]

    def first_token(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Returns the token with which every generated text begins, if the task and not the model chooses one."""
        return None

    def score_rows(self, outputs: Any, rows: Dataset) -> dict[str, float]:
        """Returns the perplexity of the references.

        Args:
            outputs: `(rows, 2)`: the negative log-likelihood of each row's completion and end in nats, summed over
                their tokens, and the number of these tokens.

        Raises:
            TrainingError: a likelihood is not finite, or the perplexity is beyond floating-point numbers.
        """
        import numpy as np

        sums = np.asarray(outputs, dtype=np.float64)
        self.check_finite(sums, "likelihoods")
        loss, tokens = sums.sum(axis=0)
        try:
            return {"perplexity": math.exp(loss / tokens)}
        except OverflowError:
            raise TrainingError(
                f"{self.name}: a loss of {loss / tokens:.0f} nats per token has no perplexity; the model has diverged: "
                "lower the learning rate or train in fp32"
            ) from None


@dataclass(frozen=True, kw_only=True)
class TextToText(TextGeneration):
    """Generates a text for a text. Both are used as written, without the white space around them."""

    what: ClassVar[str] = "a prompt"  # the model reads

    def context(self, prompt: str) -> str:
        """Returns the prompt without surrounding white space."""
        if not prompt.strip():
            raise DataError(f"{self.name}: expected {self.what}, found nothing")
        return prompt.strip()

    def _example(self, *values: Any) -> Example:
        prompt, completion = values
        if not prompt.strip():
            raise ValueError(f"{self.text_columns[0]!r} is empty; expected {self.what}")
        completion = completion.strip()
        return Example(self.context(prompt), (completion,) if completion else ())

    def clean(self, text: str) -> str:
        return text.strip()


def causal_inputs(entries: Sequence[tuple[list[int], list[int], bool]]) -> dict[str, list]:
    """Returns the model inputs of entries: their tokens, their labels, and whether they are truncated."""
    return {
        "input_ids": [ids for ids, _, _ in entries],
        "attention_mask": [[1] * len(ids) for ids, _, _ in entries],
        "labels": [labels for _, labels, _ in entries],
        TRUNCATED: [truncated for _, _, truncated in entries],
    }


def one_line(text: str) -> str:
    return " ".join(text.split())


def shown(value: object, longest: int = 160) -> str:
    """Returns the value as a message shows it, truncated if it is long."""
    return cut(repr(value), longest)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token), which separates input and "
            "text; choose a model made for generation, such as gpt2"
        )
    return end


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    encoded: Any = encode_texts(tokenizer, list(texts), add_special_tokens=False) if texts else {"input_ids": []}
    return encoded["input_ids"]
