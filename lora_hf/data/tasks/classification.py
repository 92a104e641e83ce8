"""Classification and regression: one class, or one number, for a text or a pair of texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError
from lora_hf.core.labels import HIDDEN_LABEL
from lora_hf.data.tasks.base import TRUNCATED, ModelKind, ProblemType, Task
from lora_hf.data.tasks.row_checks import check_labels
from lora_hf.data.tasks.user_texts import encode_truncated

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

RARE = 0.1  # a class with fewer training rows than this part of an even share is named


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

    def count_classes(self, rows: Dataset) -> np.ndarray:
        """Returns how many rows have each class."""
        import numpy as np

        return np.bincount(np.clip(rows["label"], HIDDEN_LABEL, None) + 1, minlength=self.num_labels + 1)[1:]

    def _warn_about_classes(self, loaded: Mapping[str, Dataset]) -> None:
        counts = {split: self.count_classes(rows) for split, rows in loaded.items() if "label" in rows.column_names}
        in_training, rows = counts.pop(self.train_split), len(loaded[self.train_split])
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
                    self.name, in_training[label], rows, self.train_split, name, elsewhere,
                )  # fmt: skip

    def head_config(self) -> dict[str, Any]:
        head: dict[str, Any] = {"num_labels": self.num_labels, "problem_type": self.problem_type}
        if names := self.label_names:
            head |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        return head

    @property
    def _may_hide_labels(self) -> bool:
        return self.lowest_score > HIDDEN_LABEL

    def truncated_part(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return f"the {'start' if tokenizer.truncation_side == 'left' else 'end'} of their texts"

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns the tokenizer's outputs (input_ids, attention_mask, BERT's token_type_ids) and `labels`.

        Rows of more than `max_length` tokens are truncated, the longer text first. A row without tokens becomes the
        token that begins or, failing that, ends a text. Labels are ints, or floats for a
        regression; without labels, or with hidden ones, there is no `labels`.
        """
        texts = [rows[column] for column in self.text_columns]
        pairs = texts[1] if len(texts) == 2 else None
        tokens, truncated = encode_truncated(tokenizer, texts[0], pairs, max_length=max_length)
        encoded: dict[str, list] = {**tokens, TRUNCATED: truncated}
        for row, ids in enumerate(encoded["input_ids"]):
            if not ids:  # a decoder's tokenizer adds nothing to an empty text, and no model reads zero tokens
                for key, value in _empty_row(tokenizer).items():
                    encoded[key][row] = value
        labels = rows.get("label")
        if labels is not None and not (self._may_hide_labels and HIDDEN_LABEL in labels):
            encoded["labels"] = list(map(float, labels)) if self.problem_type == "regression" else list(labels)
        return encoded

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

    def row_outputs(
        self, outputs: Any, entries: Mapping[str, Any] | Dataset, rows: Mapping[str, Any] | Dataset
    ) -> np.ndarray:
        """Returns the logits `(rows, num_labels)`."""
        logits = super().row_outputs(outputs, entries, rows)
        self.check_finite(logits, "logits")
        return logits

    def score_rows(self, outputs: np.ndarray, rows: Dataset) -> dict[str, float]:
        return self.score(outputs, rows["label"][:])

    def majority_of_rows(self, rows: Dataset, train_rows: Dataset) -> dict[str, float]:
        return self.majority(rows["label"][:], train_rows["label"][:])

    def format_answer(self, output: np.ndarray) -> dict[str, Any]:
        """Returns the label and the probability of each label, from logits `(num_labels,)`; a regression's score."""
        if self.problem_type == "regression":
            return {"score": round(float(output[0]), 4)}
        return {
            "label": self.label_names[int(output.argmax())],
            "probabilities": self._named(_softmax(output)),
        }

    def _named(self, probabilities: np.ndarray) -> dict[str, float]:
        return {name: round(float(value), 4) for name, value in zip(self.label_names, probabilities, strict=True)}

    def prediction_lines(self, outputs: np.ndarray, rows: Dataset) -> Iterator[dict[str, Any]]:
        """Yields the row number, label, prediction (class id or score) and logits of each row."""
        import numpy as np

        for index, (label, row) in enumerate(zip(rows["label"], np.asarray(outputs, dtype=float), strict=True)):
            logits = row.reshape(-1)
            prediction = float(logits[0]) if self.problem_type == "regression" else int(logits.argmax())
            yield {"row": index, "label": label, "prediction": prediction, "logits": logits.round(6).tolist()}

    def evaluation(self, outputs: np.ndarray, rows: Dataset) -> dict[str, Any]:
        import numpy as np

        from lora_hf.data.metrics.evaluation import evaluate_classes, evaluate_scores, with_texts

        labels = np.asarray(rows["label"])
        if self.problem_type == "regression":
            found = evaluate_scores(labels, outputs.reshape(-1))
        else:
            found = evaluate_classes(labels, _softmax(outputs), self.label_names)
        return with_texts(found, self.texts_of(rows))

    def weaknesses(self, outputs: np.ndarray) -> list[str]:
        import numpy as np

        if self.problem_type == "regression" or len(np.unique(outputs.argmax(axis=1))) > 1:
            return []
        only = self.label_names[int(outputs[0].argmax())]
        return [f"the model predicts {only!r} for every row; it has collapsed to one class"]

    def _score_predictions(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        from lora_hf.data.metrics.glue import GlueMetric

        hidden = int((references == HIDDEN_LABEL).sum()) if self._may_hide_labels else 0
        if hidden:
            raise DataError(
                f"{self.name}: {hidden} of {len(references)} labels are hidden ({HIDDEN_LABEL}), as on GLUE's test "
                f"splits; score one of {', '.join(self.evaluation_splits)}, or predict without scoring"
            )
        return GlueMetric(self.metric).compute(predictions=predictions, references=references) or {}


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in double precision, along the last axis."""
    import numpy as np
    from scipy.special import softmax

    return softmax(logits.astype(np.float64), axis=-1)


def _empty_row(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    values = {"input_ids": next(token for token in tokens if token is not None), "attention_mask": 1}
    return {key: [int(values.get(key, 0))] for key in tokenizer.model_input_names}
