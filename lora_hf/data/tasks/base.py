"""What a task is: the rows it reads, how they become a model's inputs, and how its answers are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lora_hf.core.errors import DataError, TrainingError
from lora_hf.data.tasks.sources import HIDDEN_LABEL, Source, check_labels, check_text

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

ModelKind = Literal["sequence-classification", "causal-lm"]
ProblemType = Literal["single_label_classification", "regression"]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One thing to fine-tune for.

    `best_metric` names the score that chooses the best checkpoint; `greater_is_better` says whether its highest is.
    """

    name: str
    source: Source = field(repr=False)  # the key of cached tokens holds the rows, and the repr of the rest
    model_kind: ModelKind
    text_columns: tuple[str, ...]
    best_metric: str
    greater_is_better: bool = True
    label_names: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    train_split: str = "train"
    evaluation_splits: tuple[str, ...] = ("validation",)

    @property
    def num_labels(self) -> int:
        """The width of the classification head: one per label name, and 1 for a regression."""
        return len(self.label_names) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """What a fine-tuning run reads."""
        return (self.train_split, *self.evaluation_splits)

    def load(self, data_dir: str | None, splits: Sequence[str]) -> dict[str, Dataset]:
        """Returns the rows of each split, read and checked; see `sources` for where they come from.

        Raises:
            DataError: missing, unreadable or wrong rows.
            HubError: rows that only the hub has, out of its reach.
        """
        loaded = {}
        for split in splits:
            rows, where = self.source.read(split, data_dir)
            self.check(rows, split, where)
            loaded[split] = rows
        return loaded

    def check(self, rows: Dataset, split: str, where: str) -> None:
        """Raises a DataError, opening with `where`, for rows that the task cannot use."""
        check_text(rows, where, self.text_columns)

    @abstractmethod
    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns a batch of rows as unpadded model inputs, for `Dataset.map(batched=True)` without the old columns.

        A classification gives one list entry a row; a generation task one for each reference of a row.
        """

    @abstractmethod
    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Returns the task's metrics by name; the first axis of both is the row."""

    def majority(self, labels: ArrayLike, train_labels: ArrayLike | None = None) -> dict[str, float]:
        """Returns what an answer that never looks at the text would score; empty where a task has no such answer."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """One class, or one number, for a sentence or a pair of sentences.

    `metric` names the set of metrics that scores it, for a GLUE task the official one. A regression's scale goes from
    `lowest_score` to `highest_score`; labels may be hidden as -1 where no score can be that.
    """

    metric: str
    model_kind: ModelKind = "sequence-classification"
    problem_type: ProblemType | None = "single_label_classification"
    lowest_score: float = 0.0
    highest_score: float = 5.0

    def check(self, rows: Dataset, split: str, where: str) -> None:
        super().check(rows, split, where)
        highest = len(self.label_names) - 1 if self.label_names else self.highest_score
        check_labels(rows, where, split, self.label_names, self.lowest_score, highest)

    @property
    def _may_hide(self) -> bool:
        return self.lowest_score > HIDDEN_LABEL

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns what the tokenizer gives (input_ids, attention_mask, BERT's token_type_ids) and `labels`.

        A row longer than `max_length` tokens loses them from the longer of its texts. Labels are ints, or floats for a
        regression; rows without labels, or with hidden ones, give none.
        """
        texts = [rows[column] for column in self.text_columns]
        pairs = texts[1] if len(texts) == 2 else None
        encoded = dict(tokenizer(texts[0], pairs, truncation="longest_first", max_length=max_length, padding=False))
        labels = rows.get("label")
        if labels is not None and not (self._may_hide and HIDDEN_LABEL in labels):
            encoded["labels"] = (
                [float(label) for label in labels] if self.problem_type == "regression" else list(labels)
            )
        return encoded

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Returns the official metrics of logits (rows, num_labels) against labels (rows,).

        Raises:
            DataError: the labels are hidden.
            TrainingError: a logit is not finite; its argmax would be a class like any other.
        """
        import numpy as np

        logits, references = np.asarray(predictions), np.asarray(labels)
        broken = np.flatnonzero(~np.isfinite(logits.reshape(len(logits), -1)).all(axis=1))
        if broken.size:
            raise TrainingError(
                f"{self.name}: the logits of {broken.size} of {len(logits)} rows are not finite, the first is row "
                f"{broken[0]} (counting from 0); the model has diverged: lower the learning rate or train in fp32"
            )
        answers = logits.reshape(len(logits)) if self.problem_type == "regression" else logits.argmax(axis=1)
        return self._score_answers(answers, references)

    def majority(self, labels: ArrayLike, train_labels: ArrayLike | None = None) -> dict[str, float]:
        """Returns the score of giving every row the commonest class of `train_labels` (of `labels`, where left out).

        A regression gives the mean, whose correlations are 0.
        """
        import numpy as np

        references = np.asarray(labels)
        seen = references if train_labels is None else np.asarray(train_labels)
        values, counts = np.unique(seen, return_counts=True)
        answer = seen.mean() if self.problem_type == "regression" else values[counts.argmax()]
        return self._score_answers(np.full(references.shape, answer), references)

    def _score_answers(self, answers: np.ndarray, references: np.ndarray) -> dict[str, float]:
        from lora_hf.data.metrics.glue import GlueMetric

        hidden = int((references == HIDDEN_LABEL).sum()) if self._may_hide else 0
        if hidden:
            raise DataError(
                f"{self.name}: {hidden} of {len(references)} labels are hidden ({HIDDEN_LABEL}), as on GLUE's test "
                f"splits; score one of {', '.join(self.evaluation_splits)}, or predict without scoring"
            )
        return GlueMetric(self.metric).compute(predictions=answers, references=references) or {}
