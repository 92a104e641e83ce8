"""What a run's rows are like: their lengths, labels, duplicates, and two of them as the model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lora_hf.core.errors import DataError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.classification import TextClassification

SAMPLE = 2000  # rows whose full length is measured; the first ones of a split
UNLIMITED = 10**9
QUANTILES = {"median": 0.5, "95th percentile": 0.95, "longest": 1.0}
SHOWN = 2


@dataclass
class SplitOverview:
    """One split.

    Attributes:
        rows: of the file; `encoded` of them, with several references each, are model inputs.
        measured: how many encoded rows the quantiles of the lengths, in tokens, come from.
        cut: how many of these are longer than `limit` tokens, and lose `loses`.
        tokens: estimate of all tokens of the split, after the cut.
        labels: rows by class; empty without classes.
        empty: how many rows of a classifier have no text.
    """

    rows: int
    measured: int
    lengths: dict[str, int]
    limit: int
    cut: int
    loses: str
    tokens: int
    labels: dict[str, int]
    empty: int = 0


@dataclass
class DataOverview:
    """All splits of a task; `duplicates` counts the rows of one split whose texts are in another."""

    splits: dict[str, SplitOverview]
    duplicates: dict[str, int]
    examples: list[list[tuple[str, bool]]] = field(default_factory=list)  # pieces of text, and whether each is trained

    def lines(self) -> list[str]:
        """Returns a few lines for a terminal."""
        lines = []
        for name, split in self.splits.items():
            lengths = ", ".join(f"{word} {length:,}" for word, length in split.lengths.items())
            cut = f"; {split.cut:,} of {split.measured:,} are cut at {split.limit:,}: they lose {split.loses}"
            labels = f"; {', '.join(f'{label} {count:,}' for label, count in split.labels.items())}"
            empty = f"; {split.empty:,} have no text"
            lines.append(f"{name}: {split.rows:,} rows; tokens: {lengths}{cut if split.cut else ''}"
                         f"{empty if split.empty else ''}{labels if split.labels else ''}")  # fmt: skip
        lines += [f"{count:,} rows of {pair}" for pair, count in self.duplicates.items() if count]
        return lines


def describe_data(
    task: Task, rows: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> DataOverview:
    """Returns what the rows of the task's splits are like.

    Raises:
        DataError: as `Task.encode`; or no row of a classifier's split has a text.
    """
    limit = min(max_length, tokenizer.model_max_length)
    splits = {name: _describe_split(task, part, tokenizer, limit) for name, part in rows.items()}
    texts = {name: list(zip(*task.texts_of(part).values(), strict=True)) for name, part in rows.items()}
    if isinstance(task, TextClassification):
        for name, split in splits.items():
            split.empty = _count_empty(task, name, texts[name])
    duplicates = {}
    for first, second in combinations(texts, 2):
        known = set(map(repr, texts[first]))
        duplicates[f"{second} are also in {first}"] = sum(repr(row) in known for row in texts[second])
    return DataOverview(splits, duplicates, _examples(task, rows[task.train_split], tokenizer, limit))


def _count_empty(task: Task, split: str, texts: Sequence[tuple[str, ...]]) -> int:
    """How many rows have no text in any of the task's columns."""
    empty = sum(not "".join(row).strip() for row in texts)
    if empty == len(texts):
        columns = " or ".join(map(repr, task.text_columns))
        raise DataError(
            f"{task.name}: no row of split {split!r} has a text in {columns}; expected texts. For data of your own, "
            "task.text_columns names the columns"
        )
    return empty


def _describe_split(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> SplitOverview:
    sample = rows[:SAMPLE]
    lengths = np.array([len(ids) for ids in task.encode(sample, tokenizer, UNLIMITED)["input_ids"]])
    per_row = np.minimum(lengths, limit).sum() / min(len(rows), SAMPLE)
    counts: list[int] = []
    if isinstance(task, TextClassification) and task.label_names and "label" in rows.column_names:
        counts = task.count_classes(rows).tolist()
    return SplitOverview(
        rows=len(rows),
        measured=len(lengths),
        lengths={word: int(np.quantile(lengths, share)) for word, share in QUANTILES.items()},
        limit=limit,
        cut=int((lengths > limit).sum()),
        loses=task.truncated_part(tokenizer),
        tokens=round(per_row * len(rows)),
        labels={name: count for name, count in zip(task.label_names, counts, strict=False) if count},
    )


def _examples(
    task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[list[tuple[str, bool]]]:
    encoded = task.encode(rows[:SHOWN], tokenizer, limit)
    labels: Sequence[Any] = encoded.get("labels", ())
    examples = []
    for index, ids in enumerate(encoded["input_ids"][:SHOWN]):
        by_token = task.problem_type is None and len(labels) > index and isinstance(labels[index], list)
        if by_token and len(labels[index]) != len(ids):  # a target of its own
            examples.append([(tokenizer.decode(ids), False), (tokenizer.decode(labels[index]), True)])
            continue
        trained = [label != IGNORE_INDEX for label in labels[index]] if by_token else [False] * len(ids)
        pieces = groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
        examples.append([(tokenizer.decode([token for token, _ in part]), flag) for flag, part in pieces])
    return examples
