"""What a generation task is: its rows as a causal model's inputs, its prompts, and the groups that are scored.

A row becomes `context <eos> " completion" <eos>`: the linearised input, the tokenizer's end-of-text token as separator,
the reference after a space, the same token as its end (microsoft/LoRA, examples/NLG/src/gpt2_encode.py). The loss is on
the completion and its end only. Several references of one input are as many rows in training, and one group in scoring.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError, ModelError, TrainingError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.tasks.base import ModelKind, Task
from lora_hf.data.tasks.sources import check_columns, check_text

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """An input as the model reads it, its references, and which of the task's `subsets` it belongs to."""

    context: str
    references: tuple[str, ...]
    subset: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextGeneration(Task):
    """A text for an input.

    `metric` is the task whose official scorer scores it; `subsets` are the parts of a test split that are scored on
    their own, beside the whole.
    """

    metric: str
    model_kind: ModelKind = "causal-lm"
    best_metric: str = "perplexity"
    greater_is_better: bool = False
    subsets: tuple[str, ...] = ()

    @abstractmethod
    def context(self, prompt: str) -> str:
        """Returns the model's context for an input that a person wrote on one line.

        Raises:
            DataError: it does not parse; the message says where and what was expected.
        """

    @abstractmethod
    def _example(self, *values: Any) -> Example:
        """The example of one row, from its `text_columns`; a ValueError says what is wrong with it."""

    def check(self, rows: Dataset, split: str, where: str) -> None:
        """Raises a DataError for no rows, a missing column, or a malformed row; warns of rows without a text."""
        check_text(rows, where, ())
        check_columns(rows.column_names, self.text_columns, where)
        without = sum(not example.references for example in self.examples(rows, where))
        if without == len(rows):
            raise DataError(f"{where}: none of the {without} rows has a reference text")
        if without:
            _log.warning("%s: left out %d of %d rows, which have no reference text", where, without, len(rows))

    def examples(self, rows: Mapping[str, list] | Dataset, where: str = "") -> Iterator[Example]:
        """Yields the example of each row, in order; one without a usable reference has none.

        Raises:
            DataError: a malformed row.
        """
        columns = [rows[column][:] for column in self.text_columns]
        for index, values in enumerate(zip(*columns, strict=True)):
            yield self._example_of(values, f"{where or self.name}: row {index} (counting from 0)")

    def _example_of(self, values: tuple[Any, ...], where: str) -> Example:
        try:
            return self._example(*values)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error

    def groups(self, rows: Mapping[str, list] | Dataset) -> list[Example]:
        """Returns the different contexts in order of first appearance, each with the references of all of its rows.

        Inputs are the same where their contexts are, as in the paper's code; what has no reference is left out.
        """
        grouped: dict[str, Example] = {}
        for example in self.examples(rows):
            if example.references:
                earlier = grouped.get(example.context)
                references = (*earlier.references, *example.references) if earlier else example.references
                grouped[example.context] = Example(example.context, references, example.subset)
        return list(grouped.values())

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns input_ids, attention_mask and labels, one entry for each reference of each row.

        The labels are -100 on context and separator, so that the separator predicts the completion's first token and
        the completion's last token predicts the end. A row longer than `max_length` tokens loses the first of its
        context, with a warning; completion and end are never cut.

        Raises:
            DataError: a completion that leaves no room for a token of context.
            ModelError: the tokenizer has no end-of-text token.
        """
        end = _end_of(tokenizer)
        pairs = [(example.context, text) for example in self.examples(rows) for text in example.references]
        contexts = _tokens(tokenizer, [context for context, _ in pairs])
        completions = _tokens(tokenizer, [f" {text}" for _, text in pairs])
        encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
        cut = 0
        for (_, text), context, completion in zip(pairs, contexts, completions, strict=True):
            answer = [*completion, end]
            room = max_length - len(answer) - 1
            if room < 1:
                raise DataError(
                    f"{self.name}: a reference of {len(answer)} tokens, its end included, leaves no room for the input "
                    f"within {max_length} (task.max_length, or the model's own limit): {shown(text)}. Set a greater "
                    f"task.max_length, or leave the row out."
                )
            cut += len(context) > room
            asked = [*context[-room:], end]
            encoded["input_ids"].append(asked + answer)
            encoded["attention_mask"].append([1] * (len(asked) + len(answer)))
            encoded["labels"].append([IGNORE_INDEX] * len(asked) + answer)
        if cut:
            _log.warning(
                "%s: %d of %d rows are longer than %d tokens and lost the first of their input; see task.max_length",
                self.name, cut, len(pairs), max_length,
            )  # fmt: skip
        return encoded

    def prompts(self, contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
        """Returns the tokens to generate from, unpadded: each context and the separator.

        Raises:
            DataError: a prompt longer than `max_length` tokens.
            ModelError: the tokenizer has no end-of-text token.
        """
        end = _end_of(tokenizer)
        prompts = [[*tokens, end] for tokens in _tokens(tokenizer, contexts)]
        for index, prompt in enumerate(prompts):
            if len(prompt) > max_length:
                raise DataError(
                    f"{self.name}: prompt {index} (counting from 0) has {len(prompt)} tokens, its separator included; "
                    f"the model reads at most {max_length} before it answers: {shown(contexts[index])}. Shorten it, "
                    f"or set a smaller generate.max_new_tokens."
                )
        return prompts

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Returns the perplexity of the references; `labels` are not looked at.

        Args:
            predictions: (rows, 2), for each row the negative log-likelihood of its completion and end, summed over
                their tokens in nats, and the number of those tokens.

        Raises:
            TrainingError: a likelihood is not finite.
        """
        import numpy as np

        sums = np.asarray(predictions, dtype=np.float64)
        broken = np.flatnonzero(~np.isfinite(sums).all(axis=1))
        if broken.size:
            raise TrainingError(
                f"{self.name}: the likelihood of {broken.size} of {len(sums)} rows is not finite, the first is row "
                f"{broken[0]} (counting from 0); the model has diverged: lower the learning rate or train in fp32"
            )
        loss, tokens = sums.sum(axis=0)
        return {"perplexity": math.exp(loss / tokens)}


def shown(value: object, longest: int = 160) -> str:
    """Returns the value as a message shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def _end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token), which separates input and "
            f"text; choose a model made for generation, such as gpt2"
        )
    return end


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []  # pyright: ignore[reportReturnType]
