"""The base classes of tasks: rows, their encoding as model inputs, and the scores of predictions."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lora_hf.core.errors import DataError, TrainingError
from lora_hf.core.labels import HIDDEN_LABEL
from lora_hf.data.tasks.row_checks import check_labels, check_text
from lora_hf.data.tasks.sources import Source

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

RARE = 0.1  # a class with fewer training rows than this part of an even share is named

ModelKind = Literal["sequence-classification", "causal-lm"]
ProblemType = Literal["single_label_classification", "regression"]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task to fine-tune for.

    `best_metric` chooses the best checkpoint: the one with the highest score if `greater_is_better`, else the lowest.
    """

    name: str
    source: Source = field(repr=False)  # the repr is part of the key of cached tokens
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
        """The width of the classification head; 1 for a regression."""
        return len(self.label_names) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that a training run reads."""
        return (self.train_split, *self.evaluation_splits)

    def load(self, data_dir: str | None, splits: Sequence[str]) -> dict[str, Dataset]:
        """Reads and checks the rows of each split; `sources` says where they come from.

        Raises:
            DataError: missing, unreadable or invalid rows.
            HubError: the rows are on the hub, which is unreachable.
        """
        loaded = {}
        for split in splits:
            rows, origin = self.source.read(split, data_dir)
            self.check(rows, split, origin)
            loaded[split] = rows
        return loaded

    def check(self, rows: Dataset, split: str, origin: str) -> None:
        """Raises a DataError that begins with `origin` for rows that the task cannot use."""
        check_text(rows, origin, self.text_columns)

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns a batch of rows as unpadded model inputs.

        A classification returns one entry per row, a generation task one per reference of a row.
        """
        return self.encode_and_flag(rows, tokenizer, max_length)[0]

    @abstractmethod
    def encode_and_flag(
        self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[dict[str, list], list[bool]]:
        """Returns what `encode` does, and for each entry whether `max_length` truncated it; see `warn_truncated`."""

    @abstractmethod
    def truncated_part(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns what a row that is too long loses, such as "the end of their texts"."""

    def warn_truncated(
        self, truncated: Sequence[bool], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str = ""
    ) -> None:
        """Logs how many rows were truncated, and the first of them."""
        if count := sum(truncated):
            _log.warning(
                "%s: truncated %d of %d rows, which are longer than %d tokens (task.max_length, or the model's own "
                "limit): the model does not read %s; the first is row %d (counting from 0)",
                f"{self.name}, {split}" if split else self.name, count, len(truncated), max_length,
                self.truncated_part(tokenizer), list(truncated).index(True),
            )  # fmt: skip

    @abstractmethod
    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Returns the task's metrics by name; the first axis of both arrays is the row."""

    def majority(self, labels: ArrayLike, train_labels: ArrayLike | None = None) -> dict[str, float]:
        """Returns the scores of a constant prediction; empty for tasks that have none."""
        return {}

    def check_finite(self, values: np.ndarray, name: str) -> None:
        """Raises a TrainingError if some of the model's outputs are not finite; the first axis is the row."""
        import numpy as np

        diverged = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if diverged.size:
            raise TrainingError(
                f"{self.name}: the {name} of {diverged.size} of {len(values)} rows are not finite, the first is row "
                f"{diverged[0]} (counting from 0); the model has diverged: lower the learning rate or train in fp32; "
                "an adapter trained elsewhere may be damaged, or need fp32 (--precision fp32)"
            )


@dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """One class, or one number, for a text or a pair of texts.

    `metric` is a key of `metrics.glue.METRIC_NAMES`. The labels of a regression are from `lowest_score` to
    `highest_score`; if that excludes -1, hidden labels are -1.
    """

    metric: str
    model_kind: ModelKind = "sequence-classification"
    problem_type: ProblemType | None = "single_label_classification"
    lowest_score: float = 0.0
    highest_score: float = 5.0

    def check(self, rows: Dataset, split: str, origin: str) -> None:
        super().check(rows, split, origin)
        highest = len(self.label_names) - 1 if self.label_names else self.highest_score
        check_labels(rows, origin, split, self.label_names, self.lowest_score, highest)

    def load(self, data_dir: str | None, splits: Sequence[str]) -> dict[str, Dataset]:
        """As `Task.load`; also names the classes of which there are no or few training rows."""
        loaded = super().load(data_dir, splits)
        if self.label_names and self.train_split in loaded:
            self._warn_about_classes(loaded)
        return loaded

    def _warn_about_classes(self, loaded: Mapping[str, Dataset]) -> None:
        import numpy as np

        counts = {
            split: np.bincount(np.clip(rows["label"], HIDDEN_LABEL, None) + 1, minlength=self.num_labels + 1)[1:]
            for split, rows in loaded.items()
            if "label" in rows.column_names
        }
        in_training = counts.pop(self.train_split)
        few = RARE * in_training.sum() / self.num_labels
        for label, name in enumerate(self.label_names):
            elsewhere = "".join(f", {split} has {part[label]}" for split, part in counts.items())
            if not in_training[label]:
                _log.warning(
                    "%s: no row of %s has the class %r%s; the model cannot learn it",
                    self.name, self.train_split, name, elsewhere,
                )  # fmt: skip
            elif in_training[label] < few:
                _log.warning(
                    "%s: only %d of %d rows of %s have the class %r%s",
                    self.name, in_training[label], in_training.sum(), self.train_split, name, elsewhere,
                )  # fmt: skip

    @property
    def _may_hide_labels(self) -> bool:
        return self.lowest_score > HIDDEN_LABEL

    def truncated_part(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return f"the {'start' if tokenizer.truncation_side == 'left' else 'end'} of their texts"

    def encode_and_flag(
        self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[dict[str, list], list[bool]]:
        """Returns the tokenizer's outputs (input_ids, attention_mask, BERT's token_type_ids) and `labels`.

        Rows of more than `max_length` tokens are truncated, the longer text first. A row without tokens becomes the
        token that begins or, failing that, ends a text. Labels are ints, or floats for a
        regression; without labels, or with hidden ones, there is no `labels`.
        """
        texts = [rows[column] for column in self.text_columns]
        pairs = texts[1] if len(texts) == 2 else None
        tokens = tokenizer(texts[0], pairs, truncation="longest_first", max_length=max_length, padding=False)
        if tokens.encodings is not None:
            truncated = [bool(encoding.overflowing) for encoding in tokens.encodings]
        else:  # a tokenizer in Python, which does not say
            truncated = [len(ids) > max_length for ids in tokenizer(texts[0], pairs, verbose=False)["input_ids"]]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
        encoded: dict[str, list] = dict(tokens)
        for row, ids in enumerate(encoded["input_ids"]):
            if not ids:  # a decoder's tokenizer adds nothing to an empty text, and no model reads zero tokens
                for key, value in _empty_row(tokenizer).items():
                    encoded[key][row] = value
        labels = rows.get("label")
        if labels is not None and not (self._may_hide_labels and HIDDEN_LABEL in labels):
            encoded["labels"] = list(map(float, labels)) if self.problem_type == "regression" else list(labels)
        return encoded, truncated

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Returns the metrics of logits `(rows, num_labels)` for labels `(rows,)`.

        Raises:
            DataError: the labels are hidden.
            TrainingError: a logit is not finite; argmax would return a class all the same.
        """
        import numpy as np

        logits, references = np.asarray(predictions), np.asarray(labels)
        self.check_finite(logits, "logits")
        values = logits.reshape(len(logits)) if self.problem_type == "regression" else logits.argmax(axis=1)
        return self._score_predictions(values, references)

    def majority(self, labels: ArrayLike, train_labels: ArrayLike | None = None) -> dict[str, float]:
        """Returns the scores of predicting the most frequent class of `train_labels` (default: `labels`) for every row.

        A regression predicts the mean, whose correlations are 0.
        """
        import numpy as np

        references = np.asarray(labels)
        known = references if train_labels is None else np.asarray(train_labels)
        values, counts = np.unique(known, return_counts=True)
        prediction = known.mean() if self.problem_type == "regression" else values[counts.argmax()]
        return self._score_predictions(np.full(references.shape, prediction), references)

    def _score_predictions(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        from lora_hf.data.metrics.glue import GlueMetric

        hidden = int((references == HIDDEN_LABEL).sum()) if self._may_hide_labels else 0
        if hidden:
            raise DataError(
                f"{self.name}: {hidden} of {len(references)} labels are hidden ({HIDDEN_LABEL}), as on GLUE's test "
                f"splits; score one of {', '.join(self.evaluation_splits)}, or predict without scoring"
            )
        return GlueMetric(self.metric).compute(predictions=predictions, references=references) or {}


def _empty_row(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    values = {"input_ids": next(token for token in tokens if token is not None), "attention_mask": 1}
    return {key: [int(values.get(key, 0))] for key in tokenizer.model_input_names}
