"""Multi-label classification: any number of labels for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import DataError, did_you_mean
from lora_hf.data.readers import to_dataset
from lora_hf.data.tasks.base import ProblemType, Task
from lora_hf.data.tasks.classification import TextClassification
from lora_hf.data.tasks.kind import read_columns, text_arrays
from lora_hf.data.tasks.row_checks import class_names, label_of, nfc, wrong_value
from lora_hf.data.tasks.sources import Source

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

LABEL_COLUMN = "labels"  # by default, in the files
DEFAULT_THRESHOLD = 0.5  # of a task without thresholds of its own
COLUMN_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True, kw_only=True)
class MultiLabelClassification(TextClassification):
    """Any number of `label_names` for a text or a pair of texts; a row's `label` holds a 0 or 1 for each.

    `thresholds` are the probabilities from which a label is predicted. A run chooses them on its development rows.
    Without them `score` chooses those with the highest F1 of each label on the rows it scores.
    """

    metric: str = "multi_label"
    problem_type: ProblemType | None = "multi_label_classification"
    thresholds: tuple[float, ...] = field(default=(), repr=False)  # they are no part of the key of cached tokens

    check = Task.check  # the labels have been checked when they were read

    def count_classes(self, rows: Dataset) -> np.ndarray:
        return _labels_of(rows).sum(axis=0)

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        encoded = super().encode(rows, tokenizer, max_length)
        if "labels" in encoded:  # the loss takes floats
            encoded["labels"] = [[float(value) for value in row] for row in encoded["labels"]]
        return encoded

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Returns the metrics of logits for 0/1 labels, both `(rows, num_labels)`.

        Raises:
            TrainingError: a logit is not finite.
        """
        import numpy as np

        from lora_hf.data.metrics.multi_label import score_label_sets

        logits, references = np.asarray(predictions), np.asarray(labels).astype(int)
        self.check_finite(logits, "logits")
        probabilities = _sigmoid(logits)
        return score_label_sets(references, probabilities, self._thresholds(references, probabilities))

    def majority(self, labels: ArrayLike, train_labels: ArrayLike | None = None) -> dict[str, float]:
        """Returns the scores of predicting for every row the labels that most rows of `train_labels` have."""
        import numpy as np

        from lora_hf.data.metrics.multi_label import score_label_sets

        references = np.asarray(labels).astype(int)
        known = references if train_labels is None else np.asarray(train_labels)
        constant = np.broadcast_to((known.mean(axis=0) > 0.5).astype(float), references.shape)
        return score_label_sets(references, constant, np.full(self.num_labels, DEFAULT_THRESHOLD))

    def calibrated(self, outputs: np.ndarray, rows: Dataset) -> MultiLabelClassification:
        from lora_hf.data.metrics.multi_label import choose_thresholds

        return replace(self, thresholds=choose_thresholds(_labels_of(rows), _sigmoid(outputs)))

    def evaluation(self, outputs: np.ndarray, rows: Dataset) -> dict[str, Any]:
        from lora_hf.data.metrics.evaluation import evaluate_label_sets, with_texts

        labels, probabilities = _labels_of(rows), _sigmoid(outputs)
        found = evaluate_label_sets(labels, probabilities, self._thresholds(labels, probabilities), self.label_names)
        return with_texts(found, self.texts_of(rows))

    def format_answer(self, output: np.ndarray) -> dict[str, Any]:
        """Returns the labels at or above their threshold and the probability of each, from logits `(num_labels,)`."""
        probabilities = _sigmoid(output)
        return {"labels": self._chosen(probabilities), "probabilities": self._named(probabilities)}

    def prediction_lines(self, outputs: np.ndarray, rows: Dataset) -> Iterator[dict[str, Any]]:
        """Yields the row number, labels, predicted labels and logits of each row."""
        import numpy as np

        for index, (labels, row) in enumerate(zip(rows["label"], np.asarray(outputs, dtype=float), strict=True)):
            names = [name for name, value in zip(self.label_names, labels, strict=True) if value]
            yield {
                "row": index,
                "labels": names,
                "prediction": self._chosen(_sigmoid(row)),
                "logits": row.round(6).tolist(),
            }

    def weaknesses(self, outputs: np.ndarray) -> list[str]:
        import numpy as np

        predicted = _sigmoid(outputs) >= np.array(self.thresholds or DEFAULT_THRESHOLD)
        if len(predicted) < 2 or (predicted != predicted[0]).any():
            return []
        names = [name for name, chosen in zip(self.label_names, predicted[0], strict=True) if chosen]
        return [f"the model predicts the same labels ({', '.join(names) or 'none'}) for every row"]

    def _chosen(self, probabilities: np.ndarray) -> list[str]:
        thresholds = self.thresholds or (DEFAULT_THRESHOLD,) * self.num_labels
        triples = zip(self.label_names, probabilities, thresholds, strict=True)
        return [name for name, probability, threshold in triples if probability >= threshold]

    def _thresholds(self, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        import numpy as np

        from lora_hf.data.metrics.multi_label import choose_thresholds

        return np.array(self.thresholds or choose_thresholds(labels, probabilities))


def _labels_of(rows: Dataset) -> np.ndarray:
    import numpy as np

    return np.asarray(rows["label"][:]).astype(int)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities in double precision."""
    import numpy as np
    from scipy.special import expit

    return expit(np.asarray(logits, dtype=np.float64))


def multi_label_task(config: TaskConfig, source: Source) -> MultiLabelClassification:
    return MultiLabelClassification(
        name=config.name,
        source=source,
        text_columns=config.text_columns or (),
        label_names=config.label_names or (),
        best_metric=config.metric or "micro_f1",
        thresholds=config.thresholds or (),
    )


def check_multi_label(config: TaskConfig) -> list[str]:
    """Returns what is wrong with the keys that describe several labels a row."""
    problems, columns, names = [], config.label_columns, config.label_names or ()
    if columns is not None:
        if config.label_column != LABEL_COLUMN or config.label_separator is not None:
            problems.append("task.label_columns: replaces task.label_column and task.label_separator; leave them out")
        if len(set(columns)) < len(columns) or set(columns) & set(config.text_columns or ()):
            problems.append(
                "task.label_columns: expected different columns, none of them in task.text_columns, found "
                f"{', '.join(columns)}"
            )
        if len(columns) != len(names):
            problems.append(
                f"task.label_names: expected a name for each of the {len(columns)} task.label_columns, found "
                f"{len(names)}"
            )
    if config.label_separator == "":
        problems.append("task.label_separator: expected a character such as ';', found an empty text")
    if config.thresholds is not None and len(config.thresholds) != len(names):
        problems.append(
            f"task.thresholds: expected one for each of the {len(names)} labels, found {len(config.thresholds)}"
        )
    return problems


def read_label_sets(config: TaskConfig, path: Path) -> Dataset:
    """Returns the text columns under their own names, and as `label` a 0 or 1 for each of `task.label_names`."""
    import pyarrow

    rows = read_columns(config, path)
    columns = text_arrays(config, rows, path)
    names = [nfc(name) for name in config.label_names or ()]
    found = _from_columns(config, rows, path) if config.label_columns else _from_sets(config, rows, path, names)
    columns["label"] = pyarrow.array(found, pyarrow.list_(pyarrow.int8()))
    return to_dataset(pyarrow.table(columns))


def _from_columns(config: TaskConfig, rows: Dataset, path: Path) -> list[list[int]]:
    columns = []
    for column in config.label_columns or ():
        values = rows[column][:]
        found = [COLUMN_VALUES.get(str(value).strip().lower()) for value in values]
        if None in found:
            row = found.index(None)
            raise wrong_value(path, row, column, "0 or 1", f"{values[row]!r:.100}")
        columns.append(found)
    return [list(row) for row in zip(*columns, strict=True)]


def _from_sets(config: TaskConfig, rows: Dataset, path: Path, names: Sequence[str]) -> list[list[int]]:
    found, sets = [], list(label_sets(config, rows, path))
    if are_indicators(sets, len(names)):
        return [list(map(int, labels)) for labels in sets]
    for row, labels in enumerate(sets):
        indicators = [0] * len(names)
        for label in labels:
            index = label_of(label, names)
            if index is None:
                raise DataError(
                    f"{path}: row {row} (counting from 0) has the label {label!r:.100} in column "
                    f"{config.label_column!r}; expected labels out of task.label_names ({', '.join(names)})"
                    f"{did_you_mean(str(label), names)}"
                )
            indicators[int(index)] = 1
        found.append(indicators)
    return found


def are_indicators(sets: Sequence[Sequence[Any]], count: int) -> bool:
    """Whether each row has a 0 or 1 for each label, as transformers' models take them; all `[0, 1]` are two ids."""
    in_form = all(len(labels) == count and all(value in (0, 1) for value in labels) for labels in sets)
    return count > 1 and in_form and any(labels != [0, 1] for labels in sets)


def label_sets(config: TaskConfig, rows: Dataset, path: Path) -> Iterator[list[Any]]:
    """Yields the labels of each row as the file holds them; the ids of a file that names its classes become names.

    Raises:
        DataError: a row whose labels are neither a list nor, with `task.label_separator`, a text.
    """
    column, separator = config.label_column or "", config.label_separator
    for row, value in enumerate(class_names(rows, column)):
        if separator is not None and isinstance(value, str):
            yield [label for part in value.split(separator) if (label := part.strip())]
        elif separator is None and isinstance(value, list):
            yield value
        else:
            expected = "a list of labels" if separator is None else f"labels in a text, separated by {separator!r}"
            hint = "; set task.label_separator if a text holds several" if isinstance(value, str) else ""
            raise wrong_value(path, row, column, expected, f"{value!r:.100}{hint}")
