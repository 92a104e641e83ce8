"""The base classes of tasks: rows, their encoding as model inputs, and the scores of predictions."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_hf.core.errors import TrainingError
from lora_hf.data.tasks.row_checks import check_text
from lora_hf.data.tasks.sources import Source
from lora_hf.data.tasks.user_texts import honored_tokens, warn_honored_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# The keys of `models.load.AUTO_CLASSES`.
ModelKind = Literal["sequence-classification", "causal-lm", "token-classification", "question-answering", "seq2seq-lm"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

TRUNCATED = "truncated"  # a column of encoded rows: whether `max_length` truncated the row


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task to fine-tune for.

    `best_metric` chooses the best checkpoint: the one with the highest score if `greater_is_better`, else the lowest.
    """

    verb: ClassVar[Literal["predict", "generate"]] = "predict"  # the command that answers single rows

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

    def head_config(self) -> dict[str, Any] | None:
        """Returns the values of the model's config that describe the task's head; None for a pretrained head."""
        return None

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

    @abstractmethod
    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns a batch of rows as unpadded model inputs, with the column `TRUNCATED`.

        A classification returns one entry per row, a generation task one per reference of a row.
        """

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Returns the model's tokenizer, changed in place to what the task needs; merged models are saved with it.

        Raises:
            ModelError: the tokenizer lacks something that the task needs.
        """
        return tokenizer

    def select_encoded(
        self, encoded: Dataset, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str = ""
    ) -> Dataset:
        """Returns the encoded rows to use, all of them unless a task leaves some out and says so.

        Raises:
            DataError: rows that the task cannot use once they are encoded.
        """
        return encoded

    def texts_of(self, rows: Dataset) -> dict[str, list]:
        """Returns the text columns that the rows have, by name."""
        return {column: rows[column][:] for column in self.text_columns if column in rows.column_names}

    @abstractmethod
    def truncated_part(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns what a row that is too long loses, such as "the end of their texts"."""

    def display_name(self, split: str) -> str:
        """Returns the name of the task and of the split, if one is given, for messages."""
        return f"{self.name}, {split}" if split else self.name

    def warn_truncated(
        self, truncated: Sequence[bool], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str = ""
    ) -> None:
        """Logs how many rows were truncated, and the first of them."""
        if count := sum(truncated):
            _log.warning(
                "%s: truncated %d of %d rows, which are longer than %d tokens (task.max_length, or the model's own "
                "limit): the model does not read %s; the first is row %d (counting from 0)",
                self.display_name(split), count, len(truncated), max_length, self.truncated_part(tokenizer),
                list(truncated).index(True),
            )  # fmt: skip

    def warn_honored_tokens(
        self, rows: Mapping[str, list] | Dataset, tokenizer: PreTrainedTokenizerBase, split: str = ""
    ) -> None:
        """Logs the rows with special tokens that the tokenizer cannot read as text."""
        if tokens := honored_tokens(tokenizer):
            columns = [rows[column][:] for column in self.text_columns]
            texts = ["\n".join(map(str, values)) for values in zip(*columns, strict=True)]
            warn_honored_tokens(self.display_name(split), texts, tokens)

    def read_inputs(self, path: Path) -> dict[str, list]:
        """Returns the rows of a file to answer, as `encode` takes them, without labels.

        Raises:
            DataError: as `readers.read_texts`.
        """
        from lora_hf.data.readers import read_texts

        return read_texts(path, self.text_columns)

    def row_outputs(self, outputs: Any, entries: Mapping[str, Any] | Dataset, rows: Mapping[str, Any] | Dataset) -> Any:
        """Returns a sequence with what `score_rows` and `format_answer` take for each row.

        Args:
            outputs: of the model for each entry that `encode` returned, in order, perhaps padded on the right.
            entries: the columns that `encode` returned.
            rows: the columns that `encode` took.
        """
        import numpy as np

        return np.asarray(outputs)

    @abstractmethod
    def score_rows(self, outputs: Any, rows: Dataset) -> dict[str, float]:
        """Returns the task's metrics for the rows of a split, in their order, from what `row_outputs` returned."""

    def majority_of_rows(self, rows: Dataset, train_rows: Dataset) -> dict[str, float]:
        """Returns the scores of a constant prediction on the rows of a split; empty for tasks that have none."""
        return {}

    def format_answer(self, output: Any) -> dict[str, Any]:
        """Returns the answer for one row, as `predict` prints it, from what `row_outputs` returned for that row."""
        raise NotImplementedError(f"{self.name}: tasks of this kind have no answers to single rows")

    def prediction_lines(self, outputs: Any, rows: Dataset) -> Iterator[dict[str, Any]]:
        """Yields what a run writes about each row of a split to `predictions-<split>.jsonl`."""
        yield from ()

    def evaluation(self, outputs: Any, rows: Dataset) -> dict[str, Any]:
        """Returns what tells more than the metrics, such as scores by class; see `metrics.evaluation`."""
        return {}

    def calibrated(self, outputs: Any, rows: Dataset) -> Task:
        """Returns the task with what it chooses on the development rows, such as thresholds."""
        return self

    def weaknesses(self, outputs: Any) -> list[str]:
        """Returns what is suspicious about the outputs for a split, such as one class for every row."""
        return []

    def check_finite(self, values: Any, name: str) -> None:
        """Raises a TrainingError if some of the model's outputs are not finite; the first axis is the row."""
        import numpy as np

        diverged = np.flatnonzero([not np.isfinite(row).all() for row in values])
        if diverged.size:
            raise TrainingError(
                f"{self.name}: the {name} of {diverged.size} of {len(values)} rows are not finite, the first is row "
                f"{diverged[0]} (counting from 0); the model has diverged: lower the learning rate or train in fp32; "
                "an adapter trained elsewhere may be damaged, or need fp32 (--precision fp32)"
            )
